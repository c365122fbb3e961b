"""Policy gradients on sampled groups: advantages, clipped surrogates, and estimators of the divergence.

    advantage_bg = leave_one_out(reward_bg, weight_bg)
    loss_bg = rloo(logprob_bgl, old_bgl, advantage_bg, mask_bgl, clip=0.2)

Tokens: `logprob_bgl` under the policy that is trained, `old_bgl` under the one that sampled, nats; `mask_bgl` is 1 at
the tokens that count. Each loss gives one value a text. Gradients run through `logprob_bgl` alone.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp

# Nats of a log-ratio that are exponentiated: a factor 5e8. Beyond it there is only overflow.
_FARTHEST = 20.0
# Added to a group's standard deviation: rewards that differ by rounding must not become advantages of one.
_SD_FLOOR = 1e-4


def standardised(reward_bg, weight_bg):
    """GRPO's advantage: A = (r - mean) / (sd + 1e-4) over a text's group, sd with divisor sum w.

    Every group counts alike, however little its rewards differ: Dr.GRPO's objection.

    Args:
      reward_bg, weight_bg: (b, g); weight 0 leaves a text out, whatever its reward; 2 is the text twice.
    Returns:
      (b, g) without unit, weighted sum 0 in each group; 0 where the weight is.

    Source: Shao et al. 2402.03300, section 4.1.2.
    """
    centred_bg = centred(reward_bg, weight_bg)
    total_b1 = jnp.maximum(weight_bg.sum(1, keepdims=True), jnp.finfo(reward_bg.dtype).tiny)
    variance_b1 = (weight_bg * centred_bg**2).sum(1, keepdims=True) / total_b1
    differ_b1 = variance_b1 > 0  # else the root's slope is infinite
    return centred_bg / (jnp.sqrt(jnp.where(differ_b1, variance_b1, 1.0)) + _SD_FLOOR)


def centred(reward_bg, weight_bg):
    """Dr.GRPO's advantage: A = r - mean over a text's group. Arguments as `standardised`'s; the reward's unit.

    Source: Liu et al. 2503.20783.
    """
    chex.assert_rank([reward_bg, weight_bg], 2)
    chex.assert_equal_shape([reward_bg, weight_bg])
    there_bg, total_b1 = weight_bg > 0, weight_bg.sum(1, keepdims=True)
    # Measured from the group's best text, so that equal rewards have advantages of exactly 0.
    best_b1 = jnp.max(jnp.where(there_bg, reward_bg, -jnp.inf), 1, keepdims=True)
    behind_bg = jnp.where(there_bg, reward_bg - best_b1, 0.0)
    mean_b1 = (weight_bg * behind_bg).sum(1, keepdims=True) / jnp.where(total_b1 > 0, total_b1, 1.0)
    return jnp.where(there_bg, behind_bg - mean_b1, 0.0)


def leave_one_out(reward_bg, weight_bg):
    """RLOO's advantage: A_i = r_i - mean of the group's others = W / (W - 1) (r_i - mean), W the group's weight.

    One text of a row of weight 2 is compared with its double, too. A group of W <= 1 has no others: 0.
    Arguments as `standardised`'s; the reward's unit.

    Sources: Kool et al. 2019; Ahmadian et al. 2402.14740.
    """
    total_b1 = weight_bg.sum(1, keepdims=True)
    factor_b1 = jnp.where(total_b1 > 1, total_b1 / jnp.where(total_b1 > 1, total_b1 - 1, 1.0), 0.0)
    return factor_b1 * centred(reward_bg, weight_bg)


def ppo_clip(logratio, advantage, clip):
    """PPO's pessimistic surrogate, element by element, as a loss.

        l = -min(rho A, min(max(rho, 1 - clip), 1 + clip) A),   rho = exp(log pi - log pi_old)

    Args:
      logratio, advantage: same shape; nats, and any unit.
      clip: how far a ratio may fall or rise before it pulls no more; scalar, may be traced.

    Source: Schulman et al. 1707.06347, eq. 7.
    """
    chex.assert_equal_shape([logratio, advantage])
    ratio = jnp.exp(jnp.clip(logratio, -_FARTHEST, _FARTHEST))
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)


def grpo(logprob_bgl, old_bgl, advantage_bg, mask_bgl, clip):
    """Group relative policy optimisation: PPO's surrogate, mean over a text's tokens.

        l = 1/T sum_t ppo_clip_t,   T the text's tokens

    A long text's tokens each count less, bad ones among them: Dr.GRPO's objection.

    Args:
      logprob_bgl, old_bgl: (b, g, l) nats per token.
      advantage_bg: (b, g), `standardised`'s.
      mask_bgl: (b, g, l).
      clip: `ppo_clip`'s.
    Returns:
      (b, g) the advantage's unit; 0 for a text without tokens.

    Source: Shao et al. 2402.03300, eq. 3 (without its divergence: `kl_k3`).
    """
    surrogate_bgl = _token_surrogate(logprob_bgl, old_bgl, advantage_bg, mask_bgl, clip)
    return token_mean(surrogate_bgl, mask_bgl)


def dr_grpo(logprob_bgl, old_bgl, advantage_bg, mask_bgl, clip, length):
    """GRPO done right: the sum over a text's tokens by one fixed length, so no token's weight depends on its text's.

        l = 1/L sum_t ppo_clip_t

    Args:
      advantage_bg: (b, g), `centred`'s.
      length: L, tokens: the same in all steps, such as the longest that is sampled. The others are `grpo`'s.
    Returns:
      (b, g) the advantage's unit.

    Source: Liu et al. 2503.20783.
    """
    surrogate_bgl = _token_surrogate(logprob_bgl, old_bgl, advantage_bg, mask_bgl, clip)
    return surrogate_bgl.sum(-1) / length


def rloo(logprob_bgl, old_bgl, advantage_bg, mask_bgl, clip):
    """REINFORCE on whole texts: one ratio a text.

        l = ppo_clip(sum_t (log pi_t - log pi_old_t), A)

    Where the policy is the one that sampled, the gradient is -A grad log pi(x).

    Args:
      advantage_bg: (b, g), `leave_one_out`'s. The others are `grpo`'s.
    Returns:
      (b, g) the advantage's unit.

    Source: Ahmadian et al. 2402.14740, with PPO's clip for texts that an older policy drew.
    """
    logratio_bgl = _masked_difference(logprob_bgl, old_bgl, advantage_bg, mask_bgl)
    return ppo_clip(logratio_bgl.sum(-1), advantage_bg, clip)


def kl_k1(logprob, reference):
    """KL(pi || ref) at a sample of pi: k1 = log pi - log ref, unbiased, of either sign.

    As a loss it teaches nothing: its gradient is grad log pi, of mean zero. It belongs in the reward.

    Source of k1, k2 and k3: Schulman 2020, http://joschu.net/blog/kl-approx.html.
    """
    return logprob - reference


def kl_k2(logprob, reference):
    """k2 = 1/2 (log pi - log ref)^2: biased upwards where they differ, but on policy its gradient is the KL's own."""
    return 0.5 * jnp.square(logprob - reference)


def kl_k3(logprob, reference):
    """k3 = ref / pi - 1 - log(ref / pi): unbiased and never negative; its gradient is that of KL(ref || pi)."""
    behind = jnp.clip(reference - logprob, -_FARTHEST, _FARTHEST)
    return jnp.expm1(behind) - behind


def token_mean(value_bgl, mask_bgl):
    """Mean over a text's tokens, (b, g); 0 for a text without."""
    chex.assert_equal_shape([value_bgl, mask_bgl])
    return jnp.where(mask_bgl > 0, value_bgl, 0.0).sum(-1) / jnp.maximum(mask_bgl.sum(-1), 1)


def _token_surrogate(logprob_bgl, old_bgl, advantage_bg, mask_bgl, clip):
    logratio_bgl = _masked_difference(logprob_bgl, old_bgl, advantage_bg, mask_bgl)
    advantage_bgl = jnp.broadcast_to(advantage_bg[..., None], logratio_bgl.shape)
    return jnp.where(mask_bgl > 0, ppo_clip(logratio_bgl, advantage_bgl, clip), 0.0)


def _masked_difference(logprob_bgl, old_bgl, advantage_bg, mask_bgl):
    chex.assert_rank([logprob_bgl, advantage_bg], [3, 2])
    chex.assert_equal_shape([logprob_bgl, old_bgl, mask_bgl])
    chex.assert_equal_shape_prefix([logprob_bgl, advantage_bg], 2)
    return jnp.where(mask_bgl > 0, logprob_bgl - old_bgl, 0.0)
