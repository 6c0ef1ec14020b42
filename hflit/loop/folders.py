"""Folders that are there whole or not at all: written, judged, removed. Imports no other room."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from safetensors import SafetensorError, safe_open
from transformers import TrainerState

NAME = re.compile(r"checkpoint-(\d+)")
CLAIM = re.compile(r"\.checkpoint-\d+\.claim")  # see `one_writes`
ASIDE = re.compile(r"\.(checkpoint-\d+)\.(\d+)\.(?:part|shares|old)")  # written; on its way out
MARK = "complete.json"  # size and sha256 of every file
STATE = "trainer_state.json"
TENSORS = ("optimizer.pt", "scheduler.pt")
SHARES = "optimizer"  # a folder in the place of optimizer.pt, written by all processes
SCALE = "scaler.pt"  # of gradients, where they are float16
RANDOM = "rng_state*.pth"


def read_state(folder: Path) -> TrainerState:
    """The state in a checkpoint, of this transformers or of another."""
    names = {field.name for field in dataclasses.fields(TrainerState)}
    values = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return TrainerState(**{name: value for name, value in values.items() if name in names})


def random_file(rank: int, world: int) -> str:
    """Where the random numbers of a process are kept."""
    return f"rng_state_{rank}.pth" if world > 1 else "rng_state.pth"


def numbered(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-N` folders, by their number."""
    root = Path(output_dir)
    found = [each for each in root.iterdir() if NAME.fullmatch(each.name)] if root.is_dir() else []
    return sorted((folder for folder in found if folder.is_dir()), key=number)


def number(folder: str | Path) -> int:
    """The update after which a `checkpoint-N` was saved."""
    return int(Path(folder).name.split("-")[1])


def by_age(folders: list[Path]) -> list[Path]:
    """Folders in the order in which they were written; as given, where that is not known."""
    files = [folder / STATE for folder in folders]  # who removes another file changes the folder
    written = [(file if file.exists() else file.parent).stat().st_mtime for file in files]
    if not written or max(written) - min(written) < 1:  # some file systems tell no times
        return folders
    return [folder for _, folder in sorted(zip(written, folders, strict=True))]


# Judging.


def flaw(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if all of it is there, unchanged.

    A folder that transformers wrote has no `complete.json`, and is judged by its form.
    """
    if not folder.is_dir():
        return f"there is no folder {folder}"
    if not (folder / MARK).exists():
        return _flaw_of_form(folder)
    try:
        files = json.loads((folder / MARK).read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return f"{MARK} cannot be read"
    for name, told in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != told["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {told['size']}"
        if _digest(path) != told["sha256"]:
            return f"{name} was changed after it was written"
    return None


def _flaw_of_form(folder: Path) -> str | None:
    if not (folder / STATE).is_file():
        return f"{STATE} is missing"
    try:
        read_state(folder).global_step += 0
    except (ValueError, TypeError, AttributeError):
        return f"{STATE} cannot be read"
    weights = weight_files(folder)
    if not weights:
        return "model.safetensors is missing (pickled weights are never read)"
    for path in weights:
        if not path.is_file():
            return f"{path.name} is missing"
        if not _is_whole_safetensors(path):
            return f"{path.name} is cut short"
    for name in (*TENSORS, SCALE, *(path.name for path in folder.glob(RANDOM))):
        if (folder / name).is_file() and not zipfile.is_zipfile(folder / name):
            return f"{name} is cut short"
    return None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's or an adapter's weights."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    single = (folder / "model.safetensors", folder / "adapter_model.safetensors")
    return [path for path in single if path.is_file()]


def _is_whole_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):  # compares its header with its size
            return True
    except SafetensorError:
        return False


# Writing.


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder so that it is there whole or not at all, whenever the process dies.

    Args:
        folder: Replaced if it is there.
        write: Fills the folder that it is given.
    """
    part, old = aside(folder, "part"), aside(folder, "old")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        write(part)
        inside = sorted(part.rglob("*"))
        files = {
            path.relative_to(part).as_posix(): {
                "size": path.stat().st_size,
                "sha256": _digest(path),
            }
            for path in inside
            if path.is_file()
        }
        (part / MARK).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
        for path in (*inside, part / MARK, part):
            _sync(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        try:
            part.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        _sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def one_writes(folder: Path, seconds: float) -> Iterator[bool]:
    """Let one of the processes of a run write a folder: True for the first that comes, else False.

    The others wait until it is done, but at most so many seconds. The claim stays for those who
    come later; the next run removes it (`clean`).
    """
    claim = folder.with_name(f".{folder.name}.claim")
    is_first = True
    try:
        claim.mkdir(parents=True)
    except OSError as error:  # of a full disk hears who writes
        is_first = not isinstance(error, FileExistsError)
    end = time.monotonic() + seconds
    while not (is_first or (claim / "done").exists()) and time.monotonic() < end:
        time.sleep(0.1)
    try:
        yield is_first
    finally:
        if is_first:  # one that has waited too long knows nothing of it
            with suppress(OSError):
                (claim / "done").touch()


def clean(output_dir: Path) -> None:
    """Remove what dead processes left half written or half deleted; put back what was whole."""
    if not output_dir.is_dir():
        return
    for path in sorted(output_dir.iterdir()):
        if CLAIM.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
        match = ASIDE.fullmatch(path.name)
        if match is None or (int(match[2]) != os.getpid() and _lives(int(match[2]))):
            continue
        folder = output_dir / match[1]
        if path.suffix == ".old" and not folder.exists() and flaw(path) is None:
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _lives(process: int) -> bool:
    """Whether a process runs; one that has ended, but that nobody has asked about, does not."""
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def remove(folder: Path) -> None:
    """Delete a checkpoint; half deleted, it no longer looks like one."""
    old = aside(folder, "old")
    folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def aside(folder: Path, end: str) -> Path:
    """Where a folder lies while it is written (part, shares) or deleted (old); see `clean`."""
    return folder.with_name(f".{folder.name}.{os.getpid()}.{end}")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a disk holds it. Windows opens no folders, and flushes only what it may write."""
    is_written = path.is_file() and os.access(path, os.W_OK)
    if os.name == "nt" and not is_written:
        return
    descriptor = os.open(path, os.O_RDWR if is_written else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
