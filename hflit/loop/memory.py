"""Memory: figures of what a run used, and smaller batches when there is not enough."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.utils import find_executable_batch_size
from transformers import TrainingArguments
from transformers.trainer_utils import TrainerMemoryTracker

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class MemoryTracker(TrainerMemoryTracker):
    """transformers' tracker, told its stages instead of reading them off its callers."""

    stage = ""

    def derive_stage(self) -> str:
        """The stage that `begin` or `end` named."""
        return self.stage

    def begin(self, stage: str) -> None:
        """Measure from here: `init`, `train` or `eval`."""
        self.stage = stage
        self.start()

    def end(self, stage: str, figures: dict[str, float] | None = None) -> None:
        """Stop measuring, and add bytes allocated and at most used to the figures."""
        self.stage = stage
        self.stop_and_update_metrics(figures)

    def abandon(self) -> None:
        """Stop measuring in the middle of a stage."""
        self.peak_monitoring = False

    def peak_monitor_func(self) -> None:
        """Follow the peak; every millisecond, where transformers never pauses."""
        self.cpu_mem_used_peak = -1
        while self.peak_monitoring or self.cpu_mem_used_peak < 0:
            self.cpu_mem_used_peak = max(self.cpu_mem_used(), self.cpu_mem_used_peak)
            time.sleep(0.001)


def kept_weights(model: Any) -> Callable[[], None]:
    """Keep a copy of what of a model can change; what comes back puts it there again."""
    tensors = [p for p in model.parameters() if p.requires_grad] + list(model.buffers())
    kept = [tensor.detach().to("cpu", copy=True) for tensor in tensors]

    def put_back() -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)

    return put_back


def fit_in_memory(fit: Callable[[], Result], model: Any, args: TrainingArguments) -> Result:
    """Train; if `auto_find_batch_size` says so, with 9/10 of the batch whenever memory runs out.

    A new attempt starts from the weights the first one had. transformers goes on from the
    half-trained ones, with the moments of their optimizer.

    Args:
        fit: Trains with `args.per_device_train_batch_size`, which this function lowers.
        model: What `fit` trains.
        args: The arguments of the run.
    """
    if not args.auto_find_batch_size:
        return fit()
    put_back = kept_weights(model)

    def attempt(batch_size: int) -> Result:
        if batch_size != args.per_device_train_batch_size:
            logger.warning("Out of memory. Starting again with batches of %d rows.", batch_size)
            args.per_device_train_batch_size = batch_size
            put_back()
        return fit()

    return find_executable_batch_size(
        attempt, starting_batch_size=args.per_device_train_batch_size
    )()
