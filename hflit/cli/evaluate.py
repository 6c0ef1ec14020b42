"""`hflit validate` and `hflit test`: the figures of a model on rows it did not learn from."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from hflit.arguments import parse
from hflit.cli.fit import add_json, read_call, show_figures
from hflit.cli.options import split_call
from hflit.data import DataModule
from hflit.data.files import name_of
from hflit.data.labels import Labels
from hflit.loading import load_base
from hflit.loop.evaluation import evaluate
from hflit.loop.precision import full_eval
from hflit.pipeline import HFTrainer
from hflit.request import check_request, read_data
from hflit.saved import is_adapter, load_saved
from hflit.tasks.layers import fast_layers

# What of the arguments and flags of a run an evaluation follows.
READ = (
    *("per_device_eval_batch_size", "seed", "data_seed", "bf16", "fp16", "tf32", "use_cpu"),
    *("label_smoothing_factor", "include_for_metrics", "batch_eval_metrics", "label_names"),
    *("prediction_loss_only", "eval_do_concat_batches", "eval_accumulation_steps", "log_level"),
    *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),  # of a stream
    *("dataloader_num_workers", "dataloader_pin_memory", "accelerator", "precision"),
    *("limit_val_batches", "dataloader_drop_last", "bf16_full_eval", "fp16_full_eval"),
)


def run(command: str, argv: Sequence[str]) -> int:
    """Evaluate on the validation data or on the test data, and print the figures."""
    rows_of = {"validate": "data.validation", "test": "data.test"}[command]
    about = (
        f"Evaluate a model on the rows of --{rows_of}. The model is --model.checkpoint if given, "
        "else what `hflit fit` left in --args.output_dir, else --model.base."
    )
    _, config, call = read_call(command, about, argv, (rows_of,), add_json)
    model = _which_model(call)
    figures = evaluate_model(model, config[rows_of], call)
    if command == "test":
        figures = {name.replace("eval_", "test_", 1): value for name, value in figures.items()}
    if config.get("json"):
        values = figures.items()
        odd = [name for name, v in values if isinstance(v, float) and not math.isfinite(v)]
        print(json.dumps({**figures, **dict.fromkeys(odd)}))  # JSON has no name for them
    else:
        show_figures(figures, f"{model} on {name_of(config[rows_of])}")
    return 0


def evaluate_model(model: str, rows: Any, call: dict[str, Any]) -> dict[str, float]:
    """Figures of a saved model; for the arguments and errors see `load_evaluation`.

    Raises:
        ValueError: The call limits the evaluation to no batch at all.
    """
    module, data = load_evaluation(model, rows, call)
    args, limit = module.args, call.get("limit_val_batches")
    half = torch.bfloat16 if args.bf16 else torch.float16
    autocast = torch.autocast(args.device.type, half, enabled=args.bf16 or args.fp16)
    layers = nullcontext() if module.parity else fast_layers(module.model)
    with autocast, layers, full_eval(module.model, args):
        figures = evaluate(module, data, args, call.get("metrics", "auto"), limit=limit)
    if "eval_loss" not in figures:
        raise ValueError(f"--trainer.limit_val_batches={limit} leaves no batch to evaluate.")
    return figures


def load_evaluation(
    model: str, rows: Any, call: dict[str, Any], most: int | None = None
) -> tuple[Any, DataModule]:
    """A saved model in its task, and the rows to evaluate it on.

    Args:
        model: Folder or hub id; its head is trained.
        rows: What to evaluate on.
        call: Keywords of the call that trained it. The training rows, if it names them, decide
            which label is which class.
        most: Rows to take, spread evenly; all of them by default.

    Returns:
        The task module, and the data module with the rows as validation data.

    Raises:
        ValueError: The model has no head for the task.
    """
    named, args = split_call({"metrics": "auto", **call})
    named |= dict.fromkeys(("lora", "quantize", "teacher", "checkpoint"))
    named |= dict.fromkeys(("merge_adapter", "find_learning_rate"), False)
    saved = load_saved(model, named["trust_remote_code"]) if is_adapter(model) else None
    named["base"] = (saved.model, saved.tokenizer) if saved else model
    task_class = check_request(named, HFTrainer.__call__)
    arguments, _ = parse({name: value for name, value in args.items() if name in READ})
    start = load_base(named["base"], named["trust_remote_code"])
    train = rows if named["train"] is None else named["train"]
    named |= {"train": train, "validation": rows}
    options, data = read_data(start, task_class, named, arguments)
    if most is not None:
        read = data.readers["validation"]
        data.readers["validation"] = lambda *given: _spread(read(*given), most)
    if isinstance(data.tokenization, Labels):
        data.tokenization.is_trained = True
    data.setup()
    loaded = task_class.load(start, data.tokenization.config_changes(start.config))
    new = getattr(loaded, "new_weights", [])
    if new:
        raise ValueError(
            f"{model} has no trained head for {named['task']}: {', '.join(new)} would be random. "
            "Name a trained model with --model.base, or give the --args.output_dir of the run."
        )
    module: Any = task_class(loaded, arguments, named["parity"], **options)
    return module.to(arguments.device), data


def _spread(rows: Any, most: int) -> Any:
    if not isinstance(rows, datasets.Dataset):
        return rows.take(most)
    return rows.select(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int))


def _which_model(call: dict[str, Any]) -> str:
    checkpoint, folder = call.get("checkpoint"), call.get("output_dir")
    if checkpoint and checkpoint is not True:
        return str(checkpoint)
    made = ("config.json", "adapter_config.json", "discriminator")
    if folder and any(Path(folder, name).exists() for name in made):
        return folder
    if not call.get("base"):
        raise ValueError("No model: give --model.base, or the --args.output_dir of a run.")
    return call["base"]
