"""One run of Lightning: what drives it, how long it is, and what the rest of it cannot change."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import datasets
import lightning.pytorch as L
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainerCallback
from transformers.trainer_utils import SaveStrategy
from transformers.utils import is_in_notebook

from hflit.arguments import Arguments
from hflit.checks import check_schedule
from hflit.data import DataModule
from hflit.loop.bridge import Bridge
from hflit.loop.checkpoints import Checkpoints
from hflit.loop.evaluation import evaluate, share_of
from hflit.loop.precision import set_precision
from hflit.loop.progress import ProgressBar, notebook_table
from hflit.loop.resume import FIXED_ARGUMENTS
from hflit.loop.stops import Stops
from hflit.tasks import TaskModule

# Of a LoRA: what decides how much the weights that were learned say.
SCALES = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")


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
        ValueError: No batch is left to train on, or to evaluate; or the learning rate cannot follow
            its schedule over so many updates.
    """
    share = flags.get("limit_val_batches")
    if isinstance(share, float) and share and "validation" in data.tokens:
        share_of(data.validation_batches(), share)
    if share == 0 and (args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST):
        raise ValueError("limit_val_batches=0 evaluates nothing, and so no model is the best.")
    length = _length(args, flags.get("limit_train_batches"), data)
    check_schedule(args, length.steps)
    return length


def _length(args: Arguments, limit: int | float | None, data: DataModule) -> Length:
    try:
        with torch.random.fork_rng(devices=[]):  # an order that torch draws is not drawn here
            windows = len(data.train_dataloader())
    except TypeError:
        if limit not in (None, 1.0):
            raise ValueError(
                f"limit_train_batches={limit} cuts epochs, and a stream has none. Use max_steps."
            ) from None
        return Length(0, -1, args.max_steps)
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


def run_record(
    named: Mapping[str, Any],
    config: Any,
    args: Arguments,
    flags: Mapping[str, Any],
    data: DataModule,
    adapter: LoraConfig | None,
    quantization: BitsAndBytesConfig | None,
) -> dict[str, Any]:
    """What the rest of a run cannot change, in the words of the call.

    Args:
        named: The call's named arguments.
        config: Of the base.
        args: Its other arguments.
        flags: Of Lightning.
        data: Set up.
        adapter: What is learned beside the weights, or None.
        quantization: Of the weights, or None.
    """
    rows, values = data.tokens["train"], args.to_dict()
    is_stream = not isinstance(rows, datasets.Dataset)  # each worker reads its own part of it
    return {
        "task": named["task"],
        "model": config.model_type,
        "find_learning_rate": named["find_learning_rate"],
        "lora": adapter and {name: getattr(adapter, name) for name in SCALES},
        "quantize": quantization and f"{quantization.quantization_method()}",
        "distillation": None if named["teacher"] is None else list(named["distillation"]),
        "limit_train_batches": flags.get("limit_train_batches", 1.0),
        "maxlength": data.tokenization.maxlength,
        "rows": None if is_stream else len(rows),
        "data": data.digest(),
        "processes": args.world_size,
        **batch_record(args),
        **({"dataloader_num_workers": args.dataloader_num_workers} if is_stream else {}),
        "max_tokens_per_batch": data.max_tokens_per_batch,
        **{name: values[name] for name in FIXED_ARGUMENTS},
    }


def batch_record(args: Arguments) -> dict[str, Any]:
    """The size of a batch, which a lack of memory changes, and the rows of an update."""
    config: Any = args.accelerator_config
    batches = args.gradient_accumulation_steps * (1 if config.split_batches else args.world_size)
    size = args.per_device_train_batch_size
    return {"per_device_train_batch_size": size, "rows_per_update": size * batches}


def lightning_run(
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
    theirs = [callback for callback in callbacks if isinstance(callback, TrainerCallback)]
    lightning: list[Any] = [c for c in callbacks if not isinstance(c, TrainerCallback)]
    has_bar = any(isinstance(callback, L.callbacks.ProgressBar) for callback in lightning)
    in_notebook = is_in_notebook()
    wanted = has_bar or ((in_notebook or sys.stderr.isatty()) and not args.disable_tqdm)
    if flags.setdefault("enable_progress_bar", wanted) and not has_bar:
        if in_notebook:
            flags["enable_progress_bar"] = False
            theirs.append(notebook_table(args.world_size))
        else:
            lightning.append(ProgressBar())
    run_evaluation = None
    if data.data["validation"] is not None and flags.get("limit_val_batches") != 0:

        def run_evaluation(on_batch: Callable[[], None]) -> dict[str, float]:
            limit = flags.get("limit_val_batches")
            return evaluate(module, data, args, metrics, on_batch, limit)

    tokenizer = data.tokenization.tokenizer
    bridge = Bridge(args, module, tokenizer, checkpoints, stops, theirs, run_evaluation)
    set_precision(flags, args)
    return bridge, L.Trainer(
        **flags,
        callbacks=[bridge, *lightning],
        max_epochs=length.epochs,
        max_steps=length.steps,
        log_every_n_steps=1,  # the bridge logs; at 50 Lightning warns of each shorter epoch
    )
