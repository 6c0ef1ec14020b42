"""torch_compile: once for the first shape, and once for all others."""

import random

import pytest
from torch._dynamo.utils import counters

from hflit import HFTrainer
from tests.conftest import WORDS
from tests.tasks.tiny import make, rows


@pytest.mark.parametrize("task", ["text-classification", "language-generation"])
def test_lengths_are_not_compiled_one_by_one(task):
    shapes, draw = set(), random.Random(0)
    model, tokenizer = make(task, 0)
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.add(inputs["input_ids"].shape), with_kwargs=True
    )
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 50))) for _ in range(96)]
    data = [{"text": text, "label": n % 3} for n, text in enumerate(texts)]
    counters.clear()
    HFTrainer()(
        (model, tokenizer), data, task=task, merge=None if "language" in task else "concat",
        num_train_epochs=1, torch_compile=True, torch_compile_backend="eager", use_cpu=True,
        cache=False,
    )  # fmt: skip
    hook.remove()
    assert len(shapes) >= 8
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of tracing
def test_a_detection_pair_learns_the_same():
    """It was an AttributeError in the first update, of layers that the compiler found replaced."""

    def losses(**options):
        trainer = HFTrainer()
        trainer(
            make("token-detection", 0), rows("token-detection"), task="token-detection",
            max_steps=2, logging_steps=1, use_cpu=True, cache=False, **options,
        )  # fmt: skip
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    compiled = losses(torch_compile=True, torch_compile_backend="eager")
    assert compiled == pytest.approx(losses(), rel=1e-6)
