"""Metrics of the language tasks: how well single tokens are predicted."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


class TokenMetrics:
    """Perplexity and accuracy over all predicted tokens.

    `perplexity` is e to the mean cross-entropy in nats, from 1 upwards. `token_accuracy` is the
    share of tokens that were the model's first guess, from 0 to 1. Both are taken over tokens, not
    over batches.

    Args:
        shifted: Whether a token is compared with the prediction one place earlier.
    """

    figures = ("perplexity", "token_accuracy")

    def __init__(self, shifted: bool) -> None:
        self.shifted = shifted
        self.loss = 0.0
        self.hits = 0
        self.tokens = 0

    def update(self, outputs: dict[str, Any], batch: dict[str, Tensor]) -> None:
        """Add one batch: `logits` of the model, `(batch, seq, vocab)`, `labels` of the batch."""
        logits, labels = outputs["logits"], batch["labels"]
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        is_predicted = labels != IGNORE_INDEX
        logits, labels = logits[is_predicted].float(), labels[is_predicted]  # (tokens, vocab)
        self.loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        self.hits += int((logits.argmax(dim=-1) == labels).sum())
        self.tokens += len(labels)

    def state(self) -> Any:
        """What has been seen so far, for `merge`."""
        return self.loss, self.hits, self.tokens

    def merge(self, states: list[Any]) -> None:
        """Go on from what several processes have seen."""
        self.loss, self.hits, self.tokens = map(sum, zip(*states, strict=True))

    def compute(self) -> dict[str, float]:
        """The metrics over all batches so far; nothing if no token was predicted."""
        if not self.tokens:
            return {}
        mean = self.loss / self.tokens
        return {
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "token_accuracy": self.hits / self.tokens,
        }
