"""Evaluation: what it costs and what is left of the model."""

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from transformers import EarlyStoppingCallback
from transformers.trainer_pt_utils import EvalLoopContainer

from hflit import HFTrainer
from tests.arguments.conftest import SETTINGS
from tests.arguments.coverage import seen
from tests.reference import assert_same_run, reference_trainer


@pytest.mark.parametrize("argument", ["bf16_full_eval", "fp16_full_eval"])
def test_half_weights_are_for_evaluation_only(argument, base, rows, mine):
    trainer = reference_trainer(*base(), *rows, **{**SETTINGS, argument: True})
    trainer.train()
    expected = trainer.evaluate()["eval_loss"]
    state, model, _ = mine(**{argument: True})
    whole, whole_model, _ = mine()
    assert state.log_history[-1]["eval_loss"] == expected
    assert expected != whole.log_history[-1]["eval_loss"]
    for name, weight in whole_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name

    # While it trains, transformers evaluates in whole weights, and we only under parity.
    given = {"eval_strategy": "steps", "eval_steps": 2, argument: True}
    losses = {
        parity: mine(**given, parity=parity)[0].log_history[2]["eval_loss"]
        for parity in (True, False)
    }
    assert losses[False] != losses[True]
    assert losses[False] == pytest.approx(losses[True], abs=1e-2)


def test_predictions_leave_the_device(theirs, mine, monkeypatch):
    calls, move = [], EvalLoopContainer.to_cpu_and_numpy
    monkeypatch.setattr(
        EvalLoopContainer, "to_cpu_and_numpy", lambda self: [calls.append(1), move(self)]
    )
    counts = []
    for given in ({}, {"eval_accumulation_steps": 1}):
        given |= {"eval_strategy": "epoch", "metrics": seen}
        runs = []
        for run in (mine, theirs):
            calls.clear()
            runs.append(run(**given))
            counts.append(len(calls))
        assert_same_run(*runs)
    assert counts[0] == counts[1] < counts[2] == counts[3]


def test_loss_only_spares_the_own_metrics(base, rows):
    for only in (False, True):
        trainer = HFTrainer()
        trainer(base(), *rows, metrics="auto", prediction_loss_only=only, **SETTINGS)
        assert ("eval_accuracy" in trainer.metrics) is not only


def test_metrics_of_batches_must_say_so(mine):
    with pytest.raises(ValueError, match="it must take compute_result"):
        mine(batch_eval_metrics=True, metrics=seen)


def test_metrics_of_batches_get_whole_inputs(theirs, mine):
    def keys(prediction, compute_result):
        return {"inputs": sorted(prediction.inputs)} if compute_result else {}

    given = {"eval_strategy": "epoch", "batch_eval_metrics": True, "metrics": keys}
    given["include_for_metrics"] = ["inputs", "loss"]
    actual = mine(**given)
    assert_same_run(actual, theirs(**given))
    (entry, _) = [e for e in actual[0].log_history if "eval_inputs" in e]
    assert "labels" in entry["eval_inputs"]


def test_memory_of_evaluation_is_no_reason_for_smaller_batches(mine):
    def full(prediction):
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")

    with pytest.raises(MemoryError, match="lower per_device_eval_batch_size"):
        mine(auto_find_batch_size=True, metrics=full, eval_strategy="epoch")


def test_best_figure_is_that_of_transformers(theirs, mine):
    def accuracy(prediction):
        return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}

    given = {"eval_strategy": "steps", "eval_steps": 1, "metrics": accuracy, "learning_rate": 2e-2}
    found = []
    for extra in ({}, {"greater_is_better": False}):
        best = {"metric_for_best_model": "accuracy", **extra}
        expected, state = theirs(**given, **best)[0], mine(**given, **best)[0]
        figures = [e["eval_accuracy"] for e in expected.log_history if "eval_accuracy" in e]
        assert state.best_metric == expected.best_metric
        assert expected.best_metric == (min(figures) if extra else max(figures))
        found.append(state.best_metric)
    assert found[0] != found[1]


@pytest.mark.parametrize(("limit", "expected"), [(2, 4), (0.5, 4), (100, 9), (None, 9)])
def test_evaluation_ends_with_limit_val_batches(limit, expected, mine):
    def count(prediction):
        return {"rows": len(prediction.label_ids)}

    given = {"per_device_eval_batch_size": 2, "metrics": count, "limit_val_batches": limit}
    assert mine(**given)[0].log_history[-1]["eval_rows"] == expected


@pytest.mark.filterwarnings("ignore:The number of training batches.*smaller than the logging")
def test_39_early_stopping_stops_where_transformers_does(theirs, mine):
    given = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
        "learning_rate": 0.3,  # overshoots
        "max_steps": 12,
    }
    expected = theirs(**given, callbacks=[EarlyStoppingCallback(2)])[0]
    state = mine(
        **given,
        callbacks=[EarlyStoppingCallback(2), LearningRateMonitor()],
        logger=[CSVLogger(".")],
    )[0]
    assert 2 < state.global_step < 12
    assert state.global_step == expected.global_step
    assert state.best_metric == expected.best_metric
    # The monitor goes by updates; once by epochs, since nothing had told it.
    (file,) = Path(".").glob("lightning_logs/*/metrics.csv")
    rates = [row["lr-AdamW/pg1"] for row in csv.DictReader(file.read_text().splitlines())]
    assert len([rate for rate in rates if rate]) == state.global_step
