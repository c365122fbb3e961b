"""The encoders a config can name: texts to features, by published weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from deconfound_jax.config import Features

ENCODERS = ("minilm", "lm")  # values of `Features.source`


def encode_by(
    features: Features, texts: Sequence[str], on_batch: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """Features (n, d) float32 of texts by the encoder that `features.source` names; ValueError for another one."""
    # Imported here: each needs a library of file formats that an accelerator image may lack.
    if features.source == "minilm":
        from deconfound_jax.models.encoder import encode

        return encode(texts, features.weights, on_batch=on_batch)
    if features.source != "lm":
        raise ValueError(f"features.source: expected one of {ENCODERS}, got {features.source!r}")
    from deconfound_jax.models.language_model import encode_texts, load_language_model

    if not features.weights:
        raise ValueError("features.weights: expected a folder, a .gguf file or a hub's name beside source 'lm', got ''")
    return encode_texts(load_language_model(features.weights), texts, features.pooling, on_batch=on_batch)
