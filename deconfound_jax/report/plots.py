"""Plots as inline SVG strings, drawn with matplotlib's objects and never its global figure.

Letters and axes are `currentColor` and grounds are transparent, so that a plot follows
the page into dark mode. Equal numbers give equal bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import chex
import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Lightness and marker differ along with hue: the plots are read in grey print, too.
COLORS = {
    "naive": "#e0812a",
    "covariate": "#7d97b0",
    "deconfounded": "#1e8a5b",
    "joint": "#7a4fa8",
    "sft": "#8a8a8a",
}
MARKERS = {"naive": "o", "covariate": "s", "deconfounded": "D", "joint": "^", "sft": "x"}
_OTHER_COLORS = ("#b5495b", "#3f7fbf", "#a08a2c", "#4d9a9a", "#c26fb0")
_INK = "#010203"  # stands for currentColor until the SVG is text
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a column named a$b$c is no formula
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib's own: the layout is the same on every machine
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.dpi": 100,
} | {f"{part}.color": _INK for part in ("text", "xtick", "ytick")}
_STYLE |= {f"axes.{part}color": _INK for part in ("edge", "label", "title")}
_CLOUD_DPI = 160  # clouds of points become pictures: 4,000 vector marks weigh a megabyte


class Effect(NamedTuple):
    """What was taken out for one confounder: posterior mean and 90% interval."""

    name: str
    mean: float
    low: float
    high: float
    unit: str = ""


def color(method: str) -> str:
    """The colour of a method: the same in every plot and table, for any name."""
    return COLORS.get(method) or _OTHER_COLORS[sum(method.encode()) % len(_OTHER_COLORS)]


def effects(rows: Sequence[Effect]) -> str:
    """Dots and intervals, one row an effect, one panel a unit (units share no axis)."""
    units = list(dict.fromkeys(row.unit for row in rows))
    counts = [sum(row.unit == unit for row in rows) for unit in units]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 0.3 * len(rows) + 0.75 * len(units) + 0.1), layout="constrained")
        axes = figure.subplots(len(units), 1, squeeze=False, gridspec_kw={"height_ratios": [n + 0.8 for n in counts]})
        for unit, axis in zip(units, axes[:, 0], strict=True):
            panel = [row for row in rows if row.unit == unit]
            mean, low, high = np.array([(row.mean, row.low, row.high) for row in panel], float).T
            place = np.arange(len(panel))
            axis.axvline(0, color=_INK, linewidth=0.7, alpha=0.45)
            axis.hlines(place, low, high, color=COLORS["deconfounded"], linewidth=2.2)
            axis.plot(mean, place, "o", color=COLORS["deconfounded"], markersize=5.5)
            axis.set(yticks=place, ylim=(len(panel) - 0.4, -0.6), xlabel=unit)
            axis.set_yticklabels([row.name for row in panel])
            axis.tick_params(axis="y", length=0)
        return _svg(figure, "effects")


def reward_against_confounder(
    confounder: str, value_n: np.ndarray, rewards: Mapping[str, np.ndarray], correlations: Mapping[str, float]
) -> str:
    """One panel a method: reward against a confounder, before and after.

    Args:
      confounder: the column's name.
      value_n: its values; text is drawn as levels in sorted order.
      rewards: method -> reward_n, "naive" and "deconfounded" for before and after.
      correlations: method -> the number for the title, as the tables count it.
    """
    value_n = np.asarray(value_n)
    chex.assert_equal_shape([value_n, *map(np.asarray, rewards.values())])
    levels, label = None, confounder
    if value_n.dtype.kind in "OUS":
        levels, value_n = np.unique(value_n.astype(str), return_inverse=True)
        label = f"{confounder} ({len(levels)} levels)"
    titles = {name: f"{name}: correlation {_signed(correlations[name])}" for name in rewards}
    with matplotlib.rc_context(_STYLE):
        figure, axes = _clouds(value_n.astype(float), rewards, titles, label, levels is not None)
        for axis in axes if levels is not None and len(levels) <= 6 else ():
            axis.set_xticks(range(len(levels)), [level if len(level) < 15 else f"{level[:14]}…" for level in levels])
        return _svg(figure, f"confounder {confounder}")


def reward_against_truth(truth_n: np.ndarray, rewards: Mapping[str, np.ndarray]) -> str:
    """One panel a method: reward against the text's true effect, where it is known."""
    with matplotlib.rc_context(_STYLE):
        return _svg(_truth(truth_n, rewards), "truth")


def share_against_kl(curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]], kl: float) -> str:
    """Share of the attainable gain against KL from the reference, along training.

    Args:
      curves: method -> one curve a seed; a curve is (KL in nats a text, share) points.
      kl: where policies are compared, drawn as a vertical line.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 3.9), layout="constrained")
        axis = figure.subplots()
        axis.axvline(kl, color=_INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
        axis.axhline(0, color=_INK, linewidth=0.6, alpha=0.35)
        for method, seeds in curves.items():
            for i, curve in enumerate(seeds):
                point_kl, share = np.array(curve, float).reshape(-1, 2).T
                axis.plot(
                    point_kl, share, color=color(method), marker=MARKERS.get(method, "v"), markersize=3.5,
                    linewidth=1.3, alpha=0.8, label=method if i == 0 else None,
                )  # fmt: skip
        axis.set(xlabel=f"KL from the reference, nats a text (compared at {kl:g})", ylabel="share of attainable gain")
        axis.legend()
        return _svg(figure, "share")


def truth_png(path: str | epath.Path, truth_n: np.ndarray, rewards: Mapping[str, np.ndarray]) -> None:
    """`reward_against_truth` as a PNG on white, for pages that show no inline SVG."""
    ink = {key: "#222222" if value == _INK else value for key, value in _STYLE.items()}
    with matplotlib.rc_context(ink), warnings.catch_warnings():
        _ignore_missing_glyphs()
        image = io.BytesIO()
        figure = _truth(truth_n, rewards)
        figure.savefig(image, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    epath.Path(path).write_bytes(image.getvalue())


def _truth(truth_n: np.ndarray, rewards: Mapping[str, np.ndarray]) -> Figure:
    truth_n = np.asarray(truth_n, float)
    chex.assert_equal_shape([truth_n, *map(np.asarray, rewards.values())])
    titles = {name: f"{name}: correlation {_signed(_pearson(truth_n, reward_n))}" for name, reward_n in rewards.items()}
    return _clouds(truth_n, rewards, titles, "true effect of the text")[0]


def _clouds(
    x_n: np.ndarray, rewards: Mapping[str, np.ndarray], titles: Mapping[str, str], label: str, levels: bool = False
) -> tuple[Figure, list[Axes]]:
    """Panels of points with the mean of y over tenths of x; one y axis each, for scales differ."""
    columns = min(len(rewards), 3)
    lines = -(-len(rewards) // columns)
    figure = Figure(figsize=(3.8 * max(columns, 2), 3.1 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    # Levels are spread a little, by multiples of the golden ratio: a random jitter would need a seed.
    place_n = x_n + 0.6 * (np.arange(len(x_n)) * 0.618034 % 1 - 0.5) if levels else x_n
    dots = {"markersize": 3, "markeredgewidth": 0, "rasterized": True}
    alpha = float(np.clip(30 / np.sqrt(len(x_n)), 0.08, 0.8))
    for axis, (name, reward_n) in zip(axes, rewards.items(), strict=False):
        reward_n = np.asarray(reward_n, float)
        axis.plot(place_n, reward_n, "o", color=color(name), alpha=alpha, **dots)
        axis.plot(*_binned_means(x_n, reward_n), "o-", color=_INK, markersize=3, linewidth=1.3)
        axis.set(xlabel=label, ylabel="reward", title=titles[name])
    for axis in axes[len(rewards) :]:
        axis.remove()
    return figure, axes[: len(rewards)]


def _binned_means(x_n: np.ndarray, y_n: np.ndarray, bins: int = 10) -> tuple[np.ndarray, np.ndarray]:
    values = np.unique(x_n)
    if len(values) > 2 * bins:
        edges = np.unique(np.quantile(x_n, np.linspace(0, 1, bins + 1)[1:-1]))
        code_n = np.searchsorted(edges, x_n, side="right")
    else:
        code_n = np.searchsorted(values, x_n)
    count = np.bincount(code_n)
    some = count > 0
    means = (np.bincount(code_n, weights=w)[some] / count[some] for w in (x_n, y_n))
    return tuple(means)


def _pearson(a_n: np.ndarray, b_n: np.ndarray) -> float:
    a_n, b_n = a_n - np.mean(a_n), np.asarray(b_n, float) - np.mean(b_n)
    scale = np.sqrt(np.sum(a_n**2) * np.sum(b_n**2))
    return float(np.sum(a_n * b_n) / scale) if scale > 0 else 0.0


def _signed(number: float) -> str:
    return f"{number:.2f}".replace("-", "−")


def _ignore_missing_glyphs() -> None:
    # The layout's font lacks some scripts; the reader's browser does not.
    warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)


def _svg(figure: Figure, name: str) -> str:
    """The figure as one <svg> element, without XML header, group ids and metadata.

    `name` salts the ids that are left, so two plots of a page never share one.
    """
    text, nothing = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        _ignore_missing_glyphs()
        figure.savefig(text, format="svg", transparent=True, dpi=_CLOUD_DPI, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return re.sub(r'width="([\d.]+)pt" height="[\d.]+pt"', r'style="width:100%;max-width:\1pt"', svg, count=1).strip()
