"""Rows -> micro-batches -> windows: the order, the padding, the position in the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain, islice, pairwise
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, get_worker_info
from transformers.trainer_pt_utils import BatchRebalanceSampler, get_length_grouped_indices

from hflit.data.columns import is_list
from hflit.data.dealing import BLANK, Batch, Deal, RowNumbers

IGNORE_INDEX = -100  # label of a token from which nothing is learned
Order = Callable[[int], list[int]]  # epoch -> row numbers
# Where a table of rows carries the seed of its batch, and that it is a blank one.
SEED, IS_BLANK = b"hflit_seed", b"hflit_blank"


class BatchOrder(Sampler[list[int]]):
    """Which rows make which batch: a pure function of seed and epoch.

    Args:
        rows: Number of rows.
        batch_size: Rows in a batch; the last one of an epoch may be smaller.
        seed: Shuffles, differently each epoch; None keeps the order of the rows.
        drop_last: Leave out the last batch if it is smaller.
        draws: Seed of what is drawn while a batch is collated (masks), another for each batch and
            epoch; None leaves drawing to the global random numbers, as transformers does.
        order: Epoch -> row numbers, in place of the order that `seed` gives.
        rebalanced: Makes the batches itself, of as many rows as their lengths allow, and for this
            process only.
        deal: Which of the batches this process gets; all of them by default.
        batches: Epoch -> all its batches, equally many each, in place of batches of `batch_size`.

    Attributes:
        skip: Batches that the next epoch leaves out, and reads no row of.
        hand: Rows of each batch of the epoch.
    """

    skip = 0
    hand: list[RowNumbers] = []

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: int | None = None,
        drop_last: bool = False,
        draws: int | None = None,
        order: Order | None = None,
        rebalanced: BatchRebalanceSampler | None = None,
        deal: Deal | None = None,
        batches: Callable[[int], list[list[int]]] | None = None,
    ) -> None:
        self.deal = deal or Deal()
        self.batches = batches
        self.rows = rows
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.draws = draws
        self.order = order or shuffled(rows, seed)
        self.rebalanced = rebalanced
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch, counting from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of this process in an epoch."""
        if self.rebalanced is not None:
            return len(self.rebalanced)
        return self.deal.count(self._count(), self.batch_size, self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        """Row numbers of each batch."""
        skip, self.skip = self.skip, 0
        if self.rebalanced is not None:
            self.rebalanced.set_epoch(self.epoch)
            rank, world = self.deal.rank, self.deal.world
            hand = [(i * world + rank, RowNumbers(rows)) for i, rows in enumerate(self.rebalanced)]
        else:
            if self.batches is not None:
                batches = self.batches(self.epoch)
            else:
                order = self.order(self.epoch)
                starts = range(0, self._count() * self.batch_size, self.batch_size)
                batches = [order[start : start + self.batch_size] for start in starts]
            hand = self.deal(batches, self.batch_size, self.drop_last)
        self.hand = [rows for _, rows in hand]
        for number, rows in hand[skip:]:
            if self.draws is not None:
                rows.seed = _seed(self.draws, self.epoch, number)
            yield rows

    def _count(self) -> int:
        """Batches of all processes in an epoch."""
        if self.batches is not None:
            return len(self.batches(0))
        if self.drop_last:
            return self.rows // self.batch_size
        return math.ceil(self.rows / self.batch_size)


def shuffled(rows: int, seed: int | None) -> Order:
    """Another order each epoch, or with a seed of None always the order of the rows."""

    def order(epoch: int) -> list[int]:
        if seed is None:
            return list(range(rows))
        # The order accelerate gives a shuffled loader, so that batches equal transformers'.
        generator = torch.Generator().manual_seed(seed + epoch)
        return torch.randperm(rows, generator=generator).tolist()

    return order


def grouped(lengths: list[int], window_rows: int, seed: int | None, epochs: bool = True) -> Order:
    """Rows of like length together, otherwise at random: transformers' `group_by_length`.

    Args:
        lengths: Tokens of each row.
        window_rows: Rows of one update, which are the ones to be alike.
        seed: Of the order; None draws from the global random numbers.
        epochs: Whether each epoch gets an order of its own.
    """

    def order(epoch: int) -> list[int]:
        generator = None
        if seed is not None:
            generator = torch.Generator().manual_seed(seed + epoch * epochs)
        return get_length_grouped_indices(lengths, window_rows, generator=generator)

    return order


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class TokenRows(torch.utils.data.Dataset):
    """Tokenized rows, fetched a batch at a time as one Arrow table."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows.with_format("arrow")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> pa.Table:
        """One row, as a table."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> pa.Table:
        """The rows of one batch, as a table."""
        table = self.rows[list(indices)]
        seed = getattr(indices, "seed", None)
        marks = {} if seed is None else {SEED: str(seed)}
        if getattr(indices, "is_blank", False):
            marks[IS_BLANK] = ""
        return table.replace_schema_metadata(marks) if marks else table


class Collator:
    """Rows of token ids -> tensors, each row padded to the longest of its batch.

    Args:
        padding: Column -> value that fills a short row.
        side: `right` or `left`: where the filling goes.
        finish: Last touch on a padded batch, given the seed of the batch too.
        draws: Seed of what `finish` draws, for the batches of a stream, which carry none.
    """

    epoch = 0
    streamed = 0  # batches of the epoch so far, if they come from a stream

    def __init__(
        self,
        padding: dict[str, int],
        side: str = "right",
        finish: Callable[[Batch, int | None], Batch] = lambda batch, seed: batch,
        draws: int | None = None,
    ) -> None:
        self.padding = padding
        self.side = side
        self.finish = finish
        self.draws = draws

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counting from 0."""
        self.epoch, self.streamed = epoch, 0

    def __call__(self, rows: pa.Table | list[dict[str, Any]]) -> Batch:
        """Make one batch.

        Returns:
            Token columns, `(batch, seq)`, with `attention_mask`; others `(batch,)` or
            `(batch, width)`.
        """
        seed = None
        if isinstance(rows, list):  # a stream gives rows one by one
            rows = pa.Table.from_pylist(rows)
            seed = self._seed_in_stream()
            marks: dict[bytes, bytes] = {}
        else:
            marks = rows.schema.metadata or {}
            seed = int(marks[SEED]) if SEED in marks else None
        batch = {
            name: self._column(rows[name].combine_chunks(), name) for name in rows.column_names
        }
        if "attention_mask" not in batch:
            filled = self._filled(rows["input_ids"].combine_chunks())
            batch["attention_mask"] = torch.from_numpy(filled.astype(np.int64))
        batch = self.finish(batch, seed)
        return {**batch, BLANK: torch.zeros(1)} if IS_BLANK in marks else batch

    def _seed_in_stream(self) -> int | None:
        if self.draws is None:
            return None
        worker = get_worker_info()
        number, self.streamed = self.streamed, self.streamed + 1
        return _seed(self.draws, self.epoch, number, 0 if worker is None else worker.id)

    def _column(self, column: pa.Array, name: str) -> Tensor:
        if not is_list(column.type):
            values = torch.from_numpy(column.to_numpy(zero_copy_only=False).copy())
            return values.float() if values.is_floating_point() else values
        flat = column.flatten().to_numpy(zero_copy_only=False)
        filled = self._filled(column)
        # Labels stay float32; token ids become int64, which embeddings take.
        dtype = np.float32 if flat.dtype.kind == "f" else np.int64
        padded = np.full(filled.shape, self.padding.get(name, 0), dtype)
        padded[filled] = flat
        return torch.from_numpy(padded)

    def _filled(self, column: pa.Array) -> np.ndarray:
        """Where a padded column holds values, `(batch, seq)`."""
        lengths = column.value_lengths().to_numpy()
        filled = np.arange(lengths.max()) < lengths[:, None]
        return filled[:, ::-1] if self.side == "left" else filled


class WindowLoader:
    """Groups micro-batches into windows: one window is one weight update.

    Iterating yields lists of up to `accumulation` micro-batches; the last list of an epoch may be
    shorter. So Lightning's step counters count weight updates.

    Args:
        batches: Loader of micro-batches.
        accumulation: Micro-batches in a window.
        start: First epoch, and the windows of it to leave out, as they have been trained on. Rows
            of a stream are read and dropped, all others stay unread.
        deal: Which batches of a stream this process gets; all of them by default.
    """

    def __init__(
        self,
        batches: DataLoader,
        accumulation: int = 1,
        start: tuple[int, int] = (0, 0),
        deal: Deal | None = None,
    ) -> None:
        self.batches = batches
        self.deal = deal or Deal()
        self.accumulation = accumulation
        self.epoch, self.skip = start
        # Where Lightning looks for set_epoch.
        self.sampler = batches.batch_sampler

    def __len__(self) -> int:
        """Windows in an epoch; TypeError for a stream."""
        return math.ceil(len(self.batches) / self.accumulation)

    def __iter__(self) -> Iterator[list[Batch]]:
        """Windows of one epoch; ValueError if a stream gives none, as all later ones would."""
        # A generator on purpose: Lightning opens a loader once more than it reads it, and each
        # opening of a DataLoader draws from the global random numbers.
        skip, self.skip = self.skip * self.accumulation, 0
        if isinstance(self.batches.collate_fn, Collator):
            self.batches.collate_fn.set_epoch(self.epoch)
        self.epoch += 1
        if isinstance(self.sampler, BatchOrder):
            self.sampler.skip, skip = skip, 0
        # accelerate fetches one batch ahead. Where collating draws random numbers (masking), doing
        # the same keeps the stream of random numbers equal to transformers'.
        batches: Iterator[Batch] = (batch for batch, _ in pairwise(chain(self.batches, [None])))
        if not isinstance(self.sampler, BatchOrder):
            batches = self.deal.of_stream(batches)
        batches = islice(batches, skip, None)
        window = list(islice(batches, self.accumulation))
        if not (window or skip or isinstance(self.sampler, BatchOrder)):
            raise ValueError(
                f"Pass {self.epoch} over the streamed training data gave no batch: see "
                "dataloader_drop_last, and whether they can be read more than once."
            )
        while window:
            yield window
            window = list(islice(batches, self.accumulation))

    def rows_of(self, window: int, batch: int) -> list[int] | None:
        """Numbers of the rows of one micro-batch of this epoch; None in a stream."""
        number = window * self.accumulation + batch
        if not isinstance(self.sampler, BatchOrder) or number >= len(self.sampler.hand):
            return None
        rows = self.sampler.hand[number]
        return None if rows.is_blank else list(rows)

    # Lightning takes a loader that has these two for one that can start in mid-epoch. The data
    # module says where: Lightning loads the states of loaders too late.

    def state_dict(self) -> dict[str, int]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing."""
