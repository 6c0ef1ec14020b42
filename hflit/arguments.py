"""Sorts the keywords of a call into TrainingArguments and Lightning flags.

The only file that knows both vocabularies, with its tables in `fields`; imports no other room.
"""

import dataclasses
import difflib
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

import numpy as np
import torch
import transformers
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import CheckpointIO, Precision
from lightning.pytorch.strategies import Strategy
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import ParallelMode

from hflit.checks import check, check_schedule, listed, raise_all, sharding_config
from hflit.fields import DROPPED, FIELDS, FIXED, GONE, PASSED, PROCESSES, REFUSED, RENAMED, SHARED
from hflit.kinds import kind_problems

__all__ = ["FIELDS", "Arguments", "parse"]


@dataclasses.dataclass(repr=False)  # the inherited repr hides tokens
class Arguments(transformers.TrainingArguments):
    """TrainingArguments of one run: all fields of transformers, with quieter defaults.

    Building them starts no process group and touches no state of accelerate: Lightning starts
    the processes, and `set_ranks` tells the arguments about them.

    Args:
        output_dir: Folder for everything a run writes. Empty: nothing is written, anywhere.
        save_strategy: When checkpoints are written: no, steps, epoch or best.
        report_to: Trackers that get the log entries, or none.
        log_level: Verbosity of transformers on the main process.
        use_cpu: Train on the CPU. True where torch finds no accelerator.
    """

    output_dir: str | None = ""
    save_strategy: SaveStrategy | str = "no"
    report_to: None | str | list[str] = "none"
    log_level: str = "warning"
    use_cpu: bool = dataclasses.field(default_factory=lambda: not torch.accelerator.is_available())

    # Plain attributes where transformers has properties that ask accelerate.
    world_size = 1
    process_index = 0
    local_process_index = 0
    device_index = 0
    distributed_state = None

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or ""
        self.report_to = self.report_to or "none"
        if isinstance(self.include_for_metrics, str):
            self.include_for_metrics = [self.include_for_metrics]
        if self.hub_token == "<HUB_TOKEN>":  # what to_dict puts in its place
            self.hub_token = None
        check(vars(self))
        super().__post_init__()
        check_schedule(self)
        config: Any = self.accelerator_config
        counted = config.gradient_accumulation_kwargs or {}
        if self.gradient_accumulation_steps == 1:
            self.gradient_accumulation_steps = counted.get("num_steps", 1)

    def set_ranks(
        self,
        world_size: int,
        process_index: int,
        local_process_index: int,
        device_index: int | None = None,
    ) -> None:
        """Say how many processes run, which one this is, of all and on its node, and where.

        Args:
            world_size: Processes of the run.
            process_index: Which one this is, of all.
            local_process_index: Which one this is, on its node.
            device_index: Which accelerator of its node it has; None for that of its number.
        """
        self.world_size = world_size
        self.process_index = process_index
        self.local_process_index = local_process_index
        self.device_index = local_process_index if device_index is None else device_index

    @property
    def _setup_devices(self) -> torch.device:  # behind the public `device`
        if self.use_cpu or not torch.accelerator.is_available():
            return torch.device("cpu")
        return torch.device(self.device_index)  # of the accelerator torch finds

    @property
    def n_gpu(self) -> int:
        """Accelerators of this process: one, or none on the CPU."""
        return int(self.device.type != "cpu")

    @property
    def parallel_mode(self) -> ParallelMode:
        """Whether this is one of several processes."""
        return ParallelMode.DISTRIBUTED if self.world_size > 1 else ParallelMode.NOT_PARALLEL

    def strategy_options(self) -> dict[str, Any]:
        """Options of Lightning's strategy for several processes; `timeout` in seconds.

        Parameters that a loss leaves out are looked for, as transformers does. Only activation
        checkpointing of the older kind, which runs a second backward, cannot stand that.
        """
        checkpointing: Any = self.activation_checkpointing and self.activation_checkpointing_kwargs
        options = {
            "find_unused_parameters": self.ddp_find_unused_parameters,
            "bucket_cap_mb": self.ddp_bucket_cap_mb,
            "broadcast_buffers": self.ddp_broadcast_buffers,
            "process_group_backend": self.ddp_backend,
            "timeout": self.ddp_timeout,
        }
        unused = not (checkpointing or {}).get("use_reentrant")
        given = {name: value for name, value in options.items() if value is not None}
        return {"find_unused_parameters": unused, **given}

    @property
    def shard_names(self) -> list[str] | None:
        """Classes of the layers that `fsdp` gathers one by one; None for the model's own."""
        names = sharding_config(self.fsdp_config).get("transformer_layer_cls_to_wrap")
        return None if names is None else [n for each in listed(names) for n in each.split(",")]

    @property
    def saves_shares(self) -> bool:
        """Whether each process writes its share of a sharded optimizer, rather than one the whole.

        Without storage that all nodes share (`save_on_each_node`) one node lacks the others'.
        """
        kind = sharding_config(self.fsdp_config).get("state_dict_type")
        return kind != "FULL_STATE_DICT" and not self.save_on_each_node

    def _process_fsdp_args(self) -> None:  # would set up accelerate's sharding
        return None

    @property
    def should_save(self) -> bool:
        """Whether this process writes files; never without an output_dir."""
        return bool(self.output_dir) and super().should_save


def parse(
    keywords: Mapping[str, Any], also: Iterable[str] = ()
) -> tuple[Arguments, dict[str, Any]]:
    """Sort the caller's keywords into Hugging Face arguments and Lightning Trainer flags.

    Args:
        keywords: TrainingArguments fields, retired names of them, and Trainer flags. A flag of
            None counts as not given.
        also: Further names to suggest for a misspelled one, such as those of the call itself.

    Returns:
        The arguments, and the flags for the Trainer without its max_epochs and max_steps.

    Example:
        >>> args, flags = parse({"learning_rate": 3e-4, "precision": "bf16", "accelerator": "cpu"})
        >>> args.learning_rate, args.bf16, flags["precision"]
        (0.0003, True, 'bf16-mixed')
    """
    keywords = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in expanded(keywords).items()
    }
    flag_names = {*PASSED, *SHARED, *PROCESSES, *REFUSED}
    known = {*RENAMED, *DROPPED, *GONE, *flag_names, *(FIELDS.keys() & DEFAULTS.keys())}
    raise_all(
        TypeError, [_unknown(name, {*known, *also}) for name in keywords if name not in known]
    )

    given = {name: value for name, value in keywords.items() if name in flag_names}
    flags = {name: value for name, value in given.items() if value is not None}
    raise_all(TypeError, kind_problems(flags, FLAGS))
    _check_flags(flags)
    arguments = _agree(_renamed(keywords), flags)
    raise_all(TypeError, kind_problems(arguments, KINDS))
    for name in {"adam_beta1", "adam_beta2"} & arguments.keys():  # torch takes no 0 beside a 0.999
        arguments[name] = float(arguments[name])
    args = Arguments(**arguments)
    return args, _trainer_flags(args, arguments, flags)


def expanded(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords with the home folder in place of a `~` that begins output_dir."""
    folder = keywords.get("output_dir")
    if isinstance(folder, (str, os.PathLike)):
        return {**keywords, "output_dir": os.path.expanduser(folder)}
    return dict(keywords)


DEFAULTS: dict[str, Any] = {
    field.name: field.default
    if field.default_factory is dataclasses.MISSING
    else field.default_factory()
    for field in dataclasses.fields(Arguments)
}
# Fields whose kind is as their hint says; these take True, or a Path, too.
KINDS = {
    name: hint
    for name, hint in get_type_hints(Arguments).items()
    if name not in ("fsdp", "output_dir", "resume_from_checkpoint", "report_to", "debug")
}
FLAGS = get_type_hints(Trainer.__init__)
STRATEGY_OPTIONS = tuple(name for name in FIELDS if name.startswith("ddp_"))
PRECISIONS = (
    *("32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true"),
    *("transformer-engine", "transformer-engine-float16"),
)
SHORT_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}

# What others call it -> its name here.
MEANT = {
    **dict.fromkeys(("epochs", "num_epochs"), "num_train_epochs"),
    **dict.fromkeys(("batch_size", "train_batch_size"), "per_device_train_batch_size"),
    "eval_batch_size": "per_device_eval_batch_size",
    "lr": "learning_rate",
    "optimizers": "optim",
    "model": "base",
    "max_length": "maxlength",
    "compute_metrics": "metrics",
    "train_dataset": "train",
    "eval_dataset": "validation",
    "teacher_model": "teacher",
    "peft_config": "lora",
    "quantization_config": "quantize",
    "ckpt_path": "checkpoint",
}


# Lightning's callbacks that would do nothing or something else here -> what to do instead.
REFUSED_CALLBACKS = {
    Checkpoint: "Use save_strategy, save_total_limit and load_best_model_at_end.",
    EarlyStopping: "Use transformers.EarlyStoppingCallback with metric_for_best_model.",
    GradientAccumulationScheduler: "Use gradient_accumulation_steps.",
    BatchSizeFinder: "Use auto_find_batch_size=True.",
    LearningRateFinder: "Use find_learning_rate=True.",
    SpikeDetection: "See nonfinite.",
    **dict.fromkeys(
        (StochasticWeightAveraging, WeightAveraging, ModelPruning),
        "It changes the weights after they were evaluated and the best were chosen.",
    ),
    BaseFinetuning: "Freeze what should not learn with requires_grad_(False), or use lora=.",
}


def _check_flags(flags: Mapping[str, Any]) -> None:
    """Refuse flags that an argument replaces, and values Lightning cannot take."""
    problems = [
        f"{name}={flags[name]!r} is not taken. {instead}"
        for name, instead in REFUSED.items()
        if name in flags and not (name in FIXED and flags[name] == FIXED[name])
    ]
    precision = flags.get("precision", "32-true")
    if _long(precision) not in PRECISIONS:
        problems.append(f"Unknown {precision=}. Choose one of: {', '.join(PRECISIONS)}.")
    for plugin in listed(flags.get("plugins")):
        if isinstance(plugin, Precision):
            problems.append("plugins holds a precision. Name it with precision=... instead.")
        if isinstance(plugin, CheckpointIO):
            problems.append("plugins holds a CheckpointIO, which writes no checkpoint-N of hflit.")
    problems += [
        f"callbacks holds lightning's {type(callback).__name__}, which is not taken. {instead}"
        for callback in listed(flags.get("callbacks"))
        for kind, instead in REFUSED_CALLBACKS.items()
        if isinstance(callback, kind)
    ]
    raise_all(ValueError, problems)
    for callback in listed(flags.get("callbacks")):
        kind = callback if isinstance(callback, type) else type(callback)
        # As transformers' Trainer does, take its callbacks as classes too.
        if not issubclass(kind, transformers.TrainerCallback) and not isinstance(
            callback, Callback
        ):
            raise TypeError(
                f"callbacks holds {callback!r}. It takes callbacks of lightning.pytorch and of "
                "transformers."
            )


def _renamed(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments among the keywords, retired names turned into today's."""
    arguments = {name: value for name, value in keywords.items() if name in FIELDS}

    def warn(message: str) -> None:
        warnings.warn(message, FutureWarning, stacklevel=6)  # past all of this, and the call

    for old, value in keywords.items():
        if old in DROPPED:
            warn(f"{old} has no effect any more: {DROPPED[old]}")
        elif old in GONE:
            harmless, instead = GONE[old]
            if value not in harmless:
                raise ValueError(f"{old}={value!r} is no longer possible. {instead}")
            warn(f"{old}={value!r} has no effect any more. {instead}")
        elif old in RENAMED:
            now, default, translate = RENAMED[old]
            if value is None or value == default:
                warn(f"{old} is now called {now}.")
                continue
            new = translate(value, keywords)
            warn(f"{old} is now called {now}: read as {_show(now, new)}.")
            present = arguments.get(now, new)
            if isinstance(present, dict) and isinstance(new, dict):
                both, new = new, {**present, **new}
                clash = any(present.get(key, both[key]) != both[key] for key in both)
            else:
                clash = present != new
            if clash:
                raise ValueError(
                    f"{_show(old, value)} and {_show(now, present)} contradict each other. "
                    f"Keep only {now}."
                )
            arguments[now] = new
    return arguments


def _agree(arguments: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Add what shared flags say to the arguments; refuse two that contradict each other."""
    agreed, problems = dict(arguments), []

    def same(flag: str, name: str, value: Any) -> None:
        if agreed.get(name) is None:
            agreed[name] = value
        elif agreed[name] != value:
            problems.append(
                f"{name}={agreed[name]!r} and {flag}={flags[flag]!r} contradict each other. "
                "Give one of them."
            )

    accelerator = flags.get("accelerator", "auto")
    if accelerator != "auto":
        same(
            "accelerator",
            "use_cpu",
            accelerator == "cpu" or isinstance(accelerator, CPUAccelerator),
        )
    if "precision" in flags:
        same("precision", "bf16", _long(flags["precision"]) == "bf16-mixed")
        same("precision", "fp16", _long(flags["precision"]) == "16-mixed")
    shown = flags.get("enable_progress_bar")
    if shown is not None and agreed.get("disable_tqdm") is shown:
        same("enable_progress_bar", "disable_tqdm", not shown)
    if f"{flags.get('strategy')}".startswith("fsdp"):
        agreed["fsdp"] = agreed.get("fsdp") or True
    elif agreed.get("fsdp") and flags.get("strategy", "auto") != "auto":
        same("strategy", "fsdp", None)
    options = [name for name in STRATEGY_OPTIONS if agreed.get(name) not in (None, DEFAULTS[name])]
    if options and isinstance(flags.get("strategy"), Strategy):
        problems.append(f"{', '.join(options)}: give them to the strategy itself.")
    if flags.get("fast_dev_run"):
        same("fast_dev_run", "max_steps", int(flags["fast_dev_run"]))
    if agreed.get("full_determinism") and not flags.get("deterministic", True):
        same("deterministic", "full_determinism", False)
    if agreed.get("full_determinism") and flags.get("benchmark"):
        same("benchmark", "full_determinism", False)
    if flags.get("logger") is True and not agreed.get("output_dir"):
        problems.append("logger=True writes files. Give an output_dir, or a logger of your own.")
    raise_all(ValueError, problems)
    return agreed


def _trainer_flags(
    args: Arguments, arguments: Mapping[str, Any], flags: Mapping[str, Any]
) -> dict[str, Any]:
    """The flags for the Lightning Trainer, without max_epochs and max_steps."""
    half = "bf16-mixed" if args.bf16 else "16-mixed" if args.fp16 else "32-true"
    devices = flags.get("devices")
    trainer = {
        "logger": False,
        "enable_model_summary": False,
        **{k: v for k, v in flags.items() if k not in REFUSED and k != "fast_dev_run"},
        "precision": _long(flags.get("precision", half)),
        "callbacks": [
            each() if isinstance(each, type) else each for each in listed(flags.get("callbacks"))
        ],
        **FIXED,
    }
    if isinstance(devices, (list, tuple)):
        trainer["devices"] = len(devices) if args.use_cpu else list(devices)
    if args.fsdp and flags.get("strategy", "auto") == "auto":
        trainer["strategy"] = "fsdp"
    if flags.get("accelerator", "auto") == "auto":
        trainer["accelerator"] = "cpu" if args.use_cpu else "auto"
    if args.full_determinism:
        trainer |= {"deterministic": True, "benchmark": False}
    if arguments.get("disable_tqdm") is not None:
        trainer.setdefault("enable_progress_bar", not args.disable_tqdm)
    if args.output_dir:
        trainer["default_root_dir"] = args.output_dir
    if batches := int(flags.get("fast_dev_run", 0)):
        # Spelled out, as Lightning's own switch would also turn its evaluation back on.
        trainer |= {"logger": False, "limit_val_batches": batches}
    return trainer


def _unknown(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(MEANT.get(name, name), sorted(known), n=1)
    return f"Unknown argument {name!r}." + (f" Did you mean {nearest[0]!r}?" if nearest else "")


def _show(name: str, value: Any) -> str:
    """A keyword as typed, but for secrets."""
    return f"{name}=<hidden>" if name.endswith("_token") else f"{name}={value!r}"


def _long(precision: Any) -> str:
    return SHORT_PRECISIONS.get(str(precision), str(precision))
