"""What a file's name tells, and what is wrong with what it holds."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
PARQUET = b"PAR1"  # the first and the last bytes of such a file


def ending(file: Path) -> str:
    """How the name ends, uncompressed: a key of `KINDS`, or something else."""
    name = Path(file.name.lower())
    return Path(name.stem if name.suffix in COMPRESSED else name).suffix


def opened(file: Path) -> Any:
    """The file, to read its bytes uncompressed."""
    return COMPRESSED.get(file.suffix.lower(), lambda path: path.open("rb"))(file)


def delimiter(file: Path) -> str:
    """What stands between the fields of a table."""
    return "\t" if ending(file) == ".tsv" else ","


def too_many(row: list[str], header: list[str]) -> str:
    """What is wrong with a row of more fields than the header has names."""
    return f"{len(row)} fields, but the header names {len(header)}: {header}."


def flaw(files: list[Path]) -> str | None:
    """The first file, and the line of it, that cannot be read; None if none is found."""
    for file in (each for each in files if ending(each) in KINDS):
        try:
            for place, problem in _problems(file):
                return f"{file}{place}: {problem}"
        except (EOFError, OSError, pa.ArrowInvalid, lzma.LZMAError, zipfile.BadZipFile) as error:
            return f"{file}: it is cut off or no {file.suffix[1:]} file ({error})."
    return None


def _problems(file: Path) -> Iterator[tuple[str, str]]:
    """Place and problem of what is wrong with a file of text."""
    kind = KINDS[ending(file)]
    if kind == "parquet":
        with file.open("rb") as content:
            begins = content.read(4) == PARQUET
            content.seek(-min(4, file.stat().st_size), os.SEEK_END)
            if not (begins and content.read(4) == PARQUET):
                yield "", "it is cut off." if begins else "it is no Parquet file."
        if not pq.read_metadata(file).num_rows:
            yield "", "it has no rows."
    if kind not in ("csv", "json", "text"):
        return
    with opened(file) as content:
        raw = content.read()
    if not raw.strip():
        yield "", "the file is empty."
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield f", line {line}", f"byte {raw[error.start]:#x} is no UTF-8. Save the file as UTF-8."
        return
    if kind == "csv":
        fields = csv.reader(io.StringIO(text), delimiter=delimiter(file), strict=True)
        header = next(fields)
        line = fields.line_num
        try:
            for row in fields:
                line = fields.line_num
                if len(row) > len(header):
                    yield f", line {line}", too_many(row, header)
        except csv.Error as error:
            yield f", line {line + 1}", f"a quote is opened here and never closed ({error})."
        if line == 1:
            yield "", "it has a header and no rows."
    elif kind == "json":
        parts = [text] if text.lstrip().startswith("[") else text.split("\n")
        for number, part in enumerate(parts):
            try:
                value = json.loads(part) if part.strip() else {}
                shown = json.dumps(value, ensure_ascii=False)
                if not isinstance(value, (dict, list)):
                    yield f", line {number + 1}", "a row is an object: {...}."
                elif shown.encode("utf-8", "ignore").decode() != shown:
                    yield f", line {number + 1}", "it holds half a character, a lone surrogate."
                elif value == []:
                    yield "", "it has no rows."
            except json.JSONDecodeError as error:
                hint = " The file may be cut off." if number + 1 >= len(parts) - 1 else ""
                yield f", line {number + error.lineno}", f"{error.msg}, column {error.colno}.{hint}"
