"""Fits against NUTS, against classical estimators, and against what must not change them."""

import dataclasses

import numpy as np
import pytest

from deconfound_jax.causal import conditional, nested
from deconfound_jax.causal.diagnostics import pareto_k, split_rhat
from deconfound_jax.causal.fit import fit, fit_prepared
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.spec import summed
from deconfound_jax.causal.terms import prepare
from deconfound_jax.config import Causal
from deconfound_jax.structs import Design

CONTRAST = np.asarray([0.0, 1.0, -1.0])
TRUTH = np.asarray([0.3, 0.6, -0.3])
DESIGNS = {
    "covariate": Design.parse("p"),
    "covariate and week": Design.parse("p + category(week)"),
    "instrument": Design.parse("endogenous(p ~ z)"),
    "counts": Design.parse("category(week)", "binomial"),
}


@pytest.fixture(scope="session")
def case(entangled, clicks):
    """name -> a prepared log, its design, and the reference by NUTS (one run a design and session)."""
    made = {}

    def get(name):
        if name not in made:
            logs, features_nd = clicks()[:2] if name == "counts" else entangled()
            prepared = prepare(logs, features_nd, DESIGNS[name])
            nuts = fit_prepared(prepared, DESIGNS[name], Causal(fit="nuts", draws=1600))
            made[name] = prepared, DESIGNS[name], nuts
        return made[name]

    return get


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", ["covariate", "covariate and week", "instrument"])
def test_exact_agrees_with_nuts(case, name):
    prepared, design, nuts = case(name)
    exact = fit_prepared(prepared, design, Causal(draws=4000))
    assert exact.converged and exact.diagnostics["method"] == "exact"
    _assert_close(exact, nuts, mean=0.1, sd=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_laplace_agrees_with_nuts(case):
    prepared, design, nuts = case("counts")
    laplace = fit_prepared(prepared, design, Causal(draws=1000))
    assert laplace.converged and laplace.diagnostics["method"] == "laplace"
    _assert_close(laplace, nuts, mean=0.4, sd=0.25)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", ["covariate and week", "instrument", "counts"])
def test_svi_agrees_with_nuts_or_says_it_did_not_converge(case, name):
    prepared, design, nuts = case(name)
    svi = fit_prepared(prepared, design, Causal(fit="svi", draws=1000))
    if svi.converged or name == "instrument":  # there it must not hide behind its own check
        assert svi.converged
        _assert_close(svi, nuts, mean=0.4, sd=0.25)
    assert svi.converged == (svi.diagnostics["pareto_k"] <= 0.7)
    assert svi.status == ("converged" if svi.converged else "not converged")


def test_naive_fails_and_the_instrument_does_not(entangled):
    share = {"": [], "p": [], "endogenous(p ~ z)": []}
    for seed in range(5):
        for design, values in share.items():
            text_d = _slopes(_exact(*entangled(seed=seed), design)).mean(0)
            values.append(_share(text_d, seed))
    naive, covariate, ours = (np.mean(values) for values in share.values())
    assert ours > 0.97
    assert naive < ours - 0.08 and covariate < ours - 0.08
    assert all(a > b for a, b in zip(share["endogenous(p ~ z)"], share[""], strict=True))


def test_exact_agrees_with_two_stage_least_squares(entangled):
    for seed in range(3):
        logs, features_nd = entangled(seed=seed)
        one = np.ones((len(logs), 1))
        p, z, y = (logs.columns[name] for name in ("p", "z", "outcome"))
        instruments, regressors = (np.concatenate([one, features_nd, v[:, None]], 1) for v in (z, p))
        fitted = instruments @ np.linalg.lstsq(instruments, regressors, rcond=None)[0]
        gamma = np.linalg.lstsq(fitted, y, rcond=None)[0][-1]
        found_s = _exact(logs, features_nd, "endogenous(p ~ z)").effect("p")
        assert abs(found_s.mean() - gamma) < 2 * found_s.std()
        assert abs(found_s.mean() - 3.0) < 4 * found_s.std()


def test_without_confounding_naive_and_ours_agree(entangled):
    logs, features_nd = entangled(gamma=0.0, kappa=0.0)
    naive, ours = (_slopes(_exact(logs, features_nd, d)).mean(0) for d in ("", "endogenous(p ~ z) + category(week)"))
    np.testing.assert_allclose(naive, ours, atol=0.04)
    np.testing.assert_allclose(ours, TRUTH, atol=0.1)


def test_a_confounder_shifted_and_rescaled_changes_nothing(entangled):
    logs, features_nd = entangled(n=300)
    moved = dataclasses.replace(logs, columns={**logs.columns, "p": 7 * logs.columns["p"] + 100})
    for design in ("p + category(week)", "endogenous(p ~ z)"):
        one, two = _exact(logs, features_nd, design), _exact(moved, features_nd, design)
        np.testing.assert_allclose(_slopes(one).mean(0), _slopes(two).mean(0), atol=1e-4)
        np.testing.assert_allclose(one.effect("p").mean(), 7 * two.effect("p").mean(), rtol=1e-4)


@pytest.mark.parametrize("design", ["p + category(week)", "endogenous(p ~ z) + intercept(week)"])
def test_weight_two_equals_the_row_twice(entangled, log_of, design):
    logs, features_nd = entangled(n=200)
    weight_n = 1.0 + (np.arange(200) % 2)
    weighted = log_of({**logs.columns, "w": weight_n}, weight="w")
    twice = np.repeat(np.arange(200), weight_n.astype(int))
    one, two = _exact(weighted, features_nd, design), _exact(logs.take(twice), features_nd[twice], design)
    for site in one.draws:
        np.testing.assert_allclose(one[site].mean(0), two[site].mean(0), atol=2e-4, err_msg=site)
        np.testing.assert_allclose(one[site].std(0), two[site].std(0), atol=2e-4, err_msg=site)


def test_counts_split_over_equal_rows_change_nothing(clicks, log_of):
    logs, features_nd, _ = clicks(n=60)
    half = np.floor(logs.outcome_n / 2), np.floor(logs.exposure_n / 2)
    rest = logs.outcome_n - half[0], logs.exposure_n - half[1]
    columns = {name: np.concatenate([v, v]) for name, v in logs.columns.items()}
    columns |= {"outcome": np.concatenate([half[0], rest[0]]), "shown": np.concatenate([half[1], rest[1]])}
    split = log_of(columns, exposure="shown")
    for design in (Design("binomial"), Design("normal", (), "empirical_logit")):
        both = (prepare(v, np.tile(features_nd, (len(v) // 60, 1)), design) for v in (logs, split))
        one, two = (summed(prepared.spec, prepared.rows) for prepared in both)
        for field in ("outcome_n", "exposure_n", "precision_n", "columns_nq"):
            np.testing.assert_allclose(getattr(one, field), getattr(two, field), err_msg=field)


def test_pooling_leaks_and_a_category_does_not(log_of):
    """600 levels of 4 rows whose effects move wording and outcome; the wording's true effect is 0."""
    rng = np.random.default_rng(0)
    level_n = np.repeat(np.arange(600), 4)
    effect_n = rng.normal(size=600)[level_n]
    features_nd = rng.normal(size=(2400, 2))
    features_nd[:, 0] += effect_n
    columns = {"outcome": effect_n + rng.normal(size=2400), "level": np.asarray([f"{v:03}" for v in level_n], object)}
    logs = log_of(columns)
    naive, pooled, absorbed = (
        _slopes(_exact(logs, features_nd, d)).mean(0)[0] for d in ("", "intercept(level)", "category(level)")
    )
    assert naive > 0.4 and pooled > 0.1
    assert abs(absorbed) < 0.05


def test_rotated_features_give_the_same_posterior(entangled, monkeypatch):
    logs, features_nd = entangled(n=200)
    features_nd = np.concatenate([features_nd, np.random.default_rng(0).normal(size=(200, 12))], 1)
    prepared = prepare(logs, features_nd, Design.parse("category(week) + endogenous(p ~ z)"))
    rotated, _ = nested.fit_nested(prepared.spec, prepared.rows, 2000, 0)
    monkeypatch.setattr(nested.compress, "rotate", lambda spec, stats, *_: (spec, stats, None))
    plain, _ = nested.fit_nested(prepared.spec, prepared.rows, 2000, 0)
    for name in conditional.layout(prepared.spec).names:  # the scalars draw by draw, coefficients up to their noise
        np.testing.assert_allclose(rotated[name], plain[name], rtol=1e-3, atol=1e-4, err_msg=name)
    for name in ("text", "first.text", "gamma", "first.instruments"):
        sd = plain[name].std(0)
        np.testing.assert_allclose((rotated[name] - plain[name]).mean(0) / sd, 0.0, atol=0.15, err_msg=name)
        np.testing.assert_allclose(rotated[name].std(0) / sd, 1.0, atol=0.15, err_msg=name)


def test_a_second_fit_of_equal_shape_compiles_nothing(entangled):
    compiled = (nested._moments, nested._value_and_gradient, nested._log_posteriors, nested._draw_all)
    _exact(*entangled(n=120, seed=0), "p + category(week)")
    before = [f._cache_size() for f in compiled]
    _exact(*entangled(n=120, seed=1), "p + category(week)")
    assert [f._cache_size() for f in compiled] == before


def test_rows_without_a_click_stay_finite(log_of):
    rng = np.random.default_rng(0)
    features_nd, week_n = rng.normal(size=(80, 2)), np.arange(80) % 5
    hit = np.where((week_n == 0) | (features_nd[:, 0] < 0), 0.0, 20.0)  # one week at 0, the rest at 0 or all
    columns = {"outcome": hit, "shown": np.full(80, 20.0), "week": np.asarray([f"w{w}" for w in week_n], object)}
    logs = log_of(columns, exposure="shown")
    posterior = fit(logs, features_nd, Causal(design="category(week)", family="binomial", draws=128))
    assert posterior.diagnostics["method"] == "laplace"
    assert posterior.diagnostics["newton_step"] < 1e-6
    assert all(np.isfinite(value).all() for value in posterior.draws.values())
    assert posterior["text"][:, 0].mean() > 0.5


def test_posterior_round_trip_without_pickle(entangled, tmp_path):
    posterior = _exact(*entangled(n=100), "category(week) + endogenous(p ~ z)")
    posterior.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as data:
        assert all(data[name].dtype.kind in "fiU" for name in data.files)
    found = Posterior.load(tmp_path / "a.npz")
    assert found.design == posterior.design and found.diagnostics == posterior.diagnostics
    for part in ("draws", "scaling"):
        one, two = getattr(posterior, part), getattr(found, part)
        assert sorted(one) == sorted(two)
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])


def test_one_seed_one_file_and_another_seed_another(entangled, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _exact(*entangled(n=100), "category(week)", seed=seed).save(tmp_path / name)
    bytes_a, bytes_b, bytes_c = ((tmp_path / name).read_bytes() for name in "abc")
    assert bytes_a == bytes_b != bytes_c


def test_posterior_names_what_is_wrong(entangled, tmp_path, monkeypatch):
    posterior = _exact(*entangled(n=100), "p")
    with pytest.raises(KeyError, match="no site 'gama'; it has .*'intercept'"):
        posterior["gama"]
    monkeypatch.setattr("deconfound_jax.causal.posterior.VERSION", 0)
    posterior.save(tmp_path / "old")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="expected format version 1, got 0"):
        Posterior.load(tmp_path / "old")


def test_pareto_k_finds_the_tail():
    rng = np.random.default_rng(0)
    for k in (0.2, 0.5, 1.2):
        np.testing.assert_allclose(pareto_k(rng.exponential(k, 20_000)), k, atol=0.2)  # log weights: weights are Pareto
    assert pareto_k(np.asarray([0.0, np.nan])) == np.inf
    assert pareto_k(np.zeros(1000)) == -np.inf
    assert pareto_k(np.linspace(-2000.0, 0.0, 1000)) > 0.7  # one weight holds all, none overflows


def test_split_rhat_sees_chains_apart_and_drift():
    draws_cs = np.random.default_rng(0).normal(size=(2, 1000))
    assert abs(split_rhat(draws_cs) - 1) < 0.01
    assert split_rhat(draws_cs + np.asarray([[0.0], [1.0]])) > 1.1
    assert split_rhat(draws_cs + np.linspace(0, 2, 1000)[None, :]) > 1.1


def _exact(logs, features_nd, design, draws=512, seed=0):
    return fit(logs, features_nd, Causal(design=design, draws=draws, seed=seed))


def _slopes(posterior):
    """Draws (s, d) of the text's effect in units of y per unit of feature."""
    return posterior["text"] * (posterior.scaling["outcome.sd"] / posterior.scaling["features.sd"])[None, :]


def _share(text_d, seed):
    """True value of the best of 8 by prediction, as a share of the best by truth."""
    texts_bkd = np.random.default_rng([seed, 1]).normal(size=(4000, 8, 3))
    picked = np.take_along_axis(texts_bkd @ TRUTH, (texts_bkd @ text_d).argmax(1)[:, None], 1)
    return picked.mean() / (texts_bkd @ TRUTH).max(1).mean()


def _assert_close(posterior, reference, mean, sd):
    """Means within `mean` reference sds and sds within `sd` of each other, of a text contrast and the confounder."""
    confounder = next((name for name in ("gamma", "p") if name in reference.draws), None)
    pairs = {"contrast": (posterior["text"] @ CONTRAST, reference["text"] @ CONTRAST)}
    if confounder:
        pairs[confounder] = np.ravel(posterior[confounder]), np.ravel(reference[confounder])
    for name, (found_s, expected_s) in pairs.items():
        assert abs(found_s.mean() - expected_s.mean()) < mean * expected_s.std(), name
        assert abs(found_s.std() / expected_s.std() - 1) < sd, name
