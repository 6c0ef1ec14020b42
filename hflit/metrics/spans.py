"""Metrics of question-answering: SQuAD's, versions 1 and 2, over the spans of each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.text import squad

NEVER = -math.inf


class Candidate(NamedTuple):
    """A stretch of a context that may be the answer.

    Attributes:
        score: Start logit of its first token plus end logit of its last.
        start: First character in the context.
        end: The character behind it.
    """

    score: float
    start: int
    end: int


class SpanMetrics:
    """Exact match and F1 of the best answer of each row, from 0 to 100.

    Of all stretches of a context that are no longer than `max_answer_length` tokens, over all the
    spans of the row, the one with the highest start plus end logit is the answer. Where some rows
    have no answer (SQuAD 2), a row is left unanswered if the null token's logits, in the span
    where they are lowest, beat the answer's by more than `null_threshold` (Devlin et al. 2019).
    Then there are also `HasAns_exact`, `HasAns_f1`, `NoAns_exact` and `NoAns_f1` (the rows with
    and without an answer), and the best that a threshold chosen afterwards would give: `best_exact`
    at `best_exact_thresh`, `best_f1` at `best_f1_thresh` (Rajpurkar et al. 2018).

    Only the `n_best` candidates of each row are kept from batch to batch.

    Args:
        contexts: Context of each row.
        answers: Texts of the right answers of each row, none for a row without an answer.
        n_best: Candidates to keep of each row.
        max_answer_length: Longest answer in tokens.
        null_threshold: In logits; higher leaves fewer rows unanswered.
    """

    figures = (
        *("exact_match", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1"),
        *("best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"),
    )

    def __init__(
        self,
        contexts: Sequence[str],
        answers: Sequence[list[str]],
        n_best: int = 20,
        max_answer_length: int = 30,
        null_threshold: float = 0.0,
    ) -> None:
        self.contexts = contexts
        self.answers = answers
        self.n_best = n_best
        self.max_answer_length = max_answer_length
        self.null_threshold = null_threshold
        self.candidates: dict[int, list[Candidate]] = {}  # row -> best first
        self.null_scores: dict[int, float] = {}  # row -> the lowest of its spans

    def update(self, outputs: dict[str, Any], batch: dict[str, Tensor]) -> None:
        """Add a batch of spans: `start_logits` and `end_logits`, each `(batch, seq)`.

        The batch says of which `row` each span is, where its null token stands
        (`null_positions`), and which characters of the context each token covers (`char_starts`,
        `char_ends`; -1 outside the context).
        """
        start, end = outputs["start_logits"].float(), outputs["end_logits"].float()
        null = batch["null_positions"][:, None]
        null_scores = (start.gather(1, null) + end.gather(1, null)).squeeze(1)  # (batch,)

        outside = batch["char_ends"] <= batch["char_starts"]
        start, end = start.masked_fill(outside, NEVER), end.masked_fill(outside, NEVER)
        width = self.max_answer_length
        ends = F.pad(end, (0, width - 1), value=NEVER).unfold(1, width, 1)  # (batch, seq, width)
        scores = (start[:, :, None] + ends).flatten(1)  # (batch, seq * width)
        best, places = scores.topk(min(self.n_best, scores.shape[1]))  # (batch, n_best)
        first = places // width
        last = (first + places % width).clamp(max=start.shape[1] - 1)
        begins = batch["char_starts"].gather(1, first)
        stops = batch["char_ends"].gather(1, last)
        columns = (batch["row"], null_scores, best, begins, stops)
        for row, null_score, *found in zip(*(c.tolist() for c in columns), strict=True):
            new = [Candidate(*each) for each in zip(*found, strict=True) if each[0] > NEVER]
            self._add(row, null_score, new)

    def state(self) -> Any:
        """What has been seen so far, for `merge`."""
        return self.null_scores, self.candidates

    def merge(self, states: list[Any]) -> None:
        """Go on from what several processes have seen; the spans of a row may be parted."""
        self.null_scores, self.candidates = {}, {}
        rows = sorted({row for null_scores, _ in states for row in null_scores})
        for row in rows:
            for null_scores, candidates in states:
                if row in null_scores:
                    self._add(row, null_scores[row], candidates[row])

    def compute(self) -> dict[str, float]:
        """The metrics over all rows so far."""
        rows = list(self.null_scores)
        has_answer = np.array([bool(self.answers[row]) for row in rows])
        texts = np.array([self._score(row) for row in rows])  # exact match and F1, (rows, 2)
        if has_answer.all():
            return dict(zip(("exact_match", "f1"), texts.mean(axis=0).tolist(), strict=True))

        empty = np.where(has_answer, 0.0, 100.0)  # what no answer scores, (rows,)
        odds = np.array([self._null_odds(row) for row in rows])
        figures = {}
        for name, short, text in zip(("exact_match", "f1"), ("exact", "f1"), texts.T, strict=True):
            scores = np.where(odds > self.null_threshold, empty, text)
            figures[name] = scores.mean()
            if has_answer.any():
                figures[f"HasAns_{short}"] = scores[has_answer].mean()
            figures[f"NoAns_{short}"] = scores[~has_answer].mean()
            best, threshold = _best_threshold(text, empty, odds)
            figures |= {f"best_{short}": best, f"best_{short}_thresh": threshold}
        return {name: float(value) for name, value in figures.items()}

    def _add(self, row: int, null_score: float, new: list[Candidate]) -> None:
        self.null_scores[row] = min(null_score, self.null_scores.get(row, math.inf))
        # Overlapping spans hold some stretches twice; the better score counts.
        unique: dict[tuple[int, int], Candidate] = {}
        for each in sorted([*self.candidates.get(row, []), *new], reverse=True):
            unique.setdefault((each.start, each.end), each)
        self.candidates[row] = list(unique.values())[: self.n_best]

    def _score(self, row: int) -> tuple[float, float]:
        """Exact match and F1 of the best candidate, under SQuAD's own rules of comparison."""
        best = self.candidates[row][:1]
        text = self.contexts[row][best[0].start : best[0].end] if best else ""
        right = self.answers[row] or [""]
        scores = squad(
            {"prediction_text": text, "id": ""},
            {"answers": {"text": right, "answer_start": [0] * len(right)}, "id": ""},
        )
        return float(scores["exact_match"]), float(scores["f1"])

    def _null_odds(self, row: int) -> float:
        """By how much the null token beats the best candidate, in logits."""
        best = self.candidates[row][:1]
        return self.null_scores[row] - best[0].score if best else math.inf


def _best_threshold(text: np.ndarray, empty: np.ndarray, odds: np.ndarray) -> tuple[float, float]:
    """Best mean score that any null threshold gives, and the lowest threshold that gives it.

    Args:
        text: Score of each row if it is answered, `(rows,)`.
        empty: Score of each row if it is left unanswered, `(rows,)`.
        odds: By how much null beats the answer; a row is answered up to the threshold, `(rows,)`.
    """
    order = np.argsort(odds)
    odds = odds[order]
    totals = empty.sum() + np.cumsum((text - empty)[order])
    totals[:-1][odds[1:] == odds[:-1]] = NEVER  # no threshold parts rows of equal odds
    place = int(totals.argmax())
    if totals[place] <= empty.sum():  # best to answer nothing
        return empty.mean(), float(np.nextafter(odds[0], NEVER))
    return totals[place] / len(odds), float(odds[place])
