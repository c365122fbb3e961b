"""Gradients streamed over chunks of positions and blocks of ids, against direct ones, in fp64.

Direct means: no layer recomputed, all logits at once, log_softmax, and JAX's own derivative of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax import config
from deconfound_jax.align import logprobs
from deconfound_jax.align.losses.dpo import dpo
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.tokenizer import PAD
from experiments.lm_memory import SMOLLM2, TINY

# GPT-2's parts; its key biases have no gradient: softmax does not see what all scores have in common.
GPT2 = config.Decoder(width=48, layers=2, heads=3, vocabulary=1024, length=512, tied=False, logit_cap=9.0)
ZERO = 1e-9  # of the whole gradient's norm: a parameter below it has none, and is held against the whole


def sft(logprob_bt, mask_bt):
    """Mean nats a token and text."""
    return -jnp.mean(logprob_bt.sum(-1) / mask_bt.sum(-1))


def preference(logprob_bt, mask_bt):
    """DPO on neighbouring rows, beta 0.3, soft labels."""
    del mask_bt
    ratio_b = logprob_bt.sum(-1) * 0.9 + 1.0  # a reference that is close
    first_p, second_p = ratio_b[0::2], ratio_b[1::2]
    return dpo(first_p, second_p, jnp.linspace(0.2, 0.9, len(first_p)), 0.3).mean()


def grpo(logprob_bt, mask_bt, clip: float = 0.2, beta: float = 0.04):
    """The clipped policy gradient with k3 as its pull to the reference; the rows are one group.

        r = exp(lp - lp_old),  l = -min(r A, clip(r) A) + beta (exp(lp_ref - lp) - (lp_ref - lp) - 1)

    Old and reference log-probabilities are the policy's own moved by fixed amounts, so that some ratios are clipped.
    Source: Shao et al. 2402.03300.
    """
    b, t = logprob_bt.shape
    still_bt, noise = jax.lax.stop_gradient(logprob_bt), np.random.default_rng(0)
    reward_b = noise.normal(size=b)
    advantage_b1 = jnp.asarray((reward_b - reward_b.mean()) / reward_b.std())[:, None]
    old_bt, reference_bt = (still_bt + 0.3 * noise.normal(size=(b, t)) for _ in range(2))
    ratio_bt, gap_bt = jnp.exp(logprob_bt - old_bt), reference_bt - logprob_bt
    surrogate_bt = jnp.minimum(ratio_bt * advantage_b1, jnp.clip(ratio_bt, 1 - clip, 1 + clip) * advantage_b1)
    loss_bt = -surrogate_bt + beta * (jnp.exp(gap_bt) - gap_bt - 1)
    return jnp.sum(mask_bt * loss_bt) / jnp.sum(mask_bt)


OBJECTIVES: dict[str, Callable] = {"sft": sft, "dpo": preference, "grpo": grpo}


def direct_logprob(decoder: Decoder, params: Any, tokens_bl):
    """(b, l - 1) from the logits of all positions."""
    logits_blv, _ = decoder.apply(params, tokens_bl)
    target_bt1 = jnp.maximum(tokens_bl[:, 1:, None], 0)
    return jnp.take_along_axis(jax.nn.log_softmax(logits_blv[:, :-1]), target_bt1, -1)[..., 0]


def gradients(c: config.Decoder, objective: str, tokens_bl: np.ndarray, chunk: int, block: int) -> tuple[Any, Any]:
    """Streamed and direct gradient, fp64, at parameters far from zero; call under `jax.enable_x64`."""
    c = dataclasses.replace(c, dtype="float64")
    direct, streamed = (
        Decoder(d, c.vocabulary) for d in (c, dataclasses.replace(c, remat="layer", chunk=chunk))
    )  # fmt: skip
    params = jax.jit(direct.init)(jax.random.key(0), jnp.asarray(tokens_bl[:, :2]))
    params = jax.tree.map(lambda leaf: 3.0 * leaf if leaf.ndim > 1 else leaf + 0.1, params)
    mask_bt = jnp.asarray((tokens_bl[:, 1:] != PAD) & (tokens_bl[:, :-1] != PAD), float)

    def streamed_logprob(decoder, params, tokens_bl):
        hidden_bld = decoder.apply(params, tokens_bl, method="hidden")
        target_bt = jnp.where(mask_bt > 0, tokens_bl[:, 1:], PAD)
        return logprobs.score(decoder, params, hidden_bld[:, :-1], target_bt, None, block).logprob

    def of(decoder, logprob):
        def loss(params):
            return OBJECTIVES[objective](mask_bt * logprob(decoder, params, tokens_bl), mask_bt)

        return jax.jit(jax.grad(loss))(params)

    return of(streamed, streamed_logprob), of(direct, direct_logprob)


def relative_differences(streamed: Any, direct: Any) -> dict[str, float]:
    """||g1 - g2|| / ||g2|| of every parameter, each layer's for itself; see `ZERO`."""
    pairs = {}
    for (path, a), b in zip(jax.tree.leaves_with_path(streamed), jax.tree.leaves(direct), strict=True):
        names = [key.key for key in path]
        single = names[1] != "layers"
        for i, (x, y) in enumerate(zip([a], [b], strict=True) if single else zip(a, b, strict=True)):
            pairs["/".join(names[1:]) + ("" if single else f"[{i}]")] = np.asarray(x), np.asarray(y)
    whole = np.sqrt(sum(np.sum(y**2) for _, y in pairs.values()))
    norm = {name: np.linalg.norm(y) for name, (_, y) in pairs.items()}
    return {
        name: float(np.linalg.norm(x - y) / (norm[name] if norm[name] > ZERO * whole else whole))
        for name, (x, y) in pairs.items()
    }


def texts(rows: int, length: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    """Random rows of different lengths, PAD to the right and, in every third, to the left."""
    rng = np.random.default_rng(seed)
    tokens_bl = rng.integers(2, vocabulary, (rows, length)).astype(np.int32)
    for i in range(1, rows):
        cut = int(rng.integers(1, length // 2))
        tokens_bl[i, slice(0, cut) if i % 3 == 0 else slice(-cut, None)] = PAD
    return tokens_bl


def gradient(shapes: str, rows: int, length: int, chunk: int, block: int) -> dict[str, Any]:
    """The largest relative difference over the parameters, by objective."""
    c = {"smollm2": dataclasses.replace(SMOLLM2, layers=2), "tiny": TINY, "gpt2": GPT2}[shapes]
    found = {}
    with jax.enable_x64(True):
        tokens_bl = texts(rows, length, c.vocabulary)
        for objective in OBJECTIVES:
            differences = relative_differences(*gradients(c, objective, tokens_bl, chunk, block))
            worst = max(differences, key=differences.get)
            found |= {f"gradient.rel_diff.{objective}": differences[worst], f"gradient.worst.{objective}": worst}
    return found
