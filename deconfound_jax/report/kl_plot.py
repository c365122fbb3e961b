"""Curves against KL from the reference, one panel a condition: over-optimisation is where the truth turns down."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from deconfound_jax.report.plots import color

_STYLE = {"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.titlesize": 9.5}
_STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "text.parse_math": False}
_COLUMNS = 3


class Line(NamedTuple):
    """One curve; lines of one name share a colour."""

    name: str
    kl: Sequence[float]  # nats a text
    value: Sequence[float]
    error: Sequence[float] | None = None  # half the height of the band around it
    style: str = "-"


def kl_png(path: str | epath.Path, panels: Mapping[str, Sequence[Line]], label: str, dashed: str = "") -> None:
    """Panels of curves against KL as a PNG on white; a name stands in the legend once.

    Args:
      path: the file to write.
      panels: title -> its curves.
      label: of the vertical axis.
      dashed: what dashed curves are, for the legend.
    """
    columns = min(len(panels), _COLUMNS)
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.6 * max(columns, 2), 2.9 * lines), layout="constrained")
        axes = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axis, (title, curves) in zip(axes, panels.items(), strict=False):
            named = set()
            for curve in curves:
                kl, value = np.asarray(curve.kl, float), np.asarray(curve.value, float)
                shown = None if curve.name in named else curve.name
                named.add(curve.name)
                axis.plot(kl, value, curve.style, color=color(curve.name), linewidth=1.5, label=shown)
                if curve.error is not None:
                    error = np.asarray(curve.error, float)
                    axis.fill_between(kl, value - error, value + error, color=color(curve.name), alpha=0.18, lw=0)
            axis.axhline(0, color="#222222", linewidth=0.6, alpha=0.35)
            axis.set(title=title, xlabel="KL from the reference, nats a text", ylabel=label)
        for axis in axes[len(panels) :]:
            axis.remove()
        if dashed:
            axes[0].plot([], [], "--", color="#555555", linewidth=1.5, label=dashed)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names))
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    epath.Path(path).write_bytes(image.getvalue())
