"""HFTrainer: one run, told top to bottom."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.trainer_utils import align_special_tokens

from hflit.arguments import Arguments, parse
from hflit.artifacts import save_artifacts
from hflit.data import DataModule, data_module
from hflit.loading import check_teacher, classifier_names, load_base, resolve_maxlength
from hflit.loop.bridge import Bridge
from hflit.loop.evaluation import evaluate
from hflit.loop.precision import ForwardPrecision
from hflit.loop.progress import ProgressBar
from hflit.tasks import TASKS, TaskModule
from hflit.tasks.distillation import Distillation

# Arguments of the call that only some tasks or their tokenization take, and their defaults.
OPTIONS = {
    "stride": 128,
    "prefix": None,
    "merge": "concat",
    "whole_word": False,
    "skip_misaligned": False,
    "target_maxlength": None,
    "generation_max_length": None,
    "generation_num_beams": None,
}
# Arguments of the call that are accepted already and built later.
PENDING = ("checkpoint", "quantize", "lora")


class HFTrainer:
    """Fine-tunes any Hugging Face transformer in one call.

    After a call, `state` is the `TrainerState` of the run (`global_step`, `log_history`,
    `best_metric`, ...), `metrics` its last `train_*` and `eval_*` figures, and `lightning` the
    Lightning Trainer that ran it.
    """

    state: TrainerState
    metrics: dict[str, float]
    lightning: L.Trainer

    def __call__(
        self,
        base: Any,
        train: Any,
        validation: Any = None,
        columns: str | tuple[str | None, ...] | None = None,
        maxlength: int | None = None,
        stride: int = 128,
        task: str = "text-classification",
        prefix: str | None = None,
        metrics: Callable[..., dict[str, Any]] | str | None = None,
        tokenizers: int | bool | None = None,
        checkpoint: bool | str | None = None,
        quantize: Any = None,
        lora: Any = None,
        merge: str | None = "concat",
        teacher: Any = None,
        distillation: tuple[float, float] = (1.0, 0.5),
        tokenizebatch: int = 1000,
        parity: bool = False,
        cache: bool = True,
        whole_word: bool = False,
        skip_misaligned: bool = False,
        target_maxlength: int | None = None,
        generation_max_length: int | None = None,
        generation_num_beams: int | None = None,
        **args: Any,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Train a model on labelled rows.

        Args:
            base: Hub id, local folder, or `(model, tokenizer)`, which is trained in place.
            train: Rows to learn from: `datasets.Dataset`, `IterableDataset` (with `max_steps`) or
                `DatasetDict`, pandas or polars DataFrame, iterable of dicts.
            validation: Rows to evaluate on, the same kinds; None for no evaluation.
            columns: Column names by task; for text-classification text, second text or None,
                label.
            maxlength: Longest row in tokens; by default what tokenizer and model can take.
            stride: Tokens shared by neighbouring windows of a long context (question-answering).
            task: Name of the task.
            prefix: Put before each source (sequence-sequence).
            metrics: Function from `transformers.EvalPrediction` to a dict, or `"auto"` for the
                task's own metrics.
            tokenizers: Processes that tokenize; True for one per core.
            checkpoint: Not built yet.
            quantize: Not built yet.
            lora: Not built yet.
            merge: How texts fill rows (language tasks).
            teacher: Model to distil from, given as `base` is: one of the same task, vocabulary and
                classes.
            distillation: Temperature of the teacher, and its share of the loss from 0 to 1.
            tokenizebatch: Rows tokenized at a time. Never changes the result.
            parity: Run exactly the operations of `transformers.Trainer`, bit for bit.
            cache: Keep tokenized rows in the Hugging Face data sets cache; False keeps them in
                memory only.
            skip_misaligned: Leave out rows whose answer is not in the context where it should be;
                otherwise they are an error (question-answering).
            whole_word: Mask all tokens of a word or none (language-modeling, token-detection).
            target_maxlength: Longest target in tokens (sequence-sequence); by default what
                tokenizer and model can take.
            generation_max_length: Longest text in tokens that `metrics="auto"` generates
                (sequence-sequence); by default what the model's generation config says, else 128.
            generation_num_beams: Beams of that search; by default what the model's generation
                config says, else 1.
            args: Fields of `transformers.TrainingArguments` and flags of the Lightning Trainer.

        Returns:
            The trained model, in evaluation mode, and its tokenizer.

        Raises:
            TypeError: An argument has an unknown name, or data of an unknown kind.
            ValueError: An argument, a column, a label or a row is wrong; raised before any weight
                is loaded.
            NotImplementedError: The argument belongs to a feature that is not built yet.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "args")}
        task_class = _check_request(given)
        arguments, flags = parse(args, also=given)
        if validation is None and (arguments.eval_strategy != "no" or arguments.eval_on_start):
            raise ValueError("eval_strategy and eval_on_start evaluate on validation=: pass it.")

        with _log_level(arguments):
            start = load_base(base)
            options = {
                **given,
                "head": classifier_names(start),
                "tokenizer": start.tokenizer,
            }
            if "target_maxlength" in task_class.options:
                options["target_maxlength"] = resolve_maxlength(
                    target_maxlength, start, "target_maxlength"
                )
            tokenization = task_class.tokenization(
                start.tokenizer,
                columns,
                resolve_maxlength(maxlength, start),
                **{name: options[name] for name in task_class.tokenization.options},
                **task_class.tokenization_settings,
            )
            data = data_module(
                train,
                validation,
                tokenization=tokenization,
                args=arguments,
                tokenizers=os.cpu_count() if tokenizers is True else tokenizers or None,
                tokenizebatch=tokenizebatch,
                cache=cache,
                parity=parity,
            )
            data.setup()
            length = _length(arguments, flags, data)

            changes = tokenization.config_changes(start.config)
            task_class.check_arguments(arguments, changes)
            school = None if teacher is None else load_base(teacher)
            if school is not None:
                check_teacher(school, start, task_class.auto_model, changes)

            set_seed(arguments.seed)
            model = task_class.load(start, changes)
            align_special_tokens(model, start.tokenizer)
            own = {name: options[name] for name in task_class.options}
            if school is not None:
                own["distillation"] = Distillation(task_class.load(school, {}), *distillation)
            module = task_class(model, arguments, parity, **own)
            bridge, trainer = _lightning(arguments, flags, length, module, data, metrics)

            model.train()
            set_seed(arguments.seed)
            with _cache_switched(model.config, arguments.use_cache):
                trainer.fit(module, data)

            self.lightning, self.state, self.metrics = trainer, bridge.state, bridge.metrics
            model.eval()
            if arguments.output_dir and arguments.should_save:
                save_artifacts(
                    arguments.output_dir, model, start.tokenizer, bridge.state, arguments
                )
        return model, start.tokenizer


def _check_request(given: dict[str, Any]) -> type[TaskModule]:
    task = given["task"]
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}. Choose one of: {', '.join(TASKS)}.")
    for name, default in OPTIONS.items():
        taken = (*TASKS[task].options, *TASKS[task].tokenization.options)
        if given[name] != default and name not in taken:
            raise ValueError(f"{name}={given[name]!r} means nothing to {task}.")
    temperature, alpha = given["distillation"]
    if temperature <= 0 or not 0 <= alpha <= 1:
        raise ValueError(
            f"distillation={given['distillation']!r} must be a temperature above 0 and a share of "
            "the teacher from 0 to 1."
        )
    if given["teacher"] is not None and given["parity"]:
        raise ValueError("parity=True does what transformers.Trainer does, and it has no teacher.")
    pending = [name for name in PENDING if given[name] not in (None, False)]
    if pending:
        raise NotImplementedError(f"Not built yet: {', '.join(f'{name}=' for name in pending)}.")
    if (
        given["metrics"] is not None
        and given["metrics"] != "auto"
        and not callable(given["metrics"])
    ):
        raise ValueError(f"metrics={given['metrics']!r} must be a function, 'auto' or None.")
    for name in ("tokenizebatch", "generation_max_length", "generation_num_beams"):
        if given[name] is not None and given[name] < 1:
            raise ValueError(f"{name}={given[name]} must be at least 1.")
    return TASKS[task]


def _lightning(
    args: Arguments,
    flags: dict[str, Any],
    length: tuple[int, int],
    module: TaskModule,
    data: DataModule,
    metrics: Callable[..., dict[str, Any]] | str | None,
) -> tuple[Bridge, L.Trainer]:
    """The Lightning Trainer of a run, and the bridge to transformers' callbacks inside it."""
    callbacks = flags.pop("callbacks")
    run_evaluation = None
    if data.data["validation"] is not None:

        def run_evaluation(on_batch: Callable[[], None]) -> dict[str, float]:
            own: Any = metrics
            if metrics == "auto":
                own = module.metrics(data.rows["validation"])
            return evaluate(module, data.val_dataloader(), args, own, on_batch)

    theirs = [callback for callback in callbacks if isinstance(callback, TrainerCallback)]
    bridge = Bridge(args, module, data.tokenization.tokenizer, theirs, run_evaluation)
    lightning: list[Any] = [c for c in callbacks if not isinstance(c, TrainerCallback)]
    show = flags.setdefault("enable_progress_bar", sys.stderr.isatty() and not args.disable_tqdm)
    if show:
        lightning.append(ProgressBar())
    if flags["precision"] in ("bf16-mixed", "16-mixed"):
        plugin = ForwardPrecision(flags.pop("precision"), "cuda" if not args.use_cpu else "cpu")
        flags["plugins"] = [plugin, *_listed(flags.get("plugins"))]
    epochs, steps = length
    return bridge, L.Trainer(
        **flags, callbacks=[bridge, *lightning], max_epochs=epochs, max_steps=steps
    )


def _length(args: Arguments, flags: dict[str, Any], data: DataModule) -> tuple[int, int]:
    """Epochs and updates of the run; a stream has no epochs to count (-1)."""
    try:
        windows = len(data.train_dataloader())
    except TypeError:
        return -1, args.max_steps
    limit = flags.get("limit_train_batches")
    if limit is not None:
        windows = min(windows, limit) if isinstance(limit, int) else int(windows * limit)
    if windows == 0:
        raise ValueError(
            "No batch is left to train on: see dataloader_drop_last and limit_train_batches."
        )
    if args.max_steps > 0:
        return math.ceil(args.max_steps / windows), args.max_steps
    return math.ceil(args.num_train_epochs), math.ceil(args.num_train_epochs * windows)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


@contextmanager
def _log_level(args: Arguments) -> Iterator[None]:
    """Let `log_level` rule what transformers and Lightning say, for the time of the run."""
    theirs = [logging.getLogger(name) for name in ("lightning.pytorch", "transformers")]
    before = [each.level for each in theirs]
    for each in theirs:
        each.setLevel(args.get_process_log_level())
    try:
        with warnings.catch_warnings():
            # Lightning 2.6 asks torch for an old spelling at every fit; drop when it does not.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        for each, level in zip(theirs, before, strict=True):
            each.setLevel(level)


@contextmanager
def _cache_switched(config: Any, use_cache: bool) -> Iterator[None]:
    """Follow `use_cache` while training; what is saved keeps the model's own value."""
    before = getattr(config, "use_cache", None)
    config.use_cache = use_cache
    try:
        yield
    finally:
        if before is None:
            del config.use_cache
        else:
            config.use_cache = before
