"""Evaluation: the validation rows through the model, then the loss and the metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
        limit: Batches of each process to stop after, or as a fraction the share of all of them;
            taken in the order of the rows.

    Returns:
        `eval_loss` (the mean over all items), the metrics with `eval_` before their names, and
        `eval_runtime` in seconds with the rows and batches per second.
    """
    start = time.time()
    world = args.world_size
    module.switch_mode("eval")
    loader, order = _batches(module, data, limit)
    judge = _judge(module, data, args, metrics, order)
    results: list[Evaluated] = []
    rows: list[int] = []  # of each batch
    batches = len(loader) if hasattr(loader.dataset, "__len__") else None
    mine = Deal(args.process_index, world, "nothing")
    source = mine.of_stream(loader) if batches is None else loader
    if isinstance(limit, int):
        batches = min(limit, limit if batches is None else batches)
    elif limit is not None and (share := share_of(data.validation_batches(), limit)) is not None:
        batches = mine.count(share, args.per_device_eval_batch_size, args.dataloader_drop_last)
    with nullcontext() if data.parity else _seeded(args.seed, module.device):
        for number, batch in enumerate(islice(source, batches), start=1):
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            result = module.evaluate_batch(batch)
            results.append(result._replace(outputs={}))
            rows.append(len(batch["input_ids"]))
            if judge is not None:
                judge.add(result, batch, number, number == batches)
            on_batch()

    if world > 1:
        told = list(zip(send_to_device(results, "cpu"), rows, strict=True))
        everything = dealt_back(everyones(told, world))
        results, rows = [each for each, _ in everything], [count for _, count in everything]
    figures = {} if judge is None or not results else denumpify_detensorize(dict(judge.figures()))
    figures = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in figures.items()}
    if results:  # a "loss" of the caller's metrics comes after it, and wins as in transformers
        figures.pop("eval_loss", None)
        figures = {"eval_loss": _loss_of(results, rows, args, module), **figures}
    figures = {k if k.startswith("eval_") else f"eval_{k}": v for k, v in figures.items()}
    steps = math.ceil(sum(rows) / args.per_device_eval_batch_size)
    return {**figures, **speed_metrics("eval", start, num_samples=sum(rows), num_steps=steps)}


def share_of(batches: int | None, limit: float) -> int | None:
    """The number of batches that `limit_val_batches` means by a share of them.

    Args:
        batches: None of a stream.
        limit: From 0 to 1.

    Raises:
        ValueError: It is less than one batch, or a share of nobody knows how many.
    """
    if limit == 1:
        return batches
    if batches is None:
        raise ValueError(
            f"limit_val_batches={limit} is a share of a stream, whose length is not known. Give a "
            "number of batches."
        )
    if int(limit * batches) == 0:
        raise ValueError(
            f"limit_val_batches={limit} of {batches} batches leaves no batch to evaluate."
        )
    return int(limit * batches)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw the same in each evaluation, as token-detection does, and nothing of the training's."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield


def _judge(
    module: TaskModule,
    data: DataModule,
    args: TrainingArguments,
    metrics: Metrics | str | None,
    order: list[int] | None,
) -> _Own | _Kept | None:
    """What makes figures of the outputs; None where the loss is all that is asked for."""
    if metrics is None or args.prediction_loss_only:
        return None
    if callable(metrics):
        return _Kept(module, args, metrics, order)
    compared = data.rows["validation"]
    in_turn = order is not None and module.compares_in_turn
    return _Own(module.metrics(compared.select(order) if in_turn else compared), args.world_size)


def _batches(
    module: TaskModule, data: DataModule, limit: int | float | None
) -> tuple[DataLoader, list[int] | None]:
    """Batches to evaluate, and the numbers of their inputs, where that is not their order."""
    args = data.args
    is_stream = not isinstance(data.tokens["validation"], Dataset)
    sees_batches = args.batch_eval_metrics or not args.eval_do_concat_batches
    by_row = module.outputs_by_row and not sees_batches
    # Longest first, a last batch that is dropped would be the shortest rows of all.
    in_order = data.parity or limit is not None or is_stream or args.dataloader_drop_last
    if in_order or not by_row:
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


class _Own:
    """A task's own metrics, over the batches of all processes."""

    def __init__(self, metrics: OwnMetrics, world: int) -> None:
        self.metrics, self.world = metrics, world

    def add(self, result: Evaluated, batch: dict[str, Any], number: int, is_last: bool) -> None:
        """Count one batch."""
        outputs, logits = result.outputs, result.outputs.get("logits")
        if isinstance(logits, tuple):  # of a model that returns one, the first of it
            outputs = {**outputs, "logits": logits[0]}
        self.metrics.update(outputs, batch)

    def figures(self) -> dict[str, float]:
        """Over all batches."""
        if self.world > 1:
            self.metrics.merge(everyones(self.metrics.state(), self.world))
        return self.metrics.compute()


class _Kept:
    """Predictions, labels, inputs and losses as `compute_metrics` functions expect them.

    Args:
        module: The task.
        args: What to keep.
        metrics: The function.
        order: Numbers of the rows as they come; None if in their order.
    """

    def __init__(
        self, module: TaskModule, args: TrainingArguments, metrics: Metrics, order: list[int] | None
    ) -> None:
        config = module.model.config
        self.ignored = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        self.label_names = args.label_names or find_labels(type(inner_model(module.model)))
        self.main_input = getattr(module.model, "main_input_name", "input_ids")
        self.args, self.metrics, self.order = args, metrics, order
        parts = ("predictions", "label_ids", "inputs", "losses")
        concat = args.eval_do_concat_batches
        self.kept = {part: EvalLoopContainer(concat, padding_index=-100) for part in parts}
        self.world = args.world_size
        self.mine: list[dict[str, Any]] = []  # batches of this process, where there are several
        self.found: dict[str, Any] = {}

    def add(self, result: Evaluated, batch: dict[str, Any], number: int, is_last: bool) -> None:
        """Keep one batch, or ask for its figures where they are wanted batch by batch."""
        wanted, outputs = self.args.include_for_metrics, result.outputs
        logits = nested_detach(tuple(v for k, v in outputs.items() if k not in self.ignored))
        labels = tuple(batch.get(name) for name in self.label_names)
        inputs = batch[self.main_input]
        now = {
            "predictions": _unwrapped(logits),
            "label_ids": None if None in labels else _unwrapped(labels),
            "inputs": inputs if "inputs" in wanted else None,
            "losses": result.loss.repeat(len(inputs)) if "loss" in wanted else None,
        }
        if self.world > 1:
            self.mine.append(send_to_device(now, "cpu"))
        elif self.args.batch_eval_metrics:
            if "inputs" in wanted:
                now["inputs"] = batch  # here transformers gives the whole batch
            self.found = self.metrics(EvalPrediction(**now), compute_result=is_last)
        else:
            self._keep(now)
            every = self.args.eval_accumulation_steps
            if every and number % every == 0:
                for container in self.kept.values():
                    container.to_cpu_and_numpy()

    def figures(self) -> dict[str, Any]:
        """What the function says, given the rows of all processes in their order."""
        everyone = dealt_back(everyones(self.mine, self.world)) if self.world > 1 else []
        if self.args.batch_eval_metrics:
            for number, now in enumerate(everyone, start=1):
                is_last = number == len(everyone)
                self.found = self.metrics(EvalPrediction(**now), compute_result=is_last)
            return _checked(self.found)
        for now in everyone:
            self._keep(now)
        kept = {part: each.get_arrays() for part, each in self.kept.items()}
        if self.order is not None:
            places = np.argsort(self.order)
            kept = tree_map(lambda each: each if each is None else each[places], kept)
        is_complete = kept["predictions"] is not None and kept["label_ids"] is not None
        return _checked(self.metrics(EvalPrediction(**kept))) if is_complete else {}

    def _keep(self, now: dict[str, Any]) -> None:
        for part, value in now.items():
            if value is not None:
                self.kept[part].add(value)


def _checked(found: Any) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise TypeError(f"metrics returned {found!r:.60}. It must return a dict of figures.")
    return dict(found)


def _unwrapped(values: tuple[Any, ...]) -> Any:
    return values[0] if len(values) == 1 else values
