"""Every task, stopped after every update, goes on bit for bit: losses, rates, norms, weights."""

import datasets
import pytest
import torch

from hflit.tasks import TASKS
from tests.loop.test_checkpoints import assert_goes_on
from tests.tasks import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*find_unused_parameters=True was specified"),
    pytest.mark.filterwarnings("ignore:The tokenizer has new PAD/BOS/EOS tokens"),
]
TEXTS = ("language-generation", "language-modeling", "token-detection")
# 24 rows in batches of 5: the last of an epoch is short, and so is its last window.
CASES = {
    "plain": {"num_train_epochs": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "num_train_epochs": 3},
    "workers": {"dataloader_num_workers": 2},
    "group by length": {"train_sampling_strategy": "group_by_length", "num_train_epochs": 2},
    "LoRA": {"lora": {"r": 2}, "num_train_epochs": 2},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 3},
    "stream": {"max_steps": 8},
    "packing": {"merge": "pack", "num_train_epochs": 2},
    "whole words": {"whole_word": True},
    "parity": {"parity": True},
    "DDP": {"strategy": "ddp_fork", "devices": 2, "num_train_epochs": 2},
    "DDP and accumulation": {
        "strategy": "ddp_fork", "devices": 2, "gradient_accumulation_steps": 2,
        "num_train_epochs": 4,
    },
}  # fmt: skip
ONLY = {  # case -> tasks it is about
    "packing": TEXTS,
    "whole words": ("language-modeling",),
    # transformers itself does not resume exactly what draws masks while it collates.
    "parity": ("text-classification", "question-answering", "language-generation"),
}


def with_dropout(task):
    model, tokenizer = tiny.make(task, seed=1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model, tokenizer


@pytest.mark.parametrize(
    ("task", "case"),
    [(task, case) for case in CASES for task in TASKS if task in ONLY.get(case, TASKS)],
)
def test_every_stop_goes_on(task, case, tmp_path):
    arguments = {"per_device_train_batch_size": 5, "task": task, "maxlength": 16, **CASES[case]}
    rows = tiny.rows(task)
    if task == "question-answering":
        arguments["stride"] = 4
    if case == "stream":
        rows = datasets.Dataset.from_list(rows).to_iterable_dataset()
    validation = tiny.rows(task)[:6] if "eval_strategy" in arguments else None
    assert_goes_on(lambda: with_dropout(task), rows, tmp_path, None, validation, **arguments)
