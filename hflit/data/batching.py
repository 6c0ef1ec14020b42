"""Rows -> micro-batches -> windows: the order, the padding, the position in the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

Batch = dict[str, Tensor]
SEED = b"hflit_seed"  # where a table of rows carries the seed of its batch


class RowNumbers(list[int]):
    """Numbers of the rows of one batch, with a seed for what is drawn while they are collated."""

    seed: int | None = None


class BatchOrder(Sampler[list[int]]):
    """Which rows make which batch: a pure function of seed and epoch.

    Args:
        rows: Number of rows.
        batch_size: Rows in a batch; the last one of an epoch may be smaller.
        seed: Shuffles, differently each epoch; None keeps the order of the rows.
        drop_last: Leave out the last batch if it is smaller.
        draws: Seed of what is drawn while a batch is collated (masks), another for each batch and
            epoch; None leaves drawing to the global random numbers, as transformers does.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: int | None = None,
        drop_last: bool = False,
        draws: int | None = None,
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.draws = draws
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch, counting from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch."""
        if self.drop_last:
            return self.rows // self.batch_size
        return math.ceil(self.rows / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Row numbers of each batch."""
        if self.seed is None:
            order = list(range(self.rows))
        else:
            # The order accelerate gives a shuffled loader, so that batches equal transformers'.
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.rows, generator=generator).tolist()
        for number in range(len(self)):
            batch = RowNumbers(order[number * self.batch_size : (number + 1) * self.batch_size])
            if self.draws is not None:
                entropy = np.random.SeedSequence([self.draws, self.epoch, number])
                batch.seed = int(entropy.generate_state(1)[0])
            yield batch


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
        return table if seed is None else table.replace_schema_metadata({SEED: str(seed)})


class Collator:
    """Rows of token ids -> tensors, each row padded to the longest of its batch.

    Args:
        padding: Column -> value that fills a short row.
        side: `right` or `left`: where the filling goes.
        finish: Last touch on a padded batch, given the seed of the batch too.
    """

    def __init__(
        self,
        padding: dict[str, int],
        side: str = "right",
        finish: Callable[[Batch, int | None], Batch] = lambda batch, seed: batch,
    ) -> None:
        self.padding = padding
        self.side = side
        self.finish = finish

    def __call__(self, rows: pa.Table | list[dict[str, Any]]) -> Batch:
        """Make one batch.

        Returns:
            Token columns, `(batch, seq)`, with `attention_mask`; others `(batch,)` or
            `(batch, width)`.
        """
        if isinstance(rows, list):  # a stream gives rows one by one
            rows = pa.Table.from_pylist(rows)
        batch = {
            name: self._column(rows[name].combine_chunks(), name) for name in rows.column_names
        }
        if "attention_mask" not in batch:
            ones = pa.ListArray.from_arrays(*_offsets_and_ones(rows["input_ids"].combine_chunks()))
            batch["attention_mask"] = self._column(ones, "attention_mask")
        seed = (rows.schema.metadata or {}).get(SEED)
        return self.finish(batch, None if seed is None else int(seed))

    def _column(self, column: pa.Array, name: str) -> Tensor:
        if not _is_list(column.type):
            values = torch.from_numpy(column.to_numpy(zero_copy_only=False).copy())
            return values.float() if values.is_floating_point() else values
        flat = column.flatten().to_numpy(zero_copy_only=False)
        lengths = column.value_lengths().to_numpy()
        longest = int(lengths.max())
        filled = np.arange(longest)[None, :] < lengths[:, None]  # (batch, seq)
        if self.side == "left":
            filled = filled[:, ::-1]
        # Labels stay float32; token ids become int64, which embeddings take.
        dtype = np.float32 if flat.dtype.kind == "f" else np.int64
        padded = np.full((len(lengths), longest), self.padding.get(name, 0), dtype)
        padded[filled] = flat
        return torch.from_numpy(padded)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _offsets_and_ones(column: pa.Array) -> tuple[pa.Array, pa.Array]:
    lengths = column.value_lengths().to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.array(offsets), pa.array(np.ones(offsets[-1], np.int8))


class WindowLoader:
    """Groups micro-batches into windows: one window is one weight update.

    Iterating yields lists of up to `accumulation` micro-batches; the last list of an epoch may be
    shorter. So Lightning's step counters count weight updates.

    Args:
        batches: Loader of micro-batches.
        accumulation: Micro-batches in a window.
    """

    def __init__(self, batches: DataLoader, accumulation: int = 1) -> None:
        self.batches = batches
        self.accumulation = accumulation
        # Where Lightning looks for set_epoch.
        self.sampler = batches.batch_sampler

    def __len__(self) -> int:
        """Windows in an epoch; TypeError for a stream."""
        return math.ceil(len(self.batches) / self.accumulation)

    def __iter__(self) -> Iterator[list[Batch]]:
        """Windows of one epoch."""
        # A generator on purpose: Lightning opens a loader once more than it reads it, and each
        # opening of a DataLoader draws from the global random numbers.
        window: list[Batch] = []
        for batch in _one_ahead(self.batches):
            window.append(batch)
            if len(window) == self.accumulation:
                yield window
                window = []
        if window:
            yield window


def _one_ahead(batches: DataLoader) -> Iterator[Batch]:
    # accelerate fetches one batch ahead. Where collating draws random numbers (masking), doing
    # the same keeps the stream of random numbers equal to transformers'.
    iterator = iter(batches)
    try:
        ahead = next(iterator)
    except StopIteration:
        return
    for batch in iterator:
        yield ahead
        ahead = batch
    yield ahead
