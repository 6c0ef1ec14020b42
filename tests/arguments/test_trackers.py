"""Trackers get the log of a run: TensorBoard and MLflow for real, Trackio by a stand-in."""

import importlib.util
import json
import sys

import mlflow
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hflit import HFTrainer
from hflit.arguments import parse
from hflit.loop.trackers import make_trackers

TRACKIO = """
import json
__version__ = "1.0"
calls = []
class Config(dict):
    def update(self, values, **options):
        super().update(values)
config = Config()
class Variable:
    def get(self):
        return "me/space"
class context_vars:
    current_space_id = current_project = Variable()
def init(**options): calls.append(["init", options])
def log(values): calls.append(["log", sorted(values)])
def finish(): calls.append(["finish", {}])
def freeze(**options): calls.append(["freeze", options]); return "me/static"
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_every_installed_tracker_gets_the_log(mine, monkeypatch, tmp_path):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    mlflow.set_tracking_uri(store)
    given = {"report_to": "all", "run_name": "first", "output_dir": "out", "hub_token": "hf_secret"}
    history = mine(**given)[0].log_history
    assert mlflow.active_run() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "out"]

    (folder,) = (tmp_path / "out" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    losses = [(e["step"], e["loss"]) for e in history if "loss" in e]
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert logged == [(step, pytest.approx(loss)) for step, loss in losses]
    evaluated = [(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e]
    logged = [(event.step, event.value) for event in events.Scalars("eval/loss")]
    assert logged == [(step, pytest.approx(loss)) for step, loss in evaluated]

    # One run: once the evaluation at the end opened another, as MLflow had ended its own.
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.run_name == "first"
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval_loss"] == pytest.approx(evaluated[-1][1])
    assert run.data.params["learning_rate"] == "0.005"
    assert "hf_secret" not in json.dumps(run.data.params)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_run_that_failed_leaves_no_tracker_open(mine, monkeypatch, tmp_path):
    """Once the next run's figures went into the MLflow run of the one that failed."""

    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            raise ValueError("lost")

    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    mlflow.set_tracking_uri(store)
    kept = []
    for name, callbacks in (("first", [Fails()]), ("second", [])):
        given = {"report_to": "mlflow", "run_name": name, "output_dir": name}
        try:
            mine(**given, callbacks=callbacks)
        except ValueError as error:
            kept.append(error)  # and with it the run's objects, as a prompt does
        assert mlflow.active_run() is None
    runs = mlflow.search_runs(output_format="list")
    assert sorted(run.info.run_name for run in runs) == ["first", "second"]
    assert len(kept) == 1


def test_trackio_is_told_the_same(theirs, mine, monkeypatch, tmp_path):
    file = tmp_path / "trackio.py"
    file.write_text(TRACKIO)
    spec = importlib.util.spec_from_file_location("trackio", file)
    trackio = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trackio)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    given = {
        "report_to": "trackio",
        "run_name": "first",
        "project": "birds",
        "trackio_space_id": "me/space",
        "trackio_bucket_id": "me/bucket",
        "trackio_static_space_id": "me/static",
        "hub_token": "hf_secret",
    }
    mine(**given, eval_strategy="epoch", max_steps=3)
    ours, trackio.calls[:] = list(trackio.calls), []
    assert "hf_secret" not in str(trackio.config)
    theirs(**given, eval_strategy="epoch", max_steps=3)
    assert ours == trackio.calls
    (_, init), *_, (last, freeze) = ours
    assert (init["project"], init["name"]) == ("birds", "first")
    assert (init["space_id"], init["bucket_id"]) == ("me/space", "me/bucket")
    assert (last, freeze["new_space_id"]) == ("freeze", "me/static")


@pytest.mark.filterwarnings("ignore:The NeptuneCallback is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its __del__
@pytest.mark.parametrize("name", INTEGRATION_TO_CALLBACK)
def test_missing_trackers_are_refused_before_anything_is_loaded(name):
    if name in ("tensorboard", "mlflow"):
        assert make_trackers(parse({"report_to": name, "output_dir": "out"})[0])
        return
    with pytest.raises(ImportError, match=rf"report_to='{name}' cannot be used: .*({name[:5]}|K)"):
        HFTrainer()("no/such-model", [], report_to=name, output_dir="out")


def test_unknown_tracker_is_refused():
    with pytest.raises(ValueError, match="Unknown report_to='tensorbord'. Choose among: all, none"):
        HFTrainer()("no/such-model", [], report_to="tensorbord")


def test_tensorboard_needs_a_place(mine, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="writes into output_dir. Give one, or a folder in"):
        HFTrainer()("no/such-model", [], report_to="tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    mine(report_to="tensorboard", max_steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["board"]
