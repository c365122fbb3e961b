"""Forms of the reward by hand-made numbers, preferences at their limits, and calibration."""

import dataclasses

import numpy as np
import pytest

from deconfound_jax.causal.fit import fit, fit_prepared
from deconfound_jax.causal.orthogonal import orthogonal_form
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.response import response_form
from deconfound_jax.causal.reward import (
    Reward,
    contributions,
    guarded_form,
    linear_predictor,
    model_form,
    precision_weight,
    prefer,
    removed,
    residual_form,
    text_form,
)
from deconfound_jax.causal.terms import prepare
from deconfound_jax.config import Causal
from deconfound_jax.structs import Design

COUNTS = Design("normal", Design.parse("category(week)").terms, "empirical_logit")


@pytest.fixture
def small(log_of):
    """design -> the same five rows, prepared, their features, and a posterior of two draws to fill in."""
    rng = np.random.default_rng(0)
    y, p, z = rng.normal(size=(3, 5)) * 2 + 1
    features_nd = rng.normal(size=(5, 2)) + 3
    columns = {"outcome": y, "p": p, "z": z, "week": np.asarray(list("uuvvw"), object)}
    columns["text"] = np.asarray(list("aabbc"), object)

    def make(design, **draws):
        design = Design.parse(design)
        prepared = prepare(log_of(columns), features_nd, design)
        given = {"intercept": [0.1, 0.2], "text": [[1.0, 0.0], [0.5, -1.0]], "sigma": [0.6, 0.8]} | draws
        arrays = {name: np.asarray(value) for name, value in given.items()}
        return prepared, features_nd, Posterior(arrays, design, prepared.scaling, {"converged": True})

    return make


def test_model_form_by_hand(small):
    prepared, features_nd, posterior = small("")
    new_nd = np.asarray([[1.0, 2.0], [4.0, -1.0], [0.0, 0.0]])
    standard_nd = (new_nd - features_nd.mean(0)[None, :]) / features_nd.std(0)[None, :]
    sd = prepared.scaling["outcome.sd"]
    reward = model_form(posterior, new_nd)
    np.testing.assert_allclose(reward.draws_sn[0], sd * standard_nd[:, 0])
    np.testing.assert_allclose(reward.draws_sn[1], sd * (0.5 * standard_nd[:, 0] - standard_nd[:, 1]))
    np.testing.assert_allclose(reward.mean, reward.draws_sn.mean(0))
    with pytest.raises(ValueError, match=r"features: expected \(n, 2\) as in the fit, got \(3, 1\)"):
        model_form(posterior, new_nd[:, :1])


def test_residual_form_of_a_covariate_by_hand(small):
    prepared, _, posterior = small("p", p=[[0.5], [2.0]])
    y, p, sd = prepared.rows.outcome_n, prepared.rows.columns_nq[:, 2], prepared.scaling["outcome.sd"]
    reward, weight_n = residual_form(posterior, prepared)
    np.testing.assert_allclose(reward.draws_sn, [sd * (y - 0.5 * p), sd * (y - 2.0 * p)])
    # sigma^2 has mean .5; the removed part's sd over draws is .75 |p|
    np.testing.assert_allclose(weight_n, 1 / (sd**2 * (0.5 + 0.75**2 * p**2)))


def test_residual_form_of_a_category_takes_levels_and_means_out(small):
    means = small("category(week)")[0].spec.blocks[1]
    coefficients, levels = np.ones((2, means.stop - means.start)), np.asarray([[1.0, 0.0, -4.0], [0.0, 2.0, 5.0]])
    prepared, _, posterior = small("category(week)", **{"week.means": coefficients, "week": levels})
    part_sn = prepared.rows.columns_nq[:, means.start : means.stop].sum(1)[None, :] + levels[:, [0, 0, 1, 1, 2]]
    part_sn = part_sn - part_sn.mean(1, keepdims=True)
    np.testing.assert_allclose(contributions(posterior, prepared)["week"], part_sn)
    reward, _ = residual_form(posterior, prepared)
    sd = prepared.scaling["outcome.sd"]
    np.testing.assert_allclose(reward.draws_sn, sd * (prepared.rows.outcome_n[None, :] - part_sn))


def test_residual_form_of_an_instrumented_design_takes_gamma_and_control_out(small):
    first = {"first.intercept": [0.1, -0.1], "first.text": [[0.2, 0.0], [0.0, 0.3]]}
    first |= {"first.instruments": [[0.7], [0.4]], "first.sigma": [0.5, 0.25]}
    prepared, _, posterior = small("endogenous(p ~ z)", **first, gamma=[1.5, 2.0], control=[0.3, -0.2])
    x, z, p = prepared.rows.columns_nq[:, :2], prepared.rows.columns_nq[:, 2], prepared.rows.endogenous_nm[:, 0]
    e0 = (p - 0.1 - 0.2 * x[:, 0] - 0.7 * z) / 0.5
    e1 = (p + 0.1 - 0.3 * x[:, 1] - 0.4 * z) / 0.25
    part_sn = np.stack([1.5 * p + 0.3 * e0, 2.0 * p - 0.2 * e1])
    eta_sn = linear_predictor(posterior, prepared)
    np.testing.assert_allclose(eta_sn - part_sn, [0.1 + x[:, 0], 0.2 + 0.5 * x[:, 0] - x[:, 1]])
    np.testing.assert_allclose(removed(posterior, prepared), part_sn - part_sn.mean(1, keepdims=True))
    np.testing.assert_allclose(removed(posterior, prepared), contributions(posterior, prepared)["p"])


def test_text_form_adds_the_texts_own_level_and_removal_leaves_it(small):
    levels = np.asarray([[1.0, 0.0, -4.0], [0.0, 2.0, 5.0]])
    prepared, features_nd, posterior = small("intercept(text) + p", **{"column.text": levels, "p": [[0.5], [2.0]]})
    sd, model = prepared.scaling["outcome.sd"], model_form(posterior, features_nd)
    reward = text_form(posterior, prepared, features_nd)
    np.testing.assert_allclose(reward.draws_sn, model.draws_sn + sd * levels[:, [0, 0, 1, 1, 2]])
    np.testing.assert_allclose(removed(posterior, prepared)[0], 0.5 * prepared.rows.columns_nq[:, 2])


def test_text_form_refuses_where_the_deviation_is_noise(small):
    prepared, features_nd, posterior = small("p", p=[[0.5], [2.0]])
    with pytest.raises(ValueError, match=r"text_form: add intercept\(text\) to the design 'linear\(p\)'"):
        text_form(posterior, prepared, features_nd)


def test_prefer_at_its_limits():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 200, 7)).astype(np.float32)
    np.testing.assert_allclose(prefer(a, b, 0.0), (a > b).mean(0), atol=1e-6)
    np.testing.assert_allclose(prefer(a, b, 1e-5), (a > b).mean(0), atol=1e-2)
    np.testing.assert_allclose(prefer(a, b, 1e6), 0.5, atol=1e-5)
    np.testing.assert_allclose(prefer(a, b, 2.0), (1 / (1 + np.exp((b - a) / 2))).mean(0), atol=1e-6)
    for tau in (0.0, 0.3):
        np.testing.assert_allclose(prefer(a, a, tau), 0.5)
        np.testing.assert_allclose(prefer(a, b, tau) + prefer(b, a, tau), 1.0, atol=1e-6)
    tied = np.asarray([[1.0], [1.0], [1.0], [2.0]])
    np.testing.assert_allclose(prefer(tied, np.ones((4, 1)), 0.0), [(3 * 0.5 + 1) / 4])


def test_precision_weight_by_hand():
    a, b = np.asarray([[0.0], [2.0]]), np.asarray([[0.0], [-2.0]])  # the gap is 0 or 4: variance 4
    np.testing.assert_allclose(precision_weight(a, b, 2.0), [0.5])
    np.testing.assert_allclose(precision_weight(a, a, 2.0), [1.0])


def test_lower_bound_is_the_quantile():
    draws_sn = np.stack([np.arange(101.0), -np.arange(101.0)], 1)
    np.testing.assert_allclose(Reward(draws_sn, "model").lower(), [5.0, -95.0])
    np.testing.assert_allclose(Reward(draws_sn, "model").lower(0.5), [50.0, -50.0])


def test_joint_draws_cancel_the_shared_error_of_gamma(entangled):
    logs, features_nd = entangled(n=200, seed=1)
    logs.columns["p"][:2] = 9.0  # two rows far out, of one p
    posterior = fit(logs, features_nd, Causal(design="p", draws=256))
    reward, _ = residual_form(posterior, prepare(logs, features_nd, posterior.design))
    gap_s = reward.draws_sn[:, 0] - reward.draws_sn[:, 1]
    assert reward.sd[0] > 0.05
    assert gap_s.std() < 1e-6 * reward.sd[0]
    np.testing.assert_allclose(gap_s, logs.outcome_n[0] - logs.outcome_n[1])


def test_residual_form_states_no_probability(small):
    prepared, _, posterior = small("p", p=[[0.5], [2.0]])
    reward, _ = residual_form(posterior, prepared)
    with pytest.raises(ValueError, match="prefer: draws of the residual form lack y's own noise"):
        reward.prefer(0, 1, tau=1.0)
    assert Reward(np.zeros((3, 2)), "model").prefer(0, 1, tau=1.0) == 0.5


def test_stated_probabilities_are_right_over_data_sets(log_of):
    """Texts' coefficients drawn from N(0, .3^2): what is said to be better with chance q is so in q of the cases."""
    stated, right = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        features_nd, new_nd, beta = rng.normal(size=(40, 3)), rng.normal(size=(200, 3)), 0.3 * rng.normal(size=3)
        p = features_nd[:, 1] + rng.normal(size=40)
        logs = log_of({"outcome": features_nd @ beta + p + rng.normal(size=40), "p": p})
        reward, truth_n = model_form(fit(logs, features_nd, Causal(design="p", draws=128)), new_nd), new_nd @ beta
        chance = reward.prefer(np.arange(100), np.arange(100, 200), tau=0.0)
        stated.append(np.maximum(chance, 1 - chance))
        right.append((chance > 0.5) == (truth_n[:100] > truth_n[100:]))
    stated, right = np.concatenate(stated), np.concatenate(right)
    for low, high in ((0.5, 0.75), (0.75, 0.95), (0.95, 1.01)):
        inside = (stated >= low) & (stated < high)
        assert inside.sum() > 300
        assert abs(stated[inside].mean() - right[inside].mean()) < 0.07
    assert abs(stated.mean() - right.mean()) < 0.04


@pytest.mark.parametrize("deviation", [0.1, 0.3])
def test_text_form_of_counts_is_calibrated(clicks, deviation):
    stated, right, covered, error = [], [], [], {"model": [], "text": []}
    for seed in range(4):
        logs, features_nd, truth_n = clicks(n=600, seed=seed, deviation=deviation)
        prepared = prepare(logs, features_nd, COUNTS)
        posterior = fit_prepared(prepared, COUNTS, Causal(draws=256))
        reward, truth_n = text_form(posterior, prepared, features_nd), truth_n - truth_n.mean()
        a, b = np.arange(300), np.arange(300, 600)
        chance = reward.prefer(a, b, tau=0.0)
        stated.append(np.maximum(chance, 1 - chance).mean())
        right.append(((chance > 0.5) == (truth_n[a] > truth_n[b])).mean())
        covered.append((np.abs(reward.mean - reward.mean.mean() - truth_n) < 1.645 * reward.sd).mean())
        for form, value in (("model", model_form(posterior, features_nd)), ("text", reward)):
            error[form].append(np.mean((value.mean - value.mean.mean() - truth_n) ** 2))
    assert abs(np.mean(stated) - np.mean(right)) < 0.03
    assert 0.8 < np.mean(covered) < 0.97  # of 90% intervals
    assert np.mean(error["text"]) < np.mean(error["model"])


def test_counts_at_nought_and_at_all_are_finite(log_of):
    shown = np.full(30, 50.0)
    hit = np.where(np.arange(30) % 3 == 0, 0.0, np.where(np.arange(30) % 3 == 1, 50.0, 20.0))
    columns = {"outcome": hit, "shown": shown, "week": np.asarray(list("uvwxy") * 6, object)}
    logs, features_nd = log_of(columns, exposure="shown"), np.random.default_rng(0).normal(size=(30, 2))
    prepared = prepare(logs, features_nd, COUNTS)
    posterior = fit_prepared(prepared, COUNTS, Causal(draws=128))
    target, weight_n = residual_form(posterior, prepared)
    reward = text_form(posterior, prepared, features_nd)
    assert np.isfinite(target.draws_sn).all() and np.isfinite(reward.draws_sn).all()
    assert np.isfinite(weight_n).all() and (weight_n > 0).all()
    binomial = Design("binomial", COUNTS.terms)
    prepared = prepare(logs, features_nd, binomial)
    target, weight_n = residual_form(fit_prepared(prepared, binomial, Causal(draws=128)), prepared)
    assert np.isfinite(target.draws_sn).all() and np.isfinite(weight_n).all()


def test_effect_is_in_units_of_the_outcome_a_unit_of_the_column(small):
    prepared, _, posterior = small("p", p=[[0.5], [2.0]])
    unit = prepared.scaling["outcome.sd"] / prepared.scaling["p.sd"][0]
    np.testing.assert_allclose(posterior.effect("p"), [0.5 * unit, 2.0 * unit])
    prepared, _, posterior = small("endogenous(p ~ z)", gamma=[1.5, 2.0])
    np.testing.assert_allclose(posterior.effect("p"), [1.5 * unit, 2.0 * unit])
    with pytest.raises(KeyError, match=r"posterior.effect: expected one of \['p'\], got 'q'"):
        posterior.effect("q")


def test_reward_at_a_value_of_what_the_text_interacts_with(small):
    slopes = np.asarray([[0.3, 0.0], [0.0, -0.2]])
    prepared, features_nd, posterior = small("interaction(text * p) + p", **{"text:p": slopes, "p": [[0.5], [2.0]]})
    average, sd = model_form(posterior, features_nd).draws_sn, float(prepared.scaling["outcome.sd"])
    x = prepared.rows.columns_nq[:, :2]
    mean, unit = float(prepared.scaling["p.mean"][0]), float(prepared.scaling["p.sd"][0])
    found = model_form(posterior, features_nd, at={"p": mean + 2 * unit}).draws_sn
    np.testing.assert_allclose(found, average + 2 * sd * (slopes @ x.T))
    np.testing.assert_allclose(model_form(posterior, features_nd, at={"p": mean}).draws_sn, average)
    with pytest.raises(ValueError, match=r"at: the text interacts with \['p'\], got 'z'"):
        model_form(posterior, features_nd, at={"z": 1.0})
    # the mean over the log's p of what would have happened, by hand
    p = np.asarray(prepared.rows.columns_nq[:, 4])
    rest_su = linear_predictor(posterior, prepared) - posterior["text"] @ x.T - (slopes @ x.T) * p[None, :]
    under = [posterior["text"] @ x[2] + posterior["text"][:, 0] * 0 + (slopes @ x[2]) * c for c in p]
    expected = prepared.scaling["outcome.mean"] + sd * np.mean([rest_su[:, i] + under[i] for i in range(5)], 0)
    np.testing.assert_allclose(response_form(posterior, prepared, features_nd).draws_sn[:, 2], expected)


def test_a_guardrail_is_taken_off_in_its_own_units(small):
    guard = np.asarray([[0.2, 0.1], [0.4, -0.3]])
    prepared, features_nd, posterior = small("guardrail(p)", **{"guardrail.text": guard})
    x, unit = prepared.rows.columns_nq[:, :2], float(prepared.scaling["p.sd"][0])
    found = guarded_form(posterior, features_nd, 3.0)
    np.testing.assert_allclose(found.draws_sn, model_form(posterior, features_nd).draws_sn - 3 * unit * guard @ x.T)
    assert not contributions(posterior, prepared)  # its error is noise that is shared, not a confounder
    with pytest.raises(ValueError, match=r"guarded_form: add guardrail\(column\)"):
        guarded_form(small("p", p=[[0.5], [2.0]])[2], features_nd, 1.0)


def test_response_of_counts_is_a_mean_of_rates(clicks):
    logs, features_nd, _ = clicks(n=60)
    design = Design("binomial", COUNTS.terms)
    prepared = prepare(logs, features_nd, design)
    posterior = fit_prepared(prepared, design, Causal(draws=64))
    found = response_form(posterior, prepared, features_nd)
    assert found.scale == "response" and found.verdict is None
    eta_su, text_su = linear_predictor(posterior, prepared), posterior["text"] @ prepared.rows.columns_nq[:, :3].T
    rate_s = [1 / (1 + np.exp(-(prepared.rows.offset + eta_su - text_su + text_su[:, [i]]))) for i in range(60)]
    np.testing.assert_allclose(
        found.draws_sn[:, prepared.row_of_log_n.argsort()], np.stack(rate_s, 1).mean(2), rtol=1e-6
    )
    assert abs(found.mean.mean() - logs.outcome_n.sum() / logs.exposure_n.sum()) < 0.01


def test_the_orthogonal_form_needs_one_right_regression_of_two(log_of):
    """The outcome moves with c^2, the design says c: f is biased through x = c^2 + noise. E[x | c^2] repairs it."""
    rng = np.random.default_rng(0)
    n, probe = 3000, np.asarray([[1.0, 0.0], [0.0, 0.0]])
    c = rng.normal(size=n)
    features_nd = np.stack([c**2 + rng.normal(size=n), rng.normal(size=n)], 1)
    logs = log_of({"outcome": 0.5 * features_nd[:, 0] + c**2 + rng.normal(size=n), "c": c, "c2": c**2})
    wrong, right = (Design.parse(d) for d in ("c", "c + c2"))
    posteriors = {}
    for name, design in (("wrong", wrong), ("right", right)):
        prepared = prepare(logs, features_nd, design)
        posteriors[name] = fit_prepared(prepared, design, Causal(draws=256)), prepared

    def contrast(reward):
        gap_s = reward.draws_sn[:, 0] - reward.draws_sn[:, 1]
        return gap_s.mean(), gap_s.std()

    biased, _ = contrast(model_form(posteriors["wrong"][0], probe))
    assert biased > 0.9
    mean, sd = contrast(orthogonal_form(*posteriors["wrong"], probe))
    assert mean > 0.9  # neither regression is right
    # g as the wrong design has it, E[phi | c] from the right one
    half = dataclasses.replace(posteriors["wrong"][0], design=right)
    half = dataclasses.replace(
        half, draws={**half.draws, "c2": np.zeros((256, 1))}, scaling=posteriors["right"][1].scaling
    )
    mean, sd = contrast(orthogonal_form(half, posteriors["right"][1], probe))
    assert abs(mean - 0.5) < 3 * sd < 0.2
    mean, sd = contrast(orthogonal_form(*posteriors["right"], probe, np.arange(n) // 4))
    assert abs(mean - 0.5) < 3 * sd < 0.1
