"""Where a policy starts on real logs: a decoder trained on the log's own texts, or a published language model."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from deconfound_jax.config import Run
from deconfound_jax.models import tokenizer
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.language_model import load_language_model
from deconfound_jax.recipes.curve import Draw, policy_sampler, prompt_sampler
from deconfound_jax.recipes.reference import sft_stage, train_reference
from deconfound_jax.structs import Logs
from deconfound_jax.train.files import writes
from deconfound_jax.train.mesh import shard_state
from experiments import rundir

_log = logging.getLogger(__name__)


class Start(NamedTuple):
    """The reference policy and the log's texts as it reads them."""

    decoder: Decoder
    reference: Any
    tokenizer: Any
    tokens_nl: np.ndarray
    prompt_1q: np.ndarray | None  # before every text; None: texts are whole

    def prompts(self, rows: int) -> np.ndarray | None:
        return None if self.prompt_1q is None else np.repeat(self.prompt_1q, rows, 0)

    def sampler(self, samples: int) -> Draw:
        """Texts of the policy, `samples` of them."""
        if self.prompt_1q is None:
            return policy_sampler(self.decoder, samples)
        return prompt_sampler(self.decoder, self.prompt_1q, samples, self.tokens_nl.shape[1], self.tokenizer.stop)


def start(config: Run, logs: Logs, words_n: np.ndarray, workdir: epath.Path, on_step=None) -> Start:
    """The start that `config.policy` names; rows `words_n` are those whose texts may be read for it."""
    if config.policy.source:
        return published(config, logs, workdir)
    texts, length = logs.text, config.decoder.length
    words = tokenizer.train_bpe([texts[i] for i in words_n], config.decoder.vocabulary)
    if writes():
        words.save(workdir / "tokenizer.json")
    decoder = Decoder(config.decoder, words.size)
    tokens_nl = words.encode(texts, length)
    _warn_of_cuts("decoder.length", length, words.count_truncated(texts, length), len(texts))
    unique_n = words_n[np.unique(logs.codes(logs.roles.text)[words_n], return_index=True)[1]]
    record = rundir.record_of(config, workdir, "sft", on_step)
    stage = sft_stage(decoder, config.sft, config.align.accumulate).on(rundir.mesh_of(config))
    reference = train_reference(decoder, stage, tokens_nl[unique_n], config.sft, config.seeds[0], record)
    return Start(decoder, reference, words, tokens_nl, None)


def published(config: Run, logs: Logs, workdir: epath.Path) -> Start:
    """A published model as it is; every text is what stands behind `policy.prompt`."""
    lm, length = load_language_model(config.policy.source), config.policy.length
    if writes():
        lm.tokenizer.save(workdir / "tokenizer.json")
    texts = [" " + text for text in logs.text]  # as a word behind the prompt's last
    tokens_nl = lm.tokenizer.encode(texts, length, add_bos=False)
    _warn_of_cuts("policy.length", length, lm.tokenizer.count_truncated(texts, length, add_bos=False), len(texts))
    prompt_1q = lm.tokenizer.encode([config.policy.prompt], lm.decoder.config.length, add_eos=False, marks=True)
    mesh = rundir.mesh_of(config)
    params = lm.params if mesh.size == 1 else shard_state(lm.params, mesh)
    return Start(lm.decoder, params, lm.tokenizer, tokens_nl, prompt_1q[:, prompt_1q[0] != tokenizer.PAD])


def _warn_of_cuts(knob: str, length: int, cut: int, n: int) -> None:
    if cut:
        _log.warning("%s=%d cuts %d of %d texts short", knob, length, cut, n)
