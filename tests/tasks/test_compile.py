"""torch_compile: once for the first shape, and once for all others."""

import random

import pytest
from torch._dynamo.utils import counters

from hflit import HFTrainer
from tests.conftest import WORDS
from tests.tasks.tiny import make


@pytest.mark.parametrize("task", ["text-classification", "language-generation"])
def test_lengths_are_not_compiled_one_by_one(task):
    shapes, draw = set(), random.Random(0)
    model, tokenizer = make(task, 0)
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.add(inputs["input_ids"].shape), with_kwargs=True
    )
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 50))) for _ in range(96)]
    rows = [{"text": text, "label": n % 3} for n, text in enumerate(texts)]
    counters.clear()
    HFTrainer()(
        (model, tokenizer), rows, task=task, merge=None if "language" in task else "concat",
        num_train_epochs=1, torch_compile=True, torch_compile_backend="eager", use_cpu=True,
        cache=False,
    )  # fmt: skip
    hook.remove()
    assert len(shapes) >= 8
    assert counters["stats"]["unique_graphs"] <= 2
