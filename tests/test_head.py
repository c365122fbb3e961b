"""A head in place of a linear f: its sites, its errors, and a truth that a line misses."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from deconfound_jax.causal import head as heads
from deconfound_jax.causal import nuts
from deconfound_jax.causal.fit import choose, fit
from deconfound_jax.causal.reward import model_form
from deconfound_jax.causal.spec import Head
from deconfound_jax.causal.terms import prepare
from deconfound_jax.config import Causal
from deconfound_jax.structs import Design


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, features_nd):
        hidden_nk = nn.tanh(nn.Dense(4)(features_nd))
        return nn.Dense(1)(hidden_nk)[:, 0]


MLP = Head(Mlp().init, Mlp().apply)


def _log(log_of, n=150):
    rng = np.random.default_rng(0)
    features_nd, p = rng.normal(size=(n, 1)), rng.normal(size=n)
    y = np.sin(2 * features_nd[:, 0]) + p + 0.2 * rng.normal(size=n)
    return log_of({"outcome": y, "p": p}), features_nd


def test_sites_are_paths_and_prior_sds_follow_fan_in():
    found = heads.leaves(MLP, 9)
    assert found["head.params.Dense_0.kernel"] == ((9, 4), 1 / 3)
    assert found["head.params.Dense_0.bias"] == ((4,), 1.0)
    assert found["head.params.Dense_1.kernel"] == ((4, 1), 0.5)
    start, features_nd = heads.initial(MLP, 9, jax.random.key(0)), np.ones((3, 9), np.float32)
    params = Mlp().init(jax.random.key(0), features_nd)
    np.testing.assert_array_equal(heads.evaluate(MLP, start, features_nd), Mlp().apply(params, features_nd))


def test_a_head_learns_what_a_line_misses(log_of, monkeypatch):
    monkeypatch.setattr(nuts, "_LEAST", 100)
    logs, features_nd = _log(log_of, n=100)
    config = Causal(design="p", draws=100, chains=1, warmup=150)
    grid_n1 = np.linspace(-1.5, 1.5, 31)[:, None]
    truth = np.sin(2 * grid_n1[:, 0])
    posterior = fit(logs, features_nd, config, head=MLP)
    assert posterior.diagnostics["method"] == "nuts" and "head" in posterior.diagnostics["why"]
    line, ours = model_form(fit(logs, features_nd, config), grid_n1), model_form(posterior, grid_n1, MLP)
    error = [np.std(reward.mean - truth) for reward in (line, ours)]
    assert error[1] < 0.25 < error[0]
    assert abs(posterior.effect("p").mean() - 1) < 0.1


def test_a_head_is_asked_for_where_the_fit_had_one(log_of):
    logs, features_nd = _log(log_of, n=40)
    posterior = fit(logs, features_nd, Causal(design="p", draws=32))
    with pytest.raises(ValueError, match="head: expected no head: f is linear"):
        model_form(posterior, features_nd, MLP)
    wide = Head(Mlp().init, lambda params, features_nd: features_nd @ np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"head.apply: expected shape \(n,\) or \(n, 1\), n = 40, got \(40, 2\)"):
        heads.evaluate(wide, heads.initial(wide, 1, jax.random.key(0)), features_nd)


def test_a_head_is_sampled_and_a_large_one_by_svi(log_of):
    logs, features_nd = _log(log_of, n=40)
    prepared = prepare(logs, features_nd, Design.parse("p"), head=MLP)
    with pytest.raises(ValueError, match="expected nuts, svi or auto, got 'exact': f is a head"):
        choose(prepared, "exact")
    large = prepared._replace(rows=prepared.rows._replace(columns_nq=np.broadcast_to(np.zeros(2), (2_000_000, 2))))
    method, why = choose(large, "auto")
    assert method == "svi" and "4,000,000 cells" in why
