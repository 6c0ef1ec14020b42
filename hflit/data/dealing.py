"""Which process gets which batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import Sampler

Batch = dict[str, Tensor]
BLANK = "blank"  # key of a batch whose row fills a place: it weighs 0 and counts 0


class RowNumbers(list[int]):
    """Numbers of the rows of one batch.

    Attributes:
        seed: Of what is drawn while they are collated.
        is_blank: Whether they only fill a place.
    """

    seed: int | None = None
    is_blank: bool = False


class _Listed(Sampler[list[int]]):
    """Batches that are there already, as accelerate asks for them."""

    def __init__(self, batches: list[list[int]], batch_size: int, drop_last: bool) -> None:
        self.batches, self.batch_size, self.drop_last = batches, batch_size, drop_last

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


@dataclass(frozen=True)
class Deal:
    """Gives batch i of the common order to process i % world.

    In training all processes get equally many batches, as they wait for each other at each update.

    Attributes:
        rank: The process.
        world: Number of processes.
        fill: What stands for a batch that is not there: a blank row; rows from the start of the
            order, as accelerate does it, which also makes the last batch whole; or nothing.
        splits: Each batch is cut into one piece for each process instead.
    """

    rank: int = 0
    world: int = 1
    fill: Literal["blank", "wrap", "nothing"] = "blank"
    splits: bool = False

    def count(self, batches: int, batch_size: int, drop_last: bool) -> int:
        """Batches of one process, of so many in all."""
        if self.world == 1:
            return batches
        if self.fill == "wrap":
            # Only the last of them may be smaller, and its size decides nothing here.
            rows = [[0] * batch_size] * batches
            return len(self._shard(rows, batch_size, drop_last))
        if self.fill == "nothing":
            return len(range(self.rank, batches, self.world))
        return batches if self.splits else math.ceil(batches / self.world)

    def __call__(
        self, batches: list[list[int]], batch_size: int, drop_last: bool
    ) -> list[tuple[int, RowNumbers]]:
        """The batches of this process, each with its number in the common order."""
        if self.world == 1:
            return list(enumerate(map(RowNumbers, batches)))
        if self.fill == "wrap":
            mine = self._shard(batches, batch_size, drop_last)
            return [(i * self.world + self.rank, RowNumbers(rows)) for i, rows in enumerate(mine)]
        if self.splits:
            size = math.ceil(batch_size / self.world)
            pieces = [rows[self.rank * size : (self.rank + 1) * size] for rows in batches]
            hand = list(enumerate(map(RowNumbers, pieces)))
        else:
            numbers = range(self.rank, len(batches), self.world)
            hand = [(number, RowNumbers(batches[number])) for number in numbers]
        if self.fill == "nothing":
            return hand
        missing = self.count(len(batches), batch_size, drop_last) - len(hand)
        hand += [(len(batches), RowNumbers())] * missing
        return [(number, rows or _blank(batches)) for number, rows in hand]

    def of_stream(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of this process, from a loader that gives all of them."""
        iterator = iter(batches)
        while round_ := list(islice(iterator, self.world)):
            if self.rank < len(round_):
                yield round_[self.rank]
            elif self.fill != "nothing":
                row = {name: column[:1] for name, column in round_[0].items()}
                yield {**row, BLANK: row["input_ids"].new_zeros(1)}

    def _shard(
        self, batches: list[list[int]], batch_size: int, drop_last: bool
    ) -> BatchSamplerShard:
        listed = _Listed(batches, batch_size, drop_last)
        return BatchSamplerShard(listed, self.world, self.rank, split_batches=self.splits)


def _blank(batches: list[list[int]]) -> RowNumbers:
    row = RowNumbers(batches[0][:1])
    row.is_blank = True
    return row


def counts(batch: Batch) -> bool:
    """Whether a batch is there to be learned, and not to fill a place."""
    return BLANK not in batch
