"""`hflit sweep`: many runs with other values of some options, chosen by Optuna."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from transformers import TrainerCallback

from hflit.checks import listed
from hflit.cli.fit import check_given, config_text, fitted, read_call

RANGE = {"low", "high", "log", "step"}
FALLING = ("loss", "perplexity")  # figures that are better the lower they are
ABOUT = (
    "Fine-tune with other values of some options in each trial, and tell which did best. In "
    "--args.output_dir each trial leaves its model as trial-N, and the sweep trials.csv and "
    "best.yaml, which `hflit fit --config` takes."
)


def run(command: str, argv: Sequence[str]) -> int:
    """Search."""
    if find_spec("optuna") is None:
        raise ImportError("A sweep needs optuna. Install it with: pip install hflit[sweep].")
    import optuna

    needed = ("model.base", "data.train", "data.validation", "sweep.search")
    parser, config, call = read_call(command, ABOUT, argv, (), _add_options)
    search = config.get("sweep.search") or {}
    check_given(config, [name for name in needed if name not in search])
    _check_search(parser, search)
    if str(call.get("devices", 1)) != "1":
        raise ValueError(f"devices={call['devices']}: each trial of a sweep runs in one process.")
    metric = config.sweep.get("metric", "eval_loss")
    metric = metric if metric.startswith("eval_") else f"eval_{metric}"
    folder = Path(call["output_dir"]) if call.get("output_dir") else None

    def objective(trial: Any) -> float:
        words = [f"--{name}={_suggested(trial, name, space)}" for name, space in search.items()]
        if folder is not None:
            words.append(f"--args.output_dir={folder / f'trial-{trial.number}'}")
        read, chosen, given = read_call(command, ABOUT, [*argv, *words], needed, _add_options)
        text = config_text(read, chosen)
        trial.set_user_attr("config", text)
        given["callbacks"] = [*listed(given.get("callbacks")), _Told(trial, metric)]
        return _figure(fitted(given, text).metrics, metric)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    prunes = config.sweep.get("prune", False)
    study = optuna.create_study(
        storage=config.sweep.get("storage"),
        study_name=config.sweep.get("name", "hflit"),
        load_if_exists=True,
        direction="minimize" if metric.endswith(FALLING) else "maximize",
        sampler=optuna.samplers.TPESampler(seed=call.get("seed", 42)),
        pruner=optuna.pruners.MedianPruner() if prunes else optuna.pruners.NopPruner(),
    )
    study.optimize(objective, n_trials=config.sweep.get("trials", 10), callbacks=[_show(metric)])
    best = study.best_trial
    told = " ".join(f"--{name}={value}" for name, value in best.params.items())
    print(f"Best of {len(study.trials)} trials is number {best.number}: {told}")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "best.yaml").write_text(best.user_attrs["config"], encoding="utf-8")
        _write_trials(folder / "trials.csv", study.trials, metric)
        print(f"{folder / 'best.yaml'} is its configuration, trials.csv beside it tells of all.")
    return 0


class _Told(TrainerCallback):
    """Tells Optuna of each evaluation, which may end the trial."""

    def __init__(self, trial: Any, metric: str) -> None:
        self.trial = trial
        self.metric = metric

    def on_evaluate(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        """Tell, and ask."""
        import optuna

        self.trial.report(_figure(details["metrics"], self.metric), state.global_step)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def _add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("sweep", "What is searched, and how.")
    add = group.add_argument
    add(
        "--sweep.search",
        type=dict[str, Any],
        default={},
        help="Option -> a list of values, or a range {low, high} with log: true or a step, as in "
        "{args.learning_rate: {low: 1e-5, high: 1e-3, log: true}, model.lora: [null, true]}.",
    )
    add("--sweep.trials", type=int, default=10, help="Runs.")
    add(
        "--sweep.metric",
        type=str,
        default="eval_loss",
        help="Figure of the last evaluation that decides; losses and perplexity are the better the "
        "lower, all others the higher.",
    )
    add("--sweep.prune", type=bool, default=False, help="End runs that fall behind the median.")
    add(
        "--sweep.storage",
        type=str | None,
        help="Data base that keeps the trials, such as sqlite:///sweep.db; a sweep goes on there.",
    )
    add("--sweep.name", type=str, default="hflit", help="Name of the sweep in it.")


def _check_search(parser: ArgumentParser, search: dict[str, Any]) -> None:
    known = {action.dest for action in parser._actions}
    for name, space in search.items():
        if name not in known or name.startswith("sweep."):
            raise ValueError(f"--sweep.search holds {name!r}, which is no option of a run.")
        is_range = isinstance(space, dict) and {"low", "high"} <= space.keys() <= RANGE
        if not is_range and not (isinstance(space, list) and space):
            raise ValueError(
                f"--sweep.search has {space!r} for {name}. Give a list of values, or "
                "{low: ..., high: ...} with log: true or a step."
            )


def _suggested(trial: Any, name: str, space: Any) -> str:
    """The value of an option in this trial, as it is typed."""
    if isinstance(space, list):
        typed = [each if isinstance(each, str) else json.dumps(each) for each in space]
        return trial.suggest_categorical(name, typed)
    whole = isinstance(space["low"], int) and isinstance(space["high"], int)
    return json.dumps((trial.suggest_int if whole else trial.suggest_float)(name, **space))


def _figure(figures: dict[str, Any], metric: str) -> float:
    if metric not in figures:
        known = ", ".join(name for name in figures if name.startswith("eval_"))
        raise ValueError(f"--sweep.metric={metric} is not among the figures: {known}.")
    return float(figures[metric])


def _show(metric: str) -> Any:
    def show(study: Any, trial: Any) -> None:
        result = "ended early" if trial.state.name == "PRUNED" else f"{metric} {trial.value}"
        told = " ".join(f"--{name}={value}" for name, value in trial.params.items())
        print(f"Trial {trial.number}: {result} with {told}", flush=True)

    return show


def _write_trials(path: Path, trials: Sequence[Any], metric: str) -> None:
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", metric, *names])
        for trial in trials:
            values = [trial.params.get(name) for name in names]
            writer.writerow([trial.number, trial.state.name.lower(), trial.value, *values])
