"""README.md: the model card of a finished run, with the metadata that the Hub reads."""

from __future__ import annotations

import html
import math
import pprint
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hflit.report.curves import SKIPPED, learning_curves, save_png

CURVES = "learning_curves.png"
MOST_CLASSES = 100  # told by name
LOADED = ("base", "train", "validation", "teacher")  # a run is none without them
HUB_NAMES = {  # of tasks that the Hub knows by another
    "sequence-sequence": "text-generation",
    "language-generation": "text-generation",
    "language-modeling": "fill-mask",
    "token-detection": "token-classification",
}


def write_card(
    folder: str | Path,
    facts: dict[str, Any],
    history: Sequence[dict[str, Any]],
    metrics: dict[str, float],
) -> None:
    """Write `README.md` and the learning curves.

    Args:
        folder: Where the model is.
        facts: What the run was given, see `run_facts`; of its data under `splits`.
        history: `log_history` of the run.
        metrics: Its last figures.
    """
    folder = Path(folder)
    figure = learning_curves(history)
    if figure is not None:
        save_png(figure, folder / CURVES)
    parts = [_head(folder, facts, metrics), _figures(metrics, figure is not None)]
    parts += [_data(facts), _training(folder, facts)]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def shown(metrics: dict[str, Any]) -> dict[str, float]:
    """The figures of the evaluation that are single numbers, without its speed."""
    return {
        name: value
        for name, value in metrics.items()
        if name.startswith("eval_")
        and isinstance(value, (int, float))
        and not any(each in name for each in SKIPPED)
    }


def python_call(facts: dict[str, Any]) -> str:
    """The program that makes the run again; what no text stands for is imported or told."""
    imports, told, words = ["from hflit import HFTrainer"], [], []
    objects = facts.get("objects", {})  # older runs tell none
    for name, value in facts["call"].items():
        text = _literal(value)
        if objects.get(name) is not None:
            module, text = objects[name].split(":")
            imports.append(f"from {module} import {text.split('.')[0]}")
        elif name in objects and name in LOADED:
            text = name
            told.append(f"# {name} was {value}.")
        elif name in objects:
            told.append(f"# Left out, as no text stands for it: {name}, {_listed(value)}.")
            continue
        words.append(f"    {name}={text},")
    return "\n".join([*imports, "", *told, "HFTrainer()(", *words, ")"])


def _head(folder: Path, facts: dict[str, Any], metrics: dict[str, float]) -> str:
    name = folder.absolute().name
    base = facts["base"]
    # A folder of one's own is no model of the Hub.
    hub_base = base if base.count("/") == 1 and not Path(base).exists() else None
    results = [
        EvalResult(
            task_type=HUB_NAMES.get(facts["task"], facts["task"]),
            dataset_type="validation",
            dataset_name=str(facts["validation"]),
            metric_type=name.removeprefix("eval_"),
            metric_value=round(value, 6),
        )
        for name, value in shown(metrics).items()
    ]
    data = ModelCardData(
        library_name="peft" if (folder / "adapter_config.json").exists() else "transformers",
        pipeline_tag=HUB_NAMES.get(facts["task"], facts["task"]),
        base_model=hub_base,
        tags=["hflit", "lightning", facts["task"]],
        model_name=name if results else None,
        eval_results=results or None,
    )
    about = f"{facts['base']}, fine-tuned for {facts['task']} by hflit."
    return f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{about}"


def _figures(metrics: dict[str, float], has_curves: bool) -> str:
    rows = [f"| {_safe(n.removeprefix('eval_'))} | {v:.4f} |" for n, v in shown(metrics).items()]
    table = ["| figure | value |", "| --- | ---: |", *rows] if rows else ["It was not evaluated."]
    if "train_loss" in metrics:
        table.append(f"\nMean training loss: {metrics['train_loss']:.4f}.")
    if has_curves:
        table.append(f"\n![Learning curves]({CURVES})")
    return "\n".join(["## Figures on the validation data", "", *table])


def _data(facts: dict[str, Any]) -> str:
    lines = ["## Data", "", "| split | data | rows | tokens | median length |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for split, found in facts.get("splits", {}).items():
        if found:
            sizes = f"{found['rows']:,} | {found['tokens']:,} | {found['lengths'][1]}"
            lines.append(f"| {split} | {_safe(facts[split])} | {sizes} |")
    labels = facts.get("splits", {}).get("train", {}).get("labels")
    if labels:
        told = ", ".join(f"{_safe(n)} ({labels[n]:,})" for n in [*labels][:MOST_CLASSES])
        if len(labels) > MOST_CLASSES:
            told += f" and {len(labels) - MOST_CLASSES:,} more, which `run.json` counts"
        lines += ["", f"Classes of the training rows: {told}."]
    lines += ["", f"Columns: {', '.join(_safe(c) for c in facts['columns'] if c)}."]
    if facts["fingerprint"]:
        lines[-1] += f" Fingerprint of the tokenized training rows: `{facts['fingerprint']}`."
    return "\n".join(lines)


def _training(folder: Path, facts: dict[str, Any]) -> str:
    lines = ["## Training", ""]
    if (folder / "config.yaml").exists():
        lines += ["```", "hflit fit --config config.yaml", "```", "", "which is, in Python:", ""]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines += ["```python", python_call(facts), "```", ""]
    # A launcher's processes stand in no argument.
    spread = f", {facts['processes']} processes" if facts["processes"] > 1 else ""
    lines += [f"Seed {facts['seed']}{spread}. All arguments are in `training_args.json`.", ""]
    return "\n".join([*lines, f"Versions: {versions}."])


class _Literals(pprint.PrettyPrinter):
    """Writes floats without a literal, such as inf, as a call that makes them."""

    def format(self, object: Any, *args: Any) -> tuple[str, bool, bool]:
        if isinstance(object, float) and not math.isfinite(object):
            return f'float("{object}")', True, False
        return super().format(object, *args)


def _literal(value: Any) -> str:
    shown = _Literals(width=90, sort_dicts=False).pformat(value)
    return shown.replace("\n", "\n    ")


def _listed(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _safe(value: Any) -> str:
    """A text as it is, in a table of Markdown too."""
    return " ".join(html.escape(str(value), quote=False).replace("|", "\\|").split())
