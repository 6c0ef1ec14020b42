"""Files, folders and names of the Hugging Face Hub -> rows; what is wrong is told by its line."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from hflit.data.flaws import COMPRESSED, KINDS, delimiter, ending, flaw
from hflit.data.tables import CSV, TYPING, all_text, check_heads, quotes_checked, typed

HUB_NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*(?::[\w.-]+)?")
SECRETS = ("token", "use_auth_token", "storage_options")  # in a mapping: not written, not shown
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
    source: str | os.PathLike[str] | Mapping[str, Any], numbers: Sequence[str] | None = None
) -> Any:
    """Read rows from what a name stands for.

    Args:
        source: A file (csv, tsv, json, jsonl, parquet, arrow, or txt with a text a line; any of
            them compressed as .gz, .bz2, .xz or .zip too), a pattern such as `"part-*.csv"`, a
            folder of such files or one that `save_to_disk` wrote, or a data set of the Hub, as
            `"owner/name"` or `"owner/name:config"`. Or any of these as `path` of a mapping with
            further keywords of `datasets.load_dataset`, such as `split` (`"train[:90%]"`) and
            `streaming`.
        numbers: Columns of a csv or tsv file that are numbers or truth values, if all of their
            fields are; the others are texts as they stand, such as 007. None for all columns.

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
        return _read_folder(path, options, numbers)
    if files := files_of(source):
        return _read_files(files, options, numbers)
    if KINDS.get(ending(path)) or not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"No file is called {name!r}, seen from {Path.cwd()}.")
    return _read_hub(name, options)


def files_of(source: str | os.PathLike[str] | Mapping[str, Any]) -> list[Path]:
    """The files that a name stands for; none for a data set of the Hub."""
    name = source["path"] if isinstance(source, Mapping) else source
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return [each for each in sorted(path.rglob("*")) if each.is_file()]
    return [path] if path.is_file() else [Path(found) for found in sorted(glob.glob(str(path)))]


def _read_files(files: list[Path], given: dict[str, Any], numbers: Sequence[str] | None) -> Any:
    kind = _kind_of(files, files[0])
    patterns = [glob.escape(str(file)) for file in files]  # datasets takes names for patterns
    options = {"split": "train", "data_files": patterns, **given}
    return _read({"train": files}, kind, str(files[0]), kind, options, numbers)


def _read(
    files: dict[str, list[Path]],
    kind: str,
    name: str,
    path: str,
    options: dict[str, Any],
    numbers: Sequence[str] | None,
) -> Any:
    """Rows of files.

    Args:
        files: Of each split.
        kind: The builder of `datasets` that reads them.
        name: Named in errors.
        path: For `load_dataset`.
        options: Its keywords.
        numbers: As for `read_files`.
    """
    every = [file for each in files.values() for file in each]
    is_plain = kind == "csv" and options.keys() <= {"split", "streaming", "data_files"}
    if is_plain:
        check_heads(every)
    is_typed = False
    if kind == "csv":
        options = {
            **CSV,
            **({} if "sep" in options else {"delimiter": delimiter(every[0])}),
            **options,
        }
    elif kind == "json":  # by this name the bytes are checked, and a BOM is left out
        options = {"encoding": "utf-8-sig", **options}
    is_small = sum(file.stat().st_size for file in every) < QUIET_BYTES
    try:
        with bars_hidden(is_small):
            if kind == "csv" and not TYPING & options.keys():
                heads = all_text(every, options)
                is_typed = bool(heads)
                options |= heads
            rows = _load(every, path, **options)
            if is_typed:
                rows = typed(rows, numbers)
    except Exception as error:  # of pandas, pyarrow or datasets, which name no line
        told = flaw(every) or flaw_of_cache() or f"{name}: {_innermost(error)}"
        raise ValueError(told) from error
    if is_plain and any(delimiter(file) == "\t" for file in every):
        rows = quotes_checked(rows, name)
    return _without_blanks(rows) if kind == "text" else rows


@contextmanager
def bars_hidden(is_asked: bool) -> Iterator[None]:
    """Let `datasets` show no progress bars inside, if that is asked for."""
    hides = is_asked and datasets.utils.logging.is_progress_bar_enabled()
    if hides:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hides:
            datasets.enable_progress_bars()


def _without_blanks(rows: Any) -> Any:
    """Lines of text that hold more than blanks."""
    if isinstance(rows, datasets.Dataset):
        return rows.select([i for i, text in enumerate(rows["text"]) if text.strip()])
    if isinstance(rows, datasets.IterableDataset):
        return rows.filter(lambda row: row["text"].strip())
    return type(rows)({split: _without_blanks(each) for split, each in rows.items()})


def _kind_of(files: list[Path], place: Path) -> str:
    """The kind that all files are of; `place` is named where they are not."""
    kinds = {KINDS.get(ending(file)) for file in files}
    if None in kinds or len(kinds) != 1:
        odd = next((file for file in files if ending(file) not in KINDS), place)
        names = " and ".join(sorted(map(str, kinds)))
        found = f" Here are {names}; a pattern such as '*.csv' names one." if odd is place else ""
        raise ValueError(
            f"{odd}: data come in files of one kind, which the name tells: "
            f"{', '.join(each[1:] for each in KINDS)}, also compressed: "
            f"{', '.join(COMPRESSED)}.{found if kinds else ' Here are none.'}"
        )
    return str(kinds.pop())


def _read_folder(folder: Path, options: dict[str, Any], numbers: Sequence[str] | None) -> Any:
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
    if options.keys() <= {"split", "streaming"}:
        inside = [(file, file.relative_to(folder).parts) for file in files_of(folder)]
        shown = [f for f, parts in inside if not any(part.startswith(".") for part in parts)]
        _kind_of([file for file in shown if ending(file) in KINDS], folder)
    place = str(folder.resolve())
    try:
        resolves = {k: v for k, v in options.items() if k not in ("split", "streaming")}
        builder: Any = datasets.load_dataset_builder(place, **resolves)
    except Exception as error:
        raise ValueError(f"{folder}: {_innermost(error)}") from error
    found = {f"{k}": [Path(file) for file in v] for k, v in builder.config.data_files.items()}
    if builder.name != "csv":
        return _read(found, builder.name, str(folder), place, options, numbers)
    return _read_tables(found, str(folder), options, numbers)


def _read_tables(
    files: dict[str, list[Path]],
    folder: str,
    options: dict[str, Any],
    numbers: Sequence[str] | None,
) -> Any:
    """The csv files of a folder, split by split: each may have other columns."""
    options = {k: v for k, v in options.items() if k not in ("data_files", "data_dir")}
    patterns = {k: [glob.escape(str(file)) for file in each] for k, each in files.items()}
    if "split" in options:
        wanted = f"{options['split']}".partition("[")[0]  # of train[:90%]
        chosen = [wanted] if wanted in files else [*files]
        options["data_files"] = {split: patterns[split] for split in chosen}
        return _read({k: files[k] for k in chosen}, "csv", folder, "csv", options, numbers)
    rows: dict[str, Any] = {}
    for split in sorted(files, key=lambda name: name != "train"):
        own = {**options, "split": split, "data_files": {split: patterns[split]}}
        rows[split] = _read({split: files[split]}, "csv", folder, "csv", own, numbers)
        if len(rows) == 1:  # what is text there is text in all splits
            numbers = [
                name for name in rows[split].column_names if name not in texts_of(rows[split])
            ]
    is_stream = options.get("streaming", False)
    made = datasets.IterableDatasetDict if is_stream else datasets.DatasetDict
    return made({split: rows[split] for split in files})


def _load(files: list[Path], path: str, **options: Any) -> Any:
    """What `load_dataset` reads, and reads again where its cache is older than the files.

    datasets 5.2 knows a local file by its path and by the time that it says it was written. That
    time can be set, as `cp -p` and `rsync -t` do, and then the old rows came out of the cache.
    """
    rows = datasets.load_dataset(path, **options)
    if options.get("streaming"):
        return rows
    found = [file.stat() for file in files]
    changed = max((each.st_ctime_ns for each in found), default=0)
    caches = [Path(each["filename"]) for split in _splits(rows) for each in split.cache_files]
    # Rows that are kept in memory do not tell where they came from.
    if changed > min((cache.stat().st_mtime_ns for cache in caches), default=0):
        del rows  # on Windows a file that is open cannot be replaced
        rows = datasets.load_dataset(path, **{"download_mode": "force_redownload", **options})
    states = [(each.st_size, each.st_ctime_ns) for each in found]
    for split in _splits(rows):  # tokens are kept by it
        split._fingerprint = Hasher.hash([split._fingerprint, states])
    return rows


def flaw_of_cache() -> str:
    """What is wrong with the folder in which `datasets` keeps data, or nothing."""
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if there.is_dir() and os.access(there, os.W_OK):
        return ""
    return (
        f"Data are kept in {folder}, which cannot be written. Set HF_HOME to a folder that can "
        "be; rows in memory need none with cache=False."
    )


def texts_of(rows: Any) -> set[str]:
    """Columns of text, of one split or of the first of several."""
    rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
    texts = ("string", "large_string", "string_view")
    kinds = rows.features or {}
    return {name for name, kind in kinds.items() if getattr(kind, "dtype", None) in texts}


def _splits(rows: Any) -> list[Any]:
    return list(rows.values()) if isinstance(rows, dict) else [rows]


def _read_hub(name: str, options: dict[str, Any]) -> Any:
    path, _, config = name.partition(":")
    try:
        return datasets.load_dataset(path, options.pop("name", config) or None, **options)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name!r} is no file, no folder, and no data set of the Hub that can be reached: "
            f"{_innermost(error)}"
        ) from error


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__ or error
    return " ".join(str(error).split()).rstrip(".") + "."
