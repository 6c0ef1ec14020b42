"""Checkpoints: transformers' layout, whole or not there, and runs that go on bit for bit."""

import dataclasses
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import safe_globals

from hflit import HFTrainer
from hflit.arguments import parse
from hflit.artifacts import save_artifacts
from hflit.loop.folders import clean, flaw, write_whole
from hflit.tasks import TASKS
from tests.reference import Recorder, without_times
from tests.tasks import test_language as language
from tests.tasks import tiny

SETTINGS = {
    "learning_rate": 5e-4,
    "weight_decay": 0.01,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 2,
    "logging_steps": 1,
    "seed": 3,
    "save_strategy": "steps",
    "save_steps": 1,
}


def train(base, rows, validation=None, **arguments):
    """A run of ours: the trainer and the model."""
    trainer = HFTrainer()
    model, _ = trainer(base, rows, validation, **{**SETTINGS, **arguments})
    return trainer, model


def losses(state, after=0):
    kept = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    return [
        {k: v for k, v in entry.items() if k in kept}
        for entry in state.log_history
        if entry["step"] > after and ("loss" in entry or "eval_loss" in entry)
    ]


def assert_goes_on(make, rows, folder, steps, validation=None, **arguments):
    """A run that goes on after each of the steps ends as the one that never stopped.

    Without steps, after all of them but the last.
    """
    arguments["output_dir"] = str(folder)
    whole, model = train(make(), rows, validation, **arguments)
    if steps is None:
        steps = range(1, whole.state.global_step)
        assert len(steps) >= 2
    arguments["save_strategy"] = "no"
    for step in steps:
        again, resumed = train(
            make(), rows, validation, checkpoint=folder / f"checkpoint-{step}", **arguments
        )
        assert losses(again.state) == losses(whole.state), step
        assert again.state.global_step == whole.state.global_step
        if "devices" not in arguments:
            assert again.lightning.global_step == whole.state.global_step
        for name, weight in model.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], weight), (step, name)
        if not arguments.get("parity"):
            assert again.metrics["train_loss"] == whole.metrics["train_loss"]


CASES = {
    "default": ({}, (4, 5, 7)),
    "windows": ({"gradient_accumulation_steps": 3}, (1, 2, 3)),
    "double": ({"precision": "64-true"}, (5,)),
    "rounded": ({"precision": "bf16-true", "optim": "adafactor"}, (5,)),
    "parity": ({"parity": True}, (1, 5, 7)),
    "evaluation": ({"eval_strategy": "epoch", "logging_steps": 3}, (4, 5, 6)),
    "workers": ({"dataloader_num_workers": 2}, (3, 5)),
    "lasting workers": (
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, (3, 5)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_run_goes_on_bit_for_bit(tiny_bert, ragged_rows, tmp_path, case):
    arguments, steps = case
    validation = ragged_rows(9, seed=1) if "eval_strategy" in arguments else None
    assert_goes_on(
        lambda: tiny_bert(dropout=0.1), ragged_rows(37), tmp_path, steps, validation, **arguments
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_task_goes_on(task, tmp_path):
    """Masks, and the discriminator's samples, are drawn as in the run that never stopped."""
    options = {"stride": 4} if task == "question-answering" else {}
    assert_goes_on(
        lambda: tiny.make(task, seed=1),
        tiny.rows(task),
        tmp_path,
        (1, 3),
        task=task,
        maxlength=16,
        **options,
    )


@pytest.mark.parametrize("task", ["text-classification", "language-modeling"])
def test_a_stream_goes_on(tiny_bert, tmp_path, task):
    """24 rows in batches of 8, so the stream is read again after 3 updates."""

    def make():
        if task == "language-modeling":
            return tiny.make(task, seed=1)
        return tiny_bert(num_labels=3, dropout=0.1)

    rows = datasets.Dataset.from_list(tiny.rows(task)).to_iterable_dataset()
    options = {"merge": None} if task == "language-modeling" else {}
    assert_goes_on(make, rows, tmp_path, (1, 3, 4), task=task, max_steps=8, **options)


def reference(base, rows, folder, resume=None, validation=None, callbacks=(), **arguments):
    """A run of transformers: the trainer and the model."""
    model, tokenizer = base

    def tokenized(rows):
        return datasets.Dataset.from_list(
            [{**tokenizer(row["text"], truncation=True), "label": row["label"]} for row in rows]
        )

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            **{**SETTINGS, **arguments},
            output_dir=str(folder),
            use_cpu=True,
            disable_tqdm=False,
            report_to="none",
        ),
        train_dataset=tokenized(rows),
        eval_dataset=None if validation is None else tokenized(validation),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, model


@pytest.mark.filterwarnings("ignore:parity=True copies:UserWarning")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_checkpoints_are_interchangeable(tiny_bert, ragged_rows, tmp_path, accumulation):
    rows = ragged_rows(37)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    arguments = {"gradient_accumulation_steps": accumulation}

    def make():
        return tiny_bert(dropout=0.1)

    whole, model = reference(make(), rows, theirs, **arguments)
    train(make(), rows, output_dir=str(ours), parity=True, **arguments)
    per_epoch = 5 // accumulation + (accumulation > 1)
    for step in (2, per_epoch):
        name = f"checkpoint-{step}"
        runs = {
            "ours from theirs": train(
                make(), rows, parity=True, checkpoint=theirs / name, save_strategy="no", **arguments
            ),
            "theirs from ours": reference(
                make(), rows, tmp_path, str(ours / name), save_strategy="no", **arguments
            ),
        }
        for told, (trainer, resumed) in runs.items():
            assert losses(trainer.state, step) == losses(whole.state, step), (told, step)
            for key, weight in model.state_dict().items():
                assert torch.equal(resumed.state_dict()[key], weight), (told, step, key)


@pytest.mark.parametrize("task", language.MODELS)
def test_language_models_are_interchangeable(task, tmp_path, monkeypatch):
    """Under parity even where a resumed run of transformers masks otherwise than a whole one."""
    texts = [row["text"] for row in tiny.rows("language-modeling")]
    settings = {**SETTINGS, "max_steps": 5, "save_steps": 2}
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    resume = {}
    begin = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self: begin(self, **resume))

    def run(side, folder, at=None):
        base = language.MODELS[task](dropout=0.1)
        if side == "ours":
            trainer, model, _ = language.train(
                task, base, texts, parity=True, output_dir=str(folder), checkpoint=at, **settings
            )
            return trainer.state, model
        resume.clear()
        resume.update({"resume_from_checkpoint": at and str(at)})
        return language.reference(task, base, texts, **{"output_dir": str(folder), **settings})

    whole, _ = run("theirs", theirs)
    run("ours", ours)
    name = "checkpoint-2"
    expected, model = run("theirs", tmp_path / "1", theirs / name)
    if task == "language-generation":
        assert losses(expected, 2) == losses(whole, 2)
    for side, at in (("ours", theirs / name), ("theirs", ours / name)):
        state, resumed = run(side, tmp_path / "2", at)
        assert losses(state, 2) == losses(expected, 2), side
        for key, weight in model.state_dict().items():
            assert torch.equal(resumed.state_dict()[key], weight), (side, key)


def run_both(tiny_bert, ragged_rows, tmp_path, resume=None, **arguments):
    """The same run under transformers and under ours: state, events and folders of each."""
    rows, validation = ragged_rows(37), ragged_rows(9, seed=1)
    found = []
    for name in ("theirs", "ours"):
        recorder, folder = Recorder(), tmp_path / name / "run"
        base = tiny_bert(dropout=0.1)
        if name == "theirs":
            at = None if resume is None else str(folder / resume)
            trainer, model = reference(
                base, rows, folder, at, validation, callbacks=[recorder], **arguments
            )
        else:
            trainer, model = train(
                base,
                rows,
                validation,
                parity=True,
                output_dir=str(folder),
                checkpoint=None if resume is None else folder / resume,
                callbacks=[recorder],
                **arguments,
            )
        found.append((trainer.state, recorder.events, folder, model))
    return found


def comparable(state, folder):
    """The fields of a state, without run times and our own entry."""
    values = dataclasses.asdict(state)
    values["log_history"] = [without_times(entry) for entry in values["log_history"]]
    values["stateful_callbacks"].pop("hflit", None)
    best = values["best_model_checkpoint"]
    values["best_model_checkpoint"] = best and os.path.relpath(best, folder)
    return values


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


STRATEGIES = {
    "steps": {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 4, "logging_steps": 3},
    "epoch, best at the end": {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
    },
    "best": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "best",
        "metric_for_best_model": "loss",
        "save_total_limit": 2,
    },
    "share of the run": {"eval_strategy": "epoch", "save_steps": 0.3, "save_total_limit": 2},
    "one, and the best": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "learning_rate": 1e-2,
    },
    "only the model": {"eval_strategy": "no", "save_steps": 5, "save_only_model": True},
}


@pytest.mark.parametrize("case", STRATEGIES.values(), ids=STRATEGIES)
def test_saves_where_transformers_does(tiny_bert, ragged_rows, tmp_path, case):
    theirs, ours = run_both(tiny_bert, ragged_rows, tmp_path, **case)
    extra = len(ours[0].log_history) - len(theirs[0].log_history)
    del ours[0].log_history[len(theirs[0].log_history) :]
    assert extra == (case["eval_strategy"] == "no")  # we evaluate the final weights
    assert comparable(ours[0], ours[2]) == comparable(theirs[0], theirs[2])
    assert ours[1][: len(theirs[1])] == theirs[1]
    assert names(ours[2]) == names(theirs[2])
    for key, weight in theirs[3].state_dict().items():
        assert torch.equal(ours[3].state_dict()[key], weight), key

    for name in names(theirs[2]):
        files = {path.name for path in (theirs[2] / name).iterdir()} - {"training_args.bin"}
        mine = {path.name for path in (ours[2] / name).iterdir()}
        assert mine - {"training_args.json", "complete.json"} == files
        states = [TrainerState.load_from_json(run[2] / name / "trainer_state.json")
                  for run in (theirs, ours)]  # fmt: skip
        assert comparable(states[1], ours[2]) == comparable(states[0], theirs[2])


def test_resumed_parity_run_logs_and_tells_as_transformers_does(tiny_bert, ragged_rows, tmp_path):
    case = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 1, "logging_steps": 3}
    run_both(tiny_bert, ragged_rows, tmp_path, **case)
    for resume in ("checkpoint-4", "checkpoint-5"):
        theirs, ours = run_both(tiny_bert, ragged_rows, tmp_path, resume, **case)
        assert ours[1] == theirs[1]
        assert comparable(ours[0], ours[2]) == comparable(theirs[0], theirs[2])


def test_folder_holds_the_same_as_transformers(tiny_bert, ragged_rows, tmp_path):
    theirs, ours = run_both(tiny_bert, ragged_rows, tmp_path, save_steps=4)
    left, right = theirs[2] / "checkpoint-4", ours[2] / "checkpoint-4"
    for name in ("model.safetensors", "config.json"):
        assert (left / name).read_bytes() == (right / name).read_bytes(), name
    with safe_globals():
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            a, b = (torch.load(each / name, weights_only=True) for each in (left, right))
            assert repr(a) == repr(b), name
    assert not list(ours[2].rglob("*.bin"))


def bert_run(tiny_bert, ragged_rows, folder, base=None, rows=37, **arguments):
    return train(base or tiny_bert(), ragged_rows(rows), output_dir=str(folder), **arguments)


def test_true_takes_the_newest_whole_checkpoint(tiny_bert, ragged_rows, tmp_path, caplog):
    whole, _ = bert_run(tiny_bert, ragged_rows, tmp_path)
    (tmp_path / "checkpoint-10" / "optimizer.pt").write_bytes(b"PK")  # cut short
    (tmp_path / "checkpoint-9" / "complete.json").unlink()  # transformers wrote it, or nobody did
    shutil.rmtree(tmp_path / "checkpoint-8")
    again, _ = bert_run(tiny_bert, ragged_rows, tmp_path, checkpoint=True, save_strategy="no")
    assert losses(again.state) == losses(whole.state)
    assert "checkpoint-10: optimizer.pt has 2 bytes instead of" in caplog.text
    assert "checkpoint-9: it has no complete.json; if it is whole, name it" in caplog.text


def spoil(name, how):
    def do(folder):
        path = folder / name
        if how == "remove":
            path.unlink()
        elif how == "cut":
            path.write_bytes(path.read_bytes()[:-10])
        else:  # one bit
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    return do


BROKEN = {
    "no folder": (shutil.rmtree, "there is no folder"),
    "weights gone": (spoil("model.safetensors", "remove"), "model.safetensors is missing"),
    "weights cut": (spoil("model.safetensors", "cut"), "model.safetensors has .* bytes instead of"),
    "weights changed": (spoil("model.safetensors", "bit"), "model.safetensors was changed"),
    "state gone": (spoil("trainer_state.json", "remove"), "trainer_state.json is missing"),
    "mark cut": (spoil("complete.json", "cut"), "complete.json cannot be read"),
}
UNMARKED = {
    "no checkpoint": (lambda folder: [f.unlink() for f in folder.iterdir()], "state.json is miss"),
    "state cut": (spoil("trainer_state.json", "cut"), "trainer_state.json cannot be read"),
    "weights gone": (spoil("model.safetensors", "remove"), "model.safetensors is missing"),
    "weights cut": (spoil("model.safetensors", "cut"), "model.safetensors is cut short"),
    "optimizer cut": (spoil("optimizer.pt", "cut"), "optimizer.pt is cut short"),
    "optimizer gone": (spoil("optimizer.pt", "remove"), "optimizer.pt is missing .save_only_model"),
}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run of two updates, whose checkpoints tests may copy."""
    folder = tmp_path_factory.mktemp("two_steps")
    base = tiny.make("text-classification", seed=1)
    train(base, tiny.rows("text-classification"), output_dir=str(folder), max_steps=2)
    return folder


def go_on(checkpoint, rows=None, **arguments):
    base = tiny.make("text-classification", seed=1)
    rows = tiny.rows("text-classification") if rows is None else rows
    arguments = {"save_strategy": "no", "max_steps": 3, **arguments}
    return train(base, rows, checkpoint=checkpoint, **arguments)


@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("case", range(6))
def test_broken_checkpoint_is_refused_before_anything_is_loaded(two_steps, tmp_path, case, mark):
    break_it, told = list((BROKEN if mark else UNMARKED).values())[case]
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(two_steps / "checkpoint-2", folder)
    if not mark:
        (folder / "complete.json").unlink()
    break_it(folder)
    with pytest.raises(ValueError, match=told):
        HFTrainer()("no-such-model", [], checkpoint=folder)


def test_true_without_any_whole_checkpoint_says_so(two_steps, tmp_path):
    for output_dir, told in ((tmp_path, "there is no checkpoint-N"), ("", "Give it, or name")):
        with pytest.raises(ValueError, match=told):
            HFTrainer()("no-such-model", [], checkpoint=True, output_dir=str(output_dir))
    shutil.copytree(two_steps / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "complete.json").unlink()
    with pytest.raises(ValueError, match="name it: checkpoint='.*checkpoint-2'"):
        HFTrainer()("no-such-model", [], checkpoint=True, output_dir=str(tmp_path))


def test_38_resume_from_checkpoint_is_another_name(two_steps):
    folder = str(two_steps / "checkpoint-2")
    trainer, _ = go_on(None, resume_from_checkpoint=folder)
    assert trainer.state.global_step == 3
    assert len(losses(trainer.state)) == 3
    with pytest.raises(ValueError, match="resume_from_checkpoint='other' contradict each other"):
        go_on(folder, resume_from_checkpoint="other")


CHANGED = {
    "batch": ({"per_device_train_batch_size": 4}, "per_device_train_batch_size=8 there, .*=4 here"),
    "windows": ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=1 there"),
    "seed": ({"seed": 4}, "seed=3 there, seed=4 here"),
    "order": ({"data_seed": 4}, "data_seed=None there, data_seed=4 here"),
    "length": ({"maxlength": 12}, "maxlength=64 there, maxlength=12 here"),
    "rate": ({"learning_rate": 1.0}, "learning_rate=0.0005 there, learning_rate=1.0 here"),
    "warmup": ({"warmup_steps": 2}, "warmup_steps=0 there, warmup_steps=2 here"),
    "limit": ({"limit_train_batches": 2}, "limit_train_batches=1.0 there, .*=2 here"),
    "noise": ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=None there, .*=5.0 here"),
    "rows": ({"rows": tiny.rows("text-classification")[1:]}, "rows=24 there, rows=23 here"),
    "data": ({"rows": tiny.rows("text-classification")[::-1]}, "data='.*' there, data='.*' here"),
}


@pytest.mark.parametrize(("changes", "told"), CHANGED.values(), ids=CHANGED)
def test_another_run_is_refused(two_steps, changes, told):
    with pytest.raises(ValueError, match=told):
        go_on(two_steps / "checkpoint-2", **changes)


def test_what_scales_an_adapter_may_not_change(tiny_bert, ragged_rows, tmp_path):
    """Once what was learned counted eight times as much, without a word."""
    call = {"max_steps": 2, "output_dir": str(tmp_path), "lora": {"lora_alpha": 8}}
    train(tiny_bert(), ragged_rows(16), **call)
    call["checkpoint"] = tmp_path / "checkpoint-1"
    train(tiny_bert(), ragged_rows(16), **call)
    with pytest.raises(ValueError, match="'lora_alpha': 8, .* there, .*'lora_alpha': 64, .* here"):
        train(tiny_bert(), ragged_rows(16), **{**call, "lora": {"lora_alpha": 64}})


def test_a_weight_that_a_checkpoint_lacks_is_not_drawn_anew(two_steps, tmp_path):
    """Once a pooler started from random numbers in the middle of a run."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(two_steps / "checkpoint-2", folder)
    (folder / "complete.json").unlink()
    weights = load_file(folder / "model.safetensors")
    del weights["bert.pooler.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="another model: .*pooler.dense.weight, missing there"):
        go_on(folder)


def test_what_may_change_may_change(two_steps):
    trainer, _ = go_on(
        two_steps / "checkpoint-2", max_steps=5, logging_steps=2, save_steps=100, bf16=True
    )
    assert trainer.state.global_step == 5
    assert trainer.state.logging_steps == 2


def test_options_that_a_schedule_keeps_may_not_change(tiny_bert, ragged_rows, tmp_path):
    """Once the new ones were ignored."""
    call = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"}
    call |= {"lr_scheduler_kwargs": {"patience": 1}, "eval_strategy": "epoch", "max_steps": 2}
    train(tiny_bert(), ragged_rows(16), ragged_rows(8), output_dir=str(tmp_path), **call)
    call |= {"checkpoint": tmp_path / "checkpoint-1", "save_strategy": "no"}
    train(tiny_bert(), ragged_rows(16), ragged_rows(8), **call)
    call["lr_scheduler_kwargs"] = {"patience": 5}
    with pytest.raises(ValueError, match="lr_scheduler_kwargs={'patience': 1} there, "):
        train(tiny_bert(), ragged_rows(16), ragged_rows(8), **call)


def test_another_model_is_refused(two_steps, tmp_path):
    """A folder of transformers says nothing of the run, so the weights have to."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(two_steps / "checkpoint-2", folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["hflit"]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "complete.json").unlink()
    base = tiny.make("text-classification", seed=1, labels=4)
    rows = [{"text": f"w{i}", "label": i % 4} for i in range(24)]
    with pytest.raises(ValueError, match="another model: see its weight classifier"):
        train(base, rows, checkpoint=folder, save_strategy="no")


def test_a_finished_run_goes_on_to_its_end(tiny_bert, ragged_rows, tmp_path):
    whole, model = bert_run(tiny_bert, ragged_rows, tmp_path)
    again, resumed = bert_run(tiny_bert, ragged_rows, tmp_path, checkpoint=True)
    assert again.state.global_step == 10
    assert losses(again.state) == losses(whole.state)
    assert again.metrics["train_loss"] == whole.metrics["train_loss"]
    for name, weight in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


def test_a_finished_run_keeps_the_figures_of_its_evaluation(tiny_bert, ragged_rows, tmp_path):
    """Once they were gone from its metrics, and from its model card."""
    arguments = {"eval_strategy": "epoch", "save_strategy": "epoch", "metrics": "auto"}
    arguments["validation"] = ragged_rows(9, seed=1)
    figures, cards = [], []
    for checkpoint in (None, True):
        trainer, _ = bert_run(tiny_bert, ragged_rows, tmp_path, checkpoint=checkpoint, **arguments)
        figures.append({k: v for k, v in trainer.metrics.items() if k.startswith("eval_")})
        cards.append((tmp_path / "README.md").read_text().count("| accuracy |"))
    assert figures[0] == figures[1] != {}
    assert cards == [1, 1]


def test_the_end_of_an_epoch_that_the_run_cuts_short_is_made_up_for(
    tiny_bert, ragged_rows, tmp_path
):
    """5 updates an epoch, of 7: stopped after the last one, before its epoch was told to end."""

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 7:
                raise LookupError

    arguments = {
        "max_steps": 7, "save_strategy": "epoch", "eval_strategy": "epoch",
        "logging_strategy": "epoch", "validation": ragged_rows(9, seed=1),
    }  # fmt: skip
    whole, _ = bert_run(tiny_bert, ragged_rows, tmp_path / "whole", **arguments)
    with pytest.raises(LookupError):
        bert_run(tiny_bert, ragged_rows, tmp_path / "cut", callbacks=[Stops()], **arguments)
    assert names(tmp_path / "cut") == ["checkpoint-5", "checkpoint-7"]
    again, _ = bert_run(tiny_bert, ragged_rows, tmp_path / "cut", checkpoint=True, **arguments)
    assert losses(again.state, after=5) == losses(whole.state, after=5) != []


def test_a_run_cut_between_log_entries_keeps_its_sum(tiny_bert, ragged_rows, tmp_path):
    arguments = {"logging_steps": 4, "save_steps": 3}
    whole, _ = bert_run(tiny_bert, ragged_rows, tmp_path, **arguments)
    again, _ = bert_run(
        tiny_bert, ragged_rows, tmp_path, checkpoint=tmp_path / "checkpoint-3", **arguments
    )
    assert losses(again.state) == losses(whole.state)


def test_an_epoch_that_a_callback_ended_stays_ended(tiny_bert, ragged_rows, tmp_path):
    """The place in the data does not follow from the number of updates."""

    class TwoStepsAnEpoch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_epoch_stop = state.global_step % 2 == 0

    assert_goes_on(
        lambda: tiny_bert(dropout=0.1),
        ragged_rows(37),
        tmp_path,
        (1, 2, 3),
        callbacks=[TwoStepsAnEpoch()],
        num_train_epochs=3,
    )


def test_ignore_data_skip_takes_the_epoch_from_its_start(tiny_bert, ragged_rows, tmp_path):
    theirs, ours = run_both(tiny_bert, ragged_rows, tmp_path, save_steps=3, eval_strategy="no")
    theirs, ours = run_both(
        tiny_bert, ragged_rows, tmp_path, "checkpoint-3", ignore_data_skip=True, save_strategy="no"
    )
    assert losses(ours[0], 3) == [*losses(theirs[0], 3), *losses(ours[0], 3)[-1:]]
    assert [entry["epoch"] for entry in ours[0].log_history[3:5]] == [0.2, 0.4]


def test_what_comes_before_the_first_update_is_not_done_again(tiny_bert, ragged_rows, tmp_path):
    """The evaluation at the start counted once more for early stopping."""
    call = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    call |= {"output_dir": str(tmp_path), "metric_for_best_model": "loss"}
    rows = ragged_rows(37), ragged_rows(9, seed=1)
    whole, _ = train(tiny_bert(), *rows, **call)
    again, _ = train(tiny_bert(), *rows, checkpoint=tmp_path / "checkpoint-2", **call)
    assert losses(again.state) == losses(whole.state)
    done, _ = train(tiny_bert(), *rows, checkpoint=tmp_path / "checkpoint-6", **call)
    assert done.metrics["train_padding_share"] == 0.0


def test_callbacks_go_on_from_their_state(tiny_bert, ragged_rows, tmp_path):
    arguments = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
        "learning_rate": 0.0,  # the loss never falls
        "restore_callback_states_from_checkpoint": True,
    }

    def run(checkpoint=None):
        return train(
            tiny_bert(),
            ragged_rows(37),
            ragged_rows(9, seed=1),
            output_dir=str(tmp_path),
            checkpoint=checkpoint,
            callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
            **arguments,
        )[0].state.global_step

    assert run() == 4
    assert run(tmp_path / "checkpoint-2") == 4
    arguments["restore_callback_states_from_checkpoint"] = False
    assert run(tmp_path / "checkpoint-2") == 5  # it starts to count anew


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run(
    tiny_bert, ragged_rows, tmp_path, monkeypatch, caplog
):
    save, saved = torch.save, []

    def full(thing, path):
        saved.append(path)
        if "checkpoint-2" in str(path):
            raise OSError(28, "No space left on device")
        save(thing, path)

    monkeypatch.setattr(torch, "save", full)
    trainer, _ = bert_run(tiny_bert, ragged_rows, tmp_path, max_steps=3)
    assert trainer.state.global_step == 3
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]
    assert [flaw(tmp_path / name) for name in names(tmp_path)] == [None, None]
    assert not list(tmp_path.glob(".checkpoint-*"))
    assert "checkpoint-2 could not be written" in caplog.text
    assert "No space left on device" in caplog.text


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    folder, dead = tmp_path / "checkpoint-1", 2**22 + 1  # no process has so high a number

    def fill(text):
        return lambda part: (part / "file").write_text(text)

    write_whole(folder, fill("old"))

    def fail(part):
        (part / "file").write_text("ne")
        raise OSError("cut")

    with pytest.raises(OSError, match="cut"):
        write_whole(folder, fail)
    assert (folder / "file").read_text() == "old"
    write_whole(folder, fill("new"))
    assert (folder / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]

    # Killed between the two renames, while writing, and while deleting.
    folder.rename(tmp_path / f".checkpoint-1.{dead}.old")
    (tmp_path / f".checkpoint-2.{dead}.part").mkdir()
    (tmp_path / f".checkpoint-3.{dead}.old").mkdir()
    (tmp_path / f".checkpoint-4.{os.getppid()}.part").mkdir()  # another run is writing
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as ended:
        ended.stdout.read()
        while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        (tmp_path / f".checkpoint-5.{ended.pid}.part").mkdir()  # its number is still taken
        clean(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f".checkpoint-4.{os.getppid()}.part", "checkpoint-1"]
    assert (folder / "file").read_text() == "new"


def test_files_are_flushed_as_windows_asks(tmp_path, monkeypatch):
    """Its FlushFileBuffers wants a handle that may write: no checkpoint was ever saved there."""
    opened = {True: set(), False: set()}

    def fsync(number):
        is_folder = stat.S_ISDIR(os.fstat(number).st_mode)
        opened[is_folder].add(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE)

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "checkpoint-1", lambda part: (part / "file").write_bytes(b"1"))
    assert opened == {True: {os.O_RDONLY}, False: {os.O_RDWR}}  # Windows opens no folders


def test_rotation_spares_what_is_no_checkpoint(tiny_bert, ragged_rows, tmp_path):
    """transformers deletes whatever begins with checkpoint-."""
    (tmp_path / "checkpoint-to-keep").mkdir()
    bert_run(tiny_bert, ragged_rows, tmp_path, max_steps=4, save_total_limit=1)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-to-keep"]


def test_rotation_keeps_the_newest_of_two_runs(tiny_bert, ragged_rows, tmp_path):
    """The second run writes lower numbers than the first."""
    bert_run(tiny_bert, ragged_rows, tmp_path, save_steps=10)
    os.utime(tmp_path / "checkpoint-10" / "trainer_state.json", (0, 0))
    bert_run(tiny_bert, ragged_rows, tmp_path, max_steps=4, save_total_limit=2)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize(
    "given",
    [
        {"save_strategy": "steps"},
        {"save_strategy": "epoch"},
        {"enable_jit_checkpoint": True},
        {"load_best_model_at_end": True},
    ],
)
def test_40_checkpoints_need_a_folder(given):
    with pytest.raises(ValueError, match="writes checkpoints. Give an output_dir"):
        HFTrainer()("no-such-model", [], **given)


def test_each_node_may_save():
    for each, saves in ((True, True), (False, False)):
        args, _ = parse({"output_dir": "run", "save_on_each_node": each})
        args.set_ranks(world_size=4, process_index=2, local_process_index=0)
        assert args.should_save is saves


def test_another_process_than_the_first_writes_weights(tiny_bert, tmp_path, monkeypatch):
    there = "transformers.distributed.mixin"  # where transformers asks which process this is
    monkeypatch.setattr(f"{there}._is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr(f"{there}._get_torch_distributed_rank", lambda: 2)
    model, tokenizer = tiny_bert()
    model.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "model.safetensors").exists()
    args, _ = parse({"output_dir": "run"})
    save_artifacts(tmp_path / "ours", model, tokenizer, TrainerState(), args)
    assert flaw(tmp_path / "ours") is None
    loaded = type(model).from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


# peft 0.21 asks transformers 5.23 for an old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_are_saved_and_go_on(tiny_bert, ragged_rows, tmp_path):
    config = LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=0.1)

    def make():
        model, tokenizer = tiny_bert(dropout=0.1)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return get_peft_model(model, config), tokenizer

    folder = tmp_path / "checkpoint-4"
    assert_goes_on(make, ragged_rows(37), tmp_path, (4,))
    files = {path.name for path in folder.iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files


def test_an_adapter_is_not_resumed_without_one(tiny_bert, ragged_rows, tmp_path):
    train(tiny_bert(), ragged_rows(8), lora=True, max_steps=1, output_dir=str(tmp_path))
    with pytest.raises(
        ValueError, match="checkpoint-1 belongs to another run: lora={.*} there, lora=None here"
    ):
        train(tiny_bert(), ragged_rows(8), checkpoint=tmp_path / "checkpoint-1", max_steps=2,
              output_dir=str(tmp_path))  # fmt: skip


def test_a_run_that_ended_in_mid_epoch_can_be_made_longer(tiny_bert, ragged_rows, tmp_path):
    arguments = {"save_strategy": "epoch", "lr_scheduler_type": "constant"}
    whole, _ = bert_run(tiny_bert, ragged_rows, tmp_path / "whole", max_steps=10, **arguments)
    bert_run(tiny_bert, ragged_rows, tmp_path / "short", max_steps=7, **arguments)
    assert names(tmp_path / "short") == ["checkpoint-5", "checkpoint-7"]
    longer, _ = bert_run(
        tiny_bert, ragged_rows, tmp_path / "short", max_steps=10, checkpoint=True, **arguments
    )
    assert losses(longer.state) == losses(whole.state)


def test_checkpoints_of_two_runs_in_a_folder_are_told_apart(tiny_bert, ragged_rows, tmp_path):
    """The highest number may be of an earlier run; copied folders have lost their times."""
    out = str(tmp_path / "out")
    train(tiny_bert(), ragged_rows(16), output_dir=out)  # checkpoints 1 to 4
    then = time.time() - 60
    for number in (1, 3, 4):
        state = tmp_path / "out" / f"checkpoint-{number}" / "trainer_state.json"
        os.utime(state, (then + number, then + number))
    with pytest.raises(ValueError, match=r"checkpoint-2 is newer than .*checkpoint-4, so they are"):
        train(tiny_bert(), ragged_rows(16), output_dir=out, checkpoint=True)
    trainer, _ = train(
        tiny_bert(), ragged_rows(16), output_dir=out, checkpoint=f"{out}/checkpoint-2"
    )
    assert trainer.state.global_step == 4


def test_the_only_checkpoint_stays_whatever_the_folder_is_called(tiny_bert, ragged_rows, tmp_path):
    settings = {
        "save_total_limit": 1, "load_best_model_at_end": True, "eval_strategy": "steps",
        "eval_steps": 1, "greater_is_better": False,
    }  # fmt: skip
    rows = ragged_rows(16)
    train(tiny_bert(), rows, rows, output_dir="out", **settings)
    (only,) = Path("out").glob("checkpoint-*")
    for name in (Path("out").resolve(), "./out/../out"):
        train(tiny_bert(), rows, rows, output_dir=f"{name}", checkpoint=f"{only}", **settings)
        assert list(Path("out").glob("checkpoint-*")) != []
