"""The algebra of blocks, levels and equations, against dense matrices in numpy and against the NumPyro model itself."""

import functools
from types import SimpleNamespace
from typing import NamedTuple

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
from deconfound_jax.causal.scalars import constrain, controls, gammas, log_prior, scalars, sd_of
from deconfound_jax.causal.solves import dense_terms
from deconfound_jax.causal.spec import FLAT_SD, Block, Levels, Rows, Spec, equations_of
from deconfound_jax.design import FAMILIES

TEXT, HOUR = Block("text", 0, 3), Block("hour", 3, 4, 1.0)
WEEK, SITE = Levels("week", 0, 6), Levels("site", 1, 4)
PUSH = Block("instruments", 4, 6, 1.0)
ONE, TWO, GUARD = equations_of(("p",)), equations_of(("p", "q")), equations_of(("p",), "harm")
SMOOTH = Block("hour", 3, 4, None, (1.3,))
SPECS = {
    "text alone": Spec("normal", (TEXT,), ()),
    "levels": Spec("normal", (TEXT, HOUR), (WEEK, SITE)),
    "instruments": Spec("normal", (TEXT, HOUR), (), PUSH, gamma_sd=2.0, control_sd=0.7, equations=ONE),
    "instruments and levels": Spec("normal", (TEXT, HOUR), (WEEK, SITE), PUSH, gamma_sd=1.5, equations=ONE),
    "two endogenous": Spec("normal", (TEXT, HOUR), (WEEK, SITE), PUSH, gamma_sd=1.5, equations=TWO),
    "endogenous and guardrail": Spec("normal", (TEXT, SMOOTH), (WEEK,), PUSH, equations=GUARD),
    "absorbed": Spec("normal", (TEXT, SMOOTH), (WEEK._replace(absorbed=True), SITE)),
    "orthogonal": Spec("normal", (TEXT, HOUR), (WEEK, SITE), orthogonal=True),
    "orthogonal with instruments": Spec("normal", (TEXT, HOUR), (WEEK,), PUSH, orthogonal=True, equations=ONE),
    "orthogonal with two endogenous": Spec("normal", (TEXT, HOUR), (WEEK,), PUSH, orthogonal=True, equations=TWO),
}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_collapsed_likelihood_is_the_dense_normal_density(spec):
    found, dense = _solved(spec), _dense(spec)
    cov = dense.design @ np.diag(1 / dense.prior) @ dense.design.T + np.eye(len(dense.target))
    expected = dense.log_jacobian + scipy.stats.multivariate_normal.logpdf(dense.target, np.zeros(len(cov)), cov)
    np.testing.assert_allclose(found.log_likelihood, expected, rtol=1e-9)


def test_both_derivatives_of_the_dense_terms_are_those_of_their_formula():
    rng = np.random.default_rng(0)
    roots_kdd, linear_kd = jnp.asarray(rng.normal(size=(3, 5, 5))), jnp.asarray(rng.normal(size=(3, 5)))

    def system(psi_k):
        return jnp.einsum("k,kde,kfe->df", jnp.exp(psi_k), roots_kdd, roots_kdd), jnp.sin(psi_k) @ linear_kd

    def ours(psi_k):
        matrix, linear = system(psi_k)
        chol = jnp.linalg.cholesky(matrix)
        mean = jax.scipy.linalg.cho_solve((chol, True), linear)
        quadratic, log_det = dense_terms(matrix, linear, chol, mean)
        return quadratic - 0.7 * log_det

    def formula(psi_k):
        matrix, linear = system(psi_k)
        return linear @ jnp.linalg.solve(matrix, linear) - 0.7 * jnp.linalg.slogdet(matrix)[1]

    at = jnp.asarray([0.3, -0.2, 0.5])
    np.testing.assert_allclose(ours(at), formula(at), rtol=1e-10)
    np.testing.assert_allclose(jax.grad(ours)(at), jax.grad(formula)(at), rtol=1e-9)
    np.testing.assert_allclose(jax.hessian(ours)(at), jax.hessian(formula)(at), rtol=1e-8)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_mean_is_generalised_ridge(spec):
    found, dense = _solved(spec), _dense(spec)
    precision, mean = _ridge(dense)
    for name, span in dense.spans.items():
        np.testing.assert_allclose(np.ravel(found.mean[name]), mean[span], atol=1e-9, err_msg=name)
    sd = np.sqrt(np.diag(np.linalg.inv(precision)))
    for name, span in dense.spans.items():
        found_sd = np.asarray(found.draws[name]).reshape(4000, -1).std(0)
        np.testing.assert_allclose(found_sd, sd[span], rtol=0.06, err_msg=name)


@pytest.mark.parametrize("spec", list(SPECS.values())[:7], ids=list(SPECS)[:7])
def test_model_and_algebra_are_one_model(spec):
    """log p(y, theta | psi) - log p(theta | y, psi) = log p(y | psi) at any theta."""
    rows, dense, psi = _rows(spec), _dense(spec), _psi(spec)
    precision, mean = _ridge(dense)
    expected = _solved(spec).log_likelihood
    single = {name for e in (None, *spec.equations) for _, name in gammas(spec, e)}
    for theta in np.random.default_rng(3).normal(size=(2, len(mean))):
        sites, log_scale = dict(psi), 0.0
        for name, span in dense.spans.items():
            if name.endswith("intercept") or name in single:
                sites[name] = theta[span][0]
                continue
            scale = dense.prior[span] ** -0.5
            sites[f"{name}.raw"] = theta[span] / scale
            log_scale += np.log(scale).sum()
        joint = _log_joint(spec, rows, sites) - log_scale
        square = (theta - mean) @ precision @ (theta - mean)
        posterior = 0.5 * (np.linalg.slogdet(precision / (2 * np.pi))[1] - square)
        np.testing.assert_allclose(joint - posterior, expected, rtol=1e-9)


def test_log_prior_is_that_of_half_normals_on_the_log_scale():
    spec, rng = SPECS["instruments"], np.random.default_rng(0)
    one = rng.normal(size=len(scalars(spec)))
    scales = scipy.stats.halfnorm.logpdf(np.exp(one[:-1])) + one[:-1]  # the Jacobian of exp
    expected = scales.sum() + scipy.stats.norm.logpdf(one[-1], 0, spec.control_sd)
    np.testing.assert_allclose(log_prior(spec, jnp.asarray(one)), expected)
    psi = constrain(spec, jnp.asarray(one))
    np.testing.assert_allclose([psi["sigma"], psi["control"]], [np.exp(one[1]), one[-1]])


def test_moments_of_two_halves_add_up():
    spec = SPECS["instruments and levels"]
    rows = _rows(spec)
    moments = jax.jit(conditional.moments, static_argnums=0)
    parts = [moments(spec, rows.take(part)) for part in (slice(0, 11), slice(11, None), slice(None))]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, atol=1e-10), *parts)


def test_absorbed_levels_equal_one_hot_columns():
    spec = SPECS["instruments and levels"]._replace(levels=(WEEK,))
    rows = _rows(spec)
    columns = np.concatenate([rows.columns_nq[:, :4], np.eye(6)[rows.levels_nc[:, 0]], rows.columns_nq[:, 4:]], 1)
    push = Block("instruments", 10, 12, 1.0)
    hot = spec._replace(blocks=(TEXT, HOUR, Block("week", 4, 10)), levels=(), instruments=push)
    psi = _psi(spec)
    one, two = _conditional(spec, rows, psi), _conditional(hot, rows._replace(columns_nq=columns), psi)
    np.testing.assert_allclose(one.log_likelihood, two.log_likelihood, rtol=1e-10)
    for name in two.mean:
        np.testing.assert_allclose(one.mean[name], two.mean[name], atol=1e-10, err_msg=name)


def test_newton_finds_the_mode_and_its_gradient_is_right():
    spec = Spec("binomial", (TEXT,), (WEEK,))
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

    data = nested.Working(rows, jnp.zeros(24), jnp.zeros(()))
    (value, _), gradient = nested._value_and_gradient(spec, data, raw)
    rate = scipy.special.expit(rows.offset + hot @ theta)
    hessian = np.diag(prior) + (hot * (rows.weight_n * 30 * rate * (1 - rate))[:, None]).T @ hot
    binomial = rows.weight_n @ scipy.stats.binom.logpmf(rows.outcome_n, 30, rate)
    laplace = binomial + 0.5 * (np.log(prior).sum() - theta @ (prior * theta) - np.linalg.slogdet(hessian)[1])
    np.testing.assert_allclose(-value, laplace + log_prior(spec, raw), rtol=1e-6)
    for i in range(2):
        step = 1e-4 * jnp.eye(2)[i]
        up, down = (nested._value_and_gradient(spec, data, raw + s)[0][0] for s in (step, -step))
        np.testing.assert_allclose(gradient[i], (up - down) / 2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_draws_what_it_is_not_given(family):
    spec = SPECS["two endogenous"]._replace(family=family, categories=4 if family == "ordinal" else 0)
    rows = _rows(spec)._replace(exposure_n=np.full(24, 1.0 if family == "bernoulli" else 9.0))
    outcome_n = seed_handler(causal_model, jax.random.key(0))(spec, rows)  # as one program: thrice the compiling
    assert outcome_n.shape == (24,)
    assert np.isfinite(outcome_n).all() and len(np.unique(outcome_n)) > 1
    top = {"bernoulli": 1, "binomial": 9, "beta_binomial": 9, "ordinal": 3}.get(family, np.inf)
    whole = family not in ("normal", "student_t")
    assert not whole or ((outcome_n >= 0) & (outcome_n <= top) & (outcome_n == np.round(outcome_n))).all()


class Found(NamedTuple):
    log_likelihood: jax.Array
    mean: dict[str, jax.Array]  # of the coefficients by site
    draws: dict[str, jax.Array]  # 4,000 of them


@functools.partial(jax.jit, static_argnames="spec")
def _conditional(spec, rows, psi):
    solution = conditional.solve(spec, conditional.moments(spec, rows), psi)
    mean = conditional.sites(spec, solution, solution.mean_d, jnp.zeros_like(solution.level_linear_um))
    keys = jax.random.split(jax.random.key(0), 4000)
    return Found(solution.log_likelihood, mean, jax.vmap(lambda key: conditional.draw(spec, solution, key))(keys))


@functools.cache
def _solved(spec):
    return _conditional(spec, _rows(spec), _psi(spec))


@functools.partial(jax.jit, static_argnames="spec")
def _log_joint(spec, rows, sites):
    """log p(y, theta | psi), theta's coordinates as the model's sites."""
    observed = {"outcome": rows.outcome_n, "endogenous": rows.endogenous_nm}
    joint = log_density(causal_model, (spec, rows), observed, sites)[0]
    return joint - sum(s.prior.log_prob(sites[s.name]) for s in scalars(spec))


def _psi(spec):
    """A value for every scalar, positive where it must be; fixed by its place."""
    value = np.random.default_rng(5).uniform(0.3, 0.9, len(scalars(spec)))
    return {s.name: jnp.asarray(v if s.positive else -v) for s, v in zip(scalars(spec), value, strict=True)}


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
    values = rng.normal(size=(n, 1 + len(spec.equations))) + columns_nq[:, :1]
    ones, outcome_n = np.ones(n), values.sum(1)
    return Rows(columns_nq, levels_nc, outcome_n, values[:, 1:], ones, precision_n, weight_n, ones, 0.0)


def _dense(spec):
    """The model given psi as target = design theta + N(0, I), every row whitened, weight 2 as two rows."""
    rows, psi = _rows(spec), _psi(spec)
    twice = np.repeat(np.arange(len(rows.weight_n)), rows.weight_n.astype(int))
    columns, levels, values = rows.columns_nq[twice], rows.levels_nc[twice], rows.endogenous_nm[twice]
    order = (*spec.equations, None)

    def equation(e):
        prefix = e.prefix if e else ""
        parts = [(prefix + "intercept", np.ones((len(twice), 1)), 1.0)]
        for b in spec.blocks_of(e):
            parts.append((prefix + b.name, columns[:, b.start : b.stop], sd_of(psi, prefix, b)))
        for v in spec.levels:
            sd = FLAT_SD if v.absorbed else psi[f"{prefix}{v.name}.scale"]
            parts.append((prefix + v.name, np.eye(v.count)[levels[:, v.column]], sd))
        return parts + [(name, values[:, i : i + 1], spec.gamma_sd) for i, name in gammas(spec, e)]

    factor = np.diag([*(psi[f"{e.prefix}sigma"] for e in spec.equations), psi["sigma"]]).astype(float)
    for place, name in controls(spec):
        factor[place] = psi[name]
    scale = np.ones((len(twice), len(order)))
    scale[:, -1] = np.sqrt(rows.precision_n[twice])  # of the outcome's own noise
    white = np.linalg.inv(factor)[None] * scale[:, :, None]  # (row, error, variable)
    parts = [(i, *part) for i, e in enumerate(order) for part in equation(e)]
    design = np.concatenate([(white[:, :, i, None] * v[:, None, :]).reshape(-1, v.shape[1]) for i, _, v, _ in parts], 1)
    observed = np.concatenate([values, rows.outcome_n[twice, None]], 1)
    target = np.einsum("nki,ni->nk", white, observed).reshape(-1)
    ends = np.cumsum([v.shape[1] for _, _, v, _ in parts])
    spans = {name: slice(end - v.shape[1], end) for (_, name, v, _), end in zip(parts, ends, strict=True)}
    prior = np.concatenate([np.broadcast_to(sd, v.shape[1]) ** -2.0 for _, _, v, sd in parts])
    jacobian = np.log(np.abs(np.linalg.det(white))).sum()
    return SimpleNamespace(design=design, target=target, prior=prior, spans=spans, log_jacobian=jacobian)


def _ridge(dense):
    precision = dense.design.T @ dense.design + np.diag(dense.prior)
    return precision, np.linalg.solve(precision, dense.design.T @ dense.target)
