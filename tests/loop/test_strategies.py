"""Several processes on this machine: they train as one would, and end as one would."""

import logging
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from transformers import TrainerCallback

from hflit import HFTrainer
from hflit.loop.folders import flaw
from hflit.sharding import _blocks
from hflit.tasks import TASKS
from tests.reference import reference_trainer, without_times
from tests.tasks.tiny import make, rows

pytestmark = [
    pytest.mark.timeout(100),
    # DDP's own words, once in each process.
    pytest.mark.filterwarnings("ignore:.*find_unused_parameters=True was specified"),
    pytest.mark.filterwarnings("ignore:The tokenizer has new PAD/BOS/EOS tokens"),
    pytest.mark.filterwarnings("ignore:parity=True copies:UserWarning"),
]
ROWS = 23  # no multiple of anything here
CALL = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0.3,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "use_cpu": True,
    "cache": False,
    "disable_tqdm": False,
}
OPTIONS = {
    "question-answering": {"stride": 8},
    "sequence-sequence": {"generation_max_length": 8},
    **dict.fromkeys(
        ("language-modeling", "language-generation", "token-detection"), {"merge": None}
    ),
}
SHORT = {"task": "text-classification", "metrics": "auto"}


def fit(task="text-classification", base=None, **call):
    trainer = HFTrainer()
    given = {**CALL, **OPTIONS.get(task, {}), "task": task, **call}
    train, validation = rows(task)[:ROWS], rows(task)[:11]
    model, _ = trainer(base or make(task, 0), train, validation, **given)
    return trainer, model


def two(strategy="ddp_fork", **call):
    return fit(**call, strategy=strategy, devices=2)


def assert_same(actual, expected, tolerance=1e-6, weights=1e-6):
    (trainer, model), (their_trainer, their_model) = actual, expected
    history, theirs = trainer.state.log_history, their_trainer.state.log_history
    assert len(history) == len(theirs)
    for entry, other in zip(map(without_times, history), map(without_times, theirs), strict=True):
        assert entry.keys() == other.keys()
        for name in entry.keys() - {"total_flos"}:  # counts padding
            assert entry[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), name
    assert not model.training
    assert type(model) is type(their_model)
    for name, weight in their_model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=weights)


@pytest.fixture
def likeliest(monkeypatch):
    """The generator of token detection says its best guess: processes draw other ones."""
    monkeypatch.setattr(torch, "multinomial", lambda odds, n: odds.argmax(-1, keepdim=True))


@pytest.fixture
def many_parts(monkeypatch):
    """Rows are cut wherever their lengths differ, so that processes have unlike numbers of parts.

    Tiny models would gain nothing by that.
    """
    monkeypatch.setattr("hflit.tasks.module.forward_cost", lambda model, device: 0.0)


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_train_as_one(task, likeliest, many_parts):
    call = {"task": task, "metrics": "auto", "num_train_epochs": 2, "cache": True}
    alone = fit(**call, gradient_accumulation_steps=4)
    assert_same(two(**call, gradient_accumulation_steps=2), alone)


@pytest.mark.parametrize(
    "task", [pytest.param(t, marks=pytest.mark.slow) for t in TASKS if t != "sequence-sequence"]
    + ["sequence-sequence"]
)  # fmt: skip
def test_shards_train_as_one_process(task, likeliest, many_parts):
    call = {"task": task, "metrics": "auto", "eval_on_start": True}
    alone = fit(**call, gradient_accumulation_steps=4)
    assert_same(two("fsdp_fork", **call, gradient_accumulation_steps=2), alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "also",
    [
        {"lora": {"r": 2, "lora_dropout": 0.0}},
        {"bf16": True},
        {"optim": "adamw_torch_fused", "learning_rate": 1e-3},
        {"activation_checkpointing": True, "lora": {"r": 2, "lora_dropout": 0.0}},
    ],
)
def test_shards_with(also):
    alone = fit(**SHORT, **also, gradient_accumulation_steps=2)
    for strategy in ("ddp_fork", "fsdp_fork"):
        assert_same(two(strategy, **SHORT, **also), alone, weights=2e-5)


@pytest.mark.slow
def test_best_shards_are_loaded_and_saved_as_one_folder(tmp_path):
    files = {"output_dir": str(tmp_path), "save_strategy": "epoch", "eval_strategy": "epoch"}
    rising = {"learning_rate": 0.5, "load_best_model_at_end": True, "num_train_epochs": 4}
    trainer, model = two("fsdp_fork", **SHORT, **{**files, **rising})
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == min(losses) < losses[-1]
    for folder in (tmp_path, Path(trainer.state.best_model_checkpoint)):
        saved = type(model).from_pretrained(folder)
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(saved.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("task", "block", "count"),
    [
        ("text-classification", "BertLayer", 1),
        ("language-generation", "GPT2Block", 1),
        ("sequence-sequence", "T5Block", 2),
        ("token-detection", "BertLayer", 2),
    ],
)
def test_blocks_share_nothing_with_the_rest(task, block, count):
    names = [type(each).__name__ for each in _blocks(make(task, 0)[0], None)]
    assert names.count(block) == count


def test_two_times_four_rows_are_eight():
    assert_same(two(**SHORT), fit(**SHORT, per_device_train_batch_size=8))


@pytest.mark.slow
def test_moments_of_adam_enlarge_rounding():
    adam = {**SHORT, "optim": "adamw_torch", "learning_rate": 1e-3}
    assert_same(two(**adam), fit(**adam, per_device_train_batch_size=8), weights=2e-5)


@pytest.mark.slow
def test_adapter_trains_as_in_one_process():
    call = {**SHORT, "lora": {"r": 2, "lora_dropout": 0.0}}
    assert_same(two(**call), fit(**call, per_device_train_batch_size=8))


@pytest.mark.slow
def test_quantized_weights_train_as_in_one_process():
    call = {**SHORT, "quantize": True, "lora": {"r": 2, "lora_dropout": 0.0}}
    path = "base"
    model, tokenizer = make("text-classification", 0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    path = str(Path(path).absolute())
    assert_same(
        two(**call, base=path), fit(**call, base=path, per_device_train_batch_size=8), 2e-6, 2e-6
    )


def test_each_process_may_average_its_own_rows():
    whole = two(**SHORT)[0].state.log_history
    own = two(**SHORT, average_tokens_across_devices=False)[0].state.log_history
    assert own[0]["loss"] == pytest.approx(whole[0]["loss"], abs=1e-6)  # 4 rows and 4 rows
    assert own[2]["loss"] != pytest.approx(whole[2]["loss"], abs=1e-4)  # 4 rows and 3 rows


class Notes(TrainerCallback):
    def __init__(self, path):
        self.path = path

    def on_evaluate(self, args, state, control, metrics, **_):
        (self.path / f"{args.process_index}").write_text(str(metrics["eval_seen"]))


def test_own_metrics_get_all_rows_in_order_on_each_process(tmp_path):
    def metrics(prediction):
        seen = "".join(map(str, prediction.label_ids.tolist()))
        return {"seen": f"{seen}, {prediction.predictions.shape}"}

    two(metrics=metrics, callbacks=[Notes(tmp_path)], max_steps=1)
    told = [(tmp_path / f"{rank}").read_text() for rank in range(2)]
    assert told == ["01201201201, (11, 3)"] * 2


def reference_rank(rank, port, path, given):
    os.environ.update(
        {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=f"{port}",
    )
    torch.set_num_threads(1)
    model, tokenizer = make("text-classification", 0)
    data = rows("text-classification")
    trainer = reference_trainer(model, tokenizer, data[:ROWS], data[:11], **given)
    trainer.train()
    if rank == 0:
        torch.save((trainer.state, model), path)


def test_share_of_the_validation_batches_is_that_of_one_process():
    """1 of 3, which was half of 2 for one process and half of 1, none at all, for the other."""
    call = {**SHORT, "limit_val_batches": 0.5, "max_steps": 2}
    alone = fit(**call, gradient_accumulation_steps=2)
    assert_same(two(**call), alone)


def test_pair_made_of_one_model_comes_back(likeliest, many_parts):
    """Once it did not fit into that model, after training."""
    call = {"task": "token-detection", "num_train_epochs": 1}
    alone = fit(**call, base=make("language-modeling", 0), gradient_accumulation_steps=2)
    base = make("language-modeling", 0)
    trainer, pair = two(**call, base=base)
    assert_same((trainer, pair), alone)
    assert trainer.predict([{"text": "w1 w2"}])
    for name, weight in pair.generator.state_dict().items():
        torch.testing.assert_close(base[0].state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"gradient_accumulation_steps": 2},
        pytest.param(
            {"accelerator_config": {"use_seedable_sampler": False}}, marks=pytest.mark.slow
        ),
    ],
)
def test_parity_sees_the_rows_of_transformers(more, tmp_path):
    plain = {k: v for k, v in CALL.items() if k not in ("cache",)}
    given = {**plain, **more, "num_train_epochs": 2}
    path = tmp_path / "reference.pt"
    mp.start_processes(
        reference_rank, (find_free_network_port(), path, given), 2, start_method="fork"
    )
    state, model = torch.load(path, weights_only=False)
    trainer, mine = two(parity=True, **given)
    for entry, theirs in zip(trainer.state.log_history, state.log_history, strict=False):
        assert without_times(entry) == without_times(theirs)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    "strategy", ["ddp_fork", pytest.param("fsdp_fork", marks=pytest.mark.slow)]
)
def test_run_goes_on_exactly(strategy, tmp_path):
    call = {**SHORT, "num_train_epochs": 3, "output_dir": str(tmp_path), "save_steps": 2}
    call["optim"] = "adamw_torch"
    whole = two(strategy, **call, save_strategy="steps", base=dropping())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir(tmp_path / "checkpoint-4"))
    again = two(strategy, **call, checkpoint=tmp_path / "checkpoint-4", base=dropping())
    assert_same(again, whole, 0, 0)
    with pytest.raises(ValueError, match="processes=2 there, processes=1 here"):
        fit(**call, checkpoint=tmp_path / "checkpoint-4")


def dropping():
    model, tokenizer = make("text-classification", 0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    return model, tokenizer


class Fails(TrainerCallback):
    def __init__(self, signal_number=None, step=2):
        self.signal_number, self.step = signal_number, step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step and args.process_index == 1:
            if self.signal_number is None:
                raise ValueError("the second process lost its way")
            os.kill(os.getpid(), self.signal_number)


def test_failure_of_one_process_ends_all():
    start = time.monotonic()
    with pytest.raises(mp.ProcessRaisedException, match="the second process lost its way"):
        two(**SHORT, callbacks=[Fails()], num_train_epochs=9)
    with pytest.raises(mp.ProcessExitedException, match="process 1 .* SIGKILL"):
        two(**SHORT, callbacks=[Fails(signal.SIGKILL)], num_train_epochs=9)
    assert time.monotonic() - start < 30


class FailsIn(TrainerCallback):
    """Raises an error in some processes, before their third update."""

    def __init__(self, ranks):
        self.ranks = ranks

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2 and args.process_index in self.ranks:
            raise LookupError("mine")


@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_an_error_saves_the_last_whole_update(ranks, tmp_path):
    run = tmp_path / "run"
    call = {**SHORT, "output_dir": str(run), "save_strategy": "epoch", "optim": "adamw_torch"}
    told = logging.FileHandler(tmp_path / "told")  # by all processes
    logging.getLogger("hflit").addHandler(told)
    try:
        with pytest.raises(mp.ProcessRaisedException, match="LookupError: mine"):
            two(**call, callbacks=[FailsIn(ranks)])
    finally:
        logging.getLogger("hflit").removeHandler(told)
        told.close()
    words = "failed after update 2; checkpoint-2 is saved"
    assert (tmp_path / "told").read_text().count(words) == 1
    assert os.listdir(run / ".checkpoint-2.claim") == ["done"]
    assert flaw(run / "checkpoint-2") is None
    # Of the other processes nobody can ask the random numbers.
    assert len(list((run / "checkpoint-2").glob("rng_state_?.pth"))) == 1
    again = two(**call, checkpoint=True)
    assert not list(run.glob(".*"))
    whole = two(**{**call, "output_dir": str(tmp_path / "whole")})
    assert_same(again, whole, 0, 0)


def test_what_all_processes_have_to_say_is_said_once(tmp_path, monkeypatch, capfd):
    """Once the others said it too: they had no handler, and Python shows warnings then."""
    monkeypatch.setattr(logging.getLogger("hflit"), "propagate", False)  # to those of pytest
    call = {**SHORT, "output_dir": str(tmp_path), "save_strategy": "epoch", "maxlength": 3}
    with pytest.raises(mp.ProcessRaisedException, match="LookupError: mine"):
        two(**call, callbacks=[FailsIn([1])])
    told = capfd.readouterr().err
    assert told.count(f"{ROWS} of {ROWS} training rows reach maxlength=3 tokens") == 1
    assert told.count("failed after update 2; checkpoint-2 is saved") == 1
    with pytest.raises(SystemExit):
        two(**call, checkpoint=True, callbacks=[Fails(signal.SIGTERM, 3)])
    told = capfd.readouterr().err
    # Whose random numbers are missing was the first to find out, or the second.
    assert len(re.findall(r"rng_state_.\.pth is missing: random numbers start anew", told)) == 1
    assert told.count("SIGTERM: stopped after update 4; checkpoint-4 is saved") == 1


def test_an_error_in_the_evaluation_after_training_loses_nothing(tmp_path):
    """Once all was lost, unless save_strategy had saved it."""

    def broken(prediction):
        raise LookupError("mine")

    call = {**SHORT, "output_dir": str(tmp_path), "save_strategy": "no", "num_train_epochs": 1}
    with pytest.raises(mp.ProcessRaisedException, match="LookupError: mine"):
        two(**{**call, "metrics": broken})
    assert flaw(tmp_path / "checkpoint-3") is None
    again = two(**call, checkpoint=True)
    whole = two(**{**call, "output_dir": None})
    assert again[0].metrics["eval_loss"] == whole[0].metrics["eval_loss"]
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_an_error_saves_no_share(tmp_path):
    call = {**SHORT, "output_dir": str(tmp_path), "save_strategy": "epoch"}
    with pytest.raises(mp.ProcessRaisedException, match="LookupError: mine"):
        two("fsdp_fork", **call, callbacks=[FailsIn([0, 1])])
    assert os.listdir(tmp_path) == []


def test_all_processes_stop_where_one_is_asked_to(tmp_path):
    files = {"output_dir": str(tmp_path), "save_strategy": "epoch"}
    with pytest.raises(SystemExit) as stop:
        two(**SHORT, **files, callbacks=[Fails(signal.SIGTERM)], num_train_epochs=9)
    assert stop.value.code == 143
    assert os.listdir(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strategy": "deepspeed"}, "strategy='deepspeed' cannot be used. Choose one of: auto"),
        ({"strategy": "fsdp_cpu_offload"}, "cannot be used"),
        ({"strategy": "ddp", "fsdp": True}, "contradict"),
        ({"devices": 2, "auto_find_batch_size": True}, "needs a single process"),
        ({"deepspeed": {"zero": 1}}, "never run"),
        ({"fsdp": True, "devices": 2, "quantize": True, "lora": True}, "cannot be sharded"),
        ({"fsdp": True, "fsdp_config": {"cpu_offload": True}}, "cannot hold cpu_offload=True"),
        ({"fsdp": True, "optim": "adafactor"}, "cannot update shares"),
        ({"devices": 2, "precision": "16-mixed"}, "needs an accelerator"),
    ],
)
def test_what_cannot_be_spread_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        HFTrainer()("no/such-model", [], use_cpu=True, **given)
