"""The checks of a verdict, one function a question: a value, its limit, what follows, and what would mend it."""

from __future__ import annotations

import dataclasses

import numpy as np

from deconfound_jax.causal.builders import site_of
from deconfound_jax.causal.overlap import controls_of, culprits, overlap, positivity
from deconfound_jax.causal.placebo import leave_a_group_out, placebo_instrument, placebo_outcome
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.predictive import predictive_checks
from deconfound_jax.causal.spec import Prepared
from deconfound_jax.causal.working import Raw
from deconfound_jax.config.verdict import Checks

CONSEQUENCES = ("not_identified", "bounded", "warning", "note")


@dataclasses.dataclass(frozen=True)
class Check:
    """One question to the data.

    value, limit: what was found and where it fails; for a test the p-value, adjusted, and the family's level.
    consequence: status that a failure leads to, or a warning; a note never fails.
    """

    name: str
    value: float
    limit: float
    passed: bool
    consequence: str
    sentence: str
    remedy: str
    test: bool = False

    def __post_init__(self):
        if self.consequence not in CONSEQUENCES:
            raise ValueError(f"Check.consequence: expected one of {CONSEQUENCES}, got {self.consequence!r}")


def check_convergence(posterior: Posterior, config: Checks) -> list[Check]:
    """The fit's own diagnosis: Pareto k of importance weights, R-hat, effective draws, divergences."""
    seen, parts, fine = posterior.diagnostics, [], posterior.converged
    for key, name, limit, at_most in (
        ("pareto_k", "Pareto k", config.pareto_k, True),
        ("rhat", "R-hat", config.rhat, True),
        ("divergent", "share of divergences", config.divergent, True),
        ("ess", "effective draws", config.ess, False),
    ):
        if key in seen:
            value = float(seen[key])
            fine = fine and (value <= limit if at_most else value >= limit)  # NaN fails
            parts.append(f"{name} {value:.3g} ({'at most' if at_most else 'at least'} {limit:g})")
    if "effective_draws" in seen:  # of importance weights: k is what says whether they can be trusted
        parts.append(f"weights worth {float(seen['effective_draws']):.0f} draws")
    method = seen.get("method", "the fit")
    sentence = f"The fit by {method} {'converged' if fine else 'did not converge'}: {', '.join(parts) or 'no numbers'}."
    remedy = "Take more draws or steps, fit=nuts, or a simpler design."
    return [Check("convergence", float(fine), 1.0, fine, "not_identified", sentence, remedy)]


def check_rank(found: Raw, config: Checks) -> list[Check]:
    """Positivity of the text: every contrast of logged texts varies given terms and levels (A6)."""
    rows, width = float(found.frequency_n.sum()), found.text_nd.shape[1]
    spare = rows - found.controls_nq.shape[1] - sum(len(np.unique(c)) for c in found.codes_nc.T)
    if not width:
        return []
    if width >= spare:
        sentence = f"{width} features against {rows:.0f} rows less the terms: rank is not checked, the prior decides."
        return [Check("rank", spare, float(width), False, "warning", sentence, "Take fewer features or more rows.")]
    seen = positivity(found)
    fine = seen.share >= config.overlap_share and seen.effective_rows >= config.overlap_rows and not seen.deficient
    sentence = (
        f"Given the terms {seen.share:.1%} of a text contrast's information is left, {seen.effective_rows:.0f} rows' "
        f"worth; {seen.deficient} of {seen.rank} directions of the features are gone."
    )
    remedy = ""
    if not fine:
        names = culprits(found, config.overlap_share)
        which = f"{' and '.join(names)} determine{'s' * (len(names) == 1)}" if names else "the terms together determine"
        remedy = f"{which} the text: drop or coarsen, or log texts that differ where the terms are equal."
        remedy = remedy[0].upper() + remedy[1:]
    return [Check("rank", seen.share, config.overlap_share, fine, "not_identified", sentence, remedy)]


def check_treatments(posterior: Posterior, prepared: Prepared, found: Raw, config: Checks) -> list[Check]:
    """Overlap of each declared treatment given text, terms and levels."""
    checks = []
    for term in posterior.design.terms:
        if term.kind != "treatment":
            continue
        name = site_of(term.column)
        block = next(b for b in prepared.spec.blocks if b.name == name)
        treatment_n = np.asarray(prepared.rows.columns_nq, np.float64)[found.seen_n, block.start]
        rest = _without(found, name)
        seen = overlap(treatment_n, controls_of(rest), found.frequency_n)
        fine = seen.share >= config.overlap_share and seen.effective_rows >= config.overlap_rows
        sentence = (
            f"Given text and terms the log is worth {seen.effective_rows:.0f} rows ({seen.share:.1%}) for the effect "
            f"of {term.column}."
        )
        remedy = "Drop rows whose treatment was certain (and say so), or log a randomized share."
        share = "" if len(checks) == 0 else f" {term.column}"
        checks.append(
            Check(f"overlap{share}", seen.share, config.overlap_share, fine, "not_identified", sentence, remedy)
        )
    return checks


def check_groups(posterior: Posterior, prepared: Prepared, groups_n, config: Checks) -> list[Check]:
    """Are there enough groups for clustered errors, and does one of them carry the ranking?"""
    seen = leave_a_group_out(posterior, prepared, groups_n)
    few = f"The rows come in {seen.groups:.1f} groups of equal weight (at least {config.groups:g} are wanted)."
    most = f"Without group {seen.group} the rewards correlate {seen.correlation:.3f} with those of the whole log."
    return [
        Check("groups", seen.groups, config.groups, seen.groups >= config.groups, "bounded", few,
              "Log more groups; errors and coverage rest on their number, not on the rows'."),
        Check("leave a group out", seen.correlation, config.influence, seen.correlation >= config.influence, "warning",
              most, "Look at that group's rows; report the ranking without it."),
    ]  # fmt: skip


def check_placebos(posterior, prepared, groups_n, outcome_n, instrument_n, config: Checks) -> list[Check]:
    """Effects that must be zero."""
    checks = []
    if outcome_n is not None:
        p_value = placebo_outcome(posterior, prepared, outcome_n, groups_n).p_value
        sentence = f"The text moves the placebo outcome: p = {p_value:.2g} that it does not."
        remedy = "Something unseen moves wording and outcomes: find it and add it as a term."
        checks.append(
            Check("placebo outcome", p_value, config.family_level, True, "bounded", sentence, remedy, test=True)
        )
    if instrument_n is not None:
        p_value = placebo_instrument(posterior, prepared, instrument_n, groups_n)
        sentence = f"The placebo instrument moves the outcome: p = {p_value:.2g} that it does not."
        remedy = "What makes the instrument also moves the outcome: exclusion is in doubt; add that path as a term."
        checks.append(
            Check("placebo instrument", p_value, config.family_level, True, "bounded", sentence, remedy, test=True)
        )
    return checks


_MISFIT = {
    "skewness": "Take logs of the outcome, or family student_t.",
    "tails": "Take family student_t, or a family with dispersion for counts.",
    "spread": "Take logs of the outcome; robust errors are in use where errors are.",
    "dispersion": "Take beta_binomial or negative_binomial, or intercept(text column).",
    "zeros": "Rows without any outcome differ in kind: add selection(...), or a family with dispersion.",
    "groups": "Add intercept(group): rows of a group share more than the design says.",
}


def check_predictive(posterior: Posterior, prepared: Prepared, groups_n, config: Checks) -> list[Check]:
    """Does the model make data like the log's?"""
    if prepared.spec.head is not None or prepared.spec.selection is not None:
        return []
    checks = []
    for seen in predictive_checks(posterior, prepared, groups_n):
        sentence = (
            f"Residual {seen.name}: {seen.observed:.3g} in the log, {seen.replicated:.3g} in data of the model's."
        )
        checks.append(
            Check(f"predictive {seen.name}", seen.p_value, config.family_level, True, "warning", sentence,
                  _MISFIT[seen.name], test=True)
        )  # fmt: skip
    return checks


def _without(found: Raw, name: str) -> Raw:
    """`found` without the block of this name among its controls."""
    start, keep = 0, []
    for part, kind, place in found.swept:
        if kind == "block":
            width = place.stop - place.start
            keep += [] if part == name else list(range(start, start + width))
            start += width
    swept = tuple(part for part in found.swept if part[0] != name)
    return found._replace(controls_nq=found.controls_nq[:, keep], swept=swept)
