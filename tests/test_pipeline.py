"""One run from the outside: what it refuses before it loads weights, leaves on disk and returns."""

import inspect
import json
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    TrainerState,
    pipeline,
)

from hflit import HFTrainer
from hflit.arguments import Arguments
from hflit.artifacts import save_artifacts
from hflit.predict import predictions
from hflit.saved import load_saved

ROWS = [{"text": f"w{n} w{n + 1}", "label": n % 2} for n in range(8)]
PAIRS = [{"a": f"w{n}", "b": "w9", "same": bool(n % 2)} for n in range(8)]


@pytest.fixture
def base(tiny_bert, tmp_path):
    """A saved base of 64 positions."""
    model, tokenizer = tiny_bert()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def no_weights(monkeypatch):
    """Fail the test if the run gets as far as loading weights."""

    def reached(*args, **kwargs):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", reached)


def with_label(label, index=3):
    return [*ROWS[:index], {"text": "w1", "label": label}, *ROWS[index + 1 :]]


def without_text(index):
    return [*ROWS[:index], {"text": None, "label": 1}, *ROWS[index + 1 :]]


STREAM = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
MISTAKES = {  # what is asked -> the error and the part of it that the user needs
    "15 unknown task": ({"task": "token-classification"}, ValueError, "text-classification"),
    "15 misspelled task": ({"task": "text_classification"}, ValueError, "Unknown task 'text_cl"),
    "unknown argument": ({"learnin_rate": 1}, TypeError, "mean 'learning_rate'"),
    "misspelled keyword of the call": ({"maxlen": 8}, TypeError, "mean 'maxlength'"),
    "12 columns of another name": (
        {"columns": "body"},
        ValueError,
        "'body' is not in .*'text', 'l",
    ),
    "12 columns too many": ({"columns": ("a", "b", "c", "d")}, ValueError, "1 to 3 columns"),
    "12 columns without a label": ({"columns": ("text", None, None)}, ValueError, "a column each"),
    "12 columns twice": ({"columns": ("text", "text")}, ValueError, "names a column twice"),
    "16 empty list": ({"train": []}, ValueError, "training data has no rows"),
    "16 empty validation": ({"validation": []}, ValueError, "validation data has no rows"),
    "16 data of another kind": ({"train": {"text": ["a"]}}, TypeError, "train is dict"),
    "16 stream of no length": ({"train": STREAM}, ValueError, "max_steps must be set"),
    "16 rows that are no dicts": ({"train": ["w1", "w2"]}, TypeError, "Row 0 of .* is str"),
    "maxlength beyond the model": ({"maxlength": 65}, ValueError, "more than the 64 tokens"),
    "maxlength of no tokens": ({"maxlength": 0}, ValueError, "at least 1 token"),
    "03 label only in validation": ({"validation": with_label(2)}, ValueError, "lacks: 2"),
    "07 one class": ({"train": ROWS[:1]}, ValueError, "a classifier needs two"),
    "08 label None": ({"train": with_label(None)}, ValueError, "Row 3 of .* no label"),
    "09 text None": ({"train": without_text(5)}, ValueError, "Row 5 of .* no text in 'text'"),
    "09 text None in a frame": ({"train": pd.DataFrame(without_text(5))}, ValueError, "Row 5"),
    "09 validation text None": ({"validation": without_text(2)}, ValueError, "Row 2 of the valid"),
    "mixed labels": ({"train": with_label("x")}, ValueError, "row 3 holds 'x'"),
    "metrics by another name": ({"metrics": "accuracy"}, ValueError, "a function, 'auto' or None"),
    "tokenizebatch of no rows": ({"tokenizebatch": 0}, ValueError, "tokenizebatch=0"),
    "merge for a classifier": ({"merge": "pack"}, ValueError, "merge='pack'"),
    "prefix for a classifier": ({"prefix": "x: "}, ValueError, "prefix='x: '"),
    "two precisions": ({"fp16": True, "precision": "bf16-mixed"}, ValueError, "precision"),
    "flag replaced by an argument": ({"max_epochs": 3}, ValueError, "Use num_train_epochs"),
    "unknown schedule": ({"lr_scheduler_type": "sine"}, ValueError, "lr_scheduler_type='sine'"),
    "evaluation without data": (
        {"eval_strategy": "epoch"},
        ValueError,
        "eval_strategy.*validation=",
    ),
    "checkpoint without folder": ({"checkpoint": True}, ValueError, "output_dir"),
    "nowhere to save": ({"save_strategy": "epoch"}, ValueError, "Give an output_dir"),
    "no such checkpoint": ({"checkpoint": "nowhere"}, ValueError, "no folder nowhere"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_met_before_weights_are_loaded(mistake, base, no_weights):
    """By pitfall: 15 trained another task in silence; 12, 16, 08, 09 were bare internal errors;
    03 came after training had run; 07 trained a regression."""
    changes, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message) as raised:
        HFTrainer()(**{"base": base, "train": ROWS, **changes})
    said = str(raised.value)
    assert "\n" not in said
    assert said.endswith((".", "?"))


def test_15_an_unknown_task_lists_those_there_are(base, no_weights):
    """Any unknown task silently trained text-classification."""
    with pytest.raises(ValueError, match="Choose one of: .*text-classification"):
        HFTrainer()(base, ROWS, task="token-classification")


# Columns.


@pytest.mark.parametrize("name", ["target", "labels", "label_ids", "input_ids", "class"])
def test_10_the_label_column_may_have_any_name(name, tiny_bert):
    """Any name but `label` gave `The model did not return a loss`."""
    rows = [{"sentence": row["text"], name: row["label"]} for row in ROWS]
    run, plain = HFTrainer(), HFTrainer()
    run(tiny_bert(), rows, rows, columns=("sentence", name), metrics="auto", max_steps=2)
    plain(tiny_bert(), ROWS, ROWS, metrics="auto", max_steps=2)
    for figure in ("train_loss", "eval_loss", "eval_accuracy"):
        assert run.metrics[figure] == plain.metrics[figure]


@pytest.mark.parametrize(
    "columns", ["body", ("body",), ["body"], ("body", "label"), ("body", None, "label")]
)
def test_12_columns_may_be_a_string_or_shorter(columns, tiny_bert):
    """A string was read letter by letter (`KeyError 't'`), a shorter tuple failed to unpack."""
    rows = [{"body": row["text"], "label": row["label"]} for row in ROWS]
    run, plain = HFTrainer(), HFTrainer()
    run(tiny_bert(), rows, columns=columns, max_steps=2)
    plain(tiny_bert(), ROWS, max_steps=2)
    assert run.metrics["train_loss"] == plain.metrics["train_loss"]


def test_pairs_of_texts(tiny_bert):
    model, tokenizer = tiny_bert()
    encoded = tokenizer([row["a"] for row in PAIRS], [row["b"] for row in PAIRS])
    labels = torch.tensor([int(row["same"]) for row in PAIRS])
    with torch.no_grad():
        inputs = {name: torch.tensor(encoded[name]) for name in encoded}
        expected = model.eval()(**inputs, labels=labels).loss.item()
    trainer = HFTrainer()
    trainer(tiny_bert(), PAIRS, columns=("a", "b", "same"), max_steps=1, learning_rate=0.0)
    assert trainer.metrics["train_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "train",
    [
        (row for row in ROWS),
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
        datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    ],
    ids=["generator", "DatasetDict", "IterableDataset"],
)
def test_16_data_that_can_only_be_read_through_trains(train, tiny_bert):
    """Generators, DatasetDicts and IterableDatasets were bare errors."""
    run, plain = HFTrainer(), HFTrainer()
    # One batch of all rows, so that the order does not matter but in the last digits.
    run(tiny_bert(), train, max_steps=2)
    plain(tiny_bert(), ROWS, max_steps=2)
    assert run.state.global_step == 2
    assert run.metrics["train_loss"] == pytest.approx(plain.metrics["train_loss"], rel=1e-5)


# What a run leaves.


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def traces(tmp_path, monkeypatch):
    """What has been written where a run might write: here, in temporary and in cache folders."""
    folders = {name: tmp_path / name for name in ("here", "temporary", "cache")}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.chdir(folders["here"])
    monkeypatch.setattr(tempfile, "tempdir", str(folders["temporary"]))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folders["cache"])
    return lambda: {name: files(folder) for name, folder in folders.items() if files(folder)}


def test_without_output_dir_nothing_is_written(tiny_bert, ragged_rows, traces):
    rows = ragged_rows(16)
    run = {"validation": rows, "metrics": "auto", "eval_strategy": "epoch", "logging_steps": 1}
    HFTrainer()(tiny_bert(), rows, cache=False, **run)
    assert traces() == {}
    # The cache of tokenized rows is the one exception, and can be switched off as above.
    HFTrainer()(tiny_bert(), rows, **run)
    assert list(traces()) == ["cache"]
    assert all(name.startswith("hflit/") for name in traces()["cache"])


def test_with_output_dir_everything_is_there(tiny_bert, ragged_rows, traces, tmp_path):
    rows = ragged_rows(16)
    folder = tmp_path / "here" / "runs" / "first"
    trainer = HFTrainer()
    model, tokenizer = trainer(
        tiny_bert(), rows, rows, cache=False, output_dir=folder, logging_steps=1
    )
    assert list(traces()) == ["here"]
    assert all(name.startswith("runs/first/") for name in traces()["here"])
    assert {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("trainer_state.json", "training_args.json"),
    } <= files(folder)
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files(folder))

    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["log_history"] == trainer.state.log_history
    assert state["global_step"] == trainer.state.global_step == 6  # 16 rows of 8, three epochs
    args = json.loads((folder / "training_args.json").read_text())
    assert args["learning_rate"] == 5e-5
    assert args["num_train_epochs"] == 3
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded("w1 w2")["input_ids"] == tokenizer("w1 w2")["input_ids"] == [2, 6, 7, 3]


def test_no_secret_is_written(tiny_bert, tmp_path):
    model, tokenizer = tiny_bert()
    args = Arguments(output_dir=str(tmp_path / "run"), hub_token="hf_secret")
    save_artifacts(args.output_dir, model, tokenizer, TrainerState(), args)
    for name in files(tmp_path / "run"):
        assert b"hf_secret" not in (tmp_path / "run" / name).read_bytes()


# What a run returns.


@pytest.fixture
def trained(tiny_bert, tmp_path):
    """A model that tells w1 from w2, its tokenizer and the folder it is saved in."""
    rows = [{"text": f"w{1 + n % 2} w9", "label": ["neg", "pos"][n % 2]} for n in range(16)]
    model, tokenizer = HFTrainer()(
        tiny_bert(), rows, learning_rate=5e-3, num_train_epochs=10, output_dir=tmp_path / "run"
    )
    return model, tokenizer, tmp_path / "run"


TEXTS = ["w1 w9", "w2 w9"]


def test_the_model_works_in_a_transformers_pipeline(trained):
    model, tokenizer, folder = trained
    assert not model.training
    inputs = tokenizer(TEXTS, return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits.softmax(-1)
    for classify in (
        pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu"),
        pipeline("text-classification", model=str(folder), device="cpu"),
    ):
        found = classify(TEXTS)
        assert [answer["label"] for answer in found] == ["neg", "pos"]
        for answer, score in zip(found, scores.max(-1).values, strict=True):
            assert answer["score"] == pytest.approx(score.item(), rel=1e-5)
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits.softmax(-1), scores)


@pytest.mark.filterwarnings("ignore")  # txtai's own
def test_the_model_works_in_txtai(trained):
    from txtai.pipeline import Labels

    model, tokenizer, folder = trained
    for path in ((model, tokenizer), str(folder)):
        labels = Labels(path, dynamic=False, gpu=False)
        assert labels.labels() == ["neg", "pos"]
        found = labels(TEXTS)  # for each text (class, score), the best first
        assert [best for (best, _), _ in found] == [0, 1]
        assert all(score > 0.5 for (_, score), _ in found)


@pytest.mark.filterwarnings("ignore")  # txtai's own
def test_arguments_by_position_mean_what_they_mean_to_txtai():
    """The 14th was merge_adapter, which txtai lacks: its merge ended in an error."""
    from txtai.pipeline import HFTrainer as Txtai

    theirs, ours = (
        list(inspect.signature(each.__call__).parameters) for each in (Txtai, HFTrainer)
    )
    assert ours[: len(theirs) - 1] == theirs[:-1]  # the last is **args


def test_a_trained_model_trains_on(trained):
    model, tokenizer, folder = trained
    before = model.classifier.weight.clone()
    rows = [{"text": "w1", "label": "pos"}, {"text": "w2", "label": "neg"}]
    again, _ = HFTrainer()(folder, rows, max_steps=1)
    assert again.config.id2label == {0: "neg", 1: "pos"}
    assert torch.allclose(again.classifier.weight, before, atol=1e-3)
    once_more, _ = HFTrainer()((model, tokenizer), rows, max_steps=1)
    assert once_more.config.id2label == {0: "neg", 1: "pos"}


def test_what_a_run_tells(tiny_bert, ragged_rows):
    trainer = HFTrainer()
    trainer(tiny_bert(), ragged_rows(16), ragged_rows(8, seed=1), metrics="auto", max_steps=3)
    assert trainer.state.global_step == trainer.lightning.global_step == 3
    assert {"train_loss", "train_runtime", "eval_loss", "eval_accuracy"} <= set(trainer.metrics)
    assert Path("checkpoint-3").exists() is False


def model_files(folder):
    return {
        each.relative_to(folder).as_posix() for each in Path(folder).rglob("*model.safetensors")
    }


FORMS = {
    "adapter": ({"lora": True}, {"adapter_model.safetensors"}),
    "whole": ({}, {"model.safetensors"}),
    "merged": ({"lora": True, "merge_adapter": True}, {"model.safetensors"}),
    "pair": (
        {"task": "token-detection", "merge": None},
        {"generator/model.safetensors", "discriminator/model.safetensors"},
    ),
}


@pytest.mark.parametrize(
    ("first", "then"),
    [("adapter", "whole"), ("adapter", "merged"), ("whole", "adapter"), ("pair", "whole"),
     ("whole", "pair")],
)  # fmt: skip
def test_a_folder_used_again_holds_the_last_model_alone(base, first, then):
    """An adapter, or a pair, that an earlier run left would be loaded in its place."""
    for name in (first, then):
        options, files = FORMS[name]
        trainer = HFTrainer()
        trainer(base, ROWS, max_steps=1, learning_rate=0.1, output_dir="out", **options)
        assert model_files("out") == files
    if then != "pair":
        saved = list(predictions(load_saved("out"), ROWS))
        assert saved == [
            {"label": each["label"], "score": pytest.approx(each["score"])}
            for each in trainer.predict(ROWS)
        ]


@pytest.mark.parametrize("then", ["adapter", "pair"])
def test_a_run_into_the_folder_of_its_base_leaves_the_base(base, then):
    """An adapter is nothing without it."""
    options, files = FORMS[then]
    HFTrainer()(base, ROWS, max_steps=1, output_dir=base, **options)
    assert model_files(base) == files | {"model.safetensors"}
    AutoModelForSequenceClassification.from_pretrained(base)


def test_metrics_are_those_of_the_weights_that_are_returned(base):
    turns = iter([2.0, 1.0, 3.0])
    trainer = HFTrainer()
    trainer(
        base, ROWS, ROWS, metrics=lambda seen: {"turn": next(turns)}, num_train_epochs=3,
        metric_for_best_model="turn", greater_is_better=False, load_best_model_at_end=True,
        eval_strategy="epoch", save_strategy="epoch", output_dir="out", logging_steps=1,
    )  # fmt: skip
    assert trainer.state.best_global_step == 2
    (entry,) = [e for e in trainer.state.log_history if e["step"] == 2 and "eval_loss" in e]
    assert trainer.metrics["eval_turn"] == 1.0
    assert trainer.metrics["eval_loss"] == entry["eval_loss"]
    assert "| turn | 1.0000 |" in Path("out/README.md").read_text()


def test_an_evaluation_that_nobody_asked_for_loses_no_model(base):
    def broken(seen):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        HFTrainer()(base, ROWS, ROWS, metrics=broken, max_steps=2, output_dir="out")
    assert list(predictions(load_saved("out"), ROWS))
    assert json.loads(Path("out/trainer_state.json").read_text())["global_step"] == 2


def test_figures_that_are_not_single_numbers_are_kept_and_not_drawn(base):
    odd = {"each": [0.5, 0.25], "array": np.array([1, 2]), "told": "well", "share": np.float32(0.5)}
    trainer = HFTrainer()
    logger = TensorBoardLogger("logs")
    settings = {"eval_strategy": "epoch", "num_train_epochs": 2, "logger": logger}
    trainer(base, ROWS, ROWS, metrics=lambda _: odd, output_dir="out", **settings)
    expected = {"eval_each": [0.5, 0.25], "eval_array": [1, 2], "eval_told": "well"}
    kept = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    for found in (trainer.metrics, next(entry for entry in kept if "eval_loss" in entry)):
        assert {name: found[name] for name in expected} == expected
        assert found["eval_share"] == 0.5
    assert "| share | 0.5000 |" in Path("out/README.md").read_text()


def test_numbers_of_numpy_are_numbers(base):
    settings = {"learning_rate": np.float32(1e-4), "seed": np.int64(3)}
    sizes = dict.fromkeys(("per_device_train_batch_size", "max_steps"), np.int64(2))
    HFTrainer()(base, ROWS, output_dir="out", **settings, **sizes)
    kept = json.loads(Path("out/training_args.json").read_text())
    assert (kept["seed"], kept["max_steps"]) == (3, 2)
