"""Weights and moments spread over processes (FSDP2). A leaf: imports no other room.

Each process keeps a share of the weights and of what the optimizer knows of them. The first part of
an update gathers the weights, and they stay until its last backward: so processes may cut their
rows into different numbers of parts and never wait for one another in between. A process needs room
for whole weights and gradients within an update, but never for the whole state of the optimizer:
checkpoints hold that in shares too, which any number of processes can read.

Tried on the CPU with gloo. The same code serves CUDA and nccl, which were never run.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only


class Shards:
    """A model in shards, and the plain model that it was and will be again.

    The plain model is the caller's. While there are shards it holds no weights.

    Args:
        module: Its `model` is sharded, in a copy, if the strategy of its trainer asks for that;
            under any other strategy nothing is done.
        names: Classes of the blocks that are gathered together; None for those that
            transformers keeps in one piece.
    """

    def __init__(self, module: L.LightningModule, names: list[str] | None = None) -> None:
        self.module = module
        self.plain: Any = module.model
        self.is_open = isinstance(module.trainer.strategy, ModelParallelStrategy)
        if not self.is_open:
            return
        if getattr(self.plain, "is_quantized", False):
            raise ValueError("fsdp=True cannot shard quantized weights. Use strategy='ddp'.")
        sharded: Any = copy.deepcopy(self.plain)
        mesh = module.device_mesh["data_parallel"]  # type: ignore[index]  # it is there by now
        for block in _blocks(sharded, names):
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
        fully_shard(sharded, mesh=mesh, reshard_after_forward=False)
        module.model = sharded
        self.empty()

    def fill(self, keep: bool = True) -> None:
        """Give the plain model the weights as they are now; all processes take part.

        Args:
            keep: Whether this process needs them.
        """
        if not self.is_open:
            return
        sharded: Any = self.module.model
        with torch.no_grad():
            for own, shard in zip(self.plain.parameters(), sharded.parameters(), strict=True):
                whole = shard.full_tensor() if isinstance(shard, DTensor) else shard
                if keep:
                    own.data = whole.detach().clone()
            for own, buffer in zip(self.plain.buffers(), sharded.buffers(), strict=True):
                own.data = buffer.detach().clone()

    def empty(self) -> None:
        """Take the weights from the plain model."""
        if self.is_open:
            for parameter in self.plain.parameters():
                parameter.data = parameter.data.new_empty(0)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather the weights, so that no forward asks another process."""
        if not self.is_open:
            yield
            return
        model: Any = self.module.model
        model._get_fsdp_state()._lazy_init()  # what the first forward does
        each_share = [each for each in model.modules() if isinstance(each, FSDPModule)]
        for each in each_share:
            each.unshard()
        try:
            yield
        finally:
            for each in each_share:
                each.reshard()

    def close(self) -> None:
        """Train no more: the module gets its plain model back, with all weights."""
        self.fill()
        self.module.model = self.plain
        self.is_open = False


# What the optimizer knows: in shares, as files, or whole.


def save_shares(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Write the state of an optimizer, each process its share; all processes take part.

    Args:
        model: Names the parameters.
        optimizer: What is written.
        folder: The same for all; on storage that all of them share.

    Raises:
        OSError: A share could not be written, or lies where process 0 does not see it.
    """
    try:
        written = dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=folder)
    except dcp.CheckpointException as error:  # the same in all processes, and no `Exception`
        raise OSError(f"the shares of the optimizer: {error}") from None
    names = {place.relative_path for place in written.storage_data.values()}
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise OSError(
            f"{missing[0]}, a share of the optimizer, is not there. output_dir must lie on storage "
            "that all nodes share."
        )


def load_shares(model: nn.Module, optimizer: Any, folder: Path, is_alone: bool) -> None:
    """Give an optimizer, in shares or not, what any number of processes wrote.

    Args:
        model: Names the parameters.
        optimizer: Gets its state.
        folder: What `save_shares` wrote.
        is_alone: Whether this is a run of one process.

    Raises:
        ValueError: It belongs to another model or optimizer, or cannot be read.
    """
    state = get_optimizer_state_dict(model, optimizer)
    try:
        with warnings.catch_warnings():  # torch 2.13 warns that one process is alone
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(state, checkpoint_id=folder, no_dist=is_alone)
    except dcp.CheckpointException as error:
        raise ValueError(f"{folder} cannot be read: {error}") from None
    set_optimizer_state_dict(model, optimizer, state)


def whole_state(optimizer: Any, keep: bool = True) -> dict[str, Any] | None:
    """The state of an optimizer as one process would have it; all processes take part.

    Args:
        optimizer: In shares or not.
        keep: Whether this process needs it.
    """

    def whole(share: DTensor) -> Any:
        tensor = share.full_tensor()
        return tensor.cpu() if keep else None

    state = tree_map_only(DTensor, whole, optimizer.state_dict())
    return state if keep else None


def load_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Give an optimizer what `whole_state` returned; each process keeps its share."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    dealt = dict(state["state"])
    for index, parameter in enumerate(parameters):
        if isinstance(parameter, DTensor) and index in dealt:
            dealt[index] = {
                name: _like(value, parameter) for name, value in state["state"][index].items()
            }
    optimizer.load_state_dict({**state, "state": dealt})
    # torch gives states the type of their weights; Adafactor's are float32 beside bfloat16 ones.
    for index, parameter in enumerate(parameters):
        held = optimizer.state[parameter] if index in dealt else {}
        for name, value in dealt.get(index, {}).items():
            if torch.is_tensor(value) and name in held and held[name].dtype != value.dtype:
                held[name] = value.to(held[name].device)


def _like(value: Any, parameter: DTensor) -> Any:
    if not torch.is_tensor(value) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements
    )


def _blocks(model: nn.Module, names: list[str] | None) -> list[nn.Module]:
    """Blocks to gather one by one, but for those that share weights with the rest of the model."""
    wanted = set(names or ())
    if names is None:
        lists = [getattr(each, "_no_split_modules", None) or () for each in model.modules()]
        wanted = {name for each in lists for name in each}
    users: dict[int, int] = {}  # parameter -> modules that hold it
    for each in model.modules():
        for parameter in each.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    return [
        each
        for each in model.modules()
        if type(each).__name__ in wanted
        and all(users[id(parameter)] == 1 for parameter in each.parameters())
    ]
