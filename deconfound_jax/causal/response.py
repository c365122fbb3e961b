"""The reward on the outcome's own scale: what would have happened to the log's rows under a text.

    r(x) = mean over rows i of link^-1( f(x) + [eta_i - f(x_i)] )         (g-formula)

in units of the outcome per unit of exposure (clicks per impression, say). Everything but
the text stays as it was: confounders, p and its error e, levels. For reporting; a ranking
is the link scale's unless the text interacts with a confounder.
Source: Robins (1986).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.causal import head as heads
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.predict import Units, doubled_draws, eta_of, response_of, units_of
from deconfound_jax.causal.reward import Reward, standard_features, text_coefficients
from deconfound_jax.causal.spec import Head, Prepared, Rows, Spec, doubled

_CELLS = 4_000_000  # texts times rows at once


def response_form(
    posterior: Posterior, prepared: Prepared, features_nd: np.ndarray, head: Head | None = None
) -> Reward:
    """Mean outcome under each text, joint draws (s, n), outcome units per exposure.

    Args:
      posterior, prepared: of one fit; the log's rows are what is averaged over.
      features_nd: phi(x) of n texts.
      head: the (init, apply) that the fit had, if it had one.

    Example:
      >>> clicks_per_thousand = 1000 * response_form(posterior, prepared, features_nd).mean
    """
    spec = prepared.spec
    if (head is None) != (spec.head is None):
        raise ValueError(f"head: expected that of the fit ({spec.head!r}), got {head!r}")
    standard_nd = standard_features(posterior, features_nd)
    size, logit = max(1, _CELLS // len(prepared.rows.outcome_n)), posterior.design.response == "empirical_logit"
    size, parts = min(size, len(standard_nd)), []
    with jax.enable_x64(True):
        counted = prepared.rows._replace(weight_n=prepared.rows.weight_n * np.bincount(prepared.row_of_log_n))
        rows, draws, units = doubled(counted), doubled_draws(posterior), units_of(posterior)
        beta_sd = jnp.zeros((len(posterior["intercept"]), standard_nd.shape[1]))
        beta_sd = beta_sd if head else jnp.asarray(text_coefficients(posterior))
        for start in range(0, len(standard_nd), size):
            some_bd = standard_nd[np.minimum(np.arange(start, start + size), len(standard_nd) - 1)]
            found = _responses(spec, rows, draws, beta_sd, units, jnp.asarray(some_bd), logit)
            parts.append(np.asarray(found)[:, : len(standard_nd) - start])
    return Reward(np.concatenate(parts, 1), "model", posterior.converged, posterior.verdict, "response")


@partial(jax.jit, static_argnames=("spec", "logit"))
def _responses(spec: Spec, rows: Rows, draws, beta_sd, units: Units, texts_bd, logit: bool):
    own_nd, share_n = rows.columns_nq[:, : spec.blocks[0].stop], rows.weight_n / rows.weight_n.sum()
    modifiers = [block for block in spec.blocks if block.name.startswith("text:")]
    squared_n = jnp.maximum((own_nd**2).sum(1), 1e-300)

    def one(pair):
        found, beta_d = pair
        own_n, text_b = own_nd @ beta_d, texts_bd @ beta_d
        if spec.head:
            own_n, text_b = (heads.evaluate(spec.head, found, each) for each in (own_nd, texts_bd))
        change_bn = text_b[:, None] - own_n[None, :]
        for block in modifiers:  # its columns are phi(x_i) c_i
            product_nd = rows.columns_nq[:, block.start : block.stop]
            c_n = (product_nd * own_nd).sum(1) / squared_n
            change_bn = change_bn + (texts_bd @ found[block.name])[:, None] * c_n[None, :]
            change_bn = change_bn - (product_nd @ found[block.name])[None, :]
        eta_bn = eta_of(spec, rows, found)[None, :] + change_bn
        return response_of(spec, eta_bn, rows, found, units, logit) @ share_n

    return jax.lax.map(one, (draws, beta_sd))
