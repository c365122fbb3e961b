"""NUTS on the NumPyro model: several chains, resumed from the state after warm-up.

    begin -> advance (warm-up) -> save -> advance (draws)

A chain is carried as a value: step size, mass matrix, position, key. Saved after
warm-up, it goes on exactly as an unbroken run would; and because both functions are pure,
`fit_many` maps them over data sets of one shape.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from numpyro.infer import NUTS, init_to_value

from deconfound_jax.causal import head
from deconfound_jax.causal.diagnostics import ess, rank_rhat
from deconfound_jax.causal.model import causal_model
from deconfound_jax.causal.scalars import scalars
from deconfound_jax.causal.scalars import start as scalar_start
from deconfound_jax.causal.sites import Draws, observed, to_raw
from deconfound_jax.causal.spec import Prepared, Rows, Spec, single
from deconfound_jax.config import Checks

STRIDE = 50  # transitions of one compiled call: warm-up and draws share it
RHAT_LIMIT, ESS_LIMIT, DIVERGENT_LIMIT = Checks.rhat, Checks.ess, Checks.divergent
_LEAST = 250  # transitions a chain after warm-up: a chain's check needs them, few draws or many
_PROBES = 16  # rows at which a head's f is checked: its parameters may be permuted, its values may not


class Setup(NamedTuple):
    """What shapes the sampler (hashable)."""

    warmup: int
    dense: bool  # one full mass matrix
    accept: float = 0.95
    depth: int = 10  # of the trees, at most


def fit_nuts(
    prepared: Prepared, start: Draws, draws: int, seed: int, chains: int = 4, warmup: int = 500,
    state: epath.PathLike = "",
) -> tuple[Draws, dict]:  # fmt: skip
    """Draws by NUTS from `chains` chains, each started at a draw of `start`.

    Args:
      state: a file. Found, the chains go on from it and warm-up is skipped; else it is written after warm-up.

    Returns:
      Sites with draws first, and diagnostics: rhat (rank-normalised, split; the largest),
      ess (bulk; the smallest), divergent (share), converged.

    Raises:
      ValueError: the file belongs to other data, another model or other settings.
    """
    spec, rows = prepared.spec, single(prepared.rows)
    per_chain = max(-(-draws // chains), _LEAST)
    values = jax.vmap(partial(to_raw, spec))({k: jnp.asarray(v[:chains], jnp.float32) for k, v in start.items()})
    # A full mass matrix needs a few transitions a dimension to be learned.
    setup = Setup(warmup, sum(v[0].size for v in values.values()) < warmup // 5)
    keys = jax.random.split(jax.random.key(seed), chains)
    mark = _mark(spec, prepared.rows, setup, chains, seed)
    if state and epath.Path(state).exists():
        states = load_state(state, mark, jax.eval_shape(partial(begin, spec, setup=setup), rows, values, keys))
    else:
        states, _ = _strides(spec, rows, values, begin(spec, rows, values, keys, setup), setup, warmup)
        if state:
            save_state(state, mark, states)
    _, found = _strides(spec, rows, values, states, setup, per_chain)
    divergent = float(found.pop("diverging").mean())
    pick = np.linspace(0, chains * per_chain - 1, draws).round().astype(int)  # evenly from every chain
    sites = {name: v.reshape(-1, *v.shape[2:])[pick] for name, v in found.items() if not name.endswith(".raw")}
    return sites, _diagnose(spec, prepared, found, divergent)


@partial(jax.jit, static_argnames=("spec", "setup"))
def begin(spec: Spec, rows: Rows, values, keys, setup: Setup):
    """States of c chains before warm-up, from their starting values (c, ...) and keys (c,)."""
    return jax.lax.map(lambda pair: _kernel(spec, rows, *pair, setup)[1], (values, keys))


@partial(jax.jit, static_argnames=("spec", "setup", "steps"))
def advance(spec: Spec, rows: Rows, values, states, setup: Setup, steps: int = STRIDE):
    """`steps` transitions of every chain: the states after them, and every site by chain and step."""

    def chain(pair):
        value, state = pair
        kernel, _ = _kernel(spec, rows, value, jax.random.key(0), setup)  # `sample` needs what init sets up

        def step(state, _):
            state = kernel.sample(state, (spec, rows), observed(spec, rows))
            return state, (state.z, state.diverging)

        state, (z, diverging) = jax.lax.scan(step, state, length=steps)
        sites = jax.vmap(kernel.postprocess_fn((spec, rows), observed(spec, rows)))(z)
        return state, sites | {"diverging": diverging}

    return jax.lax.map(chain, (values, states))


def fit_many(spec: Spec, rows_b: Rows, draws: int, seed: int, warmup: int = 400, thin: int = 1) -> tuple[Draws, dict]:
    """One chain for each of b data sets of one shape, all at once.

    Args:
      rows_b: `Rows` whose every field (offset too) has a leading axis b.
      draws: kept a data set.
      thin: transitions a kept draw.

    Returns:
      Sites (b, draws, ...), and diagnostics (b,): divergent; rhat and ess of the scalars, worst first.
    """
    count = rows_b.outcome_n.shape[0]
    rows_b = jax.vmap(single)(rows_b)
    keys = jax.random.split(jax.random.key(seed), count)
    shapes = jax.eval_shape(partial(_prior, spec), jax.tree.map(lambda field: field[0], rows_b), keys[0])
    begun = dict(zip([s.name for s in scalars(spec)], _natural_start(spec), strict=True))
    values = {n: jnp.full((1, *v.shape), begun.get(n, 1.0 if n.endswith(".local") else 0.0)) for n, v in shapes.items()}
    setup = Setup(warmup, True, 0.8, 6)  # data sets go in step: the longest tree of any is everybody's
    each = jax.jit(jax.vmap(lambda rows, key: begin(spec, rows, values, key[None], setup)))
    states = each(rows_b, keys)
    go = jax.jit(jax.vmap(lambda rows, states: advance(spec, rows, values, states, setup, STRIDE)))
    kept = []
    for i in range(-(-warmup // STRIDE) + -(-draws * thin // STRIDE)):
        states, found = go(rows_b, states)
        if i * STRIDE >= warmup:
            kept.append({n: np.asarray(v[:, 0]) for n, v in found.items() if not n.endswith(".raw")})
    found = {n: np.concatenate([part[n] for part in kept], 1)[:, : draws * thin] for n in kept[0]}
    divergent_b = found.pop("diverging").mean(1)
    names = [s.name for s in scalars(spec)]
    rhat_b = np.array([max(rank_rhat(found[n][i][None]) for n in names) for i in range(count)])
    ess_b = np.array([min(ess(found[n][i][None]) for n in names) for i in range(count)])
    return {n: v[:, ::thin] for n, v in found.items()}, {"divergent": divergent_b, "rhat": rhat_b, "ess": ess_b}


def save_state(path: epath.PathLike, mark: str, states: Any) -> None:
    """Writes the chains' states as one .npz: arrays and a JSON header, no pickle."""
    arrays = {f"leaf/{i:03d}": np.asarray(_plain(leaf)) for i, leaf in enumerate(jax.tree.leaves(states))}
    with epath.Path(path).open("wb") as file:
        np.savez(file, header=np.array(json.dumps({"mark": mark})), **arrays)


def load_state(path: epath.PathLike, mark: str, like: Any) -> Any:
    """Reads what `save_state` wrote; `like` gives shapes and types."""
    with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as data:
        found = json.loads(str(data["header"]))["mark"]
        if found != mark:
            raise ValueError(
                f"causal.nuts_state {path}: expected the state of this fit ({mark}), got another's ({found})"
            )
        leaves = [data[name] for name in sorted(data.files) if name != "header"]
    shapes, tree = jax.tree.flatten(like)
    return jax.tree.unflatten(tree, [_typed(leaf, shape) for leaf, shape in zip(leaves, shapes, strict=True)])


def _kernel(spec: Spec, rows: Rows, values, key, setup: Setup):
    kernel = NUTS(
        causal_model, init_strategy=init_to_value(values=values), target_accept_prob=setup.accept,
        dense_mass=setup.dense, max_tree_depth=setup.depth,
    )  # fmt: skip
    return kernel, kernel.init(key, setup.warmup, None, (spec, rows), observed(spec, rows))


def _strides(spec: Spec, rows: Rows, values, states, setup: Setup, steps: int):
    """Whole strides of transitions; the first `steps` of every site on the host, (chains, steps, ...)."""
    parts = []
    for _ in range(-(-steps // STRIDE)):
        states, found = advance(spec, rows, values, states, setup)
        parts.append(jax.tree.map(np.asarray, found))
    return states, {n: np.concatenate([part[n] for part in parts], 1)[:, :steps] for n in (parts[0] if parts else {})}


def _diagnose(spec: Spec, prepared: Prepared, found: Draws, divergent: float) -> dict:
    watched = {n: v for n, v in found.items() if not n.endswith(".raw") and not n.startswith(head.PREFIX)}
    if spec.head:
        probes = np.asarray(prepared.rows.columns_nq[:_PROBES, : spec.blocks[0].stop], np.float32)
        leaves = {n: jnp.asarray(v) for n, v in found.items() if n.startswith(head.PREFIX) and not n.endswith(".raw")}
        watched["f"] = np.asarray(jax.vmap(jax.vmap(lambda one: head.evaluate(spec.head, one, probes)))(leaves))
    flat = np.concatenate([v.reshape(*v.shape[:2], -1) for v in watched.values()], 2)
    flat = flat[:, :, np.ptp(flat, (0, 1)) > 0]
    rhat = max(rank_rhat(column) for column in flat.transpose(2, 0, 1))
    least = min(ess(column) for column in flat.transpose(2, 0, 1))
    good = rhat < RHAT_LIMIT and least > ESS_LIMIT and divergent < DIVERGENT_LIMIT
    return {"rhat": rhat, "ess": least, "divergent": divergent, "chains": flat.shape[0], "converged": bool(good)}


def _mark(spec: Spec, rows: Rows, setup: Setup, chains: int, seed: int) -> str:
    """What a saved state must agree with: the model's shape, the data, the settings."""
    digest = hashlib.sha256(repr((spec._replace(head=None), setup, chains, seed)).encode())
    for field in rows:
        digest.update(np.ascontiguousarray(field).tobytes())
    return digest.hexdigest()[:16]


def _prior(spec: Spec, rows: Rows, key):
    """The model's own sites, drawn from the prior: their names and shapes."""
    from numpyro.handlers import seed, trace

    sites = trace(seed(causal_model, key)).get_trace(spec, rows, **observed(spec, rows))
    return {n: s["value"] for n, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}


def _natural_start(spec: Spec) -> list[float]:
    raw = scalar_start(spec)
    return [float(np.exp(v)) if s.positive else float(v) for s, v in zip(scalars(spec), raw, strict=True)]


def _plain(leaf):
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _typed(leaf, shape):
    if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(leaf))
    return jnp.asarray(leaf, shape.dtype)
