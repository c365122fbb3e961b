"""Training of the baselines without a closed form: Adam in one scan, compiled once a shape, restarts side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deconfound_jax.align.baselines.data import RewardData, standardisation, weights
from deconfound_jax.align.losses import weighted_mean
from deconfound_jax.align.update import update_policy
from deconfound_jax.config import Adam


class Texts(NamedTuple):
    """Arrays that rows point into, one row a row of the log."""

    features_nd: Any  # standardised
    controls_nk: Any  # confounders: standardised columns, or indicators of their bins; width 0: not read


class Batch(NamedTuple):
    """Examples of one step with the arrays of their texts."""

    texts: Any  # `Texts` with leaves (b, 2, ...), first and second text of a pair; (b, ...) where an example is a row
    examples: Any  # a NamedTuple with leaves (b, ...)


def texts_of(data: RewardData, controls_nk=None) -> tuple[Texts, np.ndarray, np.ndarray]:
    """Arrays in float32, and the features' mean and sd."""
    mean_d, sd_d = standardisation(data.features_nd, weights(data))
    z_nd = (data.features_nd - mean_d[None, :]) / sd_d[None, :]
    controls_nk = np.zeros((len(z_nd), 0)) if controls_nk is None else controls_nk
    return Texts(np.asarray(z_nd, np.float32), np.asarray(controls_nk, np.float32)), mean_d, sd_d


def starts(key: jax.Array | None, restarts: int, shapes: Mapping[str, tuple[tuple[int, ...], float]]):
    """Random starts, leaves (restarts, ...), and the key of the batches that follow.

    Args:
      key: default `jax.random.key(0)`.
      shapes: name -> (shape, sd); sd 0 starts at zero.
    """
    key = jax.random.key(0) if key is None else key
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    drawn = {name: sd * rng.standard_normal((restarts, *shape)) for name, (shape, sd) in shapes.items()}
    return {name: np.asarray(value, np.float32) for name, value in drawn.items()}, key


def train(objective: Callable, params_r: Any, texts: Any, examples: Any, knobs: Mapping[str, Any], config: Adam, key):
    """Minimises an objective over examples; of several starts the one with the lowest training loss.

    Args:
      objective: `(params, frozen, batch, key) -> (per_example, weight, penalty, metrics)`, `frozen` the knobs and
        `batch` a `Batch`. A function of a module, since it is part of the compilation's key.
      params_r: starts, leaves (restarts, ...).
      texts: a tree of arrays with rows first.
      examples: a NamedTuple of arrays with examples first; its first field holds row numbers.
      knobs: scalars and small arrays; another value compiles nothing anew.
      config: steps, batch, step size.
      key: of batches and noise.

    Returns:
      parameters in fp64, and each start's training loss (restarts,), the mean over all examples.

    Raises:
      FloatingPointError: no start ends with a finite loss.
    """
    count = len(examples[0])
    batch = min(config.batch or count, count)
    texts, examples, params_r = jax.tree.map(_narrow, (texts, examples, params_r))
    knobs = {name: np.asarray(value, np.float32) for name, value in knobs.items()}
    rate = np.float32(config.learning_rate)
    found_r, losses_r = _train(objective, params_r, texts, examples, knobs, rate, key, config.steps, batch)
    losses_r = np.asarray(losses_r)
    if not np.isfinite(losses_r).any():
        raise FloatingPointError(f"training: expected a finite loss from some start, got {losses_r.tolist()}")
    best = int(np.nanargmin(losses_r))
    return jax.tree.map(lambda leaf: np.asarray(leaf[best], np.float64), found_r), losses_r


def _narrow(array):
    array = np.asarray(array)
    return array.astype(np.int32 if array.dtype.kind in "iu" else np.float32)


@functools.partial(jax.jit, static_argnames=("objective", "steps", "batch"))
def _train(objective, params_r, texts, examples, knobs, rate, key, steps, batch):
    count = len(examples[0])
    optimizer = optax.chain(optax.adam(optax.cosine_decay_schedule(1.0, steps)), optax.scale(rate))

    def take(index_b):
        chosen = jax.tree.map(lambda a: a[index_b], examples)
        return Batch(jax.tree.map(lambda a: a[chosen[0]], texts), chosen)

    def one(params, key):
        def step(carry, key):
            draw, noise = jax.random.split(key)
            index_b = jax.random.randint(draw, (batch,), 0, count) if batch < count else jnp.arange(count)
            params, opt_state, _ = update_policy(objective, optimizer, *carry, knobs, take(index_b), noise)
            return (params, opt_state), None

        params, _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0]

        # In batches of the size trained on: a correlation over another number of texts is another loss. Strided,
        # since neighbours in the list share texts.
        def loss(index_b):
            per_example, weight, penalty, _ = objective(params, knobs, take(index_b), key)
            return weighted_mean(per_example, weight) + penalty

        return params, jax.lax.map(loss, jnp.arange(count // batch * batch).reshape(batch, -1).T).mean()

    return jax.vmap(one)(params_r, jax.random.split(key, jax.tree.leaves(params_r)[0].shape[0]))
