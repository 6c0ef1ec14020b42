"""Metrics that are made of counts, so that those of several processes can be added."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection


class Counts:
    """Several metrics of torchmetrics whose states are all sums.

    Args:
        metrics: Name -> metric.
    """

    def __init__(self, metrics: dict[str, Any]) -> None:
        options: dict[str, Any] = {"compute_groups": False}  # whose members share their states
        self.collection = MetricCollection(metrics, **options)
        for metric in self.metrics():
            # torchmetrics would ask all processes of a group, also of one that an earlier run left.
            metric.distributed_available_fn = None

    def metrics(self) -> list[Any]:
        """The metrics, in an order of their own."""
        return list(self.collection.values())

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add one batch: predictions and labels, shaped as the metrics take them."""
        self.collection.to(predictions.device)
        self.collection.update(predictions, labels)

    def state(self) -> list[dict[str, Tensor]]:
        """The counts of each metric."""
        return [{k: v.cpu() for k, v in each.metric_state.items()} for each in self.metrics()]

    def merge(self, states: list[list[dict[str, Tensor]]]) -> None:
        """Go on from the counts of several processes."""
        for index, metric in enumerate(self.metrics()):
            for name, own in metric.metric_state.items():
                counted: Any = sum(state[index][name] for state in states)
                setattr(metric, name, counted.to(own.device))

    def compute(self) -> dict[str, float]:
        """The figures over all batches so far."""
        with warnings.catch_warnings():  # a process may have had no batch of its own
            warnings.filterwarnings("ignore", ".* method of metric .* was called before")
            return {name: float(value) for name, value in self.collection.compute().items()}
