"""A learning rate to start from, found by a range test before the run (Smith 2017)."""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning.pytorch as L
import numpy as np
from transformers import TrainingArguments

from hflit.data import DataModule
from hflit.loop.memory import kept_weights
from hflit.loop.precision import set_precision
from hflit.tasks.module import TaskModule

logger = logging.getLogger(__name__)

LOWEST, HIGHEST = 1e-7, 1.0  # learning rates that are tried
UPDATES = 100
SMOOTHED = 0.9  # how much of each smoothed loss comes from the ones before
SETTLED = 10  # updates at the lowest rates, before which a smoothed loss is one of few batches
DIVERGED = 3.0  # times the lowest smoothed loss, where the test ends


def find_rate(module: TaskModule, data: DataModule, flags: dict[str, Any]) -> float:
    """A learning rate below the one at which the loss, while the rate rises, is lowest.

    Rates rise evenly on a logarithmic scale, one for each update. The weights end as they began.
    Lightning's own finder (2.6) looks for the steepest slope, and divides by differences of the
    rates themselves, which makes noise at the low end the steepest.

    Args:
        module: The task with its model.
        data: Set up.
        flags: Accelerator and precision of the run's Lightning Trainer.

    Returns:
        A tenth of one of the rates that were tried.

    Raises:
        ValueError: The loss never fell.
    """
    model = module.model.train()  # from_pretrained gives evaluation mode
    put_back = kept_weights(model)
    test = _RangeTest()
    try:
        trial_trainer(flags, module.args, UPDATES, test).fit(module, data)
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # of which Lightning 2.6 makes a 1
            raise KeyboardInterrupt from None
        raise
    finally:
        put_back()
    rate = below_lowest(test.rates, test.losses)
    told = "learning_rate=%.3g found, a tenth of where the loss was lowest, in place of %.3g."
    logger.warning(told, rate, module.args.learning_rate)
    return rate


def trial_trainer(
    flags: dict[str, Any], args: TrainingArguments, updates: int, callback: L.Callback
) -> L.Trainer:
    """A Lightning Trainer for some updates in one process, of which nothing stays.

    Args:
        flags: Accelerator and precision of the run's Lightning Trainer.
        args: The arguments of the run.
        updates: After which it ends.
        callback: Watches it.
    """
    own = {name: flags[name] for name in ("accelerator", "precision")}
    set_precision(own, args)
    return L.Trainer(
        **own,
        devices=1,
        max_steps=updates,
        callbacks=[callback],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def below_lowest(rates: list[float], losses: list[float]) -> float:
    """A tenth of the rate at which the smoothed loss was lowest, as fast.ai's rule has it.

    At the lowest loss the rate is about to be too high, and the steepest fall is close to that:
    an epoch of the demo's data reached an accuracy of 0.78 with the one, and 0.62 with the other.

    Args:
        rates: Rising.
        losses: Of the update with each rate.

    Raises:
        ValueError: The loss never fell.

    Example:
        >>> rates = [1e-7] * SETTLED + [1e-3, 1e-2, 1e-1, 1.0]
        >>> below_lowest(rates, [4.0] * SETTLED + [4.0, 4.0, 1.0, 5.0])
        0.01
    """
    means = smoothed(losses)[SETTLED:]
    lowest = int(np.argmin(means)) if means else 0
    if lowest == 0:
        raise ValueError(
            f"No learning rate was found: the loss never fell from {rates[0]:.2g} to "
            f"{rates[-1]:.2g}. Set learning_rate."
        )
    return rates[SETTLED + lowest] / 10


def smoothed(losses: list[float]) -> list[float]:
    """Means of each loss and those before it, which count less the older they are."""
    means, mean = [], 0.0
    for count, loss in enumerate(losses, 1):
        mean = SMOOTHED * mean + (1 - SMOOTHED) * loss
        means.append(mean / (1 - SMOOTHED**count))
    return means


class _RangeTest(L.Callback):
    """Sets the learning rate of each update, and ends the test when the loss explodes."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Raise the rate."""
        share = len(self.rates) / (UPDATES - 1)
        rate = math.exp(math.log(LOWEST) + share * math.log(HIGHEST / LOWEST))
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = rate
        self.rates.append(rate)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Keep the loss."""
        loss = float(sum(outputs["losses"]))
        means = smoothed([*self.losses, loss])
        if not math.isfinite(loss) or (len(means) > SETTLED and means[-1] > DIVERGED * min(means)):
            trainer.should_stop = True
            self.rates.pop()
        else:
            self.losses.append(loss)
