"""The loss over a large vocabulary without its logits: a chunk of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hflit.adapters import inner_model
from hflit.data.batching import IGNORE_INDEX, Batch
from hflit.loading import text_config
from hflit.tasks.distillation import kl_distance
from hflit.tasks.forwards import forwards_replaced
from hflit.tasks.layers import MULTIPLE, is_replaced, linear
from hflit.tasks.parts import token_loss

if TYPE_CHECKING:
    from hflit.tasks.module import TaskModule

# Logits held at a time: 32 MiB, which is large enough for a processor to be at its best, and 256
# MiB on an accelerator, which was never run.
CHUNK = {"cpu": 2**23}
CHUNK_ELSEWHERE = 2**26


@dataclass
class LeftOut:
    """What a model would have given its output layer.

    Attributes:
        head: The output layer.
        hidden: What it would have read, `(batch, seq, width)`.
        stand_in: What the model was given in place of logits; takes no memory.
    """

    head: nn.Linear
    hidden: Tensor = torch.empty(0)
    stand_in: Tensor = torch.empty(0)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of some tokens."""
        return linear(hidden, self.head.weight, self.head.bias)


@contextmanager
def head_left_out(model: Any) -> Iterator[LeftOut]:
    """Run a model up to its output layer, an `nn.Linear`."""
    left = LeftOut(inner_model(model).get_output_embeddings())

    def forward(hidden: Tensor) -> Tensor:
        left.hidden = hidden
        left.stand_in = hidden.new_zeros(()).expand(*hidden.shape[:-1], left.head.out_features)
        return left.stand_in

    with forwards_replaced({left.head: forward}):
        yield left


def ends_with_head(model: Any, run: Callable[[], Any]) -> bool:
    """Whether a model returns what its output layer gives, neither scaled nor capped.

    Args:
        model: A transformers model, with an adapter or not.
        run: Runs it on some batch.
    """
    head = inner_model(model).get_output_embeddings()
    # Other kinds, and those that accelerate has hooked itself into, are not called as they are.
    if type(head) is not nn.Linear or is_replaced(head):
        return False
    with head_left_out(model) as left:
        return run()["logits"] is left.stand_in


def heads_left_out(task: TaskModule) -> bool:
    """Whether a task's loss is computed without all its logits, see `chunked_loss`."""
    if not task.chunks_loss or task.args.torch_compile or isinstance(task.model, FSDPModule):
        return False
    kind = type(task)
    chunked = next(each for each in kind.__mro__ if "chunks_loss" in vars(each))
    if any(getattr(kind, of) is not getattr(chunked, of) for of in ("summed_loss", "distance")):
        return False  # a class built on the task, with a loss of its own
    if getattr(inner_model(task.model).config, "output_router_logits", False):
        return False  # with a loss of its own for its experts
    config = text_config(inner_model(task.model).config)
    is_padding = config.pad_token_id == 0  # a row of it has no last token
    row = torch.full((1, 2), int(is_padding), device=task.device)
    batch = {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}
    teachers = [] if task.distillation is None else [task.distillation.teacher]
    task.model.eval()  # draws no random numbers
    with torch.no_grad():
        plain = all(
            ends_with_head(each, partial(task.run_model, each, batch))
            for each in (task.model, *teachers)
        )
    task.model.train()
    return plain


def summed_by_chunks(task: TaskModule, batch: Batch) -> Tensor:
    """A task's loss, blended with the distance to a teacher, summed over tokens with a label."""
    labels = batch["labels"][:, task.labelled]
    learned = labels != IGNORE_INDEX
    labels = labels[learned]
    with head_left_out(task.model) as student:
        task(batch)
    smoothing, school = task.args.label_smoothing_factor, task.distillation
    if school is not None:
        with torch.no_grad(), head_left_out(school.teacher) as teacher:
            task.run_model(school.teacher, batch)
        taught = teacher.hidden[:, task.compared][learned]  # (tokens, width)

    def loss_of(logits: Tensor, part: slice) -> Tensor:
        loss = token_loss(logits, labels[part], smoothing)
        if school is None:
            return loss
        with torch.no_grad():
            guesses = teacher.logits(taught[part])
        distance = kl_distance(logits, guesses, school.temperature)
        return (1 - school.alpha) * loss + school.alpha * distance

    with task.forward_autocast():
        return chunked_loss(student.hidden[:, task.compared][learned], student.head, loss_of)


def chunked_loss(
    hidden: Tensor, head: nn.Linear, loss_of: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """A loss summed over tokens, whose logits are there for one chunk of tokens at a time.

    The gradient is computed along with the loss, so no logits are computed twice.

    Args:
        hidden: `(tokens, width)`.
        head: Makes logits of them.
        loss_of: Logits of some tokens, `(chunk, vocab)`, and which tokens these are -> their
            summed loss.
    """
    logits = CHUNK.get(hidden.device.type, CHUNK_ELSEWHERE)
    size = max(1, logits // head.out_features)
    if size > MULTIPLE:
        size -= size % MULTIPLE  # so that oneDNN is given no rows of zeros
    total: Tensor = _Chunked.apply(hidden, head.weight, head.bias, loss_of, size)
    return total


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss_of: Callable[[Tensor, slice], Tensor],
        size: int,
    ) -> Tensor:
        # Summed in float32, whatever the weights are held in.
        gradients = [
            torch.zeros_like(each, dtype=torch.float32) if needed and each is not None else None
            for each, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        of_hidden, of_weight, of_bias = gradients
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = linear(hidden[part], weight, bias).requires_grad_()  # (chunk, vocab)
            with torch.enable_grad():
                loss = loss_of(logits, part)
            total += loss.detach()
            if not any(ctx.needs_input_grad):
                continue
            (gradient,) = torch.autograd.grad(loss, logits)
            del logits, loss
            if of_hidden is not None:
                of_hidden[part] = linear(gradient, weight.to(gradient.dtype).T)
            if of_weight is not None:
                inputs = hidden[part].to(gradient.dtype)
                if gradient.dtype == torch.float32:
                    of_weight.addmm_(gradient.T, inputs)
                else:
                    of_weight += gradient.T @ inputs
            if of_bias is not None:
                of_bias += gradient.sum(dim=0)
        ctx.gradients = gradients
        ctx.dtypes = [None if each is None else each.dtype for each in (hidden, weight, bias)]
        return total

    @staticmethod
    def backward(ctx: Any, share: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if each is None else each.mul_(share).to(dtype)
            for each, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)
