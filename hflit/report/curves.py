"""Learning curves and histograms, drawn with matplotlib."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

SKIPPED = ("runtime", "per_second", "flos", "mem_", "epoch", "num_input_tokens")
MOST_DOTS = 200  # on a line; of more they hide it, and each takes 90 bytes of a page


def learning_curves(history: Sequence[dict[str, Any]]) -> Figure | None:
    """Losses, and the figures of the evaluations, over the updates; None if nothing was logged.

    Args:
        history: `log_history` of the run.
    """
    history = [
        {name: value for name, value in entry.items() if isinstance(value, (int, float))}
        for entry in history
    ]
    names = dict.fromkeys(name for entry in history for name in entry)
    metrics = [n for n in names if n.startswith("eval_") and not any(s in n for s in SKIPPED)]
    losses: list[str] = ["loss", "eval_loss"]
    shares = [n for n in metrics if max(abs(e[n]) for e in history if n in e) <= 1]
    panels = [
        ("loss", [n for n in losses if n in names]),
        ("evaluation", [n for n in shares if n not in losses]),
        ("evaluation", [n for n in metrics if n not in (*losses, *shares)]),  # 0 to 100, or more
        ("learning rate", [n for n in ("learning_rate",) if n in names]),
    ]
    panels = [(title, lines) for title, lines in panels if lines]
    if not panels:
        return None
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5 * across, 3.2 * down), layout="constrained")
    for place, (title, lines) in enumerate(panels, 1):
        axes = figure.add_subplot(down, across, place, title=title, xlabel="update")
        for name in lines:
            points = [(each["step"], each[name]) for each in history if name in each]
            dot = "." if len(points) <= MOST_DOTS else None
            axes.plot(*zip(*points, strict=True), marker=dot, label=name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def length_histogram(splits: dict[str, Sequence[Sequence[int]]]) -> Figure:
    """Inputs by their length in tokens.

    Args:
        splits: Name -> pairs of a length and the inputs up to it, as `data_facts` counts them.
    """
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens", ylabel="inputs")
    for name, pairs in splits.items():
        edges = [0, *(edge for edge, _ in pairs)]
        axes.stairs([count for _, count in pairs], edges, label=name, fill=True, alpha=0.5)
    axes.legend(fontsize="small")
    return figure


def scatter(pairs: Sequence[tuple[float, float]]) -> Figure:
    """Right and predicted scores, a point each, and where they would be equal."""
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="right", ylabel="predicted")
    right, said = zip(*pairs, strict=True)
    ends = [min(right), max(right)]
    axes.plot(ends, ends, color="0.7")
    axes.scatter(right, said, s=8, alpha=0.5)
    return figure


def histogram(values: Sequence[float], name: str) -> Figure:
    """How many rows have which value, from 0 to 100."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel=name, ylabel="rows")
    axes.hist(values, bins=20, range=(0, 100))
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as a picture."""
    _draw(FigureCanvasAgg(figure).print_png, path)


def as_svg(figure: Figure) -> str:
    """A figure as an element of a page."""
    drawn = io.StringIO()
    _draw(FigureCanvasSVG(figure).print_svg, drawn)
    text = drawn.getvalue()
    return text[text.index("<svg") :]


def _draw(draw: Any, target: Any) -> None:
    with warnings.catch_warnings():  # of letters that the font lacks
        warnings.simplefilter("ignore")
        draw(target, metadata={"Date": None} if isinstance(target, io.StringIO) else None)
