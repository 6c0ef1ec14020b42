"""The last layer of a text classifier, computed for the one token that its head reads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    CamembertForSequenceClassification,
    DistilBertForSequenceClassification,
    ElectraForSequenceClassification,
    RobertaForSequenceClassification,
    XLMRobertaForSequenceClassification,
)

from hflit.adapters import inner_model
from hflit.tasks.layers import forwards_replaced

# Classifiers that read the first token alone, and names of the projections in their attention.
QUERY_KEY_VALUE = dict.fromkeys(
    (
        BertForSequenceClassification,
        CamembertForSequenceClassification,
        ElectraForSequenceClassification,
        RobertaForSequenceClassification,
        XLMRobertaForSequenceClassification,
    ),
    ("query", "key", "value"),
)
QUERY_KEY_VALUE[DistilBertForSequenceClassification] = ("q_lin", "k_lin", "v_lin")


def first_token_only(model: nn.Module) -> AbstractContextManager[None]:
    """Let the last layer of a classifier compute the first token alone, if its head reads no more.

    The other tokens of that layer still serve as keys and values; their queries and all that
    follows reach neither the logits nor a gradient. For MiniLM that is a seventh of all the work.

    Args:
        model: A model of `QUERY_KEY_VALUE`, or one in a `PeftModel`. Others, and those that show
            their hidden states or attentions, compute what they did.
    """
    model = inner_model(model)
    config: Any = getattr(model, "config", None)
    if (
        type(model) not in QUERY_KEY_VALUE
        or config.num_hidden_layers == 0
        or config._attn_implementation != "sdpa"
        or config.output_hidden_states
        or config.output_attentions
        or getattr(config, "is_decoder", False)
        or config.chunk_size_feed_forward  # needs as many tokens as a chunk has
    ):
        return nullcontext()
    body: Any = model.base_model
    last = (body.encoder if hasattr(body, "encoder") else body.transformer).layer[-1]
    if "forward" in vars(last):  # already done, or somebody else's
        return nullcontext()
    attention = getattr(last.attention, "self", last.attention)
    attend = partial(_attend, attention, QUERY_KEY_VALUE[type(model)])
    return forwards_replaced({last: partial(_last_layer, last, last.forward, attention, attend)})


def _last_layer(
    layer: Any,
    forward: Callable[..., Tensor],
    attention: nn.Module,
    attend: Callable[..., Any],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *others: Any,
    **options: Any,
) -> Tensor:
    """`(batch, seq, hidden)` -> `(batch, 1, hidden)`."""
    # A checkpointed layer runs once more in the backward, its attention as it is then; and a
    # learned prefix has keys and values of its own.
    has_prefix = options.get("past_key_values") is not None
    if has_prefix or (layer.gradient_checkpointing and layer.training):
        return forward(hidden_states, attention_mask, *others, **options)
    if attention_mask is not None:
        attention_mask = attention_mask[:, :, :1]  # (batch, heads or 1, 1, seq)
    with forwards_replaced({attention: partial(attend, hidden_states)}):
        return forward(hidden_states[:, :1], attention_mask, *others, **options)


def _attend(
    attention: Any,
    names: tuple[str, str, str],
    tokens: Tensor,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of the first token to all, as transformers' layers do it for each.

    Args:
        attention: Holds the projections.
        names: Of query, key and value.
        tokens: What the layer was given, `(batch, seq, hidden)`.
        hidden_states: Its first token, `(batch, 1, hidden)`.
        attention_mask: `(batch, heads or 1, 1, seq)`, True at tokens.

    Returns:
        `(batch, 1, hidden)`, and no weights.
    """
    query, key, value = (
        getattr(attention, name)(states)
        .unflatten(-1, (-1, attention.attention_head_size))
        .transpose(1, 2)
        for name, states in zip(names, (hidden_states, tokens, tokens), strict=True)
    )
    read = F.scaled_dot_product_attention(
        query, key, value, attention_mask,
        dropout_p=attention.dropout.p if attention.training else 0.0, scale=attention.scaling,
    ).transpose(1, 2).flatten(2)  # fmt: skip
    return (attention.out_lin(read) if hasattr(attention, "out_lin") else read), None
