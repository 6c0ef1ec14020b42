"""Metrics of sequence-sequence: what a model writes against what it should have written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, islice, zip_longest
from typing import Any

from sacrebleu import corpus_bleu, corpus_chrf
from torch import Tensor
from torchmetrics.functional.text import rouge_score

from hflit.ranks import dealt_back

ROUGE = ("rouge1", "rouge2", "rougeL")


class GenerationMetrics:
    """BLEU, chrF and ROUGE of generated texts, see `text_scores`.

    Args:
        generate: Batch -> the text that the model makes of each of its rows.
        references: The right texts of each row, in the order in which the batches come.
    """

    figures = ("bleu", "chrf", *ROUGE)

    def __init__(
        self,
        generate: Callable[[dict[str, Tensor]], list[str]],
        references: Iterable[list[str]],
    ) -> None:
        self.generate = generate
        self.references = references
        self.texts: list[list[str]] = []  # of each batch

    def update(self, outputs: dict[str, Any], batch: dict[str, Tensor]) -> None:
        """Add one batch; the `outputs` of teacher forcing are not looked at."""
        self.texts.append(self.generate(batch))

    def state(self) -> Any:
        """What has been seen so far, for `merge`."""
        return self.texts

    def merge(self, states: list[Any]) -> None:
        """Go on from what several processes have seen, batch by batch in turn."""
        self.texts = dealt_back(states)

    def compute(self) -> dict[str, float]:
        """The metrics over all batches so far."""
        texts = list(chain.from_iterable(self.texts))
        return text_scores(texts, list(islice(self.references, len(texts))))


def text_scores(texts: list[str], references: list[list[str]]) -> dict[str, float]:
    """Compare texts with one or more references each.

    Args:
        texts: Generated texts.
        references: The references of each, at least one.

    Returns:
        `bleu` and `chrf` from 0 to 100, as sacrebleu prints them: its 13a tokens, chrF2. `rouge1`,
        `rouge2` and `rougeL` from 0 to 1: F1 with the nearest reference, averaged over the texts;
        without stemming, and letters outside a to z count as spaces, as in `rouge_score`. Nothing
        if there are no texts.

    Example:
        >>> text_scores(["the cat sat down"], [["the cat sat down", "it sat"]])["rougeL"]
        1.0
    """
    if not texts:
        return {}
    # sacrebleu wants a list of first references, one of second ones, ... with None for missing.
    columns: Any = list(zip_longest(*references))
    rouge = rouge_score(texts, references, rouge_keys=ROUGE)
    return {
        # torchmetrics' BLEU and chrF differ from sacrebleu's where little or nothing matches.
        "bleu": corpus_bleu(texts, columns).score,
        "chrf": corpus_chrf(texts, columns).score,
        **{name: float(rouge[f"{name}_fmeasure"]) for name in ROUGE},
    }
