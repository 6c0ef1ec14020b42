"""Each argument has a row of coverage, and most of them do what that says in a short run."""

import importlib

import pytest
import transformers
from lightning.pytorch.strategies import ModelParallelStrategy

from hflit import HFTrainer
from hflit.arguments import parse
from hflit.fields import FIELDS
from hflit.loop.strategies import spread
from tests.arguments.coverage import CHANGES, COVERAGE, NOTHING, REFUSED, SPREADS
from tests.reference import assert_same_run, without_times

BASELINES = {}


def tried_in(test):
    return [name for name, row in COVERAGE.items() if row.test == test]


def traces(run):
    state, model, events = run
    weights = {name: weight.sum().item() for name, weight in model.state_dict().items()}
    return [without_times(entry) for entry in state.log_history], events, weights


def test_every_argument_is_covered():
    assert list(COVERAGE) == list(FIELDS)
    for row in COVERAGE.values():
        file, test = row.test.split("::")
        module = f"arguments/{file}".replace("arguments/../", "").removesuffix(".py")
        assert hasattr(importlib.import_module(f"tests.{module.replace('/', '.')}"), test), row.test
        assert row.same.startswith(("yes", "no: "))


@pytest.mark.filterwarnings("ignore:parity=True copies:UserWarning")
@pytest.mark.parametrize("name", tried_in(CHANGES))
def test_changes_the_run_as_in_transformers(name, theirs, mine):
    row = COVERAGE[name]
    expected = theirs(**{**row.beside, name: row.value})
    assert_same_run(mine(**{**row.beside, name: row.value}), expected)
    key = repr(row.beside)
    if key not in BASELINES:
        BASELINES[key] = traces(theirs(**row.beside))
    assert traces(expected) != BASELINES[key]


def test_changes_nothing_as_in_transformers(theirs, mine):
    plain = theirs()
    every = {name: COVERAGE[name].value for name in tried_in(NOTHING)}
    assert_same_run(theirs(**every), plain)
    assert_same_run(mine(**every), plain)


@pytest.mark.parametrize("name", tried_in(SPREADS))
def test_reaches_the_strategy(name, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # as if the processes had been started
    row = COVERAGE[name]
    given = {**row.beside, name: row.value, "use_cpu": True, "devices": 2}
    args, flags = parse(given)
    assert spread(flags, args.strategy_options())[:3] == (2, 0, 0)
    strategy = flags["strategy"]
    if name.startswith("fsdp"):
        assert isinstance(strategy, ModelParallelStrategy)
        return
    ddp = {"find_unused_parameters": True}
    if name == "ddp_backend":
        assert strategy.process_group_backend == "gloo"
    elif name == "ddp_timeout":
        assert strategy._timeout.total_seconds() == 60
    else:
        ddp[name.removeprefix("ddp_")] = row.value
    assert strategy._ddp_kwargs == ddp


@pytest.mark.parametrize("name", tried_in(REFUSED))
def test_is_refused(name):
    given = {name: COVERAGE[name].value, "use_cpu": True}
    with pytest.raises((ValueError, ImportError), match=name):
        HFTrainer()("no/such-model", [], **given)  # so nothing was loaded
    if name == "tf32":
        with pytest.raises(ValueError, match=name):
            transformers.TrainingArguments("x", **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"accelerator_config": {"dispatch_batches": True}}, "cannot hold dispatch_batches=True"),
        ({"accelerator_config": {"use_configured_state": True}}, "cannot hold use_configured_st"),
        ({"accelerator_config": {"even": True}}, "accelerator_config has no 'even'. It takes: sp"),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"steps": 2}}},
            "has no 'steps'. It takes: num_steps",
        ),
        (
            {
                "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}},
                "gradient_accumulation_steps": 4,
            },
            "gradient_accumulation_steps=4 and num_steps=2 of accelerator_config contradict",
        ),
        ({"lr_scheduler_kwargs": {"waves": 2}}, "lr_scheduler_type='linear' cannot take"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"push_to_hub": True}, "push_to_hub=True uploads output_dir. Give one"),
        ({"hub_revision": "trial", "hub_private_repo": True}, "hub_private_repo, hub_revision: m"),
    ],
)
def test_values_without_a_meaning_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        parse(given)


def test_accelerator_may_name_the_accumulation():
    config = {"gradient_accumulation_kwargs": {"num_steps": 2}, "even_batches": False}
    args, _ = parse({"accelerator_config": config})
    assert args.gradient_accumulation_steps == 2
    assert args.accelerator_config.even_batches is False
