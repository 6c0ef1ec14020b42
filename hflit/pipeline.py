"""HFTrainer: one run, told top to bottom."""

from __future__ import annotations

import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, get_type_hints

import datasets
import lightning.pytorch as L
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.trainer_utils import align_special_tokens, enable_full_determinism

from hflit.adapters import (
    add_adapter,
    check_adapter,
    lora_config,
    merged,
    quantization_config,
    weight_figures,
)
from hflit.arguments import Arguments, parse
from hflit.artifacts import save_artifacts
from hflit.checks import raise_all
from hflit.data import DataModule, data_module
from hflit.kinds import kind_problems
from hflit.loading import Base, check_teacher, classifier_names, load_base, resolve_maxlength
from hflit.loop.bridge import Bridge
from hflit.loop.checkpoints import Checkpoints
from hflit.loop.evaluation import evaluate
from hflit.loop.finders import find_rate
from hflit.loop.hub import HubUpload
from hflit.loop.memory import fit_in_memory
from hflit.loop.precision import set_precision
from hflit.loop.progress import ProgressBar
from hflit.loop.resume import FIXED_ARGUMENTS, find, load_weights
from hflit.loop.stops import Stops
from hflit.loop.strategies import Processes, check_processes, run_in_processes, spread
from hflit.loop.switches import model_switched, process_switched
from hflit.loop.trackers import make_trackers
from hflit.predict import predictions
from hflit.ranks import from_first
from hflit.report.card import write_card
from hflit.report.facts import data_facts, run_facts
from hflit.saved import Saved, save_run
from hflit.tasks import TASKS, TaskModule
from hflit.tasks.distillation import Distillation
from hflit.tasks.failures import NONFINITE

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


# Figures of an evaluation without metrics.
OWN_FIGURES = ("loss", "runtime", "samples_per_second", "steps_per_second")


class HFTrainer:
    """Fine-tunes any Hugging Face transformer in one call.

    After a call, `state` is the `TrainerState` of the run (`global_step`, `log_history`,
    `best_metric`, ...), `metrics` its last `train_*` and `eval_*` figures, and `lightning` the
    Lightning Trainer that ran it, but where the call started processes of their own for it.
    `predict` asks the trained model.
    """

    state: TrainerState
    metrics: dict[str, float]
    lightning: L.Trainer
    saved: Saved

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
        checkpoint: bool | str | os.PathLike[str] | None = None,
        quantize: Any = None,
        lora: Any = None,
        merge_adapter: bool = False,
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
        nonfinite: str | None = None,
        failed_save: str = "continue",
        trust_remote_code: bool = False,
        max_tokens_per_batch: int | None = None,
        find_learning_rate: bool = False,
        **args: Any,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Train a model on labelled rows.

        Args:
            base: Hub id, local folder, or `(model, tokenizer)`, which is trained in place; with
                `lora` it stays as it is.
            train: Rows to learn from: `datasets.Dataset`, `IterableDataset` (with `max_steps`) or
                `DatasetDict`, pandas or polars DataFrame, iterable of dicts; or the name of a file
                (csv, tsv, json, jsonl, parquet, arrow, txt), a folder or a data set of the Hub; or
                one of these as `path` of a dict with keywords of `datasets.load_dataset`.
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
            checkpoint: Go on from this `checkpoint-N` folder, as if the run had never stopped; True
                for the newest whole one in `output_dir`.
            quantize: Load the base with quantized weights, on a CPU too: True for 4 bits (nf4,
                quantized twice), a dict to change that (`{"load_in_8bit": True}`), or a
                `transformers.BitsAndBytesConfig`. Quantized weights do not learn.
            lora: Learn low-rank changes of the weights, and the head of the task in full: True
                for r=16, alpha=8 and dropout 0.05 on all linear layers, a dict to change that, or
                a `peft.LoraConfig`. Returns and saves a `PeftModel`.
            merge_adapter: Add what LoRA learned to the weights at the end, for a plain model.
                Quantized weights become floats for that, as rounded as they were in training.
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
            nonfinite: What becomes of an update whose loss or gradient is NaN or infinite:
                `"stop"`, an error that names the update and its rows while the weights are still
                good; `"skip"`, a warning, and the weights stay as they are; `"ignore"`, NaN in all
                weights. By default stop, and ignore with parity, as transformers does.
            failed_save: What becomes of the run when a checkpoint cannot be written: `"continue"`
                with a warning, or `"stop"`. Earlier checkpoints stay whole.
            trust_remote_code: Run the code that comes with the base or the teacher, where
                transformers has none for their kind of model. Read that code first.
            max_tokens_per_batch: Train on batches of rows of like length, as many as hold at most
                so many tokens with their padding (sequence-sequence: of the source), in place of
                `per_device_train_batch_size` rows.
            find_learning_rate: Begin with a range test of up to 100 updates, and train from the
                first weights with the learning rate at which the loss fell fastest, in place
                of `learning_rate`.
            args: Fields of `transformers.TrainingArguments` and flags of the Lightning Trainer.

        Returns:
            The trained model, in evaluation mode, and its tokenizer.

        Raises:
            TypeError: An argument has an unknown name, or data of an unknown kind.
            ValueError: An argument, a column, a label or a row is wrong. This and the others are
                raised before any weight is loaded.
            FileNotFoundError: No model, file or data set goes by a name.
            ImportError: An argument needs a package that is not installed.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "args")}
        task_class = check_request(given)
        adapter = lora_config(lora, task_class.lora_type)
        arguments, flags = parse(args, also=given)
        check_evaluation(arguments, validation, metrics)
        check_budget(arguments, max_tokens_per_batch, parity)
        if find_learning_rate and checkpoint:
            raise ValueError(
                "find_learning_rate=True is for a new run; one that goes on has its learning rate."
            )
        with process_switched(arguments):
            processes = spread(flags, arguments.strategy_options())
        check_processes(arguments, processes.world, quantize, find_learning_rate)
        if processes.start is not None:
            return self._call_in_processes(processes, given, args)
        arguments.set_ranks(*processes[:3])
        resumed = find(checkpoint, arguments)
        quantization = quantization_config(quantize, arguments.device)
        hub = HubUpload()
        flags["callbacks"] = [
            *make_trackers(arguments),
            *flags["callbacks"],
            *([hub] if arguments.push_to_hub else []),
        ]
        seed = enable_full_determinism if arguments.full_determinism else set_seed

        with process_switched(arguments):
            start = replace(
                load_base(base, trust_remote_code),
                quantization=quantization,
                device=arguments.device,
                is_adapted=adapter is not None,
            )
            if quantization is not None and hasattr(start.config, "quantization_config"):
                warnings.warn("base is quantized already; quantize= changes nothing.", stacklevel=2)
                start = replace(start, quantization=None)
            options, data = read_data(start, task_class, given, arguments)
            data.setup()
            length = run_length(arguments, flags, data)
            run = {"task": task, "model": start.config.model_type, **_run(arguments, data)}
            if resumed is not None:
                resumed.check(run)
                data.start = resumed.place(length.windows, arguments.ignore_data_skip)

            changes = data.tokenization.config_changes(start.config)
            task_class.check_arguments(arguments, changes)
            school = None if teacher is None else load_base(teacher, trust_remote_code)
            if school is not None:
                check_teacher(school, start, task_class.auto_model, changes)

            seed(arguments.seed)
            model = task_class.load(start, changes)
            if not parity:
                task_class.start_head(model, data.tokens["train"])
            align_special_tokens(model, start.tokenizer)
            if adapter is not None:
                model = task_class.each_model(model, partial(add_adapter, config=adapter))
            own = {name: options[name] for name in task_class.options}
            if school is not None:
                own["distillation"] = Distillation(task_class.load(school, {}), *distillation)
            module = task_class(model, arguments, parity, **own)
            if resumed is not None:
                load_weights(model, resumed.folder)
            if find_learning_rate:  # by rates that end in losses without a value
                with model_switched(model, arguments, parity):
                    arguments.learning_rate = find_rate(module, data, flags)
            module.nonfinite = nonfinite or ("ignore" if parity else "stop")
            seed(arguments.seed)
            stops = Stops()

            def fit() -> tuple[Bridge, L.Trainer]:
                length = run_length(arguments, flags, data)
                checkpoints = Checkpoints(
                    arguments, model, start.tokenizer, run, resumed, failed_save
                )
                bridge, trainer = _lightning(
                    arguments, {**flags}, length, module, data, metrics, checkpoints, stops
                )
                bridge.metrics.update(weight_figures(model))
                model.train()
                model.zero_grad()
                if not parity:  # after a lack of memory transformers goes on with its numbers
                    seed(arguments.seed)
                trainer.fit(module, data)
                return bridge, trainer

            with stops.noted():
                with model_switched(model, arguments, parity):
                    bridge, trainer = fit_in_memory(fit, model, arguments)

                self.lightning, self.state, self.metrics = trainer, bridge.state, bridge.metrics
                if merge_adapter:
                    model = task_class.each_model(model, merged)
                model.eval()
                facts = run_facts(HFTrainer.__call__, given, args, data, arguments.seed)
                self.saved = Saved(task, model, start.tokenizer, facts)
                if arguments.should_save:
                    folder = arguments.output_dir or ""
                    save_artifacts(folder, model, start.tokenizer, bridge.state, arguments)
                    facts["splits"] = {split: data_facts(data, split) for split in data.tokens}
                    save_run(folder, facts)
                    write_card(folder, facts, self.state.log_history, self.metrics)
                    hub.finish(arguments)
                from_first(None, processes.world)  # all of output_dir is there
        return model, start.tokenizer

    def _call_in_processes(
        self, processes: Processes, given: dict[str, Any], args: dict[str, Any]
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The same call in new processes; the first of them tells how it went."""
        told = run_in_processes(processes, type(self), {**given, **args})
        model, tokenizer, self.state, self.metrics, settings = told
        base = given["base"]
        if isinstance(base, (list, tuple)) and not given["lora"]:
            trained = model
            model = base[0].eval()
            model.config = trained.config
            model.load_state_dict(trained.state_dict())
        self.saved = Saved(given["task"], model, tokenizer, settings)
        return model, tokenizer

    def predict(
        self, rows: Any, columns: list[str] | None = None, batch_size: int = 32
    ) -> list[dict[str, Any]]:
        """What the trained model says about each row, in their order; see `predictions`.

        Args:
            rows: What the call takes as `train`; labels are not read.
            columns: Columns of text; by default those of the training rows.
            batch_size: Rows that the model reads at a time.
        """
        return list(predictions(self.saved, rows, columns, batch_size))


def read_data(
    start: Base, task_class: type[TaskModule], given: dict[str, Any], args: Arguments
) -> tuple[dict[str, Any], DataModule]:
    """The data of a run, which nothing has been read of yet.

    Args:
        start: What the run starts from.
        task_class: Its task.
        given: The arguments of the call, by name.
        args: Batch sizes, seeds and loader options.

    Returns:
        What the task and its tokenization can be given, by name, and the data module.
    """
    options = {**given, "head": classifier_names(start), "tokenizer": start.tokenizer}
    if "target_maxlength" in task_class.options:
        options["target_maxlength"] = resolve_maxlength(
            given["target_maxlength"], start, "target_maxlength"
        )
    tokenization = task_class.tokenization(
        start.tokenizer,
        given["columns"],
        resolve_maxlength(given["maxlength"], start),
        **{name: options[name] for name in task_class.tokenization.options},
        **task_class.tokenization_settings,
    )
    tokenizers = given["tokenizers"]
    data = data_module(
        given["train"],
        given["validation"],
        tokenization=tokenization,
        args=args,
        tokenizers=os.cpu_count() if tokenizers is True else tokenizers or None,
        **{
            name: given[name]
            for name in ("tokenizebatch", "cache", "parity", "max_tokens_per_batch")
        },
    )
    return options, data


def check_request(given: dict[str, Any]) -> type[TaskModule]:
    """The task that a call names; ValueError if its arguments contradict each other."""
    raise_all(TypeError, kind_problems(given, get_type_hints(HFTrainer.__call__)))
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
    named = ("base", "quantize", "lora", "merge_adapter", "parity")
    check_adapter(*(given[name] for name in named))
    if (
        given["metrics"] is not None
        and given["metrics"] != "auto"
        and not callable(given["metrics"])
    ):
        raise ValueError(f"metrics={given['metrics']!r} must be a function, 'auto' or None.")
    choices = {"nonfinite": (None, *NONFINITE), "failed_save": ("continue", "stop")}
    for name, known in choices.items():
        if given[name] not in known:
            told = ", ".join(each for each in known if each)
            raise ValueError(f"Unknown {name}={given[name]!r}. Choose one of: {told}.")
    counts = ("tokenizebatch", "generation_max_length", "generation_num_beams")
    for name in (*counts, "max_tokens_per_batch"):
        if given[name] is not None and given[name] < 1:
            raise ValueError(f"{name}={given[name]} must be at least 1.")
    return TASKS[task]


def check_budget(args: Arguments, tokens: int | None, parity: bool) -> None:
    """Raise ValueError if something else than `max_tokens_per_batch` makes the batches too."""
    config: Any = args.accelerator_config
    others = {
        f"train_sampling_strategy={args.train_sampling_strategy!r}": args.train_sampling_strategy
        not in (None, "random"),
        "parity=True": parity,
        "auto_find_batch_size=True": args.auto_find_batch_size,
        "split_batches=True": config.split_batches,
    }
    named = [name for name, is_given in others.items() if is_given]
    if tokens is not None and named:
        raise ValueError(
            f"max_tokens_per_batch={tokens} makes batches its own way, and so does "
            f"{' and '.join(named)}. Choose one."
        )


def check_evaluation(args: Arguments, validation: Any, metrics: Any) -> None:
    """Raise ValueError if arguments about evaluation have nothing to work on."""
    if validation is None and (args.eval_strategy != "no" or args.eval_on_start):
        raise ValueError("eval_strategy and eval_on_start evaluate on validation=: pass it.")
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if metrics is None and validation is not None and best not in OWN_FIGURES:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} needs metrics=: without, an "
            f"evaluation gives {', '.join(OWN_FIGURES)}."
        )
    if (
        args.batch_eval_metrics
        and callable(metrics)
        and "compute_result" not in inspect.signature(metrics).parameters
    ):
        raise ValueError(
            "batch_eval_metrics=True calls metrics after each batch: it must take compute_result, "
            "which is True after the last one."
        )


def _lightning(
    args: Arguments,
    flags: dict[str, Any],
    length: Length,
    module: TaskModule,
    data: DataModule,
    metrics: Callable[..., dict[str, Any]] | str | None,
    checkpoints: Checkpoints,
    stops: Stops,
) -> tuple[Bridge, L.Trainer]:
    """The Lightning Trainer of a run, and the bridge to transformers' callbacks inside it."""
    callbacks = flags.pop("callbacks")
    run_evaluation = None
    if data.data["validation"] is not None:

        def run_evaluation(on_batch: Callable[[], None]) -> dict[str, float]:
            own: Any = metrics
            if metrics == "auto":
                own = module.metrics(data.rows["validation"])
            limit = flags.get("limit_val_batches")
            return evaluate(module, data.val_dataloader(), args, own, on_batch, limit)

    theirs = [callback for callback in callbacks if isinstance(callback, TrainerCallback)]
    tokenizer = data.tokenization.tokenizer
    bridge = Bridge(args, module, tokenizer, checkpoints, stops, theirs, run_evaluation)
    lightning: list[Any] = [c for c in callbacks if not isinstance(c, TrainerCallback)]
    show = flags.setdefault("enable_progress_bar", sys.stderr.isatty() and not args.disable_tqdm)
    if show:
        lightning.append(ProgressBar())
    set_precision(flags, args)
    return bridge, L.Trainer(
        **flags,
        callbacks=[bridge, *lightning],
        max_epochs=length.epochs,
        max_steps=length.steps,
        log_every_n_steps=1,  # the bridge logs; at 50 Lightning warns of each shorter epoch
    )


class Length(NamedTuple):
    """How long a run is.

    Attributes:
        windows: In an epoch; 0 for a stream, whose length is not known.
        epochs: Passes over the rows; -1 for a stream, which is read again until the last update.
        steps: Updates.
    """

    windows: int
    epochs: int
    steps: int


def run_length(args: Arguments, flags: dict[str, Any], data: DataModule) -> Length:
    """How long a run on some data is.

    Raises:
        ValueError: No batch is left to train on.
    """
    try:
        windows = len(data.train_dataloader())
    except TypeError:
        return Length(0, -1, args.max_steps)
    limit = flags.get("limit_train_batches")
    if limit is not None:
        windows = min(windows, limit) if isinstance(limit, int) else int(windows * limit)
    if windows == 0:
        raise ValueError(
            "No batch is left to train on: see dataloader_drop_last and limit_train_batches."
        )
    if args.max_steps > 0:
        return Length(windows, math.ceil(args.max_steps / windows), args.max_steps)
    steps = math.ceil(args.num_train_epochs * windows)
    return Length(windows, math.ceil(args.num_train_epochs), steps)


def _run(args: Arguments, data: DataModule) -> dict[str, Any]:
    """What the rest of a run cannot change, in the words of the call."""
    rows, values = data.tokens["train"], args.to_dict()
    config: Any = args.accelerator_config
    batches = args.gradient_accumulation_steps * (1 if config.split_batches else args.world_size)
    is_stream = not isinstance(rows, datasets.Dataset)  # each worker reads its own part of it
    return {
        "maxlength": data.tokenization.maxlength,
        "rows": None if is_stream else len(rows),
        "data": data.digest(),
        "processes": args.world_size,
        "rows_per_update": args.per_device_train_batch_size * batches,
        **({"dataloader_num_workers": args.dataloader_num_workers} if is_stream else {}),
        "max_tokens_per_batch": data.max_tokens_per_batch,
        **{name: values[name] for name in FIXED_ARGUMENTS},
    }
