"""What a call asks for: its arguments checked against each other, its bases, its data."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

from peft import LoraConfig

from hflit.adapters import check_adapter, lora_config, quantization_config
from hflit.arguments import Arguments, parse
from hflit.checks import raise_all
from hflit.data import DataModule, data_module
from hflit.kinds import kind_problems
from hflit.loading import Base, check_teacher, classifier_names, load_base, resolve_maxlength
from hflit.loop.resume import Checkpoint, find
from hflit.loop.run import Length, run_length, run_record
from hflit.loop.strategies import Processes, check_processes, spread, warn_of_launcher
from hflit.loop.switches import process_switched
from hflit.loop.trackers import make_trackers
from hflit.tasks import TASKS, TaskModule
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


@dataclass(frozen=True)
class Request:
    """A call whose arguments agree with each other. Nothing has been read.

    Attributes:
        given: Its named arguments.
        task_class: The task.
        arguments: Its further keywords.
        flags: Those for the Lightning Trainer.
        adapter: What is learned beside the weights, or None.
        processes: The processes of the run.
    """

    given: dict[str, Any]
    task_class: type[TaskModule]
    arguments: Arguments
    flags: dict[str, Any]
    adapter: LoraConfig | None
    processes: Processes


@dataclass(frozen=True)
class Plan:
    """What a run starts from, before its rows and its weights are read.

    Attributes:
        request: The call.
        start: The base.
        school: The teacher, or None.
        resumed: The checkpoint it goes on from, or None.
        options: What the task is given beside its model, by name.
        data: Its rows.
    """

    request: Request
    start: Base
    school: Base | None
    resumed: Checkpoint | None
    options: dict[str, Any]
    data: DataModule

    def settle(self) -> tuple[dict[str, Any], Length, dict[str, Any]]:
        """Read and tokenize the data, and check all that depends on them.

        Returns:
            Values for the model's config; how long the run is; and what the rest of the run cannot
            change, see `run_record`.

        Raises:
            ValueError: A row is wrong, or the run cannot be made with these data: labels that the
                task, the teacher or the checkpoint do not know, no batch to train on.
        """
        request, data, start = self.request, self.data, self.start
        given, arguments, task_class = request.given, request.arguments, request.task_class
        data.setup()
        changes = data.tokenization.config_changes(start.config)
        task_class.check_arguments(arguments, changes)
        if self.school is not None:
            longest = data.tokenization.maxlength
            check_teacher(self.school, start, task_class.auto_model, changes, longest)
        length = run_length(arguments, request.flags, data)
        record = run_record(
            given, start.config, arguments, request.flags, data, request.adapter, start.quantization
        )
        if self.resumed is not None:
            self.resumed.check(record)
            arguments.learning_rate = self.resumed.found_rate or arguments.learning_rate
            data.start = self.resumed.place(length.windows, arguments.ignore_data_skip)
        return changes, length, record


def read_request(
    given: dict[str, Any], keywords: dict[str, Any], call: Callable[..., Any]
) -> Request:
    """Understand a call.

    Args:
        given: Its named arguments.
        keywords: Its further ones.
        call: What takes them; its annotations tell their kinds.

    Raises:
        TypeError: An argument has an unknown name, or is of another kind.
        ValueError: A value is wrong, or arguments contradict each other.
        ImportError: An argument needs a package that is not installed.
    """
    task_class = check_request(given, call)
    adapter = lora_config(given["lora"], task_class.lora_type)
    arguments, flags = parse(keywords, also=given)
    check_evaluation(arguments, given["validation"], given["metrics"], task_class)
    check_budget(arguments, given["max_tokens_per_batch"], given["parity"])
    with process_switched(arguments):
        processes = spread(flags, arguments.strategy_options())
    check_processes(arguments, processes.world, given["quantize"], given["find_learning_rate"])
    if processes.rank == 0:
        warn_of_launcher(arguments, flags["precision"])
    return Request(given, task_class, arguments, flags, adapter, processes)


def make_plan(request: Request) -> Plan:
    """Find the checkpoint, read configs and tokenizers, and see what kind of data there is.

    Trackers join the callbacks among the flags of the request.

    Raises:
        TypeError: Base, teacher or data are of no kind that is taken.
        ValueError: One of them cannot be used.
        FileNotFoundError: Nothing goes by a name.
        ImportError: A tracker is not installed.
    """
    given, arguments, flags = request.given, request.arguments, request.flags
    resumed = find(given["checkpoint"], arguments)
    if resumed is not None:
        resumed.keep_batch_size(arguments)
    flags["callbacks"] = [*make_trackers(arguments), *flags["callbacks"]]
    quantization = quantization_config(given["quantize"], arguments.device)
    trusted = given["trust_remote_code"]
    start = replace(
        load_base(given["base"], trusted),
        quantization=quantization,
        device=arguments.device,
        is_adapted=request.adapter is not None,
    )
    if quantization is not None and hasattr(start.config, "quantization_config"):
        warnings.warn("base is quantized already; quantize= changes nothing.", stacklevel=3)
        start = replace(start, quantization=None)
    teacher = given["teacher"]
    school = None if teacher is None else load_base(teacher, trusted, "teacher")
    options, data = read_data(start, request.task_class, given, arguments)
    return Plan(request, start, school, resumed, options, data)


def check_request(given: dict[str, Any], call: Callable[..., Any]) -> type[TaskModule]:
    """The task that a call names.

    Args:
        given: The arguments of the call, by name.
        call: What takes them; its annotations tell their kinds.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: Arguments contradict each other.
    """
    raise_all(TypeError, kind_problems(given, get_type_hints(call)))
    task = given["task"]
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}. Choose one of: {', '.join(TASKS)}.")
    for name, default in OPTIONS.items():
        taken = (*TASKS[task].options, *TASKS[task].tokenization.options)
        if given[name] != default and name not in taken:
            raise ValueError(f"{name}={given[name]!r} means nothing to {task}.")
    pair = given["distillation"]
    are_numbers = isinstance(pair, (tuple, list)) and all(isinstance(n, (int, float)) for n in pair)
    if not are_numbers or len(pair) != 2 or pair[0] <= 0 or not 0 <= pair[1] <= 1:
        raise ValueError(
            f"distillation={pair!r} must be a temperature above 0 and a share of "
            "the teacher from 0 to 1."
        )
    if given["teacher"] is not None and given["parity"]:
        raise ValueError("parity=True does what transformers.Trainer does, and it has no teacher.")
    named = ("base", "quantize", "lora", "merge_adapter", "parity")
    check_adapter(*(given[name] for name in named))
    metrics = given["metrics"]
    if not (metrics is None or metrics == "auto" or callable(metrics)):
        raise ValueError(f"{metrics=} must be a function, 'auto' or None.")
    choices = {"nonfinite": (None, *NONFINITE), "failed_save": ("continue", "stop")}
    for name, known in choices.items():
        if given[name] not in known:
            told = ", ".join(each for each in known if each)
            raise ValueError(f"Unknown {name}={given[name]!r}. Choose one of: {told}.")
    if given["tokenizers"] is not None and given["tokenizers"] < 0:
        raise ValueError(f"tokenizers={given['tokenizers']} must be a number of processes or True.")
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


def check_evaluation(
    args: Arguments, validation: Any, metrics: Any, task_class: type[TaskModule]
) -> None:
    """Raise ValueError if arguments about evaluation have nothing to work on."""
    if validation is None and (args.eval_strategy != "no" or args.eval_on_start):
        raise ValueError("eval_strategy and eval_on_start evaluate on validation=: pass it.")
    best = args.metric_for_best_model
    if best is not None and validation is not None:
        check_figure(f"metric_for_best_model={best!r}", best, metrics, task_class)
    if (
        args.batch_eval_metrics
        and callable(metrics)
        and "compute_result" not in inspect.signature(metrics).parameters
    ):
        raise ValueError(
            "batch_eval_metrics=True calls metrics after each batch: it must take compute_result, "
            "which is True after the last one."
        )


def check_figure(asked: str, name: str, metrics: Any, task_class: type[TaskModule]) -> None:
    """Raise ValueError if an evaluation gives no figure of this name; a function may give any."""
    own = task_class.figures if metrics == "auto" else ()
    if callable(metrics) or name.removeprefix("eval_") in (*OWN_FIGURES, *own):
        return
    if metrics is None:
        raise ValueError(
            f"{asked} needs metrics=: without, an evaluation gives {', '.join(OWN_FIGURES)}."
        )
    raise ValueError(
        f"{asked} is not among the figures that metrics='auto' may give: {', '.join(own)}, "
        f"{', '.join(OWN_FIGURES)}."
    )


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
        What the task is given beside its model, by name, and the data module.
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
    return {name: options[name] for name in task_class.options}, data
