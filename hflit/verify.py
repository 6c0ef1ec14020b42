"""Whether a run that is stopped goes on as if it had not been: tried on the run itself."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hflit.loop.stops import Stop
from hflit.pipeline import HFTrainer

COMPARED = ("loss", "grad_norm", "learning_rate")
# What of a call is not needed to learn, and would write or ask for more than the trial needs.
LEFT_OUT = (
    *("validation", "metrics", "checkpoint", "resume_from_checkpoint", "callbacks", "logger"),
    *("num_nodes", "eval_strategy", "eval_on_start", "load_best_model_at_end", "report_to"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push"),
    *("hub_revision", "save_total_limit", "save_only_model", "num_train_epochs"),
    *("metric_for_best_model", "greater_is_better", "evaluation_strategy", "eval_steps"),
    *("logging_strategy", "logging_first_step", "enable_jit_checkpoint"),
)
NEED_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")  # schedules


class _StopAfter(TrainerCallback):
    """Saves a checkpoint after some updates, and ends the run there as a signal does."""

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for the checkpoint."""
        control.should_save = control.should_save or state.global_step == self.updates

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave."""
        if state.global_step == self.updates:
            raise Stop


def verify_resume(steps: int = 8, stop: int | None = None, **call: Any) -> str | None:
    """Train, stop, resume, and compare with the same run that was never stopped.

    Trains three times, in one process and into a temporary folder (of `TMPDIR`, where a checkpoint
    must have room): whole, up to the stop, and from there to the end. Validation, callbacks and
    loggers are left out.

    Args:
        steps: Updates of the whole run.
        stop: The update after which the other one is stopped; by default in the middle.
        call: What `HFTrainer` would be called with. Data must be readable more than once.

    Returns:
        The first difference, in words; None if all losses, learning rates, gradient norms and final
        weights are the same to the bit.

    Raises:
        ValueError: `stop` does not lie within the run, or the schedule follows evaluations.
    """
    stop = steps // 2 if stop is None else stop
    if not 0 < stop < steps:
        raise ValueError(f"stop={stop} must be at least 1 and less than steps={steps}.")
    schedule = call.get("lr_scheduler_type")
    schedule = getattr(schedule, "value", schedule)  # of an enum
    if schedule in NEED_EVALUATIONS:
        raise ValueError(
            f"lr_scheduler_type={schedule!r} follows evaluations, which the trial leaves out. Try "
            "it with another schedule."
        )
    kept = {name: value for name, value in call.items() if name not in LEFT_OUT}
    kept |= {"max_steps": steps, "logging_steps": 1, "save_strategy": "steps", "devices": 1}
    kept |= {"save_steps": steps, "strategy": "auto"}

    def run(folder: Path, **also: Any) -> tuple[Any, Any]:
        trainer = HFTrainer()
        base = call["base"]
        fresh = base if isinstance(base, (str, Path)) else copy.deepcopy(base)
        model, _ = trainer(**{**kept, **also, "base": fresh, "output_dir": str(folder)})
        return trainer.state, model

    with tempfile.TemporaryDirectory() as root:
        expected, model = run(Path(root, "whole"))
        weights = {name: each.cpu().clone() for name, each in model.state_dict().items()}
        del model
        try:
            run(Path(root, "stopped"), callbacks=[_StopAfter(stop)])
        except Stop:
            state, resumed = run(Path(root, "stopped"), checkpoint=True)
        else:
            raise ValueError(f"The run ended before update {stop + 1}: give fewer steps.")
    return _first_difference(expected, state, weights, resumed.state_dict(), stop)


def _first_difference(
    expected: Any, state: Any, weights: dict[str, Any], resumed: dict[str, Any], stop: int
) -> str | None:
    entries = {e["step"]: e for e in expected.log_history if "loss" in e}
    others = {e["step"]: e for e in state.log_history if "loss" in e}
    for step in sorted(entries | others):
        for name in COMPARED:
            values = [each.get(step, {}).get(name) for each in (entries, others)]
            if repr(values[0]) != repr(values[1]):  # NaN equals itself here
                told = f"update {step}: {name} is {values[0]!r} in the whole run, {values[1]!r} in "
                if step > stop:
                    return told + f"the one resumed after update {stop}"
                return told + (
                    "another. They differ before the stop, so the run itself never repeats: see "
                    "full_determinism"
                )
    for name, weight in weights.items():
        other = resumed[name].cpu()
        if not torch.equal(weight, other):
            gap = (weight.double() - other.double()).abs().max().item()
            return f"after update {state.global_step}: weight {name} differs by up to {gap:.3g}"
    return None
