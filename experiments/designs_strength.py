"""How far a text may move the outcome, chosen inside the log: the prior sd of the text's coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.designs_chain import lay_out, solve, take
from experiments.designs_fits import Fitted, group_folds, within
from experiments.designs_modal import log_sds, surrogate_at, unconstrained


def choose_text_sd(
    fitted: Fitted, target_n: np.ndarray, strengths: Sequence[float], group_n: np.ndarray, test_n, seed: int
) -> float:
    """The strength whose predictions of held-out groups are nearest, the rows' information held as it was fitted.

        loss(sd) = sum over folds, held rows of (y - [1, columns] @ theta(sd; other folds))^2

    Levels that hold no training row predict nothing. The yardstick is the ridge's: unweighted, on the logit.

    Args:
      fitted: the design with every scale learned; scales other than the text's stay.
      target_n: empirical logits.
      group_n: are held out as wholes.
      test_n: codes inside whose levels errors are compared, their mean taken off; None: across rows.
    """
    spec, rows, fit = fitted.prepared.spec, fitted.prepared.rows, fitted.fit
    raw, fold_n = unconstrained(spec, fit.psi), group_folds(group_n, seed)
    loss = np.zeros(len(strengths))
    everything = lay_out(spec, rows)
    for fold in range(fold_n.max() + 1):
        held = np.flatnonzero(fold_n == fold)
        seen = np.flatnonzero(fold_n != fold)
        columns = take(everything, seen)
        surrogate = surrogate_at(spec, rows.take(seen), columns, raw, fit.eta_n[seen])
        for k, sd in enumerate(strengths):
            fixed = spec._replace(blocks=(spec.blocks[0]._replace(sd=sd), *spec.blocks[1:]))
            mean_d = solve(columns, surrogate, *log_sds(fixed, columns, unconstrained(fixed, fit.psi))).mean_d
            error_n = target_n[held] - float(rows.offset) - everything.dense_nd[held] @ mean_d
            if test_n is not None:
                error_n = within(error_n[:, None], test_n[held])[:, 0]
            loss[k] += (error_n**2).sum()
    return float(strengths[loss.argmin()])
