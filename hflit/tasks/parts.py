"""What tasks share in preparing batches for their models."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from hflit.data.batching import Batch


def blind_to_neighbours(batch: Batch, model: nn.Module, causal: bool) -> Batch:
    """Give packed rows the positions and the attention of texts that run alone.

    Positions count from each text's start, and attention is block-diagonal: a token sees the
    tokens of its own text, for causal models those before it. A batch without packed rows stays
    as it is.

    Args:
        batch: Holds `documents` and `position_ids` if its rows are packed.
        model: Must take `position_ids`.
        causal: Whether a token may not see what comes after it.

    Raises:
        ValueError: The model has no `position_ids`, so it cannot tell where a text starts.
    """
    if "documents" not in batch:
        return batch
    batch = dict(batch)
    documents = batch.pop("documents")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"merge='pack' restarts positions at each text, and {type(model).__name__} takes no "
            "position_ids. Use merge='concat' or merge=None."
        )
    batch["position_ids"] = batch["position_ids"] + first_position(model)
    config: Any = model.config
    if config._attn_implementation.startswith("flash"):
        # These kernels find the texts by their positions. Never run: no GPU was at hand.
        del batch["attention_mask"]
        return batch
    allowed = documents[:, :, None] == documents[:, None, :]  # (batch, seq, seq); padding alone
    if causal:
        allowed = allowed.tril()
    allowed = allowed[:, None]  # one for all heads: (batch, 1, seq, seq)
    if config._attn_implementation == "eager":  # adds the mask to its scores
        dtype = next(model.parameters()).dtype
        lowest = torch.finfo(dtype).min
        batch["attention_mask"] = (
            torch.zeros(allowed.shape, dtype=dtype).to(allowed.device).masked_fill(~allowed, lowest)
        )
    else:
        batch["attention_mask"] = allowed
    return batch


def first_position(model: nn.Module) -> int:
    """Position id of a text's first token: 0, but `padding_idx + 1` for RoBERTa and its kin."""
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and "position" in name.rsplit(".", 1)[-1]
        if is_table and module.padding_idx is not None:
            return int(module.padding_idx) + 1
    return 0
