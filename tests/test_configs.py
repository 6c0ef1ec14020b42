"""Every YAML of configs/ runs by the program for two updates, and again from what it left."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from hflit.cli.main import main
from hflit.tasks import TASKS
from tests import stand_ins
from tests.stand_ins import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OTHERS = {"lora", "four_bit", "distillation", "ddp", "fsdp", "streaming"}
TEACHER = "sentence-transformers/all-MiniLM-L6-v2"  # what its own configuration starts from
PROCESSES = ("ddp", "fsdp")


def fit(*words):
    options = ["--args.max_steps", "2", "--args.logging_steps", "1", "--args.use_cpu", "true"]
    return ["fit", *options, *words]


def losses(folder):
    with open(f"{folder}/trainer_state.json") as file:
        history = json.load(file)["log_history"]
    assert any("eval_loss" in entry for entry in history)
    return [entry["loss"] for entry in history if "loss" in entry]


def call(path, folder):
    """The command for a configuration, in a folder with all that it names."""
    groups = yaml.safe_load(path.read_text())
    model, data = groups["model"], groups["data"]
    taught = [TEACHER] if "teacher" in model else []
    stand_ins.build(folder, model["base"], str(data["train"]), *taught)
    short = [f"--data.{name}={n}" for name, n in stand_ins.SHORT.items() if name in data]
    return [*fit("--config", f"configs/{path.name}"), *short]


def test_each_task_and_each_way_to_run_has_a_configuration():
    names = {path.stem for path in CONFIGS}
    assert names == {task.replace("-", "_") for task in TASKS} | OTHERS


@pytest.mark.parametrize(
    "path",
    [path for path in CONFIGS if path.stem not in PROCESSES],
    ids=lambda path: path.stem,
)
def test_a_configuration_runs_and_runs_again_to_the_same_losses(path, tmp_path):
    words = call(path, tmp_path)
    if path.stem == "distillation":  # the teacher is what another configuration leaves
        assert main(fit("--config", "configs/text_classification.yaml")) == 0
    assert main([*words, "--args.output_dir", "one"]) == 0
    assert main(["fit", "--config", "one/config.yaml", "--args.output_dir", "two"]) == 0
    assert len(losses("one")) == 2
    assert losses("one") == losses("two")


@pytest.mark.slow  # 20 s each: two processes that import torch
@pytest.mark.parametrize("name", PROCESSES)
def test_a_configuration_for_two_processes_runs(name, tmp_path):
    words = call(ROOT / "configs" / f"{name}.yaml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "hflit", *words, "--args.output_dir", "one"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("After 2 updates") == 1  # the first process alone tells
    assert len(losses("one")) == 2
