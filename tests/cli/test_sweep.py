"""`hflit sweep`: trials are runs of `hflit fit`, and the best one runs again to its figure."""

import csv
import json
import sys
from pathlib import Path

import optuna
import pytest
import yaml

from hflit.cli.fit import fitted, read_call

SEARCH = (
    "{args.learning_rate: {low: 1e-7, high: 1e-1, log: true}, model.lora: [null, {r: 2}], "
    "args.per_device_train_batch_size: {low: 4, high: 8, step: 4}}"
)


def sweep(*words, search=SEARCH, trials=3):
    own = ["--sweep.search", search, "--sweep.trials", str(trials)]
    return ["sweep", *words, "--args.max_steps", "4", *own]


def figure(folder, name="eval_loss"):
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry][-1]


def test_the_best_trial_is_the_one_with_the_lowest_loss_and_can_be_run_again(base, program):
    status, out, err = program(*sweep(*base(), "--args.output_dir", "out"))
    assert (status, err) == (0, "")
    with open("out/trials.csv", newline="") as file:
        trials = list(csv.DictReader(file))
    losses = [float(trial["eval_loss"]) for trial in trials]
    assert losses == [figure(f"out/trial-{number}") for number in range(3)]
    assert len(set(losses)) == 3
    best = losses.index(min(losses))
    assert f"Best of 3 trials is number {best}: --args.learning_rate=" in out
    for trial in trials:
        saved = yaml.safe_load(Path(f"out/trial-{trial['trial']}/config.yaml").read_text())
        assert saved["args"]["learning_rate"] == float(trial["args.learning_rate"])
        assert saved["args"]["per_device_train_batch_size"] in (4, 8)
        assert saved["model"].get("lora") == json.loads(trial["model.lora"])
    assert program("fit", "--config", "out/best.yaml", "--args.output_dir", "again")[0] == 0
    assert figure("again") == losses[best]


def test_texts_are_searched_as_they_are(base, program):
    """Once 'cosine' came with its quotes: unknown as a schedule, and part of a prefix."""
    words = base("sequence-sequence")
    names = ["w1 ", "1", "no", "# ", "[w2] "]
    search = {
        "data.prefix": names,
        "args.lr_scheduler_type": ["linear", "cosine"],
        "args.logging_strategy": [False],  # `no`, as YAML reads it
    }
    words = sweep(*words, "--args.output_dir", "out", search=json.dumps(search), trials=9)
    status, out, err = program(*words)
    assert (status, err) == (0, "")
    with open("out/trials.csv", newline="") as file:
        trials = list(csv.DictReader(file))
    assert len({trial["data.prefix"] for trial in trials}) > 2
    for trial in trials:
        saved = yaml.safe_load(Path(f"out/trial-{trial['trial']}/config.yaml").read_text())
        run = json.loads(Path(f"out/trial-{trial['trial']}/run.json").read_text())
        assert trial["data.prefix"] in names
        assert saved["data"]["prefix"] == run["prefix"] == trial["data.prefix"]
        assert saved["args"]["lr_scheduler_type"] == trial["args.lr_scheduler_type"]
        assert saved["args"]["logging_strategy"] == "no"
    best = min(trials, key=lambda trial: float(trial["eval_loss"]))
    read = read_call("fit", "", ["--config", "out/best.yaml"], ())[2]
    assert (read["prefix"], read["lr_scheduler_type"]) == (
        best["data.prefix"],
        best["args.lr_scheduler_type"],
    )


def test_what_is_searched_need_not_be_given_too(base, program):
    words = base()
    assert words.pop(0) == "--model.base"
    words.pop(0)
    words = sweep(*words, search="{model.base: [base]}", trials=1)
    status, out, _ = program(*words)
    assert status == 0
    assert "Best of 1 trials is number 0: --model.base=base" in out
    assert "--model.base must be given" in program(*[*words, "--sweep.search={args.seed: [1]}"])[2]


def test_a_sweep_goes_on_where_its_data_base_is(base, program):
    words = sweep(*base(), "--sweep.storage", "sqlite:///sweep.db", trials=1)
    assert program(*words)[0] == 0
    assert "Best of 2 trials" in program(*words)[1]
    study = optuna.load_study(study_name="hflit", storage="sqlite:///sweep.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2
    assert not Path("out").exists()


def test_a_sweep_that_goes_on_tries_other_values(base, program):
    """Once the sampler began anew with the same seed, and trained the same trials again."""
    words = [*base(), "--sweep.storage", "sqlite:///sweep.db"]
    search = "{args.learning_rate: {low: 1e-7, high: 1e-1, log: true}}"
    points = []
    for name, trials in (("whole", 4), ("parts", 2), ("parts", 2)):
        own = ["--sweep.name", name]
        assert program(*sweep(*words, *own, search=search, trials=trials))[0] == 0
    for name in ("whole", "parts"):
        study = optuna.load_study(study_name=name, storage="sqlite:///sweep.db")
        points.append([trial.params["args.learning_rate"] for trial in study.trials])
    assert [len(set(each)) for each in points] == [4, 4]
    assert points[0][:2] == points[1][:2]  # the same seed


def test_a_stored_sweep_goes_on_only_as_what_it_is(base, program):
    """Once the stored direction won without a word: the trial with the lowest accuracy was best."""
    words = sweep(*base(), "--sweep.storage", "sqlite:///sweep.db", trials=1)
    assert program(*words)[0] == 0
    advice = "Give another --sweep.name than 'hflit', which is in sqlite:///sweep.db already."
    other = ["--sweep.metric", "accuracy", "--model.metrics", "auto"]
    for changed, told in {
        (*words, *other): "That sweep is for eval_loss, this one for eval_accuracy.",
        (*words, "--sweep.search={model.lora: [null, {r: 4}]}"): "has changed for model.lora.",
        (*words, "--sweep.search={args.learning_rate: [1e-3]}"): "changed for args.learning_rate.",
    }.items():
        status, out, err = program(*changed)
        assert (status, out) == (2, "")
        assert f"{told} {advice}" in err
        assert err.count("\n") == 1
        assert program(*changed, "--sweep.name", told)[0] == 0
    optuna.create_study(storage="sqlite:///sweep.db", study_name="old", direction="maximize")
    told = program(*words, "--sweep.name", "old")[2]
    assert "That sweep is for another figure, this one for eval_loss." in told
    wider = "--sweep.search={args.learning_rate: {low: 1e-8, high: 1, log: true}}"
    assert program(*words, wider)[0] == 0


def test_a_metric_may_be_better_the_higher(base, program):
    named = ["--sweep.metric", "accuracy", "--model.metrics", "auto"]
    status, out, _ = program(*sweep(*base(), *named, "--args.output_dir", "out"))
    assert status == 0
    found = [figure(f"out/trial-{number}", "eval_accuracy") for number in range(3)]
    assert f"number {found.index(max(found))}: " in out


def test_a_trial_may_be_ended_at_an_evaluation(base, program, monkeypatch):
    class Second(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 1 and list(trial.intermediate_values) == [1]

    monkeypatch.setattr(optuna.pruners, "MedianPruner", Second)
    steps = ["--args.eval_strategy", "steps", "--args.eval_steps", "1"]
    words = sweep(*base(), *steps, "--sweep.storage", "sqlite:///sweep.db", trials=2)
    assert (
        program(*words, "--sweep.prune", "true")[1].count("Trial 1: ended early with --args") == 1
    )
    study = optuna.load_study(study_name="hflit", storage="sqlite:///sweep.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert list(study.trials[0].intermediate_values) == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, MemoryError, FloatingPointError])
def test_a_trial_that_fails_does_not_end_the_sweep(kind, base, program, monkeypatch):
    """Once Optuna's traceback of 40 lines ended the sweep, and neither file was written."""

    def second_fails(call, text):
        if call["output_dir"].endswith("trial-1"):
            raise kind("no room\nfor it")
        return fitted(call, text)

    monkeypatch.setattr("hflit.cli.sweep.fitted", second_fails)
    status, out, err = program(*sweep(*base(), "--args.output_dir", "out"))
    assert (status, err) == (0, "")
    assert out.count("Trial 1: failed with --args.learning_rate=") == 1
    assert out.count(f": {kind.__name__}: no room for it\n") == 1
    with open("out/trials.csv", newline="") as file:
        trials = list(csv.DictReader(file))
    assert [trial["state"] for trial in trials] == ["complete", "fail", "complete"]
    assert [trial["error"] for trial in trials] == ["", f"{kind.__name__}: no room for it", ""]
    losses = {number: figure(f"out/trial-{number}") for number in (0, 2)}
    best = Path(f"out/trial-{min(losses, key=losses.get)}/config.yaml")
    assert Path("out/best.yaml").read_text() == best.read_text()


def test_a_sweep_without_a_complete_trial_tells_the_last_failure(base, program):
    words = sweep(*base(), "--args.output_dir", "out", search="{model.base: [nowhere/a, b]}")
    status, out, err = program(*words)
    assert status == 2
    assert out.count("failed with --model.base=") == 3
    assert "None of 3 trials was completed. The last failure: FileNotFoundError: " in err
    assert err.count("\n") == 1
    with open("out/trials.csv", newline="") as file:
        assert [trial["state"] for trial in csv.DictReader(file)] == ["fail"] * 3
    assert not Path("out/best.yaml").exists()


def test_a_teacher_that_does_not_exist_fails_its_trial_alone(base, program):
    words = sweep(*base(), search='{model.teacher: ["no/such/teacher/here", base]}', trials=4)
    status, out, err = program(*words)
    assert (status, err) == (0, "")
    assert out.count("failed with --model.teacher=no/such/teacher/here") >= 1
    assert out.count("with --model.teacher=base") >= 1


def test_a_file_that_does_not_exist_is_told_once(base, program):
    """Once each trial failed of it."""
    words = base()
    words[words.index("--data.train") + 1] = "no.jsonl"
    status, out, err = program(*sweep(*words))
    assert status == 2
    assert "No file is called 'no.jsonl'" in err
    assert out.count("Trial ") == 1


@pytest.mark.parametrize("storage", ["nowhere", "sqlite:////no/such/folder/sweep.db"])
def test_a_storage_that_cannot_be_used_is_told(storage, base, program):
    """Once SQLAlchemy's traceback of 60 lines came."""
    status, out, err = program(*sweep(*base(), "--sweep.storage", storage))
    assert (status, out) == (2, "")
    assert f"--sweep.storage={storage} cannot be used: " in err
    assert err.count("\n") == 1


WRONG = {
    "{args.learningrate: [1]}": "holds 'args.learningrate', which is no option of a run",
    "{args.seed: 3}": "has 3 for args.seed. Give a list of values, or",
    "{args.seed: {low: 1}}": "has {'low': 1} for args.seed",
    "{args.output_dir: [a, b]}": "'args.output_dir': each trial has a folder of its own",
    "{args.seed: {low: 2, high: 1}}": "for args.seed: `low <= high` must hold",
    "{args.seed: {low: 0.5, high: 1}}": "--args.seed=0.5 is not",
    "{args.learning_rate: [abc]}": "--args.learning_rate=abc is not a number.",
}


@pytest.mark.parametrize("search", WRONG)
def test_a_wrong_search_is_told(search, base, program):
    status, out, err = program(*sweep(*base(), search=search))
    assert (status, out) == (2, "")
    assert WRONG[search] in err
    assert err.count("\n") == 1


def ranks(prediction):
    return {"rank": 1.0}


def test_what_it_cannot_do_without_is_told(base, program, monkeypatch):
    words = base()
    assert "--sweep.search must be given" in program("sweep", *words)[2]
    assert "each trial of a sweep runs in one" in program(*sweep(*words, "--trainer.devices=2"))[2]
    told = program(*sweep(*words, trials=0))[2]
    assert told == "hflit sweep: --sweep.trials=0 must be at least 1.\n"
    status, out, told = program(*sweep(*words, "--sweep.metric", "f1"))
    assert (status, out) == (2, "")
    assert "--sweep.metric=eval_f1 needs metrics=: without, an evaluation gives loss" in told
    own = ["--model.metrics", f"{__name__}.ranks"]
    status, out, told = program(*sweep(*words, "--sweep.metric", "f1", *own))
    assert status == 2
    assert "--sweep.metric=eval_f1 is not among the figures: eval_loss" in told
    assert (out.count("Trial "), told.count("\n")) == (1, 1)  # no other trial would have it
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr("hflit.cli.sweep.find_spec", lambda name: None)
    assert "A sweep needs optuna. Install it with: pip install hflit[sweep]" in program("sweep")[2]
