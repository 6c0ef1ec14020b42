"""language-modeling: guess the masked tokens of a text."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import AutoModelForMaskedLM

from hflit.adapters import inner_model
from hflit.data.batching import IGNORE_INDEX, Batch
from hflit.data.texts import Texts
from hflit.metrics.tokens import TokenMetrics
from hflit.tasks.module import TaskModule
from hflit.tasks.parts import blind_to_neighbours, logits_only_at


class LanguageModeling(TaskModule):
    """Trains a masked language model on 15 % of the tokens.

    Of these, 80 % are replaced by the mask token, 10 % by another token and 10 % left as they are
    (Devlin et al. 2019); with `whole_word` all are replaced.

    Batch:
        input_ids: `(batch, seq)`, some of them masked.
        attention_mask: `(batch, seq)`, 1 for tokens and 0 for padding.
        labels: `(batch, seq)`, the tokens that were masked; -100 elsewhere.
        documents, position_ids: `(batch, seq)`, for packed rows: which text a token belongs to,
            and where in it.
    """

    auto_model = AutoModelForMaskedLM
    figures = TokenMetrics.figures
    lora_type = "FEATURE_EXTRACTION"
    tokenization = Texts
    tokenization_settings = {"masked": True}

    def prepare(self, batch: Batch, model: Any) -> Batch:
        """Keep the texts of a packed row from seeing each other."""
        return blind_to_neighbours(batch, model, causal=False)

    def run_model(self, model: Any, batch: Batch) -> dict[str, Any]:
        """Outputs of the model or of its teacher; in training the logits of masked tokens only."""
        if not self.model.training or self.args.torch_compile:  # a hook would compile anew
            return super().run_model(model, batch)
        with logits_only_at(batch["labels"] != IGNORE_INDEX, inner_model(model)):
            return super().run_model(model, batch)

    def metrics(self, rows: Dataset) -> TokenMetrics:
        """Perplexity and accuracy of the masked tokens."""
        return TokenMetrics(self.predicts_next)
