"""Figures of the reports, as SVG to embed in an HTML page. Drawn with matplotlib (the extra `report`).

Every function takes plain arrays and returns "<svg ...>". Without matplotlib it raises ImportError.

Shapes: R replies, P ordered pairs.
"""

import html
import io
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rm.terminal import printable

BLUE, RED, GREY, GREEN, VIOLET = "#2563a8", "#c2452d", "#8a8f98", "#3b8a4b", "#7d4fa3"
COLOURS = (BLUE, RED, GREEN, VIOLET, "#b8860b", "#1b9aaa", "#d1508c", "#5a4632")  # of several curves; then again
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "axes.axisbelow": True,
    "svg.fonttype": "none",  # keep text as text, not as paths: smaller, searchable, readable by screen readers
    "svg.hashsalt": "rm",  # fixed element ids, so that the same figure has the same bytes
}


def _render(title: str, x_label: str, y_label: str, draw: Callable, below: float = 0) -> str:
    """Draw one figure, as SVG that scales with the page and is legible at the width of a phone.

    Args:
        draw: function that draws into the matplotlib Axes it is given.
        below: inches for what it draws below them.
    """
    # Imported here because matplotlib is optional.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.0 + below), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set(title=_shown(title), xlabel=x_label, ylabel=_shown(y_label))
        out = io.StringIO()
        figure.savefig(out, format="svg", dpi=150, transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration, which is not allowed inside HTML
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(printable(title))}" ', 1)


def _shown(text: str) -> str:
    """A text of others as a label: matplotlib takes what stands between two $ for a formula."""
    return printable(text).replace("$", r"\$")


def margins(margin: np.ndarray) -> str:
    """Histogram of (P,) margins; correctly and incorrectly ranked pairs differ in colour."""

    def draw(axes):
        # Outliers beyond the 0.2 % quantiles are drawn in the outermost bars.
        low, high = np.minimum(np.quantile(margin, 0.002), 0), np.maximum(np.quantile(margin, 0.998), 0)
        width = (high - low) / 40 or 1.0
        # Edges are multiples of the width, so that 0 is an edge and no bar mixes correct and incorrect pairs.
        edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)
        for sign, colour, label in ((-1, RED, "incorrect"), (1, BLUE, "correct")):
            axes.hist(np.clip(margin[margin * sign > 0], edges[0], edges[-1]), edges, color=colour, label=label)
        axes.legend(frameon=False)

    return _render("Reward margins", "reward margin (better minus worse reply)", "number of pairs", draw)


def reliability(bins: list[dict]) -> str:
    """Reliability diagram: accuracy with its confidence interval against the model's confidence.

    Args:
        bins: `metrics.calibration(...)["reliability"]`.
    """

    def draw(axes):
        filled = [b for b in bins if b["n"]]
        x, y = [b["confidence"] for b in filled], np.array([b["accuracy"] for b in filled])
        errors = _error_bars(y, filled)
        axes.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", label="perfect calibration")
        axes.errorbar(x, y, errors, fmt="o", color=BLUE, markersize=4, label="model (95% CI)")
        axes.set_ylim(0, 1.02)
        axes.legend(frameon=False, loc="lower left")

    return _render("Reliability diagram", "confidence: sigmoid(|margin|)", "accuracy", draw)


def accuracies(title: str, x_label: str, rows: dict[str, dict]) -> str:
    """Bar chart of an accuracy table {name: {"n", "accuracy", "ci95"}}; rows without pairs are left out."""

    def draw(axes):
        filled = {name: row for name, row in rows.items() if row["n"]}
        y = np.array([row["accuracy"] for row in filled.values()])
        errors = _error_bars(y, list(filled.values()))
        axes.bar(range(len(y)), y, yerr=errors, color=BLUE, ecolor=GREY, width=0.7)
        axes.axhline(0.5, color=GREY, linestyle="--")
        axes.set_xticks(range(len(y)), [f"{name}\n({row['n']:,})" for name, row in filled.items()], fontsize=7)
        axes.set_ylim(0, 1)
        axes.grid(axis="x", visible=False)

    return _render(title, x_label, "accuracy", draw)


def by_epochs_of_sft(cells: dict[tuple[float, int], dict]) -> str:
    """Accuracy over epochs of SFT, a line for each rank: {(epochs, rank): {"accuracy", "ci95"}}, in order."""

    def draw(axes):
        ranks = sorted({rank for _, rank in cells})
        for rank, colour in zip(ranks, itertools.cycle(COLOURS), strict=False):
            rows = {epochs: cell for (epochs, of), cell in cells.items() if of == rank}
            x, y = np.array(list(rows)), np.array([row["accuracy"] for row in rows.values()])
            x = x + 0.03 * (ranks.index(rank) - (len(ranks) - 1) / 2)  # so that intervals are side by side
            axes.errorbar(x, y, _error_bars(y, list(rows.values())), color=colour, marker="o", label=f"rank {rank}")
        axes.set_xticks(sorted({epochs for epochs, _ in cells}))
        axes.legend(frameon=False)

    return _render("Reward models after SFT", "epochs of SFT", "accuracy (95% CI)", draw)


def _error_bars(y: np.ndarray, rows: list[dict]) -> np.ndarray:
    """(2, n) distances of n values from the lower and upper ends of their rows' "ci95"."""
    low, high = np.array([row["ci95"] for row in rows]).reshape(-1, 2).T
    # Rounding can make a distance slightly negative, which matplotlib rejects.
    return np.maximum(0, [y - low, high - y])


def length(lengths: np.ndarray, rewards: np.ndarray) -> str:
    """Scatter plot of every reply's reward against its length, (R,) both, with the mean of each length decile."""

    def draw(axes):
        # + 1 because the axis is logarithmic and an empty reply has length 0. A bitmap keeps the page small.
        axes.scatter(lengths + 1, rewards, s=5, color=BLUE, alpha=0.25, linewidths=0, rasterized=True)
        deciles = [part for part in np.array_split(np.argsort(lengths, kind="stable"), 10) if len(part)]
        medians = [np.median(lengths[part]) + 1 for part in deciles]
        axes.plot(medians, [rewards[part].mean() for part in deciles], color=RED, label="mean per length decile")
        axes.set_xscale("log")
        axes.legend(frameon=False)

    return _render("Reward vs. length", "reply length in characters", "reward", draw)


@dataclass(frozen=True)
class Curve:
    """Values over steps, and the step to mark, if any. Curves of one colour belong together."""

    steps: list
    values: list
    colour: str
    style: str | tuple = "-"
    marked: int | None = None


def curves(title: str, y_label: str, lines: dict[str, Curve]) -> str:
    """Line plot over steps: {label: curve}. Short curves have markers, so that a single point is visible.

    The legend of many curves, which would cover them, stands below.
    """
    rows = math.ceil(len(lines) / 2) if len(lines) > 4 else 0

    def draw(axes):
        for label, curve in lines.items():
            marker, label = "." if len(curve.steps) < 30 else None, _shown(label)
            style = {"linestyle": curve.style, "color": curve.colour, "marker": marker}
            axes.plot(curve.steps, curve.values, label=label, lw=1.3, **style)
            if curve.marked in curve.steps:
                value = curve.values[curve.steps.index(curve.marked)]
                axes.plot(curve.marked, value, "o", color=curve.colour, fillstyle="none", markersize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if rows:
            axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=7, handlelength=3)
        elif len(lines) > 1:
            axes.legend(frameon=False)

    return _render(title, "step", y_label, draw, below=0.16 * rows)
