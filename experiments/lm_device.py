"""On an accelerator: the longest text that trains, the price of streaming, and the share of peak FLOPs in use.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python -m experiments.lm_device --jobs longest mfu --out found.json

Needs jax, flax, optax, chex, einops and etils alone. `longest` bisects on what the compiler says a step needs, so
only the steps that are timed run; `--limit_gb` stands in for a smaller device. Expected on one H200: a streamed text
at least 4 times as long as with layer checkpointing, at no more than 1.1 times its step; 45% for SFT at 1 B.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax import config
from deconfound_jax.models.decoder import Decoder, count_parameters
from deconfound_jax.models.layers import head_width
from deconfound_jax.train.step import adamw, init_state, make_step
from experiments.lm_memory import SMOLLM2, TINY, full_loss, streamed_loss

LLAMA_1B = dataclasses.replace(
    SMOLLM2, width=2048, layers=16, heads=32, kv_heads=8, inner=8192, vocabulary=128_256, rotary_base=500_000.0
)
SHAPES = {"0.1b": SMOLLM2, "1b": LLAMA_1B, "tiny": TINY}
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}  # dense bf16, by what the device's name contains
STEPS = 100  # of the schedule; no more than this many are timed


def build(c: config.Decoder, streamed: bool, remat: str = "layer", chunk: int = 2048) -> tuple[Callable, Any, Decoder]:
    """The compiled AdamW step of SFT, its optimizer and decoder; streamed, or all logits at once."""
    c = dataclasses.replace(c, remat=remat, chunk=chunk if streamed else 0)
    decoder, optimizer = Decoder(c, c.vocabulary), adamw(1e-5, STEPS)
    loss = streamed_loss if streamed else full_loss

    def objective(params, frozen, tokens_bl, key):
        return loss(decoder, params, tokens_bl)[None], jnp.ones(1), 0.0, {}

    return make_step(objective, optimizer), optimizer, decoder


def needed_bytes(c: config.Decoder, streamed: bool, length: int, batch: int = 1, chunk: int = 2048) -> int:
    """What a step holds at its peak, state included, from the compiler; the largest int where it cannot compile it."""
    c = dataclasses.replace(c, length=max(c.length, length))
    step, optimizer, decoder = build(c, streamed, chunk=chunk)
    tokens_bl = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def start(key):
        return init_state(decoder.init(key, jnp.zeros((1, 2), jnp.int32)), optimizer)

    state = jax.eval_shape(start, jax.random.key(0))
    try:
        compiled = step.lower(state, (), tokens_bl, jax.random.key(0)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return np.iinfo(np.int64).max
    memory = compiled.memory_analysis()
    donated = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + donated


def longest(needs: Callable[[int], int], limit: int, start: int, most: int = 1 << 22) -> int:
    """The largest length, to within a sixteenth, that needs at most `limit` bytes; 0 where `start` needs more."""
    good, bad = 0, start
    while bad <= most and needs(bad) <= limit:
        good, bad = bad, 2 * bad
    while good and bad - good > max(good // 16, 1):
        middle = (good + bad) // 2
        middle = max(middle // 64 * 64, good + 1)
        good, bad = (middle, bad) if needs(middle) <= limit else (good, middle)
    return good


def seconds_of(c: config.Decoder, streamed: bool, length: int, batch: int, repeats: int, **options) -> float:
    """Median seconds of a step on random tokens, compiled and warmed up before."""
    c = dataclasses.replace(c, length=max(c.length, length))
    step, optimizer, decoder = build(c, streamed, **options)
    tokens_bl = np.random.default_rng(0).integers(2, c.vocabulary, (batch, length)).astype(np.int32)
    params = jax.jit(decoder.init)(jax.random.key(0), tokens_bl[:1, :2])
    state, times = init_state(params, optimizer), []
    del params
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        state, metrics = step(state, (), tokens_bl, jax.random.key(0))
        jax.block_until_ready((state.params, metrics))
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def flops_a_token(c: config.Decoder, length: int) -> float:
    """Of forward and backward, nothing recomputed: 6 a parameter that multiplies, and attention's causal half.

        6 N + 6 L l h e,   N without the embedding's look-up

    Source: Chowdhery et al. 2204.02311, appendix B, with half the scores.
    """
    shapes = jax.eval_shape(Decoder(c, c.vocabulary).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    look_up = 0 if c.tied else c.vocabulary * c.width
    attended = c.layers * length * c.heads * head_width(c)
    return 6.0 * (count_parameters(shapes) - look_up + attended)


def longest_job(name: str, limit: int, start: int, repeats: int, chunk: int) -> dict[str, float]:
    """Longest text of both, their ratio, and the ratio of their steps at the longest that both train."""
    c = dataclasses.replace(SHAPES[name], dtype="bfloat16")
    length = {
        kind: longest(lambda t, s=streamed: needed_bytes(c, s, t, chunk=chunk), limit, start)
        for kind, streamed in (("checkpointed", False), ("streamed", True))
    }
    found = {f"longest.{kind}.{name}": value for kind, value in length.items()}
    if not length["checkpointed"]:
        return found
    found[f"longest.ratio.{name}"] = length["streamed"] / length["checkpointed"]
    for kind, streamed in (("checkpointed", False), ("streamed", True)):
        # A little below, for what the allocator loses.
        seconds = seconds_of(c, streamed, length["checkpointed"] * 15 // 16, 1, repeats, chunk=chunk)
        found[f"longest.seconds.{kind}.{name}"] = seconds
    found[f"longest.step_ratio.{name}"] = (
        found[f"longest.seconds.streamed.{name}"] / found[f"longest.seconds.checkpointed.{name}"]
    )
    return found


def mfu_job(name: str, length: int, batch: int, repeats: int, peak_tflops: float, chunk: int) -> dict[str, float]:
    """Model FLOPs a second over the device's peak, by what is recomputed; what does not fit is left out."""
    c, found = dataclasses.replace(SHAPES[name], dtype="bfloat16"), {}
    work = flops_a_token(c, length) * length * batch
    for label, options in (("none", {"remat": "none", "chunk": 0}), ("dots", {"remat": "dots", "chunk": 0}),
                           ("layer", {"chunk": 0}), ("streamed", {"chunk": chunk})):  # fmt: skip
        try:
            seconds = seconds_of(c, True, length, batch, repeats, **options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            continue
        found |= {f"mfu.seconds.{label}.{name}": seconds, f"mfu.{label}.{name}": work / seconds / 1e12 / peak_tflops}
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=("longest", "mfu"), default=["longest", "mfu"])
    parser.add_argument("--longest_shapes", nargs="+", choices=sorted(SHAPES), default=["0.1b"])
    parser.add_argument("--mfu_shapes", nargs="+", choices=sorted(SHAPES), default=["1b"])
    parser.add_argument("--limit_gb", type=float, default=0.0, help="0: what the device says it has")
    parser.add_argument("--start", type=int, default=8192, help="tokens the bisection begins with")
    parser.add_argument("--chunk", type=int, default=2048, help="positions of a streamed chunk")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--peak_tflops", type=float, default=0.0, help="0: by the device's name")
    parser.add_argument("--out", default="", help="a JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    a, device = parse(argv), jax.devices()[0]
    named = next((peak for part, peak in PEAK_TFLOPS.items() if part in device.device_kind), 0.0)
    limit, peak = int(a.limit_gb * 1e9) or (device.memory_stats() or {}).get("bytes_limit", 0), a.peak_tflops or named
    if "longest" in a.jobs and not limit:
        raise ValueError(f"--limit_gb: expected a limit, got none, and {device.device_kind} does not say what it has")
    if "mfu" in a.jobs and not peak:
        raise ValueError(f"--peak_tflops: expected a number, got none, and {device.device_kind} is not in PEAK_TFLOPS")
    found: dict[str, Any] = {"device": device.device_kind, "limit_gb": limit / 1e9, "jax": jax.__version__}
    for job, shapes in (("longest", a.longest_shapes), ("mfu", a.mfu_shapes)):
        for name in shapes if job in a.jobs else ():
            found |= (
                longest_job(name, limit, a.start, a.repeats, a.chunk) if job == "longest"
                else mfu_job(name, a.length, a.batch, a.repeats, peak, a.chunk)
            )  # fmt: skip
    for key, value in found.items():
        print(f"{key:<36} {value:.4g}" if isinstance(value, float) else f"{key:<36} {value}")
    print(json.dumps(found))
    if a.out:
        pathlib.Path(a.out).write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()
