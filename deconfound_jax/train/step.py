"""One update of the parameters as a pure, compiled function.

    step = make_step(objective, optimizer := adamw(3e-3, steps=300))
    state = init_state(params, optimizer)
    state, metrics = step(state, frozen, batch, run_key)

An objective is `(params, frozen, batch, key) -> (per_example, weight, penalty, metrics)`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deconfound_jax.align.update import update_policy
from deconfound_jax.train.hosts import place
from deconfound_jax.train.mesh import RULES, Rules, hold, make_mesh, replicate, shardings


class TrainState(NamedTuple):
    """What must be carried from step to step: `causal` is any pytree, `step` counts the updates done."""

    params: Any
    opt_state: Any
    causal: Any
    step: jax.Array


def init_state(
    params: Any, optimizer: optax.GradientTransformation, causal: Any = (), mesh: Mesh | None = None,
    rules: Rules = RULES,
):  # fmt: skip
    """The state before the first update, in arrays of its own on `mesh` (default: the first device of this process).

    A fresh state has the types and placement of a restored one, strong-typed and committed: else the step would be
    compiled differently and a resumed run would not be bit-equal. Its arrays are copies, because the step donates
    them while the caller may keep `params` as the reference. On several devices each leaf lies as `rules` say, and
    the optimizer's state is made where it lies: no device ever holds the whole.
    """
    mesh = make_mesh(jax.local_devices()[:1]) if mesh is None else mesh
    if mesh.size == 1:
        state = TrainState(params, optimizer.init(params), causal, jnp.zeros((), jnp.int32))
        return replicate(jax.tree.map(_owned, state), mesh)
    params = jax.tree.map(
        lambda leaf, lies: place(_owned(leaf), lies),
        params,
        shardings(params, mesh, rules, log=logging.getLogger(__name__)),
    )
    start = TrainState(params, jax.eval_shape(optimizer.init, params), causal, jnp.zeros((), jnp.int32))
    lies = shardings(start, mesh, rules)
    made = jax.jit(lambda p: jax.tree.map(_owned, optimizer.init(p)), out_shardings=lies.opt_state)(params)
    small = jax.tree.map(lambda leaf, lie: place(_owned(leaf), lie), (causal, start.step), (lies.causal, lies.step))
    return TrainState(params, made, *small)


def make_step(
    objective: Callable, optimizer: optax.GradientTransformation, *, accumulate: int = 1, rules: Rules = RULES
) -> Callable:
    """The compiled step `(state, frozen, batch, key) -> (state, metrics)` of an objective.

        loss = sum_i w_i l_i / sum_i w_i + penalty

    The objective's key is `fold_in(key, state.step)`, so a resumed run draws what an unbroken one draws. Only `state`
    is donated: it is gone after the call. To the objective's metrics come `loss` and `grad_norm` (before clipping).

    Args:
      accumulate: microbatches a batch is read in, see `align.update.update_policy`.
      rules: as `init_state` had them.
    """

    def step(state: TrainState, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        params, opt_state, metrics = update_policy(
            objective, optimizer, state.params, state.opt_state, frozen, batch, key, accumulate
        )
        return TrainState(params, opt_state, state.causal, state.step + 1), metrics

    return jit_step(step, rules)


def jit_step(step: Callable, rules: Rules = RULES) -> Callable:
    """Compiles a step `(state, frozen, batch, key) -> (state, metrics)`, its state updated in place.

    On a mesh of several devices the new state lies as the old one did (else the next call would be compiled anew),
    and metrics are whole on each device.
    """

    def held(state, frozen, batch, key):
        state, metrics = step(state, frozen, batch, key)
        return hold(state, rules), hold(metrics, rules=())

    return jax.jit(held, donate_argnums=0)


def adamw(learning_rate: float, steps: int, warmup_share: float = 0.1) -> optax.GradientTransformation:
    """AdamW behind a clip of the global gradient norm at 1, with `schedule` as its rate.

    Source: Loshchilov & Hutter 2019 (1711.05101).
    """
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule(learning_rate, steps, warmup_share)))


def schedule(learning_rate: float, steps: int, warmup_share: float = 0.1) -> optax.Schedule:
    """Linear warm-up, then cosine to zero; no step is spent at rate zero.

    rate(i) = peak (i + 1) / w                                 for i < w = round(share * steps)
    rate(i) = peak (1 + cos(pi (i - w) / (steps - w))) / 2     after it
    """
    warmup = round(warmup_share * steps)

    def rate(count):
        rising = (count + 1) / max(warmup, 1)
        progress = jnp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return learning_rate * jnp.where(count < warmup, rising, 0.5 * (1 + jnp.cos(jnp.pi * progress)))

    return rate


def _owned(leaf):
    return jnp.array(leaf, dtype=jnp.result_type(leaf), copy=True)
