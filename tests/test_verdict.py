"""The verdict: what follows from which check, what a refusal says, and the interval that `bounded` leaves."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from deconfound_jax.causal.diagnostics import ess, rank_rhat
from deconfound_jax.causal.fit import fit_prepared
from deconfound_jax.causal.interval import bounded_reward, reward_interval
from deconfound_jax.causal.placebo import leave_a_group_out, placebo_instrument, placebo_outcome
from deconfound_jax.causal.predictive import predictive_checks
from deconfound_jax.causal.sensitivity import outcome_equation
from deconfound_jax.causal.terms import prepare
from deconfound_jax.causal.verdict import Verdict, decide, holm, verdict
from deconfound_jax.causal.verdict_checks import Check, check_convergence
from deconfound_jax.causal.working import raw, working
from deconfound_jax.config import Causal
from deconfound_jax.config.verdict import Checks
from deconfound_jax.structs import Design, dump_json

DRAWS = 128


def fitted(logs, features_nd, design, **family):
    design = Design.parse(design, **family)
    prepared = prepare(logs, features_nd, design)
    return fit_prepared(prepared, design, Causal(draws=DRAWS)), prepared


@pytest.fixture(scope="module")
def newsroom(entangled):
    """A sound IV fit: log, features, posterior, prepared, groups."""
    logs, x = entangled(n=600)
    groups_n = np.arange(600) % 60
    return logs, x, *fitted(logs, x, "endogenous(p ~ z) + category(week)"), groups_n


def check(name, passed, consequence, value=0.0, test=False):
    return Check(name, value, 0.5, passed, consequence, f"{name} said so.", f"Mend {name}.", test)


def test_holm_is_the_textbooks():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_the_worst_failed_check_decides_and_says_what_would_mend_it():
    design, config = Design.parse("linear(c)"), Checks()
    sound = check("a", True, "not_identified")
    bounded = check("b", False, "bounded")
    assert decide([sound], design, config).status == "consistent"
    assert decide([sound, check("w", False, "warning")], design, config).warnings == ("w said so. Mend w.",)
    assert decide([sound, bounded], design, config).status == "bounded"
    found = decide([bounded, check("c", False, "not_identified")], design, config)
    assert found.status == "not_identified" and found.failed == ("b", "c")
    assert found.reasons == ("b said so. Mend b.", "c said so. Mend c.")
    with pytest.raises(ValueError, match="not_identified: b said so. Mend b. c said so. Mend c. .*accept_risk=True"):
        found.require()
    assert found.require(accept_risk=True) is found


def test_tests_share_one_level():
    design, config = Design.parse("linear(c)"), Checks()
    alone = decide([check("t", True, "bounded", 0.004, test=True)], design, config)
    many = [check(f"t{i}", True, "bounded", 0.004 if i == 0 else 0.5, test=True) for i in range(5)]
    crowd = decide(many, design, config)
    assert alone.status == "bounded" and alone["t"].value == pytest.approx(0.004)
    assert crowd.status == "consistent" and crowd["t0"].value == pytest.approx(0.02)


def test_a_sound_design_is_consistent_and_says_what_cannot_be_tested(newsroom):
    logs, x, posterior, prepared, groups_n = newsroom
    found = verdict(posterior, prepared, groups_n=groups_n)
    assert found.status == "consistent" and not found.failed and not found.warnings
    assert [u.split()[0] for u in found.untestable] == ["A0", "A1", "A2", "A5", "A7", "A8"]
    assert "moved the outcome by" in found.untestable[1] and "unseen cause explained" in found.untestable[3]
    assert set(found.flips) == {"unmeasured", "exclusion z"} and 0 < found.flips["unmeasured"] < 1
    again = Verdict.from_json(json.loads(dump_json(found.to_json())))
    assert again == found and str(again) == str(found)
    with pytest.raises(KeyError, match="no check 'overlap'; it has .*'rank'"):
        found["overlap"]


def test_an_unbounded_number_survives_json():
    found = decide([check("gamma set", False, "not_identified", np.inf)], Design.parse("linear(c)"), Checks())
    assert Verdict.from_json(json.loads(dump_json(found.to_json()))) == found


def test_without_strength_the_verdict_is_not_consistent(newsroom):
    logs, x, *_ = newsroom
    rng = np.random.default_rng(1)
    weak = dataclasses.replace(logs, columns=dict(logs.columns) | {"z": rng.normal(size=600)})
    found = verdict(*fitted(weak, x, "endogenous(p ~ z) + category(week)"))
    assert "instrument strength" in found.failed and found.status != "consistent"
    assert "stronger instrument" in found.reasons[0]


def test_a_fit_that_did_not_converge_is_refused(newsroom):
    posterior = newsroom[2]
    bad = ({"pareto_k": 0.9, "converged": False}, {"rhat": 1.2, "converged": True})
    for diagnostics in (*bad, {"ess": 3.0, "converged": True}, {"rhat": np.nan, "converged": True}):
        (found,) = check_convergence(dataclasses.replace(posterior, diagnostics=diagnostics), Checks())
        assert not found.passed and found.consequence == "not_identified", diagnostics
    assert check_convergence(posterior, Checks())[0].passed


def test_the_interval_is_the_refit_at_every_gamma(newsroom):
    logs, x, posterior, prepared, _ = newsroom
    found = reward_interval(posterior, prepared, 0.5, 0.9)
    work = working(posterior, prepared)
    ridge = np.mean(posterior["sigma"] ** 2) / np.mean(posterior["text.scale"]) ** 2
    contrasts = np.random.default_rng(0).normal(size=(50, 3))
    unit_d = float(posterior.scaling["outcome.sd"]) / posterior.scaling["features.sd"]
    ends = []
    for gamma in (0.5, 0.9):
        gram = work.text_nd.T @ work.text_nd + ridge * np.eye(3)
        beta = np.linalg.solve(gram, work.text_nd.T @ (work.response_n - gamma * work.endogenous_nm[:, 0]))
        ends.append(contrasts @ (beta * unit_d))
    low, high = found.contrast(contrasts)
    assert low == pytest.approx(np.minimum(*ends)) and high == pytest.approx(np.maximum(*ends))
    sign = found.sign(contrasts, np.zeros_like(contrasts))
    assert (sign == np.where(np.sign(ends[0]) == np.sign(ends[1]), np.sign(ends[0]), 0)).all()
    assert 0 < (sign == 0).sum() < 50, "the range of gamma must decide some contrasts and not others"
    assert (found.sign(np.zeros_like(contrasts), contrasts) == -sign).all()
    low_n, high_n = found.rewards(x)
    assert (low_n <= high_n).all() and abs((low_n + high_n).mean()) < 1e-9
    with pytest.raises(ValueError, match="expected 1 finite lows and highs"):
        reward_interval(posterior, prepared, -np.inf, 1.0)


def test_a_bounded_verdict_leaves_an_interval_for_each_reason(newsroom):
    logs, x, posterior, prepared, groups_n = newsroom
    design, few = posterior.design, np.arange(600) % 6
    placebo_n = x[:, 0] + np.random.default_rng(0).normal(size=600)
    gamma = (("p", 0.7, 0.8),)
    groups, placebo = check("groups", False, "bounded"), check("placebo outcome", False, "bounded")
    given = {"groups_n": few, "placebo_outcome_n": placebo_n}
    point = bounded_reward(posterior, prepared, decide([], design, Checks(), (("p", 0.75, 0.75),)))
    wide = bounded_reward(posterior, prepared, decide([], design, Checks(), gamma))
    exact = (("p", 0.75, 0.75),)
    noisy = bounded_reward(posterior, prepared, decide([groups], design, Checks(), exact), **given)
    moved = bounded_reward(posterior, prepared, decide([placebo], design, Checks(), exact), **given)
    said = decide([groups, placebo], design, Checks(), gamma)
    both = bounded_reward(posterior, prepared, said, **given)
    v_d = np.array([1.0, 0.5, 0.0])
    zero, by_gamma, by_groups, by_placebo, by_all = (
        float(np.subtract(*one.contrast(v_d)[::-1])[0]) for one in (point, wide, noisy, moved, both)
    )
    assert zero == pytest.approx(0.0, abs=1e-12) and min(by_gamma, by_groups, by_placebo) > 0.01
    error = np.sqrt(v_d @ noisy.covariance_dd @ v_d)
    assert by_groups == pytest.approx(2 * 2.5706 * error, rel=1e-4)  # t with 5 degrees of freedom
    assert by_all == pytest.approx(by_gamma + by_groups + by_placebo, rel=0.02)
    with pytest.raises(ValueError, match="expected groups_n"):
        bounded_reward(posterior, prepared, said)
    refused = decide([check("rank", False, "not_identified")], design, Checks())
    with pytest.raises(ValueError, match="nothing bounds the reward; rank said so"):
        bounded_reward(posterior, prepared, refused)


def test_placebos_are_seen_where_they_move_and_quiet_where_they_do_not(newsroom):
    logs, x, posterior, prepared, groups_n = newsroom
    rng = np.random.default_rng(0)
    quiet = [
        placebo_outcome(posterior, prepared, logs.columns["p"] + rng.normal(size=600), groups_n).p_value
        for _ in range(60)
    ]
    # The placebo moves with p, which wording moves with, too: two-stage least squares takes that out.
    assert sum(p < 0.05 for p in quiet) <= 10
    moved = placebo_outcome(posterior, prepared, x[:, 1] + rng.normal(size=600), groups_n)
    assert moved.p_value < 1e-6 and moved.coefficient_d[1] > 0.3 > abs(moved.coefficient_d[0])
    quiet = [placebo_instrument(posterior, prepared, rng.normal(size=600)) for _ in range(60)]
    assert sum(p < 0.05 for p in quiet) <= 8
    assert placebo_instrument(posterior, prepared, logs.columns["z"] + rng.normal(size=600)) < 1e-6
    with pytest.raises(ValueError, match="placebo outcome: expected 600 finite numbers"):
        placebo_outcome(posterior, prepared, np.ones(3))
    with pytest.raises(ValueError, match="expected values that differ"):
        placebo_instrument(posterior, prepared, np.ones(600))


def test_the_group_that_carries_the_ranking_is_named(newsroom):
    logs, x, posterior, prepared, _ = newsroom
    names = np.asarray([f"g{i % 6}" for i in range(600)], object)
    even = leave_a_group_out(posterior, prepared, names)
    assert even.groups == pytest.approx(6.0) and even.correlation > 0.98
    y = np.asarray(prepared.rows.outcome_n).copy()
    mine = names == "g2"
    y[mine] -= 12 * x[mine, 0]
    bent = prepared._replace(rows=prepared.rows._replace(outcome_n=y))
    found = leave_a_group_out(posterior, bent, names)
    assert found.group == "g2" and found.correlation < 0.8
    work, ridge = outcome_equation(posterior, bent, raw(posterior, bent, names))
    betas = []
    for keep in (np.ones(600, bool), ~mine):
        gram = work.text_nd[keep].T @ work.text_nd[keep] + ridge * np.eye(3)
        betas.append(np.linalg.solve(gram, work.text_nd[keep].T @ work.response_n[keep]))
    expected = np.corrcoef(x / x.std(0) @ betas[0], x / x.std(0) @ betas[1])[0, 1]
    assert found.correlation == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="groups: expected 600, one a row of the log, got 5"):
        leave_a_group_out(posterior, prepared, names[:5])


def test_predictive_checks_see_the_misfit_they_name(newsroom):
    logs, x, posterior, prepared, groups_n = newsroom
    fine = {d.name: d for d in predictive_checks(posterior, prepared, groups_n)}
    assert set(fine) == {"skewness", "tails", "spread", "groups"}
    assert min(d.p_value for d in fine.values()) > 0.002
    assert fine["tails"].replicated == pytest.approx(3.0, abs=0.1)
    assert fine["skewness"].replicated == pytest.approx(0.0, abs=0.1)
    assert fine["groups"].replicated == pytest.approx(1.0, abs=0.1)
    rng = np.random.default_rng(0)
    y = np.asarray(prepared.rows.outcome_n)
    noise = np.mean(posterior["sigma"])
    by_group = noise * rng.normal(size=60)[groups_n]
    for name, extra in (
        ("skewness", noise * (rng.exponential(size=600) ** 2 - 2)), ("tails", noise * rng.standard_t(2, size=600)),
        ("groups", by_group),
    ):  # fmt: skip
        bent = prepared._replace(rows=prepared.rows._replace(outcome_n=y + extra))
        seen = {d.name: d.p_value for d in predictive_checks(posterior, bent, groups_n)}
        assert seen[name] < 1e-3, name


def test_counts_are_checked_on_the_link_scale_and_their_overdispersion_is_seen(clicks):
    logs, x, reward_n = clicks(n=400, mean=300)
    posterior, prepared = fitted(logs, x, "category(week)", family="binomial")
    found = verdict(posterior, prepared)
    assert found.status == "consistent" and not found.warnings
    noisy, x, _ = clicks(n=400, mean=300, deviation=0.5)
    found = verdict(*fitted(noisy, x, "category(week)", family="binomial"))
    assert "predictive dispersion" in found.failed and "beta_binomial" in found.warnings[0]


def test_effective_draws_of_a_chain_with_memory():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4, 2000))
    assert ess(noise) == pytest.approx(8000, rel=0.15)
    chain = np.zeros((4, 2000))
    for t in range(1, 2000):
        chain[:, t] = 0.8 * chain[:, t - 1] + noise[:, t]
    assert ess(chain) == pytest.approx(8000 * 0.2 / 1.8, rel=0.25)
    assert ess(np.ones((4, 100))) == 4.0


def test_ranks_see_chains_of_another_width_and_heavy_tails():
    rng = np.random.default_rng(1)
    same = rng.standard_cauchy(size=(4, 500))
    assert rank_rhat(same) < 1.02
    assert rank_rhat(same * np.array([[1.0], [1.0], [1.0], [8.0]])) > 1.05
    assert rank_rhat(same + np.array([[0.0], [0.0], [0.0], [3.0]])) > 1.1
