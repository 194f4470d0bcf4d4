"""Figures of the reports, each a piece of SVG that stands inside a page. Drawn by matplotlib (extra `report`).

Every function takes plain arrays and returns "<svg ...>"; without matplotlib it raises ImportError.
"""

import io
import itertools
from collections.abc import Callable

import numpy as np

BLUE, RED, GREY = "#2563a8", "#c2452d", "#8a8f98"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "axes.axisbelow": True,
    "svg.fonttype": "none",  # text stays text: small, and it can be searched and read aloud
    "svg.hashsalt": "rm",  # the same figure has the same bytes
}


def _drawn(title: str, x: str, y: str, draw: Callable) -> str:
    """A figure that fits a phone's width, as SVG that scales with the page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set(title=title, xlabel=x, ylabel=y)
        out = io.StringIO()
        figure.savefig(out, format="svg", dpi=150, transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def margins(margin: np.ndarray) -> str:
    """Histogram of (P,) margins, wrong pairs in another colour."""

    def draw(axes):
        low, high = np.minimum(np.quantile(margin, 0.002), 0), np.maximum(np.quantile(margin, 0.998), 0)
        width = (high - low) / 40 or 1.0
        edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)  # no bar spans zero
        for sign, colour, label in ((-1, RED, "ranked wrong"), (1, BLUE, "ranked right")):
            axes.hist(np.clip(margin[margin * sign > 0], edges[0], edges[-1]), edges, color=colour, label=label)
        axes.legend(frameon=False)

    return _drawn("Margins", "reward of the better minus the worse", "pairs", draw)


def reliability(bins: list[dict]) -> str:
    """Accuracy with its interval against confidence: `metrics.calibration(...)["reliability"]`."""

    def draw(axes):
        filled = [b for b in bins if b["n"]]
        x, y = [b["confidence"] for b in filled], np.array([b["accuracy"] for b in filled])
        low, high = np.array([b["ci95"] for b in filled]).reshape(-1, 2).T
        axes.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", label="as often right as sure")
        axes.errorbar(x, y, np.maximum(0, [y - low, high - y]), fmt="o", color=BLUE, markersize=4, label="model, 95 %")
        axes.set_ylim(0, 1.02)
        axes.legend(frameon=False, loc="lower left")

    return _drawn("Reliability", "confidence: sigmoid of |margin|", "accuracy", draw)


def accuracies(title: str, x: str, rows: dict[str, dict]) -> str:
    """Bars of a table {name: {"n", "accuracy", "ci95"}}."""

    def draw(axes):
        filled = {name: row for name, row in rows.items() if row["n"]}
        y = np.array([row["accuracy"] for row in filled.values()])
        low, high = np.array([row["ci95"] for row in filled.values()]).reshape(-1, 2).T
        axes.bar(range(len(y)), y, yerr=np.maximum(0, [y - low, high - y]), color=BLUE, ecolor=GREY, width=0.7)
        axes.axhline(0.5, color=GREY, linestyle="--")
        axes.set_xticks(range(len(y)), [f"{name}\n({row['n']:,})" for name, row in filled.items()], fontsize=7)
        axes.set_ylim(0, 1)
        axes.grid(axis="x", visible=False)

    return _drawn(title, x, "accuracy", draw)


def length(lengths: np.ndarray, rewards: np.ndarray) -> str:
    """Every reply's reward against its length, (R,) both, and the mean reward in tenths of the replies."""

    def draw(axes):
        axes.scatter(lengths + 1, rewards, s=5, color=BLUE, alpha=0.25, linewidths=0, rasterized=True)
        tenths = [part for part in np.array_split(np.argsort(lengths, kind="stable"), 10) if len(part)]
        middle = [np.median(lengths[part]) + 1 for part in tenths]
        axes.plot(middle, [rewards[part].mean() for part in tenths], color=RED, label="mean")
        axes.set_xscale("log")
        axes.legend(frameon=False)

    return _drawn("Reward against length", "characters of the answer", "reward", draw)


def curves(title: str, y: str, lines: dict[str, tuple[list, list]]) -> str:
    """Curves over steps: {label: (steps, values)}; a lone point is drawn as one."""

    def draw(axes):
        colours = itertools.cycle([BLUE, RED, GREY])
        for (label, (steps, values)), colour in zip(lines.items(), colours, strict=False):
            axes.plot(steps, values, color=colour, label=label, linewidth=1.3, marker="." if len(steps) < 30 else None)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(lines) > 1:
            axes.legend(frameon=False)

    return _drawn(title, "step", y, draw)
