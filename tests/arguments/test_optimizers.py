"""Every optimizer and every schedule that runs here, beside transformers."""

import importlib.machinery
import sys
import types

import pytest
import torch
from transformers import Trainer
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.training_args import OptimizerNames

from hflit import HFTrainer
from hflit.arguments import parse
from hflit.checks import FOREIGN_OPTIMIZERS, OPTIMIZER_PACKAGES
from tests.reference import assert_same_run

WIDE = {"hidden_size": 64}  # 4096 weights and more are what bitsandbytes holds in 8 bits
NEEDS_OPTIONS = {
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0, "lr_end": 1e-6},
    "inverse_sqrt": {"timescale": 3},
    "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5, "threshold": 10.0},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "greedy": {"patience": 0, "factor": 0.5, "cooldown": 0},
}


def is_here(name):
    if name in FOREIGN_OPTIMIZERS or name.endswith("layerwise"):
        return False
    packages = [
        module for start, (module, _) in OPTIMIZER_PACKAGES.items() if name.startswith(start)
    ]
    return all(importlib.util.find_spec(module) for module in packages)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("optim", [n.value for n in OptimizerNames if is_here(n.value)])
def test_trains_as_in_transformers(optim, theirs, mine):
    given = {"optim": optim, "max_steps": 2, "weight_decay": 0.1, "learning_rate": 1e-3}
    assert_same_run(mine(WIDE, **given), theirs(WIDE, **given))


def test_a_whole_number_is_a_moment_too(theirs, mine):
    """Once training began, and torch refused 0 beside 0.999: betas must be either both floats."""
    given = {"max_steps": 2, "learning_rate": 1e-3}
    assert_same_run(mine(WIDE, adam_beta1=0, **given), theirs(WIDE, adam_beta1=0.0, **given))


@pytest.mark.parametrize("optim", [n.value for n in OptimizerNames if not is_here(n.value)])
def test_what_cannot_run_is_refused_before_anything_is_loaded(optim):
    given = {"optim": optim}
    if optim.startswith(("galore", "apollo")):
        given["optim_target_modules"] = "all-linear"
    if optim in FOREIGN_OPTIMIZERS or optim.endswith("layerwise"):
        expected = pytest.raises(ValueError, match=f"optim='{optim}' .*Choose")
    else:
        expected = pytest.raises(ImportError, match=rf"optim='{optim}' needs .*pip install")
    with expected:
        HFTrainer()("no/such-model", [], **given)


def test_galore_projects_the_named_layers(theirs, mine, monkeypatch):
    class GaLoreAdamW(torch.optim.SGD):
        made = []

        def __init__(self, groups, lr):
            self.made.append([{**g, "params": len(list(g["params"]))} for g in groups])
            super().__init__([{"params": list(g["params"])} for g in groups], lr=lr)

    galore = types.ModuleType("galore_torch")
    galore.__spec__ = importlib.machinery.ModuleSpec("galore_torch", None)
    galore.GaLoreAdamW = galore.GaLoreAdamW8bit = galore.GaLoreAdafactor = GaLoreAdamW
    monkeypatch.setitem(sys.modules, "galore_torch", galore)
    monkeypatch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: True)

    # The groups are taken out of generators by our stand-in, which is why they are copied first.
    original = Trainer.get_optimizer_cls_and_kwargs
    given = {"optim": "galore_adamw", "optim_target_modules": "all-linear", "optim_args": "rank=4"}
    assert_same_run(mine(**given), theirs(**given))
    assert Trainer.get_optimizer_cls_and_kwargs is original
    ours, reference = GaLoreAdamW.made
    assert ours == reference
    assert (ours[1]["rank"], ours[1]["params"]) == (4, 8)  # 6 of the layer, pooler, classifier
    with pytest.raises(ValueError, match="needs optim_target_modules"):
        parse({"optim": "galore_adamw"})


def test_optimizers_with_modes_are_switched(theirs, mine, monkeypatch):
    """As schedule-free ones have, which are not installed here."""

    class Modal(torch.optim.SGD):
        seen = []

        def train(self):
            self.seen.append("train")

        def eval(self):
            self.seen.append("eval")

    def build(args, model=None):
        return Modal, {"lr": args.learning_rate}

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(build))
    given = {"eval_strategy": "epoch", "max_steps": 3}
    expected = theirs(**given)
    seen, Modal.seen = Modal.seen, []
    assert_same_run(mine(**given), expected)
    assert Modal.seen == seen == ["train"] * 3 + ["eval"]


@pytest.mark.parametrize("schedule", [name.value for name in TYPE_TO_SCHEDULER_FUNCTION])
def test_schedule_gives_the_rates_of_transformers(schedule, theirs, mine):
    given = {"lr_scheduler_type": schedule, "max_steps": 6, "eval_strategy": "steps"}
    if schedule != "constant":
        given["warmup_steps"] = 2
    if schedule in NEEDS_OPTIONS:
        given["lr_scheduler_kwargs"] = NEEDS_OPTIONS[schedule]
    expected = theirs(**given)
    actual = mine(**given)
    assert_same_run(actual, expected)
    rates = [e["learning_rate"] for e in actual[0].log_history if "learning_rate" in e]
    assert len(rates) == 6
    assert len(set(rates)) > (schedule != "constant")
