"""The loss of transformers.Trainer, operation by operation (5.23)."""

from __future__ import annotations

import inspect
import warnings
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer_pt_utils import LabelSmoother

from hflit.adapters import forward_inputs, inner_model
from hflit.data.batching import IGNORE_INDEX, Batch
from hflit.data.dealing import counts
from hflit.tasks.own_loss import named

if TYPE_CHECKING:
    from hflit.tasks.module import TaskModule


class ReferenceLoss:
    """What transformers.Trainer would make of a batch, too large under accumulation or not.

    Args:
        model: A transformers model, in a `PeftModel` or not.
        args: Label smoothing and accumulation.
        task: Which columns are labels, and of which token.
    """

    def __init__(self, model: Any, args: TrainingArguments, task: type[TaskModule]) -> None:
        inner = inner_model(model)
        parameters = inspect.signature(inner.forward).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        # Without `labels` transformers finds nothing to count, and averages over the micro-batches.
        self.counts_items = (
            getattr(inner, "accepts_loss_kwargs", takes_any) and "labels" in task.label_names
        )
        # 5.23 leaves the first label of each row out of its count for some causal models only: for
        # GPT-2, whose config names no loss, it counts one label a row too many.
        self.shifts_count = (
            LOSS_MAPPING.get(str(getattr(inner, "loss_type", None))) is ForCausalLMLoss
            and not inner.config.is_encoder_decoder
        )
        smoothing = args.label_smoothing_factor
        self.smoother = LabelSmoother(smoothing) if smoothing else None
        self.predicts_next = task.predicts_next
        accumulation = args.gradient_accumulation_steps
        if accumulation > 1 and self.counts_items:
            warnings.warn(
                f"parity=True copies transformers.Trainer: models that ignore the count of items "
                f"get a loss {accumulation} times too large under "
                f"gradient_accumulation_steps={accumulation}.",
                stacklevel=3,
            )

    def count(self, window: list[Batch]) -> Any:
        """Labels of an update; None where each micro-batch is averaged by itself."""
        if not self.counts_items:
            return None
        shifted = self.shifts_count
        labels = [b["labels"][..., 1:] if shifted else b["labels"] for b in window if counts(b)]
        return sum(label.ne(IGNORE_INDEX).sum() for label in labels)

    def outputs(
        self, model: Any, batch: Batch, count: Any, autocast: AbstractContextManager[Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss and outputs of a micro-batch.

        Args:
            model: As above.
            batch: With labels.
            count: What the loss is divided by; None for a mean over the micro-batch.
            autocast: Around the forward.
        """
        wanted = forward_inputs(model)
        inputs: dict[str, Any] = {k: v for k, v in batch.items() if k in wanted}
        labels = inputs.pop("labels") if self.smoother is not None else None
        if count is not None:
            inputs["num_items_in_batch"] = count
        with autocast:
            outputs = named(model(**inputs))
        if self.smoother is None:
            return outputs["loss"].float(), outputs
        outputs = {k: v.float() if torch.is_tensor(v) else v for k, v in outputs.items()}
        loss = self.smoother(
            outputs, labels, shift_labels=self.predicts_next, num_items_in_batch=count
        )
        return loss, outputs
