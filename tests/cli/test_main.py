"""The way in: help at once, one line for an error, and the exit status."""

import io
import os
import subprocess
import sys
import time

import pytest

from hflit.cli import predict
from hflit.cli.main import COMMANDS, main


def test_help_lists_the_commands_at_once():
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hflit", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=sys.path[0] or None,
    )
    assert time.time() - start < 5  # a busy machine; what takes long is not imported at all
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert not any(name in done.stderr for name in (" torch\n", " transformers\n", " datasets\n"))


def test_an_error_is_one_line_and_2(program):
    status, out, err = program("fti")
    assert (status, out, err) == (2, "", "hflit: Unknown command 'fti'. Did you mean 'fit'?\n")


def test_debug_shows_where_an_error_comes_from(program):
    status, _, err = program("fit", "--model.base", "x", "--data.train", "no.csv")
    assert status == 2
    assert err.count("\n") == 1
    with pytest.raises(OSError, match="'x' is no folder with a model"):
        program("fit", "--model.base", "x", "--data.train", "no.csv", "--debug")


@pytest.fixture
def unread(capsys, monkeypatch):
    """Run the program for a reader who has left, as `head` does; return its status and errors."""

    def run(*argv):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as screen, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            return main(argv), capsys.readouterr().err

    return run


@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_reader_who_has_left_is_no_error(lines, unread, monkeypatch):
    """Once it was `[Errno 32] Broken pipe`, with the exit status 2."""
    monkeypatch.setattr(predict, "run", lambda *_: [print(n) for n in range(lines)] and 1)
    assert unread("predict") == (0, "")


def test_help_may_be_left_too(unread):
    assert unread("predict", "--help") == unread("--help") == (0, "")


def test_a_pipe_gets_utf8_whatever_the_code_page(monkeypatch):
    """As Windows opens pipes and files: once it was 'charmap' codec can't encode characters."""
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setattr(predict, "run", lambda *_: print("щ ▒ 好", end="") or 0)
    assert main(["predict"]) == 0
    assert pipe.buffer.getvalue().decode("utf-8") == "щ ▒ 好"


def test_another_broken_pipe_is_told(program, monkeypatch):
    def run(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(predict, "run", run)
    status, _, err = program("predict")
    assert (status, err) == (2, "hflit predict: [Errno 32] Broken pipe\n")


def test_version(program):
    assert program("--version")[1].startswith("hflit 0")


WRONG = {
    "--args.learning_rate abc": "--args.learning_rate=abc is not a number.",
    "--args.learningrate 1": "Unknown option --args.learningrate. Did you mean --args.learning_rat",
    "--data.maxlength 1.5": "--data.maxlength=1.5 is not a whole number.",
    "--trainer.max_epochs 3": "Use num_train_epochs.",
    "--model.task poetry": "Unknown task 'poetry'. Choose one of: text-classification",
    "--config no.yaml": "no.yaml",
    "--model.lora": "--model.lora: expected one argument",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_option_is_told_as_typed(words, program):
    given = ["--model.base", "base", "--data.train", "train.csv", *words.split()]
    status, out, err = program("fit", *given)
    assert (status, out) == (2, "")
    assert WRONG[words] in err
    assert err.startswith("hflit fit: ")
    assert err.count("\n") == 1


def test_an_error_of_lightning_is_one_line_too(base, program):
    words = [*base(), "--args.max_steps", "1", "--trainer.profiler", "nonsense"]
    status, out, err = program("fit", *words)
    assert (status, out) == (2, "")
    assert "hflit fit: When passing string value for the `profiler` parameter" in err
    assert "Traceback" not in err
    callbacks = "--trainer.callbacks=lightning.pytorch.callbacks."
    status, _, err = program("fit", *words[:-2], f"{callbacks}LearningRateMonitor")
    assert status == 2
    assert "hflit fit: Cannot use `LearningRateMonitor` callback with `Trainer` that has no" in err
    status, _, err = program("fit", *words[:-2], f"{callbacks}ModelCheckpoint")
    assert (status, err.count("\n")) == (2, 1)
    assert "ModelCheckpoint, which is not taken. Use save_strategy" in err


def test_what_is_missing_is_named(program):
    err = program("fit")[2]
    assert "--model.base and --data.train must be given" in err


def test_a_folder_that_is_gone_is_told(program, tmp_path, monkeypatch):
    """Once with a traceback, of the look for functions of one's own."""
    monkeypatch.chdir(tmp_path)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    told = "hflit predict: The current folder is not there any more. Go to another one.\n"
    assert program("predict") == (2, "", told)


def test_a_closed_screen_is_no_error():
    """Once it ended with a traceback: there was nothing to flush."""
    words = f"{sys.executable} -m hflit --version >&-"
    where = sys.path[0] or None
    done = subprocess.run(words, shell=True, capture_output=True, text=True, cwd=where)
    assert (done.returncode, done.stderr) == (0, "")
