"""Models of other authors than transformers': the loss that they return is the one to train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from hflit.adapters import forward_inputs, inner_model
from hflit.data.batching import Batch

if TYPE_CHECKING:
    from hflit.tasks.module import TaskModule


def brings_own_loss(model: Any) -> bool:
    """Whether somebody else wrote a model's `forward`, or the function of its loss.

    Rare classes may count more there, say. It is told by who wrote it, not by what comes out: on
    rows of one class a weighted mean is the plain one. transformers' own classes are trained by the
    loss of their task, also where that differs: a dozen of its decoders, BART's among them, compare
    each token with itself, not with the next.

    Args:
        model: In a `PeftModel` or not.
    """
    model = inner_model(model)
    function = getattr(type(model), "loss_function", PreTrainedModel.loss_function)
    author = model.forward.__module__.partition(".")[0]
    return (
        author not in ("transformers", "hflit")
        or "_loss_function" in vars(model)
        or function is not PreTrainedModel.loss_function
    )


def own_outputs(task: TaskModule, batch: Batch) -> tuple[dict[str, Any], Tensor]:
    """What a model returns for a batch with its labels, and its loss, summed over the items.

    The loss is taken to be their mean; where the model returns none, that of the task is summed.
    """
    wanted = forward_inputs(task.model)
    prepared = task.prepare(batch, inner_model(task.model))
    with task.forward_autocast():
        outputs = named(task.model(**{k: v for k, v in prepared.items() if k in wanted}))
    loss = outputs.get("loss")
    if loss is None:
        return outputs, task.summed_loss(outputs, batch)
    return outputs, loss.float() * task.count_items(batch)


def named(outputs: Any) -> Any:
    """What a forward returns, by names; a tuple is the loss and the logits, as for transformers."""
    if not isinstance(outputs, tuple):
        return outputs
    loss, *logits = outputs
    return {"loss": loss, "logits": logits[0] if len(logits) == 1 else tuple(logits)}
