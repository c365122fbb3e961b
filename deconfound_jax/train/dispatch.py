"""Several steps in one call of the compiled graph: the host's part is paid once for all of them.

    step = scan_steps(make_step(objective, optimizer), 8)
    state, metrics = step(state, frozen, stack_batches(batches, i, 8), key)     # every metric (8, ...)

Rows, states and draws are those of single steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def scan_steps(step: Callable, dispatch: int) -> Callable:
    """`dispatch` steps as one: `(state, frozen, stacked batches, key) -> (state, stacked metrics)`.

        state_{i+1}, metrics_i = step(state_i, frozen, batch_i, key)

    Each step folds its own number into the key, so it draws what it draws when called by itself. Compiles once a
    shape, like the step; 1 is the step itself.
    """
    if dispatch == 1:
        return step

    def several(state, frozen, batches, key):
        return jax.lax.scan(lambda state, batch: step(state, frozen, batch, key), state, batches)

    # The step itself says how its state lies on a mesh.
    return jax.jit(several, donate_argnums=0)


def stack_batches(batches: Callable[[int], Any], start: int, dispatch: int) -> Any:
    """The batches `start` to `start + dispatch - 1` with a new first axis; a single one as it is.

    NumPy leaves are stacked on the host, leaves on devices there.
    """
    if dispatch == 1:
        return batches(start)

    def stack(*leaves):
        return (jnp if any(isinstance(leaf, jax.Array) for leaf in leaves) else np).stack(leaves)

    return jax.tree.map(stack, *(batches(start + i) for i in range(dispatch)))


def count_tokens(batch: Any) -> int:
    """Places for tokens in a batch, filled or not: the sizes of its fields `tokens_*` and `prompt_*`.

    A batch that is one array of integers is all tokens. 0 where nothing says that it is tokens.
    """
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    if len(leaves) == 1 and not leaves[0][0]:
        return np.size(batch) if np.issubdtype(np.asarray(batch).dtype, np.integer) else 0
    names = (jax.tree_util.keystr(path[-1:], simple=True) for path, _ in leaves)
    return sum(np.size(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)
               if name.startswith(("tokens", "prompt")))  # fmt: skip
