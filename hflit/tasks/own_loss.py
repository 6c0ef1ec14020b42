"""Models of other authors than transformers': the loss that they compute is the one to train."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hflit.adapters import forward_inputs, inner_model
from hflit.data.batching import Batch
from hflit.tasks.parts import mean_loss

if TYPE_CHECKING:
    from hflit.tasks.module import TaskModule

logger = logging.getLogger(__name__)


def with_own_loss(task: TaskModule, batch: Batch) -> dict[str, Any]:
    """What a task's model returns for a batch and its labels: outputs, and their mean loss."""
    wanted = forward_inputs(task.model)
    prepared = task.prepare(batch, inner_model(task.model))
    with task.forward_autocast():
        return task.model(**{k: v for k, v in prepared.items() if k in wanted})


@torch.no_grad()
def computes_own_loss(task: TaskModule, batch: Batch) -> bool:
    """Whether a model computes another loss for a batch than its task does.

    Asked of classes that are not transformers' own, and where `loss_function` was replaced: rare
    classes may count more there, say. Where transformers' classes differ, the loss of the task is
    meant: a dozen of their decoders, BART's among them, compare each token with itself, not with
    the next. Label smoothing takes the place of a model's loss, as in transformers.
    """
    model = inner_model(task.model)
    is_changed = "_loss_function" in vars(model)
    is_theirs = type(model).__module__.partition(".")[0] == "transformers"
    if task.args.label_smoothing_factor or (is_theirs and not is_changed):
        return False
    # Padding counts as text here: transformers lets it be an answer's place, and the task does not.
    batch = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    if not task.count_items(batch):  # nothing is masked; but each process must run the model
        batch["labels"] = batch["input_ids"]
    was_training = task.model.training
    task.model.eval()  # draws no random numbers
    # Compiled for this alone, a model would be compiled once more.
    with torch.compiler.set_stance("force_eager"):
        outputs = with_own_loss(task, batch)
        own = outputs.get("loss")
        ours = mean_loss(task.summed_loss(task(batch), batch), task.count_items(batch))
    task.model.train(was_training)
    if own is None or not torch.isfinite(own).all():
        return False
    halves = (torch.float16, torch.bfloat16)
    is_rounded = any(isinstance(v, Tensor) and v.dtype in halves for v in outputs.values())
    apart = 1e-2 if is_rounded else 1e-5
    if torch.isclose(own.float(), ours.float(), rtol=apart, atol=apart):
        return False
    logger.warning(
        "%s computes a loss of its own: %.4f, where that of the task is %.4f. Its own is "
        "trained, a whole batch at a time.",
        type(model).__name__,
        own,
        ours,
    )
    return True
