"""The checks of a design with instruments: strength, set of gamma, agreement, endogeneity, first stage."""

from __future__ import annotations

import numpy as np

from deconfound_jax.causal import instruments as iv
from deconfound_jax.causal.builders import site_of
from deconfound_jax.causal.interval import reward_interval
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.spec import Prepared
from deconfound_jax.causal.verdict_checks import Check
from deconfound_jax.causal.working import Raw
from deconfound_jax.config.verdict import Checks


def check_instruments(posterior: Posterior, prepared: Prepared, found: Raw, config: Checks):
    """Strength, the Anderson-Rubin set, agreement, endogeneity, and what the posterior says of pi, gamma and rho.

    Returns:
      Checks, and (column, low, high) of gamma where bounded.
    """
    form = iv.reduced_form(found)
    names = [prepared.spec.equations[j].column for j in prepared.spec.structural(None)]
    if form.instruments < form.variables:
        sentence = (
            f"{form.instruments} instruments vary given text and terms, for {form.variables} endogenous variables."
        )
        remedy = "Find an instrument that the terms do not determine."
        few = float(form.instruments)
        return [Check("instrument rank", few, float(form.variables), False, "not_identified", sentence, remedy)], ()
    weakest = iv.effective_f(form)
    kind = "conditional effective F" if form.variables > 1 else "effective F"
    strength = ", ".join(f"{value:.1f} for {name}" for name, value in zip(names, weakest, strict=True))
    checks = [
        Check(
            "instrument strength", float(weakest.min()), config.effective_f, bool(weakest.min() >= config.effective_f),
            "bounded", f"Instruments: {kind} {strength}, Cragg-Donald {iv.cragg_donald(form):.1f}.",
            "Find a stronger instrument or more rows; until then only pairs of one sign may train.",
        )
    ]  # fmt: skip
    p_value = iv.overidentification(form)
    if form.instruments > form.variables:
        sentence = f"The instruments {'agree' if p_value > 0.05 else 'disagree'} on gamma: p = {p_value:.2g}."
        remedy = "At least one has an effect of its own: drop it, or say by what path it works and add the term."
        checks.append(
            Check("overidentification", p_value, config.family_level, True, "bounded", sentence, remedy, test=True)
        )
    more, gamma = _gamma_set(posterior, prepared, form, names, p_value < config.family_level, config)
    checks += more
    p_value = iv.endogeneity(form)
    sentence = f"Wu-Hausman: p = {p_value:.2g} that {' and '.join(names)} need{'s' * (len(names) == 1)} no instrument."
    checks.append(Check("endogeneity", p_value, 0.0, True, "note", sentence, ""))
    return checks + _posterior_of_first_stage(posterior, prepared, names, config), gamma


def _gamma_set(posterior, prepared, form: iv.Reduced, names, disagree: bool, config: Checks):
    """Is the set of gamma bounded, and does the ranking stand still over it?"""
    seen = iv.anderson_rubin(form, config.set_level)
    if disagree:  # no gamma suits all instruments: the hull of what each of them says
        each = iv.single_instrument_sets(form, config.set_level)
        if form.variables == 1 and all(one.bounded and one.pieces for one in each):
            ends = [end for one in each for piece in one.pieces for end in piece]
            seen = iv.GammaSet("union", ((min(ends), max(ends)),), config.set_level)
    share = f"{config.set_level:.0%} Anderson-Rubin set of gamma"
    remedy = "Find a stronger instrument: this one does not say how much of the outcome popularity carries."
    remedy = remedy.replace("popularity", " and ".join(names))
    if not seen.bounded:
        sentence = f"The {share} is unbounded: the data allow any answer."
        return [Check("gamma set", np.inf, np.inf, False, "not_identified", sentence, remedy)], ()
    if not seen.pieces:
        sentence = f"The {share} is empty: no gamma suits all instruments."
        return [Check("gamma set", np.inf, config.tolerance, False, "bounded", sentence, remedy)], ()
    if form.variables == 1:
        ranges = [(min(a for a, _ in seen.pieces), max(b for _, b in seen.pieces))]
    else:
        ranges = list(seen.pieces)
    low, high = zip(*ranges, strict=True)
    spread = ranking_spread(posterior, prepared, low, high)
    words = []
    for name, (a, b) in zip(names, ranges, strict=True):
        unit = float(posterior.scaling["outcome.sd"]) / float(np.ravel(posterior.scaling[f"{site_of(name)}.sd"])[0])
        words.append(f"{name} {a * unit:.3g} to {b * unit:.3g}")
    how = ", projections of the joint set" if form.variables > 1 else ""
    sentence = f"The {share}: {'; '.join(words)}{how}; rewards move by {spread:.2f} of their sd over it."
    fine = spread <= config.tolerance
    gamma = tuple((name, a, b) for name, (a, b) in zip(names, ranges, strict=True))
    return [Check("gamma set", spread, config.tolerance, fine, "bounded", sentence, remedy)], gamma


def ranking_spread(posterior: Posterior, prepared: Prepared, low, high) -> float:
    """How far a typical text's reward moves over [low, high] of gamma, in sd of the reward over the log.

        sum_j (high_j - low_j) sd(phi'D_j) / sd(phi'beta)

    Without text: the width itself, in sd of y per sd of p.
    """
    width = prepared.spec.blocks[0].stop
    if not width:
        return float(max(np.subtract(high, low)))
    found = reward_interval(posterior, prepared, low, high)
    text_nd = np.asarray(prepared.rows.columns_nq, np.float64)[:, :width] * posterior.scaling["features.sd"][None, :]
    moved_j = (text_nd @ found.directions_jd.T).std(0) * (found.high_j - found.low_j)
    middle_d = found.centre_d - (found.low_j + found.high_j) / 2 @ found.directions_jd  # centre_d is at gamma = 0
    return float(moved_j.sum() / max((text_nd @ middle_d).std(), 1e-300))


def _posterior_of_first_stage(posterior: Posterior, prepared: Prepared, names, config: Checks) -> list[Check]:
    """Sign of pi, how much of gamma's posterior is its prior, and the correlation of the errors."""
    checks = []
    for j, name in zip(prepared.spec.structural(None), names, strict=True):
        equation = prepared.spec.equations[j]
        pi_sk = posterior[f"{equation.prefix}instruments"]
        sure = float(np.maximum((pi_sk > 0).mean(0), (pi_sk < 0).mean(0)).max())
        of = "" if len(names) == 1 else f" {name}"
        checks.append(
            Check(f"posterior of pi{of}", sure, 0.95, sure >= 0.95, "warning",
                  f"Some instrument of {name} has its sign with probability {sure:.3f}.",
                  "Without a sign the first stage says nothing: find a stronger instrument.")
        )  # fmt: skip
        prior = float(posterior[f"gamma{equation.suffix}"].std() / prepared.spec.gamma_sd)
        checks.append(
            Check(f"prior of gamma{of}", prior, config.prior_share, prior <= config.prior_share, "warning",
                  f"The posterior of gamma is {prior:.0%} as wide as its prior.",
                  "Print the reward under three prior widths; its mean follows the prior.")
        )  # fmt: skip
        if "sigma" in posterior.draws:
            control_s = posterior[f"control{equation.suffix}"]
            rho_s = control_s / np.hypot(control_s, posterior["sigma"])
            low, high = np.quantile(rho_s, [0.05, 0.95])
            sentence = f"Errors of {name} and outcome correlate {rho_s.mean():.2f} (90%: {low:.2f} to {high:.2f})."
            checks.append(Check(f"rho{of}", float(rho_s.mean()), 1.0, True, "note", sentence, ""))
    return checks
