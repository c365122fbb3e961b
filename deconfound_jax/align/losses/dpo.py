"""Direct preference optimisation with soft labels: pairs of log-ratios to a frozen reference.

    h_i = log pi(x_i) - log pi_ref(x_i), nats;   m = beta (h_1 - h_2);   s = P(text 1 is better than text 2)

A constant s < 1 says that every label is equally doubtful. Here s comes from the posterior of the reward, pair by pair.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from deconfound_jax.align.losses import soft_logistic


def dpo(logratio_first_p, logratio_second_p, label_p, beta):
    """Cross-entropy between a soft preference and the policy's implicit one.

        l = -[s log sigmoid(m) + (1 - s) log sigmoid(-m)]

    The minimum is at sigmoid(m) = s, so a doubtful pair asks for a small margin, not for none of the weight.

    Args:
      logratio_first_p, logratio_second_p: (p,) h_1 and h_2, nats per text.
      label_p: (p,) s in [0, 1].
      beta: strength of the pull to the reference, per nat; scalar, may be traced.
    Returns:
      (p,) nats per pair; log 2 where policy and reference agree.

        dpo(logp_a - ref_a, logp_b - ref_b, prefer_p, beta=0.3)

    Source: Rafailov et al. 2305.18290, eq. 7.
    """
    return soft_logistic(_margin(logratio_first_p, logratio_second_p, label_p, beta), label_p)


def conservative_dpo(logratio_first_p, logratio_second_p, label_p, beta, noise):
    """DPO where each label is believed wrong with probability `noise`, whatever it says.

        l = dpo at the label (1 - noise) s + noise (1 - s)

    Args:
      noise: in [0, 1/2]; scalar. The others are `dpo`'s.
    Returns:
      (p,) nats per pair.

        conservative_dpo(h_a, h_b, prefer_p, beta=0.3, noise=0.1)

    Source: Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO".
    """
    return dpo(logratio_first_p, logratio_second_p, (1 - 2 * noise) * label_p + noise, beta)


def robust_dpo(logratio_first_p, logratio_second_p, label_p, beta, noise):
    """DPO's loss at the clean label, estimated without bias from one that was flipped with probability `noise`.

        l = [(1 - noise) dpo(s) - noise dpo(1 - s)] / (1 - 2 noise) = dpo at the label (s - noise) / (1 - 2 noise)

    A sure pair's label leaves [0, 1], so its loss falls without bound as the margin grows: it pulls on.

    Args:
      noise: in [0, 1/2); scalar. The others are `dpo`'s.
    Returns:
      (p,) nats per pair; may be negative.

        robust_dpo(h_a, h_b, prefer_p, beta=0.3, noise=0.1)

    Source: Chowdhury et al. 2403.00409.
    """
    return dpo(logratio_first_p, logratio_second_p, (label_p - noise) / (1 - 2 * noise), beta)


def hinge(logratio_first_p, logratio_second_p, label_p, beta):
    """Sequence likelihood calibration's loss on log-ratios: nothing is asked of a pair beyond margin 1.

        l = s max(0, 1 - m) + (1 - s) max(0, 1 + m)

    Args: `dpo`'s.
    Returns:
      (p,) without unit; 1 where policy and reference agree.

        hinge(h_a, h_b, prefer_p, beta=0.3)

    Sources: Zhao et al. 2305.10425 (SLiC-HF); Liu et al. 2309.06657 (on log-ratios).
    """
    margin_p = _margin(logratio_first_p, logratio_second_p, label_p, beta)
    return label_p * jax.nn.relu(1 - margin_p) + (1 - label_p) * jax.nn.relu(1 + margin_p)


def ipo(logratio_first_p, logratio_second_p, label_p, beta):
    """Identity preference optimisation: a regression of the log-ratios' difference on the preference.

        l = (h_1 - h_2 - (s - 1/2) / beta)^2

    At s = 1 the published loss, target 1 / (2 beta); at a soft s it differs from the mean over labels drawn with
    probability s by a number that no parameter moves. The margin stays bounded however sure the label is.

    Args: `dpo`'s; beta is the paper's tau.
    Returns:
      (p,) nats squared.

        ipo(h_a, h_b, prefer_p, beta=0.3)

    Source: Azar et al. 2310.12036, eq. 17.
    """
    difference_p = _margin(logratio_first_p, logratio_second_p, label_p, 1.0)
    return jnp.square(difference_p - (label_p - 0.5) / beta)


def per_token(logratio_p, tokens_p):
    """Log-ratio a token, for the length-normalised form of each loss here: a long text gets no larger margin.

        h_i / T_i,   T_i the number of scored tokens; 0 where there are none

    Args:
      logratio_p, tokens_p: same shape; nats per text, and tokens.

        dpo(per_token(h_a, tokens_a), per_token(h_b, tokens_b), prefer_p, beta=3.0)

    Source: Lambert et al. 2411.15124 (Tulu 3).
    """
    chex.assert_equal_shape([logratio_p, tokens_p])
    return logratio_p / jnp.maximum(tokens_p, 1)


def _margin(logratio_first_p, logratio_second_p, label_p, beta):
    chex.assert_rank([logratio_first_p, logratio_second_p, label_p], 1)
    chex.assert_equal_shape([logratio_first_p, logratio_second_p, label_p])
    return beta * (logratio_first_p - logratio_second_p)
