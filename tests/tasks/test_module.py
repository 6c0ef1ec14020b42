"""The tasks under a plain Lightning Trainer, as others use them and build on them."""

import csv
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from hflit import HFTrainer
from hflit.arguments import Arguments
from hflit.data import data_module
from hflit.loop.evaluation import evaluate
from hflit.tasks import TASKS
from tests.tasks.tiny import make, rows


def plain(task, kind=None, **arguments):
    """A task, or a class built on it, and its data."""
    kind = kind or TASKS[task]
    model, tokenizer = make(task, 0)
    args = Arguments(use_cpu=True, learning_rate=1e-2, **arguments)
    stride = {"stride": 8} if task == "question-answering" else {}
    tokenization = kind.tokenization(
        tokenizer, maxlength=32, **kind.tokenization_settings, **stride
    )
    data = data_module(rows(task), rows(task), tokenization=tokenization, args=args, cache=False)
    return kind(model.train(), args), data


def trainer(**flags):
    given = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**(given | quiet | flags))


class Updates(L.Callback):
    """Notes the windows and what their updates gave."""

    def __init__(self):
        self.windows, self.updates = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.windows.append([micro["input_ids"].tolist() for micro in batch])
        self.updates.append(outputs)


@pytest.mark.parametrize("task", TASKS)
def test_takes_an_optimizer_without_a_schedule(task):
    class Plain(TASKS[task]):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=0.5)

        def training_step(self, window, batch_idx):
            update = super().training_step(window, batch_idx)
            self.log("rate", update["learning_rate"])
            return update

    module, data = plain(task, Plain)
    run = trainer(max_steps=2)
    run.fit(module, data)
    assert (run.global_step, run.logged_metrics["rate"]) == (2, 0.5)


def test_loads_from_a_checkpoint_of_lightning(tmp_path):
    module, data = plain("text-classification")
    run = trainer(max_steps=2)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    model, _ = make("text-classification", 1)
    loaded = type(module).load_from_checkpoint(
        tmp_path / "last.ckpt", model=model, args=module.args
    )
    for name, weight in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


@pytest.mark.parametrize("task", TASKS)
def test_trains_the_loss_of_a_class_built_on_a_task(task):
    """A doubled loss has twice the gradient, to the rounding of another order of sums."""

    class Doubled(TASKS[task]):
        def summed_loss(self, outputs, batch):
            return 2 * super().summed_loss(outputs, batch)

    norms = []
    for kind in (TASKS[task], Doubled):
        torch.manual_seed(0)  # token-detection samples
        module, data = plain(task, kind)
        seen = Updates()
        trainer(max_steps=1, callbacks=[seen]).fit(module, data)
        norms.append(seen.updates[0]["grad_norm"])
    torch.testing.assert_close(norms[1], 2 * norms[0], rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.parametrize("flags", [{}, {"reload_dataloaders_every_n_epochs": 1}], ids=str)
@pytest.mark.parametrize("step", [3, 4, 6])
def test_goes_on_from_a_checkpoint_of_lightning(tmp_path, step, flags):
    """With 24 rows there are 4 windows of 3 micro-batches an epoch."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    saves = L.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    flags = {"max_epochs": 3, "enable_checkpointing": True, **flags}
    whole, rest = Updates(), Updates()
    module, data = plain("language-modeling", **settings)
    data.tokenization.merge = None
    trainer(callbacks=[whole, saves], **flags).fit(module, data)
    resumed, data = plain("language-modeling", **settings)
    data.tokenization.merge = None
    unsaved = L.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=0)
    run = trainer(callbacks=[rest, unsaved], **flags)
    run.fit(resumed, data, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert len(whole.windows) == 12
    assert rest.windows == whole.windows[step:]
    for name, weight in module.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfits_the_same_rows():
    module, data = plain("text-classification", per_device_train_batch_size=2)
    seen = Updates()
    trainer(max_epochs=2, overfit_batches=2, callbacks=[seen]).fit(module, data)
    assert seen.windows[2:] == seen.windows[:2]


@pytest.mark.parametrize("task", sorted(TASKS.keys() - {"token-detection"}))
def test_eval_loss_is_the_mean_over_all_items(task):
    """However they share batches; token-detection has two kinds of items, and samples."""
    module, data = plain(task, per_device_eval_batch_size=5)
    (figures,) = trainer().validate(module, data, verbose=False)
    expected = evaluate(module, data, module.args)["eval_loss"]
    assert figures["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_logs_what_the_call_logs(tmp_path):
    """Once a plain Trainer's log held eval_loss alone."""
    module, data = plain("text-classification", gradient_accumulation_steps=2)
    logger = CSVLogger(tmp_path)
    trainer(max_steps=3, logger=logger, log_every_n_steps=1).fit(module, data)
    lines = csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines())
    logged = [each for each in lines if each["loss"]]

    ours = HFTrainer()
    told = {"max_steps": 3, "gradient_accumulation_steps": 2, "logging_steps": 1}
    base, found = make("text-classification", 0), rows("text-classification")
    ours(base, found, maxlength=32, use_cpu=True, learning_rate=1e-2, cache=False, **told)
    history = [each for each in ours.state.log_history if "loss" in each]
    assert len(logged) == len(history) == 3
    for each, entry in zip(logged, history, strict=True):
        for name in ("loss", "grad_norm"):
            assert float(each[name]) == pytest.approx(entry[name], rel=1e-5)


def test_refuses_processes_that_the_arguments_do_not_know():
    module, data = plain("text-classification")
    module.args.set_ranks(2, 0, 0)
    with pytest.raises(ValueError, match="1 processes run, and the arguments know of 2"):
        trainer(max_steps=1).fit(module, data)
