"""Trackers by the command line: TensorBoard, CSV, MLflow and Weights & Biases without network."""

import csv
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import mlflow
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.stand_ins import ROOT

STEPS = ("--args.max_steps", "4", "--args.logging_steps", "2", "--args.output_dir", "out")


def entries(name):
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}


def test_a_logger_of_lightning_writes_csv(base, program):
    words = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger"]
    words += ["--trainer.logger.save_dir", "logs", "--trainer.logger.name", "first"]
    status, _, err = program("fit", *base(), *STEPS, *words)
    assert status == 0, err
    (table,) = Path("logs/first").glob("version_*/metrics.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("loss", "eval_loss"):
        written = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        assert written == pytest.approx(entries(name))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensorboard_and_mlflow_get_the_same_losses(base, program, monkeypatch):
    store = "sqlite:///mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    mlflow.set_tracking_uri(store)
    status, _, err = program("fit", *base(), *STEPS, "--args.report_to", "[tensorboard, mlflow]")
    assert status == 0, err
    (run,) = mlflow.search_runs(output_format="list")
    kept = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert {each.step: each.value for each in kept} == pytest.approx(entries("loss"))
    (folder,) = Path("out/runs").iterdir()
    events = EventAccumulator(str(folder)).Reload().Scalars("train/loss")
    assert {each.step: each.value for each in events} == pytest.approx(entries("loss"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_writes_a_run_without_network(base):
    """In a process of its own, as wandb starts another and keeps its settings."""
    words = ["fit", *base(), *STEPS, "--args.report_to", "wandb", "--args.run_name", "first"]
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-m", "hflit", *words],
        env={**os.environ, "PYTHONPATH": path, "WANDB_MODE": "offline", "WANDB_DIR": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (run,) = Path("wandb").glob("offline-run-*")
    kept = next(run.glob("*.wandb")).read_bytes()
    assert b"train/loss" in kept
    assert b"eval/loss" in kept
    assert b"first" in kept
