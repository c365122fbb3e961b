"""The rewards that `upworthy_designs` compares: designs of one family, and a ridge on the empirical logit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deconfound_jax.causal.spec import Prepared
from deconfound_jax.causal.terms import empirical_logit, prepare
from deconfound_jax.structs import Design, Logs
from experiments.designs_modal import Modal, fit_modal

_SITE = "smooth(week_number) + category(week) + linear(log_traffic)"
_LEDE = f"{_SITE} + embedding(lede_vector)"
_FULL = f"{_LEDE} + category(test) + category(image)"


def _designs(**terms: str) -> dict[str, Design]:
    return {name: Design.parse(text, "beta_binomial") for name, text in terms.items()}


_SEVERAL_ARMS = _designs(
    naive="", week="category(week)", traffic=_SITE, lede=_LEDE, test=f"{_LEDE} + category(test)", full=_FULL
)
DESIGNS = {
    "one_arm": _designs(naive="", week="category(week)", traffic=_SITE, full=_LEDE),
    "broken_window": _SEVERAL_ARMS,
    "all_arms": _SEVERAL_ARMS,
}


def logit_normal(design: Design) -> Design:
    """The same terms with overdispersion as a normal effect of each arm on the logit, in place of the beta's."""
    return Design.parse(" + ".join(filter(None, [str(design), "intercept(arm)"])), "binomial")


_STRENGTHS = np.exp(np.arange(2.0, 14.0, 0.5))  # of the ridge, on standardised features
_FOLDS = 5  # of the cross-validation inside the log


class Fitted(NamedTuple):
    """A linear reward on raw features, and the fit behind it (None: the ridge)."""

    slope_d: np.ndarray
    prepared: Prepared | None
    fit: Modal | None

    def reward(self, features_nd: np.ndarray) -> np.ndarray:
        """Up to a constant, (n,)."""
        return features_nd @ self.slope_d


def fit_design(logs: Logs, features_nd: np.ndarray, design: Design, rank: int, psi: dict | None = None) -> Fitted:
    """A design with every scale learned.

    Args:
      logs, features_nd: of the training rows.
      design: the causal assumptions.
      rank: of each set of level means: their leading directions over the levels.
      psi: scalars to start at.
    """
    prepared = narrow(prepare(logs, features_nd, design), rank)
    return _fitted(prepared, fit_modal(prepared.spec, prepared.rows, psi))


def refit(fitted: Fitted, text_sd: float) -> Fitted:
    """The same design with this prior sd of the text's coefficients; other scalars stay as learned."""
    spec = fitted.prepared.spec
    fixed = spec._replace(blocks=(spec.blocks[0]._replace(sd=text_sd), *spec.blocks[1:]))
    return _fitted(fitted.prepared, fit_modal(fixed, fitted.prepared.rows, fitted.fit.psi, learn=False))


def narrow(prepared: Prepared, rank: int) -> Prepared:
    """Cuts each block of level means to its first `rank` columns: they come in order of size."""
    blocks, columns, at = [], [], 0
    for block in prepared.spec.blocks:
        width = block.stop - block.start
        width = min(width, rank) if block.name.endswith(".means") else width
        columns.append(prepared.rows.columns_nq[:, block.start : block.start + width])
        blocks.append(block._replace(start=at, stop=at + width))
        at += width
    rows = prepared.rows._replace(columns_nq=np.concatenate(columns, 1))
    return prepared._replace(spec=prepared.spec._replace(blocks=tuple(blocks)), rows=rows)


def fit_ridge(logs: Logs, features_nd: np.ndarray, group_n: np.ndarray, seed: int) -> Fitted:
    """Ridge of the empirical logit on standardised features; strength by cross-validation over whole groups."""
    return _ridge(empirical_logit(logs.outcome_n, logs.exposure_n)[0], features_nd, group_n, seed)


def fit_contrasts(logs: Logs, features_nd: np.ndarray, group_n: np.ndarray, seed: int) -> Fitted:
    """The same ridge on differences inside tests: logits and features minus their test's mean."""
    both = np.concatenate([empirical_logit(logs.outcome_n, logs.exposure_n)[0][:, None], features_nd], 1)
    inside = within(both, logs.codes("test"))
    return _ridge(inside[:, 0], inside[:, 1:], group_n, seed)


def within(values_nq: np.ndarray, codes_n: np.ndarray) -> np.ndarray:
    """Values minus their level's mean, (n, q)."""
    codes_n = np.unique(codes_n, return_inverse=True)[1]
    means = np.stack([np.bincount(codes_n, column) for column in values_nq.T], 1) / np.bincount(codes_n)[:, None]
    return values_nq - means[codes_n]


def group_folds(group_n: np.ndarray, seed: int) -> np.ndarray:
    """Fold of each row (n,), whole groups in one."""
    group_n = np.unique(group_n, return_inverse=True)[1]
    return np.random.default_rng(seed).permutation(group_n.max() + 1)[group_n] % _FOLDS


def _ridge(target_n: np.ndarray, features_nd: np.ndarray, group_n: np.ndarray, seed: int) -> Fitted:
    sd_d = features_nd.std(0)
    sd_d = np.where(sd_d > 1e-12, sd_d, 1.0)
    scaled_nd = (features_nd - features_nd.mean(0)[None, :]) / sd_d[None, :]
    fold_n = group_folds(group_n, seed)
    loss = np.zeros(len(_STRENGTHS))
    for fold in range(_FOLDS):
        inside = fold_n != fold
        slopes_dr, centre_d, level = _ridge_path(scaled_nd[inside], target_n[inside], _STRENGTHS)
        predicted_nr = level + (scaled_nd[~inside] - centre_d[None, :]) @ slopes_dr
        loss += ((target_n[~inside, None] - predicted_nr) ** 2).sum(0)
    slopes_dr = _ridge_path(scaled_nd, target_n, _STRENGTHS[[loss.argmin()]])[0]
    return Fitted(slopes_dr[:, 0] / sd_d, None, None)


def _ridge_path(scaled_nd, target_n, strengths):
    """Slopes (d, r) at each strength, and the centre of both sides."""
    centre_d, level = scaled_nd.mean(0), target_n.mean()
    centred_nd = scaled_nd - centre_d[None, :]
    size_d, axes_dd = np.linalg.eigh(centred_nd.T @ centred_nd)
    along_d = axes_dd.T @ (centred_nd.T @ (target_n - level))
    return axes_dd @ (along_d[:, None] / (size_d[:, None] + strengths[None, :])), centre_d, level


def _fitted(prepared: Prepared, fit: Modal) -> Fitted:
    return Fitted(fit.mean["text"] / prepared.scaling["features.sd"], prepared, fit)
