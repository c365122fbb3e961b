"""Upworthy's designs: scales at their mode against scales integrated, what the logs hold, the script in small."""

import json

import numpy as np
import pytest

from deconfound_jax.causal.nested import fit_nested
from deconfound_jax.causal.terms import empirical_logit, prepare
from deconfound_jax.structs import Design
from experiments import designs_chain, designs_fits, designs_logs, designs_modal, upworthy_designs
from experiments.designs_strength import choose_text_sd
from tests.conftest import names


@pytest.fixture(scope="module")
def small():
    """A miniature archive: 60 tests of 4 arms in 20 weeks."""
    return designs_logs.archive(*designs_logs.simulate(1, tests=60), lede_width=2, count=2, seed=0)


def laid_out(small, terms):
    prepared = prepare(small.logs, small.features_nd, Design.parse(terms, "beta_binomial"))
    return prepared.spec, prepared.rows, designs_chain.lay_out(prepared.spec, prepared.rows)


def test_levels_in_levels_form_a_chain_and_others_are_columns(small):
    _, _, columns = laid_out(small, "category(week) + category(test) + category(image)")
    assert [level.name for level in columns.chain] == ["image", "test", "week"]
    rng = np.random.default_rng(0)
    crossed = dict(small.logs.columns) | {"hour": names("h", rng.integers(3, size=len(small.logs)))}
    logs = type(small.logs)(crossed, small.logs.roles, "")
    design = Design.parse("intercept(test) + intercept(hour)", "beta_binomial")
    prepared = prepare(logs, small.features_nd, design)
    columns = designs_chain.lay_out(prepared.spec, prepared.rows)
    assert [level.name for level in columns.chain] == ["test"] and columns.sites[-1][0] == "hour"


def test_elimination_equals_one_dense_system(small):
    spec, rows, columns = laid_out(small, "category(week) + category(test) + category(image)")
    raw = np.linspace(-1.0, 0.5, len(designs_modal._scalars(spec)))
    surrogate = designs_modal.surrogate_at(spec, rows, columns, raw, np.zeros(len(rows.outcome_n)))
    sds = designs_modal.log_sds(spec, columns, raw)
    found = designs_chain.solve(columns, surrogate, *sds)
    spread = designs_chain.spread(columns, found, *sds)

    hot = [np.eye(v.count)[code] for v, code in zip(columns.chain, columns.codes, strict=True)]
    matrix = np.concatenate([columns.dense_nd, *hot], 1)
    log_sd = np.concatenate([sds[0], *[np.full(v.count, sd) for v, sd in zip(columns.chain, sds[1], strict=True)]])
    d, weighted = len(sds[0]), matrix * surrogate.information_n[:, None]
    precision = weighted.T @ matrix + np.diag(np.exp(-2 * log_sd))
    linear = [surrogate.gram[:d, d], surrogate.sums[:, d]]
    for into in columns.into[1:]:
        linear.append(into @ linear[-1])
    linear = np.concatenate(linear)
    mean, covariance = np.linalg.solve(precision, linear), np.linalg.inv(precision)
    quadratic = surrogate.gram[d, d] - linear @ mean
    evidence = surrogate.constant - 0.5 * (np.linalg.slogdet(precision)[1] + 2 * log_sd.sum() + quadratic)
    np.testing.assert_allclose(np.concatenate([found.mean_d, *found.levels]), mean, atol=1e-9)
    np.testing.assert_allclose(found.log_evidence, evidence, rtol=1e-10)
    by_sd = (mean**2 + np.diag(covariance)) * np.exp(-2 * log_sd) - 1
    np.testing.assert_allclose(spread.by_log_sd_d, by_sd[:d], atol=1e-8)
    ends = d + np.cumsum([0, *[v.count for v in columns.chain]])
    expected = [by_sd[a:b].sum() for a, b in zip(ends[:-1], ends[1:], strict=True)]
    np.testing.assert_allclose(spread.by_log_sd_chain, expected, atol=1e-7)
    reach_nd = columns.dense_nd @ spread.half_dd.T + spread.reach_ud[columns.codes[0]]
    variance_n = (reach_nd**2).sum(1) + spread.own_u[columns.codes[0]]
    np.testing.assert_allclose(variance_n, np.einsum("nk,kl,nl->n", matrix, covariance, matrix), rtol=1e-8)


def test_gradient_of_the_scales(small):
    spec, rows, columns = laid_out(small, "smooth(week_number, bases=4) + category(test)")
    raw = np.linspace(-1.0, 0.5, len(designs_modal._scalars(spec)))
    surrogate = designs_modal.surrogate_at(spec, rows, columns, raw, np.zeros(len(rows.outcome_n)))

    def evidence(raw):
        return designs_chain.solve(columns, surrogate, *designs_modal.log_sds(spec, columns, raw)).log_evidence

    sds = designs_modal.log_sds(spec, columns, raw)
    spread = designs_chain.spread(columns, designs_chain.solve(columns, surrogate, *sds), *sds)
    by_d, by_chain = designs_modal._by_psi(spec, columns, raw)
    shifts = 1e-4 * np.eye(len(raw))
    numeric = [(evidence(raw + e) - evidence(raw - e)) / 2e-4 for e in shifts]
    np.testing.assert_allclose(by_d @ spread.by_log_sd_d + by_chain @ spread.by_log_sd_chain, numeric, atol=1e-3)
    assert np.abs(numeric).max() > 1


def test_equals_the_laplace_fit_with_its_scales_integrated(small):
    design = Design.parse("intercept(week)", "binomial")
    prepared = prepare(small.logs.take(slice(None, None, 2)), small.features_nd[::2, :2], design)
    found = designs_modal.fit_modal(prepared.spec, prepared.rows)
    assert found.converged
    draws, _ = fit_nested(prepared.spec, prepared.rows, draws=64, seed=0)
    error = found.mean["text"] - draws["text"].mean(0)
    assert np.abs(error / draws["text"].std(0)).max() < 0.4  # 64 draws: their mean is known to 0.13
    for name, value in found.psi.items():
        low, high = np.quantile(draws[name], (0.02, 0.98))
        assert low < value < high, name


@pytest.mark.parametrize("truth", [0.05, 0.1])
def test_dispersion_beside_small_groups_is_recovered(log_of, truth):
    rng, n = np.random.default_rng(3), 900
    features_nd, group_n = rng.normal(size=(n, 2)), np.arange(n) // 3
    rate_n = 1 / (1 + np.exp(2 - features_nd @ [0.3, -0.2] - 0.5 * rng.normal(size=n // 3)[group_n]))
    own_n = rng.beta(rate_n / truth**2, (1 - rate_n) / truth**2)
    counts = {"outcome": rng.binomial(3000, own_n).astype(float), "shown": np.full(n, 3000.0)}
    logs = log_of(counts | {"group": names("g", group_n)}, exposure="shown")
    prepared = prepare(logs, features_nd, Design.parse("intercept(group)", "beta_binomial"))
    found = designs_modal.fit_modal(prepared.spec, prepared.rows)
    # Without the degrees of freedom that the groups use up it would be short by log(3 / 2) / 2 = 0.2.
    assert found.converged and abs(np.log(found.psi["dispersion"] / truth)) < 0.1


def test_a_fixed_strength_shrinks(small):
    fitted = designs_fits.fit_design(small.logs, small.features_nd, Design.parse("", "beta_binomial"), 4)
    sizes = [np.linalg.norm(designs_fits.refit(fitted, sd).slope_d) for sd in (0.001, 0.03, 1.0)]
    assert sizes[0] < 0.1 * sizes[1] < 0.1 * sizes[2]


def test_the_strength_follows_what_held_out_groups_say(small):
    strengths, design = (0.001, 0.003, 0.01, 0.03, 0.1, 1.0), Design.parse("category(week)", "beta_binomial")
    logit_n = empirical_logit(small.logs.outcome_n, small.logs.exposure_n)[0]

    def chosen(features_nd):
        fitted = designs_fits.fit_design(small.logs, features_nd, design, 4)
        codes = (None, small.logs.codes("test"))
        return [choose_text_sd(fitted, logit_n, strengths, small.component_n, test_n, seed=0) for test_n in codes]

    noise = [chosen(np.random.default_rng(s).normal(size=small.features_nd.shape)) for s in range(1, 5)]
    # Held-out rows of 60 tests tell little: a single log of pure noise may still ask for a large strength.
    assert (np.asarray(chosen(small.features_nd)) > np.median(noise, 0)).all()


def test_a_family_in_closed_form_is_refused(small):
    prepared = prepare(small.logs, small.features_nd, Design.parse("", "normal", "empirical_logit"))
    with pytest.raises(ValueError, match="fit_modal: expected one equation of a family without closed form"):
        designs_modal.fit_modal(prepared.spec, prepared.rows)


def test_no_log_holds_what_judges_it(small):
    for log in designs_logs.LOGS:
        for part in designs_logs.parts(small, log, seed=0):
            assert len(part.train) and len(part.held_out)
            for column in ("test", "headline", "lede", "eyecatcher_id"):
                values = small.logs.columns[column]
                assert not set(values[part.train]) & set(values[part.held_out]), (log, column)
            window_n = small.logs.columns["randomization_imbalance_risk"]
            assert not window_n[part.held_out].any()
            if log == "one_arm":
                assert len(set(small.logs.columns["test"][part.train])) == len(part.train)


def test_contrasts_do_not_see_what_tests_share(small):
    group_n = small.logs.codes("test")
    moved = small.features_nd + 3 * np.random.default_rng(0).normal(size=group_n.max() + 1)[group_n][:, None]
    one, other = (designs_fits.fit_contrasts(small.logs, x, group_n, 0).slope_d for x in (small.features_nd, moved))
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_the_script_in_small(tmp_path, capsys):
    arguments = ["--simulated", "--rank", "4", "--lede-width", "3", "--resamples", "2", "--strengths", "0.01", "1.0"]
    upworthy_designs.main([*arguments, "--workdir", str(tmp_path), "--bootstrap", "200"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert "full minus" in capsys.readouterr().out
    # The miniature's week moves clicks and wording: the design that knows it ranks better.
    assert results["pooled.full.gain_z196.low"] > 0
    assert results["one_arm.week.log_evidence"] > results["one_arm.naive.log_evidence"]
    assert not any("did not converge" in line for line in results["failed"])


def test_without_data_the_script_says_so(tmp_path, capsys):
    upworthy_designs.main(["--data", str(tmp_path)])
    assert "packages.parquet" in capsys.readouterr().out


def test_a_bar_that_does_not_hold_is_named():
    results = {f"{log}.full.gain_z196": 0.02 for log in designs_logs.LOGS} | {"pooled.full.gain_z196.low": 0.001}
    results |= {f"{log}.better_naive": "ridge" for log in designs_logs.LOGS}
    assert upworthy_designs.failures(results) == []
    results |= {"one_arm.full.gain_z196": 0.008, "pooled.full.gain_z196.low": -0.001, "all_arms.not_converged": 2}
    failed = upworthy_designs.failures(results)
    assert [line.split(":")[0] for line in failed] == ["one_arm", "pooled", "all_arms"]
