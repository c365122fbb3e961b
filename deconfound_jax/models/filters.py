"""From next-token logits to a token: penalty, temperature, the usual filters, one draw.

The order and the definitions are those of the transformers library, so the same settings mean the same.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deconfound_jax.models.tokenizer import PAD

_BLOCK = 256  # of the vocabulary, in a draw


def filter_logits(
    logits_rv, history_rl, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
) -> jax.Array:
    """Scores whose softmax is drawn from, -inf where a filter removes a token. In this order:

        repetition_penalty   a logit of a token in the history: divided by it if positive, else multiplied (1: off)
        temperature          divides (0: as it is, for the caller to take the largest)
        top_k                the k most probable stay (0: off)
        top_p                x stays if the tokens more probable than x have less than top_p together (1: off)
        min_p                x stays if p(x) >= min_p max p (0: off)

    Tokens of equal score stay or go together. At least one stays.

    Args:
      history_rl: int, the tokens that the penalty is for, PAD (-1) anywhere.
      the others: scalars, may be traced.
    Returns:
      (r, v) float32.

    Sources: Keskar et al. 1909.05858 (penalty); Fan et al. 1805.04833 (top-k); Holtzman et al. 1904.09751 (top-p);
    Nguyen et al. 2407.01082 (min-p).
    """

    def when(condition, change, score_rv):
        return jax.lax.cond(condition, change, lambda same_rv: same_rv, score_rv)

    score_rv = logits_rv.astype(jnp.float32)
    score_rv = when(repetition_penalty != 1, lambda s: _penalize(s, history_rl, repetition_penalty), score_rv)
    score_rv = score_rv / jnp.where(temperature > 0, temperature, 1.0)
    score_rv = when(top_k > 0, lambda s: _keep(s, jnp.ones_like(s), top_k), score_rv)
    score_rv = when(top_p < 1, lambda s: _keep(s, jax.nn.softmax(s, axis=-1), top_p), score_rv)
    least_r1 = jnp.max(score_rv, axis=-1, keepdims=True) + jnp.log(min_p)
    return jnp.where(score_rv >= least_r1, score_rv, -jnp.inf)


def draw(keys_r, score_rv) -> jax.Array:
    """One token a row, (r,) int32, from softmax(score), by a key a row.

    By inversion, first of a block of the vocabulary, then in the block: two random numbers a row, where the largest of
    score + Gumbel noise asks for one a token, which on CPU takes as long as half a small model's pass.
    """
    rows, size = score_rv.shape
    uniform_r2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_r)
    weight_rv = jnp.exp(score_rv - jnp.max(score_rv, axis=-1, keepdims=True))
    weight_rkv = jnp.pad(weight_rv, ((0, 0), (0, -size % _BLOCK))).reshape(rows, -1, _BLOCK)
    block_r = _invert(uniform_r2[:, 0], weight_rkv.sum(-1))
    inner_rv = jnp.take_along_axis(weight_rkv, block_r[:, None, None], 1)[:, 0]
    return (block_r * _BLOCK + _invert(uniform_r2[:, 1], inner_rv)).astype(jnp.int32)


def _invert(uniform_r, weight_rk):
    """The first place at which the share of the weights up to it exceeds the uniform number."""
    # Sums of a parallel scan need not grow from one place to the next: a weight of zero must not be hit by rounding.
    upto_rk = jnp.where(weight_rk > 0, jnp.cumsum(weight_rk, axis=-1), -1.0)
    return jnp.argmax(upto_rk > uniform_r[:, None] * upto_rk.max(-1, keepdims=True), axis=-1)


def _penalize(score_rv, history_rl, penalty):
    place_rl = jnp.where(history_rl == PAD, score_rv.shape[1], history_rl)  # beyond the vocabulary: dropped
    seen_rl = jnp.take_along_axis(score_rv, jnp.maximum(history_rl, 0), axis=1)
    seen_rl = jnp.where(seen_rl > 0, seen_rl / penalty, seen_rl * penalty)
    return score_rv.at[jnp.arange(len(score_rv))[:, None], place_rl].set(seen_rl, mode="drop")


def _keep(score_rv, weight_rv, target):
    """Scores that less than `target` of weight lies above; -inf for the others.

    The cut is found by bisection over the floats themselves, in their order as integers: 32 sums, exact, a tenth of a
    sort's time.
    """

    def halve(_, bounds):
        low_r, high_r = bounds
        middle_r = (low_r & high_r) + ((low_r ^ high_r) >> 1)  # the mean without overflow
        above_r = jnp.sum(jnp.where(score_rv > _of_order(middle_r)[:, None], weight_rv, 0.0), axis=-1)
        enough_r = above_r < target
        return jnp.where(enough_r, low_r, middle_r + 1), jnp.where(enough_r, middle_r, high_r)

    bounds = (_order(jnp.min(score_rv, axis=-1)), _order(jnp.max(score_rv, axis=-1)))
    _, cut_r = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.where(score_rv >= _of_order(cut_r)[:, None], score_rv, -jnp.inf)


def _order(value):
    """Floats as integers of the same order."""
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _of_order(order):
    return jax.lax.bitcast_convert_type(order ^ ((order >> 31) & 0x7FFFFFFF), jnp.float32)
