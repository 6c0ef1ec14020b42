"""Metrics of text-classification, updated batch by batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MultilabelExactMatch,
    MultilabelF1Score,
)
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from hflit.metrics.counts import Counts


class ClassificationMetrics:
    """Accuracy and F1 of classes, F1 of several labels, correlations of scores.

    Classes: `accuracy`, `f1_macro` (mean over classes), `f1_weighted` (mean over rows), `matthews`.
    Several labels, each predicted from a probability of 0.5: `f1_micro`, `f1_macro`, `exact_match`.
    Scores: `pearson`, `spearman`. All from 0 to 1, but `matthews` and the correlations, which start
    at -1.

    Only counts are kept from batch to batch; the scores of a regression are kept one number a row,
    since ranks need them all.

    Args:
        problem: `single_label_classification`, `multi_label_classification` or `regression`.
        classes: Number of classes.
    """

    figures = (
        *("accuracy", "f1_macro", "f1_weighted", "matthews"),
        *("f1_micro", "exact_match", "pearson", "spearman"),
    )

    def __init__(self, problem: str, classes: int) -> None:
        self.problem = problem
        self.scores: list[Tensor] = []  # predicted and right ones of each batch, (2, batch)
        found: dict[str, Any]
        if problem == "regression":
            found = {}
        elif problem == "multi_label_classification" and classes == 1:
            # torchmetrics' figures for several labels start at two.
            found = {"f1_micro": BinaryF1Score(), "f1_macro": BinaryF1Score()}
            found["exact_match"] = BinaryAccuracy()
        elif problem == "multi_label_classification":
            found = {
                "f1_micro": MultilabelF1Score(classes, average="micro"),
                "f1_macro": MultilabelF1Score(classes, average="macro"),
                "exact_match": MultilabelExactMatch(classes),
            }
        else:
            found = {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "f1_macro": MulticlassF1Score(classes, average="macro"),
                "f1_weighted": MulticlassF1Score(classes, average="weighted"),
                "matthews": _Matthews(classes),
            }
        self.counts = Counts(found)

    def update(self, outputs: dict[str, Any], batch: dict[str, Tensor]) -> None:
        """Add one batch: `logits` of the model, `(batch, classes)`, and `labels` of the batch.

        These are `(batch,)`, or for several labels `(batch, classes)` of 0.0 and 1.0.
        """
        logits, labels = outputs["logits"].float(), batch["labels"]
        if self.problem == "regression":
            self.scores.append(torch.stack([logits.squeeze(-1), labels]).cpu())
        elif self.problem == "multi_label_classification":
            self.counts.update(logits.sigmoid(), labels.round().long())
        else:
            self.counts.update(logits.argmax(dim=-1), labels)

    def state(self) -> Any:
        """What has been seen so far, for `merge`."""
        return self.counts.state(), self.scores

    def merge(self, states: list[Any]) -> None:
        """Go on from what several processes have seen."""
        self.counts.merge([counts for counts, _ in states])
        self.scores = [scores for _, kept in states for scores in kept]

    def compute(self) -> dict[str, float]:
        """The metrics over all batches so far."""
        if self.problem != "regression":
            return self.counts.compute()
        found, right = torch.cat(self.scores, dim=1)
        if any(each.min() == each.max() or not each.isfinite().all() for each in (found, right)):
            return {"pearson": math.nan, "spearman": math.nan}  # as in scipy
        functions = {"pearson": pearson_corrcoef, "spearman": spearman_corrcoef}
        return {name: float(function(found, right)) for name, function in functions.items()}


class _Matthews(MulticlassMatthewsCorrCoef):
    """0 where all predictions, or all labels, are one class, as in scikit-learn.

    torchmetrics 1.x has another value there for two classes.
    """

    def compute(self) -> Tensor:
        """From the counts of labels by predictions (Gorodkin 2004)."""
        counts: Tensor = self.confmat.cpu().double()  # MPS holds no float64
        rows, labels, predicted = counts.sum(), counts.sum(dim=1), counts.sum(dim=0)
        spread = (rows**2 - predicted @ predicted) * (rows**2 - labels @ labels)
        shared = counts.trace() * rows - labels @ predicted
        return shared / spread.sqrt() if spread > 0 else torch.zeros(())
