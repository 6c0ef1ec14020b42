"""`hflit sweep`: many runs with other values of some options, chosen by Optuna."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from transformers import TrainerCallback

from hflit.checks import listed
from hflit.cli.fit import check_given, config_text, fitted, read_call
from hflit.cli.options import read_options
from hflit.request import check_figure
from hflit.tasks import TASKS

RANGE = {"low", "high", "log", "step"}
FILES = {"model.base", "model.teacher", "model.checkpoint", "data.train", "data.validation"}
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
    spaces = _spaces(parser, search)
    if str(call.get("devices", 1)) != "1":
        raise ValueError(f"devices={call['devices']}: each trial of a sweep runs in one process.")
    count = config.sweep.get("trials", 10)
    if count < 1:
        raise ValueError(f"--sweep.trials={count} must be at least 1.")
    metric = config.sweep.get("metric", "eval_loss")
    metric = metric if metric.startswith("eval_") else f"eval_{metric}"
    task = TASKS.get(call.get("task", "text-classification"))
    if task is not None and not {"model.task", "model.metrics"} & search.keys():
        check_figure(f"--sweep.metric={metric}", metric, call.get("metrics"), task)
    folder = Path(call["output_dir"]) if call.get("output_dir") else None

    def result(trial: Any) -> float:
        words = [f"--{name}={_typed(spaces[name], trial.params[name])}" for name in search]
        if folder is not None:
            words.append(f"--args.output_dir={folder / f'trial-{trial.number}'}")
        read, chosen, given = read_call(command, ABOUT, [*argv, *words], needed, _add_options)
        text = config_text(read, chosen)
        trial.set_user_attr("config", text)
        given["callbacks"] = [*listed(given.get("callbacks")), _Told(trial, metric)]
        return _figure(fitted(given, text).metrics, metric)

    # What no other trial would have either.
    hopeless = (UnknownFigure,) if FILES & search.keys() else (UnknownFigure, FileNotFoundError)
    study = _study(config.sweep, metric, spaces, call.get("seed", 42))
    for _ in range(count):
        trial = study.ask(spaces)
        value, state = None, optuna.trial.TrialState.FAIL
        try:
            value, state = result(trial), optuna.trial.TrialState.COMPLETE
        except optuna.TrialPruned:
            state = optuna.trial.TrialState.PRUNED
        except hopeless:
            raise
        except Exception as error:  # of this trial; others may do better
            trial.set_user_attr("error", " ".join(f"{type(error).__name__}: {error}".split()))
        finally:
            _show(study.tell(trial, value, state), metric)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            _write_trials(folder / "trials.csv", study.trials, metric)
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if not complete:
        errors = [each.user_attrs["error"] for each in study.trials if "error" in each.user_attrs]
        last = f" The last failure: {errors[-1]}" if errors else ""
        raise ValueError(f"None of {len(study.trials)} trials was completed.{last}")
    best = study.best_trial
    print(f"Best of {len(study.trials)} trials is number {best.number}: {_options(best)}")
    if folder is not None:
        (folder / "best.yaml").write_text(best.user_attrs["config"], encoding="utf-8")
        print(f"{folder / 'best.yaml'} is its configuration, trials.csv beside it tells of all.")
    return 0


class UnknownFigure(ValueError):
    """The figure that decides is not among those of an evaluation."""


class _Told(TrainerCallback):
    """Tells Optuna of each evaluation, which may end the trial."""

    def __init__(self, trial: Any, metric: str) -> None:
        self.trial = trial
        self.metric = metric

    def on_evaluate(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        """Tell, and ask."""
        import optuna

        self.trial.report(_figure(details["metrics"], self.metric), state.global_step)
        if state.global_step < state.max_steps and self.trial.should_prune():
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


def _spaces(parser: ArgumentParser, search: dict[str, Any]) -> dict[str, Any]:
    """Option -> Optuna's distribution of its values.

    Raises:
        ValueError: The search names no option of a run, or holds values it cannot have.
    """
    from optuna import distributions

    known = {action.dest for action in parser._actions}
    spaces: dict[str, Any] = {}
    for name, space in search.items():
        if name not in known or name.startswith("sweep."):
            raise ValueError(f"--sweep.search holds {name!r}, which is no option of a run.")
        if name == "args.output_dir":
            raise ValueError(f"--sweep.search holds {name!r}: each trial has a folder of its own.")
        is_range = isinstance(space, dict) and {"low", "high"} <= space.keys() <= RANGE
        if not is_range and not (isinstance(space, list) and space):
            raise ValueError(
                f"--sweep.search has {space!r} for {name}. Give a list of values, or "
                "{low: ..., high: ...} with log: true or a step."
            )
        values = [space["low"], space["high"]] if is_range else space
        typed = [each if isinstance(each, str) else json.dumps(each) for each in values]
        try:
            if not is_range:
                spaces[name] = distributions.CategoricalDistribution(typed)
            elif all(isinstance(each, int) for each in values):
                spaces[name] = distributions.IntDistribution(**space)
            else:
                spaces[name] = distributions.FloatDistribution(**space)
        except (TypeError, ValueError) as error:
            raise ValueError(f"--sweep.search has {space!r} for {name}: {error}") from None
        for word in typed:
            read_options(parser, [f"--{name}={word}"], defaults=False)
    return spaces


def _study(given: Any, metric: str, spaces: dict[str, Any], seed: int) -> Any:
    """The study that keeps the trials: a new one, or the one of this name that is stored.

    Raises:
        ValueError: The one that is stored is for another figure, or chooses among other values; or
            nothing can be stored there.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name, storage = given.get("name", "hflit"), given.get("storage")
    ways = optuna.study.StudyDirection
    direction = ways.MINIMIZE if metric.endswith(FALLING) else ways.MAXIMIZE
    prunes = given.get("prune", False)
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            load_if_exists=True,
            direction=direction,
            pruner=optuna.pruners.MedianPruner() if prunes else optuna.pruners.NopPruner(),
        )
    except Exception as error:  # of SQLAlchemy's many
        raise ValueError(f"--sweep.storage={storage} cannot be used: {error}") from error
    advice = f"Give another --sweep.name than {name!r}, which is in {storage} already."
    unnamed = metric if study.direction == direction else "another figure"
    before = study.user_attrs.get("metric", unnamed)
    if before != metric:
        raise ValueError(f"That sweep is for {before}, this one for {metric}. {advice}")
    study.set_user_attr("metric", metric)
    for trial in study.trials:
        for option in trial.distributions.keys() & spaces.keys():
            try:
                optuna.distributions.check_distribution_compatibility(
                    trial.distributions[option], spaces[option]
                )
            except ValueError:
                raise ValueError(f"The search has changed for {option}. {advice}") from None
    # With the same seed a sweep that goes on would try the same values again.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    return study


def _typed(space: Any, value: Any) -> str:
    """The value of an option in a trial, as it is typed."""
    return value if hasattr(space, "choices") else json.dumps(value)


def _figure(figures: dict[str, Any], metric: str) -> float:
    if metric not in figures:
        known = ", ".join(name for name in figures if name.startswith("eval_"))
        raise UnknownFigure(f"--sweep.metric={metric} is not among the figures: {known}.")
    if math.isnan(figures[metric]):
        raise FloatingPointError(f"{metric} is not a number.")
    return float(figures[metric])


def _show(trial: Any, metric: str) -> None:
    results = {
        "COMPLETE": f"{metric} {trial.value}",
        "PRUNED": "ended early",
        "FAIL": "failed",
    }
    error = trial.user_attrs.get("error")
    told = f"Trial {trial.number}: {results[trial.state.name]} with {_options(trial)}"
    print(f"{told}: {error}" if error else told, flush=True)


def _options(trial: Any) -> str:
    return " ".join(f"--{name}={value}" for name, value in trial.params.items())


def _write_trials(path: Path, trials: Sequence[Any], metric: str) -> None:
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", metric, *names, "error"])
        for trial in trials:
            values = [trial.params.get(name) for name in names]
            told = [trial.number, trial.state.name.lower(), trial.value]
            writer.writerow([*told, *values, trial.user_attrs.get("error")])
