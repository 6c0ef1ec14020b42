"""Sorts the keywords of a call into TrainingArguments and Lightning flags.

The only file that knows both vocabularies, with its tables in `fields`; imports no other room.
"""

import dataclasses
import difflib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames, ParallelMode, trainer_log_levels

from hflit.fields import DROPPED, FIELDS, FIXED, GONE, PASSED, PROCESSES, REFUSED, RENAMED, SHARED

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
    distributed_state = None

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or ""
        self.report_to = self.report_to or "none"
        if isinstance(self.include_for_metrics, str):
            self.include_for_metrics = [self.include_for_metrics]
        _check(vars(self))
        super().__post_init__()

    def set_ranks(self, world_size: int, process_index: int, local_process_index: int) -> None:
        """Say how many processes run, and which one this is, of all and on its node."""
        self.world_size = world_size
        self.process_index = process_index
        self.local_process_index = local_process_index

    @property
    def _setup_devices(self) -> torch.device:  # behind the public `device`
        if self.use_cpu or not torch.accelerator.is_available():
            return torch.device("cpu")
        return torch.device(self.local_process_index)  # of the accelerator torch finds

    @property
    def n_gpu(self) -> int:
        """Accelerators of this process: one, or none on the CPU."""
        return int(self.device.type != "cpu")

    @property
    def parallel_mode(self) -> ParallelMode:
        """Whether this is one of several processes."""
        return ParallelMode.DISTRIBUTED if self.world_size > 1 else ParallelMode.NOT_PARALLEL

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
    flag_names = {*PASSED, *SHARED, *PROCESSES, *REFUSED}
    known = {*RENAMED, *DROPPED, *GONE, *flag_names, *(FIELDS.keys() & DEFAULTS.keys())}
    _raise(TypeError, [_unknown(name, {*known, *also}) for name in keywords if name not in known])

    given = {name: value for name, value in keywords.items() if name in flag_names}
    flags = {name: value for name, value in given.items() if value is not None}
    _check_flags(flags)
    arguments = _agree(_renamed(keywords), flags)
    _check({**DEFAULTS, **arguments})
    _raise(NotImplementedError, _pending(arguments, flags))
    args = Arguments(**arguments)
    return args, _trainer_flags(args, arguments, flags)


DEFAULTS: dict[str, Any] = {
    field.name: field.default
    if field.default_factory is dataclasses.MISSING
    else field.default_factory()
    for field in dataclasses.fields(Arguments)
}
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
FOREIGN_OPTIMIZERS = {
    "lomo": "updates weights inside its own backward pass",
    "adalomo": "updates weights inside its own backward pass",
    "adamw_torch_xla": "needs a TPU",
    "adamw_torch_npu_fused": "needs an Ascend NPU",
}
OPTIMIZERS_WITHOUT_OPTIONS = (
    *("adamw_torch", "adamw_torch_fused", "adafactor", "adamw_8bit", "adamw_bnb_8bit"),
    *("paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "lion_32bit"),
    *("paged_lion_8bit", "paged_lion_32bit"),
)
PRECISIONS = (
    *("32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true"),
    *("transformer-engine", "transformer-engine-float16"),
)
SHORT_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}


def _check(values: Mapping[str, Any]) -> None:
    """Refuse what transformers would take in silence and then do otherwise."""
    plain = {name: getattr(value, "value", value) for name, value in values.items()}  # of enums
    get = plain.get
    problems = [
        f"Unknown {name}={plain[name]!r}. Choose one of: {', '.join(map(str, choices))}."
        for name, choices in CHOICES.items()
        if name in plain and plain[name] not in choices
    ]

    def refuse(wrong: Any, message: str) -> None:
        if wrong:
            problems.append(message)

    optim, schedule = f"{get('optim')}", get("lr_scheduler_type")
    options, modules, wanted = map(
        get, ("optim_args", "optim_target_modules", "include_for_metrics")
    )
    refuse(get("max_steps") == 0, "max_steps=0 trains nothing. Give 1 or more, or leave it out.")
    refuse(
        (accumulation := get("gradient_accumulation_steps", 1)) < 1,
        f"gradient_accumulation_steps={accumulation!r} must be 1 or more: an update needs a batch.",
    )
    refuse(
        optim in FOREIGN_OPTIMIZERS,
        f"{optim=} {FOREIGN_OPTIMIZERS.get(optim)}. Choose another, such as 'adamw_torch'.",
    )
    refuse(
        options and optim in OPTIMIZERS_WITHOUT_OPTIONS,
        f"optim_args={options!r} is ignored by {optim=}. Leave it out.",
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
        not {"inputs", "loss"}.issuperset(_listed(wanted)),
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
    refuse("tpu_metrics_debug" in f"{get('debug')}", "debug='tpu_metrics_debug' needs a TPU.")
    refuse(
        get("parallelism_config") is not None,
        "parallelism_config cannot be used: its splits need sharding code made for each model. "
        "Use fsdp=True.",
    )
    _raise(ValueError, problems)


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
    if any(isinstance(plugin, Precision) for plugin in _listed(flags.get("plugins"))):
        problems.append("plugins holds a precision. Name it with precision=... instead.")
    _raise(ValueError, problems)
    for callback in _listed(flags.get("callbacks")):
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
        warnings.warn(message, FutureWarning, stacklevel=5)  # past this, parse and the call

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
    if flags.get("fast_dev_run"):
        same("fast_dev_run", "max_steps", int(flags["fast_dev_run"]))
    if agreed.get("full_determinism") and not flags.get("deterministic", True):
        same("deterministic", "full_determinism", False)
    if agreed.get("full_determinism") and flags.get("benchmark"):
        same("benchmark", "full_determinism", False)
    if flags.get("logger") is True and not agreed.get("output_dir"):
        problems.append("logger=True writes files. Give an output_dir, or a logger of your own.")
    _raise(ValueError, problems)
    return agreed


def _pending(arguments: Mapping[str, Any], flags: Mapping[str, Any]) -> list[str]:
    """What was asked for and is not built yet, one sentence each."""
    built = Arguments().to_dict()  # the defaults as they read back, such as [] for report_to
    waiting = [
        (_show(name, value), FIELDS[name].pending)
        for name, value in arguments.items()
        if FIELDS[name].pending
        and not any(
            value == fine for fine in (DEFAULTS[name], built[name], *FIELDS[name].supported)
        )
    ]
    strategy, devices = flags.get("strategy", "auto"), flags.get("devices", "auto")
    live = {
        "strategy": isinstance(strategy, SingleDeviceStrategy)
        or f"{strategy}".startswith(("auto", "single")),
        "devices": devices in ("auto", "1", 1)
        or (isinstance(devices, (list, tuple)) and len(devices) == 1),
        "num_nodes": flags.get("num_nodes", 1) == 1,
    }
    waiting += [(_show(name, flags[name]), "several processes") for name in live if not live[name]]
    return [f"{what} is not built yet: it comes with {feature}." for what, feature in waiting]


def _trainer_flags(
    args: Arguments, arguments: Mapping[str, Any], flags: Mapping[str, Any]
) -> dict[str, Any]:
    """The flags for the Lightning Trainer, without max_epochs and max_steps."""
    half = "bf16-mixed" if args.bf16 else "16-mixed" if args.fp16 else "32-true"
    devices = flags.get("devices", 1)
    trainer = {
        "accelerator": "cpu" if args.use_cpu else "auto",
        "logger": False,
        "enable_model_summary": False,
        **{name: value for name, value in flags.items() if name not in SHARED | REFUSED},
        "devices": list(devices) if isinstance(devices, (list, tuple)) and not args.use_cpu else 1,
        "precision": _long(flags.get("precision", half)),
        "callbacks": _listed(flags.get("callbacks")),
        **FIXED,
    }
    if flags.get("accelerator", "auto") != "auto":
        trainer["accelerator"] = flags["accelerator"]
    trainer |= {name: flags[name] for name in ("deterministic", "benchmark") if name in flags}
    if args.full_determinism:
        trainer |= {"deterministic": True, "benchmark": False}
    if "enable_progress_bar" in flags:
        trainer["enable_progress_bar"] = flags["enable_progress_bar"]
    elif arguments.get("disable_tqdm") is not None:
        trainer["enable_progress_bar"] = not args.disable_tqdm
    if args.output_dir:
        trainer["default_root_dir"] = args.output_dir
    if batches := int(flags.get("fast_dev_run", 0)):
        # Spelled out, as Lightning's own switch would also turn its evaluation back on.
        limits = ("limit_val_batches", "limit_test_batches", "limit_predict_batches")
        trainer |= {"logger": False, **dict.fromkeys(limits, batches)}
    return trainer


def _unknown(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, sorted(known), n=1)
    return f"Unknown argument {name!r}." + (f" Did you mean {nearest[0]!r}?" if nearest else "")


def _show(name: str, value: Any) -> str:
    """A keyword as typed, but for secrets."""
    return f"{name}=<hidden>" if name.endswith("_token") else f"{name}={value!r}"


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _long(precision: Any) -> str:
    return SHORT_PRECISIONS.get(str(precision), str(precision))


def _raise(error: type[Exception], problems: list[str]) -> None:
    if problems:
        raise error(" ".join(problems))
