"""Metrics of token-detection: the generator's loss and how well replaced tokens are found."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics.classification import BinaryF1Score, BinaryPrecision, BinaryRecall

from hflit.metrics.counts import Counts
from hflit.metrics.tokens import IGNORE_INDEX


class DetectionMetrics:
    """Precision, recall and F1 of replaced tokens, and the masked-language loss.

    A token counts as found if the discriminator gives it a probability of 0.5 or more;
    `precision`, `recall` and `f1` are shares from 0 to 1 over all tokens but padding.
    `masked_loss` is the generator's cross-entropy in nats, a mean over masked tokens.
    """

    figures = ("precision", "recall", "f1", "masked_loss")

    def __init__(self) -> None:
        options: dict[str, Any] = {"ignore_index": IGNORE_INDEX}
        self.counts = Counts(
            {
                "precision": BinaryPrecision(**options),
                "recall": BinaryRecall(**options),
                "f1": BinaryF1Score(**options),
            }
        )
        self.loss = 0.0
        self.masked = 0

    def update(self, outputs: dict[str, Any], batch: dict[str, Tensor]) -> None:
        """Add one batch: what `DetectionPair` returned, and the batch it was given."""
        self.counts.update(outputs["logits"].sigmoid(), outputs["replaced"])
        self.loss += float(outputs["sums"][0])
        self.masked += int(batch["labels"].ne(IGNORE_INDEX).sum())

    def state(self) -> Any:
        """What has been seen so far, for `merge`."""
        return self.counts.state(), self.loss, self.masked

    def merge(self, states: list[Any]) -> None:
        """Go on from what several processes have seen."""
        counts, losses, masked = zip(*states, strict=True)
        self.counts.merge(list(counts))
        self.loss, self.masked = sum(losses), sum(masked)

    def compute(self) -> dict[str, float]:
        """The metrics over all batches so far."""
        return {**self.counts.compute(), "masked_loss": self.loss / max(self.masked, 1)}
