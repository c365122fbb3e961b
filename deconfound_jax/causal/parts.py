"""What each confounder adds to eta, by row and draw: the parts that a residual takes out."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.causal import nested
from deconfound_jax.causal.builders import site_of
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.predict import doubled_draws
from deconfound_jax.causal.scalars import gammas
from deconfound_jax.causal.spec import Prepared, Rows, Spec, doubled

_HELPERS = (".means", ".expected", ".line", ".wiggles")  # blocks that belong to the term before the dot


def contributions(posterior: Posterior, prepared: Prepared) -> dict[str, np.ndarray]:
    """Each confounder's part of eta by row, (s, u), centred over rows, standardised units of y.

    A category's part is its levels and their means, a smooth's its line and wiggles; an
    endogenous confounder's is gamma p and the control function together. The text's own
    part of what a treatment is expected to be belongs to f and is not counted here.
    """
    rows, spec, parts = prepared.rows, prepared.spec, {}
    for block in spec.blocks[1:]:
        part_su = posterior[block.name] @ rows.columns_nq[:, block.start : block.stop].T
        slope_d = posterior.scaling.get(f"{block.name}.text")
        if slope_d is not None:
            part_su = part_su - posterior[block.name][:, :1] * (rows.columns_nq[:, : len(slope_d)] @ slope_d)[None, :]
        _add(parts, owner(block.name), part_su)
    for level in spec.levels:
        _add(parts, level.name, posterior[level.name][:, rows.levels_nc[:, level.column]])
    if spec.structural(None):
        names = [site_of(spec.equations[i].column) for i in spec.structural(None)]
        with jax.enable_x64(True):
            found = np.asarray(_endogenous(spec, doubled(rows), doubled_draws(posterior)))
        for i, name in enumerate(names):
            _add(parts, name, found[:, i])
    return {name: part - part.mean(1, keepdims=True) for name, part in parts.items()}


def removed(posterior: Posterior, prepared: Prepared) -> np.ndarray:
    """The sum of all confounders' parts (s, u); a text's own deviation stays in the reward."""
    text = text_intercept(posterior, prepared)
    parts = [part for name, part in contributions(posterior, prepared).items() if name != text]
    return sum(parts, np.zeros((len(posterior["intercept"]), len(prepared.rows.outcome_n))))


def text_intercept(posterior: Posterior, prepared: Prepared) -> str | None:
    """The level term on the text column itself, if the design has one (a text is its own level)."""
    texts = str(prepared.scaling["text.column"])
    found = any(term.kind == "intercept" and term.column == texts for term in posterior.design.terms)
    return site_of(texts) if found else None


def owner(block: str) -> str:
    """The term that a block belongs to."""
    return next((block.removesuffix(h) for h in _HELPERS if block.endswith(h)), block)


@partial(jax.jit, static_argnames="spec")
def _endogenous(spec: Spec, rows: Rows, draws):
    """gamma p + c0 e of every structural variable, (s, m, n)."""

    def one(found):
        errors, parts = [], []
        for i, equation in enumerate(spec.equations):
            mean_n = nested.exogenous(spec, rows, found, equation)
            for j, name in gammas(spec, equation):
                mean_n = mean_n + found[name] * rows.endogenous_nm[:, j]
            for before, error_n in zip(spec.equations, errors, strict=False):
                mean_n = mean_n + found[f"{equation.prefix}control{before.suffix}"] * error_n
            errors.append((rows.endogenous_nm[:, i] - mean_n) / found[f"{equation.prefix}sigma"])
        for i, name in gammas(spec, None):
            control = found[f"control{spec.equations[i].suffix}"]
            parts.append(found[name] * rows.endogenous_nm[:, i] + control * errors[i])
        return jnp.stack(parts)

    return jax.lax.map(one, draws)


def _add(parts: dict, name: str, part: np.ndarray) -> None:
    parts[name] = parts[name] + part if name in parts else part
