"""Metrics of text-classification, updated batch by batch."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MultilabelExactMatch,
    MultilabelF1Score,
)


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

    def __init__(self, problem: str, classes: int) -> None:
        self.problem = problem
        if problem == "regression":
            with warnings.catch_warnings():  # of the memory that the scores take
                warnings.filterwarnings("ignore", message=".*will save all targets and predictions")
                found: dict[str, Any] = {
                    "pearson": PearsonCorrCoef(),
                    "spearman": SpearmanCorrCoef(),
                }
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
                "matthews": MulticlassMatthewsCorrCoef(classes),
            }
        self.collection = MetricCollection(found)

    def update(self, outputs: dict[str, Any], batch: dict[str, Tensor]) -> None:
        """Add one batch: `logits` of the model, `labels` of the batch."""
        logits, labels = outputs["logits"].float(), batch["labels"]
        self.collection.to(logits.device)
        if self.problem == "regression":
            self.collection.update(logits.squeeze(-1), labels)
        elif self.problem == "multi_label_classification":
            self.collection.update(logits.sigmoid(), labels.round().long())
        else:
            self.collection.update(logits.argmax(dim=-1), labels)

    def compute(self) -> dict[str, float]:
        """The metrics over all batches so far."""
        return {name: float(value) for name, value in self.collection.compute().items()}
