"""A process's resident set along a run: flat where memory does not grow with rows."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
from etils import epath
from matplotlib.figure import Figure

from deconfound_jax.report.plots import color

_STYLE = {"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 10}
_STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def memory_png(path: str | epath.Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """Resident set against time as a PNG on white.

    Args:
      path: the file to write.
      curves: name of a run -> (seconds since its start, GB), of equal length.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 3.4), layout="constrained")
        axis = figure.subplots()
        for name, (seconds, gigabytes) in curves.items():
            axis.plot(seconds, gigabytes, color=color(name), linewidth=1.6, label=name)
        axis.set(xlabel="seconds", ylabel="resident set, GB", ylim=(0, None))
        axis.legend()
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    epath.Path(path).write_bytes(image.getvalue())
