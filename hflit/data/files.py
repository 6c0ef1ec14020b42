"""Files, folders and names of the Hugging Face Hub -> rows; what is wrong is told by its line."""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import Hasher

KINDS = {  # how a file's name ends, uncompressed -> the builder of `datasets` that reads it
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
COMPRESSED: dict[str, Callable[[Path], Any]] = {  # how it ends -> what opens it
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zip": lambda path: (archive := zipfile.ZipFile(path)).open(archive.namelist()[0]),
}
# Only an empty field is missing: "NA", "None" and "null" are texts and labels.
CSV = {"keep_default_na": False, "na_values": [""]}
HUB_NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*(?::[\w.-]+)?")
SECRETS = ("token", "use_auth_token", "storage_options")  # in a mapping: not written, not shown
PARQUET = b"PAR1"  # the first and the last bytes of such a file
QUIET_BYTES = 50_000_000  # files up to this size are read without a progress bar


def is_name(data: Any) -> bool:
    """Whether data are named rather than given."""
    return isinstance(data, (str, os.PathLike)) or (isinstance(data, Mapping) and "path" in data)


def name_of(source: Any) -> str:
    """What a name is, in an error."""
    return str(source["path"] if isinstance(source, Mapping) else source)


def public(value: Any) -> Any:
    """A value as it may be written and shown: a mapping without its secrets."""
    if not isinstance(value, Mapping):
        return value
    return {name: each for name, each in value.items() if name not in SECRETS}


def read_files(
    source: str | os.PathLike[str] | Mapping[str, Any], as_text: Sequence[str] = ()
) -> Any:
    """Read rows from what a name stands for.

    Args:
        source: A file (csv, tsv, json, jsonl, parquet, arrow, or txt with a text a line; any of
            them compressed as .gz, .bz2, .xz or .zip too), a pattern such as `"part-*.csv"`, a
            folder of such files or one that `save_to_disk` wrote, or a data set of the Hub, as
            `"owner/name"` or `"owner/name:config"`. Or any of these as `path` of a mapping with
            further keywords of `datasets.load_dataset`, such as `split` (`"train[:90%]"`) and
            `streaming`.
        as_text: Columns of a csv or tsv file to read as they stand there: 007 is 7 else.

    Returns:
        A `datasets.Dataset`; a `DatasetDict` where folder or name hold several splits; with
        `streaming` their iterable kin.

    Raises:
        FileNotFoundError: Nothing goes by that name.
        ValueError: A file cannot be read; its name and line are told.
    """
    options = dict(source) if isinstance(source, Mapping) else {"path": source}
    name = os.fspath(options.pop("path"))
    if not name:
        raise ValueError("The name of the data is empty. Give one, or leave the argument out.")
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return _read_folder(path, options)
    if files := files_of(source):
        return _read_files(files, options, as_text)
    if KINDS.get(_ending(path)) or not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"No file is called {name!r}, seen from {Path.cwd()}.")
    return _read_hub(name, options)


def files_of(source: str | os.PathLike[str] | Mapping[str, Any]) -> list[Path]:
    """The files that a name stands for; none for a data set of the Hub."""
    name = source["path"] if isinstance(source, Mapping) else source
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return [each for each in sorted(path.rglob("*")) if each.is_file()]
    return [path] if path.is_file() else [Path(found) for found in sorted(glob.glob(str(path)))]


def _read_files(files: list[Path], further: dict[str, Any], as_text: Sequence[str]) -> Any:
    kind = _kind_of(files, files[0])
    options: dict[str, Any] = {"split": "train"}
    is_plain_table = kind == "csv" and further.keys() <= {"split", "streaming"}
    if is_plain_table:
        _check_heads(files)
    if kind == "csv":
        options |= {**CSV, **({} if "sep" in further else {"delimiter": _delimiter(files[0])})}
        if as_text:
            options["converters"] = dict.fromkeys(as_text, _as_it_stands)
    elif kind == "json":
        options["encoding"] = (
            "utf-8-sig"  # by this name the bytes are checked, and a BOM is left out
        )
    was_shown = datasets.utils.logging.is_progress_bar_enabled()
    if sum(file.stat().st_size for file in files) < QUIET_BYTES:
        datasets.disable_progress_bars()
    names = [str(file) for file in files]
    try:
        patterns = [glob.escape(name) for name in names]  # datasets takes names for patterns
        rows = _load(files, kind, data_files=patterns, **{**options, **further})
    except Exception as error:  # of pandas, pyarrow or datasets, which name no line
        raise ValueError(_flaw(files) or f"{names[0]}: {_innermost(error)}") from error
    finally:
        if was_shown:
            datasets.enable_progress_bars()
    if is_plain_table and options["delimiter"] == "\t":
        rows = _quotes_checked(rows, names[0])
    if kind == "text" and isinstance(rows, datasets.IterableDataset):
        rows = rows.filter(lambda row: row["text"].strip())
    elif kind == "text":
        rows = rows.select([i for i, text in enumerate(rows["text"]) if text.strip()])
    return rows


def _as_it_stands(field: str) -> str | None:
    return field or None


def _kind_of(files: list[Path], place: Path) -> str:
    """The kind that all files are of; `place` is named where they are not."""
    kinds = {KINDS.get(_ending(file)) for file in files}
    if None in kinds or len(kinds) != 1:
        odd = next((file for file in files if _ending(file) not in KINDS), place)
        names = " and ".join(sorted(map(str, kinds)))
        found = f" Here are {names}; a pattern such as '*.csv' names one." if odd is place else ""
        raise ValueError(
            f"{odd}: data come in files of one kind, which the name tells: "
            f"{', '.join(ending[1:] for ending in KINDS)}, also compressed: "
            f"{', '.join(COMPRESSED)}.{found if kinds else ' Here are none.'}"
        )
    return str(kinds.pop())


def _read_folder(folder: Path, options: dict[str, Any]) -> Any:
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        if options:
            raise ValueError(
                f"{folder} was written by save_to_disk, which takes no {', '.join(options)}. Its "
                "splits are folders in it."
            )
        try:
            return datasets.load_from_disk(str(folder))
        except IndexError as error:  # of a list of no pieces
            raise ValueError(f"{folder}: it has no rows.") from error
    files = [file for file in files_of(folder) if _ending(file) in KINDS]
    tables = [file for file in files if KINDS[_ending(file)] == "csv"]
    is_plain = options.keys() <= {"split", "streaming"}
    if is_plain:
        _kind_of(files, folder)
        _check_heads(tables)
    own = CSV if tables and tables == files else {}
    try:
        rows = _load(files, str(folder.resolve()), **{**own, **options})
    except Exception as error:
        problem = f"{folder}: {_innermost(error)}"
        raise ValueError(_flaw(files) or problem) from error
    if is_plain and any(_delimiter(file) == "\t" for file in tables):
        rows = _quotes_checked(rows, str(folder))
    return rows


def _load(files: list[Path], *arguments: Any, **options: Any) -> Any:
    """What `load_dataset` reads, and reads again where its cache is older than the files.

    datasets 5.2 knows a local file by its path and by the time that it says it was written. That
    time can be set, as `cp -p` and `rsync -t` do, and then the old rows came out of the cache.
    """
    rows = datasets.load_dataset(*arguments, **options)
    if options.get("streaming"):
        return rows
    found = [file.stat() for file in files]
    changed = max((each.st_ctime_ns for each in found), default=0)
    caches = [Path(each["filename"]) for split in _splits(rows) for each in split.cache_files]
    # Rows that are kept in memory do not tell where they came from.
    if changed > min((cache.stat().st_mtime_ns for cache in caches), default=0):
        rows = datasets.load_dataset(*arguments, **{"download_mode": "force_redownload", **options})
    states = [(each.st_size, each.st_ctime_ns) for each in found]
    for split in _splits(rows):  # tokens are kept by it
        split._fingerprint = Hasher.hash([split._fingerprint, states])
    return rows


def _splits(rows: Any) -> list[datasets.Dataset]:
    return list(rows.values()) if isinstance(rows, datasets.DatasetDict) else [rows]


def _read_hub(name: str, options: dict[str, Any]) -> Any:
    path, _, config = name.partition(":")
    try:
        return datasets.load_dataset(path, options.pop("name", config) or None, **options)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name!r} is no file, no folder, and no data set of the Hub that can be reached: "
            f"{_innermost(error)}"
        ) from error


def _check_heads(files: list[Path]) -> None:
    """Raise ValueError where pandas would rename a column, or take the first one for an index."""
    for file in files:
        try:
            with _opened(file) as raw:
                text = io.TextIOWrapper(raw, "utf-8-sig", errors="replace", newline="")
                fields = csv.reader(text, delimiter=_delimiter(file))
                header, line = next(fields), fields.line_num + 1
                first = next((row for row in fields if row), [])
        except (StopIteration, csv.Error, EOFError, OSError, lzma.LZMAError, zipfile.BadZipFile):
            continue  # it cannot be read either, and then told in full
        twice = [name for name in header if name and header.count(name) > 1]
        if twice:
            raise ValueError(f"{file}, line 1: the header has more than one column {twice[0]!r}.")
        if len(first) > len(header):
            raise ValueError(f"{file}, line {line}: {_too_many(first, header)}")


def _quotes_checked(rows: Any, name: str) -> Any:
    """Rows without a field of tabs and lines, which a quote that belongs to a text has begun.

    Raises:
        ValueError: There is one; of a stream, once it is read.
    """
    if isinstance(rows, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return type(rows)({split: _quotes_checked(each, name) for split, each in rows.items()})
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


def _opened(file: Path) -> Any:
    return COMPRESSED.get(file.suffix.lower(), lambda path: path.open("rb"))(file)


def _delimiter(file: Path) -> str:
    return "\t" if _ending(file) == ".tsv" else ","


def _too_many(row: list[str], header: list[str]) -> str:
    return f"{len(row)} fields, but the header names {len(header)}: {header}."


def _flaw(files: list[Path]) -> str | None:
    """The first file, and the line of it, that cannot be read; None if none is found."""
    for file in files:
        try:
            for place, problem in _problems(file):
                return f"{file}{place}: {problem}"
        except (EOFError, OSError, lzma.LZMAError, zipfile.BadZipFile) as error:
            return f"{file}: it is cut off or no {file.suffix[1:]} file ({error})."
    return None


def _problems(file: Path) -> Iterator[tuple[str, str]]:
    """Place and problem of what is wrong with a file of text."""
    ending = _ending(file)
    if ending == ".parquet":
        with file.open("rb") as content:
            begins = content.read(4) == PARQUET
            content.seek(-min(4, file.stat().st_size), os.SEEK_END)
            if not (begins and content.read(4) == PARQUET):
                yield "", "it is cut off." if begins else "it is no Parquet file."
    if KINDS[ending] not in ("csv", "json", "text"):
        return
    with _opened(file) as opened:
        raw = opened.read()
    if not raw.strip():
        yield "", "the file is empty."
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield f", line {line}", f"byte {raw[error.start]:#x} is no UTF-8. Save the file as UTF-8."
        return
    if KINDS[ending] == "csv":
        fields = csv.reader(io.StringIO(text), delimiter=_delimiter(file), strict=True)
        header = next(fields)
        line = fields.line_num
        try:
            for row in fields:
                line = fields.line_num
                if len(row) > len(header):
                    yield f", line {line}", _too_many(row, header)
        except csv.Error as error:
            yield f", line {line + 1}", f"a quote is opened here and never closed ({error})."
        if line == 1:
            yield "", "it has a header and no rows."
    elif KINDS[ending] == "json":
        parts = [text] if text.lstrip().startswith("[") else text.split("\n")
        for number, part in enumerate(parts):
            try:
                if part.strip() and not isinstance(json.loads(part), (dict, list)):
                    yield f", line {number + 1}", "a row is an object: {...}."
            except json.JSONDecodeError as error:
                hint = " The file may be cut off." if number + 1 >= len(parts) - 1 else ""
                yield f", line {number + error.lineno}", f"{error.msg}, column {error.colno}.{hint}"


def _ending(file: Path) -> str:
    name = Path(file.name.lower())
    return Path(name.stem if name.suffix in COMPRESSED else name).suffix


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__ or error
    return " ".join(str(error).split()).rstrip(".") + "."
