"""A tiny base of every task in a folder, rows in files, and the program run in this process."""

import json
import warnings

import pytest

from hflit.cli.main import main
from tests.tasks.tiny import make, rows


@pytest.fixture(autouse=True)
def _as_it_was():
    """The program decides for its whole process how warnings look."""
    shown = warnings.showwarning
    yield
    warnings.showwarning = shown


@pytest.fixture
def base(tmp_path):
    """Save a tiny base for a task, and its rows; return what names them on the command line."""

    def save(task="text-classification", named=True):
        model, tokenizer = make(task, seed=0)
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        for name in ("train", "val"):
            lines = [json.dumps(row) + "\n" for row in rows(task)]
            (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        if task == "question-answering":
            short = ["--data.maxlength", "32", "--data.stride", "8"]
        else:
            short = ["--data.maxlength", "32"]
        return [
            *("--model.base", "base", "--model.task", task, "--data.train", "train.jsonl"),
            *("--data.validation", "val.jsonl", "--args.use_cpu", "true", *short),
        ]

    return save


@pytest.fixture
def program(capsys):
    """Run the program; return its exit status and what it wrote on both streams."""

    def run(*argv):
        capsys.readouterr()  # what the fixtures wrote
        status = main([str(word) for word in argv])
        written = capsys.readouterr()
        return status, written.out, written.err

    return run
