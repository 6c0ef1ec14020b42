"""Layers that compute what torch's and transformers' own do, in less time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hflit.tasks.forwards import forwards_replaced
from hflit.tasks.last_layer import first_token_only

# Below so many multiplications, or rows, a call of oneDNN takes longer than it saves.
FEWEST = 2**23
FEWEST_ROWS = 64
# oneDNN writes code for each number of rows that it meets, milliseconds and megabytes each, and
# keeps it for good. So it meets few of them: rows in blocks, the last filled up to a multiple.
BLOCK = 512
MULTIPLE = 32


@contextmanager
def fast_layers(model: nn.Module) -> Iterator[None]:
    """Let a model give the same logits in less time: `fast_products` and `first_token_only`."""
    with fast_products(model), first_token_only(model):
        yield


def mkl_is_slow() -> bool:
    """Whether torch multiplies matrices at half of what this processor can.

    On a CPU torch does so in MKL, which uses AVX-512 on Intel's processors only; oneDNN, which
    torch has too, uses it on all. On AMD's Zen 5, whose units are that wide, it is 2 to 2.4 times
    as fast. On Zen 4, which computes 512 bits in two halves, a product takes about as long in both.
    """
    about: Any = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch have none
    return (
        str(about.get("cpu_name", "")).startswith("AMD")
        and bool(about.get("avx512_vp2intersect"))  # which no processor of AMD's had before Zen 5
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def fast_products(model: nn.Module) -> AbstractContextManager[None]:
    """Let the linear layers of a model compute as `linear` does, forward and backward.

    Args:
        model: Its `nn.Linear`s, and GPT-2's `Conv1D`s, are meant; kinds made from these are not.
    """
    own: dict[type[nn.Module], Any] = {nn.Linear: _linear_layer, Conv1D: _conv1d_layer}
    layers = model.modules() if mkl_is_slow() else []
    return forwards_replaced(
        {
            each: partial(own[type(each)], each)
            for each in layers
            if type(each) in own and "forward" not in vars(each)
        }
    )


def is_replaced(layer: nn.Linear) -> bool:
    """Whether somebody else has given a layer another forward."""
    forward = vars(layer).get("forward")
    return forward is not None and getattr(forward, "func", None) is not _linear_layer


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, in oneDNN where that is faster: rounded as float32, in another order of sums.

    Args:
        rows: `(..., in)`.
        weight: `(out, in)`.
        bias: `(out,)`.
    """
    if not _gains(rows, weight):
        return F.linear(rows, weight, bias)
    product: Tensor = _Linear.apply(rows, weight, bias)
    return product


def _linear_layer(layer: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, layer.weight, layer.bias)


def _conv1d_layer(layer: Any, x: Tensor) -> Tensor:
    weight = layer.weight.t()
    if _gains(x, weight):
        product: Tensor = _Linear.apply(x, weight, layer.bias)
    else:
        product = Conv1D.forward(layer, x)
    return product


def _gains(rows: Tensor, weight: Tensor) -> bool:
    """Whether a product is of the kind and size that oneDNN makes faster."""
    return (
        all(type(each) in (Tensor, nn.Parameter) for each in (rows, weight))  # no shards
        and rows.dtype == weight.dtype == torch.float32
        and rows.device.type == weight.device.type == "cpu"
        and rows.numel() >= FEWEST_ROWS * weight.shape[1]
        and rows.numel() * weight.shape[0] >= FEWEST
        and (weight.is_contiguous() or weight.t().is_contiguous())  # gaps make oneDNN slow
        and torch.get_float32_matmul_precision() == "highest"
        and not torch.is_autocast_enabled("cpu")
        and mkl_is_slow()
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = rows.contiguous()  # once, not for each of the products with it
        ctx.save_for_backward(rows, weight)
        return _times(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_rows = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_rows = _times(gradient, weight.t())
        gradient = gradient.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            of_weight = _times_transposed(gradient, rows.flatten(0, -2))
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(dim=0)
        return of_rows, of_weight, of_bias


def _times(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.t() + bias`: `(..., in)` and `(out, in)` -> `(..., out)`."""
    if torch.is_grad_enabled():  # a gradient of a gradient, which oneDNN's product has none for
        return F.linear(rows, weight, bias)
    flat = rows.flatten(0, -2)
    blocks = [_in_onednn(_filled(block), weight, bias)[: len(block)] for block in flat.split(BLOCK)]
    product = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return product.unflatten(0, rows.shape[:-1])


def _times_transposed(left: Tensor, right: Tensor) -> Tensor:
    """`left.t() @ right`: `(rows, out)` and `(rows, in)` -> `(out, in)`."""
    if torch.is_grad_enabled():
        return left.t() @ right
    product: Tensor | None = None
    for ours, theirs in zip(left.split(BLOCK), right.split(BLOCK), strict=True):
        block = _in_onednn(_filled(ours).t(), _filled(theirs).t())
        product = block if product is None else product.add_(block)
    assert product is not None
    return product


def _filled(rows: Tensor) -> Tensor:
    """With rows of zeros up to a multiple."""
    missing = -len(rows) % MULTIPLE
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _in_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def gradients_by_row(model: nn.Module) -> AbstractContextManager[None]:
    """Add to the gradient of a table only at the rows that were looked up.

    torch makes a gradient as large as the table for each forward and adds it to the last one: for
    MiniLM on a CPU that takes as long as 40 tokens. Tables that do more than look up keep to it.

    Args:
        model: Trains in one process; other processes would not see such a gradient come.
    """
    return forwards_replaced(
        {
            each: partial(_look_up, each)
            for each in model.modules()
            if type(each) is nn.Embedding
            and each.weight.requires_grad
            and each.max_norm is None
            and not (each.sparse or each.scale_grad_by_freq or each.weight._backward_hooks)
        }
    )


def _look_up(table: nn.Embedding, input: Tensor) -> Tensor:
    found: Tensor = _LookUp.apply(table.weight, input, table.padding_idx)
    return found


class _LookUp(torch.autograd.Function):
    """`F.embedding` whose backward writes into the gradient that is there."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        ctx.weight, ctx.ids, ctx.padding_idx = weight, ids, padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weight, ids = ctx.weight, ctx.ids.flatten()
        rows = gradient.reshape(len(ids), -1).to(weight.dtype)
        if ctx.padding_idx is not None:
            rows = rows.masked_fill((ids == ctx.padding_idx)[:, None], 0)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids, rows)
        return None, None, None
