"""The optimizer and the schedule that the arguments name, as transformers builds them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.optimization import GreedyLR

FOLLOWS_EVALUATIONS = (ReduceLROnPlateau, GreedyLR)  # schedules that no update moves on


def make_optimizer(model: Any, args: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer of all weights that learn; biases and norms do not decay."""
    decay = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]  # reads no self
    learning = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups: Any = [
        {"params": [p for n, p in learning if n in decay], "weight_decay": args.weight_decay},
        {"params": [p for n, p in learning if n not in decay], "weight_decay": 0.0},
    ]
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    groups = options.pop("params", groups)  # GaLore and APOLLO pick their parameters
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **options)
    if options.get("optim_bits") == 8:
        _keep_embeddings_whole(model)
    return optimizer


def make_schedule(optimizer: torch.optim.Optimizer, args: TrainingArguments, steps: int) -> Any:
    """The schedule of a run of so many updates."""
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=cast("dict[str, Any] | None", args.lr_scheduler_kwargs),
    )


def _keep_embeddings_whole(model: Any) -> None:
    """Let 8-bit optimizers of bitsandbytes hold 32 bits for embeddings, as transformers does."""
    from bitsandbytes.optim import GlobalOptimManager

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(
                module, "weight", {"optim_bits": 32}
            )
