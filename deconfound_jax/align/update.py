"""One optimizer update of a policy on an objective: what the plain and the joint step have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from deconfound_jax.align.losses import weighted_mean


def update_policy(
    objective: Callable, optimizer: optax.GradientTransformation, params: Any, opt_state: Any, frozen, batch, key
):
    """Gradient of the objective's weighted mean plus penalty, then the optimizer's update.

        loss = sum_i w_i l_i / sum_i w_i + penalty

    Returns:
      new parameters, new optimizer state, and the objective's metrics with `loss` and
      `grad_norm` (before clipping).
    """

    def loss_of(params):
        per_example, weight, penalty, metrics = objective(params, frozen, batch, key)
        return weighted_mean(per_example, weight) + penalty, metrics

    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    metrics = {**metrics, "loss": loss, "grad_norm": _norm(grads)}
    return optax.apply_updates(params, updates), opt_state, metrics


def _norm(tree: Any) -> jax.Array:
    # optax's own has two names in the versions supported, the older one with a warning.
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
