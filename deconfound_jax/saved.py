"""A finished run, opened again: score texts, sample from its policies.

    run = deconfound_jax.load("runs/upworthy")
    table = run.score(["A headline", "Another"])   # mean, sd, lower, distance
    texts = run.sample(5)

The run directory: config.json, results.json, metrics.jsonl, report.html,
tokenizer.json, policies/<method>.npz, posterior/<method>.npz, log_features.npy.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from scipy.spatial import cKDTree

from deconfound_jax.align.policy import variables_of
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.reward import model_form
from deconfound_jax.config import Run
from deconfound_jax.models import tokenizer
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.encoders import ENCODERS, encode_by
from deconfound_jax.models.language_model import LanguageModel, continue_prompts, load_language_model
from deconfound_jax.models.lora import merge_lora
from deconfound_jax.models.params import load_params
from deconfound_jax.models.sample import sample
from deconfound_jax.recipes.reference import decoder_features


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """One run directory; parts are read when they are first needed."""

    workdir: epath.Path
    config: Run

    @functools.cached_property
    def results(self) -> dict[str, Any]:
        """`results.json`: flat, `<study>.<log>.<features>.<method>.<metric>`."""
        return json.loads((self.workdir / "results.json").read_text())

    @functools.cached_property
    def published(self) -> LanguageModel | None:
        """The published model that the policies started from; None: a decoder of the log's own."""
        return load_language_model(self.config.policy.source) if self.config.policy.source else None

    @functools.cached_property
    def tokenizer(self):
        return self.published.tokenizer if self.published else tokenizer.load(self.workdir / "tokenizer.json")

    @functools.cached_property
    def decoder(self) -> Decoder:
        if self.published:
            return self.published.decoder
        return Decoder(self.config.decoder, self.tokenizer.size)

    def policy(self, method: str = "deconfounded") -> Any:
        """A policy's parameters; `sft` is the reference.

        Raises:
          ValueError: the run has no such policy; it names those it has.
        """
        path = self.workdir / "policies" / f"{method}.npz"
        if method == "sft" and self.published:
            return self._tuned(path)
        if not path.exists():
            known = sorted(p.stem for p in (self.workdir / "policies").iterdir())
            raise ValueError(f"policy: expected one of {known}, got {method!r}")
        trained = load_params(path)
        return variables_of(trained, {} if "params" in trained else {"base": self.policy("sft")})

    def _tuned(self, path: epath.Path) -> Any:
        """The published model, with what SFT trained of it."""
        if not self.config.policy.sft:
            return self.published.params
        trained = load_params(path)
        return trained if "params" in trained else merge_lora(self.published.params, trained["lora"])

    def posterior(self, method: str = "deconfounded") -> Posterior:
        path = self.workdir / "posterior" / f"{method}.npz"
        if not path.exists():
            known = sorted(set(self.config.methods) & {p.stem for p in (self.workdir / "posterior").iterdir()})
            raise ValueError(f"posterior: expected one of {known}, got {method!r}")
        return Posterior.load(path)

    def features(self, texts: Sequence[str]) -> np.ndarray:
        """phi(x) of new texts, as the run's own fit saw them.

        Raises:
          ValueError: the run was fitted on a file of features; pass `features` for the texts yourself.
        """
        source = self.config.features.source
        if source in ENCODERS:
            return encode_by(self.config.features, list(texts))
        if source != "tokens":
            raise ValueError(f"features: this run used the file {source!r}; give the new texts' features as an array")
        if self.published:  # as `experiments.start.published` does: a word behind the prompt's last
            texts, length = [" " + text for text in texts], self.config.policy.length
            tokens_nl = self.tokenizer.encode(texts, length, add_bos=False)
        else:
            tokens_nl = self.tokenizer.encode(list(texts), self.config.decoder.length)
        return decoder_features(self.decoder, self.policy("sft"), tokens_nl, self.config.features)

    def score(self, texts: Sequence[str], features: np.ndarray | None = None, method: str = "deconfounded"):
        """Model-form reward of any texts.

        Args:
          texts: n texts.
          features: (n, d) in place of the run's own feature source.
          method: whose posterior.

        Returns:
          A dict of arrays (n,): mean, sd and lower (5% quantile) in units of the
          outcome on the link scale, and distance: to the nearest text of the log, in
          standardised features, over the log's own median (1 is typical; far above 1
          the reward is an extrapolation).
        """
        if not len(texts):
            raise ValueError("score: expected at least one text, got none")
        posterior = self.posterior(method)
        features_nd = self.features(texts) if features is None else np.asarray(features)
        reward = model_form(posterior, features_nd)
        return {
            "mean": reward.mean,
            "sd": reward.sd,
            "lower": reward.lower(),
            "distance": self._distance(posterior, features_nd),
        }

    def sample(self, n: int, prompts: Sequence[str] | None = None, method: str = "deconfounded", seed: int = 0,
               temperature: float = 1.0) -> list[str]:  # fmt: skip
        """n texts from a policy; with prompts, n texts for each prompt, in order.

        A published model's policy continues prompts, by default the run's own (`policy.prompt`).
        """
        if self.published:
            asked = list(prompts) if prompts is not None else [self.config.policy.prompt]
            found = continue_prompts(self.published, self.policy(method), asked, n, self.config.policy.length, seed,
                                     temperature)  # fmt: skip
            return [text for texts in found for text in texts]
        prompt_bl, rows = None, n
        if prompts is not None:
            encoded = self.tokenizer.encode(list(prompts), self.config.decoder.length)
            encoded = np.where(encoded == tokenizer.END, tokenizer.PAD, encoded)  # a prompt is not over
            prompt_bl, rows = np.repeat(encoded, n, axis=0), n * len(prompts)
        tokens_nl, _ = sample(
            self.decoder,
            self.policy(method),
            jax.random.key(seed),
            rows,
            self.config.decoder.length,
            prompt_bl,
            temperature,
        )
        return self.tokenizer.decode(np.asarray(tokens_nl))

    def _distance(self, posterior: Posterior, features_nd: np.ndarray) -> np.ndarray:
        with (self.workdir / "log_features.npy").open("rb") as file:
            log_nd = np.load(file, allow_pickle=False).astype(np.float32)
        mean, sd = posterior.scaling["features.mean"][None, :], posterior.scaling["features.sd"][None, :]
        log_nd = np.unique((log_nd - mean) / sd, axis=0)
        tree = cKDTree(log_nd)
        probe = log_nd[np.random.default_rng(0).permutation(len(log_nd))[:500]]
        typical = np.median(tree.query(probe, k=2)[0][:, 1])  # the first neighbour is the text itself
        return tree.query((features_nd - mean) / sd)[0] / max(typical, 1e-12)


def load(workdir: epath.PathLike) -> SavedRun:
    """Opens a run directory.

    Raises:
      FileNotFoundError: no config.json there; the run was never started.
    """
    workdir = epath.Path(workdir)
    path = workdir / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{workdir}: expected a run directory with config.json, found none")
    return SavedRun(workdir, config_from_json(json.loads(path.read_text())["config"]))


def config_from_json(data: Mapping[str, Any], kind: type = Run) -> Any:
    """A config dataclass from its `dataclasses.asdict` read back from JSON; unknown fields are errors."""
    hints = typing.get_type_hints(kind)
    unknown = set(data) - set(hints)
    if unknown:
        raise ValueError(f"config: {kind.__name__} has no field {sorted(unknown)}; it has {sorted(hints)}")
    values = {}
    for name, value in data.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = config_from_json(value, hint)
        elif typing.get_origin(hint) is tuple:
            value = tuple(value)
        values[name] = value
    return kind(**values)
