"""Ctrl-C and SIGTERM in the middle of a run."""

import os
import signal
import threading

import psutil
import pytest
import torch
from transformers import TrainerCallback

from hflit import HFTrainer
from tests.loop.test_checkpoints import losses, names, train

EXITS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


class Signal(TrainerCallback):
    """Sends this process a signal when an event comes in an update."""

    def __init__(self, number, event="on_step_begin", step=3):
        self.number, self.step = number, step
        setattr(self, event, self.send)

    def send(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


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


def test_without_a_folder_a_stop_just_stops(tiny_bert, ragged_rows, caplog):
    callbacks = [Signal(signal.SIGTERM)]
    with pytest.raises(SystemExit):
        HFTrainer()(tiny_bert(), ragged_rows(37), callbacks=callbacks, num_train_epochs=2)
    assert "stopped after update 4; nothing is saved" in caplog.text


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
