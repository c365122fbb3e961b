"""Where a policy starts on real logs: a decoder trained on the log's own texts, or a published language model, as it
is or trained on them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from deconfound_jax.config import Run
from deconfound_jax.models import tokenizer
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.language_model import load_language_model
from deconfound_jax.models.lora import merge_lora
from deconfound_jax.recipes.curve import Draw, policy_sampler, prompt_sampler
from deconfound_jax.recipes.reference import sft_stage, train_reference, tune_reference
from deconfound_jax.recipes.texts import Texts
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
    trained: Any = None  # what SFT trained of the reference: all of it, or adapters; None: nothing

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
        return published(config, logs, words_n, workdir, on_step)
    texts, length = logs.text, config.decoder.length
    words = tokenizer.train_bpe([texts[i] for i in words_n], config.decoder.vocabulary)
    if writes():
        words.save(workdir / "tokenizer.json")
    decoder = Decoder(config.decoder, words.size)
    tokens_nl = words.encode(texts, length)
    _warn_of_cuts("decoder.length", length, words.count_truncated(texts, length), len(texts))
    record = rundir.record_of(config, workdir, "sft", on_step)
    stage = sft_stage(decoder, config.sft, config.align.accumulate).on(rundir.mesh_of(config))
    unique_nl = tokens_nl[_once(logs, words_n)]
    reference = train_reference(decoder, stage, unique_nl, config.sft, config.seeds[0], record)
    return Start(decoder, reference, words, tokens_nl, None, reference)


def published(config: Run, logs: Logs, words_n: np.ndarray, workdir: epath.Path,
              on_step: Callable | None = None) -> Start:  # fmt: skip
    """A published model, with `policy.sft` trained on the texts of rows `words_n`; every text stands behind
    `policy.prompt`."""
    lm, length = load_language_model(config.policy.source), config.policy.length
    if writes():
        lm.tokenizer.save(workdir / "tokenizer.json")
    texts = [" " + text for text in logs.text]  # as a word behind the prompt's last
    tokens_nl = lm.tokenizer.encode(texts, length, add_bos=False)
    _warn_of_cuts("policy.length", length, lm.tokenizer.count_truncated(texts, length, add_bos=False), len(texts))
    prompt_1q = lm.tokenizer.encode([config.policy.prompt], lm.decoder.config.length, add_eos=False, marks=True)
    mesh = rundir.mesh_of(config)
    params = lm.params if mesh.size == 1 else shard_state(lm.params, mesh)
    begun = Start(lm.decoder, params, lm.tokenizer, tokens_nl, prompt_1q[:, prompt_1q[0] != tokenizer.PAD])
    return _tuned(config, begun, logs, words_n, workdir, on_step) if config.policy.sft else begun


def _tuned(config, begun, logs, words_n, workdir, on_step) -> Start:
    """The same start, its reference trained on the log's texts."""
    record = rundir.record_of(config, workdir, "sft", on_step)
    stage = sft_stage(begun.decoder, config.sft, config.align.accumulate).on(rundir.mesh_of(config))
    rows, lora = _once(logs, words_n), config.align.lora
    texts = Texts(begun.tokens_nl[rows], None, begun.prompts(len(rows)), row_keys(logs)[rows])
    trained = tune_reference(begun.decoder, stage, begun.reference, texts, config.sft, lora, config.seeds[0], record)
    reference = merge_lora(begun.reference, trained["lora"]) if lora.rank else trained
    return begun._replace(reference=reference, trained=trained)


def _once(logs: Logs, rows: np.ndarray) -> np.ndarray:
    """Of these rows, the first of every text."""
    return rows[np.unique(logs.codes(logs.roles.text)[rows], return_index=True)[1]]


def row_keys(logs: Logs) -> np.ndarray:
    """Names of the rows, for errors: the key's column, or the row number."""
    return logs.columns[logs.roles.key] if logs.roles.key else np.arange(len(logs))


def _warn_of_cuts(knob: str, length: int, cut: int, n: int) -> None:
    if cut:
        _log.warning("%s=%d cuts %d of %d texts short", knob, length, cut, n)
