"""Evaluation: the validation rows through the model, then the loss and the metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainingArguments
from transformers.trainer_pt_utils import EvalLoopContainer, nested_detach
from transformers.trainer_utils import denumpify_detensorize, speed_metrics
from transformers.utils.generic import find_labels

from hflit.adapters import inner_model
from hflit.data import DataModule
from hflit.data.dealing import Deal
from hflit.ranks import dealt_back, everyones
from hflit.tasks.module import TaskModule
from hflit.tasks.parts import Evaluated, mean_loss

Metrics = Callable[..., dict[str, Any]]


class OwnMetrics(Protocol):
    """Metrics of a task, gathered batch by batch."""

    def update(self, outputs: dict[str, Any], batch: dict[str, Any]) -> None:
        """Add one batch."""

    def state(self) -> Any:
        """What has been added so far, for `merge`."""

    def merge(self, states: list[Any]) -> None:
        """Go on from what has been added in each process."""

    def compute(self) -> dict[str, float]:
        """The figures over all batches."""


def evaluate(
    module: TaskModule,
    data: DataModule,
    args: TrainingArguments,
    metrics: Metrics | str | None = None,
    on_batch: Callable[[], None] = lambda: None,
    limit: int | float | None = None,
) -> dict[str, float]:
    """Evaluate a model on all validation rows, or on the first batches of them.

    Rows of like length share a batch, so that little is padded; what metrics are given is in the
    order of the rows. Of several processes each takes its own batches; all of them get the figures
    of all batches.

    Args:
        module: The task; its model is put into evaluation mode and left there.
        data: Has the validation rows, set up.
        args: What to keep for `metrics`.
        metrics: Function from `EvalPrediction` to a dict, under transformers' contract; `"auto"`
            for the task's own metrics; or None for the loss alone.
        on_batch: Called after each batch.
        limit: Batches to stop after, or as a fraction the share of them; taken in the order of the
            rows.

    Returns:
        `eval_loss` (the mean over all items), the metrics with `eval_` before their names, and
        `eval_runtime` in seconds with the rows and batches per second.
    """
    start = time.time()
    world = args.world_size
    module.switch_mode("eval")
    compute_metrics = metrics if callable(metrics) and not args.prediction_loss_only else None
    kept = _Kept(module, args) if compute_metrics else None
    loader, order = _batches(module, data, limit)
    own: OwnMetrics | None = None
    if metrics == "auto" and not args.prediction_loss_only:
        compared = data.rows["validation"]
        in_turn = order is not None and module.compares_in_turn
        own = module.metrics(compared.select(order) if in_turn else compared)
    results: list[Evaluated] = []
    rows: list[int] = []  # of each batch
    found: dict[str, Any] = {}
    batches = len(loader) if hasattr(loader.dataset, "__len__") else None
    mine = Deal(args.process_index, world, "nothing")
    source = mine.of_stream(loader) if batches is None else loader
    if isinstance(limit, int):
        batches = min(limit, limit if batches is None else batches)
    elif limit is not None and batches is not None:
        batches = int(limit * batches)
    for index, batch in enumerate(islice(source, batches)):
        batch = module.transfer_batch_to_device(batch, module.device, 0)
        result = module.evaluate_batch(batch)
        results.append(result._replace(outputs={}))
        rows.append(len(batch["input_ids"]))
        if own is not None:
            own.update(result.outputs, batch)
        if kept is not None and compute_metrics is not None:
            prediction = kept.add(result.outputs, result.loss, batch)
            if args.batch_eval_metrics and world == 1:
                if "inputs" in args.include_for_metrics:
                    prediction.inputs = batch  # here transformers gives the whole batch
                found = compute_metrics(prediction, compute_result=index + 1 == batches)
            elif args.eval_accumulation_steps and (index + 1) % args.eval_accumulation_steps == 0:
                kept.to_cpu()
        on_batch()

    if world > 1:
        told = [(each.on_cpu(), count) for each, count in zip(results, rows, strict=True)]
        everything = dealt_back(everyones(told, world))
        results, rows = [each for each, _ in everything], [count for _, count in everything]
        if own is not None:
            own.merge(everyones(own.state(), world))
    if own is not None:
        found = own.compute()
    elif kept is not None and compute_metrics is not None:
        if world > 1 and args.batch_eval_metrics:
            found = kept.each(compute_metrics)
        elif not args.batch_eval_metrics:
            prediction = kept.all(order)
            if prediction.predictions is not None and prediction.label_ids is not None:
                found = compute_metrics(prediction)
    figures = denumpify_detensorize(dict(found))
    if results:
        figures["eval_loss"] = _loss_of(results, rows, args, module)
    figures = {k if k.startswith("eval_") else f"eval_{k}": v for k, v in figures.items()}
    steps = math.ceil(sum(rows) / args.per_device_eval_batch_size)
    return {**figures, **speed_metrics("eval", start, num_samples=sum(rows), num_steps=steps)}


def _batches(
    module: TaskModule, data: DataModule, limit: int | float | None
) -> tuple[DataLoader, list[int] | None]:
    """Batches to evaluate, and the numbers of their inputs, where that is not their order."""
    args = data.args
    is_stream = not isinstance(data.tokens["validation"], Dataset)
    sees_batches = args.batch_eval_metrics or not args.eval_do_concat_batches
    by_row = module.outputs_by_row and not sees_batches
    if data.parity or limit is not None or is_stream or not by_row:
        return data.val_dataloader(), None
    return data.validation_by_length()


def _loss_of(
    results: list[Evaluated], rows: list[int], args: TrainingArguments, module: TaskModule
) -> float:
    means = torch.stack([result.loss for result in results]).cpu().float().numpy()
    finite = np.isfinite(means)
    if not (args.logging_nan_inf_filter and finite.any()):
        finite[:] = True
    if module.parity:
        # transformers weighs the mean of each batch by its rows, also where it is over tokens,
        # and rounds the mean of a float16 model to float16.
        if next(module.model.parameters()).dtype == torch.float16:
            means = means.astype(np.float16)
        return float(np.repeat(means, rows)[np.repeat(finite, rows)].mean())
    sums = sum(result.sums for result, use in zip(results, finite, strict=True) if use)
    items = sum(result.items for result, use in zip(results, finite, strict=True) if use)
    return float(mean_loss(torch.as_tensor(sums), items))


class _Kept:
    """Predictions, labels, inputs and losses as `compute_metrics` functions expect them."""

    def __init__(self, module: TaskModule, args: TrainingArguments) -> None:
        config = module.model.config
        self.ignored = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        self.label_names = args.label_names or find_labels(type(inner_model(module.model)))
        self.wanted = args.include_for_metrics
        self.main_input = getattr(module.model, "main_input_name", "input_ids")
        self.rows = args.per_device_eval_batch_size
        parts = ("predictions", "label_ids", "inputs", "losses")
        concat = args.eval_do_concat_batches
        self.kept = {part: EvalLoopContainer(concat, padding_index=-100) for part in parts}
        self.world = args.world_size
        self.mine: list[dict[str, Any]] = []  # batches of this process, where there are several

    def add(
        self, outputs: dict[str, Any], loss: torch.Tensor, batch: dict[str, Any]
    ) -> EvalPrediction:
        """Keep one batch, and return it."""
        logits = nested_detach(tuple(v for k, v in outputs.items() if k not in self.ignored))
        labels = tuple(batch.get(name) for name in self.label_names)
        now = {
            "predictions": _unwrapped(logits),
            "label_ids": None if None in labels else _unwrapped(labels),
            "inputs": batch[self.main_input] if "inputs" in self.wanted else None,
            "losses": loss.repeat(len(batch[self.main_input])) if "loss" in self.wanted else None,
        }
        if self.world > 1:
            self.mine.append(send_to_device(now, "cpu"))
        else:
            self._keep(now)
        return EvalPrediction(**now)

    def each(self, metrics: Metrics) -> dict[str, Any]:
        """What `metrics` says after the last batch, given those of all processes one by one."""
        batches = dealt_back(everyones(self.mine, self.world))
        found: dict[str, Any] = {}
        for index, now in enumerate(batches):
            prediction = EvalPrediction(**now)
            found = metrics(prediction, compute_result=index + 1 == len(batches))
        return found

    def to_cpu(self) -> None:
        """Move what is kept out of the device's memory."""
        for container in self.kept.values():
            container.to_cpu_and_numpy()

    def all(self, order: list[int] | None) -> EvalPrediction:
        """Everything kept, as numpy arrays in the order of the rows.

        Args:
            order: Numbers of the rows as they came; None if in their order.
        """
        if self.world > 1:
            for now in dealt_back(everyones(self.mine, self.world)):
                self._keep(now)
        kept = {part: each.get_arrays() for part, each in self.kept.items()}
        if order is not None:
            places = np.argsort(order)
            kept = tree_map(lambda each: each if each is None else each[places], kept)
        return EvalPrediction(**kept)

    def _keep(self, now: dict[str, Any]) -> None:
        for part, value in now.items():
            if value is not None:
                self.kept[part].add(value)


def _unwrapped(values: tuple[Any, ...]) -> Any:
    return values[0] if len(values) == 1 else values
