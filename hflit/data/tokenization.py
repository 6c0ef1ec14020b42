"""What every kind of tokenization shares: columns, missing values, the cache key."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy

import hflit
from hflit.data.batching import Batch
from hflit.data.columns import arrow_column, plain_values

Columns = dict[str, Any]  # name -> list or Arrow array

SCAN_ROWS = 10_000  # rows read at a time when data is looked through before tokenizing


class Tokenization:
    """Rows of one kind of task -> token ids and labels.

    A subclass names its columns, looks through the data once (`fit` the training rows, `check`
    any rows) and turns batches of rows into batches of token ids (`__call__`).

    Args:
        tokenizer: Tokenizer of the base.
        columns: Column names in the order of the task's table, see `HFTrainer`.
        maxlength: Longest row in tokens, or None for no limit.
    """

    default_columns: ClassVar[tuple[str | None, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()  # what a subclass takes beside columns and maxlength
    evaluation_columns: ClassVar[tuple[str, ...]] = ()  # made of every row, not for training
    predicts_next = False  # whether labels are the tokens that come next
    with_indices: ClassVar[bool] = False  # whether `__call__` is told the numbers of its rows
    # Attribute -> the column it limits, for those that cut what is longer.
    limits: dict[str, str] = {"maxlength": "input_ids"}

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        columns: str | tuple[str | None, ...] | None = None,
        maxlength: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.columns = self.resolve_columns(columns)
        self.maxlength = maxlength
        # Column -> value that fills a short row, where that is not 0.
        self.padding: dict[str, int] = {
            "input_ids": tokenizer.pad_token_id,
            "token_type_ids": tokenizer.pad_token_type_id,
        }

    def resolve_columns(
        self, columns: str | tuple[str | None, ...] | None
    ) -> tuple[str | None, ...]:
        """Fill a string or a shorter tuple up with the default names."""
        if columns is None:
            return self.default_columns
        given: tuple[Any, ...]
        given = tuple(columns) if isinstance(columns, (tuple, list)) else (columns,)
        if not all(isinstance(name, str | None) for name in given):
            raise ValueError(
                f"columns={columns!r} must be texts in the order {self.default_columns!r}. Columns "
                "whose names are numbers need other names."
            )
        if not given or len(given) > len(self.default_columns):
            raise ValueError(
                f"columns={columns!r} must name 1 to {len(self.default_columns)} columns, "
                f"in the order {self.default_columns!r}."
            )
        given += self.default_columns[len(given) :]
        names = [name for name in given if name is not None]
        needed = [default for default in self.default_columns if default is not None]
        pairs = zip(given, self.default_columns, strict=True)
        if any(name is None and default is not None for name, default in pairs):
            raise ValueError(f"columns={columns!r} must name a column each for {needed!r}.")
        if len(set(names)) < len(names):
            raise ValueError(f"columns={columns!r} names a column twice.")
        return given

    @property
    def names(self) -> list[str]:
        """Columns to read, without the unused ones."""
        return [name for name in self.columns if name is not None]

    @property
    def numbers(self) -> list[str]:
        """Columns of a table of text that may be numbers or truth values; the others are text."""
        return []

    @property
    def converters(self) -> dict[str, Callable[[Any], Any]]:
        """Column -> what brings its values to one kind, where a column may mix several."""
        return {}

    @property
    def features(self) -> datasets.Features:
        """Arrow types of what `__call__` returns."""
        raise NotImplementedError

    def fit(self, rows: datasets.Dataset, limit: int | None = None) -> None:
        """Learn from the training rows what encoding needs, and check them.

        Args:
            rows: Training rows.
            limit: Rows the run will read, if `rows` is a stream; None for all of them.
        """
        self.check(rows, "training", limit)

    def config_changes(self, config: PreTrainedConfig) -> dict[str, Any]:
        """What the data decide about the model's config."""
        return {}

    def check(self, rows: datasets.Dataset, split: str, limit: int | None = None) -> None:
        """Raise ValueError naming the first row that cannot be encoded."""
        count = 0
        for start, table in self.tables(rows, split, limit):
            self._check_table(table, start, split)
            count += len(table)
        if not count:
            raise ValueError(f"The {split} data has no rows.")

    def _check_table(self, table: pa.Table, start: int, split: str) -> None:
        check_texts(table, start, self.names, split)

    def tables(
        self, rows: datasets.Dataset | datasets.IterableDataset, split: str, limit: int | None
    ) -> Iterator[tuple[int, pa.Table]]:
        """Read rows in Arrow tables, each with the number of its first row.

        Args:
            rows: Data set or stream.
            split: How errors call it.
            limit: Rows to read; None for all.

        Raises:
            ValueError: A column mixes kinds, or a row of a stream lacks one.
        """
        start = 0
        if isinstance(rows, datasets.IterableDataset):
            tables = self._tables_of_stream(rows, split)
        else:
            tables = rows.with_format("arrow").iter(batch_size=SCAN_ROWS)
        for table in tables:
            if limit is not None and start + len(table) > limit:
                table = table.slice(0, limit - start)
            yield start, table
            start += len(table)
            if limit is not None and start >= limit:
                return

    def _tables_of_stream(self, rows: datasets.IterableDataset, split: str) -> Iterator[pa.Table]:
        # Not by datasets: to it an empty list and one of strings are columns of two kinds.
        start = 0
        try:
            for batch in rows.iter(batch_size=SCAN_ROWS):
                told = (split, self.converters, start)
                table = pa.table({n: arrow_column(each, n, *told) for n, each in batch.items()})
                yield table
                start += len(table)
        except KeyError as error:
            name, row = error.args[0], start
            if name not in self.names:
                raise
            with suppress(KeyError):
                for row, _ in enumerate(rows.skip(start), start + 1):  # noqa: B007  # counted
                    pass
            raise ValueError(f"Row {row} of the {split} data has no {name!r}.") from None

    def plain(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Rows of a stream, as columns, as `encode` takes them."""
        return {n: plain_values(each, self.converters.get(n)) for n, each in batch.items()}

    def encode(self, batch: dict[str, list[Any]], indices: list[int] | None = None) -> Columns:
        """Encode a batch of rows.

        Args:
            batch: Rows, as columns.
            indices: Their numbers, where `with_indices` says so.
        """
        raise NotImplementedError

    def __call__(
        self, batch: dict[str, list[Any]], indices: list[int] | None = None
    ) -> dict[str, list[Any]]:
        """As `encode`, in lists."""
        columns = self.encode(batch, indices).items()
        return {k: v.to_pylist() if isinstance(v, pa.Array) else v for k, v in columns}

    def table(self, rows: pa.Table, indices: list[int] | None = None) -> pa.Table:
        """As `encode`, from Arrow to Arrow."""
        columns = self.encode(rows.to_pydict(), indices)
        return pa.table(columns, schema=self.features.arrow_schema)

    def arrange(self, tokens: Any) -> Any:
        """Merge tokenized rows, where a task does; called once with all of them."""
        return tokens

    def finish(self, batch: Batch, seed: int | None) -> Batch:
        """Last touch on a padded batch: what is made of it rather than read."""
        return batch

    @property
    def token_columns(self) -> dict[str, datasets.Value]:
        """Columns the tokenizer fills, with the smallest type that holds them."""
        wanted = {"input_ids": "int32", "token_type_ids": "int8"}
        names = self.tokenizer.model_input_names
        return {
            name: datasets.List(datasets.Value(dtype))
            for name, dtype in wanted.items()
            if name in names
        }

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what `__call__` returns: the key of the cache of tokenized rows."""
        return {
            "version": hflit.__version__,
            "kind": type(self).__name__,
            "columns": self.columns,
            "maxlength": self.maxlength,
            "tokenizer": tokenizer_settings(self.tokenizer),
        }


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[list[str]],
    maxlength: int | None,
    names: Iterable[str],
) -> Columns:
    """Columns of what a tokenizer makes of texts, or of pairs of texts.

    Fast tokenizers are asked in Rust, in all its threads, and their answers go into Arrow without
    the lists of lists that transformers makes of them; the ids are the same.

    Args:
        tokenizer: Fast or slow.
        texts: The first text of all rows, then perhaps the second.
        maxlength: Tokens to cut rows at, or None.
        names: Columns wanted: `input_ids`, `token_type_ids`, `special_tokens_mask`.
    """
    names = list(names)
    if not _asks_rust_alone(tokenizer):
        tokens = tokenizer(
            *texts,
            max_length=maxlength,
            truncation=maxlength is not None,
            return_attention_mask=False,
            return_special_tokens_mask="special_tokens_mask" in names,
            verbose=False,  # no advice about rows that merging will cut
        )
        return {name: tokens[name] for name in names}
    fast: Any = tokenizer
    cut = TruncationStrategy.LONGEST_FIRST if maxlength is not None else None
    fast.set_truncation_and_padding(
        padding_strategy=PaddingStrategy.DO_NOT_PAD,
        truncation_strategy=cut or TruncationStrategy.DO_NOT_TRUNCATE,
        max_length=maxlength,
        stride=0,
        pad_to_multiple_of=None,
        padding_side=None,
    )
    backend = fast.backend_tokenizer
    backend.encode_special_tokens = fast.split_special_tokens
    found = backend.encode_batch_fast(
        texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))
    )
    offsets = np.zeros(len(found) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, found), np.int32, len(found)), out=offsets[1:])

    def column(attribute: str, dtype: Any) -> pa.ListArray:
        each = chain.from_iterable(getattr(row, attribute) for row in found)
        values = np.fromiter(each, dtype, offsets[-1])
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

    columns: Columns = {}
    for name in names:
        if name == "token_type_ids" and len(texts) == 1 and not any(found[0].type_ids):
            # Of single texts the template decides, and it says 0.
            zeros = pa.array(np.zeros(offsets[-1], np.int8))
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets), zeros)
        else:
            columns[name] = column(*RUST[name])
    return columns


# Column -> what the Rust library calls it, and the smallest type that holds it.
RUST = {
    "input_ids": ("ids", np.int32),
    "token_type_ids": ("type_ids", np.int8),
    "special_tokens_mask": ("special_tokens_mask", np.int8),
}


def _asks_rust_alone(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer encodes as its Rust backend does, with nothing of its own around it."""
    own = ("__call__", "_encode_plus", "_batch_encode_plus")
    return tokenizer.is_fast and all(
        getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name, None)
        for name in own
    )


def tokenizer_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a tokenizer does, independent of which texts it has seen.

    The Rust tokenizer remembers the truncation and padding of its last call; both are left out.
    """
    settings: dict[str, Any] = {"class": type(tokenizer).__name__, "side": tokenizer.padding_side}
    settings["truncation_side"] = tokenizer.truncation_side
    settings["inputs"] = tokenizer.model_input_names
    # The backend knows which tokens are special, not which of them ends a text.
    settings["special"] = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    settings["splits_special"] = tokenizer.split_special_tokens
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        settings["backend"] = {
            k: v for k, v in backend.items() if k not in ("truncation", "padding")
        }
    else:
        settings["vocabulary"] = sorted(tokenizer.get_vocab().items())
        settings["init"] = {k: str(v) for k, v in sorted(tokenizer.init_kwargs.items())}
    return settings


def first_row(mask: pa.ChunkedArray) -> int | None:
    """Index of the first true value, or None."""
    index = pc.index(mask, True).as_py()
    return None if index < 0 else index


def check_texts(table: pa.Table, start: int, names: list[str], split: str) -> None:
    """Raise ValueError naming the first row without a text in one of the columns."""
    for name in names:
        column = table[name]
        empty = first_row(pc.is_null(column))
        if empty is not None:
            raise ValueError(f"Row {start + empty} of the {split} data has no text in {name!r}.")
        if f"{column.type}".startswith("extension<arrow.json"):  # a JSON file whose values vary
            values = enumerate(column.to_pylist(), start)
            row, odd = next(each for each in values if not each[1].startswith('"'))
            raise ValueError(
                f"Column {name!r} of the {split} data mixes kinds: row {row} holds {odd}, not text."
            )
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise ValueError(
                f"Column {name!r} of the {split} data holds {column.type}, not text: row {start} "
                f"is {column[0].as_py()!r}."
            )
