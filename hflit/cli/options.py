"""The options of a run, made of the call's signature and docstring and of the table of fields."""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import pydoc
import re
import textwrap
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import Enum
from itertools import pairwise
from typing import Any, Union

import lightning.pytorch as L
import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, Namespace
from transformers import TrainerCallback

from hflit.arguments import DEFAULTS, FIELDS, MEANT, Arguments, expanded
from hflit.data.files import public
from hflit.fields import DROPPED, GONE, REFUSED, RENAMED
from hflit.pipeline import HFTrainer

GROUPS = {
    "model": "What is trained, and for which task.",
    "data": "What it learns from: files (csv, tsv, json, jsonl, parquet, arrow, txt; also "
    "compressed), a pattern, a folder or a data set of the Hugging Face Hub; or one of these as "
    "path of a mapping with further keywords of datasets.load_dataset, as in "
    "{path: train.csv, split: 'train[:90%]'}.",
    "args": "How: the arguments of transformers.TrainingArguments.",
    "trainer": "Where: the flags of the Lightning Trainer.",
}
# Arguments of the call that are about data; all others are about the model.
DATA = (
    *("train", "validation", "columns", "maxlength", "stride", "prefix", "merge", "whole_word"),
    *("skip_misaligned", "target_maxlength", "tokenizers", "tokenizebatch", "cache"),
    "max_tokens_per_batch",
)
# What a line of text can stand for, where the call takes objects.
TYPES = {
    **dict.fromkeys(("base", "teacher"), Union[str, None]),  # noqa: UP007  # a value, not an annotation
    **dict.fromkeys(("train", "validation"), Union[dict[str, Any], str, None]),  # noqa: UP007
    "fsdp": Union[bool, str, None],  # noqa: UP007
    "callbacks": Union[list[L.Callback | TrainerCallback], L.Callback, TrainerCallback, None],  # noqa: UP007
}
SECRETS = ("hub_token", "push_to_hub_token")
MOST_LETTERS = 300  # of an error of the parser, which may quote a whole file
# 1e5 is a number to the parser, a text to YAML 1.1.
NUMBER = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
TEST = "Rows for `hflit test`; the other commands do not read them."


class _Loader(yaml.SafeLoader):
    """Reads YAML in which no name stands twice in a group; YAML itself keeps the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Read a group."""
        names = [each.value for each, _ in node.value if each.value != "<<"]
        twice = [name for name in names if isinstance(name, str) and names.count(name) > 1]
        if twice:
            line = node.start_mark.line + 1
            raise ValueError(f"{twice[0]!r} stands twice in the group that begins in line {line}.")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes YAML that the parser reads as it was."""


for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789"))


def as_yaml(values: Any) -> str:
    """Values as a file for --config; a text that looks like a number stands in quotes."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class RunParser(ArgumentParser):
    """Reads a group of a file that holds nothing, such as one in comments, as one not there."""

    def parse_string(self, content: str, *args: Any, **options: Any) -> Namespace:
        """Read what stands in a file."""
        try:
            groups = yaml.load(content, Loader=_Loader)
        except yaml.YAMLError:
            groups = content  # told by the parser
        if groups is None or (isinstance(groups, dict) and None in groups.values()):
            kept = {name: value for name, value in (groups or {}).items() if value is not None}
            content = as_yaml(kept)
        return super().parse_string(content, *args, **options)

    def dump(self, cfg: Namespace, *args: Any, **options: Any) -> str:
        """The configuration that --print_config shows, without secrets."""
        cfg = cfg.clone()
        for name in SECRETS:
            cfg.pop(f"args.{name}", None)
        for name in ("train", "validation", "test"):
            cfg[f"data.{name}"] = public(cfg.get(f"data.{name}"))
        shown = super().dump(cfg, *args, **options)
        return shown if options.get("with_comments") else as_yaml(yaml.safe_load(shown))

    def format_help(self, *args: Any) -> str:
        """The help, with functions among the types by their names alone."""
        return re.sub(r"<function\s+(\w+)\s+at\s+0x\w+>", r"\1", super().format_help(*args))


def make_parser(command: str, about: str) -> ArgumentParser:
    """The parser of a command that takes the whole configuration of a run."""
    parser = RunParser(
        prog=f"hflit {command}",
        usage=f"hflit {command} [--config FILE ...] [options]",
        description=f"{about} Every option can stand in a file for --config, under its group, or "
        "in an environment variable such as HFLIT_ARGS__LEARNING_RATE.",
        exit_on_error=False,
        allow_abbrev=False,
        default_env=True,
        env_prefix="HFLIT",
    )
    parser.add_argument("--config", action="config", help="YAML file; a later one wins.")
    groups = {name: parser.add_argument_group(name, about) for name, about in GROUPS.items()}
    for group, name, kind, default, about in _options():
        if {*typing.get_args(kind)} == {str, type(None)}:
            kind = text
        elif name == "columns":
            kind = names
        shown = about.replace("%", "%%") if about else argparse.SUPPRESS
        groups[group].add_argument(f"--{group}.{name}", type=kind, default=default, help=shown)
    return parser


def read_options(parser: ArgumentParser, argv: Sequence[str], defaults: bool = True) -> Namespace:
    """Parse the command line, environment variables and files; an explicit option always wins.

    Args:
        parser: Knows the options.
        argv: The command line.
        defaults: Also tell options that were not given.

    Raises:
        ValueError: An option is unknown or has a wrong value; said in one line.
    """
    if parser.default_env:
        _warn_of_environment(parser)
    first: list[str] = []
    rest: list[str] = []
    words = list(argv)
    while words:  # files first: what stands after them wins
        word = words.pop(0)
        (first if re.match(r"--config(=|$)", word) else rest).append(word)
        if word == "--config" and words:
            first.append(words.pop(0))
    if "--args.output_dir=" in rest or ("--args.output_dir", "") in pairwise(rest):
        raise ValueError("--args.output_dir is empty. Name a folder, or leave it out to save none.")
    try:
        printed = any(re.match(r"--print_config(=|$)", word) for word in rest)
        return parser.parse_args([*first, *rest], defaults=defaults or printed)
    except argparse.ArgumentError as error:
        raise ValueError(_told(parser, error)) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"A file for --config is not UTF-8: {error.object[: error.start][-20:]!r} is followed "
            "by other bytes. Save it as UTF-8."
        ) from error


def _warn_of_environment(parser: ArgumentParser) -> None:
    """Warn of environment variables that look like options of a run and are none."""
    known = {f"HFLIT_{each.dest}".replace(".", "__").upper() for each in parser._actions}
    for name in os.environ.keys() - known:
        if re.match(f"HFLIT_({'|'.join(GROUPS)})__", name, re.IGNORECASE):
            nearest = difflib.get_close_matches(name, known, n=1)
            advice = f" Did you mean {nearest[0]}?" if nearest else ""
            warnings.warn(f"The environment variable {name} is no option.{advice}", stacklevel=2)


def given(parser: ArgumentParser, config: Namespace) -> dict[str, dict[str, Any]]:
    """The options that were given, by group, also those at their defaults.

    Without that, `bf16: false` would be lost where `precision: bf16-mixed` contradicts it. Only a
    null where null is the default says nothing.
    """
    values, defaults = config.as_dict(), parser.get_defaults().as_dict()
    return {
        group: {
            name: value
            for name, value in values.get(group, {}).items()
            if value is not None or defaults[group].get(name) is not None
        }
        for group in GROUPS
    }


def call_of(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """The keywords of the call that a configuration stands for; `config` is without defaults."""
    kept, objects = given(parser, config), parser.instantiate(config).as_dict()
    metrics = objects.get("model", {}).get("metrics")
    if isinstance(metrics, str) and metrics != "auto":  # no function was found
        try:
            pydoc.locate(metrics)
        except pydoc.ErrorDuringImport as error:
            raise ValueError(f"--model.metrics={metrics}: {error}") from error
    return expanded({name: objects[group][name] for group in GROUPS for name in kept[group]})


def split_call(call: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The named arguments of a call, all of them, and its further keywords."""
    parameters = inspect.signature(HFTrainer.__call__).parameters.values()
    own = [each for each in parameters if each.name not in ("self", "args")]
    named = {
        each.name: call.get(each.name, None if each.default is each.empty else each.default)
        for each in own
    }
    return named, {name: value for name, value in call.items() if name not in named}


def meanings() -> dict[str, str]:
    """What each argument means, in one line; empty for a retired one."""
    return {name: about for _, name, _, _, about in _options()}


def _options() -> Iterator[tuple[str, str, Any, Any, str]]:
    """Group, name, type, default and meaning of every option; no meaning for retired names."""
    for name, kind, default, about in _parameters(HFTrainer.__call__):
        yield "data" if name in DATA else "model", name, kind, default, about
    yield "data", "test", TYPES["train"], None, TEST
    hints = typing.get_type_hints(Arguments)
    for name, field in FIELDS.items():
        if name in DEFAULTS:
            yield "args", name, _field_type(TYPES.get(name, hints[name])), DEFAULTS[name], field.how
    for name in sorted({*RENAMED, *DROPPED, *GONE} - FIELDS.keys()):
        now = RENAMED[name][0] if name in RENAMED else None
        is_word = now in hints and _field_type(hints[now]) is word
        yield "args", name, word if is_word else Any, None, ""
    for name, kind, _, about in _parameters(L.Trainer.__init__):
        if name == "max_steps":  # an argument, and means the same
            continue
        about = f"Not taken. {REFUSED[name]}" if name in REFUSED else about.split(". ")[0] + "."
        # Nothing is given to Lightning unless it was asked for.
        yield "trainer", name, Union[kind, None], None, about.replace("..", ".")  # noqa: UP007


def _parameters(function: Any) -> Iterator[tuple[str, Any, Any, str]]:
    """Name, type, default and meaning of the parameters of a function."""
    hints = typing.get_type_hints(function)
    about = {each.arg_name: each.description for each in parse_docstring(function.__doc__).params}
    for name, parameter in inspect.signature(function).parameters.items():
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            default = None if parameter.default is inspect.Parameter.empty else parameter.default
            kind = TYPES.get(name, hints[name])
            yield name, _text_last(kind), default, " ".join((about.get(name) or "").split())


def _field_type(kind: Any) -> Any:
    """A field of words takes those that YAML reads as something else."""
    members = typing.get_args(kind)
    if any(isinstance(each, type) and issubclass(each, Enum) for each in members):
        return word
    return _text_last(kind)


def word(value: Any) -> Any:
    """A word; `no`, which YAML reads as false, among them."""
    return "no" if value in (False, "false") else getattr(value, "value", value)


def text(value: Any) -> str | None:
    """A text as it is typed, also one in which YAML reads a number or a comment; or null."""
    if value is None or value == "null":
        return None
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text. In a file, put it in quotes.")
    return value


def names(value: Any) -> list[str | None] | str | None:
    """Names as they are typed, one or a list, also those in which YAML reads numbers; or null."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        with suppress(yaml.YAMLError):  # a name that only looks like a list
            value = yaml.load(value, yaml.BaseLoader)  # all is text to it
    return [text(each) for each in value] if isinstance(value, list) else text(value)


def _text_last(kind: Any) -> Any:
    """A type that takes text for text only where it is nothing else."""
    if typing.get_origin(kind) not in (Union, types.UnionType):
        return kind
    return Union[tuple(sorted(typing.get_args(kind), key=lambda each: each is str))]  # noqa: UP007


def _told(parser: ArgumentParser, error: argparse.ArgumentError) -> str:
    """An error of the parser in one line, with the nearest name for one that is unknown."""
    text = " ".join(str(error).split())
    text = text.replace("Unexpected config:", "A file for --config holds no groups of options:")
    known = [action.dest for action in parser._actions]
    unknown = re.search(
        r"unrecognized arguments: --([\w.]+)|Option '([\w.]+)' is not accepted", text
    )
    if unknown:
        name = unknown[1] or unknown[2]
        last = name.split(".")[-1]
        nearest = [each for each in known if each.split(".")[-1] == MEANT.get(last, last)]
        nearest = nearest or difflib.get_close_matches(name, known, n=1)
        return f"Unknown option --{name}." + (f" Did you mean --{nearest[0]}?" if nearest else "")
    key = re.search(r'Parser key "([\w.]+)":\s*(.*)', text)
    if not key:
        return textwrap.shorten(text, MOST_LETTERS, placeholder=" ...")
    value = re.search(r"(?:Got value|Given value): (.*)$", key[2])
    action = next(each for each in parser._actions if each.dest == key[1])
    kind = getattr(action, "_typehint", None)
    if value is None or kind is None:
        return f"--{key[1]}: {key[2]}"
    return f"--{key[1]}={value[1]} is not {_described(kind)}."


def _described(kind: Any) -> str:
    """A type in words, as it stands behind "is not"."""
    members = [_described(each) for each in typing.get_args(kind) if each is not type(None)]
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(members))
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(str(each) for each in typing.get_args(kind))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    words |= {list: "a list", tuple: "a list", dict: "a mapping"}
    plain = typing.get_origin(kind) or kind
    return words.get(plain, getattr(plain, "__name__", str(plain)))
