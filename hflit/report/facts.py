"""What is known of a run and of its data, in numbers and words that JSON can hold."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from importlib.metadata import version
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers import TrainingArguments

import hflit
from hflit.checks import listed
from hflit.data import DataModule, Labels
from hflit.data.files import public
from hflit.data.labels import SINGLE
from hflit.data.questions import Questions

VERSIONS = ("torch", "lightning", "transformers", "datasets", "peft", "tokenizers")
BINS = 10  # of the histogram of lengths
KEPT = ("prefix", "stride", "target_maxlength", "generation_max_length", "generation_num_beams")


def run_facts(
    call: Callable[..., Any],
    given: Mapping[str, Any],
    keywords: Mapping[str, Any],
    data: DataModule,
    args: TrainingArguments,
) -> dict[str, Any]:
    """What a run was given, and by what it can be told from others.

    Args:
        call: The call, for its defaults.
        given: Its named arguments.
        keywords: Its further keywords.
        data: The rows it read.
        args: Its arguments, which know the processes.

    Returns:
        Among others `call`, what was given, and `objects`: those of it that no text stands for,
        name -> `module:name` where it can be imported from, or None.
    """
    defaults = {k: each.default for k, each in inspect.signature(call).parameters.items()}
    # Data and models are no defaults, and some cannot be compared with one.
    plain = (bool, int, float, str, tuple, type(None))
    asked = {
        k: v
        for k, v in given.items()
        if k in defaults and not (isinstance(v, plain) and v == defaults[k])
    }
    asked |= {name: value for name, value in keywords.items() if not name.endswith("_token")}
    callbacks = [Words(type(each).__name__) for each in listed(asked.pop("callbacks", None))]
    if callbacks := [name for name in callbacks if name != "SaveConfig"]:  # the program's own
        asked["callbacks"] = callbacks
    tokenization = data.tokenization
    own = {}
    if isinstance(tokenization, Questions):
        own["unanswerable"] = tokenization.unanswerable
    typed = {name: named(value) for name, value in asked.items()}
    return {
        "task": given["task"],
        "base": named(given["base"]),
        "train": named(given["train"]),
        "validation": named(given["validation"]),
        "columns": list(tokenization.columns),
        "maxlength": tokenization.maxlength,
        **{name: getattr(tokenization, name, given[name]) for name in KEPT},
        **own,
        "seed": args.seed,
        "processes": args.world_size,
        "fingerprint": data.digest(),
        "call": typed,
        "objects": {name: _place(asked[name]) for name in typed if _has_words(typed[name])},
        "versions": {"hflit": hflit.__version__, **{name: version(name) for name in VERSIONS}},
    }


class Words(str):
    """What kind of object a value was; no text stands for it."""


def named(value: Any) -> Any:
    """A value as it was typed, or `Words` on what kind of object it was."""
    if isinstance(value, (Enum, Words)):
        return value.value if isinstance(value, Enum) else value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(name): named(each) for name, each in public(value).items()}
    if isinstance(value, (list, tuple)) and len(value) == 2 and hasattr(value[0], "parameters"):
        path = getattr(value[0].config, "name_or_path", "")
        return path or Words(f"a {type(value[0]).__name__} in memory")
    plain = (bool, int, float, str, type(None))
    if isinstance(value, (list, tuple)) and all(isinstance(each, plain) for each in value):
        return list(value)
    if hasattr(value, "__fspath__"):
        return str(value)
    if hasattr(value, "__len__"):
        return Words(f"{len(value)} rows in a {type(value).__name__}")
    return Words(getattr(value, "__qualname__", f"a {type(value).__name__}"))


def _has_words(value: Any) -> bool:
    within = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, Words) or any(map(_has_words, within))


def _place(value: Any) -> str | None:
    """Where a function or class can be imported from; None for what has no such place."""
    module, name = getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
    found = None if module == "__main__" else sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}:{name}" if found is value and found is not None else None


def data_facts(data: DataModule, split: str) -> dict[str, Any]:
    """Rows, lengths in tokens and labels of a split; empty of a stream.

    Args:
        data: Set up.
        split: `train` or `validation`.

    Returns:
        `rows` read, `inputs` made of them, `tokens` in these, `lengths` (least, median, 95 of 100,
        most), `histogram` (pairs of a length and how many inputs are no longer than that and longer
        than the one before), `longest`: inputs that reach maxlength; `padding`, see
        `padding_share`; for one class a row `labels`, name -> rows.
    """
    tokens = data.tokens.get(split)
    if not isinstance(tokens, datasets.Dataset):
        return {}
    lengths = pc.list_value_length(tokens.with_format("arrow")[:]["input_ids"]).to_numpy()
    edges = np.unique(np.linspace(0, lengths.max(), BINS + 1).round().astype(int))
    counts, _ = np.histogram(lengths, np.append(edges[:-1] + 0.5, edges[-1] + 0.5))
    limit = data.tokenization.maxlength
    return {
        "rows": len(data.rows[split]),
        "inputs": len(tokens),
        "tokens": int(lengths.sum()),
        "lengths": [int(np.quantile(lengths, each)) for each in (0, 0.5, 0.95, 1)],
        "histogram": [[int(e), int(c)] for e, c in zip(edges[1:], counts, strict=True)],
        "longest": 0 if limit is None else int((lengths >= limit).sum()),
        "padding": padding_share(lengths, data.args),
        **label_counts(data, split),
    }


def padding_share(lengths: np.ndarray, args: TrainingArguments) -> float:
    """Share of padding, from 0 to 1, in micro-batches of a random order that are not cut."""
    order = np.random.default_rng(args.seed).permutation(lengths)
    size = args.per_device_train_batch_size
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    return 1 - int(lengths.sum()) / sum(int(each.max()) * len(each) for each in batches)


def label_counts(data: DataModule, split: str) -> dict[str, Any]:
    """`labels`: name of each class -> its rows, where a row has one class; else nothing."""
    tokenization = data.tokenization
    if not isinstance(tokenization, Labels) or tokenization.map is None:
        return {}
    if tokenization.map.problem != SINGLE:
        return {"problem": tokenization.map.problem}
    found = data.tokens[split].with_format("arrow")[:]["labels"].combine_chunks().to_numpy()
    counts = np.bincount(found, minlength=len(tokenization.map.names)).tolist()
    names = tokenization.map.names
    return {"problem": SINGLE, "labels": {names[i]: count for i, count in enumerate(counts)}}
