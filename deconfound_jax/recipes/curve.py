"""The over-optimisation curve: what a policy gained, by its own reward and by the truth, at what distance.

Every recipe takes evaluators; this makes one. Its rows in `metrics.jsonl` are the curve: KL, proxy, truth.
Source: Gao, Schulman and Hilton 2210.10760.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from einops import rearrange

from deconfound_jax.align.logprobs import group_scores, sequence_logprob
from deconfound_jax.align.policy import variables_of
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.sample import generate, sample
from deconfound_jax.train.hosts import fetch

Draw = Callable[[Any, Any, Any], tuple[Any, Any, Any]]


def policy_sampler(decoder: Decoder, samples: int) -> Draw:
    """Compiled (policy, reference, key) -> whole texts of an own vocabulary (n, l), their log-probability under the
    policy and under the reference, (n,) nats each, on the host: what a KL estimate needs."""

    @jax.jit
    def draw(params, reference, key):
        tokens_nl, own_n = sample(decoder, params, key, samples, decoder.config.length)
        return tokens_nl, own_n, sequence_logprob(decoder, reference, tokens_nl)

    return lambda params, reference, key: fetch(draw(params, reference, key))


def prompt_sampler(
    decoder: Decoder, prompts_bq: np.ndarray, samples: int, new_tokens: int, stop: Sequence[int]
) -> Draw:
    """`policy_sampler` of what is drawn behind prompts: tokens (b samples, new_tokens)."""

    @jax.jit
    def draw(params, reference, key):
        drawn = generate(decoder, params, key, prompts_bq, new_tokens, samples, stop=stop)
        other = group_scores(decoder, reference, drawn.tokens, prompts_bq)
        tokens_nl = rearrange(drawn.tokens, "b n l -> (b n) l")
        return tokens_nl, *(rearrange(a.sum(-1), "b n -> (b n)") for a in (drawn.logprob, other.logprob))

    return lambda params, reference, key: fetch(draw(params, reference, key))


def policy_watch(
    draw: Draw,
    reference: Any,
    key,
    proxy: Callable[[np.ndarray], np.ndarray] | None = None,
    truth: Callable[[np.ndarray], Mapping[str, float]] | None = None,
    lora: bool = False,
) -> Callable:
    """Evaluator `(state, step) -> numbers` of `train.loop.run_stage`.

        kl    = mean log pi(x) - log pi_ref(x) over x ~ pi, nats a text, with its standard error
        proxy = mean reward of x by what the policy was trained on

    Args:
      draw: see `policy_sampler`; the same key each time, so that points differ by the policy alone.
      proxy: tokens (n, l) -> rewards (n,).
      truth: tokens (n, l) -> named numbers that only a simulation knows.
      lora: the state holds adapters of `reference`.
    """

    def evaluator(state, step):
        params = {name: leaf for name, leaf in state.params.items() if name != "value"}
        policy = variables_of(params, {"base": reference} if lora else {})
        tokens_nl, own_n, reference_n = draw(policy, reference, key)
        gap_n = own_n.astype(np.float64) - reference_n
        found = {"kl": float(gap_n.mean()), "kl_error": float(gap_n.std(ddof=1) / len(gap_n) ** 0.5)}
        if proxy is not None:
            found["proxy"] = float(np.mean(proxy(tokens_nl)))
        return found | (dict(truth(tokens_nl)) if truth is not None else {})

    return evaluator
