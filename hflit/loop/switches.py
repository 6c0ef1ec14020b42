"""What the arguments switch on in the process and in the model, and off again after the run."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModelForQuestionAnswering
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.debug_utils import DebugUnderflowOverflow
from transformers.integrations import apply_liger_kernel
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.training_args import DebugOption

from hflit.adapters import inner_model
from hflit.tasks.dropout import fast_dropout
from hflit.tasks.forwards import forwards_replaced
from hflit.tasks.layers import fast_layers, gradients_by_row

logger = logging.getLogger(__name__)
TURN = threading.RLock()  # of the runs in a process


@contextmanager
def process_switched(args: TrainingArguments) -> Iterator[None]:
    """Let `log_level` rule what transformers and Lightning say; restore torch's determinism.

    A run in another thread waits for its turn: what is switched, and random numbers, are those of
    the whole process.
    """
    if not TURN.acquire(blocking=False):
        logger.warning("Another run is on in this process: this one waits until it is over.")
        TURN.acquire()
    level = args.get_process_log_level()
    # bitsandbytes 0.50 warns at every 8-bit layer of every forward that it rounds its inputs.
    levels = dict.fromkeys(("lightning.pytorch", "lightning.fabric", "transformers"), level)
    levels["bitsandbytes"] = logging.ERROR
    # Of all it says, that all processes end because one of them has died.
    levels["lightning.fabric.strategies.launchers.subprocess_script"] = logging.INFO
    theirs = [logging.getLogger(name) for name in levels]
    before = [each.level for each in theirs]
    deterministic = torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    for each, wanted in zip(theirs, levels.values(), strict=True):
        each.setLevel(wanted)
    try:
        with warnings.catch_warnings(), _own_words_shown(args):
            # Lightning 2.6 asks torch for an old spelling at every fit; drop when it does not.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            # peft 0.21 asks transformers 5.23 for an old name; drop when it does not.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            # torch 2.13 warns of what a model may do with its outputs. Here it would do no harm:
            # weights are there when the backward begins.
            warnings.filterwarnings(
                "ignore", "FSDP2-wrapped module .* returned a view", UserWarning
            )
            yield
    finally:
        for each, own in zip(theirs, before, strict=True):
            each.setLevel(own)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        TURN.release()


@contextmanager
def _own_words_shown(args: TrainingArguments) -> Iterator[None]:
    """Show what hflit tells of a run, once; a caller who has set up logging decides instead.

    Other processes than the first tell only of what ends the run, which the first may not know.
    """
    own = logging.getLogger("hflit")
    if own.level != logging.NOTSET or own.hasHandlers():
        yield
        return
    handler = logging.StreamHandler()
    own.addHandler(handler)
    own.setLevel(logging.INFO if args.local_process_index == 0 else logging.ERROR)
    try:
        yield
    finally:
        own.removeHandler(handler)
        own.setLevel(logging.NOTSET)


@contextmanager
def model_switched(
    model: Any,
    args: TrainingArguments,
    parity: bool = False,
    teacher: Any = None,
    merges: bool = False,
) -> Iterator[None]:
    """Prepare a model for training as the arguments ask; afterwards it is as it was.

    With `merges` its adapter will be merged, so it reads what the plain model will be given. Liger
    kernels stay: they replace the code of layers, not their weights.
    """
    with ExitStack() as undo:
        plain = args.world_size == 1 and args.device.type == "cpu" and not args.torch_compile
        if plain and not parity:
            undo.enter_context(gradients_by_row(model))
        if not (parity or args.torch_compile):
            if args.device.type == "cpu":
                undo.enter_context(fast_dropout())
            for each in [model] if teacher is None else [model, teacher]:
                undo.enter_context(fast_layers(each))
        if merges and not parity and isinstance(model, PeftModelForQuestionAnswering):
            # peft 0.21 keeps token_type_ids and position_ids from this one kind of model.
            undo.enter_context(forwards_replaced({model: model.base_model.forward}))
        body = getattr(inner_model(model), "base_model", model)
        # The body of a model that was given as an object has the caller's config.
        for config in {id(each): each for each in (model.config, body.config)}.values():
            undo.enter_context(_cache_switched(config, args.use_cache))
        if args.use_liger_kernel:  # never run: no package and no GPU was at hand
            apply_liger_kernel(model, args.liger_kernel_config)
        if args.activation_checkpointing:
            options: dict[str, Any] = dict(args.activation_checkpointing_kwargs or {})  # type: ignore[arg-type]  # parsed
            chosen = {k: options.pop(k) for k in ("every_n_layers", "offload") if k in options}
            model.activation_checkpointing_enable(options or None, **chosen)
            undo.callback(model.activation_checkpointing_disable)
            for each in model.modules():
                if isinstance(each, PreTrainedModel):  # a hook that frozen embeddings need
                    undo.callback(each.disable_input_require_grads)
        if args.neftune_noise_alpha is not None:
            table = inner_model(model).get_input_embeddings()
            # transformers 5.23 makes noise on this one only, which nobody reads in T5 or BART:
            # their halves have tables of their own, of the same weights.
            for each in [table] if parity else _twins(table, model):
                each.neftune_noise_alpha = args.neftune_noise_alpha
                undo.callback(delattr, each, "neftune_noise_alpha")
                undo.callback(each.register_forward_hook(neftune_post_forward_hook).remove)
        if DebugOption.UNDERFLOW_OVERFLOW in args.debug:
            undo.enter_context(_watched(model))
        if args.torch_compile:
            model.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
            undo.callback(setattr, model, "_compiled_call_impl", None)
        yield


def _twins(table: nn.Module, model: nn.Module) -> list[Any]:
    """Modules of a kind and of the same weights, `table` among them."""
    kind, weight = type(table), getattr(table, "weight", table)
    return [m for m in model.modules() if type(m) is kind and getattr(m, "weight", m) is weight]


class _Watch(DebugUnderflowOverflow):
    """transformers' detector; its 5.23 fails at the boolean masks of scaled dot products."""

    def analyse_variable(self, var: Any, ctx: str) -> None:
        if not (torch.is_tensor(var) and var.dtype == torch.bool):
            super().analyse_variable(var, ctx)


@contextmanager
def _watched(model: Any) -> Iterator[None]:
    before = {module: set(module._forward_hooks) for module in model.modules()}
    _Watch(model)
    try:
        yield
    finally:
        for module, hooks in before.items():
            for added in set(module._forward_hooks) - hooks:
                del module._forward_hooks[added]


@contextmanager
def _cache_switched(config: Any, use_cache: bool) -> Iterator[None]:
    """Follow `use_cache` while training; what is saved keeps the model's own value."""
    before = getattr(config, "use_cache", None)
    config.use_cache = use_cache
    try:
        yield
    finally:
        if before is None:
            del config.use_cache
        else:
            config.use_cache = before
