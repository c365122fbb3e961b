"""Direct preference optimisation with soft labels."""

from __future__ import annotations

import chex
import jax


def dpo(logratio_first_p, logratio_second_p, label_p, beta):
    """Cross-entropy between a soft preference and the policy's implicit one.

        h_i = log pi(x_i) - log pi_ref(x_i),   m = beta (h_1 - h_2)
        l   = -[s log sigmoid(m) + (1 - s) log sigmoid(-m)],   s = P(text 1 is better than text 2)

    s = 1 is DPO; a constant s < 1 is conservative DPO. Here s comes from the posterior of the reward, pair by pair.
    The minimum is at sigmoid(m) = s, so a doubtful pair asks for a small margin, not for none of the weight.

    Args:
      logratio_first_p, logratio_second_p: (p,) h_1 and h_2, nats per text.
      label_p: (p,) s in [0, 1].
      beta: strength of the pull to the reference, per nat; scalar, may be traced.
    Returns:
      (p,) nats per pair; log 2 where policy and reference agree.

        dpo(logp_a - ref_a, logp_b - ref_b, prefer_p, beta=0.3)

    Source: Rafailov et al. 2023 (2305.18290), eq. 7; Mitchell 2023, "A note on DPO with noisy preferences &
    relationship to IPO".
    """
    chex.assert_rank([logratio_first_p, logratio_second_p, label_p], 1)
    chex.assert_equal_shape([logratio_first_p, logratio_second_p, label_p])
    margin_p = beta * (logratio_first_p - logratio_second_p)
    return -(label_p * jax.nn.log_sigmoid(margin_p) + (1 - label_p) * jax.nn.log_sigmoid(-margin_p))
