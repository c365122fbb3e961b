"""Upworthy's headlines: real logs, judged on randomized arms that no fit has seen.

command   make minilm
          python -m experiments.align --preset upworthy --logs PATH/packages.parquet --workdir runs/upworthy
hardware  two CPU cores, no accelerator
time      5 minutes, compilation and sentence encoder included
expect    MiniLM features, five one-arm logs, |z| > 1.96 pairs: naive 0.687, deconfounded 0.705

Five one-arm logs: log k holds one random arm of every test outside fold k, and is judged
on the tests of fold k. The broken window (2013-06-25 to 2014-01-10) is a log of its own.
"""

from __future__ import annotations

import dataclasses

from deconfound_jax.config import Align, Causal, Decoder, Dpo, Features, LogsSource, Lora, Policy, Run, Sft, Split
from deconfound_jax.structs import Roles


def upworthy() -> Run:
    """Week as a category; clicks of impressions as empirical logits, closed form."""
    return Run(
        name="upworthy",
        seeds=(0,),
        methods=("naive", "deconfounded"),
        roles=Roles(
            text="headline",
            outcome="clicks",
            exposure="impressions",
            confounders=("test_week",),
            group="clickability_test_id",
            context=("eyecatcher_id",),
        ),
        logs=LogsSource(
            split=Split(by="components", columns=("lede", "eyecatcher_id"), seed=0),
            one_arm_logs=5,
            observational="randomization_imbalance_risk",
        ),
        causal=Causal(design="category(test_week)", response="empirical_logit", draws=256),
        decoder=Decoder(width=128, layers=4, heads=4, vocabulary=2000, length=32),
        features=Features(source="minilm", states="both", pooling="mean"),
        sft=Sft(steps=500, batch=64, learning_rate=2e-3),
        align=Align(evaluate_every=50, samples=256, equal_texts="drop"),  # one headline under two images is two rows
        dpo=Dpo(steps=100, groups=16, group_size=4, beta=0.2, learning_rate=5e-5),
    )


def upworthy_smoke() -> Run:
    """The same study on the decoder's features alone, at toy size: any small file of logs with these columns."""
    full = upworthy()
    return dataclasses.replace(
        full,
        name="upworthy_smoke",
        logs=dataclasses.replace(full.logs, one_arm_logs=2),
        causal=dataclasses.replace(full.causal, draws=32),
        decoder=Decoder(width=16, layers=1, heads=2, vocabulary=300, length=24),
        features=Features(source="tokens", states="embeddings", pooling="mean"),
        sft=Sft(steps=10, batch=16, learning_rate=1e-2),
        # A toy log identifies nothing.
        align=dataclasses.replace(full.align, evaluate_every=3, samples=16, accept_risk=True),
        dpo=Dpo(steps=6, groups=4, group_size=4, learning_rate=1e-3),
        checkpoint_every=5,
    )


def logs() -> Run:
    """Your own logs: counts of exposures under the roles you name, one split, the decoder's features."""
    return dataclasses.replace(
        upworthy(),
        name="logs",
        roles=Roles(),
        logs=LogsSource(),
        causal=Causal(response="empirical_logit", draws=256),
        features=Features(source="tokens", states="both", pooling="mean"),
    )


def upworthy_smollm2() -> Run:
    """SmolLM2-135M-Instruct with adapters on Upworthy's one-arm log, judged on held-out randomized arms.

    command   python -m experiments.fetch_weights smollm2   # prints the file's path
              python -m experiments.align --preset upworthy_smollm2 --logs PATH/packages.parquet \\
                  --policy.source FILE.gguf --workdir runs/upworthy_smollm2
    hardware  two CPU cores, no accelerator
    time      within 60 minutes
    expect    samples that are headlines: SFT on the log's texts comes before DPO, both by adapters
    """
    full = upworthy()
    return dataclasses.replace(
        full,
        name="upworthy_smollm2",
        policy=Policy(source="HuggingFaceTB/SmolLM2-135M-Instruct", prompt="Headline:", length=32, sft=True),
        sft=Sft(steps=200, batch=16, learning_rate=1e-3),
        align=Align(lora=Lora(rank=16), evaluate_every=75, samples=64, equal_texts="drop"),
        dpo=Dpo(steps=150, groups=4, group_size=4, beta=0.1, learning_rate=2e-4),
        checkpoint_every=50,
    )
