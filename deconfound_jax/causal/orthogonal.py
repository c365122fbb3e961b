"""The orthogonal reward: partially linear, doubly robust in the terms' effect and in E[phi | c, z].

    V = phi - E[phi | c, z]                       cross-fitted, whole groups left out
    theta = beta + (V'W phi)^-1 V'W (y~ - phi'beta - removed)

removed = g(c) + gamma p + c0 e of the posterior. Right g: the bracket is noise. Right
E[phi | c, z]: V is uncorrelated with whatever is wrong in g. Either suffices. The draws are
the posterior's (of g and gamma) plus the estimate's own sampling noise, clustered by group.

Sources: Robins, Mark and Newey (1992), the E-estimator; Chernozhukov et al. (2018),
cross-fitting.
"""

from __future__ import annotations

import numpy as np

from deconfound_jax.causal.classical.crossfit import group_folds, ridge_predictions
from deconfound_jax.causal.parts import removed
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.reward import Reward, standard_features, text_coefficients, working_response
from deconfound_jax.causal.spec import Prepared

_MOST_LEVELS = 200  # of a pooled intercept that E[phi | c, z] has a column each for; a category has its means


def orthogonal_form(
    posterior: Posterior, prepared: Prepared, features_nd: np.ndarray, groups_n=None, folds: int = 5, seed: int = 0
) -> Reward:
    """phi(x)'theta for any texts, joint draws (s, n) in units of the outcome, link scale.

    Args:
      posterior, prepared: of one fit with a linear f.
      features_nd: phi(x) of the texts to be scored.
      groups_n: group of each row of the log, never split between folds; None: rows stand alone.
      folds: of the cross-fitting.
      seed: of folds and sampling noise.

    Raises:
      ValueError: a head, or a selection design.
    """
    if prepared.spec.head:
        raise ValueError("orthogonal_form: expected a linear f, got a head")
    rows, width = prepared.rows, prepared.spec.blocks[0].stop
    standard_nd = standard_features(posterior, features_nd)
    group_u = np.arange(len(rows.outcome_n))
    if groups_n is not None:
        first_u = np.unique(prepared.row_of_log_n, return_index=True)[1]
        group_u = np.unique(np.asarray(groups_n)[first_u], return_inverse=True)[1]
    phi_ud = np.asarray(rows.columns_nq[:, :width], np.float64)
    residual_ud = phi_ud - expected_features(prepared, group_folds(group_u, folds, seed))
    response_su, sampling_su = working_response(posterior, prepared)
    beta_sd = text_coefficients(posterior)
    left_su = response_su - removed(posterior, prepared) - beta_sd @ phi_ud.T
    weight_u = rows.weight_n / sampling_su.mean(0)
    left_su = left_su - np.average(left_su, axis=1, weights=weight_u)[:, None]
    phi_ud = phi_ud - np.average(phi_ud, axis=0, weights=weight_u)[None, :]
    residual_ud = residual_ud - np.average(residual_ud, axis=0, weights=weight_u)[None, :]
    weighted_ud = residual_ud * weight_u[:, None]
    # One row's worth of evidence for the posterior's own beta keeps a feature that the terms explain in place.
    inverse_dd = np.linalg.inv(weighted_ud.T @ phi_ud + weight_u.mean() * np.eye(width))
    step_sd = left_su @ weighted_ud @ inverse_dd.T
    influence_ud = weighted_ud * (left_su.mean(0) - phi_ud @ step_sd.mean(0))[:, None]
    scores_gd = np.stack([np.bincount(group_u, column) for column in influence_ud.T], 1)
    noise_sg = np.random.default_rng([seed, 4]).standard_normal((len(step_sd), len(scores_gd)))
    theta_sd = beta_sd + step_sd + noise_sg @ scores_gd @ inverse_dd.T  # covariance: the sandwich
    sd = float(posterior.scaling["outcome.sd"])
    return Reward(sd * theta_sd @ standard_nd.T, "orthogonal", posterior.converged, posterior.verdict)


def expected_features(prepared: Prepared, fold_u: np.ndarray) -> np.ndarray:
    """E[phi | c, z] (u, d) of each row by a ridge regression on the other folds' terms and instruments."""
    rows, spec = prepared.rows, prepared.spec
    blocks = [block for block in spec.first_blocks[1:] if not block.name.startswith("text:")]
    phi_ud = np.asarray(rows.columns_nq[:, : spec.blocks[0].stop], np.float64)
    columns = []
    for block in blocks:
        column_uk, slope_d = rows.columns_nq[:, block.start : block.stop], prepared.scaling.get(f"{block.name}.text")
        columns.append(column_uk if slope_d is None else column_uk - phi_ud @ np.asarray(slope_d)[:, None])
    hot = [level for level in spec.levels if level.count <= _MOST_LEVELS]
    columns += [np.eye(level.count)[rows.levels_nc[:, level.column]] for level in hot]
    wide = [level for level in spec.levels if level.absorbed and level.count > _MOST_LEVELS]
    columns += [_means_of_others(phi_ud, rows.levels_nc[:, level.column]) for level in wide]
    known_uk = np.concatenate(columns, 1) if columns else np.zeros((len(phi_ud), 0))
    if not known_uk.shape[1]:
        return np.zeros_like(phi_ud)
    return np.stack([ridge_predictions(column, known_uk, fold_u) for column in phi_ud.T], 1)


def _means_of_others(phi_ud: np.ndarray, codes_u: np.ndarray) -> np.ndarray:
    """Mean of the features over the other rows of each row's level (u, d); the log's mean where there are none."""
    count_c = np.bincount(codes_u)
    total_cd = np.stack([np.bincount(codes_u, column) for column in phi_ud.T], 1)
    left_u1 = (count_c[codes_u] - 1)[:, None]
    mean_ud = (total_cd[codes_u] - phi_ud) / np.maximum(left_u1, 1)
    return np.where(left_u1 > 0, mean_ud, phi_ud.mean(0)[None, :])
