"""Pictures of what benchmarks measured, for light and for dark pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("Agg")
THEMES = {
    "light": {"paper": "#ffffff", "ink": "#24292f", "faint": "#d0d7de"},
    "dark": {"paper": "#0d1117", "ink": "#e6edf3", "faint": "#30363d"},
}
COLOURS = {
    "transformers.Trainer": "#d9772b",
    "group_by_length": "#d9a62b",
    "txtai": "#7d6ad6",
    "hflit in MKL": "#3b82c4",
    "bare loop": "#8b949e",
}


@contextmanager
def themed(path: Path, theme: str, **size: Any) -> Iterator[Any]:
    """Axes to draw on; afterwards `path` with the name of the theme is written as a PNG."""
    colours = THEMES[theme]
    ink = {f"{part}.color": colours["ink"] for part in ("text", "xtick", "ytick")}
    paper = {f"{part}.facecolor": colours["paper"] for part in ("figure", "axes", "savefig")}
    edges = {"axes.edgecolor": colours["faint"], "axes.labelcolor": colours["ink"]}
    with plt.rc_context({**ink, **paper, **edges, "grid.color": colours["faint"]}):
        figure, axes = plt.subplots(**size, layout="constrained")
        axes.spines[["top", "right"]].set_visible(False)
        yield axes
        figure.savefig(f"{path}_{theme}.png", dpi=130)
        plt.close(figure)


def speed_picture(ratios: dict[str, dict[str, tuple[float, float, float]]], path: Path) -> None:
    """Bars of how many times as long as hflit each trainer takes, with their ranges.

    Args:
        ratios: Case -> trainer -> median, lowest and highest ratio.
        path: Where, without an ending.
    """
    for theme in THEMES:
        with themed(path, theme, figsize=(9, 0.8 + 0.27 * sum(map(len, ratios.values())))) as axes:
            place, ticks, named = 0.0, [], set()
            for case, peers in ratios.items():
                ticks.append((place + (len(peers) - 1) / 2, case.replace(", ", "\n", 1)))
                for peer, (middle, low, high) in peers.items():
                    axes.barh(
                        place, middle, color=COLOURS[peer], height=0.8,
                        xerr=[[middle - low], [high - middle]], ecolor=THEMES[theme]["ink"],
                        error_kw={"linewidth": 0.8}, label=None if peer in named else peer,
                    )  # fmt: skip
                    axes.text(high + 0.05, place, f"{middle:.2f}", va="center", fontsize=8)
                    named.add(peer)
                    place += 1
                place += 0.8
            axes.axvline(1, color=THEMES[theme]["ink"], linewidth=1)
            axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=8)
            axes.invert_yaxis()
            axes.set_xlabel("time, as a multiple of hflit's (1 is hflit; more is slower)")
            axes.legend(frameon=False, fontsize=8, ncols=5, loc="lower left", bbox_to_anchor=(0, 1))


def growth_picture(grown: list[tuple[int, int, float, float, float]], path: Path) -> None:
    """Seconds and memory over the number of rows, on logarithmic scales.

    Args:
        grown: Rows, tokens, seconds to tokenize, seconds to read an epoch, MiB gained.
        path: Where, without an ending.
    """
    rows = [each[0] for each in grown]
    lines = {"seconds to tokenize": 2, "seconds to read an epoch": 3, "MiB gained": 4}
    for theme in THEMES:
        with themed(path, theme, figsize=(6, 3.6)) as axes:
            for (name, column), colour in zip(lines.items(), COLOURS.values(), strict=False):
                axes.loglog(rows, [each[column] for each in grown], "o-", color=colour, label=name)
            first = [count * grown[0][2] / rows[0] for count in rows]
            axes.loglog(rows, first, ":", color=THEMES[theme]["ink"], label="linear")
            axes.set_xlabel("rows")
            axes.grid(alpha=0.4)
            axes.legend(frameon=False, fontsize=8)
