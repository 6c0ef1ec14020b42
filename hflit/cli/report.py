"""`hflit report`: a page about a finished run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from hflit.cli.evaluate import load_evaluation
from hflit.cli.fit import be_quiet
from hflit.cli.options import read_options
from hflit.data.files import is_name, read_files
from hflit.report.judged import Judgement, judge
from hflit.report.page import write_page
from hflit.saved import read_run

OBJECTS = ("metrics", "validation", "train")  # of which the file of a run keeps only a name


def run(command: str, argv: Sequence[str]) -> int:
    """Write the page."""
    parser = ArgumentParser(
        prog=f"hflit {command}",
        description="Write report.html beside a model: learning curves, evaluations, what it takes "
        "for what, the rows with the highest loss, lengths, padding, speed and arguments.",
        exit_on_error=False,
    )
    add = parser.add_argument
    add("--model", type=str | None, help="Folder that a run left.")
    add(
        "--data",
        type=dict[str, Any] | str | None,
        help="Other rows to judge than the validation data of the run.",
    )
    add("--rows", type=int, default=1000, help="Rows to judge at most, spread evenly; 0: none.")
    config = read_options(parser, argv)
    if not config.model:
        raise ValueError("--model must be given.")
    folder = Path(os.path.expanduser(config.model))
    if not (folder / "trainer_state.json").exists():
        raise FileNotFoundError(f"--model={folder} is no folder that a run left.")
    be_quiet()
    facts = read_run(folder)
    judgement = None
    if config.rows > 0:
        judgement = _judgement(folder, facts, config.data, config.rows)
    if isinstance(judgement, str):
        print(judgement)
    print(f"The report is in {write_page(folder, facts, judgement)}.")
    return 0


def _judgement(folder: Path, facts: dict[str, Any], data: Any, most: int) -> Judgement | str:
    """What the model makes of its validation data, or why it cannot be known."""
    lacking = "The page lacks what is taken for what and the rows with the highest loss:"
    given = facts.get("call", {})
    rows = data or given.get("validation")
    if not facts:
        return f"{lacking} there is no run.json, which tells what the run was given."
    if rows is None:
        return f"{lacking} the run had no validation data. --data names rows to judge."
    if not data and "validation" in facts.get("objects", {}):
        return f"{lacking} the run was given {rows}, not a file. --data names rows to judge."
    call = {name: value for name, value in given.items() if name not in OBJECTS}
    if _is_readable(given.get("train")):
        call["train"] = given["train"]  # says which label is which class, and may hold both splits
    call["per_device_eval_batch_size"] = 1
    try:
        module, found = load_evaluation(str(folder), rows, call, most)
    except (FileNotFoundError, ValueError) as error:
        if data or not isinstance(error.__cause__ or error, FileNotFoundError):
            raise
        told = " ".join(str(error).split())
        return f"{lacking} {told} --data names the rows if they are elsewhere."
    return judge(module, found, facts)


def _is_readable(name: Any) -> bool:
    if not is_name(name):
        return False
    try:
        read_files(name)
    except FileNotFoundError:
        return False
    return True
