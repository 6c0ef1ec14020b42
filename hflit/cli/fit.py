"""`hflit fit`: the call, with its arguments from files, the environment and the command line."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import transformers
import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

import hflit
from hflit.checks import listed
from hflit.cli.options import SECRETS, as_yaml, call_of, given, make_parser, read_options
from hflit.data import files
from hflit.loop.folders import flaw, numbered
from hflit.pipeline import HFTrainer

RESUMING = ("checkpoint", "resume_from_checkpoint")


class SaveConfig(L.Callback):
    """Writes the configuration of a run beside its model, as soon as the run begins.

    Args:
        folder: Where the model will be.
        text: The configuration in YAML.
    """

    def __init__(self, folder: str, text: str) -> None:
        self.path = Path(folder, "config.yaml")
        self.text = text

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it."""
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(self.text, encoding="utf-8")


def run(command: str, argv: Sequence[str]) -> int:
    """Fine-tune a model, and say how it went."""
    needed = ("model.base", "data.train")
    parser, config, call = read_call(command, "Fine-tune a model.", argv, needed)
    folder = call.get("output_dir")
    try:
        trainer = fitted(call, config_text(parser, config))
    except (KeyboardInterrupt, SystemExit):
        if folder and os.environ.get("LOCAL_RANK", "0") == "0" and is_resumable(folder):
            print(f"Go on with:\n  {resuming(command, argv)}", file=sys.stderr)
        raise
    # Of processes that were started here, this one runs no Lightning Trainer.
    if hasattr(trainer, "lightning") and not trainer.lightning.is_global_zero:
        return 0
    show_figures(trainer.metrics, f"After {trainer.state.global_step} updates")
    if folder:
        print(f"The model is in {folder}.")
    else:
        print("Nothing was saved: there is no --args.output_dir.")
    return 0


def is_resumable(folder: str) -> bool:
    """Whether a run can go on from what lies in its `output_dir`."""
    return any(flaw(each) is None for each in reversed(numbered(folder)))


def resuming(command: str, argv: Sequence[str]) -> str:
    """The command line that goes on where this one stopped, without tokens of the Hub."""
    program = ["hflit"]
    if Path(sys.argv[0]).name == "__main__.py":
        program = [Path(sys.executable).name, "-m", "hflit"]
    left_out = {"--model.checkpoint", *(f"--args.{name}" for name in (*RESUMING, *SECRETS))}
    splits = ("train", "validation", "test")
    left_out |= {f"--data.{split}.{name}" for split in splits for name in files.SECRETS}
    given, words = iter(argv), []
    for word in given:
        if word.partition("=")[0] not in left_out:
            words.append(_public(word))
        elif "=" not in word:
            next(given, None)  # its value
    return shlex.join([*program, command, *words, "--model.checkpoint", "true"])


def _public(word: str) -> str:
    """A word of the command line, where it holds a mapping without the secrets of that."""
    before, brace, rest = word.partition("{")
    try:
        found = yaml.safe_load(brace + rest)
    except yaml.YAMLError:
        return word
    kept = files.public(found)
    return word if kept == found else before + json.dumps(kept)


def fitted(call: dict[str, Any], text: str) -> HFTrainer:
    """Run a call; what it was given is saved beside its model.

    Args:
        call: Its keywords.
        text: The configuration in YAML.
    """
    folder = call.get("output_dir")
    saved = [SaveConfig(folder, text)] if folder else []
    trainer = HFTrainer()
    trainer(**{**call, "callbacks": [*listed(call.get("callbacks")), *saved]})
    return trainer


def read_call(
    command: str,
    about: str,
    argv: Sequence[str],
    needed: Sequence[str],
    add_options: Callable[[ArgumentParser], None] = lambda parser: None,
) -> tuple[ArgumentParser, Namespace, dict[str, Any]]:
    """Read the configuration of a run.

    Args:
        command: Name of the command.
        about: What it does.
        argv: Its options.
        needed: Options it cannot do without.
        add_options: Adds those of the command's own.

    Returns:
        The parser, what it was given, and the keywords of the call that this stands for.

    Raises:
        ValueError: An option is missing, unknown or wrong.
    """
    parser = make_parser(command, about)
    add_options(parser)
    config = read_options(parser, argv, defaults=False)
    check_given(config, needed)
    call = call_of(parser, config)
    call.pop("test", None)
    be_quiet()
    return parser, config, call


def add_json(parser: ArgumentParser) -> None:
    """Add the option of the commands whose findings a program may read."""
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def check_given(config: Namespace, needed: Sequence[str]) -> None:
    """Raise ValueError if one of the options that are needed was not given."""
    missing = [f"--{name}" for name in needed if not config.get(name)]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given, here or in a file of --config.")


def config_text(parser: ArgumentParser, config: Namespace) -> str:
    """The options of the whole run in YAML: neither secrets, nor where it went on."""
    left_out = (*SECRETS, *RESUMING)
    groups = {
        group: {name: value for name, value in values.items() if name not in left_out}
        for group, values in given(parser, config).items()
    }
    kept = {group: _plain(values) for group, values in groups.items() if values}
    versions = f"hflit {hflit.__version__}, transformers {transformers.__version__}"
    about = f"# What this run was given; all the rest was at the defaults of {versions}.\n"
    return about + as_yaml(kept)


def _plain(value: Any) -> Any:
    """A value as YAML writes it: functions by their place, tuples as lists."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in files.public(value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def be_quiet() -> None:
    """Leave out what the libraries tell of themselves in every run."""
    transformers.logging.disable_progress_bar()  # of loading and saving weights
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")


def plain_console() -> Console:
    """A screen that shows texts as they are, also those with brackets and colons in them."""
    return Console(markup=False, emoji=False, highlight=False)


def show_figures(figures: dict[str, Any], title: str) -> None:
    """Print figures as a table."""
    print(f"{title}:")
    table = Table(show_header=False, box=None)
    for name, value in sorted(figures.items()):
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else str(value))
    plain_console().print(table)
