"""Rows into rows of tokens: by datasets, whose cache keeps them."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
from datasets.fingerprint import Hasher
from filelock import FileLock

from hflit.data.files import bars_hidden, flaw_of_cache
from hflit.data.tokenization import Tokenization, first_row

logger = logging.getLogger(__name__)

NO_TOKENS = ": its text is empty to the tokenizer. Leave such rows out."
LONG = 50_000  # rows, from which on there is a progress bar


def encoded(
    rows: Any,
    tokenization: Tokenization,
    called: str,
    batch_size: int,
    processes: int | None,
    is_cached: bool,
    is_shared: bool,
) -> Any:
    """Rows of tokens.

    Args:
        rows: A `datasets.Dataset`, or an `IterableDataset` for the same when it is read.
        tokenization: How a row becomes token ids.
        called: How errors call the data.
        batch_size: Rows tokenized at a time.
        processes: That tokenize; None for this one.
        is_cached: Keep them for the next run, and read them from disk as needed.
        is_shared: Whether several processes ask for the same at once: one of them tokenizes, and
            the others read what it wrote.

    Raises:
        ValueError: There is not a single token to learn from.
    """
    encode: dict[str, Any] = {
        "batched": True,
        "batch_size": batch_size,
        "remove_columns": tokenization.names,
        "features": tokenization.features,
        "with_indices": tokenization.with_indices,
    }
    if isinstance(rows, datasets.IterableDataset):
        encode["with_indices"] = True
        return rows.map(partial(_encode_told, rows, tokenization, called), **encode)

    key = Hasher.hash([rows._fingerprint, tokenization.settings])
    if is_cached:
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "hflit"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(flaw_of_cache() or f"{error}") from error
        encode["cache_file_name"] = str(folder / f"{key}.arrow")
    waits = is_cached and is_shared
    turn = FileLock(f"{encode['cache_file_name']}.lock") if waits else nullcontext()
    with turn, bars_hidden(len(rows) < LONG):
        tokens = rows.with_format("arrow").map(
            tokenization.table,
            **encode,
            num_proc=processes,
            new_fingerprint=key,
            keep_in_memory=not is_cached,
            load_from_cache_file=is_cached,
        )
    _check(tokens, tokenization, called)
    _report_cut(tokens, tokenization, called)
    return tokens.with_format(None)


def _encode_told(
    rows: datasets.IterableDataset,
    tokenization: Tokenization,
    called: str,
    batch: dict[str, list[Any]],
    indices: list[int],
) -> dict[str, list[Any]]:
    """Encode rows of a stream; the row that cannot be encoded is looked for when one cannot."""
    try:
        return tokenization(tokenization.plain(batch), indices)
    except Exception:
        tokenization.check(rows, f"streamed {called}", indices[-1] + 1)
        raise


def _check(tokens: datasets.Dataset, tokenization: Tokenization, called: str) -> None:
    table = tokens.with_format("arrow")[:]
    for column in tokenization.limits.values():
        row = first_row(pc.equal(pc.list_value_length(table[column]), 0))
        if row is not None:
            raise ValueError(f"Row {row} of the {called} data has no tokens{NO_TOKENS}")
    if not pc.any(pc.greater(pc.list_value_length(table["input_ids"]), 0)).as_py():
        raise ValueError(f"The {called} data has no tokens{NO_TOKENS}")


def _report_cut(tokens: datasets.Dataset, tokenization: Tokenization, called: str) -> None:
    for name, column in tokenization.limits.items():
        longest = getattr(tokenization, name)
        if longest is None:
            continue
        lengths = pc.list_value_length(tokens.with_format("arrow")[:][column])
        reached = pc.sum(pc.equal(lengths, longest)).as_py()
        if reached:
            told = "%d of %d %s rows reach %s=%d tokens; what is longer was cut."
            logger.warning(told, reached, len(tokens), called, name, longest)
