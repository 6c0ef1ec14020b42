"""`hflit predict`: a file of rows in, a file of predictions out, row for row."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from hflit.checks import listed
from hflit.cli.fit import be_quiet
from hflit.cli.options import RunParser, names, read_options
from hflit.data.files import files_of, name_of, read_files
from hflit.predict import CHUNK, predictions
from hflit.saved import load_saved

Rows = Iterable[dict[str, Any]]
Kinds = list[pa.DataType]  # of the columns that are kept, which come first


def run(command: str, argv: Sequence[str]) -> int:
    """Predict, and write."""
    parser = RunParser(
        prog=f"hflit {command}",
        description="Write what a model says about each row of a file: label and score, answer, "
        "generated text, filled masks, by the task it was trained for.",
        exit_on_error=False,
    )
    add = parser.add_argument
    add("--model", type=str | None, help="Folder that a run left, or hub id.")
    add(
        "--data",
        type=dict[str, Any] | str | None,
        help="File, pattern, folder or hub name, as for --data.train.",
    )
    add(
        "--output", type=str | None, help="A .jsonl, .csv or .parquet file; without it, the screen."
    )
    add("--columns", type=names, help="Columns of text; those of the training.")
    add("--keep", type=names, help="Columns to copy from the data to the output.")
    add("--batch_size", type=int, default=32, help="Rows that the model reads at a time.")
    add("--trust_remote_code", type=bool, default=False, help="Run code that comes with the model.")
    config = read_options(parser, argv)
    missing = [f"--{name}" for name in ("model", "data") if not config[name]]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given.")
    output = None if config.output is None else Path(os.path.expanduser(config.output))
    if output and output.suffix not in WRITERS:
        raise ValueError(f"--output={config.output} must end in one of: {', '.join(WRITERS)}.")
    file = output and output.resolve()  # where it is a link, what it leads to
    if file and file in [each.resolve() for each in files_of(config.data)]:
        raise ValueError(f"--output={output} would replace the rows of --data. Name another file.")
    be_quiet()
    keep = list(dict.fromkeys(listed(config.keep)))
    data = _one_split(read_files(config.data, numbers=()), config.data)
    saved = load_saved(config.model, config.trust_remote_code)
    kinds = _kept(data, keep) if keep else []
    found = predictions(saved, data, listed(config.columns), config.batch_size)
    rows = _beside(data, keep, found) if keep else found
    if output is None or file is None:
        for row in rows:
            print(_json(row))
        return 0
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")  # nobody takes half a file for a whole one
    try:
        count = WRITERS[output.suffix](part, rows, kinds)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    print(f"{count} predictions ({saved.task}) are in {output}.", file=sys.stderr)
    return 0


def _one_split(data: Any, name: Any) -> Any:
    if not isinstance(data, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return data
    if len(data) == 1:
        return next(iter(data.values()))
    raise ValueError(
        f"--data={name_of(name)} holds {', '.join(data)}. Name one of them: "
        "{path: ..., split: ...}."
    )


def _kept(data: Any, names: list[str]) -> Kinds:
    """The types of the columns that are kept; a stream may have to show its first rows."""
    features = data.features or datasets.Dataset.from_list(list(data.take(CHUNK))).features
    unknown = [name for name in names if name not in features]
    if unknown:
        raise ValueError(f"--keep={unknown} is not in the data, which has {list(features)}.")
    return [features.arrow_schema.field(name).type for name in names]


def _beside(data: Any, names: list[str], found: Rows) -> Iterator[dict[str, Any]]:
    """Predictions, behind the columns that are kept; these become `given_` where names meet."""
    for row, each in zip(data.select_columns(names), found, strict=True):
        kept = {f"given_{name}" if name in each else name: row[name] for name in names}
        if len(kept) < len(names):
            met = next(name for name in names if f"given_{name}" in names)
            raise ValueError(f"--keep: {met!r} would be called given_{met}, as another column is.")
        yield kept | each


def _json(value: Any) -> str:
    """JSON, with text for what it lacks, such as times."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _write_jsonl(path: Path, rows: Rows, kept: Kinds) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for count, row in enumerate(rows, 1):  # noqa: B007  # counted
            file.write(_json(row) + "\n")
    return count


def _write_csv(path: Path, rows: Rows, kept: Kinds) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        for count, row in enumerate(rows, 1):
            if count == 1:
                writer.writerow(row)
            writer.writerow(
                _json(value) if isinstance(value, (list, dict)) else value for value in row.values()
            )
    return count


def _write_parquet(path: Path, rows: Rows, kept: Kinds) -> int:
    rows, count, writer = iter(rows), 0, None
    while chunk := list(islice(rows, CHUNK)):
        names = list(chunk[0])
        own = [_kind(name, chunk[0][name]) for name in names[len(kept) :]]
        schema = pa.schema(list(zip(names, [*kept, *own], strict=True)))
        table = pa.Table.from_pylist(chunk, schema if writer is None else writer.schema)
        writer = writer or pq.ParquetWriter(path, schema)
        writer.write_table(table)
        count += len(chunk)
    if writer is not None:
        writer.close()
    return count


def _kind(name: str, value: Any) -> pa.DataType:
    """The type of a column of predictions; an empty list tells it by the name alone."""
    known = {"tokens": pa.string(), "label": pa.string(), "score": pa.float64()}
    known["scores"] = pa.float64()
    if isinstance(value, list):
        return pa.list_(known.get(name) or pa.array(value).type)
    return known.get(name) or pa.array([value]).type


WRITERS = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}
