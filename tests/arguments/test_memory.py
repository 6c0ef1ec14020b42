"""What is switched on in the model and the process for the time of a run, and memory."""

import inspect
import logging
import re

import pytest
import torch
from torch._dynamo import register_backend
from transformers import BertForSequenceClassification, TrainerCallback
from transformers.models.bert.modeling_bert import BertIntermediate

from hflit import HFTrainer
from hflit.loop import memory
from tests.arguments.conftest import SETTINGS
from tests.reference import assert_same_run, reference_trainer
from tests.tasks.tiny import make
from tests.tasks.tiny import rows as rows_of


class Watch(TrainerCallback):
    """Notes what a function finds at the end of each update."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_step_end(self, args, state, control, model=None, **_):
        self.seen.append(self.look(model))


def watched(run, look, **given):
    watch = Watch(look)
    return run(**given, callbacks=[watch]), watch.seen


def test_use_cache_holds_for_the_run(theirs, mine):
    for value in (True, False):
        for run in (theirs, mine):
            result, seen = watched(run, lambda model: model.config.use_cache, use_cache=value)
            assert seen == [value] * 4
            assert result[1].config.use_cache is (value if run is theirs else True)


def test_determinism_holds_for_the_run(theirs, mine):
    def look(model):
        return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic

    actual, seen = watched(mine, look, full_determinism=True)
    assert seen == [(True, True)] * 4
    assert look(None) == (False, False)
    try:
        expected, seen = watched(theirs, look, full_determinism=True)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert seen == [(True, True)] * 4
    assert_same_run(actual, expected)


def test_noise_is_gone_after_the_run(mine):
    _, model, _ = mine(neftune_noise_alpha=5.0)
    embeddings = model.get_input_embeddings()
    assert not embeddings._forward_hooks
    assert not hasattr(embeddings, "neftune_noise_alpha")


@pytest.fixture
def calls(monkeypatch):
    """Calls of what stands inside each BERT layer, over all models."""
    counted, forward = {}, BertIntermediate.forward

    def counting(self, *args, **kwargs):
        counted[self] = counted.get(self, 0) + 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BertIntermediate, "forward", counting)
    return lambda model: [counted[layer.intermediate] for layer in model.bert.encoder.layer]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [4, 4]),
        ({"activation_checkpointing": True}, [8, 8]),
        (
            {
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {"every_n_layers": 2},
            },
            [8, 4],
        ),
        ({"gradient_checkpointing": True}, [8, 8]),
        (
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
            [8, 8],
        ),
    ],
)
def test_activations_are_computed_again(given, expected, theirs, mine, calls):
    two_layers = {"num_hidden_layers": 2}
    actual, reference = mine(two_layers, **given), theirs(two_layers, **given)
    assert calls(reference[1]) == expected
    # We evaluate at the end, on two batches.
    assert calls(actual[1]) == [count + 2 for count in expected]
    assert_same_run(actual, reference)
    assert not actual[1].is_activation_checkpointing


def test_both_halves_of_token_detection_take_part(calls):
    def run(**given):
        trainer = HFTrainer()
        model, _ = trainer(
            make("token-detection", 0), rows_of("token-detection"), task="token-detection",
            maxlength=16, **{**SETTINGS, **given},
        )  # fmt: skip
        return model, [e["loss"] for e in trainer.state.log_history if "loss" in e]

    def count(model):
        return [calls(half)[0] for half in (model.generator, model.discriminator)]

    plain, losses = run()
    again, same = run(activation_checkpointing=True)
    assert (count(plain), count(again)) == ([4, 4], [8, 8])
    assert same == losses
    noisy, other = run(neftune_noise_alpha=5.0)
    assert other != losses
    assert not noisy.get_input_embeddings()._forward_hooks


def test_model_is_compiled_in_place(theirs, mine, monkeypatch):
    told = []

    @register_backend(name="counting")
    def counting(graph, inputs, **options):
        told.append(options)
        return graph.forward

    torch._dynamo.reset()
    given = {"torch_compile_backend": "counting", "torch_compile_mode": "max-autotune"}
    actual = mine(**given, max_steps=1)
    assert told
    assert all(options == {"mode": "max-autotune"} for options in told)
    assert_same_run(actual, theirs(max_steps=1))  # not compiled: accelerate knows no such backend
    assert actual[1]._compiled_call_impl is None

    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: asked.append(options))
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "any")
    mine(torch_compile=True)
    assert asked == [{"backend": "inductor", "mode": None}]


def test_compiling_without_a_compiler_is_refused(mine, monkeypatch):
    """It was torch's InductorError, in the first update."""
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/g++",))
    with pytest.raises(ImportError, match="torch_compile=True needs a C.. compiler on a CPU"):
        mine(torch_compile=True)
    mine(torch_compile=True, torch_compile_backend="eager", max_steps=1)  # needs none


def test_cache_is_emptied_as_often(theirs, mine, monkeypatch):
    emptied = []
    for place in ("hflit.tasks.module", "transformers.trainer"):
        monkeypatch.setattr(f"{place}.clear_device_cache", lambda *_, p=place: emptied.append(p))
    assert_same_run(mine(torch_empty_cache_steps=2), theirs(torch_empty_cache_steps=2))
    assert emptied == ["hflit.tasks.module"] * 2 + ["transformers.trainer"] * 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_overflow_is_found(attention, base, rows, capsys):
    model, tokenizer = base(attn_implementation=attention)
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("nan")
    given = {**SETTINGS, "debug": "underflow_overflow"}
    runs = [lambda: HFTrainer()((model, tokenizer), rows[0], **given)]
    if attention == "eager":  # transformers takes the absolute value of sdpa's mask of booleans
        runs.append(reference_trainer(model, tokenizer, rows[0], **given).train)
    for run in runs:
        assert not any(module._forward_hooks for module in model.modules())
        with pytest.raises(ValueError, match="inf/nan detected"):
            run()
        assert "Detected inf/nan during batch_number=0" in capsys.readouterr().out
        if run is runs[0]:
            assert not any(module._forward_hooks for module in model.modules())


def test_memory_figures_have_the_names_of_transformers(theirs, mine):
    (state, *_), (expected, *_) = mine(skip_memory_metrics=False), theirs(skip_memory_metrics=False)
    summary, their_summary = (
        next(e for e in each.log_history if "train_loss" in e) for each in (state, expected)
    )
    assert summary.keys() == their_summary.keys()
    assert {name for name in summary if "_mem_" in name} == {
        "before_init_mem_cpu",
        *(f"{s}_mem_cpu_{t}_delta" for s in ("init", "train") for t in ("alloc", "peaked")),
    }
    assert summary["before_init_mem_cpu"] > 2**20
    trainer_metrics = mine(skip_memory_metrics=True)[0].log_history[-1]
    assert not any("_mem_" in name for name in trainer_metrics)


@pytest.fixture
def small_memory(monkeypatch):
    """Let batches of more than 7 rows fail, as they do on a full device."""
    forward = BertForSequenceClassification.forward
    failed = []

    def fail(self, input_ids=None, **inputs):
        if len(input_ids) > 7 and self.training and len(failed) < 3:
            if small.after:
                small.after -= 1
            else:
                failed.append(len(input_ids))
                raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(self, input_ids=input_ids, **inputs)

    small = type("Small", (), {"after": 0, "failed": failed})
    # The signature is what tells the trainers which inputs the model takes.
    fail.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(BertForSequenceClassification, "forward", fail)
    return small


def test_batches_shrink_until_they_fit(theirs, mine, small_memory, caplog):
    given = {"per_device_train_batch_size": 10, "auto_find_batch_size": True, "max_steps": -1}
    given["num_train_epochs"] = 1
    actual = mine(**given)
    assert small_memory.failed == [10, 9, 8]
    assert actual[0].train_batch_size == 7
    assert actual[0].max_steps == 4
    small_memory.failed.clear()
    expected = theirs(**given)
    assert expected[0].train_batch_size == 7
    # Nothing was learned before memory ran out, so both go on from the same weights, and with the
    # same random numbers. Their callbacks are told of each attempt alike, but of one beginning.
    assert_same_run((*actual[:2], expected[2]), expected)
    small_memory.failed.clear()
    with pytest.raises(MemoryError, match="out of memory"):
        mine(**{**given, "auto_find_batch_size": False})


def test_a_run_goes_on_with_the_batches_that_it_found(mine, small_memory, tmp_path):
    given = {"per_device_train_batch_size": 10, "auto_find_batch_size": True, "parity": False}
    given |= {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    whole = mine(**given)
    assert whole[0].train_batch_size == 7
    again = mine(**given, checkpoint=str(tmp_path / "checkpoint-1"))
    assert again[0].train_batch_size == 7
    assert [e["loss"] for e in again[0].log_history if "loss" in e] == [
        e["loss"] for e in whole[0].log_history if "loss" in e
    ]
    for name, weight in whole[1].state_dict().items():
        assert torch.equal(again[1].state_dict()[name], weight), name
    with pytest.raises(ValueError, match="per_device_train_batch_size=7 there, .*=10 here"):
        mine(**{**given, "auto_find_batch_size": False}, checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_new_attempt_forgets_the_one_before(mine, small_memory, caplog):
    """transformers goes on from the weights it had when memory ran out."""
    small_memory.after = 2
    with caplog.at_level(logging.WARNING, logger="hflit"):
        late = mine(auto_find_batch_size=True, parity=False)
    assert re.search("Starting again with batches of 7 rows", caplog.text)
    whole = mine(per_device_train_batch_size=7, parity=False)
    assert [e["loss"] for e in late[0].log_history if "loss" in e] == [
        e["loss"] for e in whole[0].log_history if "loss" in e
    ]
    for name, weight in whole[1].state_dict().items():
        assert torch.equal(late[1].state_dict()[name], weight), name


def test_batches_shrink_in_the_test_of_rates_too(mine, small_memory, caplog):
    """Once the first lack of memory ended the call there."""
    given = {"auto_find_batch_size": True, "parity": False, "learning_rate": 1e-3}
    with caplog.at_level(logging.WARNING, logger="hflit"):
        state = mine(**given, find_learning_rate=True, per_device_train_batch_size=10)[0]
    assert caplog.text.count("Starting again") == 3
    assert state.train_batch_size == 7


def test_tracker_stops_with_the_run(mine, small_memory):
    with pytest.raises(MemoryError, match="out of memory"):
        mine(skip_memory_metrics=False)
    tracker = memory.MemoryTracker(False)
    tracker.begin("train")
    tracker.abandon()
    assert not tracker.peak_monitoring
