"""Precision: autocast around the forward only, and half weights for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from hflit.checks import listed


class ForwardPrecision(MixedPrecision):
    """Autocast that a task enters around its model, and nothing else.

    Lightning's own plugin wraps the whole training step, so backward runs inside autocast too;
    with dropout on, that moves the losses by 1e-4.

    In float16 the loss is scaled up before each backward, so that small gradients do not vanish.
    The task calls `unscale` before it measures and clips them.

    Attributes:
        skipped: Whether the last update was left out, since a gradient had become too large.
    """

    skipped = False

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring the gradients of an update back to their size."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def optimizer_step(  # type: ignore[override]  # Lightning's own unscales once more
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **options: Any
    ) -> Any:
        """Update the weights, unless a gradient is infinite or no number in float16."""
        if self.scaler is None:
            return super().optimizer_step(optimizer, model, closure, **options)
        closure()
        scale = self.scaler.get_scale()
        result = self.scaler.step(optimizer, **options)
        self.scaler.update()
        self.skipped = self.scaler.get_scale() < scale
        return result

    def forward_autocast(self) -> AbstractContextManager[Any]:
        """The context for a call of the model.

        As in accelerate, unlike in Lightning, a weight that is used twice is rounded once: its
        gradient is summed before it becomes float32.
        """
        dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16
        return torch.autocast(self.device, dtype=dtype)

    def forward_context(self) -> AbstractContextManager[Any]:  # type: ignore[override]  # the base yields
        """Lightning's context for whole steps: does nothing here."""
        return nullcontext()


def set_precision(flags: dict[str, Any], args: TrainingArguments) -> None:
    """Put the plugin of this file in place of a mixed precision among the flags of a trainer."""
    if flags["precision"] in ("bf16-mixed", "16-mixed"):
        plugin = ForwardPrecision(flags.pop("precision"), args.device.type)
        flags["plugins"] = [plugin, *listed(flags.get("plugins"))]


@contextmanager
def full_eval(model: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """Hold the weights in half precision if `bf16_full_eval` or `fp16_full_eval` says so.

    transformers never turns them back; here the weights are afterwards what they were, to the bit.
    """
    dtype = torch.bfloat16 if args.bf16_full_eval else torch.float16
    tensors = [each for each in (*model.parameters(), *model.buffers()) if each.is_floating_point()]
    if not (args.bf16_full_eval or args.fp16_full_eval):
        tensors = []
    kept = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data
