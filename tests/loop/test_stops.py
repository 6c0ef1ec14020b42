"""Ctrl-C and SIGTERM in the middle of a run."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import lightning.pytorch as L
import psutil
import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

import hflit
from hflit import HFTrainer
from tests.loop.test_checkpoints import losses, names, train
from tests.tasks import tiny

ROOT = str(Path(hflit.__file__).parent.parent)

EXITS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


class Signal(TrainerCallback):
    """Sends this process a signal when an event comes in an update."""

    def __init__(self, number, event="on_step_begin", step=3):
        self.number, self.step = number, step
        setattr(self, event, self.send)

    def send(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


class Full(L.Callback):
    """Stops the run after an update."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.step


@pytest.mark.parametrize("event", ["on_step_begin", "on_epoch_end", "on_evaluate", "on_save"])
@pytest.mark.parametrize("number", EXITS, ids=lambda number: number.name)
def test_a_stopped_run_goes_on(tiny_bert, ragged_rows, tmp_path, caplog, number, event):
    handlers = [signal.getsignal(each) for each in EXITS]

    def run(folder, checkpoint=None, callbacks=()):
        return train(
            tiny_bert(dropout=0.1),
            ragged_rows(37),
            ragged_rows(9, seed=1),
            output_dir=str(tmp_path / folder),
            checkpoint=checkpoint,
            callbacks=list(callbacks),
            eval_strategy="epoch",
            save_steps=5,
        )

    whole, model = run("whole")
    step = 3 if event == "on_step_begin" else 5
    with pytest.raises(EXITS[number]) as stopped:
        run("stopped", callbacks=[Signal(number, event, step)])
    if number == signal.SIGTERM:
        assert stopped.value.code == 143
    assert [signal.getsignal(each) for each in EXITS] == handlers
    saved = step + 1 if event == "on_step_begin" else step
    assert f"stopped after update {saved}; checkpoint-{saved} is saved" in caplog.text
    assert "checkpoint=True" in caplog.text
    assert f"checkpoint-{saved}" in names(tmp_path / "stopped")

    again, resumed = run("stopped", checkpoint=True)
    assert losses(again.state) == losses(whole.state)
    for name, weight in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


def test_a_signal_after_the_look_at_the_end_of_an_update_is_seen_after_the_next(
    tiny_bert, ragged_rows, tmp_path
):
    """Lightning once saw it first, and ended the run without a checkpoint."""

    class Late(L.Callback):  # comes after ours
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        train(
            tiny_bert(),
            ragged_rows(200),
            output_dir=str(tmp_path),
            save_steps=100,
            callbacks=[Late()],
        )
    assert names(tmp_path) == ["checkpoint-4"]


def test_without_a_folder_a_stop_just_stops(tiny_bert, ragged_rows, caplog):
    callbacks = [Signal(signal.SIGTERM)]
    with pytest.raises(SystemExit):
        HFTrainer()(tiny_bert(), ragged_rows(37), callbacks=callbacks, num_train_epochs=2)
    assert "stopped after update 4; no checkpoint" in caplog.text


def test_a_trainer_tells_of_a_run_that_was_stopped(tiny_bert, ragged_rows):
    """Once predict said that nothing was trained yet."""
    trainer, (model, tokenizer) = HFTrainer(), tiny_bert()
    call = {"train": ragged_rows(37), "logging_steps": 1, "num_train_epochs": 2}
    with pytest.raises(KeyboardInterrupt):
        trainer((model, tokenizer), **call, callbacks=[Signal(signal.SIGINT)])
    assert trainer.state.global_step == trainer.lightning.global_step == 4
    assert [entry["step"] for entry in trainer.state.log_history] == [1, 2, 3, 4]
    rows = call["train"][:4]
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model.eval()(**inputs).logits.softmax(-1).max(-1).values.tolist()
    assert [row["score"] for row in trainer.predict(rows)] == pytest.approx(scores, rel=1e-5)


@pytest.mark.parametrize("presses", [1, 2])
def test_a_second_ctrl_c_alone_tells_where_it_came(tiny_bert, ragged_rows, presses):
    """Once the first did too: all of Lightning, in a notebook 250 lines of it."""
    callbacks = [Signal(signal.SIGINT) for _ in range(presses)]
    with pytest.raises(KeyboardInterrupt) as stopped:
        HFTrainer()(tiny_bert(), ragged_rows(37), callbacks=callbacks, num_train_epochs=2)
    shown = "".join(traceback.format_exception(stopped.value))
    assert ("in _run_stage" in shown) == (presses == 2)


def test_a_run_that_lightning_stops_goes_on(tiny_bert, ragged_rows, tmp_path, caplog):
    def run(folder, checkpoint=None, callbacks=()):
        folder = str(tmp_path / folder)
        return train(
            tiny_bert(dropout=0.1),
            ragged_rows(37),
            output_dir=folder,
            checkpoint=checkpoint,
            callbacks=list(callbacks),
            save_steps=100,
        )

    whole, model = run("whole")
    run("stopped", callbacks=[Full(3)])
    assert "Lightning: stopped after update 3; checkpoint-3 is saved" in caplog.text
    assert names(tmp_path / "stopped") == ["checkpoint-3"]

    again, resumed = run("stopped", checkpoint=True)
    assert losses(again.state) == losses(whole.state)
    for name, weight in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


def test_an_epoch_that_lightning_cuts_ends_in_the_run_that_goes_on(
    tiny_bert, ragged_rows, tmp_path
):
    """It once was logged, evaluated and saved in its middle, and that went on too."""

    def run(folder, checkpoint=None, callbacks=()):
        trainer, _ = train(
            tiny_bert(dropout=0.1),
            ragged_rows(37),
            ragged_rows(9, seed=1),
            output_dir=str(tmp_path / folder),
            checkpoint=checkpoint,
            callbacks=list(callbacks),
            **dict.fromkeys(("eval_strategy", "logging_strategy", "save_strategy"), "epoch"),
        )
        return trainer.state

    whole = run("whole")  # 5 updates in an epoch
    run("stopped", callbacks=[Full(7)])
    assert names(tmp_path / "stopped") == ["checkpoint-5", "checkpoint-7"]
    again = run("stopped", checkpoint=True)
    assert [entry["step"] for entry in losses(whole)] == [5, 5, 10, 10]
    assert losses(again) == losses(whole)


def test_where_lightning_stops_stays_beside_the_best(tiny_bert, ragged_rows, tmp_path):
    """It once was deleted as the run ended: save_total_limit=1 keeps the best alone."""
    train(
        tiny_bert(),
        ragged_rows(37),
        ragged_rows(9, seed=1),
        output_dir=str(tmp_path),
        callbacks=[Full(3)],
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_time_that_is_up_leaves_a_checkpoint(tiny_bert, ragged_rows, tmp_path):
    class Slow(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            time.sleep(1)

    trainer, _ = train(
        tiny_bert(),
        ragged_rows(37),
        output_dir=str(tmp_path),
        save_steps=100,
        callbacks=[Slow()],
        max_time={"seconds": 1},
    )
    assert trainer.state.global_step < trainer.state.max_steps
    assert names(tmp_path) == [f"checkpoint-{trainer.state.global_step}"]


def test_jit_checkpoint_saves_whatever_the_strategy(tiny_bert, ragged_rows, tmp_path):
    for wanted in (False, True):
        with pytest.raises(SystemExit):
            train(
                tiny_bert(),
                ragged_rows(37),
                output_dir=str(tmp_path),
                save_strategy="no",
                enable_jit_checkpoint=wanted,
                callbacks=[Signal(signal.SIGTERM)],
            )
        assert names(tmp_path) == (["checkpoint-4"] if wanted else [])


def test_a_signal_to_all_processes_leaves_the_workers_until_the_update_is_over(
    tiny_bert, ragged_rows, tmp_path
):
    """It once ended the workers first, and the run with an error instead of a checkpoint."""

    class ToAll(Signal):
        def send(self, args, state, control, **details):
            if state.global_step == self.step:
                for worker in psutil.Process().children(recursive=True):
                    worker.terminate()
            super().send(args, state, control, **details)

    with pytest.raises(SystemExit):
        train(
            tiny_bert(),
            ragged_rows(200),
            output_dir=str(tmp_path),
            save_steps=100,
            dataloader_num_workers=1,
            dataloader_persistent_workers=True,
            callbacks=[ToAll(signal.SIGTERM)],
        )
    assert names(tmp_path) == ["checkpoint-4"]


def test_an_error_stays_an_error(tiny_bert, ragged_rows, tmp_path):
    class Fail(Signal):
        def send(self, args, state, control, **_):
            super().send(args, state, control)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        train(tiny_bert(), ragged_rows(37), callbacks=[Fail(signal.SIGINT, step=0)],
              save_strategy="no")  # fmt: skip


def test_other_threads_train_without_handlers(tiny_bert, ragged_rows):
    trainer = HFTrainer()
    thread = threading.Thread(target=trainer, args=(tiny_bert(), ragged_rows(8)))
    thread.start()
    thread.join()
    assert trainer.state.global_step == 3


def test_runs_in_two_threads_come_one_after_another(tiny_bert, ragged_rows):
    """Once dropout stayed replaced in the process, and both drew from the same numbers."""
    call = {"train": ragged_rows(37), "num_train_epochs": 1}
    alone, first, second = HFTrainer(), HFTrainer(), HFTrainer()
    alone(tiny_bert(dropout=0.1), **call)
    own, began, over = F.dropout, threading.Event(), threading.Event()

    class Meanwhile(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 1:
                other.start()
                began.wait(3)

    class Late(TrainerCallback):
        def on_train_begin(self, *_, **__):
            began.set()

        def on_train_end(self, *_, **__):
            over.wait(60)

    late = {**call, "callbacks": [Late()]}
    other = threading.Thread(target=second, args=(tiny_bert(dropout=0.1),), kwargs=late)
    first(tiny_bert(dropout=0.1), **call, callbacks=[Meanwhile()])
    over.set()
    other.join()
    assert F.dropout is own
    losses = [each.metrics["train_loss"] for each in (first, second)]
    assert losses == [alone.metrics["train_loss"]] * 2


SCRIPT = """
from hflit import HFTrainer
HFTrainer()("base", "train.jsonl", use_cpu=True, maxlength=32, output_dir="out",
            save_strategy="steps", save_steps=1000, num_train_epochs=1000)
"""


def start(words, folder):
    """A process of its own, once it trains."""
    started = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ROOT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    mark = Path(folder, "out", "begun")
    deadline = time.monotonic() + 100
    while not mark.exists() and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return started


@pytest.fixture
def files(tmp_path):
    model, tokenizer = tiny.make("text-classification", seed=0)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lines = [json.dumps(row) + "\n" for row in tiny.rows("text-classification")]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    (tmp_path / "mark.py").write_text(
        "from pathlib import Path\n"
        "from transformers import TrainerCallback\n"
        "class Mark(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **_):\n"
        "        Path('out').mkdir(exist_ok=True)\n"
        "        Path('out/begun').touch()\n"
    )
    return tmp_path


@pytest.mark.slow  # starts processes, which import everything
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_program_saves_and_prints_the_command_that_goes_on(files, number, status):
    words = [
        *("-m", "hflit", "fit", "--model.base", "base", "--data.train", "train.jsonl"),
        *("--data.maxlength", "32", "--args.use_cpu", "true", "--args.output_dir", "out"),
        *("--args.save_strategy", "steps", "--args.save_steps", "1000000"),
        *("--args.num_train_epochs", "100000", "--trainer.callbacks", "mark.Mark"),
    ]
    started = start(words, files)
    started.send_signal(number)
    out, err = started.communicate(timeout=60)
    assert started.returncode == status, err
    assert "Traceback" not in err
    saved = re.search(r"stopped after update (\d+); checkpoint-\1 is saved", err)
    assert saved, err
    assert "Go on with:\n" in err, err
    command = err.split("Go on with:\n")[1].strip()
    assert command.endswith("--model.checkpoint true")

    # The very line, but for a shorter way to go.
    step = int(saved[1])
    again = [sys.executable, *shlex.split(command)[1:], "--args.max_steps", str(step + 2)]
    done = subprocess.run(
        again, cwd=files, env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"After {step + 2} updates" in done.stdout


@pytest.mark.slow  # starts processes, which import everything
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_script_ends_as_the_signal_asked_and_says_how_to_go_on(files, number, status):
    call = SCRIPT.replace("1000)", "1000, callbacks=[Mark()])").replace(
        "from hflit", "from mark import Mark\nfrom hflit", 1
    )
    (files / "script.py").write_text(call)
    started = start(["script.py"], files)
    started.send_signal(number)
    _, err = started.communicate(timeout=60)
    # Python ends itself by SIGINT, of which a shell makes 130.
    assert started.returncode == (-number if number == signal.SIGINT else status)
    assert re.search(r"checkpoint-\d+ is saved. Go on with checkpoint=True.", err)
