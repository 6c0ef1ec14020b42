"""The base of all tasks: one window of micro-batches becomes one weight update."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, Literal, cast

import lightning.pytorch as L
import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainingArguments

from hflit.adapters import forward_inputs, inner_model, keep_layout
from hflit.data.batching import IGNORE_INDEX, Batch
from hflit.data.dealing import counts
from hflit.data.tokenization import Tokenization
from hflit.loading import Base, load_model
from hflit.ranks import gradient_sync, total
from hflit.sharding import Shards
from hflit.tasks.chunks import heads_left_out, summed_by_chunks
from hflit.tasks.distillation import Distillation
from hflit.tasks.failures import explained, nonfinite_problem, place
from hflit.tasks.optimization import FOLLOWS_EVALUATIONS, make_optimizer, make_schedule
from hflit.tasks.own_loss import brings_own_loss, own_outputs
from hflit.tasks.parts import (
    Evaluated,
    Items,
    forward_cost,
    mean_loss,
    split_by_length,
    token_distance,
    token_loss,
)
from hflit.tasks.reference import ReferenceLoss

logger = logging.getLogger(__name__)


class TaskModule(L.LightningModule):
    """Trains a transformers model, one window at a time.

    A window is the list of micro-batches of one weight update. Its loss is the sum over all items
    (rows or label tokens) of all its micro-batches, divided by their number: the same as one large
    batch, however ragged the rows are.

    Args:
        model: A transformers model with the head of the task, in a `PeftModel` or not.
        args: Learning rate, schedule, clipping and all the other training arguments.
        parity: Run exactly the operations of `transformers.Trainer`, in its order. Also copies
            its loss under accumulation, too large by `gradient_accumulation_steps` for models
            that take no count of items.
        distillation: A teacher whose answers are learned beside the labels.
    """

    auto_model: ClassVar[Any]
    figures: ClassVar[tuple[str, ...]]  # those that metrics="auto" may give
    lora_type: ClassVar[str]  # peft's name of the task
    tokenization: ClassVar[type[Tokenization]]
    tokenization_settings: ClassVar[dict[str, Any]] = {}
    options: ClassVar[tuple[str, ...]] = ()  # what a subclass takes beside model, args and parity
    label_names: ClassVar[tuple[str, ...]] = ("labels",)  # columns the loss is computed from
    places: ClassVar[tuple[str, ...]] = ()  # columns of positions in a row
    predicts_next: ClassVar[bool] = False  # whether labels are compared one place earlier
    outputs_by_row: ClassVar[bool] = True  # whether the outputs of a batch are rows, one for each
    compares_in_turn: ClassVar[bool] = False  # whether metrics take rows as their batches come
    chunks_loss: ClassVar[bool] = False  # whether each label is a token that logits are for
    unsmoothed: ClassVar[str] = ""  # the task, and why label smoothing means nothing to it
    # What becomes of an update whose gradient is not finite: stop, skip or ignore.
    nonfinite = "ignore"

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        parity: bool = False,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        keep_layout(model)
        self.model: Any = model
        self.args = args
        self.parity = parity
        self.distillation = distillation
        self.shards: Shards | None = None
        self.forward_cost = forward_cost(model, args.device)
        # Label smoothing takes the place of a model's loss, as in transformers.
        self.has_own_loss = not args.label_smoothing_factor and brings_own_loss(model)
        # Set by the callback bridge, which passes events on to transformers' callbacks, and logs.
        self.tell: Callable[[str], None] | None = None
        # Set by it too: numbers of the rows of a window and of a micro-batch in it.
        self.rows_of: Callable[[int, int], list[int] | None] = lambda window, batch: None

        # transformers.Trainer's own loss.
        self.reference = ReferenceLoss(model, args, type(self)) if parity else None

    # What a task defines.

    @classmethod
    def check_arguments(cls, args: TrainingArguments, changes: dict[str, Any]) -> None:
        """Raise ValueError at an argument that the task cannot follow, given its data."""
        if args.label_smoothing_factor and cls.unsmoothed:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} means nothing to "
                f"{cls.unsmoothed}. Leave it at 0."
            )

    @classmethod
    def load(cls, base: Base, changes: dict[str, Any]) -> Any:
        """The model to train, with what the data decide about its config."""
        return load_model(base, cls.auto_model, changes)

    @classmethod
    def start_head(cls, model: Any, rows: Any) -> None:
        """Give a new head better first weights than random ones, where a task knows any.

        Args:
            model: Just loaded; `new_weights` names what its checkpoint lacked.
            rows: The training rows, tokenized.
        """

    @classmethod
    def each_model(cls, model: Any, change: Callable[[Any], Any]) -> Any:
        """Change a model, or each of those that it is made of."""
        return change(model)

    def count_items(self, batch: Batch) -> Items:
        """Items that the loss of a batch averages over; a vector if it has several parts.

        By default tokens with a label: these three methods are those of the language tasks.
        """
        return int(batch["labels"][:, self.labelled].ne(IGNORE_INDEX).sum())

    def summed_loss(self, outputs: dict[str, Any], batch: Batch) -> Tensor:
        """Loss summed over the items of a batch, float32; a vector if it has several parts."""
        logits, labels = outputs["logits"][:, self.compared], batch["labels"][:, self.labelled]
        return token_loss(logits, labels, self.args.label_smoothing_factor)

    def distance(self, outputs: Any, teacher: Any, batch: Batch, temperature: float) -> Tensor:
        """Distance to the teacher's outputs, summed like the loss."""
        student, taught = (each["logits"][:, self.compared] for each in (outputs, teacher))
        return token_distance(student, taught, batch["labels"][:, self.labelled], temperature)

    def metrics(self, rows: Dataset) -> Any:
        """The task's own metrics: an object with `update(outputs, batch)` and `compute()`.

        Args:
            rows: The rows to evaluate on, before tokenizing; in the order of the batches, if
                `compares_in_turn`.
        """
        raise NotImplementedError

    def prepare(self, batch: Batch, model: Any) -> Batch:
        """What a model is given of a batch, where it needs more than the batch holds."""
        return batch

    @property
    def compared(self) -> slice:
        """Of the tokens, those whose logits are compared with a label."""
        return slice(None, -1) if self.predicts_next else slice(None)

    @property
    def labelled(self) -> slice:
        """Of the labels, those that they are compared with."""
        return slice(1, None) if self.predicts_next else slice(None)

    # Training.

    def forward(self, batch: Batch) -> dict[str, Any]:
        """The model's outputs, without a loss."""
        return self.run_model(self.model, batch)

    def run_model(self, model: Any, batch: Batch) -> dict[str, Any]:
        """Outputs of the model or of its teacher."""
        wanted = forward_inputs(model) - set(self.label_names)
        prepared = self.prepare(batch, inner_model(model))
        inputs = {k: v for k, v in prepared.items() if k in wanted}
        with self.forward_autocast():
            return model(**inputs)

    def configure_model(self) -> None:
        """Shard the model, where the strategy asks for it."""
        # Lightning asks more than once, and load_from_checkpoint without a trainer.
        if self.shards is None and self._trainer is not None:
            self.shards = Shards(self, getattr(self.args, "shard_names", None))

    def setup(self, stage: str) -> None:
        """Refuse processes of which the arguments, that deal the rows, do not know."""
        started, known = self.trainer.world_size, self.args.world_size
        if started != known:
            raise ValueError(
                f"{started} processes run, and the arguments know of {known}: they would share no "
                "rows. Tell them with args.set_ranks(...), or let HFTrainer start the processes."
            )

    def on_fit_start(self) -> None:
        """Put the teacher beside the model, ready to answer."""
        if self.distillation is not None:
            self.distillation.teacher.eval().to(self.device)

    def training_step(self, window: list[Batch] | Batch, batch_idx: int) -> dict[str, Any]:
        """Update the weights once.

        Args:
            window: Micro-batches of the update; a plain Lightning loader may give a single one.
            batch_idx: Number of the window in the epoch.

        Returns:
            `losses` of the micro-batches (they sum to the loss of the window; of several processes
            each has its own, whose mean is that loss), `grad_norm` before clipping, the
            `learning_rate` that was used, `tokens` that were read, `padded_tokens` with the
            padding of their batches, and `computed_tokens` with what is left of it after cutting.
        """
        window = window if isinstance(window, list) else [window]
        self.switch_mode("train")
        losses = []
        tokens: Tensor | int = 0
        computed = 0
        items, times = self._count_everywhere(self._count_window(window))
        update = self.trainer.global_step + 1

        def where(index: int) -> str:
            return place(self.rows_of(batch_idx, index), index, len(window))

        for index, batch in enumerate(window):
            batch_loss = torch.zeros((), device=self.device)
            parts = [batch] if self.parity or self.has_own_loss else self._parts(batch)
            for number, part in enumerate(parts):
                is_last = index == len(window) - 1 and number == len(parts) - 1
                here = partial(where, index)
                failing = explained(self.model, self.args, batch, here, update)
                with failing, gradient_sync(self, is_last):
                    loss = self._window_loss(part, items, len(window)) * (times * counts(batch))
                    every = self.args.torch_empty_cache_steps
                    if every is not None and self.trainer.global_step % every == 0:
                        clear_device_cache()
                    self.manual_backward(loss)
                batch_loss += loss.detach()
                computed += part["input_ids"].numel() * counts(batch)
            losses.append(batch_loss)
            tokens += batch["attention_mask"].sum() * counts(batch)
            if index < len(window) - 1:
                self._tell("on_substep_end")
        padded = sum(batch["input_ids"].numel() * counts(batch) for batch in window)
        norm, problem = self._gradient_norm(), None
        window_loss = torch.stack(losses).sum()
        is_scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if self.nonfinite != "ignore" and not is_scaled:  # a scale finds its size by overflowing
            # The same in all processes.
            world = self.args.world_size
            figure = norm + total(window_loss, world)
            if not torch.isfinite(figure):
                problem = nonfinite_problem(self.model, norm, losses, where, world)
        rate = self._update(problem, update)
        if self.tell is None:  # a plain Lightning Trainer
            self.log_dict({"loss": window_loss, "grad_norm": norm}, sync_dist=True, prog_bar=True)
        read = {"tokens": tokens, "padded_tokens": padded, "computed_tokens": computed}
        return {"losses": losses, **read, "grad_norm": norm, "learning_rate": rate}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log `eval_loss`, for those who run a plain Lightning Trainer."""
        result = self.evaluate_batch(batch)
        weight = int(torch.as_tensor(result.items).max())  # token-detection: of all its tokens
        self.log("eval_loss", result.loss, batch_size=weight, sync_dist=True, prog_bar=True)

    @torch.no_grad()
    def evaluate_batch(self, batch: Batch) -> Evaluated:
        """Loss and outputs of one batch; the caller sets evaluation mode."""
        items = self.count_items(batch)
        if self.reference is not None:
            loss, outputs = self._reference_outputs(batch, self.reference.count([batch]))
            sums = loss * items
        else:
            outputs, sums = self._outputs_and_sums(batch)
            loss = mean_loss(sums, items)
        return Evaluated(loss, sums, items, {k: v for k, v in outputs.items() if k != "loss"})

    def configure_optimizers(self) -> Any:
        """The optimizer and schedule that the arguments name, as transformers builds them."""
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer = make_optimizer(self.model, self.args)
        schedule = make_schedule(optimizer, self.args, steps)
        # The interval is what LearningRateMonitor goes by: Lightning steps nothing here.
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def switch_mode(self, mode: Literal["train", "eval"]) -> None:
        """Put the model into a mode, and with it an optimizer that has modes (schedule-free)."""
        # from_pretrained gives evaluation mode, and Lightning keeps it.
        getattr(self.model, mode)()
        for optimizer in self.trainer.optimizers if self._trainer is not None else []:
            getattr(optimizer, mode, lambda: None)()

    def forward_autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision around the model's forward only, see `hflit.loop.precision`."""
        plugin = getattr(self._trainer, "precision_plugin", None)
        autocast = getattr(plugin, "forward_autocast", None)
        return autocast() if autocast is not None else nullcontext()

    def _gradient_norm(self) -> Tensor:
        """Clip the gradient; its norm before that."""
        limit = self.args.max_grad_norm if self.args.max_grad_norm > 0 else math.inf
        optimizer = cast(LightningOptimizer, self.optimizers())
        precision: Any = self.trainer.precision_plugin
        getattr(precision, "unscale", lambda _: None)(optimizer.optimizer)  # of float16
        # Clipped in the order of the model's parameters, not of the optimizer's groups: the order
        # decides the rounding of the norm.
        if limit < math.inf or self.parity:  # clipping at infinity spreads a NaN to all weights
            norm = clip_grad_norm_(self.model.parameters(), limit)
        else:
            norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm  # of sharded weights

    def _update(self, problem: str | None, number: int) -> float:
        """Step; without a gradient, which moves no weight, if there is a problem with it."""
        optimizer = cast(LightningOptimizer, self.optimizers())
        schedule = cast("LRScheduler | None", self.lr_schedulers())
        if problem is not None and self.nonfinite == "stop":
            raise ValueError(
                f"Update {number} would destroy the weights: {problem}. Lower learning_rate or "
                "max_grad_norm, look at these rows, or leave such updates out with "
                "nonfinite='skip'."
            )
        if problem is not None:
            logger.warning("Update %d is left out: %s.", number, problem)
            optimizer.zero_grad()
            optimizer.step()  # counted
        else:
            self._tell("on_pre_optimizer_step")
            optimizer.step()
            self._tell("on_optimizer_step")
        rate = optimizer.param_groups[0]["lr"]
        skipped = getattr(self.trainer.precision_plugin, "skipped", False)
        if not (skipped or schedule is None or isinstance(schedule, FOLLOWS_EVALUATIONS)):
            schedule.step()
        optimizer.zero_grad()
        return rate

    def _tell(self, event: str) -> None:
        if self.tell is not None:
            self.tell(event)

    def _parts(self, batch: Batch) -> list[Batch]:
        return split_by_length(batch, self.forward_cost, self.places)

    def _reference_outputs(self, batch: Batch, count: Any) -> tuple[Tensor, dict[str, Any]]:
        assert self.reference is not None
        prepared = self.prepare(batch, inner_model(self.model))
        return self.reference.outputs(self.model, prepared, count, self.forward_autocast())

    def _window_loss(self, batch: Batch, items: Items, parts: int) -> Tensor:
        if self.reference is not None:
            loss, _ = self._reference_outputs(batch, items)
            return loss if items is not None else loss / parts
        if not self.has_own_loss and self._heads_left_out:
            return mean_loss(summed_by_chunks(self, batch), items)
        outputs, sums = self._outputs_and_sums(batch)
        if self.distillation is not None:
            alpha, temperature = self.distillation.alpha, self.distillation.temperature
            with torch.no_grad():
                taught = self.teach(batch, outputs)
            distance = self.distance(outputs, taught, batch, temperature)
            sums = (1 - alpha) * sums + alpha * distance
        return mean_loss(sums, items)

    def teach(self, batch: Batch, outputs: Any) -> Any:
        """What the teacher says about a batch."""
        assert self.distillation is not None
        return self.run_model(self.distillation.teacher, batch)

    def _outputs_and_sums(self, batch: Batch) -> tuple[dict[str, Any], Tensor]:
        if self.has_own_loss:
            return own_outputs(self, batch)
        outputs = self(batch)
        return outputs, self.summed_loss(outputs, batch)

    @functools.cached_property
    def _heads_left_out(self) -> bool:
        return heads_left_out(self)

    def _count_window(self, window: list[Batch]) -> Any:
        if self.reference is not None:
            return self.reference.count(window)
        return sum(self.count_items(batch) * counts(batch) for batch in window)

    def _count_everywhere(self, items: Any) -> tuple[Any, int]:
        """Items of all processes, and what makes up for gradients being their mean."""
        world = self.args.world_size
        if world == 1 or items is None or not self.args.average_tokens_across_devices:
            return items, 1
        return total(torch.as_tensor(items, device=self.device), world), world
