"""Residuals on fixed effects: any number of categorical codes and dense controls, swept out by least squares."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.causal.classical.arrays import columns, row_weights

TOLERANCE = 1e-12  # of the gradient, relative to where it started
MAX_STEPS = 2000


def residualise(values_nk, controls_nq=None, codes_nc=None, weight_n=None) -> np.ndarray:
    """Weighted least-squares residuals on an intercept, dense controls and categorical codes.

        r = v - [1, Q, D] b,    [1, Q, D]' W r = 0,    D the levels' indicators

    Controls that the others determine, and codes nested in others, are harmless. One code is swept out exactly by
    its level means; several by conjugate gradients on the levels, then the controls on what is left of them
    (Frisch and Waugh 1933; Lovell 1963).

    Args:
      values_nk: k columns to residualise, any scale; (n,) is taken for one column.
      controls_nq: numeric controls, or None.
      codes_nc: categories as integers or strings, a column each; (n,) is taken for one; or None.
      weight_n: a row counts as so many rows; default ones. A row of weight zero gets a residual, and no say.

    Returns:
      Residuals (n, k), fp64, in the units of the values.

    Raises:
      ValueError: lengths that differ, numbers that are not finite, negative weights or weights that are all zero.
      RuntimeError: several codes so thinly connected that the sweeps do not settle.
    """
    values_nk = columns("values", values_nk)
    n = len(values_nk)
    controls_nq = np.zeros((n, 0)) if controls_nq is None else columns("controls", controls_nq, n)
    weight_n = row_weights(weight_n, n)
    codes_nc, counts = level_codes(codes_nc, n)
    with jax.enable_x64(True):
        residual_nk, settled = _residualise(values_nk, controls_nq, codes_nc, weight_n, counts)
        if not bool(settled):
            raise RuntimeError(f"residualise: codes with {counts} levels did not settle in {MAX_STEPS} sweeps")
        return np.asarray(residual_nk)


def level_codes(codes_nc, n: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Codes 0, 1, ... (n, c) of each column's values, and how many levels each has; no columns means none."""
    if codes_nc is None:
        return np.zeros((n, 0), np.int64), ()
    codes_nc = np.asarray(codes_nc)
    codes_nc = codes_nc[:, None] if codes_nc.ndim == 1 else codes_nc
    if len(codes_nc) != n:
        raise ValueError(f"codes: expected {n} rows, got {len(codes_nc)}")
    found = [np.unique(column, return_inverse=True)[1].reshape(-1) for column in codes_nc.T]
    counts = tuple(int(column.max()) + 1 for column in found)
    return np.stack(found, 1) if found else np.zeros((n, 0), np.int64), counts


@functools.partial(jax.jit, static_argnames="counts")
def _residualise(values_nk, controls_nq, codes_nc, weight_n, counts):
    k = values_nk.shape[1]
    both = _centre(jnp.concatenate([values_nk, controls_nq], 1), weight_n)
    size_q = jnp.sqrt(weight_n @ both[:, k:] ** 2)
    both, settled = _sweep(both, codes_nc, weight_n, counts)
    values_nk, controls_nq = both[:, :k], both[:, k:] / jnp.where(size_q > 0, size_q, 1.0)[None, :]
    if controls_nq.shape[1] == 0:
        return values_nk, settled
    root_n = jnp.sqrt(weight_n)[:, None]
    left, upper = jnp.linalg.qr(root_n * controls_nq)
    turn, size, right = jnp.linalg.svd(upper, full_matrices=False)
    # What is left of a control that the codes determine is rounding: judged against the column before the sweep.
    keep = size > 1e-9
    basis_nq = left @ (turn * keep[None, :])
    back = right.T * jnp.where(keep, 1 / jnp.where(keep, size, 1.0), 0.0)[None, :]
    for _ in range(2):  # twice is enough: the second pass removes the rounding of the first
        values_nk = values_nk - controls_nq @ (back @ (basis_nq.T @ (root_n * values_nk)))
    return values_nk, settled


def _sweep(values_nk, codes_nc, weight_n, counts):
    """Residuals on the codes' levels, and whether the iteration settled."""
    if len(counts) == 0:
        return values_nk, True
    if len(counts) == 1:
        return values_nk - _level_means(values_nk, codes_nc[:, 0], weight_n, counts[0])[codes_nc[:, 0]], True
    start = jnp.concatenate([jnp.zeros(1, int), jnp.cumsum(jnp.asarray(counts))[:-1]])
    place_nc, total = codes_nc + start[None, :], sum(counts)
    mass_l = jnp.zeros(total).at[place_nc.reshape(-1)].add(jnp.repeat(weight_n, len(counts)))
    inverse_l1 = jnp.where(mass_l > 0, 1 / jnp.where(mass_l > 0, mass_l, 1.0), 0.0)[:, None]

    def collect(r_nk):  # D' W r
        weighted = weight_n[:, None] * r_nk
        return sum(jax.ops.segment_sum(weighted, place_nc[:, c], total) for c in range(len(counts)))

    def spread(a_lk):  # D a
        return sum(a_lk[place_nc[:, c]] for c in range(len(counts)))

    def go_on(state):
        *_, power_k, step = state
        return (step < MAX_STEPS) & jnp.any(power_k > TOLERANCE**2 * first_k)

    def turn(state):
        r_nk, gradient_lk, direction_lk, power_k, step = state
        moved_nk = spread(direction_lk)
        curvature_k = weight_n @ moved_nk**2
        live_k = (power_k > TOLERANCE**2 * first_k) & (curvature_k > 0)
        length_k = jnp.where(live_k, power_k / jnp.where(live_k, curvature_k, 1.0), 0.0)
        r_nk = r_nk - length_k[None, :] * moved_nk
        gradient_lk = collect(r_nk)  # from the residual, so that rounding does not pile up
        new_k = jnp.where(live_k, jnp.sum(inverse_l1 * gradient_lk**2, 0), power_k)
        ratio_k = jnp.where(live_k, new_k / jnp.where(live_k, power_k, 1.0), 0.0)
        direction_lk = inverse_l1 * gradient_lk + ratio_k[None, :] * direction_lk
        return r_nk, gradient_lk, direction_lk, new_k, step + 1

    gradient_lk = collect(values_nk)
    # A column that the levels leave alone has a gradient of pure rounding, which no step makes smaller.
    first_k = jnp.maximum(jnp.sum(inverse_l1 * gradient_lk**2, 0), 1e-8 * (weight_n @ values_nk**2))
    power_k = jnp.sum(inverse_l1 * gradient_lk**2, 0)
    state = (values_nk, gradient_lk, inverse_l1 * gradient_lk, power_k, 0)
    residual_nk, _, _, power_k, _ = jax.lax.while_loop(go_on, turn, state)
    return residual_nk, jnp.all(power_k <= TOLERANCE**2 * first_k)


def _level_means(values_nk, codes_n, weight_n, count):
    mass_l = jax.ops.segment_sum(weight_n, codes_n, count)
    sums_lk = jax.ops.segment_sum(weight_n[:, None] * values_nk, codes_n, count)
    return sums_lk / jnp.where(mass_l > 0, mass_l, 1.0)[:, None]


def _centre(values_nk, weight_n):
    return values_nk - ((weight_n / weight_n.sum()) @ values_nk)[None, :]
