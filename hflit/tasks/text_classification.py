"""text-classification: one class, several labels or a score for a text or a pair of texts."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, TrainingArguments

from hflit.data.batching import Batch
from hflit.data.labels import MULTI, REGRESSION, SINGLE, Labels
from hflit.metrics.classification import ClassificationMetrics
from hflit.tasks.distillation import bernoulli_distance, kl_distance
from hflit.tasks.module import TaskModule

PRIOR_ROWS = 10_000  # from which the shares of the labels are taken


class TextClassification(TaskModule):
    """Classifies texts, or pairs of texts; scores them if the labels are real numbers.

    The model's config says which: `problem_type` is `single_label_classification`,
    `multi_label_classification` or `regression`.

    Batch:
        input_ids: `(batch, seq)`.
        attention_mask: `(batch, seq)`, 1 for tokens and 0 for padding.
        labels: Class ids `(batch,)`; for several labels 0.0 or 1.0 each, `(batch, classes)`; for
            regression scores `(batch,)`.
    """

    auto_model = AutoModelForSequenceClassification
    figures = ClassificationMetrics.figures
    lora_type = "SEQ_CLS"
    tokenization = Labels

    @classmethod
    def check_arguments(cls, args: TrainingArguments, changes: dict[str, Any]) -> None:
        """Refuse label smoothing where a label is no class."""
        problem = changes["problem_type"]
        if args.label_smoothing_factor and problem != SINGLE:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} needs one class a row; "
                f"these labels make it a {problem.replace('_', ' ')}. Leave it at 0."
            )

    @classmethod
    def start_head(cls, model: Any, rows: Any) -> None:
        """Let a new head for several labels start from how common each label is.

        Labels are mostly absent. A head that starts at one half each first pushes all logits down
        alike, for which the fastest way is to make all texts alike: MiniLM on the 28 labels of
        GoEmotions never told them apart again. Log odds as first biases are those of Lin et al.
        2017, "Focal Loss for Dense Object Detection", section 3.3.
        """
        classes = model.config.num_labels
        biases = [
            model.get_parameter(name)
            for name in getattr(model, "new_weights", ())
            if name.endswith("bias") and model.get_parameter(name).shape == (classes,)
        ]
        if model.config.problem_type != MULTI or not biases:
            return
        labels = torch.tensor([row["labels"] for row in islice(rows, PRIOR_ROWS)])
        shares = (labels.sum(dim=0) + 0.5) / (len(labels) + 1)  # never 0 or 1
        with torch.no_grad():
            biases[-1].copy_(shares.logit())

    def count_items(self, batch: Batch) -> int:
        """Rows; for several labels rows times classes, as the mean of the loss is taken."""
        return batch["labels"].numel()

    def summed_loss(self, outputs: dict[str, Any], batch: Batch) -> Tensor:
        """Cross-entropy, binary cross-entropy or squared error, summed over the batch."""
        logits, labels = outputs["logits"].float(), batch["labels"]
        problem = self.model.config.problem_type
        if problem == REGRESSION:
            return F.mse_loss(logits.squeeze(-1), labels, reduction="sum")
        if problem == MULTI:
            return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        smoothing = self.args.label_smoothing_factor
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)

    def distance(self, outputs: Any, teacher: Any, batch: Batch, temperature: float) -> Tensor:
        """Divergence from the teacher's classes; squared error from its scores."""
        student, taught = outputs["logits"], teacher["logits"]
        problem = self.model.config.problem_type
        if problem == REGRESSION:
            return F.mse_loss(student.float(), taught.float(), reduction="sum")
        if problem == MULTI:
            return bernoulli_distance(student, taught, temperature)
        return kl_distance(student, taught, temperature)

    def metrics(self, rows: Dataset) -> ClassificationMetrics:
        """Accuracy and F1, or correlations, by the kind of problem."""
        config: Any = self.model.config
        return ClassificationMetrics(config.problem_type, config.num_labels)
