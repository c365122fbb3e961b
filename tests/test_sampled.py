"""NUTS that goes on where it stopped, SVI by minibatches, and what is chosen when."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import Trace_ELBO

from deconfound_jax.causal import nuts, sites, svi
from deconfound_jax.causal.fit import choose, fit_prepared
from deconfound_jax.causal.guide import gaussian_guide
from deconfound_jax.causal.model import causal_model, slab
from deconfound_jax.causal.spec import single
from deconfound_jax.causal.terms import prepare
from deconfound_jax.config import Causal
from deconfound_jax.structs import Design


@pytest.fixture(scope="module")
def covariate(entangled):
    """A prepared log of 101 rows: seven minibatches of 16, the last of five."""
    logs, features_nd = entangled(n=101)
    design = Design.parse("p + intercept(week)")
    return prepare(logs, features_nd, design), design


def test_a_resumed_run_is_the_unbroken_one(covariate, tmp_path, monkeypatch):
    monkeypatch.setattr(nuts, "_LEAST", 50)
    prepared, _ = covariate
    start = sites.starting_draws(prepared, 64, 0)
    unbroken, _ = nuts.fit_nuts(prepared, start, 64, 0, 2, 100, tmp_path / "state.npz")
    with np.load(tmp_path / "state.npz", allow_pickle=False) as data:
        assert all(data[name].dtype.kind in "fiuUb" for name in data.files)
    strides = []
    monkeypatch.setattr(nuts, "advance", lambda *args, real=nuts.advance: strides.append(1) or real(*args))
    resumed, diagnostics = nuts.fit_nuts(prepared, start, 64, 0, 2, 100, tmp_path / "state.npz")
    assert len(strides) == 1  # of 50: the draws alone, no warm-up
    for name in unbroken:
        np.testing.assert_array_equal(unbroken[name], resumed[name], err_msg=name)
    assert {"rhat", "ess", "divergent", "chains", "converged"} == set(diagnostics)
    other = prepared._replace(rows=prepared.rows._replace(outcome_n=prepared.rows.outcome_n + 1))
    with pytest.raises(ValueError, match="causal.nuts_state .*: expected the state of this fit"):
        nuts.fit_nuts(other, start, 64, 0, 2, 100, tmp_path / "state.npz")


def test_disjoint_batches_average_to_the_whole_log(covariate):
    """ELBO and gradient, same noise in every batch; the last batch is filled up with rows of weight 0."""
    prepared, _ = covariate
    spec, rows = prepared.spec, single(prepared.rows)
    guide = gaussian_guide(spec, sites.starting_draws(prepared, 64, 0))
    d, c = (len(v) for v in _sizes(guide, spec, rows))
    params = {"wide.loc": jnp.full(d, 0.1), "wide.scale_tril": jnp.eye(d), "narrow.loc": jnp.zeros(c)}
    params["narrow.scale"] = jnp.ones(c)

    @jax.jit
    def elbo(params, rows):
        def loss(params):
            key = jax.random.key(1)
            return Trace_ELBO().loss(key, params, causal_model, guide.sample, spec, rows, **sites.observed(spec, rows))

        return jax.value_and_grad(loss)(params)

    order_n, batches = jax.random.permutation(jax.random.key(0), 101), 7
    parts = [svi.batch_of(rows, order_n, i, 16) for i in range(batches)]
    assert [int((part.weight_n > 0).sum()) for part in parts] == [16] * 6 + [5]
    found = [elbo(params, part) for part in parts]
    whole = elbo(params, rows)
    np.testing.assert_allclose(np.mean([value for value, _ in found]), whole[0], rtol=1e-4)
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, 0), *[gradient for _, gradient in found])
    for name in ("wide.loc", "wide.scale_tril", "narrow.loc"):
        size = np.abs(whole[1][name]).max()
        np.testing.assert_allclose(mean[name] / size, whole[1][name] / size, atol=1e-3, err_msg=name)
    assert np.std([value for value, _ in found]) > 1.0  # the batches differ, their mean does not


def test_minibatches_and_a_start_on_a_sample_reach_the_exact_fit(entangled, monkeypatch):
    logs, features_nd = entangled(n=2000)
    design = Design.parse("endogenous(p ~ z)")
    prepared = prepare(logs, features_nd, design)
    monkeypatch.setattr(svi, "START_ROWS", 500)
    found = fit_prepared(prepared, design, Causal(fit="svi", draws=512, svi_batch=300, svi_steps=2000))
    exact = fit_prepared(prepared, design, Causal(draws=512))
    assert found.diagnostics["batch"] == 300
    for name in ("gamma", "control", "text"):
        a, b = exact[name].reshape(512, -1), found[name].reshape(512, -1)
        assert (np.abs(a.mean(0) - b.mean(0)) < 0.5 * a.std(0)).all(), name
        np.testing.assert_allclose(b.std(0) / a.std(0), 1.0, atol=0.35, err_msg=name)


def test_a_horseshoe_keeps_what_matters_and_shrinks_the_rest(log_of, monkeypatch):
    monkeypatch.setattr(nuts, "_LEAST", 100)
    rng = np.random.default_rng(0)
    features_nd = rng.normal(size=(120, 12))
    logs = log_of({"outcome": features_nd[:, 0] + rng.normal(size=120)})
    design = Design.parse("")
    horseshoe = Causal(text_prior="horseshoe", draws=200, chains=2, warmup=150)
    prepared = prepare(logs, features_nd, design, horseshoe)
    assert choose(prepared, "auto") == (
        "nuts", "a horseshoe has a scale of its own for every feature; 1,440 cells (rows times columns) are few "
        "enough to sample",
    )  # fmt: skip
    with pytest.raises(ValueError, match="expected nuts, svi or auto, got 'laplace': a horseshoe"):
        choose(prepared, "laplace")
    ours, ridge = (fit_prepared(prepare(logs, features_nd, design, c), design, c) for c in (horseshoe, Causal()))
    rest = [np.sqrt(np.mean(p["text"][:, 1:] ** 2)) for p in (ours, ridge)]
    assert rest[0] < 0.85 * rest[1]
    assert ours["text"][:, 0].mean() > ridge["text"][:, 0].mean()


def test_a_slab_is_at_most_one():
    local = jnp.asarray([0.01, 1.0, 1e6])
    np.testing.assert_allclose(slab(0.1, local), [0.001, 0.1 / np.sqrt(1.01), 1.0], rtol=1e-4)


@pytest.mark.parametrize(
    "family, asked, expected",
    [("normal", "auto", "exact"), ("binomial", "auto", "laplace"), ("binomial", "nuts", "nuts")],
)
def test_choice_of_the_fit(family, asked, expected):
    def prepared(family):
        spec = types.SimpleNamespace(family=family, selection=None, head=None, blocks=())
        return types.SimpleNamespace(spec=spec)

    assert choose(prepared(family), asked)[0] == expected
    with pytest.raises(ValueError, match="causal.fit: exact needs the normal family, got 'binomial'"):
        choose(prepared("binomial"), "exact")


def _sizes(guide, spec, rows):
    """White coordinates of the guide: wide and narrow."""
    from numpyro.handlers import seed, trace

    made = trace(seed(guide.sample, jax.random.key(0))).get_trace(spec, rows)
    return made["wide.loc"]["value"], made["narrow.loc"]["value"]
