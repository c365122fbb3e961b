"""Cross-fitting that never splits a group: folds, and predictions of rows by fits that did not see their fold."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.causal.classical.absorb import level_codes
from deconfound_jax.causal.classical.arrays import columns, vector
from deconfound_jax.causal.classical.glm import newton


def group_folds(group_n, folds: int = 5, seed: int = 0) -> np.ndarray:
    """Fold 0 .. folds - 1 of each row (n,): whole groups, in random order, each to the fold with the fewest rows.

    Args:
      group_n: the group of each row, integers or strings; `np.arange(n)` where every row stands alone.
      folds: how many.
      seed: of the order.

    Raises:
      ValueError: fewer groups than folds, or fewer than two folds.
    """
    codes_nc, counts = level_codes(group_n, len(group_n))
    if not 2 <= folds <= counts[0]:
        raise ValueError(f"folds: expected 2 to {counts[0]}, the number of groups, got {folds}")
    size_l = np.bincount(codes_nc[:, 0])
    fold_l, rows_f = np.zeros(counts[0], int), np.zeros(folds)
    for level in np.random.default_rng(seed).permutation(counts[0]):
        fold_l[level] = rows_f.argmin()
        rows_f[fold_l[level]] += size_l[level]
    return fold_l[codes_nc[:, 0]]


def ridge_predictions(y_n, x_nq, fold_n, train_n=None, penalty: float = 1.0) -> np.ndarray:
    """Each row's E[y | x] (n,) by the ridge regression on the other folds.

        argmin_b,a  sum_train (y - a - x'b)^2 + penalty |b|^2,    x standardised over all rows

    Args:
      y_n: what to predict.
      x_nq: predictors, any scale; the intercept a is free.
      fold_n: folds, as from `group_folds`.
      train_n: rows that may train, a mask; default all.
      penalty: in rows: that many rows' worth of evidence for b = 0.

    Raises:
      ValueError: a fold whose other folds leave nothing to train on.
    """
    return _predictions("ridge", y_n, x_nq, fold_n, train_n, penalty)


def logistic_predictions(y_n, x_nq, fold_n, train_n=None, penalty: float = 1.0) -> np.ndarray:
    """Each row's P(y = 1 | x) (n,) by the ridge-penalised logistic regression on the other folds.

        argmax_b,a  sum_train log p(y | a + x'b) - penalty / 2 |b|^2,    x standardised over all rows

    Arguments and errors as for `ridge_predictions`; y is 0 or 1.
    """
    return _predictions("logistic", y_n, x_nq, fold_n, train_n, penalty)


def standardised(x_nq) -> np.ndarray:
    """Columns of mean 0 and standard deviation 1; a constant column becomes zero."""
    x_nq = columns("x", x_nq)
    centred = x_nq - x_nq.mean(0)
    size_q = centred.std(0)
    return centred / np.where(size_q > 1e-12 * np.maximum(1, np.abs(x_nq).max(0, initial=0)), size_q, np.inf)


def _predictions(learner, y_n, x_nq, fold_n, train_n, penalty):
    x_nq = standardised(x_nq)
    n = len(x_nq)
    y_n, fold_n = vector("y", y_n, n), level_codes(fold_n, n)[0][:, 0]
    train_n = np.ones(n, bool) if train_n is None else np.asarray(train_n, bool)
    folds = int(fold_n.max()) + 1
    for fold in range(folds):
        if not (train_n & (fold_n != fold)).any() or folds < 2:
            raise ValueError(f"fold {fold}: expected rows to train on outside it, got none")
    with jax.enable_x64(True):
        return np.asarray(_crossfit(learner, y_n, x_nq, fold_n, train_n, float(penalty), folds))


@functools.partial(jax.jit, static_argnames=("learner", "folds"))
def _crossfit(learner, y_n, x_nq, fold_n, train_n, penalty, folds):
    design_nk = jnp.concatenate([jnp.ones((len(x_nq), 1)), x_nq], 1)
    penalty_k = jnp.full(design_nk.shape[1], penalty).at[0].set(0.0)
    ones_n = jnp.ones_like(y_n)

    def of_fold(fold):
        weight_n = (train_n & (fold_n != fold)).astype(design_nk.dtype)
        if learner == "logistic":
            return jax.nn.sigmoid(
                design_nk @ newton("logit", y_n, design_nk, ones_n, weight_n, penalty_k).coefficient_k
            )
        weighted_nk = weight_n[:, None] * design_nk
        gram_kk = design_nk.T @ weighted_nk + jnp.diag(penalty_k)
        return design_nk @ jnp.linalg.solve(gram_kk, weighted_nk.T @ y_n)

    return jax.lax.map(of_fold, jnp.arange(folds))[fold_n, jnp.arange(len(y_n))]
