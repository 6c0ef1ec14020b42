"""The last layer of an encoder, computed for the tokens that its head reads."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from hflit.adapters import inner_model
from hflit.tasks.forwards import forwards_replaced

KINDS = ("Bert", "Camembert", "DistilBert", "Electra", "Roberta", "XLMRoberta")
READ_THE_FIRST_TOKEN = tuple(
    getattr(transformers, f"{kind}ForSequenceClassification") for kind in KINDS
)
READ_EACH_TOKEN = tuple(getattr(transformers, f"{kind}ForMaskedLM") for kind in KINDS)  # for itself


def first_token_only(model: nn.Module) -> AbstractContextManager[None]:
    """Let the last layer of a classifier compute the first token alone, if its head reads no more.

    The other tokens of that layer still serve as keys and values; their queries and all that
    follows reach neither the logits nor a gradient. For MiniLM that is a seventh of all the work.

    Args:
        model: One of `READ_THE_FIRST_TOKEN`, or one in a `PeftModel`. Others, and those that show
            their hidden states or attentions, compute what they did.
    """
    last = _last_layer(model, READ_THE_FIRST_TOKEN)
    return nullcontext() if last is None else _narrowed(last, None)


def chosen_tokens_only(
    chosen: Tensor, model: nn.Module
) -> tuple[AbstractContextManager[None], Tensor]:
    """Let the last layer of a masked language model compute the tokens whose logits are wanted.

    Args:
        chosen: True at those tokens, `(batch, seq)`.
        model: One of `READ_EACH_TOKEN`, or one in a `PeftModel`; others compute all tokens.

    Returns:
        What to run the model in, and where the chosen tokens then are in what its head is given,
        `(batch, tokens)`. They come in their order.
    """
    last = _last_layer(model, READ_EACH_TOKEN)
    if last is None:
        return nullcontext(), chosen
    counts = chosen.sum(dim=1)
    most = max(int(counts.max()), 1)
    places = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    kept = torch.arange(most, device=chosen.device) < counts[:, None]
    return _narrowed(last, places), kept


def _last_layer(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Any:
    """The last layer of a model, if it is of these kinds and nobody looks at the layer."""
    model = inner_model(model)
    config: Any = getattr(model, "config", None)
    if (
        type(model) not in kinds
        or config.num_hidden_layers == 0
        or config._attn_implementation != "sdpa"
        or config.output_hidden_states
        or config.output_attentions
        or getattr(config, "is_decoder", False)
        or config.chunk_size_feed_forward  # needs as many tokens as a chunk has
    ):
        return None
    body: Any = model.base_model
    last = (body.encoder if hasattr(body, "encoder") else body.transformer).layer[-1]
    return None if "forward" in vars(last) else last  # already done, or somebody else's


def _narrowed(layer: Any, places: Tensor | None) -> AbstractContextManager[None]:
    """Let a layer compute the tokens at some places, `(batch, tokens)`; the first for None."""
    attention = getattr(layer.attention, "self", layer.attention)
    return forwards_replaced({layer: partial(_forward, layer, attention, places)})


def _forward(
    layer: Any,
    attention: nn.Module,
    places: Tensor | None,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *others: Any,
    **options: Any,
) -> Tensor:
    """`(batch, seq, hidden)` -> `(batch, tokens, hidden)`."""
    if places is None:
        places = hidden_states.new_zeros((len(hidden_states), 1), dtype=torch.long)
    at = places[:, :, None]
    if options.get("past_key_values") is not None:  # a learned prefix has keys of its own
        all_tokens = type(layer).forward(layer, hidden_states, attention_mask, *others, **options)
        return torch.take_along_dim(all_tokens, at, dim=1)
    if attention_mask is not None:  # (batch, heads or 1, seq, seq)
        attention_mask = torch.take_along_dim(attention_mask, places[:, None, :, None], dim=2)
    unchecked = inspect.unwrap(type(layer).forward)  # transformers wraps it to checkpoint it

    def narrow(tokens: Tensor) -> Any:
        chosen = torch.take_along_dim(tokens, at, dim=1)
        with forwards_replaced({attention: partial(_attend, attention, tokens)}):
            return unchecked(layer, chosen, attention_mask, *others, **options)

    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(narrow, hidden_states)
    return narrow(hidden_states)


def _attend(
    attention: Any,
    tokens: Tensor,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of some tokens to all, as transformers' layers do it for each.

    Args:
        attention: Holds the projections.
        tokens: What the layer was given, `(batch, seq, hidden)`.
        hidden_states: Those of them that ask, `(batch, tokens, hidden)`.
        attention_mask: `(batch, heads or 1, tokens, seq)`, True where they see.

    Returns:
        `(batch, tokens, hidden)`, and no weights.
    """
    is_distilbert = hasattr(attention, "q_lin")
    names = ("q_lin", "k_lin", "v_lin") if is_distilbert else ("query", "key", "value")
    query, key, value = (
        getattr(attention, name)(states)
        .unflatten(-1, (-1, attention.attention_head_size))
        .transpose(1, 2)
        for name, states in zip(names, (hidden_states, tokens, tokens), strict=True)
    )
    dropout = attention.dropout.p if attention.training else 0.0
    read = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout_p=dropout, scale=attention.scaling
    )
    read = read.transpose(1, 2).flatten(2)
    return (attention.out_lin(read) if is_distilbert else read), None
