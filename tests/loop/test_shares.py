"""Checkpoints of several processes: in shares, whole or not there, for any number to go on from."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

from hflit.loop.folders import flaw, numbered
from hflit.tasks import TASKS
from tests.loop.test_strategies import SHORT, assert_same, fit, two

pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.filterwarnings("ignore:The tokenizer has new PAD/BOS/EOS tokens"),
]
SAVES = {"save_strategy": "steps", "save_steps": 1}
ADAM = {**SHORT, "optim": "adamw_torch", "learning_rate": 1e-3, "num_train_epochs": 2}
# 23 rows, 12 an update: four updates in two epochs.
LAYOUTS = {
    "1": {"per_device_train_batch_size": 12},
    "1 of 3 parts": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
    "ddp 2": {"strategy": "ddp_fork", "devices": 2, "per_device_train_batch_size": 6},
    "fsdp 2": {"strategy": "fsdp_fork", "devices": 2, "per_device_train_batch_size": 6},
    "fsdp 3": {"strategy": "fsdp_fork", "devices": 3, "per_device_train_batch_size": 4},
}
FULL = {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_each_process_writes_its_share(tmp_path):
    two("fsdp_fork", **ADAM, **SAVES, output_dir=str(tmp_path), max_steps=1)
    folder = tmp_path / "checkpoint-1"
    assert flaw(folder) is None
    written = names(folder)
    assert written >= {"optimizer/.metadata", "optimizer/__0_0.distcp", "optimizer/__1_0.distcp"}
    assert written >= {"model.safetensors", "scheduler.pt", "complete.json"}
    assert "optimizer.pt" not in written
    sizes = [(folder / f"optimizer/__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert max(sizes) < 0.7 * sum(sizes)  # small tensors cost more than their numbers
    assert not list(tmp_path.glob(".checkpoint*"))

    (folder / "optimizer" / "__1_0.distcp").unlink()
    with pytest.raises(ValueError, match="optimizer/__1_0.distcp is missing"):
        fit(**ADAM, checkpoint=folder)


@pytest.mark.parametrize(
    ("before", "step", "after"),
    [
        ("fsdp 2", 1, "1"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("fsdp 2", 2, "fsdp 3"),
                ("fsdp 2", 3, "1 of 3 parts"),
                ("fsdp 3", 1, "ddp 2"),
                ("ddp 2", 3, "fsdp 3"),
                ("1", 1, "fsdp 2"),
            ]
        ),
    ],
)
def test_another_number_of_processes_goes_on(before, step, after, tmp_path):
    whole = fit(**ADAM, **LAYOUTS["1"])
    fit(**ADAM, **SAVES, **LAYOUTS[before], output_dir=str(tmp_path))
    again = fit(**ADAM, **LAYOUTS[after], checkpoint=tmp_path / f"checkpoint-{step}")
    assert_same(again, whole, 2e-6, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "also"),
    [
        *((task, {}) for task in TASKS),
        ("text-classification", {"optim": "adamw_torch_fused"}),
        ("text-classification", {"lora": {"r": 2, "lora_dropout": 0.0}}),
    ],
)
def test_shares_of_every_task_go_on(task, also, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "multinomial", lambda odds, n: odds.argmax(-1, keepdim=True))
    call = {**ADAM, "task": task, **also, "output_dir": str(tmp_path)}
    whole = two("fsdp_fork", **call, **SAVES)
    again = two("fsdp_fork", **call, checkpoint=tmp_path / "checkpoint-2")
    assert_same(again, whole, 0, 0)


@pytest.mark.slow
def test_full_state_is_one_file_as_ever(tmp_path):
    call = {**ADAM, "output_dir": str(tmp_path), **FULL}
    whole = two("fsdp_fork", **call, **SAVES)
    assert "optimizer.pt" in names(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-2" / "optimizer").exists()
    assert_same(two("fsdp_fork", **call, checkpoint=tmp_path / "checkpoint-2"), whole, 0, 0)


@pytest.fixture
def eight(tmp_path):
    """A checkpoint of two processes with 4 rows each."""
    two(**SHORT, **SAVES, output_dir=str(tmp_path), max_steps=1)
    return tmp_path / "checkpoint-1"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, r"processes=2 there, processes=1 here. With 1 process.* must be 8"),
        (
            {"devices": 3, "strategy": "ddp_fork"},
            "has 8 rows, which 3 processes cannot share equally",
        ),
        (
            {"per_device_train_batch_size": 8, "train_sampling_strategy": "group_by_length"},
            "processes=2 there, processes=1 here",
        ),
    ],
)
def test_an_update_keeps_its_rows(eight, given, told):
    with pytest.raises((ValueError, mp.ProcessRaisedException), match=told):
        fit(**SHORT, **given, checkpoint=eight)


def broken_writer(how, folder):
    """One process cannot write its share of the second checkpoint."""
    write = dcp.FileSystemWriter.write_data

    def fail(self, plan, planner):
        if "checkpoint-2." in str(self.path) and os.environ["LOCAL_RANK"] == "1":
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")
        return write(self, plan, planner)

    return fail


@pytest.mark.slow
def test_a_full_disk_of_one_process_leaves_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", broken_writer("full", tmp_path))
    two("fsdp_fork", **ADAM, **SAVES, output_dir=str(tmp_path), max_steps=3)
    assert [folder.name for folder in numbered(tmp_path)] == ["checkpoint-1", "checkpoint-3"]
    assert [flaw(folder) for folder in numbered(tmp_path)] == [None, None]
    assert not list(tmp_path.glob(".checkpoint*"))


def test_a_process_killed_while_it_writes_leaves_what_was_whole(tmp_path, monkeypatch):
    call = {**ADAM, "output_dir": str(tmp_path), "max_steps": 3}
    with monkeypatch.context() as patched:
        patched.setattr(dcp.FileSystemWriter, "write_data", broken_writer("killed", tmp_path))
        with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
            two("fsdp_fork", **call, **SAVES)
    assert [folder.name for folder in numbered(tmp_path)] == ["checkpoint-1"]
    assert list(tmp_path.glob(".checkpoint-2.*.shares"))
    trainer, _ = two("fsdp_fork", **call, checkpoint=True)
    assert trainer.state.global_step == 3
    assert not list(tmp_path.glob(".checkpoint*"))


@pytest.mark.slow
def test_shares_that_another_host_keeps_are_missed(tmp_path, monkeypatch):
    """Nodes without common storage: process 0 does not see what process 1 has written."""
    save = dcp.save

    def save_and_lose(*args, checkpoint_id, **kwargs):
        written = save(*args, checkpoint_id=checkpoint_id, **kwargs)
        Path(checkpoint_id, "__1_0.distcp").unlink(missing_ok=True)
        return written

    monkeypatch.setattr("hflit.sharding.dcp.save", save_and_lose)
    two("fsdp_fork", **ADAM, **SAVES, output_dir=str(tmp_path), max_steps=1)
    assert numbered(tmp_path) == []
