"""The streamed exact fit equals the fit in memory; fixed effects projected out equal those solved for."""

import weakref

import duckdb
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconfound_jax.causal import compress, conditional, nested
from deconfound_jax.causal.fit import fit
from deconfound_jax.causal.reward import model_form
from deconfound_jax.causal.scalars import error_factor, scalars
from deconfound_jax.causal.spec import FLAT_SD, Rows
from deconfound_jax.causal.stream import _columns, fit_stream, standard_moments
from deconfound_jax.causal.terms import prepare
from deconfound_jax.causal.totals import Columns, totals
from deconfound_jax.config import Causal
from deconfound_jax.logs.batches import read_batches
from deconfound_jax.structs import Design, Logs, Roles

DESIGNS = (
    "",
    "hour + category(author)",
    "category(author, absorbed) + endogenous(p ~ z)",
    "category(author, absorbed) + category(week) + hour",
    "intercept(week) + category(author) + endogenous(p ~ z + w)",
    "category(week, absorbed) + endogenous(p ~ z + w) + endogenous(hour ~ z + w) + guardrail(p2)",
)
GAMMA = 1.5


@pytest.fixture(scope="module")
def log(log_of):
    """600 weighted rows, 40 authors who move text, p and outcome, 5 weeks; the last two features are equal."""
    rng = np.random.default_rng(0)
    n = 600
    s, u, z, w, hour, e0, e1 = rng.normal(size=(7, n))
    author, week, effect = rng.integers(40, size=n), rng.integers(5, size=n), rng.normal(size=40)
    features_nd = rng.normal(size=(n, 6)).astype(np.float32)
    features_nd[:, 0] += 0.6 * s + effect[author]
    features_nd[:, 5] = features_nd[:, 4]
    p = 0.8 * z + 0.3 * w + s + u + 0.3 * e0 + effect[author]
    y = 5 + features_nd @ np.linspace(-0.5, 0.5, 6) + GAMMA * p + u + effect[author] + 0.5 * e1
    columns = {"outcome": y, "p": p, "p2": p + rng.normal(size=n), "z": z, "w": w, "hour": hour + 300}
    columns |= {"author": author, "week": np.asarray([f"w{v}" for v in week], object)}
    return log_of(columns | {"count": 1.0 + rng.integers(3, size=n)}, weight="count"), features_nd


def pieces(log, count):
    logs, features_nd = log
    return [(logs.take(rows), features_nd[rows]) for rows in np.array_split(np.arange(len(logs)), count)]


def memory_moments(prepared):
    rows = Rows(*[jnp.asarray(f, int if i == 1 else float) for i, f in enumerate(prepared.rows)])
    return conditional.moments(prepared.spec, rows)


def log_posteriors(spec, stats, raw_mk):
    stats = conditional.Moments(*[jnp.asarray(value, float) for value in stats])
    return np.asarray(nested._log_posteriors(spec, stats, jnp.asarray(raw_mk)))


@pytest.mark.parametrize("text", DESIGNS)
def test_moments_and_scaling_of_batches_are_those_of_the_log(log, text):
    design, config = Design.parse(text), Causal()
    prepared = prepare(*log, design, config)
    with jax.enable_x64(True):
        expected = memory_moments(prepared)
    spec, found, scaling = standard_moments(totals(pieces(log, 7), _columns(design, "outcome")), design, config)
    assert spec == prepared.spec
    assert set(scaling) == set(prepared.scaling) - {"text.column"}
    for name, value in scaling.items():
        if name.endswith(".names"):
            assert (value == prepared.scaling[name]).all()
        else:
            np.testing.assert_allclose(value, prepared.scaling[name], rtol=1e-8, atol=1e-10, err_msg=name)
    for name, one, two in zip(found._fields, found, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("text", [DESIGNS[1], DESIGNS[2]])
def test_streamed_posterior_is_the_one_in_memory(log, text):
    config = Causal(design=text, draws=256)
    one, two = fit(*log, config), fit_stream(pieces(log, 5), config)
    assert two.status == one.status == "converged"
    assert set(one.draws) == set(two.draws) and set(one.scaling) == set(two.scaling)
    for name, draws in one.draws.items():
        np.testing.assert_allclose(two[name].mean(0), draws.mean(0), rtol=1e-6, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(two[name].std(0), draws.std(0), rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(model_form(two, log[1]).draws_sn, model_form(one, log[1]).draws_sn, atol=1e-6)
    if "p" in text.replace("(p", " p "):
        gamma_s = two.effect("p")
        np.testing.assert_allclose(gamma_s, one.effect("p"), rtol=1e-6)
        assert abs(gamma_s.mean() - GAMMA) < 4 * gamma_s.std()


@pytest.mark.parametrize("text", [DESIGNS[2], DESIGNS[5]])
def test_projected_levels_leave_the_likelihood_of_the_scalars(log, text):
    prepared = prepare(*log, Design.parse(text))
    with jax.enable_x64(True):
        stats = memory_moments(prepared)
        small, rest, dropped = compress.project(prepared.spec, stats)
        small, rest, rotation_dd = compress.rotate(small, rest, projected=True)
        assert dropped.level.absorbed and not small.levels and rotation_dd is not None
        raw_mk = np.random.default_rng(0).normal(-0.7, 0.5, (4, len(scalars(small))))
        apart_m = log_posteriors(prepared.spec, stats, raw_mk) - log_posteriors(small, rest, raw_mk)
    # The wide prior that stands for a flat one has this log density at any effect.
    wide = -len(dropped.outcome_cq) * (1 + len(small.equations)) * np.log(FLAT_SD * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(apart_m, wide, atol=1e-3)


def test_restored_levels_have_their_joint_conditional_law():
    """Against the brute-force conditional of two equations whose rows have unequal weights."""
    rng = np.random.default_rng(0)
    logs = Logs.of({"outcome": rng.normal(size=90), "p": rng.normal(size=90), "z": rng.normal(size=90),
                    "level": np.repeat(["a", "b", "c"], 30).astype(object)}, Roles())  # fmt: skip
    prepared = prepare(logs, rng.normal(size=(90, 2)), Design.parse("category(level, absorbed) + endogenous(p ~ z)"))
    precision_n = rng.uniform(0.2, 1.0, 90)
    with jax.enable_x64(True):
        stats = memory_moments(prepared._replace(rows=prepared.rows._replace(precision_n=precision_n)))
        spec, _, dropped = compress.project(prepared.spec, stats)
        psi = {s.name: 0.4 + 0.1 * i for i, s in enumerate(scalars(spec))}
        inverse = np.linalg.inv(np.asarray(error_factor(spec, {k: jnp.asarray(v) for k, v in psi.items()})))
    theta = {"intercept": 0.3, "text": [0.2, -0.1], "gamma": 0.7}
    theta |= {"first.intercept": -0.2, "first.text": [0.1, 0.3], "first.instruments": [0.5]}
    draws = {k: np.broadcast_to(v, (20_000, *np.shape(v))) for k, v in (psi | theta).items()}
    found = compress.restore(dropped, draws, 0)
    rows = prepared.rows
    p_n, design_nq = rows.endogenous_nm[:, 0], rows.columns_nq
    r_y = rows.outcome_n - 0.3 - design_nq[:, :2] @ [0.2, -0.1] - 0.7 * p_n
    r_p = p_n + 0.2 - design_nq @ [0.1, 0.3, 0.5]
    for c in range(3):
        inside = rows.levels_nc[:, 0] == c
        precision, linear = np.zeros((2, 2)), np.zeros(2)
        for r, weight in zip(np.stack([r_p, r_y], 1)[inside], precision_n[inside], strict=True):
            row_precision = inverse.T @ np.diag([1.0, weight]) @ inverse
            precision, linear = precision + row_precision, linear + row_precision @ r
        pair = np.stack([found["first.level"][:, c], found["level"][:, c]])
        covariance = np.linalg.inv(precision)
        sd = np.sqrt(np.diag(covariance))
        np.testing.assert_allclose(pair.mean(1), covariance @ linear, atol=0.04 * sd.max())
        np.testing.assert_allclose(np.cov(pair), covariance, atol=0.04 * sd.max() ** 2)


def test_draws_do_not_depend_on_the_eigenbasis(log, monkeypatch):
    """The features have a null direction, and LAPACK may return any basis and sign of it."""
    config = Causal(design=DESIGNS[2], draws=64)
    one = fit_stream(pieces(log, 1), config)
    eigh = np.linalg.eigh
    monkeypatch.setattr(
        np.linalg, "eigh", lambda a: (lambda v, w: (v, w * np.sign(np.sin(1 + np.arange(len(w))))))(*eigh(a))
    )
    two = fit_stream(pieces(log, 1), config)
    np.testing.assert_allclose(two["text"], one["text"], atol=1e-6)


def test_totals_are_the_same_bits_for_any_number_of_threads_and_any_float(log):
    columns = Columns(("p", "outcome"), ("author", "week"))
    one = totals(pieces(log, 9), columns, threads=1)
    wide = [(logs, features_nd.astype(np.float64)) for logs, features_nd in pieces(log, 9)]
    for other in (totals(pieces(log, 9), columns, threads=3), totals(wide, columns, threads=2)):
        np.testing.assert_array_equal(one.gram_rr, other.gram_rr)
        for a, b in zip(one.sums, other.sums, strict=True):
            np.testing.assert_array_equal(a, b)
    assert one.rows == 600 and one.tables[0, 1].sum() == one.gram_rr[0, 0]


def test_batches_are_let_go(log):
    alive, most = [], 0

    def stream():
        nonlocal most
        for logs, features in pieces(log, 30):
            features_nd = features.copy()
            alive.append(weakref.ref(features_nd))
            most = max(most, sum(ref() is not None for ref in alive))
            yield logs, features_nd
            del features_nd

    totals(stream(), Columns(("outcome",), ()), threads=2)
    assert len(alive) == 30 and most <= 6  # two in work, those waiting, and the one just read


def test_what_does_not_fit_is_named(log):
    logs, features_nd = log
    bad = features_nd.copy()
    bad[130, 2] = np.nan
    hours = logs.columns["hour"].copy()
    hours[450] = np.inf
    cases = (
        ("", [], "batches: expected at least one row"),
        ("", pieces((logs, bad), 7), "features, column 2: .* in row 130"),
        ("hour", pieces((Logs.of(logs.columns | {"hour": hours}, logs.roles), features_nd), 7), "hour: .* in row 450"),
        ("hour", [*pieces(log, 2), (logs, features_nd[:, :3])], r"features \(600, 6\) at row 600, got \(600, 3\)"),
        ("smooth(hour)", pieces(log, 2), "fit_stream: expected terms out of .*, got smooth"),
        ("", [(Logs.of(logs.columns | {"outcome": np.ones(600)}, logs.roles), features_nd)], "outcome: .* got 1 in"),
        ("", [(Logs.of(logs.columns | {"count": -hours}, logs.roles), features_nd)], "count: expected a weight"),
    )
    for design, batches, message in cases:
        with pytest.raises(ValueError, match=message):
            fit_stream(batches, Causal(design=design))
    with pytest.raises(ValueError, match="expected normal/identity, got binomial"):
        fit_stream(pieces(log, 2), Causal(family="binomial"))
    with pytest.raises(ValueError, match="fit_stream expects one of .*, got 'nuts'"):
        fit_stream(pieces(log, 2), Causal(fit="nuts"))


@pytest.fixture
def parquet(log, tmp_path):
    logs, features_nd = log
    with duckdb.connect() as connection:
        for part, (piece, features) in enumerate(pieces(log, 2)):
            table = {k: v for k, v in piece.columns.items() if v.dtype.kind in "fi"}
            table |= {f"f{i}": np.ascontiguousarray(column) for i, column in enumerate(features.T)}
            connection.register("part", table)
            lists = "[" + ", ".join(f"f{i}" for i in range(6)) + "]"
            file = tmp_path / f"{part}.parquet"
            connection.execute(
                f"COPY (SELECT *, {lists} AS vector, 'w' || author % 5 AS week FROM part) TO '{file}' "
                "(FORMAT parquet, ROW_GROUP_SIZE 128)"
            )
    return tmp_path


def test_parquet_comes_in_the_files_order(log, parquet):
    logs, features_nd = log
    roles = Roles(confounders=("hour", "author", "week"), weight="count")
    batches = list(read_batches(parquet / "*.parquet", roles, "vector", categories=["author"], rows=70))
    assert [len(b) for b, _ in batches] == [70, 70, 70, 70, 20] * 2
    np.testing.assert_array_equal(np.concatenate([f for _, f in batches]), features_nd)
    assert all(f.dtype == np.float32 for _, f in batches)
    for name in ("outcome", "hour", "author", "count"):
        np.testing.assert_array_equal(np.concatenate([b.columns[name] for b, _ in batches]), logs.columns[name])
    assert set(batches[0][0].columns) == {"outcome", "hour", "author", "week", "count"}
    assert batches[0][0].columns["week"][0] == f"w{logs.columns['author'][0] % 5}"


def test_parquet_that_does_not_fit_is_named(parquet):
    def read(features="vector", file="0.parquet", **roles):
        return list(read_batches(parquet / file, Roles(**roles), features))

    with pytest.raises(FileNotFoundError, match="expected Parquet files"):
        read(file="no*.parquet")
    with pytest.raises(ValueError, match="outcom: expected a column of the file; nearest is 'outcome'"):
        read(outcome="outcom")
    with pytest.raises(ValueError, match="hour: expected lists of numbers, got a column of type DOUBLE"):
        read(features="hour")
    with pytest.raises(ValueError, match="week: expected numbers, got a column of type VARCHAR"):
        read(outcome="week")
    with duckdb.connect() as connection:
        for name, cells in (("short", "[1.0], [1.0, 2.0]"), ("null", "[1.0], NULL")):
            file = parquet / f"{name}.parquet"
            connection.execute(f"COPY (SELECT unnest([{cells}]) AS vector, 1.0 AS outcome) TO '{file}'")
    with pytest.raises(ValueError, match="vector: expected 1 numbers as in row 0, got 2 in row 1"):
        read(file="short.parquet")
    with pytest.raises(ValueError, match="vector: expected a value in every row, got none in row 1"):
        read(file="null.parquet")


def test_a_rotation_serves_where_the_text_is_wide_and_levels_stay(log):
    """More features than levels, nothing absorbed: levels become columns beside the rotated text."""
    prepared = prepare(*log, Design.parse("intercept(week) + hour"))
    with jax.enable_x64(True):
        stats = memory_moments(prepared)
        spec, rotated, rotation_dd = compress.rotate(prepared.spec, stats)
        assert spec.orthogonal and rotation_dd.shape == (6, 6)
        raw_mk = np.full((1, len(scalars(spec))), -0.5)
        found = (log_posteriors(s, m, raw_mk) for s, m in ((prepared.spec, stats), (spec, rotated)))
        np.testing.assert_allclose(*found, rtol=1e-12)


def test_the_mode_is_found_for_millions_of_rows(log):
    """Moments of every row 20,000 times: a search that stops on the value's relative change is far off."""
    design = Design.parse("hour + endogenous(p ~ z + w)")
    spec, stats, _ = standard_moments(totals(pieces(log, 1), _columns(design, "outcome")), design, Causal())
    many = conditional.Moments(*[20_000 * value for value in stats])
    _, diagnostics = nested.fit_moments(spec, many, 128, 0)
    assert diagnostics["converged"] and diagnostics["mode_gradient"] < 1.0, diagnostics
