"""f(x) as a head: any pure pair (init, apply), a Flax module's for example.

    f(x) = apply(params, phi(x)),   every leaf of params ~ N(0, 1 / fan_in)

Sites are named by the leaf's path, `head.params.Dense_0.kernel`; a bias has prior sd 1.
Source: Neal (1996), priors for infinite networks: the function's variance then does
not grow with the width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from deconfound_jax.causal.spec import Head

PREFIX = "head."


def leaves(head: Head, width: int) -> dict[str, tuple[tuple[int, ...], float]]:
    """Site of each leaf -> (shape, prior sd), for features of this width."""
    tree = _shapes(head, width)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        fan_in = math.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 1
        found[_site(path)] = leaf.shape, 1 / math.sqrt(fan_in)
    return found


def initial(head: Head, width: int, key: jax.Array) -> dict[str, jax.Array]:
    """The head's own initial parameters by site."""
    params = head.init(key, jnp.zeros((1, width), jnp.float32))
    return {_site(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def evaluate(head: Head, found, features_nd) -> jax.Array:
    """f (n,) from parameters by site.

    Raises:
      ValueError: the head gives another shape than (n,) or (n, 1).
    """
    params = jax.tree_util.tree_map_with_path(lambda path, _: found[_site(path)], _shapes(head, features_nd.shape[1]))
    value = head.apply(params, features_nd)
    if value.shape not in ((features_nd.shape[0],), (features_nd.shape[0], 1)):
        raise ValueError(f"head.apply: expected shape (n,) or (n, 1), n = {features_nd.shape[0]}, got {value.shape}")
    return value.reshape(features_nd.shape[0])


def sample(head: Head, features_nd) -> jax.Array:
    """f (n,) with its parameters sampled from their prior, inside a NumPyro model."""
    found = {}
    for site, (shape, sd) in leaves(head, features_nd.shape[1]).items():
        raw = numpyro.sample(f"{site}.raw", dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)))
        found[site] = numpyro.deterministic(site, sd * raw)
    return evaluate(head, found, features_nd)


def _shapes(head: Head, width: int):
    return jax.eval_shape(head.init, jax.random.key(0), jax.ShapeDtypeStruct((1, width), jnp.float32))


def _site(path) -> str:
    return PREFIX + ".".join(
        str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path
    )
