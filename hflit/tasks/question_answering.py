"""question-answering: find the answer to a question as a span of tokens in its context."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForQuestionAnswering

from hflit.data.answers import read_answers
from hflit.data.batching import Batch
from hflit.data.questions import Questions
from hflit.metrics.spans import SpanMetrics
from hflit.tasks.distillation import kl_distance
from hflit.tasks.module import TaskModule


class QuestionAnswering(TaskModule):
    """Scores each token twice: as the first token of the answer and as its last.

    A question without an answer points both at the null token, see `Questions`, so the loss needs
    no special case. Padding is no place for an answer. transformers lets it compete with the
    tokens, so that its loss depends on which rows happen to share a batch; `parity=True` does so
    too.

    Batch, of spans:
        input_ids: `(batch, seq)`, the question and a stretch of its context.
        attention_mask: `(batch, seq)`, 1 for tokens and 0 for padding.
        start_positions: `(batch,)`, the first token of the answer; `seq` or more is ignored.
        end_positions: `(batch,)`, the last token of the answer, itself included.
        null_positions, row, char_starts, char_ends: For evaluation, see `SpanMetrics`.
    """

    auto_model = AutoModelForQuestionAnswering
    figures = SpanMetrics.figures
    lora_type = "QUESTION_ANS"
    tokenization = Questions
    label_names = ("start_positions", "end_positions")
    places = label_names
    # transformers leaves smoothing out here without a word.
    unsmoothed = "question-answering: its labels are places, not classes"

    def count_items(self, batch: Batch) -> int:
        """Spans."""
        return int((batch["start_positions"] < batch["input_ids"].shape[1]).sum())

    def summed_loss(self, outputs: dict[str, Any], batch: Batch) -> Tensor:
        """Mean of the cross-entropies of start and end in nats, summed over the spans."""
        parts = []
        for part in ("start", "end"):
            logits = _without_padding(outputs[f"{part}_logits"], batch)
            beyond = logits.shape[1]
            positions = batch[f"{part}_positions"].clamp(0, beyond)
            parts.append(F.cross_entropy(logits, positions, reduction="sum", ignore_index=beyond))
        return (parts[0] + parts[1]) / 2

    def distance(self, outputs: Any, teacher: Any, batch: Batch, temperature: float) -> Tensor:
        """Mean of the divergences from the teacher's starts and ends."""
        parts = []
        for name in ("start_logits", "end_logits"):
            student = _without_padding(outputs[name], batch)
            parts.append(kl_distance(student, _without_padding(teacher[name], batch), temperature))
        return (parts[0] + parts[1]) / 2

    def metrics(self, rows: Dataset) -> SpanMetrics:
        """Exact match and F1 of SQuAD."""
        _, context, answers = rows.column_names or next(iter(rows))  # of a stream, its first row's
        pairs = [(row[context], read_answers(row[answers])["text"]) for row in rows]
        contexts, texts = zip(*pairs, strict=True) if pairs else ((), ())
        return SpanMetrics(list(contexts), list(texts))


def _without_padding(logits: Tensor, batch: Batch) -> Tensor:
    """Logits `(batch, seq)` that give padding a probability of 0."""
    # Not minus infinity, of which a divergence becomes NaN.
    return logits.float().masked_fill(batch["attention_mask"] == 0, -1e9)
