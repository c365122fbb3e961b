"""Blocks and their algebra, against dense matrices in numpy and against the NumPyro model itself."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from numpyro.handlers import seed as seed_handler
from numpyro.infer.util import log_density

from deconfound_jax.causal import conditional, nested
from deconfound_jax.causal.model import causal_model
from deconfound_jax.causal.terms import Block, Levels, Rows, Spec, empirical_logit, prepare
from deconfound_jax.structs import Design

TEXT, HOUR = Block("text", 0, 3), Block("hour", 3, 4, 1.0)
WEEK, SITE = Levels("week", 0, 6), Levels("site", 1, 4)
PUSH = Block("instruments", 4, 6, 1.0)
SPECS = {
    "text alone": Spec("normal", (TEXT,), (), None),
    "levels": Spec("normal", (TEXT, HOUR), (WEEK, SITE), None),
    "instruments": Spec("normal", (TEXT, HOUR), (), PUSH, gamma_sd=2.0, control_sd=0.7),
    "instruments and levels": Spec("normal", (TEXT, HOUR), (WEEK, SITE), PUSH, gamma_sd=1.5),
    "orthogonal": Spec("normal", (TEXT, HOUR), (WEEK, SITE), None, orthogonal=True),
    "orthogonal with instruments": Spec("normal", (TEXT, HOUR), (WEEK,), PUSH, orthogonal=True),
}
PSI = {
    "text.scale": 0.4, "week.scale": 0.6, "site.scale": 0.3, "sigma": 0.7, "first.text.scale": 0.5,
    "first.week.scale": 0.2, "first.site.scale": 0.9, "first.sigma": 0.8, "control": -0.6,
}  # fmt: skip


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_collapsed_likelihood_is_the_dense_normal_density(spec):
    rows, dense = _rows(spec), _dense(spec)
    found = conditional.solve(spec, conditional.moments(spec, rows), _psi(spec))
    cov = dense.design @ np.diag(1 / dense.prior) @ dense.design.T + np.diag(dense.noise)
    expected = scipy.stats.multivariate_normal.logpdf(dense.target, np.zeros(len(cov)), cov)
    np.testing.assert_allclose(found.log_likelihood, expected, rtol=1e-9)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_mean_is_generalised_ridge(spec):
    solution = conditional.solve(spec, conditional.moments(spec, _rows(spec)), _psi(spec))
    found = _mean_sites(spec, solution)
    precision, mean = _ridge(_dense(spec))
    for name, span in _dense(spec).spans.items():
        np.testing.assert_allclose(np.ravel(found[name]), mean[span], atol=1e-9, err_msg=name)
    draws = jax.vmap(lambda key: conditional.draw(spec, solution, key))(jax.random.split(jax.random.key(0), 4000))
    sd = np.sqrt(np.diag(np.linalg.inv(precision)))
    for name, span in _dense(spec).spans.items():
        found_sd = np.asarray(draws[name]).reshape(4000, -1).std(0)
        np.testing.assert_allclose(found_sd, sd[span], rtol=0.06, err_msg=name)


@pytest.mark.parametrize("spec", list(SPECS.values())[:4], ids=list(SPECS)[:4])
def test_model_and_algebra_are_one_model(spec):
    """log p(y, theta | psi) - log p(theta | y, psi) = log p(y | psi) at any theta."""
    rows, dense, psi = _rows(spec), _dense(spec), _psi(spec)
    precision, mean = _ridge(dense)
    expected = conditional.solve(spec, conditional.moments(spec, rows), psi).log_likelihood
    observed = {"outcome": rows.outcome_n} | ({"endogenous": rows.endogenous_n} if spec.endogenous else {})
    for theta in np.random.default_rng(3).normal(size=(2, len(mean))):
        sites, log_scale = dict(psi), 0.0
        for name, span in dense.spans.items():
            if name.endswith("intercept") or name == "gamma":
                sites[name] = theta[span][0]
                continue
            scale = dense.prior[span][0] ** -0.5
            sites[f"{name}.raw"] = theta[span] / scale
            log_scale += len(theta[span]) * np.log(scale)
        joint = log_density(causal_model, (spec, rows), observed, sites)[0] - log_scale
        for name, value in psi.items():
            law = scipy.stats.norm(0, spec.control_sd) if name == "control" else scipy.stats.halfnorm()
            joint = joint - law.logpdf(value)
        square = (theta - mean) @ precision @ (theta - mean)
        posterior = 0.5 * (np.linalg.slogdet(precision / (2 * np.pi))[1] - square)
        np.testing.assert_allclose(joint - posterior, expected, rtol=1e-9)


def test_log_prior_is_that_of_half_normals_on_the_log_scale():
    spec, rng = SPECS["instruments"], np.random.default_rng(0)
    one, two = rng.normal(size=(2, len(conditional.layout(spec).names)))

    def by_hand(raw):
        scales = scipy.stats.halfnorm.logpdf(np.exp(raw[:-1])) + raw[:-1]  # the Jacobian of exp
        return scales.sum() + scipy.stats.norm.logpdf(raw[-1], 0, spec.control_sd)

    found = conditional.log_prior(spec, jnp.asarray(one)) - conditional.log_prior(spec, jnp.asarray(two))
    np.testing.assert_allclose(found, by_hand(one) - by_hand(two))
    psi = conditional.constrain(spec, jnp.asarray(one))
    np.testing.assert_allclose([psi["sigma"], psi["control"]], [np.exp(one[1]), one[-1]])


def test_moments_of_two_halves_add_up():
    spec = SPECS["instruments and levels"]
    rows = _rows(spec)
    parts = [conditional.moments(spec, rows.take(part)) for part in (slice(0, 11), slice(11, None), slice(None))]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, atol=1e-10), *parts)


def test_absorbed_levels_equal_one_hot_columns():
    spec = SPECS["instruments and levels"]._replace(levels=(WEEK,))
    rows = _rows(spec)
    columns = np.concatenate([rows.columns_nq[:, :4], np.eye(6)[rows.levels_nc[:, 0]], rows.columns_nq[:, 4:]], 1)
    push = Block("instruments", 10, 12, 1.0)
    hot = spec._replace(blocks=(TEXT, HOUR, Block("week", 4, 10)), levels=(), instruments=push)
    psi = _psi(spec)
    one = conditional.solve(spec, conditional.moments(spec, rows), psi)
    two = conditional.solve(hot, conditional.moments(hot, rows._replace(columns_nq=columns)), psi)
    np.testing.assert_allclose(one.log_likelihood, two.log_likelihood, rtol=1e-10)
    found, expected = _mean_sites(spec, one), _mean_sites(hot, two)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-10, err_msg=name)


def test_newton_finds_the_mode_and_its_gradient_is_right():
    spec = Spec("binomial", (TEXT,), (WEEK,), None)
    rng = np.random.default_rng(0)
    rows = _rows(spec)._replace(outcome_n=rng.binomial(30, 0.1, 24) * 1.0, exposure_n=np.full(24, 30.0), offset=-2.0)
    rows, raw = jax.tree.map(jnp.asarray, rows), jnp.log(jnp.asarray([0.5, 0.8]))
    hot = np.concatenate([np.ones((24, 1)), rows.columns_nq[:, :3], np.eye(6)[rows.levels_nc[:, 0]]], 1)
    prior = np.asarray([1.0] + [0.5**-2] * 3 + [0.8**-2] * 6)

    def loss(theta):
        eta = rows.offset + hot @ theta
        fit = rows.weight_n @ (rows.outcome_n * eta - 30 * np.logaddexp(0, eta))
        return 0.5 * theta @ (prior * theta) - fit

    theta = scipy.optimize.minimize(loss, np.zeros(10), method="BFGS", options={"gtol": 1e-9}).x
    eta_n = nested.newton(spec, rows, raw, jnp.zeros(24))
    np.testing.assert_allclose(eta_n, hot @ theta, atol=1e-5)

    data = nested.Counts(rows, jnp.zeros(24), jnp.zeros(()))
    (value, _), gradient = nested._value_and_gradient(spec, data, raw)
    rate = scipy.special.expit(rows.offset + hot @ theta)
    hessian = np.diag(prior) + (hot * (rows.weight_n * 30 * rate * (1 - rate))[:, None]).T @ hot
    binomial = rows.weight_n @ scipy.stats.binom.logpmf(rows.outcome_n, 30, rate)
    laplace = binomial + 0.5 * (np.log(prior).sum() - theta @ (prior * theta) - np.linalg.slogdet(hessian)[1])
    np.testing.assert_allclose(-value, laplace + conditional.log_prior(spec, raw), rtol=1e-6)
    for i in range(2):
        step = 1e-4 * jnp.eye(2)[i]
        up, down = (nested._value_and_gradient(spec, data, raw + s)[0][0] for s in (step, -step))
        np.testing.assert_allclose(gradient[i], (up - down) / 2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["normal", "binomial"])
def test_model_draws_what_it_is_not_given(family):
    spec = SPECS["instruments and levels"]._replace(family=family)
    rows = _rows(spec)._replace(exposure_n=np.full(24, 9.0))
    outcome_n = seed_handler(causal_model, jax.random.key(0))(spec, rows)
    assert outcome_n.shape == (24,)
    assert np.isfinite(outcome_n).all() and len(np.unique(outcome_n)) > 1
    assert family == "normal" or set(np.unique(outcome_n)) <= set(range(10))


def test_prepare_standardises_with_weights_and_remembers_the_way_back(log_of):
    columns = {"outcome": [1.0, 3.0, 5.0], "hour": [0.0, 1.0, 1.0], "w": [2.0, 1.0, 1.0]}
    logs = log_of({name: np.asarray(value) for name, value in columns.items()}, weight="w")
    prepared = prepare(logs, np.asarray([[1.0], [1.0], [5.0]]), Design.parse("hour"))
    assert prepared.scaling["outcome.mean"] == 2.5 and prepared.scaling["features.mean"] == [2.0]
    np.testing.assert_allclose(prepared.scaling["hour.sd"], 0.5)
    back = prepared.rows.outcome_n * prepared.scaling["outcome.sd"] + prepared.scaling["outcome.mean"]
    np.testing.assert_allclose(back, [1.0, 3.0, 5.0])
    assert [block.name for block in prepared.spec.blocks] == ["text", "hour"]


def test_category_means_span_the_levels_means_of_the_features(log_of):
    rng = np.random.default_rng(0)
    features_nd, week_n = rng.normal(size=(12, 2)), np.arange(12) % 4
    logs = log_of({"outcome": rng.normal(size=12), "week": np.asarray([f"w{w}" for w in week_n], object)})
    prepared = prepare(logs, features_nd, Design.parse("category(week)"))
    block = next(b for b in prepared.spec.blocks if b.name == "week.means")
    text_nd, found_nk = prepared.rows.columns_nq[:, :2], prepared.rows.columns_nq[:, block.start : block.stop]
    means_nd = np.stack([text_nd[week_n == w].mean(0) for w in range(4)])[week_n]
    np.testing.assert_allclose(found_nk @ found_nk.T, means_nd @ means_nd.T, atol=1e-12)  # a rotation of the means


def test_equal_rows_of_counts_are_summed_and_others_are_not(log_of):
    columns = {
        "text": np.asarray(["a", "a", "a", "b"], object), "week": np.asarray(["u", "u", "v", "u"], object),
        "outcome": np.asarray([1.0, 2.0, 3.0, 4.0]), "shown": np.asarray([10.0, 20.0, 30.0, 40.0]),
    }  # fmt: skip
    logs, features_nd = log_of(columns, exposure="shown"), np.asarray([[0.0], [0.0], [0.0], [1.0]])
    prepared = prepare(logs, features_nd, Design.parse("intercept(week)", "binomial"))
    assert len(prepared.rows.outcome_n) == 3
    np.testing.assert_array_equal(prepared.rows.outcome_n[prepared.row_of_log_n], [3.0, 3.0, 3.0, 4.0])
    np.testing.assert_array_equal(prepared.rows.exposure_n[prepared.row_of_log_n], [30.0, 30.0, 30.0, 40.0])
    kept = prepare(logs, features_nd, Design.parse("intercept(week)"))  # not counts: all stay
    assert len(kept.rows.outcome_n) == len(kept.rows.columns_nq) == 4
    np.testing.assert_array_equal(kept.row_of_log_n, np.arange(4))


def test_a_column_named_like_a_site_keeps_its_own(log_of):
    rng = np.random.default_rng(0)
    logs = log_of({"outcome": rng.normal(size=6), "gamma": rng.normal(size=6), "features": rng.normal(size=6)})
    prepared = prepare(logs, rng.normal(size=(6, 2)), Design.parse("intercept(text) + gamma + features"))
    plan = conditional.layout(prepared.spec)
    sites = [name for name, _, _ in plan.outcome_sites] + [plan.absorbed.name]
    assert sorted(sites) == ["column.features", "column.gamma", "column.text", "intercept", "text"]
    assert prepared.scaling["features.mean"].shape == (2,)


@pytest.mark.parametrize(
    "change, features, design, message",
    [
        ({}, np.zeros((3, 2)), "", r"features: expected \(4, d\).*got \(3, 2\)"),
        ({}, np.full((4, 1), np.nan), "", "features: expected finite"),
        ({}, np.zeros((4, 1)), "wek", "needs column 'wek'; the log holds"),
        ({"outcome": np.full(4, 2.0)}, np.zeros((4, 1)), "", "outcome: expected values that differ, got 2"),
        ({}, np.zeros((4, 1)), Design("binomial"), "roles.exposure: expected a column of counts for binomial/identity"),
    ],
)
def test_prepare_names_what_is_wrong(log_of, change, features, design, message):
    logs = log_of({"outcome": np.arange(4.0)} | change)
    with pytest.raises(ValueError, match=message):
        prepare(logs, features, Design.parse(design) if isinstance(design, str) else design)


def test_missing_indicators_join_the_design(log_of):
    columns = {"outcome": np.arange(3.0), "age": np.arange(3.0), "age.missing": np.asarray([0.0, 1.0, 0.0])}
    logs = log_of(columns, confounders=("age", "age.missing"))
    blocks = prepare(logs, np.eye(3), Design.parse("age")).spec.blocks
    assert [b.name for b in blocks] == ["text", "age", "age.missing"]


def test_empirical_logit_by_hand():
    logit, variance = empirical_logit(np.asarray([0.0, 3.0]), np.asarray([7.0, 3.0]))
    np.testing.assert_allclose(logit, [np.log(0.5 / 7.5), np.log(3.5 / 0.5)])
    np.testing.assert_allclose(variance, [2 + 1 / 7.5, 1 / 3.5 + 2])


def _mean_sites(spec, solution):
    return conditional.sites(spec, solution, solution.mean_d, jnp.zeros_like(solution.level_linear_cm))


def _psi(spec):
    return {name: jnp.asarray(PSI[name]) for name in conditional.layout(spec).names}


def _rows(spec, n=24):
    """Rows with weights 1 and 2; precision differs where the spec may have it so."""
    rng = np.random.default_rng(1)
    columns_nq = rng.normal(size=(n, (spec.instruments or spec.blocks[-1]).stop))
    weight_n = 1.0 + (np.arange(n) % 3 == 0)
    precision_n = np.ones(n) if spec.orthogonal else rng.uniform(0.5, 2.0, n)
    if spec.orthogonal:
        root_n = np.sqrt(weight_n)[:, None]
        columns_nq[:, :3] = np.linalg.qr(columns_nq[:, :3] * root_n)[0] * [[3.0, 2.0, 1.0]] / root_n
    levels_nc = np.stack([np.arange(n) % 6, rng.integers(4, size=n)], 1)
    p_n, y_n = rng.normal(size=(2, n)) + columns_nq[:, :1].T
    return Rows(columns_nq, levels_nc, y_n + p_n, p_n * spec.endogenous, np.ones(n), precision_n, weight_n, 0.0)


def _dense(spec):
    """The model given psi as target = design theta + noise, both equations stacked, weight 2 as two rows."""
    rows, psi = _rows(spec), PSI
    twice = np.repeat(np.arange(len(rows.weight_n)), rows.weight_n.astype(int))
    columns, levels = rows.columns_nq[twice], rows.levels_nc[twice]
    p, y = rows.endogenous_n[twice], rows.outcome_n[twice]

    def equation(blocks, prefix):
        parts = [(prefix + "intercept", np.ones((len(y), 1)), 1.0)]
        for b in blocks:
            parts.append((prefix + b.name, columns[:, b.start : b.stop], b.sd or psi[f"{prefix}{b.name}.scale"]))
        for v in spec.levels:
            parts.append((prefix + v.name, np.eye(v.count)[levels[:, v.column]], psi[f"{prefix}{v.name}.scale"]))
        return parts

    parts, noise, target = equation(spec.blocks, ""), psi["sigma"] ** 2 / rows.precision_n[twice], y
    upper = [values for _, values, _ in parts]
    if spec.endogenous:
        k, first = psi["control"] / psi["first.sigma"], equation(spec.first_blocks, "first.")
        parts += [("gamma", p[:, None], spec.gamma_sd), *first]
        upper += [p[:, None], *[-k * values for _, values, _ in first]]
        lower = np.concatenate([v for _, v, _ in first], 1)
        lower = np.concatenate([np.zeros((len(y), sum(u.shape[1] for u in upper) - lower.shape[1])), lower], 1)
        noise = np.concatenate([noise, np.full(len(y), psi["first.sigma"] ** 2)])
        target = np.concatenate([y - k * p, p])
    design = np.concatenate(upper, 1)
    design = np.concatenate([design, lower]) if spec.endogenous else design
    ends = np.cumsum([values.shape[1] for _, values, _ in parts])
    spans = {name: slice(end - values.shape[1], end) for (name, values, _), end in zip(parts, ends, strict=True)}
    prior = np.concatenate([np.full(values.shape[1], sd**-2.0) for _, values, sd in parts])
    return SimpleNamespace(design=design, noise=noise, target=target, prior=prior, spans=spans)


def _ridge(dense):
    precision = (dense.design / dense.noise[:, None]).T @ dense.design + np.diag(dense.prior)
    return precision, np.linalg.solve(precision, (dense.design / dense.noise[:, None]).T @ dense.target)
