"""How a run is spread over processes: names -> Lightning strategies, and starting the processes.

Runs on the CPU were tried with gloo. The same code serves CUDA and nccl, which were never run.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import current_process
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning.pytorch as L
import torch
import torch.multiprocessing as mp
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.trainer.connectors import accelerator_connector
from torch.multiprocessing.spawn import ProcessExitedException

from hflit.checks import listed, raise_all
from hflit.loop.stops import Stop, Stops

logger = logging.getLogger(__name__)

# Name -> how the processes are started.
_ENDS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
STARTS = {f"{kind}{end}": how for kind in ("ddp", "fsdp") for end, how in _ENDS.items()}
NAMES = ("auto", "single_device", *STARTS)
# What Lightning lets stand behind a name: true or false.
UNUSED = "_find_unused_parameters_"
STOPPED = 143  # code with which a process ends after SIGTERM
GRACE = 5  # seconds that the other processes have to end by themselves when one has failed
# What torchrun tells the processes it starts, and Ray Train, Kubeflow and others as it does.
TOLD = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
# What `accelerate launch` tells them besides, for transformers.Trainer to follow.
ACCELERATE = ("MIXED_PRECISION", "USE_FSDP", "DYNAMO_BACKEND", "USE_CPU")


class Processes(NamedTuple):
    """The processes of a run.

    Attributes:
        world: How many there are.
        rank: Which one this is, of all.
        local_rank: Which one this is, on its node.
        device: Index of its accelerator, on its node.
        here: How many there are on this node.
        start: How this process starts those of its node: spawn, fork or forkserver. None if it is
            one of them, or if Lightning starts the others as copies of this script.
    """

    world: int
    rank: int
    local_rank: int
    device: int
    here: int
    start: str | None


def spread(flags: dict[str, Any], options: dict[str, Any]) -> Processes:
    """Find out which processes a run has, and give its flags the strategy for them.

    Args:
        flags: Of the Lightning Trainer; `strategy`, `devices` and `num_nodes` are replaced.
        options: Of the strategy, in Lightning's words; `timeout` in seconds.

    Raises:
        ValueError: The strategy is unknown or cannot be used.
    """
    strategy = flags.pop("strategy", "auto")
    name, options = _named(strategy, options)
    environment = _environment(flags)
    _size(flags, environment)
    shown = (
        *("accelerator", "devices", "num_nodes", "plugins"),
        # To be refused by now, if they are wrong.
        *("limit_train_batches", "limit_val_batches", "max_time"),
    )
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    # Lightning knows devices and clusters best: ask it, and throw its answer away.
    given = {flag: flags[flag] for flag in shown if flag in flags}
    try:
        probe = L.Trainer(**given, **cast("dict[str, Any]", dict.fromkeys(quiet, False)))
    except (MisconfigurationException, ValueError) as error:
        raise ValueError(f"{_shown(given)} cannot be used: {error}") from error
    except (TypeError, AttributeError) as error:
        raise TypeError(
            f"{_shown(given)} cannot be used: Lightning takes no such kind of value."
        ) from error
    here, world = probe.num_devices, probe.num_devices * probe.num_nodes
    _check_launcher(environment, name, probe)
    device = probe.strategy.root_device.index or 0
    if world == 1 or name == "single_device":
        if name == "single_device" and not isinstance(strategy, Strategy):
            strategy = SingleDeviceStrategy(probe.strategy.root_device)  # of however many
        flags["strategy"] = strategy if isinstance(strategy, Strategy) else "auto"
        return Processes(1, 0, 0, device, 1, None)

    start = STARTS.get(name, "popen")
    if isinstance(strategy, DDPStrategy):
        start = strategy._start_method
    is_started = environment is not None and environment.creates_processes_externally
    can_copy = not _is_interactive()
    if name in ("auto", "fsdp") and not can_copy:
        start = "fork"
    if start == "popen" and not is_started and not can_copy:
        raise ValueError(
            f"strategy={strategy!r} starts this script once more for each process, and here is no "
            "script. Use strategy='ddp_notebook'."
        )
    processes = Processes(world, probe.global_rank, probe.local_rank, device, here, start)
    if start != "popen" and not is_started:
        if start == "fork" and torch.cuda.is_initialized():
            raise RuntimeError(
                "This process has used CUDA, so it cannot be copied (fork). Begin in a fresh one, "
                "such as a restarted notebook, and load no model on the GPU before the call."
            )
        return processes
    flags["strategy"] = _made(strategy, name, options, world)
    return processes._replace(start=None)


def _shown(given: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in given.items())


def _named(strategy: Any, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a strategy, and its options with what the name says."""
    if isinstance(strategy, SingleDeviceStrategy):
        return "single_device", options
    if isinstance(strategy, DDPStrategy):
        return "ddp", options
    name = strategy.lower() if isinstance(strategy, str) else ""
    if UNUSED in name:
        name, _, value = name.partition(UNUSED)
        options = {**options, "find_unused_parameters": value == "true"}
    if name not in NAMES:
        raise ValueError(
            f"strategy={strategy!r} cannot be used. Choose one of: {', '.join(NAMES)}; or pass a "
            "DDPStrategy of lightning.pytorch."
        )
    return name, options


def _environment(flags: dict[str, Any]) -> ClusterEnvironment | None:
    """What has started this process, if it started others too; added to the flags for Lightning."""
    plugins = listed(flags.get("plugins"))
    for plugin in plugins:
        if isinstance(plugin, ClusterEnvironment):
            return plugin
    found: ClusterEnvironment | None = None
    if os.environ.keys() >= TOLD:
        found = TorchElasticEnvironment()
    elif SLURMEnvironment.detect():
        # At SIGUSR1 Lightning would save a checkpoint of its own, and go on from it ever after.
        found = SLURMEnvironment(auto_requeue=False)
    if found is not None:
        flags["plugins"] = [*plugins, found]
        return found
    return LightningEnvironment() if "LOCAL_RANK" in os.environ else None


def _check_launcher(environment: ClusterEnvironment | None, name: str, probe: L.Trainer) -> None:
    """Refuse processes that are there already and would each train alone, into one folder."""
    started = world = probe.num_devices * probe.num_nodes
    if isinstance(environment, LightningEnvironment):
        started = int(os.environ.get("WORLD_SIZE", world))  # Lightning's own copies of a script
        told = (
            f"an earlier call in this script has started {started}, and all of them come here. "
            "Give this call the same strategy and devices"
        )
    elif isinstance(environment, (TorchElasticEnvironment, SLURMEnvironment)):
        started = environment.world_size()
        told = (
            f"the launcher has started {started}. Leave both out, and all of them are used, or "
            "have it start as many"
        )
    if name != "single_device" and started != world:
        raise ValueError(
            f"devices={probe.num_devices} and num_nodes={probe.num_nodes} make {world} "
            f"process(es), but {told}; strategy='single_device' trains in each of them alone."
        )


def _size(flags: dict[str, Any], environment: ClusterEnvironment | None) -> None:
    """Take devices and nodes from the launcher where the call does not name them; else one."""
    if isinstance(environment, TorchElasticEnvironment):
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        flags.setdefault("devices", here)
        flags.setdefault("num_nodes", environment.world_size() // here)
    elif isinstance(environment, SLURMEnvironment):
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        flags.setdefault("devices", environment.world_size() // nodes)
        flags.setdefault("num_nodes", nodes)
    flags.setdefault("devices", 1)


def _is_interactive() -> bool:
    """Whether there is no script to start again: a notebook, a prompt, or code from a pipe."""
    script = getattr(sys.modules["__main__"], "__file__", None)  # of a pipe, "<stdin>"
    return hasattr(sys, "ps1") or script is None or not os.path.isfile(script)


def _made(strategy: Any, name: str, options: dict[str, Any], world: int) -> Strategy:
    if isinstance(strategy, DDPStrategy):
        strategy = copy.copy(strategy)
        strategy._start_method = "popen"  # the processes are there already
        return strategy
    options = {**options, "timeout": timedelta(seconds=options["timeout"])}
    if name.startswith("fsdp"):
        taken = ("timeout", "process_group_backend")
        return ModelParallelStrategy(
            data_parallel_size=world,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            **{option: options[option] for option in taken if option in options},
        )
    return DDPStrategy(**options)


def check_processes(args: Any, world: int, quantize: Any, finds_rate: bool) -> None:
    """Refuse what several processes cannot do; the last two are those of the call.

    Raises:
        ValueError: Names all of it.
    """
    if world == 1:
        return
    problems = []
    if args.auto_find_batch_size:
        problems.append(
            "auto_find_batch_size=True needs a single process: of several, one alone runs out of "
            "memory. Set per_device_train_batch_size."
        )
    if finds_rate:
        problems.append("find_learning_rate=True needs a single process. Run it alone first.")
    if args.fsdp and quantize:
        problems.append(
            f"quantize={quantize!r} and fsdp=True: quantized weights cannot be sharded. Use "
            "strategy='ddp'."
        )
    if args.accelerator_config.split_batches and args.per_device_train_batch_size % world:
        problems.append(
            f"split_batches=True cuts per_device_train_batch_size="
            f"{args.per_device_train_batch_size} into {world} equal pieces. Choose a multiple."
        )
    raise_all(ValueError, problems)


def warn_of_launcher(args: Any, precision: str) -> None:
    """Warn of what `accelerate launch` asks for in the environment, and the call does not."""
    told = {name: os.environ.get(f"ACCELERATE_{name}", "no").lower() for name in ACCELERATE}
    mixed, fsdp, backend, cpu = told.values()
    unread = {
        f"{mixed}=True": mixed != "no" and precision == "32-true",
        "strategy='fsdp'": fsdp == "true" and not args.fsdp,
        f"torch_compile_backend={backend!r}": backend != "no" and not args.torch_compile,
        "use_cpu=True": cpu == "true" and not args.use_cpu and torch.accelerator.is_available(),
    }
    named = [argument for argument, is_unread in unread.items() if is_unread]
    if named:
        warnings.warn(
            f"accelerate launch asks for {', '.join(named)}, and only what the call says is done: "
            "say it there too.",
            stacklevel=4,
        )


# Processes that this one starts.


def run_in_processes(processes: Processes, make: Callable[[], Any], call: dict[str, Any]) -> Any:
    """Make a call in each of several new processes.

    Args:
        processes: How many, and how they are started.
        make: Makes the `HFTrainer` that is called.
        call: Keywords of the call.

    Returns:
        Model, tokenizer, state, metrics and settings of the first process here.

    Raises:
        ProcessRaisedException: A process failed; holds its traceback. The others are ended.
        RuntimeError: A started process came here while it was still loading the script.
        KeyboardInterrupt: After Ctrl-C.
        SystemExit: With code 143 after SIGTERM.
    """
    if getattr(current_process(), "_inheriting", False):
        raise RuntimeError(
            "Spawned processes load the script from its top, and so come to this call again. Put "
            'it under `if __name__ == "__main__":`, or use strategy="ddp", which needs no guard.'
        )
    port = str(LightningEnvironment().main_port)
    environment = {"MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"), "MASTER_PORT": port}
    stops = Stops()
    with tempfile.TemporaryDirectory() as folder, stops.noted():
        result = Path(folder) / "result.pt"
        started: Any = mp.start_processes(
            _work,
            (make, call, environment, processes, result),
            nprocs=processes.here,
            join=False,
            start_method=str(processes.start),
        )
        told = False
        try:
            while not started.join(timeout=1, grace_period=GRACE):
                if stops.received is not None and not told:
                    told = True
                    for each in started.processes:
                        each.terminate()  # they stop at the end of their update
        except ProcessExitedException as error:
            if stops.received is not None:
                raise Stop from None
            if error.exit_code == STOPPED:
                raise SystemExit(STOPPED) from None
            raise
        if not result.exists():  # the end of a process after Ctrl-C counts as none
            raise KeyboardInterrupt
        return torch.load(result, weights_only=False)


def _work(
    local_rank: int,
    make: Callable[[], Any],
    call: dict[str, Any],
    environment: dict[str, str],
    processes: Processes,
    result: Path,
) -> None:
    os.environ.update(environment, LOCAL_RANK=str(local_rank))
    if processes.start == "fork":
        # The threads of the process that was copied are not there, and waiting for them is forever.
        torch.set_num_threads(1)
        # A copy of a notebook is none: nothing is started from it.
        accelerator_connector._IS_INTERACTIVE = False
    elif listed(call["base"]) and not isinstance(call["base"], str):
        call["base"] = copy.deepcopy(call["base"])  # its memory came shared between processes
    trainer = make()
    model, tokenizer = trainer(**call)
    if local_rank == 0:
        told = (model, tokenizer, trainer.state, trainer.metrics, trainer.saved.settings)
        torch.save(told, result)
