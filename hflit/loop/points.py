"""Where in its data a run stands, and the checkpoints it leaves there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hflit.loop.checkpoints import Checkpoints, random_states
from hflit.loop.folders import one_writes
from hflit.loop.resume import OWN
from hflit.loop.sums import RunningSums
from hflit.tasks.failures import broken_weight
from hflit.tasks.module import TaskModule

logger = logging.getLogger(__name__)


class SavePoints:
    """Knows what a checkpoint must hold for the run to go on as if it had never stopped.

    Args:
        args: When checkpoints are wanted.
        module: The task that trains.
        checkpoints: Writes them.

    Attributes:
        place: Epoch, and windows of it that have been trained on.
        epoch_is_open: Whether the end of the last epoch is still to be told of.
        is_whole: Whether the weights are those of a whole update.
        is_broken: Whether they may be between two.
        update: What the last one gave.
        saved: The last update that was saved.
        is_over: Whether training has ended: what fails now must not lose its result.
    """

    is_over = False

    def __init__(
        self, args: TrainingArguments, module: TaskModule, checkpoints: Checkpoints
    ) -> None:
        self.args = args
        self.module = module
        self.checkpoints = checkpoints
        self.place = (0, 0)
        self.epoch_is_open = self.is_whole = self.is_broken = False
        self.update: dict[str, Any] = {}
        self.saved = self.tried = 0
        self.settled: tuple[dict[str, Any], bool] | None = None

    @property
    def are_wanted(self) -> bool:
        """Whether a run that ends early is to leave a checkpoint."""
        args = self.args
        return args.save_strategy != SaveStrategy.NO or args.enable_jit_checkpoint

    def stand(self, epoch: int, window: int, ends_epoch: bool, ends_run: bool) -> None:
        """Note that a window has been trained on, and all that belongs to its update is done."""
        # Saved before the end of its epoch is told of; whoever goes on makes up for that. An epoch
        # that the run cuts short ends too, but is gone on with by a run of more updates.
        self.epoch_is_open = ends_epoch or ends_run
        self.place = (epoch + 1, 0) if ends_epoch else (epoch, window + 1)
        self.is_whole, self.is_broken, self.settled = True, False, None

    def settle(self) -> None:
        """Note the random numbers of an update after which nothing more is due."""
        if self.are_wanted:
            self.settled = (random_states(), self.epoch_is_open)

    def save(
        self,
        trainer: L.Trainer,
        state: TrainerState,
        sums: RunningSums,
        random: dict[str, Any] | None = None,
    ) -> bool:
        """Write a checkpoint; False if that failed, see `Checkpoints.save`.

        Args:
            trainer: The run.
            state: Saved, with what only hflit reads among the states of its callbacks.
            sums: Saved in there.
            random: States of the random numbers, where not those of now.
        """
        self.tried = state.global_step
        own = {
            "run": self.checkpoints.run,
            "global_step": state.global_step,
            "epoch": self.place[0],
            "windows": self.place[1],
            "epoch_is_open": self.epoch_is_open,
            **sums.saved(),
            "update": {
                "grad_norm": float(self.update["grad_norm"]),
                "learning_rate": self.update["learning_rate"],
            },
        }
        stateful: Any = state.stateful_callbacks
        stateful[OWN] = own
        is_written = self.checkpoints.save(trainer, state, self.module.shards, random)
        if is_written:
            self.saved = state.global_step
        return is_written

    def save_what_is_whole(
        self, step: int, save: Callable[[dict[str, Any] | None], None], exception: Exception
    ) -> None:
        """Save the last update, which is whole, of a run that fails, where that is wanted.

        Args:
            step: Its number.
            save: Saves it with some states of the random numbers.
            exception: Why the run fails.
        """
        retried = self.args.auto_find_batch_size and should_reduce_batch_size(exception)
        several = self.args.world_size > 1
        # Of several processes each has all but the others' random numbers; or it has a share of the
        # weights, which is nothing without the others' shares.
        has_all = not (several and self.args.fsdp)
        is_wanted = self.are_wanted or self.is_over
        if not (is_wanted and self.args.output_dir and has_all) or retried:
            return
        folder = Path(self.args.output_dir, f"checkpoint-{step}")
        turn = one_writes(folder, self.args.ddp_timeout) if several else nullcontext(True)
        with turn as is_mine:
            if is_mine and self.tried != step:
                self._save_now(folder.name, save)
            if is_mine and self.saved == step:
                told = "The run failed after update %d; %s is saved. Go on with checkpoint=True."
                logger.error(told, step, folder.name)

    def _save_now(self, folder: str, save: Callable[[dict[str, Any] | None], None]) -> None:
        if broken_weight(self.module.model):
            logger.error("%s is not written: its weights are not finite.", folder)
            return
        states = None
        if self.settled is not None:
            states, self.epoch_is_open = self.settled
        try:
            save(states)
        except Exception as error:  # the first one is the one to be told
            logger.error("%s could not be written: %s", folder, error)
