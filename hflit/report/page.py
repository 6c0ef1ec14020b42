"""report.html: one page about a finished run, whole in itself, without a line of script."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sacrebleu import sentence_chrf

from hflit.report.card import shown
from hflit.report.curves import as_svg, histogram, learning_curves, length_histogram, scatter
from hflit.report.judged import Judgement
from hflit.saved import read_json

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } svg { max-width: 100%; height: auto }
td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums } code { overflow-wrap: anywhere }
"""
# Nothing is fetched and nothing runs, whatever stands in the rows.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
MOST_CLASSES = 30  # in a confusion matrix that can still be read
WORST = 20  # rows, and pairs of tokens
SPEEDS = {  # in the log -> on the page
    "train_runtime": "training, seconds",
    "train_samples_per_second": "training, rows a second",
    "train_steps_per_second": "training, updates a second",
    "eval_runtime": "last evaluation, seconds",
    "eval_samples_per_second": "last evaluation, rows a second",
}


def write_page(
    folder: Path,
    facts: dict[str, Any],
    judgement: Judgement | str | None = None,
) -> Path:
    """Write the page beside the model.

    Args:
        folder: What the run left.
        facts: What the run was given, see `run_facts`; of its data under `splits`.
        judgement: What the model makes of its validation data, or why that is not known; None if
            it is not asked for.

    Returns:
        The page.
    """
    state = read_json(folder / "trainer_state.json")
    arguments = read_json(folder / "training_args.json")
    history = state["log_history"]
    title = f"{folder.absolute().name}: {facts.get('task', 'a run')}"
    parts = [f"<h1>{_safe(title)}</h1>"]
    parts.append(f"<p>{_safe(facts.get('base', ''))}, {state['global_step']} updates.</p>")
    curves = learning_curves(history)
    if curves is not None:
        parts += ["<h2>Learning curves</h2>", as_svg(curves)]
    parts += ["<h2>Evaluations</h2>", _evaluations(history)]
    if isinstance(judgement, str):
        parts.append(f"<p>{_safe(judgement)}</p>")
    elif judgement is not None:
        parts += _mistakes(judgement, facts["task"])
    parts += ["<h2>Speed</h2>", _speed(history)]
    splits = {name: found for name, found in facts.get("splits", {}).items() if found}
    if splits:
        drawn = length_histogram({name: found["histogram"] for name, found in splits.items()})
        parts += ["<h2>Lengths</h2>", as_svg(drawn), _data(splits)]
    parts += ["<h2>What was given</h2>", _table(facts.get("call", {}))]
    parts += ["<h2>All arguments</h2>", _table(arguments)]
    parts += ["<h2>Versions</h2>", _table(facts.get("versions", {}))]
    page = folder / "report.html"
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head = f"<meta charset='utf-8'>{policy}<title>{_safe(title)}</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    page.write_text(
        f"<!doctype html><html><head>{head}</head><body>{body}</body></html>\n", "utf-8"
    )
    return page


def _mistakes(judgement: Judgement, task: str) -> list[str]:
    """What is taken for what, and the rows with the highest loss."""
    pairs, rows = judgement.pairs, judgement.rows
    first = pairs[0][0] if pairs else None
    if not pairs:
        title, drawn = "Answers", "<p>No validation token was predicted.</p>"
    elif isinstance(first, float):
        title, drawn = "Right and predicted scores", as_svg(scatter(pairs))
    elif isinstance(first, list):
        title, drawn = "Labels", _by_label(pairs)
    elif task == "sequence-sequence":
        scores = [sentence_chrf(said, right.split(" | ")).score for right, said in pairs]
        title, drawn = "Likeness to the reference", as_svg(histogram(scores, "chrF of a row"))
    elif task.startswith("language"):
        title, drawn = "Tokens taken for others", _confused(pairs)
    else:
        title, drawn = "Confusion matrix", confusion(pairs)
    parts = [f"<h2>{title}, of {len(rows):,} validation rows</h2>", drawn]
    parts.append("<h2>Rows with the highest loss</h2>")
    lines = ["<tr><th>loss</th><th>text</th><th>right</th><th>predicted</th>"]
    for row in rows[:WORST]:
        cells = "".join(f"<td>{_safe(each)}</td>" for each in row[:3])
        lines.append(f"<tr><td class=n>{row.loss:.3f}</td>{cells}")
    return [*parts, f"<table id=worst>{''.join(lines)}</table>"]


def _by_label(pairs: Sequence[tuple[list[str], list[str]]]) -> str:
    """How well each label is found, where a row may have several."""
    names = sorted({name for pair in pairs for each in pair for name in each})
    rows = ["<tr><th>label</th><th>rows</th><th>predicted</th><th>both</th><th>F1</th>"]
    for name in names:
        there = sum(name in right for right, _ in pairs)
        said = sum(name in found for _, found in pairs)
        both = sum(name in right and name in found for right, found in pairs)
        cells = "".join(f"<td class=n>{each}</td>" for each in (there, said, both))
        rows.append(f"<tr><th>{_safe(name)}</th>{cells}<td class=n>{2 * both / (there + said):.3f}")
    return f"<table>{''.join(rows)}</table>"


def _confused(pairs: Sequence[tuple[str, str]]) -> str:
    """The commonest mistakes among tokens."""
    wrong = Counter(pair for pair in pairs if pair[0] != pair[1])
    share = 1 - wrong.total() / len(pairs)
    rows = ["<tr><th>right</th><th>predicted</th><th>times</th>"]
    for (right, said), count in wrong.most_common(WORST):
        rows.append(f"<tr><td>{_safe(right)}</td><td>{_safe(said)}</td><td class=n>{count}</td>")
    told = f"<p>{share:.1%} of {len(pairs):,} tokens are right.</p>"
    return f"{told}<table>{''.join(rows)}</table>"


def _speed(history: Sequence[dict[str, Any]]) -> str:
    last = {name: entry[name] for entry in history for name in SPEEDS if name in entry}
    rows = (f"<tr><td>{SPEEDS[name]}</td><td class=n>{last[name]:,.2f}</td>" for name in last)
    return f"<table>{''.join(rows)}</table>"


def confusion(pairs: Sequence[tuple[str, str]]) -> str:
    """What is what (down) and what it was taken for (across), as a table.

    Args:
        pairs: Right and predicted name.
    """
    names = sorted({name for pair in pairs for name in pair})
    if len(names) > MOST_CLASSES:
        return f"<p>{len(names)} classes: too many to show.</p>"
    index = {name: place for place, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), int)
    for true, predicted in pairs:
        counts[index[true], index[predicted]] += 1
    rows = ["<tr><th>right \\ predicted</th>" + "".join(f"<th>{_safe(n)}</th>" for n in names)]
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
    rows = ["<tr><th>split</th><th>rows</th><th>inputs</th><th>tokens</th><th>padding</th>"]
    rows[0] += "<th>classes</th>"
    for name, found in splits.items():
        labels = ", ".join(f"{label} {count:,}" for label, count in found.get("labels", {}).items())
        numbers = "".join(f"<td class=n>{found[n]:,}</td>" for n in ("rows", "inputs", "tokens"))
        numbers += f"<td class=n>{found['padding']:.1%}</td>"
        rows.append(f"<tr><td>{_safe(name)}</td>{numbers}<td>{_safe(labels)}</td>")
    return f"<table>{''.join(rows)}</table>"


def _table(values: dict[str, Any]) -> str:
    rows = (f"<tr><td>{_safe(k)}</td><td><code>{_safe(v)}</code></td>" for k, v in values.items())
    return f"<table>{''.join(rows)}</table>"


def _safe(value: Any) -> str:
    return html.escape(str(value))
