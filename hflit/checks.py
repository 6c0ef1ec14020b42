"""Values of arguments that are refused, with what to use instead; imports `kinds` alone."""

import dataclasses
import difflib
import importlib.util
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import GradientAccumulationPlugin
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames, trainer_log_levels

from hflit.kinds import range_problems

CHOICES: dict[str, list[Any]] = {
    "optim": [member.value for member in OptimizerNames],
    "lr_scheduler_type": [member.value for member in SchedulerType],
    "logging_strategy": [member.value for member in IntervalStrategy],
    "eval_strategy": [member.value for member in IntervalStrategy],
    "save_strategy": [member.value for member in SaveStrategy],
    "hub_strategy": [member.value for member in HubStrategy],
    "train_sampling_strategy": ["random", "sequential", "group_by_length", "batch_rebalance"],
    "log_level": list(trainer_log_levels),
    "log_level_replica": list(trainer_log_levels),
    "include_num_input_tokens_seen": ["no", "all", "non_padding", True, False],
}
FEW = 15  # choices that an error lists all of
FOREIGN_OPTIMIZERS = {
    "lomo": "updates weights inside its own backward pass",
    "adalomo": "updates weights inside its own backward pass",
    "adamw_torch_xla": "needs a TPU",
    "adamw_torch_npu_fused": "needs an Ascend NPU",
}
# How the names of optimizers begin -> the package that has them, and what to install.
OPTIMIZER_PACKAGES = {
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_anyprecision": ("torchdistx", "git+https://github.com/pytorch/torchdistx"),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), ("torchao", "torchao")),
    **dict.fromkeys(
        ("adamw_bnb", "adamw_8bit", "ademamix", "lion", "paged", "rmsprop_bnb"),
        ("bitsandbytes", "bitsandbytes"),
    ),
}
OPTIMIZERS_WITHOUT_OPTIONS = (
    *("adamw_torch", "adamw_torch_fused", "adafactor", "adamw_8bit", "adamw_bnb_8bit"),
    *("paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "lion_32bit"),
    *("paged_lion_8bit", "paged_lion_32bit"),
)
# Options of an upload, and the values that ask for nothing.
HUB_OPTIONS = {
    "hub_model_id": None,
    "hub_strategy": "every_save",
    "hub_private_repo": None,
    "hub_always_push": False,
    "hub_revision": None,
}

# Settings of fsdp_config, and the values that can be; None where all can.
SHARDING: dict[str, tuple[Any, ...] | None] = {
    "version": (2,),
    "transformer_layer_cls_to_wrap": None,
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
    "reshard_after_forward": (False,),  # weights stay gathered for all parts of an update
    "state_dict_type": ("SHARDED_STATE_DICT", "FULL_STATE_DICT"),  # of the optimizer
    "activation_checkpointing": (False,),
    "cpu_offload": (False,),
    "cpu_ram_efficient_loading": (False,),
}


def check(values: Mapping[str, Any]) -> None:
    """Refuse what cannot be done, and what transformers would take in silence and do otherwise.

    Raises:
        ValueError: Some values are wrong; all of them are named.
        ImportError: A value needs a package that is not installed.
    """
    plain = {name: getattr(value, "value", value) for name, value in values.items()}  # of enums
    get = plain.get
    problems = [
        f"Unknown {name}={plain[name]!r}. {_advice(plain[name], choices)}"
        for name, choices in CHOICES.items()
        if name in plain and plain[name] not in choices
    ]
    problems += range_problems(plain)

    def refuse(wrong: Any, message: str) -> None:
        if wrong:
            problems.append(message)

    optim, schedule = f"{get('optim')}", get("lr_scheduler_type")
    options, modules, wanted = map(
        get, ("optim_args", "optim_target_modules", "include_for_metrics")
    )
    best = get("save_strategy") == "best" or get("load_best_model_at_end")
    for name in ("save_strategy", "enable_jit_checkpoint", "load_best_model_at_end"):
        refuse(
            get(name) not in (None, False, "no") and not get("output_dir"),
            f"{name}={plain.get(name)!r} writes checkpoints. Give an output_dir.",
        )
    refuse(
        get("load_best_model_at_end") and get("save_strategy") == "no",
        "load_best_model_at_end=True loads a checkpoint. Give a save_strategy.",
    )
    refuse(
        get("save_strategy") == "best"
        and not (get("metric_for_best_model") or get("load_best_model_at_end")),
        "save_strategy='best' needs metric_for_best_model, such as 'loss'.",
    )
    refuse(
        best and get("eval_strategy") == "no",
        "save_strategy='best' and load_best_model_at_end=True compare evaluations. Give an "
        "eval_strategy.",
    )
    refuse(get("max_steps") == 0, "max_steps=0 trains nothing. Give 1 or more, or leave it out.")
    accumulation = get("gradient_accumulation_steps", 1)
    refuse(
        get("max_steps", -1) < 0 and not 0 < get("num_train_epochs", 1) < math.inf,
        f"num_train_epochs={get('num_train_epochs')!r} must be more than 0, and end.",
    )
    for what in ("logging", "eval", "save"):
        every = get(f"{what}_steps")
        refuse(
            get(f"{what}_strategy") == "steps" and every is not None and not every > 0,
            f"{what}_steps={every!r} must be more than 0.",
        )
    problems += _folder_problems(get("output_dir"))
    refuse(
        optim in FOREIGN_OPTIMIZERS,
        f"{optim=} {FOREIGN_OPTIMIZERS.get(optim)}. Choose another, such as 'adamw_torch'.",
    )
    refuse(
        options and optim in OPTIMIZERS_WITHOUT_OPTIONS,
        f"optim_args={options!r} is ignored by {optim=}. Leave it out.",
    )
    refuse(
        optim.endswith("layerwise"),
        f"{optim=} updates weights inside the backward pass. Choose {optim[:-10]!r}.",
    )
    refuse(
        not modules and optim.startswith(("galore", "apollo")),
        f"{optim=} needs optim_target_modules: the layers to project, or 'all-linear'.",
    )
    refuse(
        modules and not optim.startswith(("galore", "apollo")),
        f"optim_target_modules={modules!r} is read by galore and apollo, not by {optim=}. "
        "Leave it out.",
    )
    refuse(
        get("lr_scheduler_kwargs") and schedule in ("constant", "constant_with_warmup"),
        f"lr_scheduler_kwargs={get('lr_scheduler_kwargs')!r} is ignored by "
        f"lr_scheduler_type={schedule!r}. Leave it out.",
    )
    refuse(
        not {"inputs", "loss"}.issuperset(listed(wanted)),
        f"include_for_metrics={wanted!r} may hold 'inputs' and 'loss', nothing else.",
    )
    refuse(
        get("fp16") and (get("use_cpu") or not torch.accelerator.is_available()),
        "fp16=True, or precision='16-mixed', needs an accelerator. Use bf16=True on the CPU.",
    )
    refuse(
        get("liger_kernel_config") and not get("use_liger_kernel"),
        "liger_kernel_config is ignored without use_liger_kernel=True. Give both or none.",
    )
    ignored = [name for name, rest in HUB_OPTIONS.items() if get(name, rest) != rest]
    refuse(
        ignored and not get("push_to_hub"),
        f"{', '.join(ignored)}: means nothing without push_to_hub=True.",
    )
    refuse(
        get("push_to_hub") and not get("output_dir"),
        "push_to_hub=True uploads output_dir. Give one.",
    )
    problems += _accelerator_problems(get("accelerator_config"), accumulation)
    refuse("tpu_metrics_debug" in f"{get('debug')}", "debug='tpu_metrics_debug' needs a TPU.")
    refuse(
        get("deepspeed"),
        "deepspeed cannot be used: it was never run with hflit. Use fsdp=True to shard weights.",
    )
    refuse(
        get("ddp_static_graph"),
        "ddp_static_graph=True cannot be used: the parts of an update differ. Leave it out.",
    )
    refuse(
        get("fsdp") and get("fp16"),
        "fsdp=True cannot scale the gradients of fp16=True: that was never run. Use bf16=True.",
    )
    refuse(
        get("fsdp") and optim == "adafactor",
        "fsdp=True and optim='adafactor': it cannot update shares. Use 'adamw_torch'.",
    )
    refuse(
        get("fsdp") and (get("bf16_full_eval") or get("fp16_full_eval")),
        "fsdp=True cannot hold its weights in half precision for evaluation. Use bf16=True.",
    )
    problems += _sharding_problems(get("fsdp"), get("fsdp_config"))
    refuse(
        get("parallelism_config") is not None,
        "parallelism_config cannot be used: its splits need sharding code made for each model. "
        "Use fsdp=True.",
    )
    problems += _compiler_problems(get("torch_compile_backend"), get("torch_compile_mode"))
    raise_all(ValueError, problems)

    packages = [pair for start, pair in OPTIMIZER_PACKAGES.items() if optim.startswith(start)]
    needed = {f"{optim=}": pair for pair in packages}
    if get("use_liger_kernel"):
        needed["use_liger_kernel=True"] = ("liger_kernel", "liger-kernel")
    missing = [
        f"{asked} needs {name}. Install it with: pip install {name}."
        for asked, (module, name) in needed.items()
        if importlib.util.find_spec(module) is None
    ]
    compiles = any(get(f"torch_compile{each}") for each in ("", "_backend", "_mode"))
    if compiles and get("use_cpu") and get("torch_compile_backend") in (None, "inductor"):
        missing += _missing_compiler()
    raise_all(ImportError, missing)


def _missing_compiler() -> list[str]:
    # Takes seconds to import.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return [
            "torch_compile=True needs a C++ compiler on a CPU, and torch finds none. Install g++, "
            "name one in the environment variable CXX, or leave torch_compile out."
        ]
    return []


def _compiler_problems(backend: Any, mode: Any) -> list[str]:
    if backend is None and mode is None:
        return []
    # Takes seconds to import.
    from torch._dynamo import list_backends
    from torch._inductor import list_mode_options

    given = {
        "backend": (backend, list_backends(None)),
        "mode": (mode, ["default", *list_mode_options()]),
    }
    return [
        f"Unknown torch_compile_{name}={value!r}. {_advice(value, list(dict.fromkeys(choices)))}"
        for name, (value, choices) in given.items()
        if isinstance(value, str) and value not in choices
    ]


def check_schedule(args: TrainingArguments, steps: int | None = None) -> None:
    """Refuse options that the schedule does not have, or lacks.

    Args:
        args: Name it.
        steps: Updates of the run, once they are known.

    Raises:
        ValueError: Says what transformers says when it builds the schedule.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    options: Any = args.lr_scheduler_kwargs
    warmup, updates = (1, 10) if steps is None else (args.get_warmup_steps(steps), steps)
    try:
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, warmup, updates, options)
        for rate in getattr(schedule, "lr_lambdas", ()):
            rate(updates)
    except ZeroDivisionError:
        cause = (
            f"{warmup} of {updates} updates warm up" if args.learning_rate else "learning_rate=0"
        )
        raise ValueError(
            f"lr_scheduler_type={SchedulerType(args.lr_scheduler_type).value!r} divides by zero: "
            f"{cause}. Choose another."
        ) from None
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_type={SchedulerType(args.lr_scheduler_type).value!r} cannot take "
            f"lr_scheduler_kwargs={options!r}: {error}."
        ) from None


def _advice(value: Any, choices: list[Any]) -> str:
    if len(choices) <= FEW:
        return f"Choose one of: {', '.join(map(str, choices))}."
    nearest = difflib.get_close_matches(f"{value}", map(str, choices), n=3, cutoff=0)
    return f"There are {len(choices)}, and nearest are: {', '.join(nearest)}."


def _folder_problems(folder: Any) -> list[str]:
    """Why nothing could be written there, as far as it can be told beforehand."""
    path = Path(folder or ".").absolute()
    if path.is_file():
        return [f"output_dir={folder!r} is a file. Name a folder."]
    there = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if folder and not (there.is_dir() and os.access(there, os.W_OK)):
        return [f"output_dir={folder!r} cannot be written: see {there}."]
    return []


def _read(name: str, value: Any) -> Any:
    """The value of an argument that may come as JSON, or as the name of a file of it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value if value.startswith("{") else Path(value).read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}={value!r} is no JSON: {error}.") from None


def sharding_config(config: Any) -> dict[str, Any]:
    """`fsdp_config` as a dict, with today's names."""
    config = _read("fsdp_config", config)
    return {name.removeprefix("fsdp_"): value for name, value in (config or {}).items()}


def _sharding_problems(fsdp: Any, config: Any) -> list[str]:
    problems = []
    words = fsdp if isinstance(fsdp, list) else f"{fsdp or ''}".split()
    if any(word not in ("True", "full_shard", "auto_wrap") for word in map(str, words)):
        problems.append(f"fsdp={fsdp!r} cannot be used: all of a model is sharded. Use fsdp=True.")
    for name, value in sharding_config(config).items():
        possible = SHARDING.get(name)
        if name not in SHARDING:
            problems.append(f"fsdp_config cannot hold {name!r}. It takes: {', '.join(SHARDING)}.")
        elif possible is not None and f"{value}" not in map(str, possible):
            choice = " or ".join(map(repr, possible))
            problems.append(f"fsdp_config cannot hold {name}={value!r}, only {choice}.")
    if config and not fsdp:
        problems.append("fsdp_config is ignored without fsdp=True. Give both or none.")
    return problems


def _accelerator_problems(config: Any, accumulation: int) -> list[str]:
    if config is not None and not isinstance(config, (str, dict, AcceleratorConfig)):
        return [f"accelerator_config={config!r} must be a dict, JSON or the name of its file."]
    config = _read("accelerator_config", config)
    options = vars(config) if isinstance(config, AcceleratorConfig) else config or {}
    inner = options.get("gradient_accumulation_kwargs") or {}
    known = [field.name for field in dataclasses.fields(AcceleratorConfig)]
    counted = [field.name for field in dataclasses.fields(GradientAccumulationPlugin)]
    problems = [
        f"accelerator_config has no {name!r}. It takes: {', '.join(names)}."
        for given, names in ((options, known), (inner, counted))
        for name in given
        if name not in names
    ]
    if options.get("dispatch_batches"):
        problems.append(
            "accelerator_config cannot hold dispatch_batches=True: each process reads its own "
            "rows. Leave it out."
        )
    if options.get("use_configured_state"):
        problems.append(
            "accelerator_config cannot hold use_configured_state=True: Lightning starts the "
            "processes, not accelerate. Leave it out."
        )
    if accumulation not in (1, inner.get("num_steps", accumulation)):
        problems.append(
            f"gradient_accumulation_steps={accumulation} and num_steps={inner['num_steps']} of "
            "accelerator_config contradict each other. Give one of them."
        )
    return problems


def listed(value: Any) -> list[Any]:
    """A list of what may be a list, a single value or None."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def raise_all(error: type[Exception], problems: list[str]) -> None:
    """Raise one error of all problems, if there are any."""
    if problems:
        raise error(" ".join(problems))
