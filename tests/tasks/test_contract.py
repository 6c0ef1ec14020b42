"""What every task promises: three formats, one model; saved, it loads back to equal logits."""

import pickle

import datasets
import pandas as pd
import pytest
import torch
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

from hflit import HFTrainer
from hflit.adapters import forward_inputs
from hflit.tasks import TASKS
from tests.tasks.tiny import make, rows

FORMATS = {
    "dataset": datasets.Dataset.from_list,
    "dataframe": pd.DataFrame,
    "dicts": list,
}
# What users load: of the pair that token-detection trains, its discriminator.
LOADERS = {name: task.auto_model for name, task in TASKS.items()} | {
    "token-detection": AutoModelForTokenClassification
}
# transformers 5 has no pipeline for question-answering and sequence-sequence any more.
PIPELINES = {
    "text-classification": ("text-classification", "w1 w2"),
    "language-generation": ("text-generation", "w1 w2"),
    "language-modeling": ("fill-mask", "w1 [MASK]"),
    "token-detection": ("token-classification", "w1 w2"),
}


def outputs(model, tokenizer):
    inputs = tokenizer("w1 w2 w3", return_tensors="pt")
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    wanted = forward_inputs(model)
    with torch.no_grad():
        found = model.eval()(**{k: v for k, v in inputs.items() if k in wanted})
    names = ("start_logits", "end_logits") if "start_logits" in found else ("logits",)
    return torch.cat([found[name].flatten() for name in names])


@pytest.fixture
def trained(tmp_path):
    def run(task, form):
        options = {"stride": 8} if task == "question-answering" else {}
        trainer, data = HFTrainer(), FORMATS[form](rows(task))
        model, tokenizer = trainer(
            make(task, 0), data, data, task=task, maxlength=32, metrics="auto", max_steps=2,
            logging_steps=1, output_dir=str(tmp_path / form), **options,
        )  # fmt: skip
        return trainer, model, tokenizer, tmp_path / form

    return run


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("task", TASKS)
def test_trains_saves_and_loads_back(trained, task, form):
    trainer, model, tokenizer, folder = trained(task, form)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert torch.isfinite(torch.tensor(losses)).all()
    assert len([name for name in trainer.metrics if name.startswith("eval_")]) > 4
    assert (folder / "trainer_state.json").exists()

    halves = {"token-detection": "discriminator"}
    kept = folder / halves.get(task, "")
    half = getattr(model, halves.get(task, ""), model)
    loaded = LOADERS[task].from_pretrained(kept)
    for name, weight in half.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    # Equal weights in another place of memory: kernels may round the last digit otherwise.
    torch.testing.assert_close(
        outputs(loaded, tokenizer), outputs(half, tokenizer), rtol=0, atol=1e-6
    )
    assert AutoTokenizer.from_pretrained(kept).get_vocab() == tokenizer.get_vocab()
    if task in PIPELINES:
        name, text = PIPELINES[task]
        options = {"max_new_tokens": 3} if name == "text-generation" else {}
        assert pipeline(name, model=str(kept), device="cpu")(text, **options)


@pytest.mark.parametrize("task", TASKS)
def test_the_three_formats_train_the_same_model(trained, task):
    weights = [list(trained(task, form)[1].state_dict().values()) for form in FORMATS]
    for first, second, third in zip(*weights, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


@pytest.mark.parametrize("task", TASKS)
def test_only_the_weights_of_the_callers_model_change(task):
    model, tokenizer = make(task, 0)
    config = model.config.to_dict()
    pad, vocabulary = tokenizer.pad_token, tokenizer.get_vocab()
    data = rows(task)
    before = [dict(row) for row in data]
    options = {"stride": 8} if task == "question-answering" else {}
    trained_model, _ = HFTrainer()(
        (model, tokenizer), data, task=task, maxlength=32, max_steps=2, **options
    )
    assert model.config.to_dict() == config
    assert (tokenizer.pad_token, tokenizer.get_vocab()) == (pad, vocabulary)
    assert data == before
    for ours, theirs in zip(trained_model.parameters(), model.parameters(), strict=True):
        assert ours is theirs


@pytest.mark.parametrize("task", TASKS)
def test_loading_reaches_processes_that_are_not_copies(task):
    """A local function could not be sent to those of macOS, Windows and Python 3.14."""
    options = {"stride": 8} if task == "question-answering" else {}
    trainer = HFTrainer()
    trainer(make(task, 0), rows(task), task=task, max_steps=1, dataloader_num_workers=1, **options)
    loader = trainer.lightning.train_dataloader.batches
    sent = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
    numbers = next(iter(loader.batch_sampler))
    expected = loader.collate_fn(loader.dataset.__getitems__(numbers))
    batch = sent[1](sent[0].__getitems__(numbers))
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
