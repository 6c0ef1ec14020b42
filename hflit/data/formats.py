"""The three data modules: they differ only in how the user's data becomes a `datasets.Dataset`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import datasets
import pyarrow as pa

from hflit.data.columns import Converters, arrow_column
from hflit.data.files import is_name, name_of, read_files, texts_of
from hflit.data.module import DataModule

TRAIN_SPLITS = ("train", "training")
VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")


class DatasetModule(DataModule):
    """Reads `datasets.Dataset`, `DatasetDict` and streaming `IterableDataset`."""

    @staticmethod
    def read(data: Any, columns: list[str], split: str, converters: Converters) -> datasets.Dataset:
        """Keep the columns the task reads; of a dict of splits, the one meant."""
        if isinstance(data, (datasets.DatasetDict, datasets.IterableDatasetDict)):
            data = _guess_split(data, split)
        if isinstance(data, datasets.Dataset) and data.format["type"] == "custom":
            return RowsModule.read(data, columns, split, converters)  # with_transform makes rows
        # A stream may not know its columns before its first row.
        found = list(next(iter(data), {})) if data.column_names is None else data.column_names
        _check_columns(found, columns, split)
        rows = data.with_format(None).select_columns(columns)
        if isinstance(rows, datasets.Dataset) and "arrow.json" in f"{rows.features.arrow_schema}":
            return RowsModule.read(rows, columns, split, converters)  # a JSON file of many kinds
        return rows


class FrameModule(DataModule):
    """Reads pandas and polars DataFrames, and anything with `.columns` and item access."""

    @staticmethod
    def read(data: Any, columns: list[str], split: str, converters: Converters) -> datasets.Dataset:
        """Copy the columns the task reads into Arrow."""
        found = list(data.columns)
        _check_columns(found, columns, split)
        twice = [name for name in columns if found.count(name) > 1]
        if twice:
            raise ValueError(f"The {split} data has more than one column {_quoted(twice)}.")
        arrays = {name: arrow_column(list(data[name]), name, split, converters) for name in columns}
        return datasets.Dataset(pa.table(arrays))


class RowsModule(DataModule):
    """Reads an iterable of dicts: a list, a generator, any torch-style dataset of dicts."""

    @staticmethod
    def read(
        data: Iterable[dict[str, Any]], columns: list[str], split: str, converters: Converters
    ) -> datasets.Dataset:
        """Copy the columns the task reads into Arrow; a key that a row lacks is None there."""
        found: dict[str, None] = {}  # keys in the order they came
        values: dict[str, list[Any]] = {name: [] for name in columns}
        for index, row in enumerate(_iterate(data)):
            if not isinstance(row, Mapping):
                raise TypeError(
                    f"Row {index} of the {split} data is {type(row).__name__}, not a dict "
                    "of column names and values."
                )
            found.update(dict.fromkeys(row))
            for name in columns:
                values[name].append(row.get(name))
        _check_columns(list(found), columns, split)
        arrays = {
            name: arrow_column(column, name, split, converters) for name, column in values.items()
        }
        return datasets.Dataset(pa.table(arrays))


FORMATS = (DatasetModule, FrameModule, RowsModule)


def data_module(train: Any, validation: Any = None, **options: Any) -> DataModule:
    """The data module that reads `train`; `validation` may be of another kind.

    Args:
        train: `datasets.Dataset`, `IterableDataset` or `DatasetDict`, DataFrame, iterable of
            dicts; or what `read_files` reads, by its name.
        validation: The same kinds; the name of a split of `train` if that is a `DatasetDict`; or
            None for no evaluation.
        options: What `DataModule` takes.

    Raises:
        TypeError: The data are of no such kind, or a row is no dict.
        ValueError: A column is not there, twice there or of mixed kinds; no split is the one meant;
            a file cannot be read.
        FileNotFoundError: Nothing goes by the name.
    """
    names = {"train": train, "validation": validation}
    columns = [*options["tokenization"].numbers, options["args"].length_column_name]
    if is_name(train):
        train = read_files(train, columns)
    columns = [name for name in columns if name not in _texts(train)]  # here as there
    has_splits = isinstance(train, (datasets.DatasetDict, datasets.IterableDatasetDict))
    if isinstance(validation, str) and has_splits and validation in train:
        validation = train[validation]
    elif is_name(validation):
        try:
            validation = read_files(validation, columns)
        except FileNotFoundError as error:
            if not has_splits:
                raise
            raise ValueError(
                f"validation={name_of(validation)!r} is not a split of the data, which has "
                f"{_quoted(train)}, and not a file."
            ) from error
    module = _format_of(train, "train")(train, validation, **options)
    if validation is not None:
        module.readers["validation"] = _format_of(validation, "validation").read
    module.files = {split: name_of(name) for split, name in names.items() if is_name(name)}
    return module


def reader_of(data: Any) -> Callable[..., Any]:
    """What reads data of a kind, see `DataModule.read`."""
    return _format_of(data, "data").read


def _format_of(data: Any, name: str) -> type[DataModule]:
    splits = (datasets.DatasetDict, datasets.IterableDatasetDict)
    if isinstance(data, (datasets.Dataset, datasets.IterableDataset, *splits)):
        return DatasetModule
    is_frame = hasattr(data, "columns") and hasattr(data, "__getitem__")
    if is_frame and not (isinstance(data, pa.Table) or hasattr(data, "collect")):  # a LazyFrame
        return FrameModule
    if not isinstance(data, (str, bytes, dict, pa.Table)) and (
        isinstance(data, Iterable) or (hasattr(data, "__getitem__") and hasattr(data, "__len__"))
    ):
        return RowsModule
    raise TypeError(
        f"{name} is {type(data).__name__}. Pass a datasets.Dataset, a DataFrame, an iterable of "
        "dicts or the name of a file."
    )


def _texts(data: Any) -> set[str]:
    """Columns whose first value is text, of data that are read again and again."""
    if _format_of(data, "train") is DatasetModule:
        return texts_of(data)
    firsts: Mapping[str, Any] = {}
    if _format_of(data, "train") is FrameModule:
        firsts = {name: next(iter(data[name]), None) for name in data.columns}
    elif isinstance(data, list) and data and isinstance(data[0], Mapping):
        firsts = data[0]
    return {name for name, value in firsts.items() if isinstance(value, str)}


def _guess_split(splits: Any, split: str) -> Any:
    if len(splits) == 1 and split in ("training", "new"):
        return next(iter(splits.values()))
    if split == "new":
        raise ValueError(f"The data hold {_quoted(splits)}. Pass one, as in data['name'].")
    for name in TRAIN_SPLITS if split == "training" else VALIDATION_SPLITS:
        if name in splits:
            return splits[name]
    raise ValueError(
        f"None of the splits {_quoted(splits)} looks like {split} data. Pass one, as in "
        "data['name']."
    )


def _iterate(data: Any) -> Iterator[Any]:
    # A torch-style dataset need not be iterable, and some never raise IndexError.
    if not hasattr(data, "__iter__") and hasattr(data, "__len__"):
        return (data[index] for index in range(len(data)))
    return iter(data)


def _check_columns(found: list[str], wanted: list[str], split: str) -> None:
    if not found:
        raise ValueError(f"The {split} data has no rows.")
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"Column {_quoted(missing)} is not in the {split} data, which has {_quoted(found)}. "
            "Name yours with columns=(...)."
        )


def _quoted(names: Iterable[str]) -> str:
    names = list(islice(names, 31))
    return ", ".join(repr(name) for name in names[:30]) + (", ..." if len(names) > 30 else "")
