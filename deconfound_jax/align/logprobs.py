"""Log-probabilities of tokens under a policy, with entropy and divergence, streamed over the vocabulary.

    scores = token_scores(decoder, params, tokens_bl)        # texts, every token scored
    scores = packed_scores(decoder, params, pack(prompt_bp, completion_bgc))     # completions only
    logprob_b = sequence_logprob(decoder, params, tokens_bl)

Unless they are few, logits of all tokens and ids never exist together. They are made for a block of ids at a time, for
all tokens, and summed up as they come; the backward pass makes them anew, block by block, from the normalisers it kept.
So the memory is that of one block, and the gradient of the output table is written once, block after block, in place.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.align.packed import Packed, pack
from deconfound_jax.config import Decoder as DecoderConfig
from deconfound_jax.models.decoder import Decoder, bounded, output_table, read_table
from deconfound_jax.models.layers import NEVER, cast, param_dtype
from deconfound_jax.models.tokenizer import PAD

# Numbers in one block of logits where memory counts: 16 MB in float32. Elsewhere logits that fit are made once and
# kept for the backward pass (128 MB), which saves a product.
_BLOCK, _KEPT = 1 << 22, 1 << 25
_WIDTHS = 2  # ids of a block over a state's width, at least: each block reads and writes the states' gradient


class Scores(NamedTuple):
    """One number a token, float32 at least, 0 where there is no token."""

    logprob: jax.Array  # log p(token), nats
    entropy: jax.Array  # of the distribution the token is from, nats
    kl: jax.Array | None  # KL(policy || reference) of the distribution, nats; None without a reference


def token_scores(decoder: Decoder, params: Any, tokens_bl, reference: Any = None) -> Scores:
    """Scores (b, l - 1) of the tokens of texts: of the token at t + 1 given those up to t.

    Args:
      tokens_bl: int, the first token of a text is given (BEGIN) and not scored; PAD where there is no token.
      reference: parameters of a second policy of the same decoder, for `kl`; not differentiated.
    """
    chex.assert_rank(tokens_bl, 2)
    # The last column predicts nothing: cheaper as a row of no target than as a copy of all other states.
    target_bl = jnp.where(tokens_bl == PAD, PAD, jnp.roll(tokens_bl, -1, axis=1)).at[:, -1].set(PAD)

    def states(params):
        return decoder.apply(params, tokens_bl, method="hidden")

    return jax.tree.map(lambda a: a[:, :-1], _score_states(decoder, params, states, target_bl, reference))


def packed_scores(decoder: Decoder, params: Any, packed: Packed, reference: Any = None) -> Scores:
    """Scores (b, g, c) of the tokens of completions, see `packed.pack`; logits are made for no other token."""
    b, g, c = packed.targets_bgc.shape
    longest = packed.tokens_bl.shape[1] - (g - 1) * c  # a prompt and one completion
    if longest > decoder.config.length:
        raise ValueError(f"packed: expected at most Decoder.length = {decoder.config.length} positions, got {longest}")
    source_bn1 = packed.sources_bgc.reshape(b, g * c, 1)

    def states(params):
        row = packed.tokens_bl, packed.positions_bl, packed.segments_bl
        return jnp.take_along_axis(decoder.apply(params, *row, method="hidden"), source_bn1, 1)

    scores = _score_states(decoder, params, states, packed.targets_bgc.reshape(b, g * c), reference)
    return jax.tree.map(lambda a: a.reshape(b, g, c), scores)


def group_scores(decoder: Decoder, params: Any, tokens_bgl, prompt_bq=None) -> Scores:
    """Scores (b, g, t) of groups of texts as `structs` holds them.

    Args:
      tokens_bgl: int, whole texts (BEGIN first, not scored: t = l - 1), or what follows the prompt (t = l).
      prompt_bq: int, one for all texts of a group, see `packed.pack`; None: texts are whole.

        logratio_bg = group_scores(decoder, params, pairs.tokens_bgl).logprob.sum(-1) - pairs.reference_bg
    """
    chex.assert_rank(tokens_bgl, 3)
    if prompt_bq is not None:
        return packed_scores(decoder, params, pack(prompt_bq, tokens_bgl))
    b, g, length = tokens_bgl.shape
    scores = token_scores(decoder, params, tokens_bgl.reshape(b * g, length))
    return jax.tree.map(lambda a: a.reshape(b, g, length - 1), scores)


def group_mask(tokens_bgl, prompt_bq=None):
    """Which tokens `group_scores` scores, (b, g, t) bool."""
    there_bgl = tokens_bgl != PAD
    return there_bgl if prompt_bq is not None else there_bgl[..., 1:] & there_bgl[..., :-1]


def sequence_logprob(decoder: Decoder, params: Any, tokens_bl):
    """Log-probability of whole texts.

        log pi(x) = sum_{t >= 1, x_t != PAD} log p(x_t | x_0 ... x_{t-1})

    Args:
      tokens_bl: int, BEGIN first, PAD where there is no token (see `check_targets`).
    Returns:
      (b,) nats, float32 at least.

        sequence_logprob(decoder, params, tokenizer.encode(texts, 24))
    """
    return token_scores(decoder, params, tokens_bl).logprob.sum(-1)


def score(decoder: Decoder, params: Any, hidden, target, reference=None, block: int = 0) -> Scores:
    """Scores of the tokens that states predict.

        z = logits(h),  log p_j = z_j - log sum_k exp z_k
        entropy = -sum_j p_j log p_j,     kl = sum_j p_j (log p_j - log q_j)

    The sums run over blocks of ids with a moving maximum. With their cotangents g, a block's logits have the gradient

        dz_j = g_logprob (1[j = token] - p_j) - g_entropy p_j (log p_j + entropy) + g_kl p_j (log p_j - log q_j - kl)

    Args:
      hidden: (..., d) normed states, `Decoder.hidden`'s.
      target: (...) int, PAD where no token is scored.
      reference: (parameters, states (..., d)) of a second policy of the same decoder; not differentiated.
      block: ids of a block; the vocabulary or more: logits are made once and kept; 0: that where they are few and the
        decoder is not streamed (`Decoder.chunk`), else blocks of 16 MB or, of many tokens, `_WIDTHS` times the width.

    Sources: Milakov and Gimelshein 1805.02867 (the moving maximum); Wijmans et al. 2411.09009 (the loss without its
    logits); Luo et al. 2506.03077 (StreamBP).
    """
    chex.assert_equal_shape_prefix([hidden, target], target.ndim)
    c, width, vocabulary = decoder.config, hidden.shape[-1], decoder.vocabulary
    if not block:
        kept = not c.chunk and target.size * vocabulary <= _KEPT
        block = vocabulary if kept else max(_BLOCK // max(target.size, 1), _WIDTHS * width)
    other = None
    if reference is not None:
        other = jax.lax.stop_gradient((reference[1].reshape(-1, width), output_table(c, reference[0])))
    own = hidden.reshape(-1, width), output_table(c, params), target.reshape(-1)
    found = _kept(c, *own, other) if block >= vocabulary else _streamed(c, block, *own, other)
    return Scores(*(None if a is None else jnp.where(target != PAD, a.reshape(target.shape), 0.0) for a in found))


def check_targets(tokens_bl, keys_b=None) -> None:
    """Raises ValueError naming the rows that have no target token, whose log-probability would be an empty sum.

    Args:
      keys_b: names of the rows; None: their numbers.

    For arrays on the host, before training; rows that only fill up a batch need weight 0, not this check.
    """
    there_bl = np.asarray(tokens_bl) != PAD
    empty = np.flatnonzero(~(there_bl[:, 1:] & there_bl[:, :-1]).any(axis=1))
    if empty.size:
        rows = (empty if keys_b is None else np.asarray(keys_b)[empty])[:5].tolist()
        raise ValueError(f"tokens: expected a token after BEGIN in every text, rows {rows} have none "
                         f"({empty.size} of {len(tokens_bl)})")  # fmt: skip


def _score_states(decoder, params, states, target, reference):
    second = None if reference is None else (reference, states(reference))
    return score(decoder, params, states(params), target, second)


def _kept(c: DecoderConfig, hidden_nd, table, target_n, other):
    """The scores (n,) from logits of all ids."""
    z_nv = bounded(c, read_table(c, hidden_nd, table))
    # The normaliser is subtracted after the pick: where that is all, no second (n, v) array is held.
    norm_n1 = jax.nn.logsumexp(z_nv, axis=-1, keepdims=True)
    picked_n = jnp.take_along_axis(z_nv, jnp.maximum(target_n, 0)[:, None], axis=-1)[:, 0]
    log_nv = z_nv - norm_n1
    p_nv, kl_n = jnp.exp(log_nv), None
    if other is not None:
        second_nv = jax.nn.log_softmax(bounded(c, read_table(c, other[0], other[1])))
        kl_n = (p_nv * (log_nv - second_nv)).sum(-1)
    return picked_n - norm_n1[:, 0], -(p_nv * log_nv).sum(-1), kl_n


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _streamed(c: DecoderConfig, block: int, hidden_nd, table, target_n, other):
    return _forward(c, block, hidden_nd, table, target_n, other)[0]


class _Sums(NamedTuple):
    """sum_j exp(z_j - top) and sum_j exp(z_j - top) a_j over the ids so far, (n,) each."""

    top_n: jax.Array
    total_n: jax.Array
    products: tuple[jax.Array, ...]

    def add(self, z_nv, factors=()) -> _Sums:
        top_n = jnp.maximum(self.top_n, z_nv.max(-1))
        shrink_n, weight_nv = jnp.exp(self.top_n - top_n), jnp.exp(z_nv - top_n[:, None])
        pairs = zip(self.products, factors, strict=True)
        products = tuple(shrink_n * old_n + (weight_nv * a_nv).sum(-1) for old_n, a_nv in pairs)
        return _Sums(top_n, shrink_n * self.total_n + weight_nv.sum(-1), products)

    def normaliser(self):
        return self.top_n + jnp.log(self.total_n)


def _forward(c, block, hidden_nd, table, target_n, other):
    """The scores (n,), and beside them what the backward pass reads."""
    zero_n = jnp.zeros(target_n.shape, param_dtype(c))
    lowest_n = jnp.full_like(zero_n, -jnp.inf)

    def add(carry, i):
        own, second, picked_n = carry
        ids_1v, fresh_1v = _ids(c, table, block, i)
        z_nv = read_table(c, hidden_nd, _piece(c, table, block, i))
        z_nv = jnp.where(fresh_1v, bounded(c, z_nv, ids_1v[0, 0]), NEVER)
        picked_n += jnp.where(ids_1v == target_n[:, None], z_nv, 0.0).sum(-1, where=fresh_1v)
        if other is None:
            return (own.add(z_nv, (z_nv,)), None, picked_n), None
        second_nv = read_table(c, other[0], _piece(c, other[1], block, i))
        second_nv = jnp.where(fresh_1v, bounded(c, second_nv, ids_1v[0, 0]), NEVER)
        return (own.add(z_nv, (z_nv, second_nv)), second.add(second_nv), picked_n), None

    start = _Sums(lowest_n, zero_n, (zero_n,) if other is None else (zero_n, zero_n))
    second = None if other is None else _Sums(lowest_n, zero_n, ())
    (own, second, picked_n), _ = jax.lax.scan(add, (start, second, zero_n), jnp.arange(_blocks(c, table, block)))
    norm_n, mean_n = own.normaliser(), own.products[0] / own.total_n
    entropy_n, kl_n, second_n = norm_n - mean_n, None, None
    if other is not None:
        second_n = second.normaliser()
        kl_n = mean_n - own.products[1] / own.total_n - norm_n + second_n
    return (picked_n - norm_n, entropy_n, kl_n), (hidden_nd, table, target_n, other, norm_n, second_n, entropy_n, kl_n)


def _backward(c, block, kept, cotangents):
    hidden_nd, table, target_n, other, norm_n, second_n, entropy_n, kl_n = kept
    logprob_n1, entropy_n1, kl_n1 = (None if g is None else g[:, None] for g in cotangents)
    to_hidden, to_table = ("nv,vd->nd", "nv,nd->vd") if c.tied else ("nv,dv->nd", "nv,nd->dv")

    def add(carry, i):
        dhidden_nd, dtable = carry
        ids_1v, fresh_1v = _ids(c, table, block, i)
        piece = _piece(c, table, block, i)
        z_nv, pull = jax.vjp(lambda raw_nv: bounded(c, raw_nv, ids_1v[0, 0]), read_table(c, hidden_nd, piece))
        log_nv = z_nv - norm_n[:, None]
        slope_nv = logprob_n1 + entropy_n1 * (log_nv + entropy_n[:, None])
        if other is not None:
            second_nv = bounded(c, read_table(c, other[0], _piece(c, other[1], block, i)), ids_1v[0, 0])
            slope_nv -= kl_n1 * (log_nv - (second_nv - second_n[:, None]) - kl_n[:, None])
        dz_nv = jnp.where(ids_1v == target_n[:, None], logprob_n1, 0.0) - jnp.exp(log_nv) * slope_nv
        (draw_nv,) = pull(jnp.where(fresh_1v, dz_nv, 0.0))
        draw_nv, wide = draw_nv.astype(cast(c)), param_dtype(c)
        dhidden_nd += jnp.einsum(to_hidden, draw_nv, piece, preferred_element_type=wide)
        dpiece = jnp.einsum(to_table, draw_nv, hidden_nd.astype(cast(c)), preferred_element_type=wide)
        axis, first = _place(c, table, block, i)
        dpiece += jax.lax.dynamic_slice_in_dim(dtable, first, block, axis)
        return (dhidden_nd, jax.lax.dynamic_update_slice_in_dim(dtable, dpiece, first, axis)), None

    start = jnp.zeros(hidden_nd.shape, param_dtype(c)), jnp.zeros(table.shape, param_dtype(c))
    (dhidden_nd, dtable), _ = jax.lax.scan(add, start, jnp.arange(_blocks(c, table, block)))
    return dhidden_nd.astype(hidden_nd.dtype), dtable.astype(table.dtype), None, None


_streamed.defvjp(_forward, _backward)


def _blocks(c, table, block):
    return -(-table.shape[0 if c.tied else 1] // block)


def _place(c, table, block, i):
    """Axis of the ids, and where block i starts: the last one starts earlier where the vocabulary is no multiple."""
    axis = 0 if c.tied else 1
    return axis, jnp.minimum(i * block, table.shape[axis] - block)


def _ids(c, table, block, i):
    """Ids (1, v) of block i, and which of them no earlier block had."""
    ids_1v = _place(c, table, block, i)[1] + jnp.arange(block)[None]
    return ids_1v, ids_1v >= i * block


def _piece(c, table, block, i):
    axis, first = _place(c, table, block, i)
    return jax.lax.dynamic_slice_in_dim(table, first, block, axis).astype(cast(c))
