"""Our side of the language model benchmark: DPO, SFT and generation on the weights and rows that `lm_peers` sees.

    python -m experiments.lm_speed '{"job": "dpo", "folder": "...", "rows": "rows.npz", "steps": 3}'

Each job runs in a process of its own. `compare` runs them and the peers in turn and forms the ratios.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.align.logprobs import packed_scores, token_scores
from deconfound_jax.align.losses.dpo import dpo as dpo_loss
from deconfound_jax.align.packed import pack
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.train.step import adamw, init_state, make_step
from experiments.bench_jobs import WARM_STEPS, in_child, median_seconds, peak_gb
from experiments.lm_peers import BETA, LEARNING_RATE

FAMILY = "llama"  # of SmolLM2
# Our job, the peers' one, and their options beside it. `key` names the ratio peer / ours.
PAIRS = {
    "dpo.vs_trl_default": (("dpo", {"inside": True}), ("dpo_trl", {})),
    "dpo.vs_trl_kept": (("dpo", {"inside": True}), ("dpo_trl", {"gradient_checkpointing": False})),
    "dpo.vs_trl_precomputed": (("dpo", {}), ("dpo_trl", {"precompute_ref_log_probs": True})),
    "dpo.vs_trl_precomputed_kept": (
        ("dpo", {}), ("dpo_trl", {"precompute_ref_log_probs": True, "gradient_checkpointing": False}),
    ),
    "dpo.vs_torch": (("dpo", {}), ("dpo_torch", {})),
    "sft.vs_trl_default": (("sft", {}), ("sft_trl", {})),
    "sft.vs_trl_kept": (("sft", {}), ("sft_trl", {"gradient_checkpointing": False})),
}  # fmt: skip
GENERATE = "generate.vs_transformers"


def dpo(decoder: Decoder, params: Any, rows: Mapping[str, np.ndarray], steps: int, inside: bool = False):
    """DPO on pairs that share a prompt's row; `inside`: the reference is read in every step, else once before."""
    batch = rows["prompt"], np.stack([rows["chosen"], rows["rejected"]], 1)

    def log_prob(params, batch):
        return packed_scores(decoder, params, pack(*batch)).logprob.sum(-1)

    def objective(params, frozen, batch, key):
        reference_b2 = log_prob(frozen, batch) if inside else frozen
        ratio_b2 = log_prob(params, batch) - jax.lax.stop_gradient(reference_b2)
        ones = jnp.ones(len(ratio_b2))
        return dpo_loss(ratio_b2[:, 0], ratio_b2[:, 1], ones, BETA), ones, 0.0, {}

    return _train(objective, params, params if inside else jax.jit(log_prob)(params, batch), batch, steps)


def sft(decoder: Decoder, params: Any, rows: Mapping[str, np.ndarray], steps: int):
    """Maximum likelihood of prompt and chosen text as one row."""

    def objective(params, frozen, tokens_bl, key):
        logprob_bt = token_scores(decoder, params, tokens_bl).logprob
        return -logprob_bt.mean(-1), jnp.ones(len(logprob_bt)), 0.0, {}

    return _train(objective, params, (), np.concatenate([rows["prompt"], rows["chosen"]], 1), steps)


def generate(decoder: Decoder, params: Any, rows: Mapping[str, np.ndarray], steps: int, samples: int, new_tokens: int):
    """Samples of one prompt, each of `new_tokens`."""
    from deconfound_jax.models.sample import generate as draw

    prompt_1l = rows["prompt"][:1]
    one = jax.jit(lambda params, key: draw(decoder, params, key, prompt_1l, new_tokens, samples, stop=()))
    keys = jax.random.split(jax.random.key(0), steps + WARM_STEPS)
    place = iter(range(len(keys)))
    return median_seconds(lambda: jax.block_until_ready(one(params, keys[next(place)]).tokens), steps)


JOBS: dict[str, Callable[..., dict[str, float]]] = {"dpo": dpo, "sft": sft, "generate": generate}


def compare(
    folder: str, rows: str, steps: int, samples: int, new_tokens: int, peers_python: str | None, env: Mapping[str, str],
) -> dict[str, float]:  # fmt: skip
    """Every job of ours and of the peers, in turn: seconds and peak GB of each, and the ratios peer / ours.

    Args:
      folder: safetensors both sides load. rows: see `lm_peers`.
      steps: timed steps of a job; their median counts.
      peers_python: an interpreter that has the peers, None: our side alone; env: its environment.
    """
    length = {"samples": samples, "new_tokens": new_tokens}
    pairs = PAIRS | {GENERATE: (("generate", length), ("generate", length))}
    found: dict[str, float] = {}
    for key, (ours, theirs) in pairs.items():
        sides = [("ours", "experiments.lm_speed", sys.executable, ours)]
        if peers_python:
            sides.append(("peers", "experiments.lm_peers", peers_python, theirs))
        seconds = []
        for side, module, python, (job, options) in sides:
            name = ".".join([side, job, *(f"{k}_{v}".lower() for k, v in options.items())])
            if f"seconds.{name}" not in found:
                arguments = {"job": job, "folder": folder, "rows": rows, "steps": steps} | options
                result = in_child(arguments, module, python, env if side == "peers" else None)
                found |= {f"{what}.{name}": result[what] for what in ("seconds", "peak_gb")}
                print(f"{name}: {result['seconds']:.3f} s, {result['peak_gb']:.2f} GB", flush=True)
            seconds.append(found[f"seconds.{name}"])
        if peers_python:
            found[f"speed.{key}"] = seconds[1] / seconds[0]
    return found


def write_inputs(source: str, workdir: Any, pairs: int, prompt: int, completion: int) -> tuple[str, str]:
    """What both sides read: a folder of safetensors with its tokenizer, and rows of random ids without padding.

    Args:
      source: of `models.language_model.load_language_model`, a model of the llama family.
      pairs, prompt, completion: rows, and tokens of each part.
    """
    from deconfound_jax.models.export import export_pretrained
    from deconfound_jax.models.language_model import load_language_model

    lm, folder = load_language_model(source), workdir / "weights"
    if folder.exists():  # of an earlier run, perhaps of other weights
        folder.rmtree()
    files = workdir / "tokenizer"
    files.mkdir(exist_ok=True)
    (files / "tokenizer.json").write_text(lm.tokenizer.model.to_str())
    (files / "tokenizer_config.json").write_text(json.dumps({"chat_template": lm.tokenizer.chat_template}))
    named = [files / "tokenizer.json", files / "tokenizer_config.json"]
    export_pretrained(folder, FAMILY, lm.decoder.config, lm.params, named, {"eos_token_id": lm.tokenizer.eos})
    rng = np.random.default_rng(0)
    lengths = {"prompt": prompt, "chosen": completion, "rejected": completion}
    rows = {name: rng.integers(3, lm.decoder.vocabulary, (pairs, length)) for name, length in lengths.items()}
    path = workdir / "rows.npz"
    with path.open("wb") as file:
        np.savez(file, **rows)
    return str(folder), str(path)


def _train(objective, params, frozen, batch, steps: int) -> dict[str, float]:
    optimizer = adamw(LEARNING_RATE, steps + WARM_STEPS)
    state, step = init_state(params, optimizer), make_step(objective, optimizer)
    key = jax.random.key(0)

    def update():
        nonlocal state
        state, metrics = step(state, frozen, batch, key)
        jax.block_until_ready((state.params, metrics))

    return median_seconds(update, steps)


def main() -> None:
    """Runs the job that the one argument names and prints its result as JSON."""
    from deconfound_jax.models.pretrained import load_pretrained

    arguments = json.loads(sys.argv[1])
    job, folder, path = (arguments.pop(name) for name in ("job", "folder", "rows"))
    if job not in JOBS:
        raise ValueError(f"lm_speed: expected a job of {sorted(JOBS)}, got {job!r}")
    config, params = load_pretrained(folder)
    with np.load(pathlib.Path(path), allow_pickle=False) as data:
        rows = {name: data[name].astype(np.int32) for name in data.files}
    found = JOBS[job](Decoder(config, config.vocabulary), params, rows, **arguments)
    print(json.dumps(found | {"peak_gb": peak_gb()}))


if __name__ == "__main__":
    main()
