"""The families' tiny checkpoints, for the tests that read and write them."""

import functools
import json
import pathlib

import jax
import numpy as np

from deconfound_jax.models.pretrained import load_pretrained
from deconfound_jax.models.weights import load_safetensors

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "families"
NAMES = sorted(folder.name for folder in FIXTURES.iterdir())
TOLERANCE = 1e-4  # of logits whose standard deviation is over one


@functools.cache
def load(name):
    return load_pretrained(FIXTURES / name)


def family_of(name):
    return json.loads((FIXTURES / name / "config.json").read_text())["model_type"]


def tensors_of(name):
    return load_safetensors(FIXTURES / name / "model.safetensors")


def check_same(params, other):
    assert jax.tree.structure(params) == jax.tree.structure(other)
    for leaf, others in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        assert leaf.dtype == others.dtype
        np.testing.assert_array_equal(leaf, others)
