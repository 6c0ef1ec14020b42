"""Runs on a pretended accelerator, and the same on the CPU, told as JSON.

    python -m tests.device.pretended LIBRARY

A program of its own, since the whole process has an accelerator from then on.
"""

import json
import sys
import tempfile
import traceback
import types
from pathlib import Path

import numpy as np
import torch
import transformers
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

from hflit import HFTrainer
from hflit.tasks import TASKS, module
from tests.reference import without_times
from tests.tasks.tiny import make, rows

NAME = "pretended"
LABELS = {
    "regression": [0.5, 2.0, 3.5],
    "multi_label_classification": [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]],
}
RUNS = {
    **{task: {"task": task, "metrics": "auto"} for task in TASKS},
    "question-answering": {"task": "question-answering", "metrics": "auto", "stride": 8},
    "regression": {"metrics": "auto", "problem": "regression"},
    "several labels": {"metrics": "auto", "problem": "multi_label_classification"},
    "bf16": {"precision": "bf16-mixed"},
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "lora": {"lora": {"lora_dropout": 0.0}, "task": "language-generation"},
    "pack": {"task": "language-generation", "merge": "pack", "maxlength": 16},
    "whole words": {"task": "language-modeling", "merge": None, "whole_word": True},
    "smoothing": {"task": "sequence-sequence", "label_smoothing_factor": 0.1},
    "teacher": {"task": "language-generation", "teacher": "language-generation"},
    "parity": {"task": "language-generation", "parity": True},
}


def backend() -> types.ModuleType:
    """What `torch.pretended` is. The host draws its random numbers; their state is a dummy."""
    made = types.ModuleType(f"torch.{NAME}")
    made.is_available = made.is_initialized = lambda: True
    made.device_count = lambda: 1
    made.current_device = lambda: 0
    made._is_in_bad_fork = lambda: False
    made.manual_seed_all = lambda seed: None
    made.random = torch.tensor([7], dtype=torch.uint8)
    made.get_rng_state = lambda device=0: made.random
    made.set_rng_state = lambda state, device=0: setattr(made, "random", state)
    made.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return made


class Pretended(Accelerator):
    """The accelerator as Lightning takes it."""

    def setup_device(self, device):
        assert device == torch.device(NAME, 0)

    def teardown(self):
        pass

    def get_device_stats(self, device):
        return {}

    @staticmethod
    def parse_devices(devices):
        return list(range(devices))

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device(NAME, index) for index in devices]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return NAME


class Places(Callback):
    """Where weights and batches lie."""

    def __init__(self):
        self.found = set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        tensors = [value for each in batch for value in each.values()]
        self.found.update(each.device.type for each in (*tensors, *pl_module.parameters()))


def pretend(library: str) -> None:
    """Load the compiled `pretended.cpp`: from here on torch finds an accelerator."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, backend())
    torch.utils.generate_methods_for_privateuse1_backend()
    # Or weights that are used twice would be moved to it as two.
    torch.__future__.set_swap_module_params_on_conversion(True)


def there() -> dict:
    """Arguments that put a run on the accelerator."""
    strategy = SingleDeviceStrategy(torch.device(NAME, 0))
    return {"accelerator": Pretended(), "devices": 1, "strategy": strategy}


def run(call: dict, **where) -> tuple[list[dict], list[str], HFTrainer]:
    """Train: the log without times, where weights and batches lay, and the trainer."""
    call = {"task": "text-classification", "num_train_epochs": 2, **call}
    task = call["task"]
    base = make("language-modeling" if task == "token-detection" else task, seed=0)
    data = rows(task)
    if problem := call.pop("problem", None):
        labels = LABELS[problem]
        base = make(task, 0, labels=len(np.atleast_1d(labels[0])), problem=problem)
        data = [{**row, "label": labels[i % 3]} for i, row in enumerate(data)]
    if "teacher" in call:
        call["teacher"] = make(call["teacher"], seed=1)
    trainer, places = HFTrainer(), Places()
    trainer(
        base, data, data[:10], eval_strategy="epoch", logging_steps=1, enable_progress_bar=False,
        cache=False, callbacks=[places], **call, **where,
    )  # fmt: skip
    log = [without_times(entry) for entry in trainer.state.log_history]
    return log, sorted(places.found), trainer


def mixing() -> str:
    """What torch says of a sum across devices."""
    try:
        torch.ones(2, device=NAME) + torch.ones(2)
    except RuntimeError as error:
        return str(error)
    return ""


def both(call: dict) -> dict:
    """The same call there and here, and a prediction there."""
    log, devices, trainer = run(call, **there())
    guesses = trainer.predict(rows(trainer.saved.task)[:3])
    devices.append(next(trainer.saved.model.parameters()).device.type)
    here, *_ = run(call, use_cpu=True)
    return {"there": log, "here": here, "devices": devices, "guesses": len(guesses)}


def main() -> None:
    """Run everything and print what came out."""
    pretend(sys.argv[1])
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # asks CUDA and others
    module.forward_cost = lambda *_: 1.0  # so that every batch is cut
    told: dict = {"mixing": mixing()}
    for name, call in RUNS.items():
        try:
            told[name] = both(call)
        except Exception:  # the test is to tell of it, and of the other runs
            told[name] = {"failed": traceback.format_exc()}
    with tempfile.TemporaryDirectory() as folder:
        call = {"output_dir": folder, "save_strategy": "steps", "save_steps": 2}
        whole, *_ = run(call, **there())
        torch.pretended.random += 1
        resumed, *_ = run({**call, "checkpoint": str(Path(folder, "checkpoint-2"))}, **there())
    random = torch.pretended.random.tolist()
    told["resume"] = {"whole": whole, "resumed": resumed, "random": random}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
