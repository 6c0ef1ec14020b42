"""How a run goes on from a checkpoint, as if it had never stopped."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import safe_globals

from hflit.loop.folders import (
    MARK,
    RANDOM,
    SCALE,
    SHARES,
    TENSORS,
    by_age,
    flaw,
    numbered,
    random_file,
    read_state,
    weight_files,
)
from hflit.sharding import load_shares, load_state

logger = logging.getLogger(__name__)

OWN = "hflit"  # our entry among `stateful_callbacks`, where transformers keeps what it knows not

# Arguments that the rest of a run cannot change and still be the same run.
FIXED_ARGUMENTS = (
    *("gradient_accumulation_steps", "seed", "data_seed"),
    *("train_sampling_strategy", "dataloader_drop_last", "optim", "learning_rate"),
    *("weight_decay", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("label_smoothing_factor", "neftune_noise_alpha"),
    # The checkpoint brings these along, and new ones would be ignored.
    *("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules"),
)
# What makes the rows of an update: other processes may go on if their product stays the same.
SPLIT = ("processes", "per_device_train_batch_size", "gradient_accumulation_steps")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, to go on from.

    Attributes:
        folder: Where it lies.
        state: The state of the run when it was written.
        own: What we add to transformers' state, see `SavePoints`; None if transformers wrote the
            folder.
    """

    folder: Path
    state: TrainerState
    own: dict[str, Any] | None

    def keep_batch_size(self, args: TrainingArguments) -> None:
        """Go on with the size that `auto_find_batch_size` found; places in the data count in it."""
        found = self.state.train_batch_size
        if args.auto_find_batch_size and found is not None:
            args.per_device_train_batch_size, args.auto_find_batch_size = found, False

    def check(self, run: dict[str, Any]) -> None:
        """Raise ValueError if the run that goes on is not the run that was stopped.

        With another number of processes it is the same run as long as each update has the rows
        that it would have had: then places in the data, schedule and losses are the same too.
        """
        # A folder of transformers tells nothing, but has its learning rate.
        before = self.own["run"] if self.own else {"find_learning_rate": False}
        changed = {n for n, value in run.items() if n in before and before[n] != value}
        hint = ""
        if "processes" in changed:
            # These orders depend on the size of a batch.
            order = run["train_sampling_strategy"]
            is_free = order in ("random", "sequential") and not (
                run["dataloader_drop_last"] or run["max_tokens_per_batch"]
            )
            if is_free and "rows_per_update" not in changed:
                changed -= set(SPLIT)
            elif is_free:
                each, rest = divmod(before["rows_per_update"], run["processes"])
                hint = (
                    f" An update has {before['rows_per_update']} rows, which {run['processes']} "
                    "processes cannot share equally."
                    if rest
                    else f" With {run['processes']} process(es), per_device_train_batch_size x "
                    f"gradient_accumulation_steps must be {each}."
                )
        changed.discard("rows_per_update")  # the words of the call say the same
        if changed:
            names = [name for name in run if name in changed]
            told = "; ".join(f"{n}={before[n]!r} there, {n}={run[n]!r} here" for n in names)
            raise ValueError(
                f"{self.folder} belongs to another run: {told}.{hint} Give what it was trained "
                "with, or leave out checkpoint= to train anew."
            )

    @property
    def found_rate(self) -> float | None:
        """The learning rate that its range test found, if there was one."""
        return self.own["run"].get("found_rate") if self.own else None

    def place(self, windows: int, anew: bool = False) -> tuple[int, int]:
        """The epoch to go on in, and the windows of it that are done.

        Args:
            windows: In an epoch; 0 for a stream, whose length is not known.
            anew: Take the epoch from its start.
        """
        step = self.state.global_step
        epoch, done = divmod(step, windows) if windows else (0, step)
        if self.own:
            epoch, done = self.own["epoch"], self.own["windows"]
        return epoch, 0 if anew else done

    def load_training(self, trainer: L.Trainer, place: tuple[int, int]) -> None:
        """Give the optimizer, the schedule and Lightning's loops their states.

        Args:
            trainer: Set up for fitting, with its optimizer.
            place: The epoch to go on in, and the windows of it to skip.
        """
        optimizer, schedule = trainer.optimizers[0], self._tensors("scheduler.pt")
        try:
            if (self.folder / SHARES).is_dir():
                model: Any = trainer.lightning_module.model
                load_shares(model, optimizer, self.folder / SHARES, trainer.world_size == 1)
            else:
                load_state(optimizer, self._tensors("optimizer.pt"))
            trainer.lr_scheduler_configs[0].scheduler.load_state_dict(schedule)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"The optimizer in {self.folder} is another one, or of another model: {error}."
            ) from error
        if (self.folder / SCALE).is_file():
            trainer.precision_plugin.load_state_dict(self._tensors(SCALE))
        trainer.fit_loop.load_state_dict(_loops_at(self.state.global_step, *place))
        assert trainer.global_step == self.state.global_step

    def restore_random(self, rank: int, world: int) -> None:
        """Put all random numbers back to where they were when the checkpoint was written."""
        files = [self.folder / random_file(each, world) for each in range(world)]
        missing = [file for file in files if not file.is_file()]
        if missing:  # of a process that failed; of transformers, or of more or fewer processes
            logger.warning("%s is missing: random numbers start anew.", missing[0])
        if files[rank] in missing:
            return
        states = self._tensors(files[rank].name)
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.random.set_rng_state(states["cpu"])
        if torch.accelerator.is_available():
            device: Any = torch.accelerator.current_accelerator()
            if device.type in states:
                torch.get_device_module(device).set_rng_state(states[device.type])

    def continued(self, fresh: TrainerState, parity: bool) -> TrainerState:
        """The state to go on with: the one saved, but for what this call decides.

        Args:
            fresh: The state of a run that starts anew with the arguments of this call.
            parity: Keep the intervals of the run that was stopped, as transformers does.
        """
        decided = ["max_steps", "num_train_epochs", "is_local_process_zero"]
        decided += ["is_world_process_zero"]
        if not parity:
            decided += ["logging_steps", "eval_steps", "save_steps", "train_batch_size"]
        state = dataclasses.replace(self.state, **{n: getattr(fresh, n) for n in decided})
        best = state.best_model_checkpoint
        if best is not None and not os.path.isdir(best):
            logger.warning("The best checkpoint, %s, is not there any more.", best)
            state.best_model_checkpoint = None
        return state

    def restored(self, exportable: Any) -> Any:
        """A callback, or the control, with the state it had; itself if none was saved."""
        saved: Any = self.state.stateful_callbacks
        states = saved.get(type(exportable).__name__)
        if not isinstance(exportable, ExportableState) or not states:
            return exportable
        # Several callbacks of one kind have a list, in their order.
        state = states.pop(0) if isinstance(states, list) else states
        return type(exportable).from_state(state)

    def _tensors(self, name: str) -> Any:
        with safe_globals():  # of numpy, for random numbers
            return torch.load(self.folder / name, map_location="cpu", weights_only=True)


def find(checkpoint: Any, args: TrainingArguments) -> Checkpoint | None:
    """The checkpoint a call asks to go on from, whole and read; nothing is changed on the disk.

    Args:
        checkpoint: As in the call: a folder, True for the newest whole one in `output_dir`, or
            None. `resume_from_checkpoint` is another name for it.
        args: The arguments of the run.

    Raises:
        ValueError: There is none, or a file of it is missing, cut short or changed.
    """
    also = args.resume_from_checkpoint
    if also is not None and checkpoint is not None and str(also) != str(checkpoint):
        raise ValueError(
            f"checkpoint={checkpoint!r} and resume_from_checkpoint={also!r} contradict each other. "
            "Give one of them."
        )
    wanted = also if checkpoint is None else checkpoint
    if wanted is None or wanted is False:
        return None
    if not isinstance(wanted, (bool, str, os.PathLike)):
        raise TypeError(f"checkpoint={wanted!r} must be True or the name of a folder.")
    if wanted is True:
        return _read(_newest(args.output_dir))
    folder = Path(os.path.expanduser(f"{wanted}"))
    problem = flaw(folder) or _lack(folder) or _unreadable(folder)
    if problem:
        raise ValueError(
            f"checkpoint={str(wanted)!r} cannot be resumed: {problem}. Name another folder, "
            "or give checkpoint=True for the newest whole one in output_dir."
        )
    return _read(folder)


def _newest(output_dir: str | None) -> Path:
    if not output_dir:
        raise ValueError("checkpoint=True looks in output_dir. Give it, or name the folder.")
    problems: list[str] = []
    folders = numbered(output_dir)
    if folders and (last := by_age(folders)[-1]) != folders[-1]:
        raise ValueError(
            f"checkpoint=True does not know which to go on from: {last} is newer than "
            f"{folders[-1]}, so they are of two runs. Name one, such as checkpoint={str(last)!r}."
        )
    for folder in reversed(folders):
        if (folder / MARK).exists():
            problem = flaw(folder) or _lack(folder) or _unreadable(folder)
        else:
            problem = f"it has no {MARK}; if it is whole, name it: checkpoint={str(folder)!r}"
        if not problem:
            for each in problems:
                logger.warning("%s is passed over.", each)
            return folder
        problems.append(f"{folder}: {problem}")
    found = "; ".join(problems) if problems else "there is no checkpoint-N"
    raise ValueError(
        f"checkpoint=True found nothing whole in output_dir={str(output_dir)!r}: {found}. "
        "Leave out checkpoint= to train anew."
    )


def _read(folder: Path) -> Checkpoint:
    state = read_state(folder)
    own = state.stateful_callbacks.get(OWN)  # type: ignore[union-attr]  # a dict, once read
    # transformers carries our entry along in what it writes itself: then it is out of date.
    is_current = own is not None and own["global_step"] == state.global_step
    return Checkpoint(folder, state, own if is_current else None)


def _lack(folder: Path) -> str | None:
    missing = [name for name in TENSORS if not (folder / name).is_file()]
    if (folder / SHARES / ".metadata").is_file():
        missing = [name for name in missing if name != "optimizer.pt"]
    missing += [] if any(folder.glob(RANDOM)) else ["rng_state.pth"]
    if not missing:
        return None
    return f"{missing[0]} is missing (save_only_model=True leaves it out, to use but not to resume)"


def _unreadable(folder: Path) -> str | None:
    """A file that holds more than tensors and numbers, such as code that runs when it is read."""
    tensors = [folder / name for name in TENSORS]
    if (folder / SHARES).is_dir():
        tensors.remove(folder / "optimizer.pt")
    for path in (*tensors, *folder.glob(RANDOM)):
        try:
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many kinds
            told = f"{error}".splitlines()[0].rstrip(".")
            return f"{path.name} cannot be read ({told})"
    return None


def load_weights(model: Any, folder: Path) -> None:
    """Put the weights of a checkpoint into a model of the same kind.

    Args:
        model: A transformers model, a model with a peft adapter, or one of several parts, each
            saved under its name.
        folder: The checkpoint.
    """
    parts = [(name, part) for name, part in model.named_children() if weight_files(folder / name)]
    if parts:
        for name, part in parts:
            load_weights(part, folder / name)
        return
    weights = {name: w for path in weight_files(folder) for name, w in load_file(path).items()}
    if (folder / "adapter_config.json").is_file() and not isinstance(model, PeftModel):
        raise ValueError(f"{folder} holds an adapter: give the lora= that it was trained with.")
    if isinstance(model, PeftModel):
        own = get_peft_model_state_dict(model)
        _raise_misfit(folder, _misfit(own, weights))
        set_peft_model_state_dict(model, weights, model.active_adapter)
        return
    if _misfit(model.state_dict(), weights) and hasattr(model, "from_pretrained"):
        # Some models are saved under other names than they have in memory.
        named, report = type(model).from_pretrained(folder, output_loading_info=True)
        if report["missing_keys"]:  # and drawn at random
            _raise_misfit(folder, f"{min(report['missing_keys'])}, missing there")
        weights = named.state_dict()
    _raise_misfit(folder, _misfit(model.state_dict(), weights))
    model.load_state_dict(weights, strict=False)


def _raise_misfit(folder: Path, misfit: str | None) -> None:
    if misfit is not None:
        raise ValueError(f"{folder} holds another model: see its weight {misfit}.")


def _misfit(own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> str | None:
    # Tied weights are saved once.
    given = {own[name].data_ptr() for name in weights if name in own}
    wrong = [name for name in weights if name not in own or own[name].shape != weights[name].shape]
    wrong += [name for name, weight in own.items() if weight.data_ptr() not in given]
    if not wrong:
        return None
    there, here = (
        f"of shape {tuple(each[wrong[0]].shape)}" if wrong[0] in each else "missing"
        for each in (weights, own)
    )
    return f"{wrong[0]}, {there} there and {here} here"


def _loops_at(step: int, epoch: int, windows: int) -> dict[str, Any]:
    """The states of Lightning's loops after `step` updates, `windows` of them in this epoch."""

    def batches(count: int) -> dict[str, int]:
        return dict.fromkeys(("ready", "started", "processed", "completed"), count)

    def updates(count: int) -> dict[str, int]:
        return dict.fromkeys(("ready", "completed"), count)

    begun = epoch + (windows > 0)
    epochs = {"ready": begun, "started": begun, "processed": epoch, "completed": epoch}
    optimization = {"total": updates(step), "current": updates(windows)}
    progress = {"total": batches(step), "current": batches(windows), "is_last_batch": False}
    return {
        "state_dict": {},
        "epoch_progress": {"total": epochs, "current": dict(epochs)},
        "epoch_loop.state_dict": {"_batches_that_stepped": step},
        "epoch_loop.batch_progress": progress,
        "epoch_loop.manual_optimization.optim_step_progress": optimization,
    }
