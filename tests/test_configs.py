"""Every YAML of configs/ holds keywords of the call, and two updates run with them."""

from pathlib import Path

import pytest
import yaml

from hflit import HFTrainer
from hflit.tasks import TASKS
from tests.tasks.tiny import make, rows

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
DEFAULT_COLUMNS = {"text-classification": ("text", "label")}


def test_each_task_has_a_config():
    assert {path.stem.replace("_", "-") for path in CONFIGS} >= set(TASKS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_runs(path, tmp_path):
    groups = yaml.safe_load(path.read_text())
    assert set(groups) <= {"model", "data", "args", "trainer"}
    call = {name: value for group in groups.values() for name, value in group.items()}
    task = call["task"]
    # A tiny model and its rows stand in for the real ones, which are not in the repository.
    tiny = {
        "base": make(task, seed=0),
        "train": rows(task),
        "validation": rows(task),
        "columns": DEFAULT_COLUMNS.get(task),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
    }
    for name, longest in (("maxlength", 32), ("stride", 8), ("target_maxlength", 32)):
        if name in call:
            tiny[name] = longest

    trainer = HFTrainer()
    trainer(**{**call, **tiny})

    assert trainer.state.global_step == 2
    assert "eval_loss" in trainer.metrics
