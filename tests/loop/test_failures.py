"""Runs that fail: what they say, and what is left to go on from."""

import inspect
import logging
import re

import pytest
import torch
from transformers import BertForSequenceClassification, TrainerCallback

from hflit import HFTrainer
from hflit.loop.folders import flaw
from hflit.tasks import TASKS
from tests.loop.test_checkpoints import losses, names, train
from tests.tasks import tiny


class Fail(TrainerCallback):
    """Raises an error when an event comes after so many updates."""

    def __init__(self, event, step):
        self.step = step
        setattr(self, event, self.fail)

    def fail(self, args, state, control, **_):
        if state.global_step == self.step:
            raise LookupError("mine")


def bert(tiny_bert, rows, folder, **arguments):
    settings = {"eval_strategy": "epoch", "save_steps": 100, "output_dir": str(folder)}
    return train(tiny_bert(dropout=0.1), rows(37), rows(9, seed=1), **{**settings, **arguments})


# Where an error comes from -> the update after which all is whole, if any is.
EVENTS = {
    "on_step_begin": (3, 3),
    "on_substep_end": (3, 3),
    "on_pre_optimizer_step": (3, 3),
    "on_optimizer_step": (3, None),  # the weights have moved, the schedule has not
    "on_step_end": (3, 3),
    "on_log": (3, 3),
    "on_evaluate": (5, 5),
    "on_epoch_end": (5, 5),
    "on_epoch_begin": (5, 5),
}


@pytest.mark.parametrize("event", EVENTS)
def test_an_error_saves_the_last_whole_state(tiny_bert, ragged_rows, tmp_path, caplog, event):
    step, saved = EVENTS[event]
    both = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    whole, model = bert(tiny_bert, ragged_rows, tmp_path / "whole", **both)
    with pytest.raises(LookupError, match="mine"):
        bert(tiny_bert, ragged_rows, tmp_path / "run", callbacks=[Fail(event, step)], **both)
    if saved is None:
        assert names(tmp_path / "run") == []
        assert "failed within update 4, of which nothing whole can be saved" in caplog.text
        return
    assert names(tmp_path / "run") == [f"checkpoint-{saved}"]
    assert f"failed after update {saved}; checkpoint-{saved} is saved" in caplog.text
    again, resumed = bert(tiny_bert, ragged_rows, tmp_path / "run", checkpoint=True, **both)
    if event != "on_step_end":  # before which nothing of update 3 was logged
        assert losses(again.state, step) == losses(whole.state, step)
    for name, weight in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


def test_an_error_leaves_nothing_where_nothing_was_asked_for(tiny_bert, ragged_rows, tmp_path):
    with pytest.raises(LookupError):
        bert(tiny_bert, ragged_rows, tmp_path, callbacks=[Fail("on_step_begin", 3)],
             save_strategy="no")  # fmt: skip
    assert names(tmp_path) == []


def test_an_error_whose_checkpoint_cannot_be_written_stays_the_error(
    tiny_bert, ragged_rows, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("hflit.loop.checkpoints.write_whole", full)
    with pytest.raises(LookupError, match="mine"):
        bert(tiny_bert, ragged_rows, tmp_path, callbacks=[Fail("on_step_begin", 3)])
    assert "checkpoint-3 could not be written: [Errno 28]" in caplog.text
    assert "No earlier one is there" in caplog.text


def full(folder, write):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("failed_save", ["continue", "stop"])
def test_a_full_disk_goes_on_or_stops_as_asked(
    tiny_bert, ragged_rows, tmp_path, monkeypatch, caplog, failed_save
):
    save = torch.save

    def some(thing, path):
        if "checkpoint-2" in str(path):
            full(path, None)
        save(thing, path)

    monkeypatch.setattr(torch, "save", some)
    given = {"save_steps": 1, "max_steps": 3, "failed_save": failed_save}
    if failed_save == "continue":
        bert(tiny_bert, ragged_rows, tmp_path, **given)
        assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]
        assert re.search("checkpoint-1 is still whole. The run goes on", caplog.text)
    else:
        with pytest.raises(OSError, match="No space left.*checkpoint-1 is still whole. Make room"):
            bert(tiny_bert, ragged_rows, tmp_path, **given)
        assert names(tmp_path) == ["checkpoint-1"]
    assert flaw(tmp_path / "checkpoint-1") is None


# Numbers that are not finite.


@pytest.fixture
def poisoned(monkeypatch):
    """Let the model say NaN, or infinity, about every row that begins with the word w13."""
    forward = BertForSequenceClassification.forward
    word = tiny.make("text-classification", 0)[1].convert_tokens_to_ids("w13")

    def poison(value):
        def poisoned_forward(self, input_ids=None, attention_mask=None, **inputs):
            out = forward(self, input_ids=input_ids, attention_mask=attention_mask, **inputs)
            poison = torch.where(input_ids[:, 1] == word, value, 1.0)
            out["logits"] = out["logits"] * poison[:, None]
            return out

        poisoned_forward.__signature__ = inspect.signature(forward)
        poisoned_forward.__module__ = forward.__module__  # else its own loss would be trained
        monkeypatch.setattr(BertForSequenceClassification, "forward", poisoned_forward)

    return poison


POISON = 13  # the only row that begins with w13


def poisoned_rows():
    rows = tiny.rows("text-classification")
    return [
        {**row, "text": "w13 w2" if number == POISON else f"w1 {row['text']}"}
        for number, row in enumerate(rows)
    ]


def fit(**arguments):
    base = tiny.make("text-classification", 0)
    given = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3,
             "logging_steps": 1, "seed": 3, **arguments}  # fmt: skip
    trainer = HFTrainer()
    model, _ = trainer(base, poisoned_rows(), **given)
    return trainer, model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_an_error_before_it_is_made(poisoned, value, tmp_path):
    poisoned(value)
    with pytest.raises(ValueError, match="would destroy the weights") as error:
        fit(output_dir=str(tmp_path), save_strategy="steps", save_steps=100)
    update = int(re.search(r"Update (\d)", str(error.value))[1])
    told = re.search(
        r"the loss of (micro-batch \d of 3) \(training inputs ([\d, ]+)\)", str(error.value)
    )
    assert str(POISON) in told[2].split(", ")
    assert len(told[2].split(", ")) == 2
    assert "nonfinite='skip'" in str(error.value)
    # What was learned before is saved.
    assert names(tmp_path) == [f"checkpoint-{update - 1}"]
    fit(output_dir=str(tmp_path), checkpoint=True, nonfinite="skip")


def test_an_update_that_is_not_finite_can_be_left_out(poisoned, caplog):
    poisoned(float("nan"))
    kept = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, **_):
            weights = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
            kept[state.global_step] = (weights, optimizer.param_groups[0]["lr"])

    trainer, _ = fit(nonfinite="skip", callbacks=[Keep()])
    left_out = [int(n) for n in re.findall(r"Update (\d) is left out: the loss of", caplog.text)]
    assert 1 <= len(left_out) <= 2  # once in each epoch of 4 updates
    same = [n for n in kept if n > 1 and torch.equal(kept[n - 1][0], kept[n][0])]
    assert same == left_out
    assert trainer.state.global_step == 6
    # The schedule moves on: 5e-5 falls to 0 in a line over the 6 updates.
    rates = [rate for _, rate in kept.values()]
    assert rates == pytest.approx([5e-5 * (6 - n) / 6 for n in range(1, 7)])
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(loss == loss for loss in logged)


@pytest.mark.filterwarnings("ignore:.*find_unused_parameters=True was specified")
@pytest.mark.parametrize("strategy", ["ddp_fork", "fsdp_fork"])
def test_each_process_names_the_rows_of_the_one_that_has_them(poisoned, strategy, tmp_path):
    """Once the other one named its own rows, which are good."""
    poisoned(float("nan"))
    told = logging.FileHandler(tmp_path / "told")  # by both
    logging.getLogger("hflit").addHandler(told)
    try:
        fit(nonfinite="skip", strategy=strategy, devices=2, use_cpu=True, max_steps=2)
    finally:
        logging.getLogger("hflit").removeHandler(told)
        told.close()
    lines = [each for each in (tmp_path / "told").read_text().splitlines() if "left out" in each]
    assert len(lines) % 2 == 0
    assert lines
    for line in lines:
        told = re.search(r"is left out: the loss of .* \(training inputs ([\d, ]+)\) is nan", line)
        assert str(POISON) in told[1].split(", ")


@pytest.mark.filterwarnings("ignore:parity=True copies:UserWarning")
@pytest.mark.parametrize("given", [{"nonfinite": "ignore"}, {"parity": True}])
def test_transformers_goes_on_with_nan_in_all_weights(given):
    broken = {"optim": "sgd", "learning_rate": 1e38, "max_grad_norm": 0.0}
    _, model = fit(**given, **broken)
    assert torch.isnan(model.classifier.weight).all()


def test_weights_that_were_not_finite_are_told_of():
    model, tokenizer = tiny.make("text-classification", 0)
    with torch.no_grad():
        model.bert.pooler.dense.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="the weight bert.pooler.dense.weight was not finite"):
        HFTrainer()((model, tokenizer), tiny.rows("text-classification"), max_steps=1)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_names_what_is_not_finite(task):
    base = tiny.make(task, 0)
    options = {"stride": 4} if task == "question-answering" else {}
    with pytest.raises(ValueError, match="Update . .*(training inputs|was not finite before it)"):
        HFTrainer()(base, tiny.rows(task), task=task, maxlength=16, max_steps=4, optim="sgd",
                    learning_rate=1e30, max_grad_norm=0.0, seed=1, **options)  # fmt: skip


# Memory.


def test_out_of_memory_names_the_batch_its_tokens_and_what_to_set(monkeypatch, tmp_path):
    forward = BertForSequenceClassification.forward

    def small(self, input_ids=None, **inputs):
        if self.training and input_ids.shape[1] > 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, input_ids=input_ids, **inputs)

    small.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(BertForSequenceClassification, "forward", small)
    rows = [{"text": "w1 " * (20 if i == 7 else 3), "label": i % 2} for i in range(12)]
    base = tiny.make("text-classification", 0, labels=2)
    with pytest.raises(MemoryError) as error:
        HFTrainer()(base, rows, per_device_train_batch_size=3, parity=True, num_train_epochs=1,
                    save_strategy="steps", save_steps=100, output_dir=str(tmp_path))  # fmt: skip
    told = str(error.value)
    named = re.search(r"at micro-batch 1 of 1 \(training inputs ([\d, ]+)\)", told)[1]
    assert "7" in named.split(", ")
    # 3 rows, of 20 + 2 and 3 + 2 and 3 + 2 tokens
    assert "3 rows of up to 22 tokens, 32 in all and 66 with padding" in told
    for advice in ("per_device_train_batch_size=3", "maxlength", "activation_checkpointing=True"):
        assert advice in told


def test_out_of_memory_in_an_evaluation_says_what_to_set(monkeypatch):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("hflit.loop.run.evaluate", fail)
    rows = tiny.rows("text-classification")
    with pytest.raises(MemoryError, match="lower per_device_eval_batch_size"):
        HFTrainer()(tiny.make("text-classification", 0), rows, rows, eval_on_start=True)
