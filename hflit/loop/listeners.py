"""transformers' callbacks: who hears of a run, and what they ask for."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    ExportableState,
    PrinterCallback,
)

from hflit.loop.resume import Checkpoint
from hflit.loop.trackers import TRACKERS


class Listeners:
    """Tells transformers' callbacks of a run, and keeps what they ask for.

    Args:
        args: The arguments of the run.
        model: Handed to the callbacks.
        tokenizer: Handed to them too.
        callbacks: The user's.

    Attributes:
        control: What they ask for.
    """

    def __init__(
        self,
        args: TrainingArguments,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.args = args
        own: list[Any] = [DefaultFlowCallback(), *callbacks]
        if args.disable_tqdm:
            own.append(PrinterCallback())
        self.handler = CallbackHandler(own, model, tokenizer, None, None)
        self.control = TrainerControl()

    def meet(self, model: Any, trainer: L.Trainer) -> None:
        """Hand the callbacks what a run trains with."""
        self.handler.model = model
        self.handler.optimizer = trainer.optimizers[0]
        self.handler.lr_scheduler = trainer.lr_scheduler_configs[0].scheduler
        self.handler.train_dataloader = trainer.train_dataloader
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it
        loader = data.val_dataloader()  # a list, empty, where there are no such rows
        self.handler.eval_dataloader = None if isinstance(loader, list) else loader

    def tell(self, event: str, state: TrainerState, **details: Any) -> None:
        """Tell all of them of an event, by transformers' name of it."""
        told = getattr(self.handler, event)
        try:
            self.control = told(self.args, state, self.control, **details)
        except StopIteration as error:  # with which Lightning would end the epoch, and say nothing
            raise RuntimeError(f"A callback's {event} ended in StopIteration.") from error

    def tell_some(self, event: str, state: TrainerState, trackers: bool) -> None:
        """Tell the trackers alone, or all others."""
        everyone = self.handler.callbacks
        some = [each for each in everyone if isinstance(each, TRACKERS) == trackers]
        self.handler.callbacks = some
        self.tell(event, state)
        self.handler.callbacks = everyone

    def restore(self, resumed: Checkpoint) -> None:
        """Put back the states that callbacks had in an earlier run."""
        self.handler.callbacks = [resumed.restored(each) for each in self.handler.callbacks]
        self.control = resumed.restored(self.control)

    def new_state(self) -> TrainerState:
        """The state of a run that has not begun, with the callbacks' own."""
        known: list[Any] = [*self.handler.callbacks, self.control]
        stateful: list[Any] = [each for each in known if isinstance(each, ExportableState)]
        return TrainerState(
            is_local_process_zero=self.args.local_process_index == 0,
            is_world_process_zero=self.args.process_index == 0,
            stateful_callbacks=stateful,
        )
