"""Precision: autocast around the forward only, and half weights for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from transformers import TrainingArguments

from hflit.checks import listed


class ForwardPrecision(MixedPrecision):
    """Autocast that a task enters around its model, and nothing else.

    Lightning's own plugin wraps the whole training step, so backward runs inside autocast too;
    with dropout on, that moves the losses by 1e-4.
    """

    def forward_autocast(self) -> AbstractContextManager[Any]:
        """The context for a call of the model."""
        return self.autocast_context_manager()

    def forward_context(self) -> AbstractContextManager[Any]:  # type: ignore[override]  # the base yields
        """Lightning's context for whole steps: does nothing here."""
        return nullcontext()


def set_precision(flags: dict[str, Any], args: TrainingArguments) -> None:
    """Put the plugin of this file in place of a mixed precision among the flags of a trainer."""
    if flags["precision"] in ("bf16-mixed", "16-mixed"):
        plugin = ForwardPrecision(flags.pop("precision"), "cpu" if args.use_cpu else "cuda")
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
