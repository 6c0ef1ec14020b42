"""verify_resume: quiet where a run goes on exactly, and loud where it does not."""

import re
from pathlib import Path

import pytest
import torch

from hflit import verify_resume
from hflit.loop.resume import Checkpoint
from hflit.tasks import TASKS
from tests.tasks import tiny


@pytest.mark.parametrize("task", TASKS)
def test_every_task_goes_on(task):
    options = {"stride": 4} if task == "question-answering" else {}
    base = tiny.make(task, 0)
    before = {name: each.clone() for name, each in base[0].state_dict().items()}
    given = {"task": task, "maxlength": 16, "eval_strategy": "epoch", **options}
    rows = tiny.rows(task)
    assert verify_resume(base=base, train=rows, validation=rows, steps=5, stop=3, **given) is None
    for name, weight in base[0].state_dict().items():  # the caller's model is as it was
        assert torch.equal(weight, before[name]), name
    assert not list(Path().iterdir())


def verify(dropout=0.1):
    model, tokenizer = tiny.make("text-classification", 0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return verify_resume(base=(model, tokenizer), train=tiny.rows("text-classification"), steps=6)


def test_random_numbers_that_are_lost_are_told_of(monkeypatch):
    monkeypatch.setattr(Checkpoint, "restore_random", lambda *_: None)
    told = verify()
    assert re.match(r"update 4: loss is 1\.\d+ in the whole run, 1\.\d+ in the one resumed", told)
    assert verify(dropout=0.0) is None


def test_weights_that_are_lost_are_told_of(monkeypatch):
    """The last update is compared too, whose loss nothing shows."""
    load = Checkpoint.load_training

    def lossy(self, trainer, place):
        load(self, trainer, place)
        for state in trainer.optimizers[0].state.values():
            state["exp_avg_sq"] *= 1.5

    monkeypatch.setattr(Checkpoint, "load_training", lossy)
    model, tokenizer = tiny.make("text-classification", 0)
    rows = tiny.rows("text-classification")
    told = verify_resume(base=(model, tokenizer), train=rows, steps=4, stop=3)
    assert re.match("after update 4: weight bert.* differs by up to ", told)


def test_a_run_that_never_repeats_is_told_of(monkeypatch):
    monkeypatch.setattr("hflit.pipeline.set_seed", lambda seed: None)
    assert "so the run itself never repeats: see full_determinism" in verify()


def test_a_stop_outside_the_run_is_an_error():
    with pytest.raises(ValueError, match="stop=8 must be at least 1 and less than steps=8"):
        verify_resume(base="no-such-model", train=[], stop=8)


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_evaluations_is_refused(schedule):
    """Once an eval strategy was said to be missing, though it was given."""
    given = {"lr_scheduler_type": schedule, "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match=f"{schedule}' follows evaluations, which the trial"):
        verify_resume(base="no", train=[], **given)
