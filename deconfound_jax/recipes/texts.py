"""What a recipe learns from: the log's texts, checked before the first step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from deconfound_jax.align.groups import pair_index
from deconfound_jax.align.logprobs import check_targets
from deconfound_jax.causal.reward import Reward
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.tokenizer import PAD


class Texts(NamedTuple):
    """A log's n texts as tokens, in the order of its rows."""

    tokens_nl: np.ndarray  # whole texts, BEGIN first; behind a prompt: the completion alone
    within_n: np.ndarray | None = None  # codes inside which pairs are formed; None: across rows
    prompt_nq: np.ndarray | None = None  # tokens before each text; equal inside a code of `within_n`
    keys_n: np.ndarray | None = None  # names of the rows, for errors

    def keys(self, rows: np.ndarray) -> list[str]:
        """Names of rows, numbers below 0 left out."""
        rows = np.asarray(rows).reshape(-1)
        rows = rows[rows >= 0]
        return [str(key) for key in (rows if self.keys_n is None else self.keys_n[rows])]

    def named(self, rows) -> str:
        """The first rows of several, by key where there are keys."""
        return ", ".join(self.keys(np.asarray(rows)[:5])) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")


def check_texts(texts: Texts, decoder: Decoder, reference: Any, reward: Reward | None = None) -> None:
    """Refuses what would train on nothing, or on something else than it says.

    Raises ValueError by name: a reward or codes of another number of texts, texts without a token to learn (cut short,
    or empty), ids beyond the decoder's vocabulary, a prompt without a token, other prompts inside one code, no
    reference.
    """
    check_policy(reference)
    lengths = {"reward.draws_sn": None if reward is None else reward.draws_sn.T, "texts.within_n": texts.within_n}
    for name, values in lengths.items():
        if values is not None and len(values) != len(texts.tokens_nl):
            raise ValueError(f"{name}: expected one value a text ({len(texts.tokens_nl)}), got {len(values)}")
    _check_ids("tokens", texts.tokens_nl, decoder, texts)
    if texts.prompt_nq is None:
        check_targets(texts.tokens_nl, texts.keys_n)
        return
    if len(texts.prompt_nq) != len(texts.tokens_nl):
        raise ValueError(f"prompt: expected one a text ({len(texts.tokens_nl)}), got {len(texts.prompt_nq)}")
    check_prompts(texts.prompt_nq, decoder, reference, texts.keys_n)
    if (empty := np.flatnonzero((texts.tokens_nl == PAD).all(1))).size:
        raise ValueError(f"tokens: expected one behind every prompt, rows {texts.named(empty)} have none")
    if texts.within_n is not None:
        _, first, codes_n = np.unique(texts.within_n, return_index=True, return_inverse=True)
        if (other := np.flatnonzero((texts.prompt_nq != texts.prompt_nq[first[codes_n]]).any(1))).size:
            raise ValueError(f"roles.pair_within: expected one prompt inside a value, rows {texts.named(other)} differ")


def check_prompts(prompts_nq: np.ndarray, decoder: Decoder, reference: Any, keys_n: np.ndarray | None = None) -> None:
    """Refuses prompts without a token, or of another vocabulary, and a missing reference, by name."""
    check_policy(reference)
    rows = Texts(prompts_nq, keys_n=keys_n)
    _check_ids("prompt", prompts_nq, decoder, rows)
    if (empty := np.flatnonzero((prompts_nq == PAD).all(1))).size:
        raise ValueError(f"prompt: expected a token in every row, rows {rows.named(empty)} have none")


def check_policy(reference: Any) -> None:
    """ValueError where there is no reference."""
    if reference is None:
        raise ValueError("reference: expected the parameters of a reference policy, got None")


def different_texts(texts: Texts, groups_mg: np.ndarray, drop: bool) -> np.ndarray:
    """(m, p) bool, False for pairs of equal texts and for those with a missing member.

    Raises:
      ValueError: a pair of equal texts, unless `drop`; no pair of different texts at all.
    """
    first, second = pair_index(groups_mg.shape[1])
    a, b = groups_mg[:, first], groups_mg[:, second]
    there_mp = (a >= 0) & (b >= 0)
    equal_mp = (texts.tokens_nl[a] == texts.tokens_nl[b]).all(-1) & there_mp
    if equal_mp.any() and not drop:
        raise ValueError(f"pairs: expected two different texts, got {int(equal_mp.sum())} pairs of equal ones, the "
                         f"first of rows {texts.named([a[equal_mp][0], b[equal_mp][0]])}; they teach nothing: "
                         "align.equal_texts=drop leaves them out")  # fmt: skip
    if not (there_mp & ~equal_mp).any():
        raise ValueError("roles.pair_within: expected a pair of different texts inside some value, found none")
    return there_mp & ~equal_mp


def require(reward: Reward, accept_risk: bool, bounded: bool = False) -> None:
    """Refuses a reward that may not train: ValueError unless its verdict is `consistent`.

    Args:
      bounded: pairs are held back where the interval has no sign, so a `bounded` verdict will do.
    """
    if accept_risk:
        return
    if reward.verdict is None:
        raise ValueError(
            "reward.verdict: expected a verdict, got none; fit() attaches one, verdict(posterior, prepared) "
            "makes one, and accept_risk=True trains without"
        )
    if not (bounded and reward.verdict.status == "bounded"):
        reward.verdict.require()


def check_certainty(reward: Reward) -> None:
    """ValueError for the residual form where labels or weights say how sure the posterior is: its draws do not."""
    if reward.form == "residual":
        raise ValueError("reward.form: draws of the residual form lack y's own noise and make no probability; expected "
                         "text or model")  # fmt: skip


def _check_ids(name: str, tokens_nl: np.ndarray, decoder: Decoder, texts: Texts) -> None:
    beyond = np.flatnonzero((tokens_nl >= decoder.vocabulary).any(1))
    if beyond.size:
        raise ValueError(
            f"{name}: expected ids below the decoder's vocabulary of {decoder.vocabulary}, got {int(tokens_nl.max())} "
            f"(rows {texts.named(beyond)}): another tokenizer's?"
        )
