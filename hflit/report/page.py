"""report.html: one page about a finished run, whole in itself, without a line of script."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hflit.report.card import shown
from hflit.report.curves import as_svg, learning_curves, length_histogram

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } svg { max-width: 100%; height: auto }
td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums } code { overflow-wrap: anywhere }
"""
MOST_CLASSES = 30  # in a confusion matrix that can still be read


def write_page(
    folder: Path,
    facts: dict[str, Any],
    pairs: Sequence[tuple[str, str]] | None = None,
) -> Path:
    """Write the page beside the model.

    Args:
        folder: What the run left.
        facts: What the run was given, see `run_facts`; of its data under `splits`.
        pairs: True and predicted class of each row of the validation data.

    Returns:
        The page.
    """
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    arguments = json.loads((folder / "training_args.json").read_text(encoding="utf-8"))
    history = state["log_history"]
    title = f"{folder.absolute().name}: {facts.get('task', 'a run')}"
    parts = [f"<h1>{_safe(title)}</h1>"]
    parts.append(f"<p>{_safe(facts.get('base', ''))}, {state['global_step']} updates.</p>")
    curves = learning_curves(history)
    if curves is not None:
        parts += ["<h2>Learning curves</h2>", as_svg(curves)]
    parts += ["<h2>Evaluations</h2>", _evaluations(history)]
    if pairs:
        parts += ["<h2>Confusion matrix of the validation data</h2>", confusion(pairs)]
    splits = {name: found for name, found in facts.get("splits", {}).items() if found}
    if splits:
        drawn = length_histogram({name: found["histogram"] for name, found in splits.items()})
        parts += ["<h2>Lengths</h2>", as_svg(drawn), _data(splits)]
    parts += ["<h2>What was given</h2>", _table(facts.get("call", {}))]
    parts += ["<h2>All arguments</h2>", _table(arguments)]
    parts += ["<h2>Versions</h2>", _table(facts.get("versions", {}))]
    page = folder / "report.html"
    head = f"<meta charset='utf-8'><title>{_safe(title)}</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    page.write_text(
        f"<!doctype html><html><head>{head}</head><body>{body}</body></html>\n", "utf-8"
    )
    return page


def confusion(pairs: Sequence[tuple[str, str]]) -> str:
    """Rows by true (down) and predicted (across) class, as a table.

    Args:
        pairs: True and predicted class of each row.
    """
    names = sorted({name for pair in pairs for name in pair})
    if len(names) > MOST_CLASSES:
        return f"<p>{len(names)} classes: too many to show.</p>"
    index = {name: place for place, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), int)
    for true, predicted in pairs:
        counts[index[true], index[predicted]] += 1
    rows = ["<tr><th>true \\ predicted</th>" + "".join(f"<th>{_safe(n)}</th>" for n in names)]
    for name, line in zip(names, counts, strict=True):
        cells = []
        for count in line:
            shade = count / max(line.sum(), 1)
            color = f"background: rgb(31 119 180 / {shade:.2f})"
            cells.append(f"<td class=n style='{color}'>{count}</td>")
        rows.append(f"<tr><th>{_safe(name)}</th>{''.join(cells)}")
    return f"<table>{''.join(rows)}</table>"


def _evaluations(history: Sequence[dict[str, Any]]) -> str:
    entries = [entry for entry in history if "eval_loss" in entry]
    if not entries:
        return "<p>It was not evaluated.</p>"
    names = list(dict.fromkeys(name for entry in entries for name in shown(entry)))
    heads = "".join(f"<th>{_safe(name.removeprefix('eval_'))}</th>" for name in names)
    rows = [f"<tr><th>update</th>{heads}"]
    for entry in entries:
        cells = "".join(f"<td class=n>{entry.get(name, float('nan')):.4f}</td>" for name in names)
        rows.append(f"<tr><td class=n>{entry['step']}</td>{cells}")
    return f"<table>{''.join(rows)}</table>"


def _data(splits: dict[str, dict[str, Any]]) -> str:
    rows = ["<tr><th>split</th><th>rows</th><th>inputs</th><th>tokens</th><th>classes</th>"]
    for name, found in splits.items():
        labels = ", ".join(f"{label} {count:,}" for label, count in found.get("labels", {}).items())
        numbers = "".join(f"<td class=n>{found[n]:,}</td>" for n in ("rows", "inputs", "tokens"))
        rows.append(f"<tr><td>{_safe(name)}</td>{numbers}<td>{_safe(labels)}</td>")
    return f"<table>{''.join(rows)}</table>"


def _table(values: dict[str, Any]) -> str:
    rows = (f"<tr><td>{_safe(k)}</td><td><code>{_safe(v)}</code></td>" for k, v in values.items())
    return f"<table>{''.join(rows)}</table>"


def _safe(value: Any) -> str:
    return html.escape(str(value))
