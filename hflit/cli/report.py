"""`hflit report`: a page about a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from hflit.cli.fit import be_quiet
from hflit.cli.options import read_options
from hflit.data.files import read_files
from hflit.predict import predictions
from hflit.report.page import write_page
from hflit.saved import load_saved, read_run


def run(command: str, argv: Sequence[str]) -> int:
    """Write the page."""
    parser = ArgumentParser(
        prog=f"hflit {command}",
        description="Write report.html beside a model: learning curves, evaluations, lengths, "
        "arguments; for a classifier the confusion matrix of its validation data.",
        exit_on_error=False,
    )
    parser.add_argument("--model", type=str | None, help="Folder that a run left.")
    parser.add_argument("--data", type=str | None, help="Other rows for the confusion matrix.")
    config = read_options(parser, argv)
    if not config.model:
        raise ValueError("--model must be given.")
    folder = Path(config.model)
    if not (folder / "trainer_state.json").exists():
        raise FileNotFoundError(f"--model={folder} is no folder that a run left.")
    be_quiet()
    facts = read_run(folder)
    page = write_page(folder, facts, _pairs(folder, facts, config.data))
    print(f"The report is in {page}.")
    return 0


def _pairs(folder: Path, facts: dict[str, Any], data: str | None) -> list[tuple[str, str]] | None:
    """True and predicted class of the validation rows; None where there are none to read."""
    if not facts.get("splits", {}).get("validation", {}).get("labels"):
        return None
    name = data or facts.get("validation")
    try:
        rows = read_files(str(name))
    except FileNotFoundError:
        if data:
            raise
        return None  # they were objects in memory, or have moved
    saved = load_saved(folder)
    label = facts["columns"][-1]
    found = [str(each["label"]) for each in predictions(saved, rows)]
    return list(zip(true_names(rows[label], saved), found, strict=True))


def true_names(labels: Sequence[Any], saved: Any) -> list[str]:
    """Names of the classes that labels of the data stand for."""
    names = {int(index): name for index, name in saved.model.config.id2label.items()}
    known = set(names.values())
    return [str(each) if str(each) in known else names.get(int(each), str(each)) for each in labels]
