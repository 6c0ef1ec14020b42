"""transformers' callbacks in a Lightning run: the events, the log, evaluation, when to stop."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
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
from transformers.trainer_utils import SaveStrategy, speed_metrics

from hflit.tasks.module import TaskModule

Evaluate = Callable[[Callable[[], None]], dict[str, float]]


class Bridge(L.Callback):
    """Drives `TrainerState`, `TrainerControl` and `TrainerCallback`s from Lightning's hooks.

    Logging, evaluation and the end of training fall on the steps on which they fall in
    `transformers.Trainer`, since the same `DefaultFlowCallback` asks for them.

    Args:
        args: The arguments of the run.
        module: The task that trains.
        tokenizer: Handed to the callbacks.
        callbacks: The user's transformers callbacks.
        evaluate: Runs one evaluation and returns its figures; None without validation data. It
            is given a function to call after each batch.
    """

    def __init__(
        self,
        args: TrainingArguments,
        module: TaskModule,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback] | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.args = args
        self.run_evaluation = evaluate
        own: list[Any] = [DefaultFlowCallback()]
        if args.disable_tqdm:
            own.append(PrinterCallback())
        self.handler = CallbackHandler(
            [*own, *(callbacks or [])], module.model, tokenizer, None, None
        )
        self.control = TrainerControl()
        self.state = self._new_state()
        self.metrics: dict[str, float] = {}
        module.tell = self._event
        self._event("on_init_end")

    # Lightning's hooks, in the order of a run.

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the steps of the run and begin."""
        args = self.args
        loader: Any = trainer.train_dataloader
        accumulation = args.gradient_accumulation_steps
        windows = trainer.num_training_batches
        max_steps = int(trainer.estimated_stepping_batches)
        is_stream = math.isinf(windows)
        # An epoch in micro-batches, the unit in which transformers counts the share of an epoch.
        self.epoch_batches = max_steps * accumulation
        if not is_stream:
            self.epoch_batches = min(len(loader.batches), int(windows) * accumulation)

        self.state = self._new_state()
        self.state.compute_steps(args, max_steps)
        self.state.train_batch_size = args.per_device_train_batch_size
        self.state.max_steps = max_steps
        self.state.num_train_epochs = (
            sys.maxsize if is_stream else math.ceil(max_steps / int(windows))
        )
        self.handler.optimizer = trainer.optimizers[0]
        self.handler.lr_scheduler = trainer.lr_scheduler_configs[0].scheduler
        self.handler.train_dataloader = loader

        batch_rows = args.per_device_train_batch_size * accumulation * trainer.world_size
        self.planned_rows: float = max_steps * batch_rows
        if args.max_steps <= 0:
            self.planned_rows = len(loader.batches.dataset) * args.num_train_epochs
        model: Any = pl_module.model
        self.flos_per_token = 6 * model.num_parameters(exclude_embeddings=True)
        self.padded_tokens = 0
        self.loss = torch.zeros((), device=pl_module.device)
        self.loss_logged = 0.0  # summed over the updates that have been logged
        self.step_logged = 0
        self.start = time.time()
        self._event("on_train_begin")
        if args.eval_on_start:
            self.evaluate(trainer, step_schedule=False)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the callbacks."""
        self._event("on_epoch_begin")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell the callbacks."""
        self._event("on_step_begin")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the update, then do what the callbacks ask for."""
        self.update = outputs
        for loss in outputs["losses"]:  # one by one: transformers' order of summing
            self._add_loss(loss)
        self.padded_tokens += outputs["padded_tokens"]
        self.state.global_step += 1
        done = min((batch_idx + 1) * self.args.gradient_accumulation_steps, self.epoch_batches)
        self.state.epoch = trainer.current_epoch + done / self.epoch_batches
        self._event("on_step_end")
        self._act(trainer)
        if self.control.should_epoch_stop and not self.control.should_training_stop:
            raise StopIteration  # ends Lightning's epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the callbacks, then do what they ask for at an epoch's end."""
        self._event("on_epoch_end")
        self._act(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the figures of the whole run; evaluate the final weights if nothing has yet."""
        steps = self.state.global_step
        self.loss_logged += float(self.loss)
        figures = speed_metrics(
            "train",
            self.start,
            num_samples=self.planned_rows * steps / max(self.state.max_steps, 1),
            num_steps=steps,
        )
        self._store_flos()
        figures["total_flos"] = self.state.total_flos
        figures["train_loss"] = self.loss_logged / max(steps, 0.001)
        self.metrics.update(figures)
        self._log(trainer, figures)
        self._event("on_train_end")
        evaluated = [e["step"] for e in self.state.log_history if "eval_runtime" in e]
        if self.run_evaluation is not None and (not evaluated or evaluated[-1] != steps):
            self.evaluate(trainer, step_schedule=False)

    # What the callbacks may ask for.

    def _act(self, trainer: L.Trainer) -> None:
        if self.control.should_log and self.state.global_step > self.step_logged:
            self._log_update(trainer)
        if self.control.should_evaluate and self.run_evaluation is not None:
            figures = self.evaluate(trainer)
            is_best = self._note_best(figures)
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = is_best
        if self.control.should_training_stop:
            trainer.should_stop = True

    def _log_update(self, trainer: L.Trainer) -> None:
        total = float(self.loss)
        self.loss.zero_()
        norm = self.update["grad_norm"]
        figures = {
            "loss": total / (self.state.global_step - self.step_logged),
            "grad_norm": norm.item() if torch.is_tensor(norm) else norm,
            "learning_rate": self.update["learning_rate"],
        }
        self.loss_logged += total
        self.step_logged = self.state.global_step
        self._store_flos()
        self._log(trainer, figures)

    def evaluate(self, trainer: L.Trainer, step_schedule: bool = True) -> dict[str, float]:
        """Evaluate now, log the figures and tell the callbacks."""
        assert self.run_evaluation is not None
        figures = self.run_evaluation(lambda: self._event("on_prediction_step"))
        self.metrics.update(figures)
        self._log(trainer, figures)
        self._event("on_evaluate", metrics=figures)
        schedule = self.handler.lr_scheduler
        if step_schedule and isinstance(schedule, ReduceLROnPlateau):
            schedule.step(self._metric_for_best(figures))
        return figures

    def _metric_for_best(self, figures: dict[str, float]) -> float:
        name = self.args.metric_for_best_model or "loss"
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in figures:
            raise KeyError(
                f"metric_for_best_model={self.args.metric_for_best_model!r} is not among the "
                f"figures of the evaluation: {', '.join(figures)}."
            )
        return figures[name]

    def _note_best(self, figures: dict[str, float]) -> bool:
        args, state = self.args, self.state
        if args.metric_for_best_model is None:
            return False
        value = self._metric_for_best(figures)
        better = np.greater if args.greater_is_better else np.less
        if state.best_metric is None:
            state.best_metric = -math.inf if args.greater_is_better else math.inf
        if not better(value, state.best_metric):
            return False
        state.best_metric = value
        if args.save_strategy != SaveStrategy.NO:
            state.best_global_step = state.global_step
        return True

    def _log(self, trainer: L.Trainer, figures: dict[str, float]) -> None:
        if self.state.epoch is not None:
            figures["epoch"] = self.state.epoch
        self.state.log_history.append({**figures, "step": self.state.global_step})
        self._event("on_log", logs=figures)
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=self.state.global_step)

    def _add_loss(self, loss: torch.Tensor) -> None:
        if self.args.logging_nan_inf_filter:
            # In the log only, a step without a finite loss counts as the mean of those before it.
            mean = self.loss / (1 + self.state.global_step - self.step_logged)
            loss = torch.where(torch.isfinite(loss), loss, mean)
        self.loss += loss

    def _store_flos(self) -> None:
        self.state.total_flos += float(self.padded_tokens * self.flos_per_token)
        self.padded_tokens = 0

    def _event(self, name: str, **details: Any) -> None:
        self.control = getattr(self.handler, name)(self.args, self.state, self.control, **details)

    def _new_state(self) -> TrainerState:
        known: list[Any] = [*self.handler.callbacks, self.control]
        stateful: list[Any] = [each for each in known if isinstance(each, ExportableState)]
        return TrainerState(
            is_local_process_zero=self.args.local_process_index == 0,
            is_world_process_zero=self.args.process_index == 0,
            stateful_callbacks=stateful,
        )
