"""Kinds and ranges of plain values: a whole number, a share from 0 to 1; a leaf."""

import math
import types
import typing
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

KINDS: dict[Any, tuple[Any, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    type(None): (type(None), "None"),
}
SEEDS = 2**32 - 1  # the largest that numpy takes
BELOW_1 = math.nextafter(1.0, 0.0)
# Argument -> least and largest value, and both in words.
RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size"),
            *("gradient_accumulation_steps", "eval_accumulation_steps", "torch_empty_cache_steps"),
            "dataloader_prefetch_factor",
        ),
        (1, math.inf, "1 or more"),
    ),
    **dict.fromkeys(
        (
            *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon"),
            *("dataloader_num_workers", "eval_delay", "neftune_noise_alpha"),
        ),
        (0, math.inf, "0 or more"),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, BELOW_1, "from 0 to less than 1")),
    "label_smoothing_factor": (0, 1, "from 0 to 1"),
    **dict.fromkeys(("seed", "data_seed"), (0, SEEDS, f"from 0 to {SEEDS}")),
}


def kind_problems(values: Mapping[str, Any], hints: Mapping[str, Any]) -> list[str]:
    """What values are not of the kind that their hint names, in sentences.

    Args:
        values: Name -> value.
        hints: Name -> type. Those that are more than numbers, switches and text are not looked at.

    Example:
        >>> kind_problems({"steps": "ten", "rate": 1}, {"steps": int | None, "rate": float})
        ["steps='ten' must be a whole number or None."]
    """
    problems = []
    for name, value in values.items():
        hint = hints.get(name)
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        members = typing.get_args(hint) if is_union else (hint,)
        if not all(member in KINDS for member in members):
            continue
        is_switch = isinstance(value, bool) or (bool in members and value in (0, 1))
        taken = tuple(KINDS[member][0] for member in members if member is not bool)
        if bool in members if is_switch else isinstance(value, taken):
            continue
        shown = "<hidden>" if name.endswith("_token") else repr(value)
        problems.append(f"{name}={shown} must be {' or '.join(KINDS[m][1] for m in members)}.")
    return problems


def range_problems(values: Mapping[str, Any]) -> list[str]:
    """Which arguments are out of their range, in sentences; NaN is out of all."""
    return [
        f"{name}={values[name]!r} must be {words}."
        for name, (least, most, words) in RANGES.items()
        if values.get(name) is not None and not least <= values[name] <= most
    ]
