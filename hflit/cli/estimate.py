"""How long a run will take and how much memory it needs: a few updates of random weights."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, cast

import lightning.pytorch as L
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import set_seed

from hflit.adapters import add_adapter
from hflit.arguments import Arguments
from hflit.data.batching import TokenRows
from hflit.loading import Base, check_kind
from hflit.loop.finders import trial_trainer
from hflit.loop.switches import model_switched
from hflit.request import Plan
from hflit.tasks import TaskModule
from hflit.tasks.distillation import Distillation

UPDATES = 4  # that are timed, behind a first one
MOST = 0.5  # share of the free memory that the weights and what belongs to them may take for that


def estimate(plan: Plan, changes: dict[str, Any]) -> dict[str, Any]:
    """Measure what updates cost, on a model of the same shape that is thrown away.

    Args:
        plan: Settled; no weights are read.
        changes: Values for the model's config.

    Returns:
        `seconds_per_update`, the median; `memory` in bytes: `weights`, `gradients`, `optimizer`,
        `activations` of the longest rows, and the `total` of these; `free` bytes on the device.
        Of these only `weights` and `free` if trying would take more than half of `free`.
    """
    request, data, start = plan.request, plan.data, plan.start
    task_class, args = request.task_class, request.arguments
    free = _free(args)
    with torch.device("meta"):
        count = sum(each.numel() for each in _random(task_class, start, changes).parameters())
    if 16 * count > MOST * free:  # float32: weights, gradients and the two moments of Adam
        return {"memory": {"weights": 4 * count}, "free": free}
    set_seed(args.seed)
    model = _random(task_class, start, changes)
    if request.adapter is not None:
        model = task_class.each_model(model, partial(add_adapter, config=request.adapter))
    teacher = None if plan.school is None else _random(task_class, plan.school, {})
    own = {**plan.options}
    if teacher is not None:
        own["distillation"] = Distillation(teacher)
    module = task_class(model, args, False, **own)
    loader = data.train_dataloader()
    windows = list(islice(loader, 1 + UPDATES))
    rows = data.tokens["train"]
    if hasattr(rows, "select"):
        lengths = [len(ids) for ids in rows["input_ids"]]
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        longest = TokenRows(rows).__getitems__(order[: args.per_device_train_batch_size])
        collate: Any = loader.batches.collate_fn
        windows.append([collate(longest)])
    models = [module] if teacher is None else [module, teacher]
    weights = [each for part in models for each in (*part.parameters(), *part.buffers())]
    meter = _Meter(weights)
    trainer = trial_trainer(request.flags, args, len(windows), meter)
    with model_switched(model, args, teacher=teacher):
        model.train()
        again: Any = DataLoader(cast(Any, windows), batch_size=None, collate_fn=list)
        trainer.fit(module, again, val_dataloaders=again)  # or Lightning misses some
    timed = meter.seconds[1 : 1 + UPDATES] or meter.seconds
    memory = {
        "weights": _bytes(weights),
        "gradients": _bytes([each for each in module.parameters() if each.requires_grad]),
        "optimizer": meter.optimizer,
        "activations": meter.activations,
    }
    memory["total"] = sum(memory.values())
    return {"seconds_per_update": statistics.median(timed), "memory": memory, "free": free}


class _Meter(L.Callback):
    """Times updates, and counts the bytes that forward passes keep for their backward passes."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = {each.untyped_storage().data_ptr() for each in weights}  # no activations
        self.kept: dict[int, int] = {}  # storage -> bytes, of the pass under way
        self.activations = self.optimizer = 0
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin."""
        self.hooks: Any = torch.autograd.graph.saved_tensors_hooks(self._note, lambda each: each)
        self.hooks.__enter__()
        self.start = time.perf_counter()

    def on_after_backward(self, *_: Any) -> None:
        """The pass is over, and what it kept is free."""
        self.activations = max(self.activations, sum(self.kept.values()))
        self.kept = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """End."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        self.hooks.__exit__(None, None, None)
        states = trainer.optimizers[0].state.values()
        self.optimizer = _bytes([v for each in states for v in each.values() if torch.is_tensor(v)])

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.kept[storage.data_ptr()] = storage.nbytes()
        return tensor


def _random(task_class: type[TaskModule], base: Base, changes: dict[str, Any]) -> Any:
    """A model of the shape of a base, with random weights."""
    check_kind(base.path, task_class.auto_model, base.config)
    config = copy.deepcopy(base.config)
    config.update(changes)
    model = task_class.auto_model.from_config(config)
    return task_class.load(replace(base, config=config, model=model, path=None), changes)


def _free(args: Arguments) -> int:
    if args.device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def _bytes(tensors: Any) -> int:
    unique = {id(each): each for each in tensors}
    return sum(each.numel() * each.element_size() for each in unique.values())
