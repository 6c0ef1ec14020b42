"""The way into the program: picks the command, and says in one line what is wrong.

Imports nothing heavy, so that `hflit --help` answers at once.
"""

from __future__ import annotations

import builtins
import difflib
import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import hflit

COMMANDS = {  # name -> its file in this folder, and what it does
    "check": ("check", "Read and tokenize the data, and say what would happen and what is wrong."),
    "fit": ("fit", "Fine-tune a model."),
    "validate": ("evaluate", "Evaluate a model on the validation data."),
    "test": ("evaluate", "Evaluate a model on the test data."),
    "predict": ("predict", "Write what a model says about the rows of a file."),
    "export": ("export", "Write a model as an ONNX file that says the same."),
    "sweep": ("sweep", "Fine-tune many times with other values of some options."),
    "report": ("report", "Write a page about a finished run: report.html."),
    "verify-resume": (
        "verify_resume",
        "Stop and resume a run, and compare it with a whole one.",
    ),
}
USER_ERRORS = (
    *(ValueError, TypeError, ImportError, OSError, NotImplementedError, KeyError, MemoryError),
)
LIGHTNINGS = "MisconfigurationException"  # named, as importing it would take seconds

HELP = f"""\
usage: hflit COMMAND [options]

Fine-tune any Hugging Face transformer, on Lightning.

{{commands}}

hflit COMMAND --help lists the options of a command. For a first try:

  hflit check   --model.base MODEL --data.train train.csv --data.validation val.csv
  hflit fit     --model.base MODEL --data.train train.csv --data.validation val.csv \\
                --model.metrics auto --args.output_dir runs/first
  hflit predict --model runs/first --data new.csv --output predictions.jsonl

--debug, or the environment variable HFLIT_DEBUG=1, shows the traceback of an error.
hflit {hflit.__version__}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: What follows `hflit`; by default what the program was called with.

    Returns:
        The exit status: 0; 1 where `check` finds something wrong, or `verify-resume` a
        difference; 2 at an error of the user's; 130 after Ctrl-C. A reader who has left, as
        `| head` does, is no error.
    """
    if sys.stdout is None:  # closed before the start, as by `>&-`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # to the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Windows encodes what goes into a file or a pipe in a code page of few characters.
        encoding = None if sys.stdout.isatty() else "utf-8"
        sys.stdout.reconfigure(encoding=encoding, errors="replace")
    try:
        try:
            return _status(list(sys.argv[1:] if argv is None else argv) or ["--help"])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has left, as `| head` does; the rest goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _status(argv: list[str]) -> int:
    command, *options = argv
    if command in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
        print(HELP.format(commands="\n".join(lines)))
        return 0
    if command == "--version":
        print(f"hflit {hflit.__version__}")
        return 0
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1)
        advice = (
            f"Did you mean {nearest[0]!r}?" if nearest else f"There are: {', '.join(COMMANDS)}."
        )
        return _fail("", f"Unknown command {command!r}. {advice}")
    debug = "--debug" in options or os.environ.get("HFLIT_DEBUG", "0") not in ("", "0")
    options = [option for option in options if option != "--debug"]
    warnings.showwarning = _show_warning
    try:
        here = os.getcwd()
    except FileNotFoundError:
        return _fail(command, "The current folder is not there any more. Go to another one.")
    if here not in sys.path:  # functions of one's own, such as --model.metrics mine.score
        sys.path.append(here)
    try:
        return import_module(f"hflit.cli.{COMMANDS[command][0]}").run(command, options)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            print(flush=True)  # ends here once more, unless it was another pipe
        kind, told = _raised(error)
        is_told = issubclass(kind, AssertionError) and told  # by a callback of transformers
        is_users = issubclass(kind, USER_ERRORS) or kind.__name__ == LIGHTNINGS
        if debug or not (is_told or is_users):
            raise
        return _fail(command, " ".join(told.split()))


def _raised(error: Exception) -> tuple[type[Exception], str]:
    """Kind and words of an error; of one in a process that the run has started, those there."""
    if type(error).__name__ != "ProcessRaisedException":
        is_key = isinstance(error, KeyError) and error.args
        return type(error), str(error.args[0] if is_key else error)
    # It says the traceback, in which all lines but the last are indented.
    last = re.split(r"\n(?=  )", str(error))[-1]
    name, _, told = last.partition("\n")[2].partition(": ")
    return getattr(builtins, name, type(error)), told


def _fail(command: str, message: str) -> int:
    print(f"hflit {command}: {message}".replace(" :", ":"), file=sys.stderr)
    return 2


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
