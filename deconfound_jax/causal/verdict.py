"""The verdict: may the posterior of a reward be trained on?

    not_identified   the data cannot tell the effect, whatever their number: refuse
    bounded          they allow an interval: only pairs of one sign over the whole interval may train (`interval`)
    consistent       nothing in them contradicts the design; what they cannot test is listed with the strength at which
                     the ranking flips

Checks that are tests share a family-wise level of 1% (Holm 1979): their `value` is the adjusted p-value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deconfound_jax.causal.describe import assumptions
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.sensitivity import (
    contrast,
    e_value,
    exclusion,
    ranking_contrast,
    risk_ratio,
    treatment_contrast,
)
from deconfound_jax.causal.spec import Prepared
from deconfound_jax.causal.verdict_checks import (
    Check,
    check_convergence,
    check_groups,
    check_placebos,
    check_predictive,
    check_rank,
    check_treatments,
)
from deconfound_jax.causal.verdict_instruments import check_instruments
from deconfound_jax.causal.working import raw
from deconfound_jax.config.verdict import Checks
from deconfound_jax.structs import Design

STATUSES = ("consistent", "bounded", "not_identified")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the checks add up to.

    gamma: (column, low, high) of every endogenous confounder, standardised, where its set is bounded.
    flips: strength of a violation at which the better half of the log's texts is no longer better:
      "unmeasured" (R^2 of an unseen cause with wording and with outcome), "exclusion <z>" (effect of the instrument
      itself, units of y per unit of z), "treatment <t>" (R^2) and "e-value <t>" of a declared treatment.
    """

    status: str
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    untestable: tuple[str, ...]
    checks: tuple[Check, ...]
    gamma: tuple[tuple[str, float, float], ...] = ()
    flips: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.status not in STATUSES:
            raise ValueError(f"Verdict.status: expected one of {STATUSES}, got {self.status!r}")

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"verdict: no check {name!r}; it has {[c.name for c in self.checks]}")

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that did not pass."""
        return tuple(c.name for c in self.checks if not c.passed)

    @property
    def gamma_range(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Lows and highs of gamma, as `interval.reward_interval` takes them."""
        return tuple(low for _, low, _ in self.gamma), tuple(high for _, _, high in self.gamma)

    def require(self, accept_risk: bool = False) -> Verdict:
        """Itself if consistent (or the risk is accepted); else ValueError with the failed checks and their remedies."""
        if self.status == "consistent" or accept_risk:
            return self
        raise ValueError(f"verdict {self.status}: " + " ".join(self.reasons) + " To go on anyway: accept_risk=True.")

    def __str__(self) -> str:
        lines = [self.status, *[f"  because {r}" for r in self.reasons], *[f"  warning: {w}" for w in self.warnings]]
        return "\n".join([*lines, *[f"  untestable: {u}" for u in self.untestable]])

    def to_json(self) -> dict[str, Any]:
        return _json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Verdict:
        checks = tuple(Check(**{k: _number(k, v) for k, v in check.items()}) for check in data["checks"])
        gamma = tuple((name, float(low), float(high)) for name, low, high in data["gamma"])
        words = [tuple(data[key]) for key in ("reasons", "warnings", "untestable")]
        return cls(data["status"], *words, checks, gamma, {k: float(v) for k, v in data["flips"].items()})


def verdict(
    posterior: Posterior,
    prepared: Prepared,
    config: Checks | None = None,
    *,
    groups_n: np.ndarray | None = None,
    placebo_outcome_n: np.ndarray | None = None,
    placebo_instrument_n: np.ndarray | None = None,
) -> Verdict:
    """Runs every check that the design and the data allow.

    Args:
      posterior, prepared: of one fit.
      config: limits; the defaults are the method's.
      groups_n: group of each row of the log (a test, a user): errors are clustered, groups counted and left out.
      placebo_outcome_n: (n,) an outcome that the text cannot move.
      placebo_instrument_n: (n,) a variable made like the instrument that can move neither p nor the outcome.

    Returns:
      A `Verdict`; `require()` refuses anything but `consistent`.

    Example:
      >>> verdict(posterior, prepared, groups_n=logs.columns["test"]).require()
    """
    config = config or Checks()
    found = raw(posterior, prepared, groups_n)
    checks = [*check_convergence(posterior, config), *check_rank(found, config)]
    checks += check_treatments(posterior, prepared, found, config)
    gamma: tuple = ()
    if prepared.spec.instruments and prepared.spec.structural(None):
        from_instruments, gamma = check_instruments(posterior, prepared, found, config)
        checks += from_instruments
    if groups_n is not None:
        checks += check_groups(posterior, prepared, groups_n, config)
    checks += check_placebos(posterior, prepared, groups_n, placebo_outcome_n, placebo_instrument_n, config)
    checks += check_predictive(posterior, prepared, groups_n, config)
    flips = _flips(posterior, prepared, found, groups_n)
    return decide(checks, posterior.design, config, gamma, flips)


def judged(posterior: Posterior, prepared: Prepared, config: Checks | None = None, **given) -> Posterior:
    """The posterior with its verdict attached: rewards made of it carry it, and it is saved with it.

    Args:
      given: as `verdict` takes them.
    """
    found = verdict(posterior, prepared, config, **given).to_json()
    return dataclasses.replace(posterior, diagnostics={**posterior.diagnostics, "verdict": found})


def decide(checks: Sequence[Check], design: Design, config: Checks, gamma=(), flips=None) -> Verdict:
    """Adjusts the tests' p-values and reads the status off the failed checks."""
    tests = [c for c in checks if c.test]
    adjusted = iter(holm([c.value for c in tests]))
    final = []
    for check in checks:
        if check.test:
            value = next(adjusted)
            check = dataclasses.replace(check, value=value, limit=config.family_level)
            check = dataclasses.replace(check, passed=value >= config.family_level)
        final.append(check)
    failed = [c for c in final if not c.passed]
    worst = {c.consequence for c in failed}
    status = "not_identified" if "not_identified" in worst else "bounded" if "bounded" in worst else "consistent"
    words = {c.name: f"{c.sentence} {c.remedy}".strip() for c in failed}
    reasons = tuple(words[c.name] for c in failed if c.consequence in ("not_identified", "bounded"))
    warnings = tuple(words[c.name] for c in failed if c.consequence == "warning")
    return Verdict(status, reasons, warnings, _untestable(design, flips or {}), tuple(final), tuple(gamma), flips or {})


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: reject those below a level, and some error among them has at most that level (Holm 1979)."""
    order = np.argsort(p_values)
    adjusted, running = np.zeros(len(p_values)), 0.0
    for rank, i in enumerate(order):
        running = max(running, min((len(p_values) - rank) * float(p_values[i]), 1.0))
        adjusted[i] = running
    return adjusted.tolist()


def _flips(posterior: Posterior, prepared: Prepared, found, groups_n) -> dict[str, float]:
    """Strengths at which the ranking of the log's texts, or the sign of a treatment's effect, flips."""
    flips: dict[str, float] = {}
    width = prepared.spec.blocks[0].stop
    if prepared.spec.selection:
        return flips  # the bounds are for a log of every row
    if width and prepared.spec.head is None:
        sd_d, mean_d = posterior.scaling["features.sd"], posterior.scaling["features.mean"]
        difference_d = ranking_contrast(posterior, prepared, found.text_nd * sd_d[None, :] + mean_d[None, :])
        if difference_d.any():
            flips["unmeasured"] = contrast(posterior, prepared, difference_d, groups_n).robustness
            if prepared.spec.instruments and prepared.spec.structural(None):
                for part in exclusion(posterior, prepared, difference_d):
                    flips[f"exclusion {part.instrument}"] = part.flip
    for term in posterior.design.terms:
        if term.kind == "treatment":
            effect = treatment_contrast(posterior, prepared, term.column, groups_n)
            flips[f"treatment {term.column}"] = effect.robustness
            ratio = risk_ratio(posterior, prepared, term.column, effect.estimate)
            if ratio is not None:
                flips[f"e-value {term.column}"] = e_value(ratio)
    return {name: value for name, value in flips.items() if math.isfinite(value)}


def _untestable(design: Design, flips: Mapping[str, float]) -> tuple[str, ...]:
    """Assumptions that no check can reject, the strength of a violation beside them."""
    found = []
    for label, sentence, checkable in assumptions(design):
        strengths = []
        if label == "A5" and "unmeasured" in flips:
            share = f"{flips['unmeasured']:.1%} of what is left of both wording and outcome"
            strengths.append(f"The better half of the texts would be no better if an unseen cause explained {share}.")
        if label == "A1":
            for name, value in flips.items():
                if name.startswith("exclusion "):
                    z = name.removeprefix("exclusion ")
                    strengths.append(f"It would be no better if {z} itself moved the outcome by {value:.3g} per unit.")
        if not checkable or strengths:
            found.append(" ".join([f"{label} {sentence}", *strengths]))
    return tuple(found)


def _json(value):
    if isinstance(value, Mapping):
        return {k: _json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return value


def _number(key: str, value):
    return float(value) if key in ("value", "limit") else value
