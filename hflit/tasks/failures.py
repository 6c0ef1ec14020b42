"""Updates that fail: what is said where numbers are not finite, or memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from hflit.data.batching import Batch
from hflit.ranks import everyones

NONFINITE = ("stop", "skip", "ignore")
SHOWN_ROWS = 32  # row numbers in an error


def place(rows: list[int] | None, batch: int, window: int) -> str:
    """A micro-batch in words.

    Args:
        rows: Numbers of its rows; None if they have none.
        batch: Its number in the window, from 0.
        window: Micro-batches in the window.
    """
    told = f"micro-batch {batch + 1} of {window}"
    if rows is None:
        return told
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return f"{told} (training inputs {', '.join(map(str, rows[:SHOWN_ROWS]))}{more})"


def nonfinite_problem(
    model: Any, norm: Tensor, losses: list[Tensor], where: Callable[[int], str], world: int
) -> str:
    """What is not finite in an update, and whose fault it is; the same in all processes.

    Args:
        model: Its weights are looked at too.
        norm: Of the gradient.
        losses: Of the micro-batches of this process, `(micro-batches,)` scalars.
        where: Number of a micro-batch -> the same in words.
        world: Number of processes; all of them take part.
    """
    name = broken_weight(model)
    broken = [f"the weight {name} was not finite before it"] if name else []
    wrong = [
        f"the loss of {where(index)} is {loss.item()}"
        for index, loss in enumerate(losses)
        if not torch.isfinite(loss)
    ]
    places = "; ".join(map(where, range(len(losses))))
    of_norm = [f"the norm of the gradient is {norm.item()}, of {places}"]
    # A process with good rows has the norm that another one's rows have made.
    told = zip(*everyones((broken, wrong, of_norm), world), strict=True)
    broken, wrong, of_norm = (list(chain.from_iterable(each)) for each in told)
    return "; ".join(dict.fromkeys(broken or wrong or of_norm))


def broken_weight(model: Any) -> str | None:
    """Name of the first weight with a value that is not finite."""
    parameters = model.named_parameters()
    return next((name for name, each in parameters if not torch.isfinite(each).all()), None)


@contextmanager
def explained(
    model: Any, args: Any, batch: Batch, where: Callable[[], str], update: int
) -> Iterator[None]:
    """Say for which batch memory did not suffice, and what to set; or that weights were broken.

    Args:
        model: Learns from the batch inside.
        args: Arguments of the run. `auto_find_batch_size` deals with a lack of memory, and sees
            what torch says.
        batch: The micro-batch.
        where: Says which one it is.
        update: Number of the update, from 1.

    Raises:
        MemoryError: In place of the many errors of torch.
        RuntimeError: In place of StopIteration.
        ValueError: Something failed, and weights were not finite.
    """
    try:
        yield
    except StopIteration:  # with which Lightning would end the epoch, and say nothing
        # Without it for a cause, which contextlib would raise in its place.
        raise RuntimeError(f"Update {update} ended in StopIteration at {where()}.") from None
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            if name := broken_weight(model):
                raise ValueError(
                    f"Update {update} is impossible: the weight {name} was not finite before it. "
                    "Lower learning_rate or max_grad_norm."
                ) from error
            raise
        if args.auto_find_batch_size:
            raise
        rows, longest = batch["input_ids"].shape
        tokens = int(batch["attention_mask"].sum())
        size = args.per_device_train_batch_size
        less = (
            f"lower per_device_train_batch_size={size} and raise gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps} as much, which changes no result; "
            if size > 1
            else ""
        )
        raise MemoryError(
            f"Update {update} is out of memory at {where()}: {rows} rows of up to {longest} "
            f"tokens, {tokens} in all and {rows * longest} with padding. What helps: {less}lower "
            "maxlength; activation_checkpointing=True; or auto_find_batch_size=True."
        ) from error
