"""The range test finds a learning rate that teaches, and leaves the weights as they were."""

import numpy as np
import pytest
import torch

from hflit import HFTrainer
from hflit.loop.finders import LOWEST, below_lowest, smoothed
from hflit.tasks.text_classification import TextClassification


def losses(base, rows, **options):
    trainer = HFTrainer()
    trainer(base, rows, logging_steps=1, **options)
    return trainer, [e["loss"] for e in trainer.state.log_history if "loss" in e]


def easy(ragged_rows):
    rows = ragged_rows(64)
    return [{**row, "text": f"w{row['label']} " * 3 + row["text"][:9]} for row in rows]


def test_the_rate_found_is_used_from_the_first_weights(tiny_bert, ragged_rows):
    rows = easy(ragged_rows)
    options = {"max_steps": 3, "output_dir": "out"}
    trainer, found = losses(tiny_bert(dropout=0.1), rows, find_learning_rate=True, **options)
    rate = trainer.state.log_history[0]["learning_rate"]
    assert LOWEST < rate < 1
    _, given = losses(tiny_bert(dropout=0.1), rows, learning_rate=rate, max_steps=3)
    assert found == given


def test_the_rate_found_teaches_and_a_hundredth_does_not(tiny_bert, ragged_rows):
    rows = easy(ragged_rows)
    trainer, found = losses(tiny_bert(), rows, find_learning_rate=True, max_steps=100)
    rate = trainer.state.log_history[0]["learning_rate"]
    _, slow = losses(tiny_bert(), rows, learning_rate=rate / 100, max_steps=100)
    assert np.mean(found[-8:]) < 0.5 * np.mean(found[:8])
    assert np.mean(slow[-8:]) > 0.8 * np.mean(slow[:8])


def test_a_loss_without_a_value_ends_the_test_and_not_the_run(tiny_bert, ragged_rows, monkeypatch):
    """nonfinite="stop" is for the run that follows."""
    summed_loss = TextClassification.summed_loss

    def breaks_above(self, outputs, batch):
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        return summed_loss(self, outputs, batch) * (float("nan") if rate > 3e-3 else 1.0)

    monkeypatch.setattr(TextClassification, "summed_loss", breaks_above)
    trainer, found = losses(tiny_bert(), easy(ragged_rows), find_learning_rate=True, max_steps=3)
    assert trainer.state.log_history[0]["learning_rate"] <= 3e-3
    assert np.isfinite(found).all()


def test_ctrl_c_leaves_the_weights_and_the_test(tiny_bert, ragged_rows):
    """Lightning makes SystemExit(1) of it, and the weights stayed those of the test."""
    model, tokenizer = tiny_bert()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt

    model.bert.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        HFTrainer()((model, tokenizer), easy(ragged_rows), find_learning_rate=True, max_steps=3)
    for name, weight in model.state_dict().items():
        assert torch.equal(before[name], weight), name


def test_a_tenth_of_where_the_smoothed_loss_was_lowest():
    rates = np.geomspace(1e-5, 1, 51).tolist()
    falling = [2 - 1.5 / (1 + np.exp(-(i - 20) / 2)) for i in range(31)]
    valley = [*falling, *(falling[-1] + (i - 30) ** 2 / 4 for i in range(31, 51))]
    noisy = list(valley)
    noisy[3] -= 0.3  # a single lucky batch is no valley
    lucky = [0.1, *valley[1:]]  # nor is a first one, which no mean smooths yet
    for losses in (valley, noisy, lucky):  # the mean lags behind
        assert rates[30] / 10 <= below_lowest(rates, losses) <= rates[35] / 10
    with pytest.raises(ValueError, match="the loss never fell from 1e-05 to 1"):
        below_lowest(rates, list(range(51)))


def test_smoothing_begins_without_a_bias():
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smoothed([1.0, 2.0]) == pytest.approx([1.0, (0.9 * 0.1 * 1 + 0.1 * 2) / 0.19])


@pytest.mark.parametrize("schedule", ["linear", "polynomial"])
def test_a_run_goes_on_with_the_rate_it_found(schedule, tiny_bert, ragged_rows, tmp_path):
    """Once it was refused with the arguments that it had begun with.

    A polynomial schedule knows the rate that it began from, and once took the one given for it.
    """
    options = {"lr_scheduler_type": schedule, "learning_rate": 1e-5}
    options |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}
    options |= {"find_learning_rate": True, "output_dir": tmp_path}
    whole, _ = losses(tiny_bert(dropout=0.1), easy(ragged_rows), **options)
    options |= {"checkpoint": tmp_path / "checkpoint-2"}
    resumed, _ = losses(tiny_bert(dropout=0.1), easy(ragged_rows), **options)
    names = ("step", "loss", "learning_rate", "grad_norm")
    told = [
        [[entry[name] for name in names] for entry in run.state.log_history if "loss" in entry]
        for run in (whole, resumed)
    ]
    assert len(told[0]) == 4
    assert told[0] == told[1]
    with pytest.raises(ValueError, match="find_learning_rate=True there, find_learning_rate=False"):
        losses(tiny_bert(), easy(ragged_rows), **{**options, "find_learning_rate": False})


def test_what_contradicts_it_is_refused(tiny_bert, ragged_rows):
    with pytest.raises(ValueError, match="find_learning_rate=True needs a single process"):
        HFTrainer()("base", [], find_learning_rate=True, strategy="ddp_spawn", devices=2)
