"""transformers' callbacks, and Lightning's beside them, in one run."""

from pathlib import Path

import datasets
import lightning.pytorch as L
import nbformat
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from nbclient import NotebookClient
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


def test_an_error_before_the_run_begins_is_the_one_that_is_told(tiny_bert, ragged_rows):
    class Fails(L.Callback):
        def setup(self, trainer, pl_module, stage):
            raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        run(tiny_bert, ragged_rows, callbacks=[Fails()])


@pytest.mark.parametrize("streamed", [False, True])
def test_callbacks_are_handed_the_batches_of_an_evaluation(tiny_bert, ragged_rows, streamed):
    class Look(TrainerCallback):
        found = None

        def on_evaluate(self, args, state, control, eval_dataloader=None, **_):
            self.found = torch.cat([batch["labels"] for batch in eval_dataloader])

    look = Look()
    rows = datasets.Dataset.from_list(ragged_rows(8, seed=1))
    rows = rows.to_iterable_dataset() if streamed else rows
    call = {"callbacks": [look], "per_device_eval_batch_size": 3, "max_steps": 1}
    HFTrainer()(tiny_bert(), ragged_rows(24), rows, **call)
    assert look.found.tolist() == [row["label"] for row in ragged_rows(8, seed=1)]


@pytest.mark.parametrize("flags", [{}, {"enable_progress_bar": True}])
def test_a_progress_bar_of_the_user_takes_the_place_of_ours(flags, tiny_bert, ragged_rows):
    """Once Lightning refused it, with and without enable_progress_bar."""
    bar = TQDMProgressBar()
    trainer = run(tiny_bert, ragged_rows, callbacks=[bar], max_steps=2, **flags)
    assert trainer.lightning.progress_bar_callback is bar
    assert bar.train_progress_bar.n > 0


def test_lightnings_loggers_get_the_arguments(tiny_bert, ragged_rows):
    """As those of report_to do. Once enable_autolog_hparams had nothing to log."""
    expected = {"learning_rate": 3e-4, "max_steps": 1, "hub_token": "<HUB_TOKEN>"}
    given = {**expected, "hub_token": "secret"}
    asked, refused = CSVLogger("asked"), CSVLogger("refused")
    run(tiny_bert, ragged_rows, **given, logger=asked)
    run(tiny_bert, ragged_rows, **given, logger=refused, enable_autolog_hparams=False)
    logged = yaml.safe_load(Path(asked.log_dir, "hparams.yaml").read_text())
    assert {name: logged[name] for name in expected} == expected
    assert not Path(refused.log_dir, "hparams.yaml").exists()


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_a_notebook_shows_the_table_of_transformers(tmp_path):
    """Once it showed nothing: what a kernel calls stderr is no terminal."""
    cells = [
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.loop.test_strategies import SHORT, fit",
        "fit(**SHORT, disable_tqdm=None, eval_strategy='epoch')[0].metrics['eval_runtime']",
        "fit(**SHORT, disable_tqdm=None, strategy='ddp_notebook', devices=2)[0].metrics.keys()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    _, table, printed = (cell.outputs for cell in notebook.cells)
    html = [each.data["text/html"] for each in table if "text/html" in each.get("data", {})]
    assert len(html) == 1
    assert "[18/18 " in html[0]  # 3 epochs of 23 rows, 4 in an update
    assert "<th>Validation Loss</th>" in html[0]
    assert html[0].count("<tr>") == 3  # of the body: an epoch each
    text = "".join(each.text for each in printed if each.output_type == "stream")
    assert text.count("'grad_norm'") == 9  # 3 epochs of 23 rows, 8 in an update


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


@pytest.mark.parametrize(("every", "returned", "told"), [(2, 0.2, "checkpoint-2"), (6, 0.5, None)])
def test_figures_are_those_of_the_weights_that_are_returned(
    tiny_bert, ragged_rows, tmp_path, caplog, every, returned, told
):
    """Once those of the best evaluation, whose weights were never saved."""
    scores = iter([0.1, 0.2, 0.9, 0.3, 0.4, 0.5])
    trainer = run(
        tiny_bert, ragged_rows, output_dir=str(tmp_path), max_steps=6, save_strategy="steps",
        eval_strategy="steps", eval_steps=1, save_steps=every, load_best_model_at_end=True,
        metric_for_best_model="s", metrics=lambda prediction: {"s": next(scores)},
    )  # fmt: skip
    assert trainer.metrics["eval_s"] == returned
    where = f"those of {tmp_path / told}" if told else "the last ones"
    assert f"update 3, were not saved: {where} are returned" in caplog.text
    assert f"| s | {returned:.4f} |" in (tmp_path / "README.md").read_text()


def test_a_callback_may_be_given_as_a_class(tiny_bert, ragged_rows):
    class Once(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = True

    assert run(tiny_bert, ragged_rows, callbacks=[Once]).state.global_step == 1


@pytest.mark.parametrize("returned", [None, [1.0]])
def test_metrics_that_return_no_dict_are_named(tiny_bert, ragged_rows, returned):
    with pytest.raises(TypeError, match="metrics returned .* must return a dict"):
        run(tiny_bert, ragged_rows, max_steps=1, metrics=lambda prediction: returned)


def test_a_loss_of_the_metrics_takes_the_place_of_ours(tiny_bert, ragged_rows):
    """As in transformers: theirs has the whole name already when the caller's gets it."""
    trainer = run(tiny_bert, ragged_rows, max_steps=1, metrics=lambda _: {"loss": 7.0})
    assert trainer.metrics["eval_loss"] == 7.0
    trainer = run(tiny_bert, ragged_rows, max_steps=1, metrics=lambda _: {"eval_loss": 7.0})
    assert trainer.metrics["eval_loss"] < 1.0


def test_no_batches_make_no_figures(tiny_bert, ragged_rows):
    trainer = run(tiny_bert, ragged_rows, max_steps=1, metrics="auto", limit_val_batches=0)
    assert not any(name.startswith("eval_") for name in trainer.metrics)


@pytest.mark.parametrize("event", ["on_step_begin", "on_optimizer_step", "on_step_end", "metrics"])
def test_stop_iteration_is_an_error_and_ends_no_epoch(tiny_bert, ragged_rows, event):
    """Once it ended the epoch, as Lightning takes it, and the run seemed whole."""

    class Ends(TrainerCallback):
        pass

    def end(*_, **__):
        return next(iter([]))

    setattr(Ends, event, end)
    asked = {"metrics": end, "eval_strategy": "epoch"} if event == "metrics" else {}
    with pytest.raises(RuntimeError, match="ended in StopIteration"):
        run(tiny_bert, ragged_rows, callbacks=[Ends()], **asked)


def test_stop_iteration_in_a_model_is_an_error(tiny_bert, ragged_rows):
    model, tokenizer = tiny_bert()
    model.bert.register_forward_pre_hook(lambda *_: next(iter([])))
    with pytest.raises(RuntimeError, match="Update 1 ended in StopIteration at micro-batch 1 of 1"):
        HFTrainer()((model, tokenizer), ragged_rows(8), max_steps=2)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_share_of_the_batches_that_is_none_or_unknown_is_refused(
    tiny_bert, ragged_rows, streamed
):
    validation = datasets.Dataset.from_list(ragged_rows(8, seed=1))  # one batch
    validation = validation.to_iterable_dataset() if streamed else validation
    told = (
        "a share of a stream" if streamed else "limit_val_batches=0.9 of 1 batches leaves no batch"
    )
    call = {"validation": validation, "max_steps": 1}
    with pytest.raises(ValueError, match=told):
        HFTrainer()(tiny_bert(), ragged_rows(8), limit_val_batches=0.9, **call)
    trainer = HFTrainer()
    trainer(tiny_bert(), ragged_rows(8), limit_val_batches=1.0, **call)
    assert "eval_loss" in trainer.metrics


def test_a_stream_has_no_epochs_to_limit(tiny_bert, ragged_rows):
    stream = datasets.Dataset.from_list(ragged_rows(8)).to_iterable_dataset()
    with pytest.raises(ValueError, match="limit_train_batches=2 cuts epochs.*Use max_steps"):
        HFTrainer()(tiny_bert(), stream, max_steps=1, limit_train_batches=2)


def test_best_metric_that_is_not_there_names_those_that_are(tiny_bert, ragged_rows):
    """Before training; once it was told after the first evaluation."""
    told = "metric_for_best_model='f1' is not among the figures that metrics='auto'.*f1_macro"
    with pytest.raises(ValueError, match=told):
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
