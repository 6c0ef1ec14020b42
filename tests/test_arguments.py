"""The keywords of a call: what is accepted, translated, refused, and what Lightning gets."""

import copy
import dataclasses
import inspect
import json
import math
import pickle
import warnings
from pathlib import Path

import accelerate
import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.fabric.connector import _convert_precision_to_unified_args
from lightning.pytorch.callbacks import LearningRateMonitor
from transformers.trainer_callback import DefaultFlowCallback, TrainerControl, TrainerState
from transformers.training_args import OptimizerNames, ParallelMode

from hflit.arguments import FIELDS, Arguments, parse
from hflit.fields import DROPPED, FIXED, GONE, PASSED, PROCESSES, REFUSED, RENAMED, SHARED

HUGGING_FACE = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
QUIETER = {"output_dir", "save_strategy", "report_to", "log_level", "use_cpu"}
on_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="is about having none")


@pytest.fixture
def model():
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))


def parsed(**keywords):
    """Parse and hold that exactly one FutureWarning came of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = parse(keywords)
        except (ValueError, NotImplementedError) as error:
            result = str(error)
    assert [w.category for w in caught] == [FutureWarning], [str(w.message) for w in caught]
    return result, str(caught[0].message)


# The tables know every name


def test_every_training_argument_has_a_row():
    assert set(FIELDS) == {field.name for field in dataclasses.fields(Arguments)} == HUGGING_FACE


def test_every_trainer_flag_is_decided_once():
    tables = [*PASSED, *SHARED, *PROCESSES, *REFUSED]
    assert len(tables) == len(set(tables))
    flags = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self", "max_steps"}
    assert set(tables) == flags
    assert set(FIXED) <= set(REFUSED)


def test_retired_names_are_fields_no_more_and_lead_to_fields():
    retired = [*RENAMED, *DROPPED, *GONE]
    assert len(retired) == len(set(retired))
    assert not set(retired) & (HUGGING_FACE | PASSED | PROCESSES | SHARED.keys() | REFUSED.keys())
    assert {row.now for row in RENAMED.values()} <= HUGGING_FACE


def test_rows_are_ready_for_the_docs():
    kinds = {"mapped", "module", "callback", "datamodule", "refuse", "no-op"}
    assert {row.disposition for row in FIELDS.values()} == kinds
    sentences = [row.how for row in FIELDS.values()] + list(REFUSED.values())
    assert all(sentence.endswith(".") and len(sentence) < 100 for sentence in sentences)


# Arguments


def test_defaults_are_those_of_transformers_but_for_five():
    ours, theirs = Arguments(use_cpu=True), transformers.TrainingArguments("x", use_cpu=True)
    differ = {name for name in FIELDS if getattr(ours, name) != getattr(theirs, name)}
    assert differ <= QUIETER
    assert (ours.save_strategy, ours.report_to, ours.log_level) == ("no", [], "warning")
    assert Arguments().use_cpu is not torch.accelerator.is_available()


@pytest.mark.parametrize("nowhere", [{}, {"output_dir": None}, {"output_dir": ""}])
def test_without_output_dir_nothing_is_saved(nowhere, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, flags = parse(nowhere)
    assert args.output_dir == ""
    assert not args.should_save
    assert "default_root_dir" not in flags
    assert not list(tmp_path.iterdir())


def test_output_dir_is_saved_by_the_first_process_only():
    args, flags = parse({"output_dir": "somewhere"})
    assert args.should_save
    assert flags["default_root_dir"] == "somewhere"
    args.set_ranks(4, 2, 0)
    assert not args.should_save
    assert dataclasses.replace(args, output_dir="").should_save is False


def test_building_starts_nothing_even_under_a_launcher(monkeypatch):
    monkeypatch.setattr(accelerate.PartialState, "_shared_state", {})
    launcher = {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (launcher | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    args, _ = parse({"bf16": True, "accelerator": "cpu"})
    assert (args.device.type, args.n_gpu, args.train_batch_size) == ("cpu", 0, 8)
    assert (args.world_size, args.process_index, args.local_process_index) == (1, 0, 0)
    args.to_json_string(), args.get_process_log_level(), repr(args)
    assert accelerate.PartialState._shared_state == {}
    assert not torch.distributed.is_initialized()


def test_ranks_decide_who_logs_and_saves():
    args = Arguments(output_dir="x", log_level="info", log_level_replica="error")
    assert args.parallel_mode is ParallelMode.NOT_PARALLEL
    seen = []
    for ranks in [(4, 0, 0), (4, 1, 1), (4, 2, 0), (4, 3, 1)]:  # two nodes of two processes
        args.set_ranks(*ranks)
        seen.append((args.should_save, args.should_log, args.get_process_log_level()))
    assert args.parallel_mode is ParallelMode.DISTRIBUTED
    assert seen == [(True, True, 20), (False, False, 40), (False, True, 20), (False, False, 40)]
    assert Arguments().world_size == 1  # another run knows nothing of it


def test_copies_keep_values_and_ranks():
    args = Arguments(learning_rate=0.25, optim="sgd", label_names=["labels"], use_cpu=True)
    args.set_ranks(4, 3, 1)
    for other in (copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert other == args
        assert (other.world_size, other.process_index, other.local_process_index) == (4, 3, 1)
    changed = dataclasses.replace(args, learning_rate=0.5)
    assert changed.to_dict() == args.to_dict() | {"learning_rate": 0.5}


def test_dictionaries_are_those_of_transformers():
    given = {"output_dir": "x", "learning_rate": 0.25, "use_cpu": True, "log_level": "info"}
    given["save_strategy"] = "no"
    ours, theirs = Arguments(**given), transformers.TrainingArguments(**given)
    # transformers takes this option out when it sets the device up, ours is never read.
    del ours.accelerator_config.use_configured_state
    assert ours.to_dict() == theirs.to_dict()
    assert json.loads(ours.to_json_string()) == json.loads(theirs.to_json_string())
    assert ours.to_sanitized_dict() == theirs.to_sanitized_dict()


def test_printed_arguments_hide_the_token():
    assert "hf_secret" not in repr(Arguments(hub_token="hf_secret"))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
def test_optimizers_are_built_as_by_transformers(optim, model):
    given = {"optim": optim, "learning_rate": 0.1, "adam_beta1": 0.5, "use_cpu": True}
    build = transformers.Trainer.get_optimizer_cls_and_kwargs
    expected = build(transformers.TrainingArguments("x", **given), model)
    assert build(Arguments(**given), model) == expected


def test_callbacks_of_transformers_read_them():
    args = Arguments(logging_steps=2, eval_strategy="steps", eval_steps=3)
    flow, state = DefaultFlowCallback(), TrainerState(max_steps=6, logging_steps=2, eval_steps=3)
    asked = []
    for state.global_step in range(1, 7):
        control = flow.on_step_end(args, state, TrainerControl())
        asked.append((control.should_log, control.should_evaluate, control.should_save))
    assert [step + 1 for step, (log, _, _) in enumerate(asked) if log] == [2, 4, 6]
    assert [step + 1 for step, (_, evaluate, _) in enumerate(asked) if evaluate] == [3, 6]
    assert not any(save for _, _, save in asked)


# Values that transformers takes in silence


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_sampling_strategy": "shuffled"}, "Choose one of: random, sequential, group"),
        ({"eval_strategy": "step"}, "Unknown eval_strategy='step'. Choose one of: no, steps, ep"),
        ({"logging_strategy": "never"}, "Choose one of: no, steps, epoch"),
        ({"save_strategy": "always"}, "Choose one of: no, steps, epoch, best"),
        ({"hub_strategy": "x"}, "Choose one of: end, every_save"),
        ({"lr_scheduler_type": "cosinus"}, "Choose one of: linear, cosine"),
        ({"optim": "adamw_hf"}, "Unknown optim='adamw_hf'. There are .*nearest are: adamw"),
        ({"log_level": "loud"}, "Unknown log_level='loud'"),
        ({"include_num_input_tokens_seen": "some"}, "Choose one of: no, all, non_padding"),
        ({"max_steps": 0}, "max_steps=0 trains nothing"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be 1 or more"),
        ({"include_for_metrics": ["inputs", "logits"]}, "'inputs' and 'loss', nothing else"),
        ({"include_for_metrics": "logits"}, "'inputs' and 'loss', nothing else"),
        ({"optim": "lomo"}, "inside its own backward pass"),
        ({"optim": "adalomo"}, "inside its own backward pass"),
        ({"optim": "adamw_torch_xla"}, "needs a TPU"),
        ({"optim": "adamw_torch_npu_fused"}, "needs an Ascend NPU"),
        ({"optim_args": "eps=1"}, "optim_args='eps=1' is ignored by optim='adamw_torch_fused'"),
        ({"optim_target_modules": ["q"]}, "galore and apollo, not by optim='adamw_torch_fused'"),
        ({"lr_scheduler_kwargs": {"a": 1}, "lr_scheduler_type": "constant"}, "='constant'"),
        (
            {"lr_scheduler_kwargs": '{"a": 1}', "lr_scheduler_type": "constant_with_warmup"},
            "is ignored by lr_scheduler_type='constant_with_warmup'",
        ),
        ({"fp16": True, "use_cpu": True}, r"fp16=True.*Use bf16=True on the CPU\."),
        ({"liger_kernel_config": {"rope": True}}, "without use_liger_kernel=True"),
        ({"debug": "tpu_metrics_debug"}, "needs a TPU"),
        ({"parallelism_config": object()}, "parallelism_config cannot be used"),
    ],
)
def test_silently_wrong_values_are_refused(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(given)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        Arguments(**given)


def test_several_wrong_values_are_reported_together():
    with pytest.raises(ValueError, match=r"eval_strategy='x'.*max_steps=0") as caught:
        parse({"max_steps": 0, "eval_strategy": "x"})
    assert "\n" not in str(caught.value)


def test_errors_of_transformers_pass_where_ours_say_nothing():
    with pytest.raises(ValueError, match="--logging_steps must be an integer if bigger than 1"):
        parse({"logging_steps": 2.5})
    with pytest.raises(ValueError, match="warmup_steps=-1 must be 0 or more"):
        parse({"warmup_steps": -1})


@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames])
def test_optim_args_are_refused_just_where_transformers_ignores_them(optim, model):
    build = transformers.Trainer.get_optimizer_cls_and_kwargs
    options = (
        "momentum=0.5,lr_decay=0.5,alpha=0.5,r=0.5,lamb=0.5,rank=3,block_size=64,max_lr=0.5,"
        "variance_dtype=float16"
    )
    args = transformers.TrainingArguments("x", optim=optim, use_cpu=True)
    try:
        without = build(args, model)
    except (ImportError, ValueError):
        pytest.skip(f"{optim} is not installed")
    with_options = build(dataclasses.replace(args, optim_args=options), model)
    if without == with_options:
        with pytest.raises(ValueError, match="is ignored by optim="):
            parse({"optim": optim, "optim_args": options})
    else:
        assert parse({"optim": optim, "optim_args": options})[0].optim_args == options


# What asks for nothing


@pytest.mark.parametrize(
    "given",
    [
        {"train_sampling_strategy": "sequential"},
        {"report_to": "none"},
        {"report_to": []},
        {"report_to": ["none"]},
        {"report_to": None},
        {"include_num_input_tokens_seen": False},
        {"strategy": "auto", "devices": "auto", "num_nodes": 1},
        {"strategy": "single_device", "devices": "1"},
    ],
)
def test_arguments_at_rest_are_fine(given):
    args, _ = parse(given)
    assert args.report_to == []


def test_arguments_read_back_from_their_own_dictionary():
    args, _ = parse({"learning_rate": 0.5, "eval_strategy": "epoch", "use_cpu": True})
    again, _ = parse(json.loads(args.to_json_string()))
    assert again.to_dict() == args.to_dict()


# Retired names


@pytest.mark.parametrize(
    ("old", "value", "now", "expected"),
    [
        ("evaluation_strategy", "epoch", "eval_strategy", "epoch"),
        ("per_gpu_train_batch_size", 3, "per_device_train_batch_size", 3),
        ("per_gpu_eval_batch_size", 3, "per_device_eval_batch_size", 3),
        ("warmup_ratio", 0.1, "warmup_steps", 0.1),
        ("no_cuda", True, "use_cpu", True),
        ("adafactor", True, "optim", "adafactor"),
        ("include_inputs_for_metrics", True, "include_for_metrics", ["inputs"]),
        ("group_by_length", True, "train_sampling_strategy", "group_by_length"),
        ("include_tokens_per_second", True, "include_num_input_tokens_seen", "all"),
        ("torchdynamo", "eager", "torch_compile_backend", "eager"),
        ("xpu_backend", "gloo", "ddp_backend", "gloo"),
    ],
)
def test_41_renamed_arguments_are_translated(old, value, now, expected):
    (args, _), warning = parsed(**{old: value})
    assert getattr(args, now) == expected
    assert warning == f"{old} is now called {now}: read as {now}={expected!r}."


@pytest.mark.parametrize(
    ("given", "translated"),
    [
        ({"tpu_metrics_debug": True}, "debug='tpu_metrics_debug' needs a TPU"),
        ({"dispatch_batches": True}, "cannot hold dispatch_batches=True"),
        (
            {"fsdp_min_num_params": 9},
            "fsdp_config cannot hold auto_wrap_policy='SIZE_BASED_WRAP'",
        ),
        (
            {"fsdp_transformer_layer_cls_to_wrap": "BertLayer"},
            "fsdp_config is ignored without fsdp=True",
        ),
        ({"push_to_hub_model_id": "bert"}, "hub_model_id: means nothing without push_to_hub"),
    ],
)
def test_renamed_arguments_are_refused_by_their_new_name(given, translated):
    error, warning = parsed(**given)
    assert translated in error
    assert "is now called" in warning


def test_two_retired_names_of_one_argument_agree():
    given = {"push_to_hub": True, "output_dir": "a/b", "push_to_hub_organization": "us"}
    for more, expected in ({}, "us/b"), ({"push_to_hub_model_id": "bert"}, "us/bert"):
        with pytest.warns(FutureWarning):
            args, _ = parse({**given, **more})
        assert args.hub_model_id == expected


def test_token_is_hidden_and_its_placeholder_dropped():
    (args, _), warning = parsed(push_to_hub_token="hf_secret")
    assert args.hub_token == "hf_secret"
    assert "hf_secret" not in warning + repr(args) + args.to_json_string()
    assert parse(json.loads(args.to_json_string()))[0].hub_token is None


@pytest.mark.parametrize("ratio", [0.0, 0.06, 0.1, 0.5, 1.0])
def test_warmup_ratio_warms_up_as_long_as_it_did(ratio):
    (args, _), _ = parsed(warmup_ratio=ratio)
    for total in (1, 7, 100, 12345):
        assert args.get_warmup_steps(total) == math.ceil(total * ratio)


def test_warmup_ratio_is_a_share():
    with pytest.raises(ValueError, match="warmup_ratio=100 must be a share of the run"):
        parse({"warmup_ratio": 100})


@pytest.mark.parametrize(
    ("old", "row"), [(old, row) for old, row in RENAMED.items() if row.default is not None]
)
def test_old_defaults_ask_for_nothing(old, row):
    (args, _), warning = parsed(**{old: row.default})
    assert args == Arguments()
    assert warning == f"{old} is now called {row.now}."


@pytest.mark.parametrize("old", DROPPED)
def test_arguments_without_effect_only_warn(old):
    (args, _), warning = parsed(**{old: "anything"})
    assert args == Arguments()
    assert warning == f"{old} has no effect any more: {DROPPED[old]}"


@pytest.mark.parametrize(
    ("old", "value", "message"),
    [
        ("half_precision_backend", "apex", "Use fp16=True or bf16=True"),
        ("fp16_backend", "apex", "Use fp16=True or bf16=True"),
        ("sharded_ddp", "simple", "Use fsdp=True"),
        ("use_ipex", True, "see bf16"),
        ("jit_mode_eval", True, "Use torch_compile=True"),
        ("past_index", 0, "no memory is carried"),
        ("save_safetensors", False, "always saved as safetensors"),
        ("tp_size", 2, "Use fsdp=True"),
    ],
)
def test_what_no_longer_exists_is_refused(old, value, message):
    with pytest.raises(ValueError, match=message):
        parse({old: value})
    (args, _), _ = parsed(**{old: GONE[old][0][0]})
    assert args == Arguments()


def test_retired_and_new_name_must_agree():
    with (
        pytest.warns(FutureWarning),
        pytest.raises(ValueError, match=r"warmup_ratio=0.1 and warmup_steps=100 contradict"),
    ):
        parse({"warmup_ratio": 0.1, "warmup_steps": 100})
    (args, _), _ = parsed(evaluation_strategy="steps", eval_strategy="steps")
    assert args.eval_strategy == "steps"
    (args, _), _ = parsed(no_cuda=False, use_cpu=True)
    assert args.use_cpu


# Unknown names


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("compute_metrics", "metrics"),
        ("lr", "learning_rate"),
        ("epochs", "num_train_epochs"),  # once min_epochs, which is refused
        ("batch_size", "per_device_train_batch_size"),
    ],
)
def test_what_others_call_it_is_answered_with_its_name_here(name, here):
    with pytest.raises(TypeError, match=f"'{name}'. Did you mean '{here}'"):
        parse({name: 1}, also=["metrics"])


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(TypeError) as caught:
        parse({"learning_rat": 1, "warmup_ration": 0.1, "profilr": "simple", "zzzz": 1})
    assert str(caught.value) == (
        "Unknown argument 'learning_rat'. Did you mean 'learning_rate'? "
        "Unknown argument 'warmup_ration'. Did you mean 'warmup_ratio'? "
        "Unknown argument 'profilr'. Did you mean 'profiler'? "
        "Unknown argument 'zzzz'."
    )
    with pytest.raises(TypeError, match="Did you mean 'tokenizers'"):
        parse({"tokenizer": 1}, also=["tokenizers"])


# Lightning's flags


@pytest.mark.parametrize(
    ("flag", "value", "twin"),
    [
        ("accumulate_grad_batches", 4, "gradient_accumulation_steps"),
        ("gradient_clip_val", 1.0, "max_grad_norm"),
        ("gradient_clip_algorithm", "value", "max_grad_norm"),
        ("max_epochs", 3, "num_train_epochs"),
        ("min_epochs", 1, "Nothing extends a run"),
        ("min_steps", 1, "Nothing extends a run"),
        ("val_check_interval", 0.5, "eval_steps"),
        ("check_val_every_n_epoch", 1, "eval_strategy"),
        ("num_sanity_val_steps", 2, "eval_on_start"),
        ("log_every_n_steps", 1, "logging_steps"),
        ("default_root_dir", "x", "output_dir"),
        ("enable_checkpointing", True, "save_strategy"),
        ("model_registry", "x", "hub_model_id"),
        ("overfit_batches", 1, "limit_train_batches"),
        ("use_distributed_sampler", True, "deals the rows"),
        ("reload_dataloaders_every_n_epochs", 1, "Train again"),
    ],
)
def test_flags_with_a_twin_are_refused_by_its_name(flag, value, twin):
    with pytest.raises(ValueError, match=twin) as caught:
        parse({flag: value})
    assert str(caught.value).startswith(f"{flag}={value!r} is not taken.")


def test_flags_that_say_what_happens_anyway_are_fine():
    assert parse({**FIXED, "max_epochs": None})[1] == parse({})[1]


def test_flags_every_run_holds():
    _, flags = parse({"use_cpu": True})
    assert flags == {
        "accelerator": "cpu",
        "precision": "32-true",
        "logger": False,
        "callbacks": [],
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": 10**9,
    }


def test_other_flags_reach_lightning(tmp_path):
    given = {
        "limit_train_batches": 2,
        "limit_val_batches": 0.5,
        "max_time": "00:01:00:00",
        "enable_model_summary": True,
        "detect_anomaly": True,
        "deterministic": True,
        "inference_mode": False,
        "sync_batchnorm": True,
        "strategy": "single_device",
    }
    args, flags = parse({**given, "use_cpu": True, "output_dir": str(tmp_path), "max_steps": 3})
    assert {name: flags[name] for name in given} == given
    assert args.max_steps == 3
    assert "max_steps" not in flags
    trainer = pl.Trainer(**flags, max_steps=args.max_steps)
    assert (trainer.limit_train_batches, trainer.world_size, trainer.loggers) == (2, 1, [])
    assert trainer.default_root_dir == str(tmp_path)


def test_caller_keeps_their_keywords():
    callbacks = [LearningRateMonitor()]
    given = {"callbacks": callbacks, "include_for_metrics": ["loss"], "precision": "bf16"}
    before = copy.copy(given)
    _, flags = parse({**given, "accelerator": "cpu"})
    assert given == before
    assert flags["callbacks"] == callbacks
    assert flags["callbacks"] is not callbacks


# Flags and arguments that say the same


@pytest.mark.parametrize(
    "precision", [None, 32, "32", "32-true", 64, "64-true", "bf16-true", "bf16"]
)
def test_precision_is_spelled_as_by_lightning(precision):
    args, flags = parse({"precision": precision, "accelerator": "cpu"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning recommends the long spelling
        expected = _convert_precision_to_unified_args(precision) or "32-true"
    assert flags["precision"] == expected
    assert args.bf16 is (expected == "bf16-mixed")
    assert not args.fp16


def test_bf16_is_mixed_precision_on_both_sides():
    for given in ({"bf16": True}, {"precision": "bf16-mixed"}, {"bf16": 1, "precision": "bf16"}):
        args, flags = parse({**given, "use_cpu": True})
        assert args.bf16
        assert flags["precision"] == "bf16-mixed"


@pytest.mark.parametrize("precision", [16, "16", "16-mixed"])
def test_sixteen_bits_are_fp16_and_not_for_the_cpu(precision):
    with pytest.raises(ValueError, match="needs an accelerator"):
        parse({"precision": precision, "use_cpu": True})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": "bf16-mixed", "fp16": True}, "fp16=True and precision='bf16-mixed'"),
        ({"precision": "bf16-mixed", "bf16": False}, "bf16=False and precision='bf16-mixed'"),
        ({"precision": 32, "bf16": True}, "bf16=True and precision=32"),
        ({"precision": "bf16-true", "bf16": True}, "bf16=True and precision='bf16-true'"),
        ({"precision": "16-mixed", "bf16": True}, "bf16=True and precision='16-mixed'"),
        ({"precision": "8-bit"}, "Unknown precision='8-bit'. Choose one of: 32-true, bf16-mixed"),
        ({"accelerator": "gpu", "use_cpu": True}, "use_cpu=True and accelerator='gpu'"),
        ({"accelerator": "cpu", "use_cpu": False}, "use_cpu=False and accelerator='cpu'"),
        (
            {"disable_tqdm": True, "enable_progress_bar": True},
            "disable_tqdm=True and enable_progress_bar=True",
        ),
        (
            {"full_determinism": True, "deterministic": False},
            "full_determinism=True and deterministic=False",
        ),
        ({"full_determinism": True, "benchmark": True}, "full_determinism=True and benchmark"),
        ({"fast_dev_run": True, "max_steps": 7}, "max_steps=7 and fast_dev_run=True"),
        ({"logger": True}, "logger=True writes files. Give an output_dir"),
        ({"plugins": [pl.plugins.MixedPrecision("bf16-mixed", "cpu")]}, "plugins holds a prec"),
        ({"plugins": [pl.plugins.AsyncCheckpointIO()]}, "plugins holds a CheckpointIO"),
    ],
)
def test_contradictions_name_both_sides(given, message):
    with pytest.raises(ValueError, match=message):
        parse(given)


@pytest.mark.parametrize("accelerator", ["cpu", pl.accelerators.CPUAccelerator()])
def test_cpu_is_asked_for_on_either_side(accelerator):
    args, flags = parse({"accelerator": accelerator, "devices": [0]})
    assert args.use_cpu
    assert (flags["accelerator"], flags["devices"]) == (accelerator, 1)


def test_accelerator_is_asked_for_on_either_side():
    args, flags = parse({"accelerator": "gpu", "devices": [3]})
    assert not args.use_cpu
    assert (flags["accelerator"], flags["devices"]) == ("gpu", [3])
    assert parse({"use_cpu": False})[1]["accelerator"] == "auto"


@on_cpu
def test_bf16_works_where_there_is_no_accelerator():
    args, flags = parse({"bf16": True})
    assert args.use_cpu
    assert (flags["accelerator"], flags["precision"]) == ("cpu", "bf16-mixed")


def test_progress_bar_has_two_switches():
    assert "enable_progress_bar" not in parse({"disable_tqdm": None})[1]
    args, flags = parse({"disable_tqdm": True})
    assert args.disable_tqdm is True
    assert flags["enable_progress_bar"] is False
    # Lightning's switch turns off the bar and nothing else: the log is not printed instead of it.
    args, flags = parse({"enable_progress_bar": False})
    assert args.disable_tqdm is False
    assert flags["enable_progress_bar"] is False


def test_fast_dev_run_is_a_short_run_without_logger(tmp_path):
    args, flags = parse({"fast_dev_run": 2, "logger": True, "output_dir": str(tmp_path)})
    assert args.max_steps == 2
    assert flags["limit_val_batches"] == 2
    assert flags["logger"] is False
    assert "fast_dev_run" not in flags
    assert parse({"fast_dev_run": False}) == parse({})


# Callbacks


def test_callbacks_of_both_libraries_mix():
    lightning, hugging_face = LearningRateMonitor(), transformers.EarlyStoppingCallback(2)
    kinds = [lightning, hugging_face, transformers.PrinterCallback]
    *given, made = parse({"callbacks": tuple(kinds)})[1]["callbacks"]
    assert given == kinds[:2]
    assert isinstance(made, transformers.PrinterCallback)
    assert parse({"callbacks": hugging_face})[1]["callbacks"] == [hugging_face]
    assert parse({"callbacks": None})[1]["callbacks"] == []


@pytest.mark.parametrize("wrong", ["early", [LearningRateMonitor], [LearningRateMonitor(), print]])
def test_callbacks_are_nothing_else(wrong):
    with pytest.raises(TypeError, match="takes callbacks of lightning.pytorch and of transformers"):
        parse({"callbacks": wrong})


@pytest.mark.parametrize("folder", ["link", "link/run"])
def test_a_link_to_nowhere_is_no_place_for_a_model(folder):
    """Once this was known after the run."""
    Path("link").symlink_to("gone")
    with pytest.raises(ValueError, match=f"output_dir='{folder}' cannot be written: see .*link"):
        parse({"output_dir": folder})
