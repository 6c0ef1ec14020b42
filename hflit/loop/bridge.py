"""transformers' callbacks in a Lightning run: the events, the log, evaluation, when to stop."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import lightning.pytorch as L
import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy, speed_metrics

from hflit.loop.best import metric_for_best, note_best
from hflit.loop.checkpoints import Checkpoints
from hflit.loop.listeners import Listeners
from hflit.loop.memory import MemoryTracker
from hflit.loop.points import SavePoints
from hflit.loop.precision import full_eval
from hflit.loop.resume import Checkpoint
from hflit.loop.stops import Stop, Stops
from hflit.loop.sums import RunningSums
from hflit.tasks.module import TaskModule
from hflit.tasks.optimization import FOLLOWS_EVALUATIONS

logger = logging.getLogger(__name__)

Evaluate = Callable[[Callable[[], None]], dict[str, float]]


class Bridge(L.Callback):
    """Drives `TrainerState`, `TrainerControl` and `TrainerCallback`s from Lightning's hooks.

    Logging, evaluation and the end of training fall on the steps on which they fall in
    `transformers.Trainer`, since the same `DefaultFlowCallback` asks for them.

    Args:
        args: The arguments of the run.
        module: The task that trains.
        tokenizer: Handed to the callbacks.
        checkpoints: Writes them, and knows the one to go on from.
        stops: Notes the signals that ask the run to stop.
        callbacks: The user's transformers callbacks.
        evaluate: Runs one evaluation and returns its figures; None without validation data. It
            is given a function to call after each batch.
    """

    def __init__(
        self,
        args: TrainingArguments,
        module: TaskModule,
        tokenizer: PreTrainedTokenizerBase,
        checkpoints: Checkpoints,
        stops: Stops,
        callbacks: list[TrainerCallback] | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.memory = MemoryTracker(args.skip_memory_metrics)
        self.memory.begin("init")
        self.args = args
        self.world = args.world_size
        self.module = module
        self.begun = False
        self.is_training = False
        self.points = SavePoints(args, module, checkpoints)
        self.resumed = checkpoints.resumed
        self.checkpoints = checkpoints
        self.stops = stops
        self.run_evaluation = evaluate
        self.listeners = Listeners(args, module.model, tokenizer, callbacks or [])
        self.state = self.listeners.new_state()
        self.metrics: dict[str, float] = {}
        self.failure: Exception | None = None
        module.tell = self._event
        self._event("on_init_end")

    # Lightning's hooks, in the order of a run.

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on from a checkpoint, whose weights the model has already."""
        if self.resumed is not None:
            windows = trainer.num_training_batches
            anew = self.args.ignore_data_skip
            self.points.place = self.resumed.place(0 if math.isinf(windows) else int(windows), anew)
            self.resumed.load_training(trainer, self.points.place)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the steps of the run and begin."""
        self.memory.end("init")
        self.memory.begin("train")
        self.is_training = True
        self.begun = True
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

        self.state = self.listeners.new_state()
        self.state.compute_steps(args, max_steps)
        self.state.train_batch_size = args.per_device_train_batch_size
        self.state.max_steps = max_steps
        self.state.num_train_epochs = (
            sys.maxsize if is_stream else math.ceil(max_steps / int(windows))
        )
        self.listeners.meet(self.module.model, trainer)

        batch_rows: float = args.per_device_train_batch_size * accumulation * trainer.world_size
        if getattr(loader.sampler, "batches", None) is not None:  # of as many rows as fit
            batch_rows = loader.sampler.rows / len(loader.sampler) * accumulation
        self.planned_rows: float = max_steps * batch_rows
        if args.max_steps <= 0:
            self.planned_rows = len(loader.batches.dataset) * args.num_train_epochs
        self.sums = RunningSums(self.module.model, pl_module.device, args)
        self.steps_before = 0
        self.waits_for_random = False
        self.module.rows_of = getattr(loader, "rows_of", self.module.rows_of)
        self.start = time.time()
        self.stops.listen()
        if self.resumed is not None:
            self._resume(self.resumed)
        self.tokens_before = self.state.num_input_tokens_seen
        for each in trainer.loggers if trainer.enable_autolog_hparams else ():
            each.log_hyperparams(args.to_sanitized_dict())
        self._event("on_train_begin")
        if args.eval_on_start and (self.module.parity or self.state.global_step == 0):
            self.evaluate(trainer, step_schedule=False)
        if self.resumed is not None:
            self._enter_epoch(trainer, self.resumed, is_stream)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the callbacks."""
        self._event("on_epoch_begin")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell the callbacks."""
        if self.waits_for_random and self.resumed is not None:
            self.resumed.restore_random(self.args.process_index, self.world)
            self.waits_for_random = False
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
        self.points.update = outputs
        self.sums.add(outputs, self.state.global_step)
        counted = {"all": "padded_tokens", "non_padding": "tokens"}
        count = counted.get(f"{self.args.include_num_input_tokens_seen}")
        self.state.num_input_tokens_seen += self.stops.agree(
            outputs[count] if count else 0, self.module.device, self.world
        )
        self.state.global_step += 1
        done = min((batch_idx + 1) * self.args.gradient_accumulation_steps, self.epoch_batches)
        self.state.epoch = trainer.current_epoch + done / self.epoch_batches
        place, is_last = (trainer.current_epoch, batch_idx), trainer.is_last_batch
        ends_run = self.state.global_step >= self.state.max_steps
        self.points.stand(*place, is_last, ends_run)
        self._event("on_step_end")
        self.points.stand(*place, is_last or self.listeners.control.should_epoch_stop, ends_run)
        self._act(trainer)
        self.points.settle()
        self._stop_if_asked(trainer)
        asked = self.listeners.control
        if asked.should_epoch_stop and not asked.should_training_stop:
            raise StopIteration  # ends Lightning's epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the callbacks, then do what they ask for at an epoch's end."""
        if self._is_stopped(trainer) and not self.points.epoch_is_open:
            return  # within the epoch, which ends in the run that goes on
        self.points.epoch_is_open = False
        self._event("on_epoch_end")
        self._act(trainer)
        self.points.settle()
        self._stop_if_asked(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the figures of the whole run; evaluate the final weights if nothing has yet."""
        if self._is_stopped(trainer):
            self._save_stopped(trainer, "max_time, or a callback of Lightning")
        if self.module.shards is not None:
            self.module.shards.close()
            self.listeners.meet(self.module.model, trainer)
        step = self.state.global_step
        steps = step - self.steps_before
        train_loss = self.sums.train_loss(step)
        figures = speed_metrics(
            "train",
            self.start,
            num_samples=self.planned_rows * steps / max(self.state.max_steps, 1),
            num_steps=steps,
        )
        self.state.total_flos += self.sums.take_flos()
        figures["total_flos"] = self.state.total_flos
        figures["train_loss"] = train_loss
        self.memory.end("train", figures)
        self.is_training = False
        # Not in the log, whose entries are those of transformers.
        self.metrics.update({**figures, "train_padding_share": self.sums.padding_share()})
        self._log(trainer, figures)
        is_best = self.checkpoints.load_best(self.state)
        # The figures of what is returned; a run that went on from its end has them in its log.
        shown = self.checkpoints.best_step(self.state) if is_best else step
        known = [e for e in self.state.log_history if "eval_runtime" in e and e["step"] == shown]
        self.metrics.update({k: v for e in known for k, v in e.items() if k.startswith("eval_")})
        if not self._is_stopped(trainer):  # or the checkpoint to go on from would go
            self.checkpoints.keep_only_best(self.state)
        # Trackers close at the end, so they are told when nothing more is to be logged.
        self.listeners.tell_some("on_train_end", self.state, trackers=False)
        if self.run_evaluation is not None and not (is_best or known):
            try:
                self.evaluate(trainer, step_schedule=False)
            except Exception as error:
                if self.world > 1:  # the others may wait for this one
                    self.points.is_over = True
                    raise
                self.failure = error  # raised once the model is saved
        self.listeners.tell_some("on_train_end", self.state, trackers=True)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Stop measuring; save the last whole state, where checkpoints are wanted."""
        self.memory.abandon()
        if isinstance(exception, Exception) and self.points.are_wanted and self.points.is_broken:
            told = "The run failed within update %d, of which nothing whole can be saved."
            logger.error(told, self.state.global_step + 1)
        if isinstance(exception, Exception) and self.points.is_whole:
            self.sums.is_alone = self.checkpoints.is_alone = True  # nobody else would answer
            save = partial(self._save, trainer)
            self.points.save_what_is_whole(self.state.global_step, save, exception)
        goes_on = self.args.auto_find_batch_size and should_reduce_batch_size(exception)
        if self.begun and not goes_on:  # or the next run's figures would go where these went
            with suppress(Exception):  # the cause is another one
                self.listeners.tell_some("on_train_end", self.state, trackers=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End a run that went on from its end, for which Lightning has no epoch to start."""
        if not self.begun:
            self.on_train_start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)

    # Where an earlier run stopped.

    def _resume(self, resumed: Checkpoint) -> None:
        self.state = resumed.continued(self.state, self.module.parity)
        if self.args.restore_callback_states_from_checkpoint:
            self.listeners.restore(resumed)
        step = self.state.global_step
        self.steps_before = step
        self.sums.begin_after(step)
        own = resumed.own
        if own is not None and not self.module.parity:  # transformers forgets its running sums
            self.sums.load(own)
            self.points.update = own["update"]

    def _enter_epoch(self, trainer: L.Trainer, resumed: Checkpoint, is_stream: bool) -> None:
        """Restore the random numbers at the moment that leaves them as they were."""
        is_over = self.state.global_step >= self.state.max_steps
        if not is_over and (self.points.place[1] or self.args.dataloader_persistent_workers):
            # Fetching the first window draws from them, and so does opening its loader: both had
            # been done before they were saved.
            self.waits_for_random = True
            if self.points.place[1]:
                self._event("on_epoch_begin")  # Lightning 2.6 tells only of epochs it begins
            return
        resumed.restore_random(self.args.process_index, self.world)
        if resumed.own is not None and resumed.own["epoch_is_open"] and not self.module.parity:
            self._event("on_epoch_end")  # transformers leaves out what is due there
            self._act(trainer)
        if is_stream and not is_over:  # whose loader is open already: draw what opening it draws
            torch.empty((), dtype=torch.int64).random_()

    def _is_stopped(self, trainer: L.Trainer) -> bool:
        """Whether Lightning ends the run, and none of transformers' callbacks."""
        asked = self.listeners.control.should_training_stop
        return trainer.should_stop and not asked and self.state.global_step > self.steps_before

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        stopped = self.stops.received if self.world == 1 else self.stops.agreed
        if stopped is not None:
            self._save_stopped(trainer, stopped.name)
            raise Stop

    def _save_stopped(self, trainer: L.Trainer, what: str) -> None:
        """Save where a run is stopped before its end, and say what has stopped it."""
        step = self.state.global_step
        if self.points.are_wanted and self.points.saved != step:
            self._save(trainer)
        if self.points.saved == step:
            told = f"checkpoint-{step} is saved. Go on with checkpoint=True."
        else:
            told = "no checkpoint. With output_dir and save_strategy, checkpoint=True goes on."
        logger.warning("%s: stopped after update %d; %s", what, step, told)

    # What the callbacks may ask for.

    def _act(self, trainer: L.Trainer) -> None:
        if self.listeners.control.should_log and self.state.global_step > self.sums.step_logged:
            self._log_update(trainer)
        if self.listeners.control.should_evaluate and self.run_evaluation is not None:
            figures = self.evaluate(trainer)
            is_best = note_best(self.args, self.state, figures)
            if self.args.save_strategy == SaveStrategy.BEST:
                self.listeners.control.should_save = is_best
        if self.listeners.control.should_save:
            self._save(trainer)
        if self.listeners.control.should_training_stop:
            trainer.should_stop = True

    def _save(self, trainer: L.Trainer, random: dict[str, Any] | None = None) -> None:
        if not self.args.output_dir:
            return
        self.state.total_flos += self.sums.take_flos()
        self.state.stateful_callbacks = self.listeners.new_state().stateful_callbacks
        if self.points.save(trainer, self.state, self.sums, random):
            self._event("on_save")

    def _log_update(self, trainer: L.Trainer) -> None:
        update = self.points.update
        norm = update["grad_norm"]
        figures = {
            "loss": self.sums.take_loss(self.state.global_step),
            "grad_norm": norm.item() if torch.is_tensor(norm) else norm,
            "learning_rate": update["learning_rate"],
        }
        self.state.total_flos += self.sums.take_flos()
        self._log(trainer, figures, self.start)

    def evaluate(self, trainer: L.Trainer, step_schedule: bool = True) -> dict[str, float]:
        """Evaluate now, log the figures and tell the callbacks."""
        assert self.run_evaluation is not None
        self.memory.begin("eval")
        # transformers takes half weights only after training, as it could not go back.
        halved = not (self.module.parity and self.is_training)
        shards = self.module.shards
        whole = nullcontext() if shards is None else shards.gathered()
        try:
            with whole, full_eval(self.module.model, self.args) if halved else nullcontext():
                figures = self.run_evaluation(lambda: self._event("on_prediction_step"))
        except StopIteration as error:  # with which Lightning would end the epoch
            raise RuntimeError("The evaluation ended in StopIteration.") from error
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            raise MemoryError(
                "Evaluation needs more memory than there is: lower per_device_eval_batch_size."
            ) from error
        self._log(trainer, figures)
        self.metrics.update(figures)  # from which transformers' notebook callback takes some out
        self._event("on_evaluate", metrics=figures)
        schedule = trainer.lr_scheduler_configs[0].scheduler
        self.memory.end("eval", figures)
        self.metrics.update(figures)
        if step_schedule and isinstance(schedule, FOLLOWS_EVALUATIONS):
            schedule.step(metric_for_best(self.args, figures))
        return figures

    def _log(
        self, trainer: L.Trainer, figures: dict[str, float], start: float | None = None
    ) -> None:
        if self.state.epoch is not None:
            figures["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            seen = self.state.num_input_tokens_seen
            figures["num_input_tokens_seen"] = seen
            if start is not None:
                figures |= speed_metrics("train", start, num_tokens=seen - self.tokens_before)
        self.state.log_history.append({**figures, "step": self.state.global_step})
        self._event("on_log", logs=figures)
        numbers = {k: v for k, v in figures.items() if isinstance(v, (int, float))}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=self.state.global_step)

    def _event(self, name: str, **details: Any) -> None:
        self.listeners.tell(name, self.state, **details)
        if name == "on_pre_optimizer_step":
            # Until all that belongs to the update is done.
            self.points.is_whole, self.points.is_broken = False, True
