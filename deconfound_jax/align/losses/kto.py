"""Kahneman-Tversky optimisation on single texts, desirable to a degree."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from deconfound_jax.align.losses import weighted_mean


def kto(logratio_b, label_b, beta, reference_point, desirable=1.0, undesirable=1.0):
    """Gain of a desirable text and loss of an undesirable one, mixed by how desirable it is.

        l = d lambda_D sigmoid(beta (z0 - h)) + (1 - d) lambda_U sigmoid(beta (h - z0))

    At d = 0 and d = 1 the published loss. Both parts level off far from z0, so an outlier pulls no harder; with equal
    lambdas a text of d = 1/2 pulls not at all.

    Args:
      logratio_b: (b,) h = log pi(x) - log pi_ref(x), nats per text.
      label_b: (b,) d in [0, 1]: P(reward above the log's median) under the posterior.
      beta: per nat; scalar, may be traced.
      reference_point: z0, nats; scalar, see `reference_point`.
      desirable, undesirable: lambda_D and lambda_U; scalars, may be traced.
    Returns:
      (b,) without unit, between 0 and the larger lambda.

        kto(h_b, prefer_b, beta=0.3, reference_point=reference_point(h_b, weight_b))

    Source: Ethayarajh et al. 2402.01306.
    """
    chex.assert_rank([logratio_b, label_b], 1)
    chex.assert_equal_shape([logratio_b, label_b])
    lead_b = beta * (logratio_b - reference_point)
    return label_b * desirable * jax.nn.sigmoid(-lead_b) + (1 - label_b) * undesirable * jax.nn.sigmoid(lead_b)


def reference_point(logratio_b, weight_b):
    """z0 = max(0, weighted mean of log-ratios), without gradient: what a text's log-ratio is compared with.

    Args:
      logratio_b: (b,) nats: of texts that stand behind another's prompt, an estimate of KL(pi || pi_ref); of the
        logged texts themselves where there are no prompts, the log's own drift.
      weight_b: (b,) >= 0.

    Source: Ethayarajh et al. 2402.01306.
    """
    return jax.lax.stop_gradient(jnp.maximum(weighted_mean(logratio_b, weight_b), 0.0))
