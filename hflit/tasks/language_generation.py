"""language-generation: predict the next token of a text."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM

from hflit.adapters import inner_model
from hflit.data.batching import Batch
from hflit.data.texts import Texts
from hflit.loading import Base, text_config
from hflit.metrics.tokens import TokenMetrics
from hflit.tasks.module import TaskModule
from hflit.tasks.parts import blind_to_neighbours, differ


class LanguageGeneration(TaskModule):
    """Trains a causal language model: each token is predicted from those before it.

    Batch:
        input_ids: `(batch, seq)`.
        attention_mask: `(batch, seq)`, 1 for tokens and 0 for padding.
        labels: `(batch, seq)`, the tokens themselves; -100 in padding. The model compares them
            with its prediction one place earlier.
        documents, position_ids: `(batch, seq)`, for packed rows: which text a token belongs to,
            and where in it.
    """

    auto_model = AutoModelForCausalLM
    figures = TokenMetrics.figures
    lora_type = "CAUSAL_LM"
    tokenization = Texts
    predicts_next = True
    chunks_loss = True

    @classmethod
    def load(cls, base: Base, changes: dict[str, Any]) -> Any:
        """A model in which a token sees none that comes after it."""
        model = super().load(base, changes)
        if model.device.type != "meta" and not _is_causal(model):  # `hflit check` loads no weights
            raise ValueError(
                f"{type(model).__name__} lets a token see those that come after it, which it is to "
                "predict. Give a decoder; of an encoder that can be one, load it with "
                "is_decoder=True and give base=(model, tokenizer). Or use task='language-modeling'."
            )
        return model

    def prepare(self, batch: Batch, model: Any) -> Batch:
        """Keep the texts of a packed row from seeing each other."""
        return blind_to_neighbours(batch, model, causal=True)

    def summed_loss(self, outputs: dict[str, Any], batch: Batch) -> Tensor:
        """Cross-entropy in nats, summed over the predicted tokens."""
        loss = super().summed_loss(outputs, batch)
        uneven = outputs.get("aux_loss")  # of a mixture of experts, if output_router_logits asks
        if uneven is None:
            return loss
        config: Any = inner_model(self.model).config
        return loss + config.router_aux_loss_coef * uneven * self.count_items(batch)

    def metrics(self, rows: Dataset) -> TokenMetrics:
        """Perplexity and token accuracy."""
        return TokenMetrics(self.predicts_next)


@torch.no_grad()
def _is_causal(model: Any) -> bool:
    """Whether the last token of a row leaves the logits before it as they are."""
    words = text_config(model.config).vocab_size
    ids = torch.tensor([[2, 3, 4, 5], [2, 3, 4, 6]], device=model.device) % words
    was_training = model.training
    one, other = model.eval()(input_ids=ids).logits[:, :-1]
    model.train(was_training)
    return not differ(one, other)
