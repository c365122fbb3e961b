"""Terms as columns: bases against their definitions, new values against the log's, and what shrinkage leaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.contrib.hsgp.spectral_densities import diag_spectral_density_squared_exponential

from deconfound_jax.causal import bases, builders
from deconfound_jax.causal.fit import fit_prepared
from deconfound_jax.causal.scalars import sd_of
from deconfound_jax.causal.spec import Block
from deconfound_jax.causal.terms import prepare
from deconfound_jax.config import Causal
from deconfound_jax.structs import Design, Logs, Roles, Term

N = 120


def columns_of(prepared):
    """Block name -> its columns (n, k)."""
    return {b.name: prepared.rows.columns_nq[:, b.start : b.stop] for b in prepared.spec.blocks}


@pytest.fixture(scope="module")
def log(log_of):
    rng = np.random.default_rng(0)
    article_nk = rng.normal(size=(N, 4)) * [1.0, 2.0, 3.0, 0.1] + 5
    columns = {
        "outcome": rng.normal(size=N),
        "hour": rng.uniform(0, 24, N),
        "age": rng.normal(40, 9, N),
        "article": article_nk,
        "dose": rng.normal(size=N),
        "device": np.arange(N) % 2 == 0,
        "week": np.asarray([f"w{i % 6}" for i in range(N)], object),
    }
    features_nd = rng.normal(size=(N, 3)) + article_nk[:, :1] + np.sin(columns["hour"])[:, None]
    return log_of(columns), features_nd


def test_prior_sds_of_a_gaussian_process_are_numpyros_spectral_density():
    scaling: dict = {}
    spectrum = bases.lay_hilbert(np.linspace(-2, 2, 30), "hour", 12, scaling)
    psi = {"hour.scale": jnp.asarray(0.7), "hour.lengthscale": jnp.asarray(0.9)}
    with jax.enable_x64(True):
        expected = diag_spectral_density_squared_exponential(0.7**2, 0.9, scaling["hour.half_width"], 12, 1)
        found = sd_of(psi, "", Block("hour", 0, 12, None, spectrum))
    np.testing.assert_allclose(found**2, expected, rtol=1e-5)


def test_hilbert_basis_gives_the_squared_exponential_kernel():
    values_n, scaling = np.random.default_rng(0).uniform(-1.7, 1.7, 40), {}
    spectrum = bases.lay_hilbert(values_n, "hour", 30, scaling)
    basis_nk = bases.hilbert(values_n, "hour", 30, scaling)
    psi = {"hour.scale": jnp.asarray(1.0), "hour.lengthscale": jnp.asarray(0.6)}
    sd_k = np.asarray(sd_of(psi, "", Block("hour", 0, 30, None, spectrum)))
    kernel = np.exp(-0.5 * (values_n[:, None] - values_n[None, :]) ** 2 / 0.36)
    np.testing.assert_allclose((basis_nk * sd_k[None, :] ** 2) @ basis_nk.T, kernel, atol=2e-3)


def test_spline_wiggles_are_the_penalised_part_of_a_cubic_spline():
    rng = np.random.default_rng(0)
    values_n, weight_n, scaling = rng.normal(size=200), rng.uniform(1, 3, 200), {}
    bases.lay_spline(values_n, weight_n, "hour", 9, scaling)
    wiggles_nk = bases.spline(values_n, "hour", scaling)
    line_n2 = np.stack([np.ones(200), values_n], 1)
    assert wiggles_nk.shape == (200, 7)
    np.testing.assert_allclose(line_n2.T @ (wiggles_nk * weight_n[:, None]), 0, atol=1e-9)
    np.testing.assert_allclose(np.average((wiggles_nk**2).sum(1), weights=weight_n), 1.0)
    # A cubic lies in the span; second differences of the spline's coefficients are the iid ones, up to one factor.
    span_nk = np.concatenate([line_n2, wiggles_nk], 1)
    assert np.abs(span_nk @ np.linalg.lstsq(span_nk, values_n**3)[0] - values_n**3).max() < 1e-8
    basis_nk, u_kj = bases._b_spline(values_n, "hour", scaling), rng.normal(size=(7, 4))
    b_kj = np.linalg.lstsq(basis_nk, wiggles_nk @ u_kj)[0]
    ratio = np.diff(b_kj, 2, axis=0) / u_kj
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)


TERMS = [
    "hour", "treatment(dose)", "smooth(hour)", "smooth(hour, bases=7)", "smooth(hour, spline, bases=9)",
    "embedding(article)", "interaction(hour * age)", "interaction(text * age) + age",
    "interaction(device * text) + device",
]  # fmt: skip


@pytest.mark.parametrize("text", TERMS)
def test_columns_at_the_logs_values_are_the_models(log, text):
    logs, features_nd = log
    design = Design.parse(text)
    prepared = prepare(logs, features_nd, design)
    found = builders.columns_at(design.terms[0], logs.columns, prepared.scaling)
    made = columns_of(prepared)
    if "text" in text:  # the columns are the features times what is found
        ((name, value_n1),) = found.items()
        found = {name: made["text"] * value_n1}
    left_out = {"text", "dose.expected", "dose.means"} | {t.column for t in design.terms[1:]}
    assert found.keys() == made.keys() - left_out
    for name, values_nk in found.items():
        np.testing.assert_allclose(values_nk, made[name], atol=1e-10, err_msg=name)


@pytest.mark.parametrize("text", ["smooth(hour)", "smooth(hour, spline)"])
def test_beyond_the_log_only_the_line_goes_on(log, text):
    logs, features_nd = log
    design = Design.parse(text)
    scaling = prepare(logs, features_nd, design).scaling
    high = logs.columns["hour"].max()
    edge, beyond = (builders.columns_at(design.terms[0], {"hour": np.asarray([h])}, scaling) for h in (high, 99.0))
    if "spline" not in text:
        np.testing.assert_allclose(beyond["hour.wiggles"], edge["hour.wiggles"], atol=1e-12)
    assert beyond["hour.line"][0, 0] > edge["hour.line"][0, 0] + 1


def test_an_embedding_keeps_its_geometry_and_its_rank(log, log_of):
    logs, features_nd = log
    article_nk = logs.columns["article"]
    twice = log_of({**logs.columns, "article": np.concatenate([article_nk, article_nk], 1)})
    made = columns_of(prepare(twice, features_nd, Design.parse("embedding(article)")))
    standard_nk = (article_nk - article_nk.mean(0)) / article_nk.std(0)
    assert made["article"].shape == (N, 4)
    np.testing.assert_allclose(made["article"] @ made["article"].T, 2 * standard_nk @ standard_nk.T, atol=1e-8)


def test_expected_features_are_the_ridge_prediction(log_of):
    rng = np.random.default_rng(0)
    article_nk = rng.normal(size=(N, 5))
    features_nd = article_nk @ rng.normal(size=(5, 3)) + 1e-3 * rng.normal(size=(N, 3))
    logs = log_of({"outcome": rng.normal(size=N), "article": article_nk})
    made = columns_of(prepare(logs, features_nd, Design.parse("embedding(article)")))
    # Nearly a function of the article: what is expected is the features themselves, rotated.
    text_nd, expected_nk = made["text"], made["article.expected"]
    np.testing.assert_allclose(expected_nk @ expected_nk.T, text_nd @ text_nd.T, atol=0.05)


def test_ridge_strength_follows_the_signal():
    rng = np.random.default_rng(0)
    source_nk = rng.normal(size=(400, 30))
    truth_kd = np.stack([rng.normal(size=30), np.zeros(30)], 1)
    target_nd = source_nk @ truth_kd + rng.normal(size=(400, 2))
    source_nk, target_nd = source_nk - source_nk.mean(0), target_nd - target_nd.mean(0)
    found_kd = bases.expected_map(source_nk, target_nd, np.ones(400))
    least_squares = np.linalg.lstsq(source_nk, target_nd)[0]
    np.testing.assert_allclose(found_kd[:, 0], least_squares[:, 0], atol=0.05)
    assert (found_kd[:, 1] ** 2).sum() < 0.2 * (least_squares[:, 1] ** 2).sum()  # nothing to be found
    doubled = bases.expected_map(np.tile(source_nk, (2, 1)), np.tile(target_nd, (2, 1)), np.ones(800))
    weighted = bases.expected_map(source_nk, target_nd, np.full(400, 2.0))
    assert np.abs(weighted - found_kd).max() < 1e-10 and np.abs(doubled - least_squares).max() < 0.2


def test_an_interaction_is_the_product_of_standardised_columns(log):
    logs, features_nd = log
    made = columns_of(
        prepare(logs, features_nd, Design.parse("interaction(hour * age) + device + interaction(device * text)"))
    )
    z = {c: (logs.columns[c] - logs.columns[c].mean()) / logs.columns[c].std() for c in ("hour", "age")}
    np.testing.assert_allclose(made["hour:age"][:, 0], z["hour"] * z["age"])
    sign_n = np.where(logs.columns["device"], 1.0, -1.0)  # half of the rows have it
    np.testing.assert_allclose(made["text:device"], made["text"] * sign_n[:, None])


def test_what_no_interaction_can_be_is_named(log):
    logs, features_nd = log
    context = builders.Context(logs, features_nd, np.ones(N), {"text.column": "text"}, np.zeros((N, 0)))
    with pytest.raises(ValueError, match=r"interaction\(text \* week\): .*'week', got levels such as 'w0'"):
        list(builders.interaction(Term("interaction", "text", by="week"), context))
    with pytest.raises(ValueError, match="the text on one side at most"):
        builders.modifier(Term("interaction", "text", by="headline"), "headline")
    assert builders.modifier(Term("interaction", "hour", by="headline"), "headline") == "hour"


def test_a_treatment_comes_with_what_it_is_expected_to_be(log_of):
    rng = np.random.default_rng(0)
    features_nd, hour_n = rng.normal(size=(N, 3)), rng.normal(size=N)
    dose_n = features_nd @ [1.0, -1.0, 0.0] + 2 * hour_n + 0.1 * rng.normal(size=N)
    logs = log_of({"outcome": rng.normal(size=N), "dose": dose_n, "hour": hour_n})
    prepared = prepare(logs, features_nd, Design.parse("hour + treatment(dose)"))
    made, scaling = columns_of(prepared), prepared.scaling
    assert np.corrcoef(made["dose"][:, 0], made["dose.expected"][:, 0])[0, 1] > 0.99
    # Its slope on the features is left behind: what the hour does not explain is the text's.
    residual_n = made["dose.expected"][:, 0] - made["text"] @ scaling["dose.expected.text"]
    assert abs(np.corrcoef(residual_n, hour_n)[0, 1]) > 1 - 1e-9


def test_a_treatment_knows_the_means_of_levels_that_it_varies_in():
    rng = np.random.default_rng(0)
    weeks_n, rows_n = np.arange(60) % 6, np.arange(60)  # the second has one row a level
    text_nd, dose_n = rng.normal(size=(60, 2)), rng.normal(size=6)[weeks_n] + rng.normal(size=60)
    logs = Logs.of({"text": rows_n.astype(str), "outcome": dose_n, "dose": dose_n}, Roles())

    def made_with(*levels):
        context = builders.Context(logs, text_nd, np.ones(60), {}, np.zeros((60, 0)), levels)
        return {piece.name: piece.values for piece in builders.treatment(Term("treatment", "dose"), context)}

    assert "dose.means" not in made_with() and "dose.means" not in made_with(rows_n)
    np.testing.assert_array_equal(made_with(weeks_n)["dose.means"], made_with(rows_n, weeks_n)["dose.means"])
    made = made_with(weeks_n)
    for name in ("dose", "dose.expected"):
        means_n = np.stack([made[name][weeks_n == week].mean() for week in range(6)])[weeks_n]
        left_n = means_n - made["dose.means"] @ np.linalg.lstsq(made["dose.means"], means_n)[0]
        np.testing.assert_allclose(left_n, 0, atol=1e-10)


def test_within_removes_the_means_of_every_set_of_levels():
    rng = np.random.default_rng(0)
    levels, weight_n = (rng.integers(5, size=80), rng.integers(4, size=80)), rng.uniform(1, 2, 80)
    left_nk = bases.within(rng.normal(size=(80, 2)), levels, weight_n)
    for codes_n in levels:
        for code in range(4):
            mean_k = np.average(left_nk[codes_n == code], 0, weights=weight_n[codes_n == code])
            np.testing.assert_allclose(mean_k, 0, atol=1e-6)


def _leak(prepared, wanted, signal_n, sds):
    """Share of the signal's naive slope that is left in `wanted` (name, direction) when blocks are shrunk to `sds`.

    The outcome has no noise, so what is left is the prior's work alone.
    """
    made = columns_of(prepared)
    target_n = signal_n - signal_n.mean()
    results = []
    for names in (list(made), [name for name in made if not name.endswith((".expected", ".means"))], [wanted[0]]):
        columns_nq = np.concatenate([made[name] for name in names], 1)
        sd_q = np.concatenate([np.full(made[name].shape[1], sds.get(name, 1.0)) for name in names])
        theta_q = np.linalg.solve(columns_nq.T @ columns_nq + np.diag(sd_q**-2.0), columns_nq.T @ target_n)
        start = sum(made[name].shape[1] for name in names[: names.index(wanted[0])])
        results.append(theta_q[start : start + len(wanted[1])] @ wanted[1])
    return results[0] / results[2], results[1] / results[2]


@pytest.mark.parametrize("text", ["hour", "smooth(hour, spline)", "embedding(article)", "treatment(dose)"])
def test_shrinkage_of_a_confounder_does_not_leak(log_of, text):
    """Regularisation-induced confounding (Hahn et al. 2018): without E[phi | c], or E[t | x, c], it does."""
    rng = np.random.default_rng(0)
    n, direction = 300, np.full(6, 6**-0.5)
    hour_n, article_nk = rng.normal(size=n), rng.normal(size=(n, 20))
    signal_n = {"h": hour_n, "s": np.sin(2.5 * hour_n), "e": article_nk[:, :4].sum(1)}.get(text[0], hour_n)
    features_nd = rng.normal(size=(n, 6)) + signal_n[:, None] * direction[None, :]
    if text == "treatment(dose)":  # the text moves the outcome, and the dose moves with the text
        signal_n = features_nd @ direction
    dose_n = signal_n + rng.normal(size=n)
    logs = log_of({"outcome": signal_n, "hour": hour_n, "article": article_nk, "dose": dose_n})
    prepared = prepare(logs, features_nd, Design.parse(text))
    small = {"article": 0.05, "dose": 1.0, "text": 0.05 if text == "treatment(dose)" else 0.3}
    wanted = ("dose", np.ones(1)) if text == "treatment(dose)" else ("text", direction)
    beside, alone = _leak(prepared, wanted, signal_n, small | ({"hour": 0.2} if "spline" in text else {}))
    assert abs(beside) < 0.02
    assert alone == beside if text == "hour" else alone > 0.05


@pytest.mark.slow
def test_a_fit_finds_the_treatments_effect(log):
    logs, features_nd = log
    rng = np.random.default_rng(1)
    outcome_n = 2.0 * logs.columns["dose"] + np.sin(logs.columns["hour"] / 4) + 0.3 * rng.normal(size=N)
    logs = Logs.of({**logs.columns, "outcome": outcome_n}, logs.roles)
    design = Design.parse("smooth(hour, spline, bases=8) + treatment(dose)")
    posterior = fit_prepared(prepare(logs, features_nd, design), design, Causal(draws=200))
    effect_s = posterior.effect("dose")
    assert abs(effect_s.mean() - 2.0) < 3 * effect_s.std() < 0.3
