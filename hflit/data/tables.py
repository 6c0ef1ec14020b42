"""Tables of text, csv and tsv: their heads, their quotes, and which columns are numbers."""

from __future__ import annotations

import csv
import dataclasses
import io
import lzma
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import Hasher
from datasets.packaged_modules.csv.csv import CsvConfig

from hflit.data.flaws import delimiter, opened, too_many

# Only an empty field is missing: "NA", "None" and "null" are texts and labels.
CSV = {"keep_default_na": False, "na_values": [""]}
# Keywords with which a caller says what the fields of a csv are.
TYPING = {"features", "converters", "index_col", "thousands", "decimal"}
TYPING |= {"true_values", "false_values"}
WHOLE = r"(0|[1-9]\d{0,17})"
NUMBERS = {  # what all fields of a column look like -> what they are; the first that fits
    # What has more digits is a name, as 007 is, and stays text.
    rf"^-?{WHOLE}$": pa.int64(),
    rf"(?i)^[+-]?(({WHOLE}(\.\d*)?|\.\d+)(e[+-]?\d+)?|inf|infinity)$": pa.float64(),
    r"^(true|True|TRUE|false|False|FALSE)$": pa.bool_(),
}
ROWS_TO_TYPE = 10_000  # looked at at a time


def check_heads(files: list[Path]) -> None:
    """Raise ValueError where pandas would rename a column, or take the first one for an index."""
    for file in files:
        try:
            with opened(file) as raw:
                text = io.TextIOWrapper(raw, "utf-8-sig", errors="replace", newline="")
                fields = csv.reader(text, delimiter=delimiter(file))
                header, line = next(fields), fields.line_num + 1
                first = next((row for row in fields if row), [])
        except (StopIteration, csv.Error, EOFError, OSError, lzma.LZMAError, zipfile.BadZipFile):
            continue  # it cannot be read either, and then told in full
        twice = [name for name in header if name and header.count(name) > 1]
        if twice:
            raise ValueError(f"{file}, line 1: the header has more than one column {twice[0]!r}.")
        if len(first) > len(header):
            raise ValueError(f"{file}, line {line}: {too_many(first, header)}")


def all_text(files: Sequence[Path], options: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords that let `load_dataset` read all columns of csv files as texts.

    pandas reads some thousand rows at a time and gives each such piece kinds of its own. Empty if
    the files have other columns each, or names of several lines.
    """
    of_all = {field.name for field in dataclasses.fields(datasets.BuilderConfig)}
    known = {field.name for field in dataclasses.fields(CsvConfig)} - of_all
    config = CsvConfig(**{name: value for name, value in options.items() if name in known})
    given = {**config.pd_read_csv_kwargs, "chunksize": None, "nrows": 0}
    heads = []
    for file in files:
        with opened(file) as content:
            heads.append(list(pd.read_csv(content, **given).columns))
    names = [str(name) if isinstance(name, int) else name for name in heads[0]]
    are_names = all(isinstance(name, str) for name in names)
    if not are_names or any({*head} != {*heads[0]} for head in heads):
        return {}
    own = {} if names == heads[0] else {"names": names}  # a file without a head has numbers
    return {**own, "features": datasets.Features(dict.fromkeys(names, datasets.Value("string")))}


def typed(rows: Any, numbers: Sequence[str] | None) -> Any:
    """Rows of texts, with numbers and truth values in the columns that hold nothing else."""
    kinds = _kinds_of_numbers(rows, rows.column_names if numbers is None else numbers)
    return _with_numbers(rows, kinds) if kinds else rows


def _kinds_of_numbers(rows: Any, columns: Sequence[str]) -> dict[str, pa.DataType]:
    """Columns that hold nothing but numbers or truth values, and which."""
    left = {name: list(NUMBERS) for name in columns if name in rows.column_names}
    if not left:
        return {}
    seen: set[str] = set()
    for table in rows.select_columns([*left]).with_format("arrow").iter(ROWS_TO_TYPE):
        for name, patterns in left.items():
            fields = pc.utf8_trim_whitespace(table[name].drop_null())
            if len(fields):
                seen.add(name)
            left[name] = [each for each in patterns if _all_match(fields, each)]
        left = {name: patterns for name, patterns in left.items() if patterns}
        if not left:
            return {}
    return {name: NUMBERS[patterns[0]] for name, patterns in left.items() if name in seen}


def _all_match(fields: pa.ChunkedArray, pattern: str) -> bool:
    return pc.all(pc.match_substring_regex(fields, pattern)).as_py() is not False  # None: no field


def _with_numbers(rows: Any, kinds: dict[str, pa.DataType]) -> Any:
    order = rows.column_names
    if isinstance(rows, datasets.IterableDataset):
        numbers = {name: datasets.Value(f"{kind}") for name, kind in kinds.items()}
        features = datasets.Features({**rows.features, **numbers})
        cast: dict[str, Any] = {"function": partial(_cast, kinds=kinds), "batched": True}
        return rows.with_format("arrow").map(**cast, features=features).with_format(None)
    table = _cast(rows.select_columns([*kinds]).with_format("arrow")[:], kinds)
    # The texts stay on disk.
    parts = [rows.remove_columns([*kinds]), datasets.Dataset(table)]
    both = datasets.concatenate_datasets(parts, axis=1).select_columns(order)
    both._fingerprint = Hasher.hash([rows._fingerprint, f"{kinds}"])
    return both


def _cast(table: pa.Table, kinds: dict[str, pa.DataType]) -> pa.Table:
    for name, kind in kinds.items():
        fields = pc.utf8_trim_whitespace(table[name])
        is_flag = pa.types.is_boolean(kind)
        values = pc.equal(pc.utf8_lower(fields), "true") if is_flag else pc.cast(fields, kind)
        table = table.set_column(table.column_names.index(name), name, values)
    return table


def quotes_checked(rows: Any, name: str) -> Any:
    """Rows without a field of tabs and lines, which a quote that belongs to a text has begun.

    Raises:
        ValueError: There is one; of a stream, once it is read.
    """
    if isinstance(rows, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return type(rows)({split: quotes_checked(each, name) for split, each in rows.items()})
    if isinstance(rows, datasets.IterableDataset):
        return rows.filter(partial(_check_row, name=name), with_indices=True)
    table = rows.with_format("arrow")[:]
    for column, values in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            parts = (pc.match_substring(values, part) for part in "\t\n")
            row = pc.index(pc.and_(*parts), True).as_py()
            if row >= 0:
                _check_row({column: values[row].as_py()}, row, name)
    return rows


def _check_row(row: dict[str, Any], number: int, name: str) -> bool:
    for column, value in row.items():
        if isinstance(value, str) and "\t" in value and "\n" in value:
            raise ValueError(
                f"{name}: row {number} has lines and tabs within quotes in {column!r}: "
                f"{value[:60]!r}... If quotes are part of the texts, read them as they are, with "
                f"{{'path': {name!r}, 'quoting': 3}}; if it is meant so, with 'quoting': 0."
            )
    return True
