"""Which evaluation of a run was the best."""

from __future__ import annotations

import math

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy


def metric_for_best(args: TrainingArguments, figures: dict[str, float]) -> float:
    """The figure of an evaluation that `metric_for_best_model` names; KeyError if it has none."""
    name = args.metric_for_best_model or "loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in figures:
        raise KeyError(
            f"metric_for_best_model={args.metric_for_best_model!r} is not among the figures of the "
            f"evaluation: {', '.join(figures)}."
        )
    return figures[name]


def note_best(args: TrainingArguments, state: TrainerState, figures: dict[str, float]) -> bool:
    """Whether an evaluation is better than all before it; if so, `state` notes it."""
    if args.metric_for_best_model is None:
        return False
    value = metric_for_best(args, figures)
    best = state.best_metric
    if best is None:  # NaN is better than nothing in neither direction
        best = -math.inf if args.greater_is_better else math.inf
    if not (value > best if args.greater_is_better else value < best):
        state.best_metric = best
        return False
    state.best_metric = value
    if args.save_strategy != SaveStrategy.NO:
        state.best_global_step = state.global_step
    return True
