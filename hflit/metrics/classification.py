"""Metrics of text-classification, updated batch by batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryF1Score,
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
            found = {"classes": _Classes(classes)}
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


class _Classes(Metric):
    """Figures of classes, as in scikit-learn, from three counts a class.

    torchmetrics' own count pairs of classes, which for 20,000 classes take 3.2 GB.
    """

    counts: Tensor  # labels, predictions and right ones, (3, classes)

    def __init__(self, classes: int) -> None:
        super().__init__()
        zeros = torch.zeros(3, classes, dtype=torch.long)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Add one batch of class ids, both `(batch,)`."""
        kinds, classes = (labels, predicted, labels[labels == predicted]), self.counts.shape[1]
        self.counts += torch.stack([torch.bincount(each, minlength=classes) for each in kinds])

    def compute(self) -> dict[str, Tensor]:
        """Shares, and the coefficient of Gorodkin (2004): 0 where all is of one class."""
        labels, predicted, right = self.counts.cpu().double()  # MPS holds no float64
        rows, is_there = labels.sum(), labels + predicted > 0
        f1 = 2 * right / (labels + predicted).clamp(min=1)
        spread = (rows**2 - predicted @ predicted) * (rows**2 - labels @ labels)
        shared = right.sum() * rows - labels @ predicted
        return {
            "accuracy": right.sum() / rows,
            "f1_macro": f1[is_there].mean(),
            "f1_weighted": f1 @ labels / rows,
            "matthews": shared / spread.sqrt() if spread > 0 else torch.zeros(()),
        }
