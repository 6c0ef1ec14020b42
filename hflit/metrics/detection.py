"""Metrics of token-detection: the generator's loss and how well replaced tokens are found."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryF1Score, BinaryPrecision, BinaryRecall

IGNORE_INDEX = -100


class DetectionMetrics:
    """Precision, recall and F1 of replaced tokens, and the masked-language loss.

    A token counts as found if the discriminator gives it a probability of 0.5 or more;
    `precision`, `recall` and `f1` are shares from 0 to 1 over all tokens but padding.
    `masked_loss` is the generator's cross-entropy in nats, a mean over masked tokens.
    """

    def __init__(self) -> None:
        options: dict[str, Any] = {"ignore_index": IGNORE_INDEX}
        self.collection = MetricCollection(
            {
                "precision": BinaryPrecision(**options),
                "recall": BinaryRecall(**options),
                "f1": BinaryF1Score(**options),
            }
        )
        self.loss = 0.0
        self.masked = 0

    def update(self, outputs: dict[str, Any], batch: dict[str, Tensor]) -> None:
        """Add one batch: logits, replaced tokens and summed losses of the pair."""
        self.collection.to(outputs["logits"].device)
        self.collection.update(outputs["logits"].sigmoid(), outputs["replaced"])
        self.loss += float(outputs["sums"][0])
        self.masked += int(batch["labels"].ne(IGNORE_INDEX).sum())

    def compute(self) -> dict[str, float]:
        """The metrics over all batches so far."""
        found = {name: float(value) for name, value in self.collection.compute().items()}
        return {**found, "masked_loss": self.loss / max(self.masked, 1)}
