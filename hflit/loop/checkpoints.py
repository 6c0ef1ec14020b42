"""`checkpoint-N` in transformers' layout: what goes into one, and which ones stay."""

from __future__ import annotations

import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.trainer_utils import SaveStrategy

from hflit.arguments import Arguments
from hflit.artifacts import save_artifacts
from hflit.loop.folders import (
    SCALE,
    SHARES,
    aside,
    by_age,
    flaw,
    number,
    numbered,
    random_file,
    remove,
    write_whole,
)
from hflit.loop.resume import Checkpoint, load_weights
from hflit.ranks import everyones, from_first
from hflit.sharding import Shards, save_shares, whole_state

logger = logging.getLogger(__name__)


class Checkpoints:
    """Writes the checkpoints of one run, and knows the one it goes on from.

    Args:
        args: Where to write, and how much to keep.
        model: Saved by `save_pretrained`.
        tokenizer: Saved beside it.
        run: What makes this run: name -> value that JSON can hold.
        resumed: The checkpoint to go on from.
        failed_save: Whether a run should `continue` or `stop` where one cannot be written.

    Attributes:
        is_alone: Whether the other processes answer no more; then this one writes what it has.
    """

    is_alone = False

    def __init__(
        self,
        args: Arguments,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        run: dict[str, Any],
        resumed: Checkpoint | None = None,
        failed_save: str = "continue",
    ) -> None:
        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.run = run
        self.resumed = resumed
        self.failed_save = failed_save

    def save(
        self,
        trainer: L.Trainer,
        state: TrainerState,
        shards: Shards | None = None,
        random: dict[str, Any] | None = None,
    ) -> bool:
        """Write `checkpoint-N`, then delete what `save_total_limit` leaves no room for.

        Args:
            trainer: The run.
            shards: Those of the model, if it is sharded.
            state: Written too; its `best_model_checkpoint` is brought up to date.
            random: States of this process's random numbers, where not those of now.

        Returns:
            Whether it was written. If not, a warning says why, and what was there is still whole.

        Raises:
            OSError: It could not be written, and the run is not to go on without.
        """
        output_dir = cast(str, self.args.output_dir)
        folder = Path(output_dir, f"checkpoint-{state.global_step}")
        best_before = state.best_model_checkpoint
        if self.args.save_strategy != SaveStrategy.NO and state.best_global_step:
            best = os.path.join(output_dir, f"checkpoint-{state.best_global_step}")
            if state.best_global_step == state.global_step or os.path.isdir(best):
                state.best_model_checkpoint = best

        world = 1 if self.is_alone else self.args.world_size
        should_save = self.is_alone or self.args.should_save
        states_of_all = everyones((self.args.process_index, random or random_states()), world)
        shares = from_first(aside(folder, "shares"), world)
        problem: Exception | None = None
        has_shares = shards is not None and shards.is_open and self.args.saves_shares
        optimizer: Any = None
        try:
            if has_shares and not self.args.save_only_model:
                model: Any = trainer.lightning_module.model
                save_shares(model, trainer.optimizers[0], shares)
            elif not self.args.save_only_model:
                optimizer = whole_state(trainer.optimizers[0], keep=should_save)
        except OSError as error:
            problem = error
        if shards is not None:
            shards.fill(keep=should_save)

        def write(part: Path) -> None:
            if problem is not None:
                raise problem
            save_artifacts(part, self.model, self.tokenizer, state, self.args)
            if not self.args.save_only_model:
                if has_shares:
                    shares.rename(part / SHARES)
                else:
                    torch.save(optimizer, part / "optimizer.pt")
                schedule = trainer.lr_scheduler_configs[0].scheduler
                torch.save(schedule.state_dict(), part / "scheduler.pt")
                if scale := trainer.precision_plugin.state_dict():  # of float16 gradients
                    torch.save(scale, part / SCALE)
                for rank, states in states_of_all:
                    torch.save(states, part / random_file(rank, self.args.world_size))

        if should_save:
            try:
                write_whole(folder, write)
                self._rotate(folder, state.best_model_checkpoint)
            except (OSError, RuntimeError, SafetensorError) as error:  # each library's disk full
                problem = error
        if shards is not None:
            shards.empty()
        told = f"{folder} could not be written: {problem}. {_newest_whole(folder.parent)}"
        failed = from_first(None if problem is None else told, world)
        if has_shares and self.args.local_process_index == 0:
            shutil.rmtree(shares, ignore_errors=True)  # there no more, if all went well
        if failed is None:
            return True
        state.best_model_checkpoint = best_before
        if self.failed_save == "stop":
            raise OSError(f"{failed} Make room, and go on with checkpoint=True.")
        if should_save:
            logger.warning("%s The run goes on.", failed)
        return False

    def load_best(self, state: TrainerState) -> bool:
        """Give the model the best weights, if `load_best_model_at_end`; True if it got them."""
        if not self.args.load_best_model_at_end:
            return False
        if state.best_global_step and self.best_step(state) != state.best_global_step:
            logger.warning(
                "The best weights, of update %d, were not saved: %s are returned. Save as often as "
                "you evaluate, or with save_strategy='best'.",
                state.best_global_step,
                f"those of {state.best_model_checkpoint}"
                if state.best_model_checkpoint
                else "the last ones",
            )
        if state.best_model_checkpoint is None:
            return False
        best = Path(state.best_model_checkpoint)
        if not all(everyones(best.is_dir(), self.args.world_size)):
            told = "is gone" if self.args.world_size == 1 else "is not there for all processes"
            logger.warning("The best checkpoint, %s, %s: the last weights stay.", best, told)
            return False
        load_weights(self.model, best)
        from_first(None, self.args.world_size)  # before anyone deletes it
        return True

    @staticmethod
    def best_step(state: TrainerState) -> int | None:
        """The update that the best checkpoint was saved after; None if there is none."""
        best = state.best_model_checkpoint
        return None if best is None else number(best)

    def keep_only_best(self, state: TrainerState) -> None:
        """At the end, `save_total_limit=1` keeps the best checkpoint and not the newest."""
        best = state.best_model_checkpoint
        if self.args.should_save and self.args.save_total_limit == 1 and best is not None:
            for folder in numbered(cast(str, self.args.output_dir)):
                if not _is(folder, best):
                    remove(folder)

    def _rotate(self, newest: Path, best: str | None) -> None:
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        folders = by_age(numbered(newest.parent))
        kept = {newest} | {folder for folder in folders if _is(folder, best)}
        excess = len(folders) - max(limit, len(kept))
        for folder in [folder for folder in folders if folder not in kept][: max(excess, 0)]:
            remove(folder)


def _is(folder: Path, name: str | None) -> bool:
    """Whether a name, in whatever spelling, is that of a folder."""
    return name is not None and folder.resolve() == Path(name).resolve()


def _newest_whole(output_dir: Path) -> str:
    whole = next((each for each in reversed(numbered(output_dir)) if not flaw(each)), None)
    return f"{whole} is still whole." if whole else "No earlier one is there."


def random_states() -> dict[str, Any]:
    """Of the generators of this process, as transformers saves them."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.accelerator.is_available():
        device: Any = torch.accelerator.current_accelerator()
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states
