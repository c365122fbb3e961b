"""Posterior prediction, chunk by chunk of rows to the host: memory does not grow with draws times rows.

eta   linear predictor, offset aside           scale "link"
mu    E[y | eta], outcome units per exposure   scale "response"
y_rep a new outcome from `causal_model`        scale "outcome"
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import seed as seeded
from numpyro.handlers import substitute

from deconfound_jax.causal import head, nested
from deconfound_jax.causal.families import FAMILIES
from deconfound_jax.causal.model import causal_model
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.spec import Prepared, Rows, Spec, doubled

SCALES = ("link", "response", "outcome")
KINDS = ("mean", "summary", "draws")
INTERVAL = (0.05, 0.95)  # of a summary


class Units(NamedTuple):
    """From the model's scale to the outcome's."""

    mean: jax.Array
    sd: jax.Array
    grades: jax.Array  # of an ordinal outcome, in order; empty elsewhere


def predict(
    posterior: Posterior,
    prepared: Prepared,
    kind: str = "mean",
    scale: str = "response",
    chunk: int = 1024,
    seed: int = 0,
):
    """Prediction of every row of `prepared`, the endogenous variables as they were.

    Args:
      posterior: of a fit on rows of this shape.
      prepared: the log's, or with other rows in place of its own.
      kind: "mean" (u,); "summary", a dict of mean, sd, lower and upper (5% and 95%), (u,) each; "draws" (s, u).
      scale: "link", "response" or "outcome", see the module.
      chunk: rows at once.
      seed: of "outcome".

    Raises:
      ValueError: another kind or scale; it names those there are.

    Example:
      >>> rate_u = predict(posterior, prepared)
    """
    if kind not in KINDS:
        raise ValueError(f"predict.kind: expected one of {KINDS}, got {kind!r}")
    parts = []
    for values_sb in predict_chunks(posterior, prepared, scale, chunk, seed):
        if kind == "mean":
            parts.append(values_sb.mean(0))
        elif kind == "summary":
            low_b, high_b = np.quantile(values_sb, INTERVAL, axis=0)
            parts.append(np.stack([values_sb.mean(0), values_sb.std(0), low_b, high_b]))
        else:
            parts.append(values_sb)
    found = np.concatenate(parts, -1)
    return dict(zip(("mean", "sd", "lower", "upper"), found, strict=True)) if kind == "summary" else found


def predict_chunks(
    posterior: Posterior, prepared: Prepared, scale: str = "response", chunk: int = 1024, seed: int = 0
) -> Iterator[np.ndarray]:
    """The same as draws (s, b) of `chunk` rows at a time, in the rows' order; one chunk lives at once."""
    if scale not in SCALES:
        raise ValueError(f"predict.scale: expected one of {SCALES}, got {scale!r}")
    n = len(prepared.rows.outcome_n)
    logit = posterior.design.response == "empirical_logit"
    with jax.enable_x64(True):
        draws, units = doubled_draws(posterior), units_of(posterior)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        index = np.minimum(np.arange(start, start + min(chunk, n)), n - 1)  # one shape: the last chunk is filled up
        with jax.enable_x64(True):
            rows = doubled(prepared.rows.take(index))
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), start), len(posterior["intercept"]))
            found = np.asarray(_chunk(prepared.spec, rows, draws, units, keys, scale, logit))
        yield found[:, : stop - start]


def linear_predictor(posterior: Posterior, prepared: Prepared) -> np.ndarray:
    """eta (s, u), offset aside: standardised units of y for the normal families, link units elsewhere."""
    with jax.enable_x64(True):
        return np.asarray(_etas(prepared.spec, doubled(prepared.rows), doubled_draws(posterior)))


def eta_of(spec: Spec, rows: Rows, found) -> jax.Array:
    """eta (n,) of one draw of every site."""
    if not spec.head:
        return nested.linear_predictor(spec, rows, found)
    width = spec.blocks[0].stop
    without = nested.linear_predictor(spec, rows, found | {"text": jnp.zeros(width)})
    return without + head.evaluate(spec.head, found, rows.columns_nq[:, :width])


def response_of(spec: Spec, eta_n, rows: Rows, found, units: Units, logit: bool) -> jax.Array:
    """E[y | eta] in units of the outcome, per unit of exposure. `logit`: eta is a standardised empirical logit."""
    if spec.family in ("normal", "student_t"):
        value_n = units.mean + units.sd * eta_n
        return jax.nn.sigmoid(value_n) if logit else value_n
    if spec.family == "ordinal":
        return units.grades[0] + FAMILIES["ordinal"].above(eta_n, found) @ jnp.diff(units.grades)
    return FAMILIES[spec.family].mean(eta_n, rows, found)


def units_of(posterior: Posterior) -> Units:
    scaling = posterior.scaling
    grades = jnp.asarray(scaling.get("outcome.grades", np.zeros(0)), float)
    return Units(*(jnp.asarray(float(scaling[f"outcome.{name}"])) for name in ("mean", "sd")), grades)


def doubled_draws(posterior: Posterior):
    return {name: jnp.asarray(value, float) for name, value in posterior.draws.items()}


@partial(jax.jit, static_argnames=("spec", "scale", "logit"))
def _chunk(spec: Spec, rows: Rows, draws, units: Units, keys, scale: str, logit: bool):
    def one(pair):
        found, key = pair
        if scale == "outcome":
            return _replicate(spec, rows, found, units, key)
        eta_n = eta_of(spec, rows, found)
        if scale == "response":
            return response_of(spec, eta_n, rows, found, units, logit)
        return units.sd * eta_n if spec.family in ("normal", "student_t") else eta_n

    return jax.lax.map(one, (draws, keys))


@partial(jax.jit, static_argnames="spec")
def _etas(spec: Spec, rows: Rows, draws):
    return jax.lax.map(partial(eta_of, spec, rows), draws)


def _replicate(spec: Spec, rows: Rows, found, units: Units, key):
    """A new outcome (n,) from the model itself, its sites held at one draw."""
    endogenous = rows.endogenous_nm if spec.endogenous else None
    made_n = seeded(substitute(causal_model, data=found), key)(spec, rows, None, endogenous)
    if spec.family in ("normal", "student_t"):
        return units.mean + units.sd * made_n
    return units.grades[made_n.astype(int)] if spec.family == "ordinal" else made_n.astype(float)
