"""transformers' callbacks, and Lightning's beside them, in one run."""

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from transformers import EarlyStoppingCallback, TrainerCallback

from hflit import HFTrainer


def run(tiny_bert, ragged_rows, **arguments):
    trainer = HFTrainer()
    trainer(
        tiny_bert(),
        ragged_rows(24),
        ragged_rows(8, seed=1),
        **{"per_device_train_batch_size": 8, "num_train_epochs": 4, **arguments},
    )
    return trainer


def test_early_stopping_stops(tiny_bert, ragged_rows):
    trainer = run(
        tiny_bert,
        ragged_rows,
        callbacks=EarlyStoppingCallback(early_stopping_patience=1),
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="loss",
        learning_rate=0.0,  # the loss never falls, so the second evaluation is not better
    )
    assert trainer.state.global_step == 2


def test_a_callback_ends_an_epoch(tiny_bert, ragged_rows):
    class OneStepAnEpoch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_epoch_stop = True

    trainer = run(tiny_bert, ragged_rows, callbacks=[OneStepAnEpoch()])
    assert trainer.state.global_step == trainer.lightning.global_step == 4


def test_lightning_callbacks_run_beside(tiny_bert, ragged_rows):
    class Count(L.Callback):
        updates = 0

        def on_train_batch_end(self, *_):
            self.updates += 1

    count = Count()
    run(tiny_bert, ragged_rows, callbacks=[count], gradient_accumulation_steps=2)
    assert count.updates == 8  # 3 batches make 2 windows, 4 times


def test_callbacks_are_handed_the_batches_of_an_evaluation(tiny_bert, ragged_rows):
    class Look(TrainerCallback):
        found = None

        def on_evaluate(self, args, state, control, eval_dataloader=None, **_):
            self.found = torch.cat([batch["labels"] for batch in eval_dataloader])

    look = Look()
    run(tiny_bert, ragged_rows, callbacks=[look], per_device_eval_batch_size=3)
    assert look.found.tolist() == [row["label"] for row in ragged_rows(8, seed=1)]


@pytest.mark.parametrize("flags", [{}, {"enable_progress_bar": True}])
def test_a_progress_bar_of_the_user_takes_the_place_of_ours(flags, tiny_bert, ragged_rows):
    """Once Lightning refused it, with and without enable_progress_bar."""
    bar = TQDMProgressBar()
    trainer = run(tiny_bert, ragged_rows, callbacks=[bar], max_steps=2, **flags)
    assert trainer.lightning.progress_bar_callback is bar
    assert bar.train_progress_bar.n > 0


def test_final_weights_are_evaluated_once(tiny_bert, ragged_rows):
    for strategy in ("no", "epoch"):
        trainer = run(tiny_bert, ragged_rows, eval_strategy=strategy)
        steps = [e["step"] for e in trainer.state.log_history if "eval_loss" in e]
        assert steps == ([12] if strategy == "no" else [3, 6, 9, 12])


def test_metrics_hold_the_last_figures(tiny_bert, ragged_rows):
    trainer = run(tiny_bert, ragged_rows, metrics="auto")
    assert {"train_loss", "train_runtime", "eval_loss", "eval_accuracy"} <= set(trainer.metrics)
    history = trainer.state.log_history
    assert trainer.metrics["eval_loss"] == history[-1]["eval_loss"]


def test_best_metric_that_is_not_there_names_those_that_are(tiny_bert, ragged_rows):
    with pytest.raises(KeyError, match="metric_for_best_model='f1'.*eval_loss"):
        run(
            tiny_bert,
            ragged_rows,
            eval_strategy="epoch",
            metric_for_best_model="f1",
            metrics="auto",
        )


def test_limited_batches_shorten_the_schedule(tiny_bert, ragged_rows):
    trainer = run(tiny_bert, ragged_rows, limit_train_batches=2, logging_steps=1)
    assert trainer.state.max_steps == 8
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert rates == pytest.approx([5e-5 * (8 - i) / 8 for i in range(8)])
