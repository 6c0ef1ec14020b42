"""What the processes of a run tell each other. A leaf: imports no other room.

Every function is called by all processes at the same point of the run, and does nothing in a run
of one. `world` is the number of processes of the run, not of torch's process group, which may be
left over from an earlier run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import Any, TypeVar, cast

import lightning.pytorch as L
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

Value = TypeVar("Value")
ABSENT = object()


def total(values: Tensor, world: int) -> Tensor:
    """Sum of the tensors of all processes."""
    if world == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


def everyones(value: Value, world: int) -> list[Value]:
    """What each process holds, by rank; anything that can be pickled, without CUDA tensors."""
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, value)
    return found


def from_first(value: Value, world: int) -> Value:
    """What process 0 holds; the others' values are not looked at."""
    if world == 1:
        return value
    found = [value]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def dealt_back(hands: Sequence[Sequence[Value]]) -> list[Value]:
    """Batches in their order again, of which batch i went to process i % world.

    Example:
        >>> dealt_back([["a", "c", "e"], ["b", "d"]])
        ['a', 'b', 'c', 'd', 'e']
    """
    rounds = chain.from_iterable(zip_longest(*hands, fillvalue=ABSENT))
    return [cast(Value, each) for each in rounds if each is not ABSENT]


@contextmanager
def gradient_sync(module: L.LightningModule, is_last: bool) -> Iterator[None]:
    """Forward and backward of one part of a window; the last part brings the gradients together.

    Processes may cut their rows into different numbers of parts: but for the last part none of
    them waits for another. Sharded weights are gathered by the first part and kept for the others.

    Args:
        module: Its `model` is trained.
        is_last: Whether this is the last part of the window.
    """
    model: Any = module.model
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
        model.set_is_last_backward(is_last)
        model.set_reshard_after_backward(is_last)
        yield
    elif not is_last and isinstance(module.trainer.strategy, DDPStrategy):
        with module.trainer.strategy.block_backward_sync():
            yield
    else:
        yield
