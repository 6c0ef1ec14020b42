"""Dropout on a CPU: torch's, from random numbers drawn four at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from numpy.random import SFC64
from torch import Tensor

STEPS = 2**16  # a random number of 64 bits makes four of 16, so a probability is one of so many
BLOCK = 2**18  # weights of attention that are in the cache at a time


@contextmanager
def fast_dropout() -> Iterator[None]:
    """Let dropout, and attention with dropout, take less time on a CPU.

    torch draws one number for each element, 10 ns or so, in one thread, and with dropout it
    computes attention by holding all of its weights. Here one number is drawn for four elements,
    and the weights are computed in blocks, and once more in the backward. The distribution is the
    same, but that a probability is rounded to 1/65536; the draws are others.

    It stands in for torch's functions in the whole process, as a backward that runs forwards again,
    for checkpointed activations, has to meet it too.
    """
    own = F.dropout, F.scaled_dot_product_attention
    F.dropout = partial(_dropout, F.dropout)
    F.scaled_dot_product_attention = partial(_attention, F.scaled_dot_product_attention)
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention = own


def _dropout(
    own: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """`F.dropout`, which is `own`."""
    is_meant = training and not inplace and _is_meant(input, p)
    dropped: Tensor = _Dropout.apply(input, p) if is_meant else own(input, p, training, inplace)
    return dropped


def _attention(
    own: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """`F.scaled_dot_product_attention`, which is `own`: `(batch, heads, length, width)` of each."""
    each = (query, key, value)
    is_meant = (
        _is_meant(query, dropout_p)
        and all(x.dtype == torch.float32 and x.dim() == 4 for x in each)
        and all(x.shape[:2] == query.shape[:2] for x in each)
        and (attn_mask is None or attn_mask.dtype == torch.bool)
    )
    if not is_meant:
        plain: Tensor = own(*each, attn_mask, dropout_p, is_causal, **options)
        return plain
    if is_causal:
        attn_mask = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    scale = options.get("scale")
    query = query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    read: Tensor = _Attention.apply(query, key, value, attn_mask, dropout_p, _seed())
    return read


def _is_meant(input: Tensor, p: float) -> bool:
    is_plain = type(input) is Tensor and input.device.type == "cpu"  # no shard, nothing traced
    return is_plain and input.is_floating_point() and 0 < round(p * STEPS) < STEPS


def _kept(shape: torch.Size, p: float, random: SFC64) -> Tensor:
    """1 where an element stays and 0 where it goes, int16."""
    numbers = torch.from_numpy(random.random_raw(-(-shape.numel() // 4)))
    least = round(p * STEPS) - STEPS // 2  # of those that stay
    kept = numbers.view(torch.int16)[: shape.numel()].view(shape)
    return kept.clamp_(least - 1, least).sub_(least - 1)


def _seed() -> int:
    return int(torch.randint(2**63 - 1, ()))


def _gain(p: float) -> float:
    """What makes up for the elements that go."""
    return STEPS / (STEPS - round(p * STEPS))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, p: float) -> Tensor:
        kept, ctx.p = _kept(input.shape, p, SFC64(_seed())), p
        ctx.save_for_backward(kept)
        return (input * kept).mul_(_gain(p))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        return gradient * kept * _gain(ctx.p), None


class _Attention(torch.autograd.Function):
    """Attention whose weights, queries by keys, are in memory a block at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        p: float,
        seed: int,
    ) -> Tensor:
        query, key, value = (each.contiguous() for each in (query, key, value))
        bias, blind = (None, None) if mask is None else _bias(mask, query)
        read = torch.empty(*query.shape[:-1], value.shape[-1])
        random = SFC64(seed)
        for block in _blocks(query, key):
            weights = _weights(query, key, bias, block)
            weights *= _kept(weights.shape, p, random)
            read[block] = weights @ value[block]
        read *= _gain(p)
        if blind is not None:
            read.masked_fill_(blind, 0)
        ctx.save_for_backward(query, key, value, bias, blind, read)
        ctx.p, ctx.seed = p, seed
        return read

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, bias, blind, read = ctx.saved_tensors
        if blind is not None:
            gradient = gradient.masked_fill(blind, 0)
        mean = (gradient * read).sum(dim=-1, keepdim=True)  # of the weights' gradients
        gradient = gradient * _gain(ctx.p)
        of_query, of_key, of_value = (torch.empty_like(each) for each in (query, key, value))
        random = SFC64(ctx.seed)
        for block in _blocks(query, key):
            weights = _weights(query, key, bias, block)
            kept = _kept(weights.shape, ctx.p, random)
            of_scores = gradient[block] @ value[block].mT
            of_scores.mul_(kept).sub_(mean[block]).mul_(weights)
            of_query[block] = of_scores @ key[block]
            # Transposed, as MKL takes a third longer for the transpose of the larger factor.
            of_key[block] = (query[block].mT @ of_scores).mT
            of_value[block] = (gradient[block].mT @ weights.mul_(kept)).mT
        return of_query, of_key, of_value, None, None, None


def _bias(mask: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """What masks scores when added; and the queries that see nothing, which read zeros."""
    blind = ~mask.any(dim=-1, keepdim=True)
    bias = torch.zeros(mask.shape).masked_fill_(~(mask | blind), -torch.inf)
    return bias.expand(*query.shape[:2], -1, -1), blind


def _blocks(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and heads at a time: whole rows, or some heads of one."""
    size = query.shape[-2] * key.shape[-2]
    heads = query.shape[1]
    rows_at_once = max(BLOCK // (size * heads), 1)
    heads_at_once = min(max(BLOCK // size, 1), heads)
    for row in range(0, len(query), rows_at_once):
        for head in range(0, heads, heads_at_once):
            yield slice(row, row + rows_at_once), slice(head, head + heads_at_once)


def _weights(query: Tensor, key: Tensor, bias: Tensor | None, block: tuple[slice, slice]) -> Tensor:
    scores = query[block] @ key[block].mT
    if bias is not None:
        scores += bias[block]
    return torch.softmax(scores, dim=-1)
