"""The report: one HTML file that opens offline, with nothing loaded from anywhere.

A caller fills a `Page`; `write` draws it. Whatever is empty leaves its section out.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from etils import epath

from deconfound_jax.report import plots
from deconfound_jax.report.plots import Effect

_HERE = epath.resource_path("deconfound_jax.report")
Rows = Sequence[Mapping[str, Any]]  # of a table: column -> number, string, Interval, None, or a list of these


class Interval(NamedTuple):
    """A table cell: a number with the ends of its interval."""

    mean: float
    low: float
    high: float


class Example(NamedTuple):
    """One logged text: its reward before, after, and the posterior's sd of the latter."""

    text: str
    naive: float
    deconfounded: float
    sd: float


class Cloud(NamedTuple):
    """Rewards of the same texts beside one confounder.

    value_n is numbers or text (levels); rewards and correlations are by method,
    correlations as the result tables count them.
    """

    confounder: str
    value_n: np.ndarray
    rewards: Mapping[str, np.ndarray]
    correlations: Mapping[str, float]


class Truth(NamedTuple):
    """Rewards of the same texts beside their true effect: simulations only."""

    truth_n: np.ndarray
    rewards: Mapping[str, np.ndarray]


class Curves(NamedTuple):
    """Policies along training: method -> one curve a seed of (KL, share) points."""

    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]]
    kl: float  # nats a text: where policies are compared


class Reproduction(NamedTuple):
    """What it takes to get the same numbers again."""

    command: str
    machine: str
    versions: Mapping[str, str]
    fingerprint: str  # of the data
    config: str  # JSON


@dataclasses.dataclass(frozen=True)
class Page:
    """Everything the report shows, in the order in which it shows it.

    `examples=None` (config: report.examples="none") leaves out all text from the log,
    and the policies' samples with it: a policy can repeat what it was trained on.
    Every string is escaped, except `diagram_svg`, which must come from
    `causal.describe.svg`.
    """

    title: str
    summary: str  # one sentence
    verdict: str = ""  # who wins, by how much, in how many seeds
    equations: Sequence[str] = ()
    diagram_svg: str = ""
    mermaid: str = ""
    effects: Sequence[Effect] = ()
    examples: Sequence[Example] | None = None
    samples: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)  # method -> texts
    clouds: Sequence[Cloud] = ()
    truth: Truth | None = None
    curves: Curves | None = None
    results: Rows = ()  # a row a method; a column "method" or "policy" gets the plots' colours
    seeds: Rows = ()  # a row a seed
    wins: str = ""  # e.g. "deconfounded beats naive in 5 of 5 seeds"
    held_out: Rows = ()  # scores on arms that no fit has seen
    checks: Rows = ()  # what the data were asked, and what they said
    assumptions: Sequence[tuple[str, str, bool]] = ()  # of `causal.describe.assumptions`
    limits: Sequence[str] = ()
    reproduction: Reproduction | None = None


def render(page: Page) -> str:
    """The page as one HTML string; equal pages give equal strings.

    Example:
      >>> "<h1>Newsroom</h1>" in render(Page(title="Newsroom", summary="A test."))
      True
    """
    drawn = {
        "effects": plots.effects(page.effects) if page.effects else "",
        "clouds": [plots.reward_against_confounder(*cloud) for cloud in page.clouds],
        "truth": plots.reward_against_truth(*page.truth) if page.truth else "",
        "curves": plots.share_against_kl(*page.curves) if page.curves else "",
    }
    effects = [{"confounder": e.name, "removed": Interval(*e[1:4]), "unit": e.unit} for e in page.effects]
    css = (_HERE / "page.css").read_text(encoding="utf-8")
    return _template().render(page=page, plots=drawn, effects=effects, css=css)


def write(page: Page, path: str | epath.Path) -> None:
    """Renders the page into the file `path`, whose folder is made where it is missing."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render(page).encode("utf-8", "replace"))


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": _cell, "columns": _columns, "color": plots.color}
    return environment.from_string((_HERE / "page.html.j2").read_text(encoding="utf-8"))


def _columns(rows: Rows) -> dict[str, str]:
    """Every column of a table in order of appearance -> "number" or "" (words, which stand left)."""
    values = {name: [row[name] for row in rows if row.get(name) is not None] for row in rows for name in row}
    return {name: "number" if all(map(_numeric, some)) else "" for name, some in values.items()}


def _numeric(value: Any) -> bool:
    return isinstance(value, (numbers.Real, Interval)) and not isinstance(value, (bool, np.bool_))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Interval):
        return f"{_cell(value.mean)} [{_cell(value.low)}, {_cell(value.high)}]"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple, np.ndarray)):
        return ", ".join(_cell(v) for v in value)
    if isinstance(value, numbers.Integral):
        return f"{value:,}".replace("-", "−")
    if isinstance(value, numbers.Real):
        return _decimal(float(value))
    return str(value)


def _decimal(number: float) -> str:
    if not np.isfinite(number):
        return "–" if np.isnan(number) else ("∞" if number > 0 else "−∞")
    size = abs(number)
    if size and size < 0.0005:
        return f"{number:.1e}".replace("-", "−")
    digits = 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0
    return f"{number:,.{digits}f}".replace("-", "−")
