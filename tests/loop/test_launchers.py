"""Every way in which the processes of a run are started: it is the same run, and ends as one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import lightning.pytorch as L
import psutil
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.accelerators import CPUAccelerator
from transformers import TrainerCallback

from hflit import HFTrainer
from hflit.arguments import Arguments
from hflit.loop.strategies import spread
from tests.loop.test_strategies import SHORT, fit

ROOT = Path(__file__).parents[2]
LAUNCH = ["-m", "torch.distributed.run", "--nproc_per_node"]
SECONDS = 30  # that a run may go on after one of its processes has died
# Run as it stands, without `if __name__ == "__main__":`.
SCRIPT = """
import json, os, sys
from pathlib import Path
from tests.loop.test_launchers import Ends
from tests.loop.test_strategies import SHORT, fit
trainer, model = fit(**SHORT, {call})
lightning = getattr(trainer, "lightning", None)  # not there where the call started processes
world, rank = (lightning.world_size, lightning.global_rank) if lightning else (None, 0)
told = dict(world=world, host=os.readlink("/proc/self/ns/net"))
told |= dict(losses=[e["loss"] for e in trainer.state.log_history if "loss" in e])
told |= dict(kind=type(model).__name__, training=model.training)
Path(sys.argv[1], f"{{rank}}.json").write_text(json.dumps(told))
"""
GUARDED = "if __name__ == '__main__':\n" + SCRIPT.replace("\n", "\n    ")


class Ends(TrainerCallback):
    """Ends one process in the middle of the run, and notes when."""

    def __init__(self, rank, kind, folder):
        self.rank, self.kind, self.note = rank, kind, Path(folder, "ended")

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 2 and args.process_index == self.rank:
            self.note.touch()
            if self.kind == "error":
                raise ValueError("a process lost its way")
            os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def two_hosts():
    """Prefixes of commands that run on two hosts, what gloo needs there, and the first's address.

    The hosts are network namespaces with a cable between them; without the right to make those,
    two processes on this host.
    """
    names = [f"hflit-{os.getpid()}-{end}" for end in "ab"]
    cables = [f"hf{os.getpid() % 10**7}{end}" for end in "ab"]  # 15 characters at most
    try:
        made = [["netns", "add", name] for name in names]
        link = ["link", "add", cables[0], "netns", names[0], "type", "veth"]
        made.append([*link, "peer", "name", cables[1], "netns", names[1]])
        for number, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
            made.append(["-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", cable])
            made += [["-n", name, "link", "set", each, "up"] for each in ("lo", cable)]
        for command in made:
            subprocess.run(["ip", *command], check=True, capture_output=True)
        hosts = [(["ip", "netns", "exec", name], {}) for name in names]
        for (_, environment), cable in zip(hosts, cables, strict=True):
            environment["GLOO_SOCKET_IFNAME"] = cable
        yield hosts, "10.213.7.1"
    except (FileNotFoundError, subprocess.CalledProcessError):
        yield [([], {}), ([], {})], "127.0.0.1"
    finally:
        for name in names:
            with suppress(FileNotFoundError):
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


def has_namespaces():
    with two_hosts() as (hosts, _):
        return bool(hosts[0][0])


@contextmanager
def started(how, folder, call=""):
    """Processes that make one run together; none of them outlives the block.

    Args:
        how: script, spawn, torchrun, nodes (of one process), nodes of two, slurm, or plain.
        folder: Where the script writes what it found, and what it prints.
        call: Its keywords.
    """
    own = {"script": "strategy='ddp', devices=2, ", "spawn": "strategy='ddp_spawn', devices=2, "}
    script = folder / "script.py"
    text = GUARDED if how == "spawn" else SCRIPT
    script.write_text(text.format(call=own.get(how, "") + call))
    port = f"{find_free_network_port()}"
    commands = [([], [str(script)], {})]  # prefix, arguments of python, environment
    with two_hosts() if "nodes" in how else nothing() as (hosts, address):
        if how == "torchrun":
            commands = [([], [*LAUNCH, "2", "--master_port", port, str(script)], {})]
        elif "nodes" in how:
            each = "2" if "two" in how else "1"
            meeting = ["--nnodes", "2", "--master_addr", address, "--master_port", port]
            commands = [
                (prefix, [*LAUNCH, each, *meeting, "--node_rank", f"{rank}", str(script)], extra)
                for rank, (prefix, extra) in enumerate(hosts)
            ]
        elif how == "slurm":
            job = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2"}
            job |= {"SLURM_JOB_ID": "7", "SLURM_NODELIST": "localhost", "MASTER_PORT": port}
            ranks = [{"SLURM_PROCID": f"{r}", "SLURM_NODEID": f"{r}"} for r in range(2)]
            commands = [([], [str(script)], {**job, **r, "SLURM_LOCALID": "0"}) for r in ranks]
        shared = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        running, everyone = [], {}
        with (folder / "log").open("w") as log:
            for prefix, arguments, environment in commands:
                command = [*prefix, sys.executable, *arguments, str(folder)]
                options = {"env": {**shared, **environment}, "stdout": log, "stderr": log}
                running.append(subprocess.Popen(command, **options))
            try:
                yield running, everyone
            finally:
                note(running, everyone)
                for process in everyone.values():
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                for process in running:
                    process.wait()


@contextmanager
def nothing():
    yield None, None


def note(running, everyone):
    """Remember all processes of a run, also those whose parent dies before them."""
    for parent in running:
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(parent.pid)
            everyone |= {each.pid: each for each in [parent, *parent.children(recursive=True)]}


def wait(running, everyone, seconds, until=lambda: False):
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in running) and not until():
        assert time.monotonic() < end, "the run goes on"
        note(running, everyone)
        time.sleep(0.1)


NODES = [("nodes of two", "per_device_train_batch_size=2"), ("nodes", "strategy='fsdp'")]


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("how", "call"),
    [("script", ""), ("spawn", ""), ("torchrun", ""), ("slurm", "strategy='fsdp'"), *NODES],
)
def test_it_trains_as_one_process(how, call, tmp_path):
    with started(how, tmp_path, call) as (running, everyone):
        wait(running, everyone, 150)
        codes = [process.returncode for process in running]
    assert codes == [0] * len(running), (tmp_path / "log").read_text()[-5000:]
    trainer, model = fit(**SHORT, per_device_train_batch_size=8)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("*.json"))]
    world = {"nodes of two": 4, "spawn": None}.get(how, 2)
    assert len(found) == (world or 1)
    for told in found:
        assert told["world"] == world
        assert told["losses"] == pytest.approx(losses, abs=1e-6)
        assert told["kind"] == type(model).__name__
        assert not told["training"]
    hosts = {told["host"] for told in found}
    assert len(hosts) == (2 if "nodes" in how and has_namespaces() else 1)


LOST = "Connection (closed|reset) by peer"
CAUSES = {  # what the user reads, of whoever finds out first
    "script": f"terminated with code -9|{LOST}",
    "spawn": "process 1 terminated with signal SIGKILL",
    "torchrun": r"Signal 9 \(SIGKILL\) received by PID",
    "nodes": r"Signal 9 \(SIGKILL\) received by PID",
    "slurm": LOST,
}
ENDINGS = [(how, 1, "kill", cause) for how, cause in CAUSES.items()]
ENDINGS += [("script", 0, "kill", LOST)]
ENDINGS += [
    (how, 1, "error", "ValueError: a process lost its way")
    for how in ("script", "torchrun", "slurm")
]


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("how", "rank", "kind", "cause"), ENDINGS)
def test_death_of_one_process_ends_all(how, rank, kind, cause, tmp_path):
    call = f"num_train_epochs=2000, callbacks=[Ends({rank}, {kind!r}, {str(tmp_path)!r})]"
    with started(how, tmp_path, call) as (running, everyone):
        wait(running, everyone, 120, until=(tmp_path / "ended").exists)
        assert (tmp_path / "ended").exists(), (tmp_path / "log").read_text()[-5000:]
        end = time.monotonic() + SECONDS
        wait(running, everyone, SECONDS)
        _, left = psutil.wait_procs(everyone.values(), max(0, end - time.monotonic()))
        assert not left
    assert all(process.returncode != 0 for process in running)
    assert re.search(cause, (tmp_path / "log").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("strategy='ddp_spawn', devices=2", 'Put it under `if __name__ == "__main__":`, or use'),
        ("devices=2", None),
    ],
)
@pytest.mark.timeout(100)
def test_script_without_guard(call, told, tmp_path):
    with started("plain", tmp_path, call) as (running, everyone):
        wait(running, everyone, 80)
        code = running[0].returncode
    assert code == (0 if told is None else 1)
    assert told is None or told in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(100)
@pytest.mark.parametrize("prompt", [["-"], ["-i", "-"]], ids=["pipe", "prompt"])
@pytest.mark.parametrize(
    ("strategy", "told"),
    [("auto", None), ("fsdp", None), ("ddp", "Use strategy='ddp_notebook'")],
)
def test_code_without_a_script(strategy, told, prompt, tmp_path):
    """As in a notebook: there is no file that other processes could run."""
    code = (
        "from tests.loop.test_strategies import SHORT, fit\n"
        f"trainer, model = fit(**SHORT, strategy={strategy!r}, devices=2)\n"
        "print('trained:', model.training, trainer.state.global_step)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *prompt],
        input=code,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        cwd=tmp_path,
    )
    if "-i" not in prompt:  # a prompt goes on after an error
        assert run.returncode == (told is not None), run.stderr
    # 3 epochs of 23 rows, 8 in an update
    assert (told or "trained: False 9\n") in run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_best_checkpoint_that_one_node_alone_has(tmp_path):
    """The last weights stay for all; once one node left the others waiting."""
    own = f"output_dir={str(tmp_path)!r} + os.environ['RANK'], optim='sgd', learning_rate=30.0"
    saves = "eval_strategy='steps', save_strategy='steps', eval_steps=2, save_steps=2"
    call = f"{own}, {saves}, load_best_model_at_end=True, metric_for_best_model='eval_loss'"
    with started("nodes", tmp_path, call) as (running, everyone):
        wait(running, everyone, 150)
        codes = [process.returncode for process in running]
    log = (tmp_path / "log").read_text()
    assert codes == [0, 0], log[-5000:]
    assert "is not there for all processes: the last weights stay." in log


# What a launcher says in the environment.

TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCH |= {"GROUP_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
SLURM |= {"SLURM_NODEID": "1", "SLURM_NTASKS_PER_NODE": "2"}


@pytest.fixture
def told(request, monkeypatch):
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("told", [TORCH, SLURM], indirect=True, ids=["torch", "slurm"])
def test_launcher_says_which_process_this_is(told):
    flags = {"accelerator": "cpu"}
    processes = spread(flags, {"timeout": 60})
    assert processes == (4, 3, 1, 0, 2, None)
    assert (flags["devices"], flags["num_nodes"]) == (2, 2)


def test_what_accelerate_asks_for_and_the_call_does_not_is_told(
    tiny_bert, ragged_rows, monkeypatch
):
    """Its bf16, which transformers.Trainer follows, was once ignored without a word."""
    asked = {"MIXED_PRECISION": "bf16", "USE_FSDP": "true", "DYNAMO_BACKEND": "NO"}
    for name, value in asked.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    call = {"base": tiny_bert(), "train": ragged_rows(8), "max_steps": 1}
    with pytest.warns(UserWarning, match="asks for bf16=True, strategy='fsdp', and") as told:
        HFTrainer()(**call)
    assert told[0].filename == __file__
    HFTrainer()(**call, precision="bf16", strategy="fsdp")


class Accelerators(CPUAccelerator):
    """Four, of which a call may choose."""

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device("cuda", index) for index in devices]


def test_device_is_the_one_that_was_chosen():
    """Quantized weights were loaded onto the first, whichever was to train."""
    flags = {"accelerator": Accelerators(), "devices": [3, 1]}
    processes = spread(flags, {"timeout": 60})
    assert processes[:5] == (2, 0, 0, 3, 2)
    args = Arguments()
    args.set_ranks(*processes[:4])
    assert args.device_index == 3
    args.set_ranks(4, 3, 1)
    assert args.device_index == 1  # as before, where nobody says


@pytest.mark.parametrize("told", [SLURM], indirect=True)
def test_lightning_saves_nothing_of_its_own_at_a_signal_of_slurm(told):
    """Its `hpc_ckpt_1.ckpt` was loaded by each later run, which made 9 updates of 8."""
    flags = {"accelerator": "cpu"}
    spread(flags, {"timeout": 60})
    assert [each.auto_requeue for each in flags["plugins"]] == [False]


@pytest.mark.parametrize("told", [TORCH, SLURM], indirect=True, ids=["torch", "slurm"])
@pytest.mark.parametrize("given", [{"devices": 1}, {"devices": 4}, {"num_nodes": 1}])
def test_count_of_the_launcher_must_fit(told, given):
    with pytest.raises(ValueError, match="but the launcher has started 4. Leave both out"):
        HFTrainer()("no-such-model", [], use_cpu=True, **given)


@pytest.mark.parametrize("told", [{}, TORCH, SLURM], indirect=True, ids=["none", "torch", "slurm"])
@pytest.mark.parametrize("given", [{}, {"devices": 2}])
def test_single_device_is_one_of_all(told, given):
    """Once Lightning trained with all of them, each of which took itself for the only one."""
    flags = {"accelerator": "cpu", "strategy": "single_device", **given}
    assert spread(flags, {"timeout": 60})[:2] == (1, 0)
    assert L.Trainer(**flags, logger=False, enable_checkpointing=False).world_size == 1


def test_copies_of_a_script_do_not_each_train_alone(monkeypatch):
    """As an earlier call with strategy="ddp" leaves it; once all wrote into one folder."""
    for name, value in {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="an earlier call in this script has started 2, and all"):
        spread({"accelerator": "cpu"}, {"timeout": 60})
    alone = {"accelerator": "cpu", "strategy": "single_device"}
    assert spread(alone, {"timeout": 60}).world == 1
    both = {"accelerator": "cpu", "strategy": "ddp", "devices": 2}
    assert spread(both, {"timeout": 60})[:5] == (2, 1, 1, 0, 2)


def test_process_that_used_cuda_is_not_copied(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="Begin in a fresh one"):
        HFTrainer()("no-such-model", [], use_cpu=True, strategy="ddp_fork", devices=2)
