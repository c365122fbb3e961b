"""Cells of simulation-based calibration: truths from the prior, data from the model, ranks of the truths.

    psi, theta ~ prior,   data ~ model(psi, theta),   rank = #{posterior draws < truth}

is uniform on 0..s when posterior and model agree (Cook, Gelman and Rubin 2006; Talts et al. 1804.06788). Everything
is on the model's standardised scales: truths are drawn by the very function that is fitted, and nothing is
standardised again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import scipy.stats

from deconfound_jax.causal.batched import fit_batched, simulate_batched, stack
from deconfound_jax.causal.families import FAMILIES
from deconfound_jax.causal.fit import needs_sampling
from deconfound_jax.causal.nuts import DIVERGENT_LIMIT, ESS_LIMIT, RHAT_LIMIT, fit_many
from deconfound_jax.causal.spec import Block, Levels, Rows, Selection, Spec, equations_of

WIDTH = 4  # of the text's features
CONTRAST_D = np.array([1.0, -1.0, 0.5, 0.5]) / np.sqrt(2.5)  # v: phi(a) - phi(b)
GRADES = 4  # of an ordinal outcome
LEVEL_ROWS = 5  # of the designs with levels
STRENGTH = {"iv_strong": 1.0, "iv_weak": 0.05}  # sd of the instrument's column: its coefficient is N(0, 1)
OFFSET = {"binomial": -1.0, "beta_binomial": -1.0, "poisson": -1.0, "negative_binomial": -1.0}  # 0 elsewhere
# Prior sd of gamma and c0, 1 elsewhere: under a log link the default prior's own data reach counts of 10^17.
ENDOGENOUS_SD = {"poisson": 0.3, "negative_binomial": 0.3}
LEVEL = 0.9  # of the intervals
BINS = 16  # of the rank histograms
THIN = 3  # transitions of NUTS a kept draw: ranks ask for independent ones


class Cell(NamedTuple):
    """A model that truths and data come from, the model that is fitted, and the effect that is judged."""

    name: str
    truth: Spec
    fitted: Spec
    effect: str  # a site with one number
    rows: Callable[[np.random.Generator, int], Rows]  # (generator, n) -> rows without outcome


class Ranks(NamedTuple):
    """Ranks of b truths among s draws, and whether each fit said that it had converged."""

    effect_b: np.ndarray
    contrast_b: np.ndarray
    converged_b: np.ndarray
    draws: int

    def coverage(self, quantity: str, level: float = LEVEL) -> float:
        """Share of truths inside the central interval of the draws."""
        rank_b, out = getattr(self, f"{quantity}_b"), round((self.draws + 1) * (1 - level) / 2)
        return float(np.mean((rank_b >= out) & (rank_b <= self.draws - out)))

    def p_value(self, quantity: str, bins: int = BINS) -> float:
        """Chi-square test that the ranks are uniform."""
        return float(scipy.stats.chisquare(self.histogram(quantity, bins)).pvalue)

    def histogram(self, quantity: str, bins: int = BINS) -> np.ndarray:
        """Counts (bins,) of the ranks; draws + 1 is a multiple of the bins."""
        return np.histogram(getattr(self, f"{quantity}_b"), bins, (0, self.draws + 1))[0]


def cell(family: str, design: str) -> Cell:
    """A cell whose design is right: `additive`, `iv_strong`, `iv_weak` or `selection`."""
    blocks = (Block("text", 0, WIDTH), Block("c", WIDTH, WIDTH + 1, 1.0))
    spec = Spec(family, blocks, (), categories=GRADES if family == "ordinal" else 0)
    moved = Block("instruments", WIDTH + 1, WIDTH + 2, 1.0)  # what moves p, or whether y is seen, and y not at all
    effect = "c"
    if design in STRENGTH:
        sd = ENDOGENOUS_SD.get(family, 1.0)
        spec = spec._replace(instruments=moved, equations=equations_of(("p",)), gamma_sd=sd, control_sd=sd)
        effect = "gamma"
    elif design == "selection":
        law = {"bernoulli": "probit"}.get(family, family)
        spec = spec._replace(family=law, selection=Selection(moved._replace(name="exclusions")))
    return Cell(f"{family}.{design}", spec, spec, effect, partial(_rows, family, STRENGTH.get(design, 1.0)))


def wrong_likelihood() -> Cell:
    """Overdispersed counts, fitted as Poisson."""
    right = cell("negative_binomial", "additive")
    return right._replace(name="poisson.wrong_likelihood", fitted=right.truth._replace(family="poisson"))


def non_additive() -> Cell:
    """The text's effect differs with the confounder, which also moves how far the text varies; fitted as additive."""
    right = cell("normal", "additive")
    truth = right.truth._replace(blocks=(*right.truth.blocks, Block("text:c", WIDTH + 1, 2 * WIDTH + 1)))

    def rows(rng, n):
        found = right.rows(rng, n)
        c_n1 = found.columns_nq[:, WIDTH : WIDTH + 1]
        text_nd = found.columns_nq[:, :WIDTH] * np.exp(0.5 * c_n1 - 0.25)
        return found._replace(columns_nq=np.concatenate([text_nd, c_n1, text_nd * c_n1], 1))

    return right._replace(name="normal.non_additive", truth=truth, rows=rows)


def with_levels(n: int, pooled: bool) -> Cell:
    """Levels whose effects go with their means of the features: fitted with these means, or plainly pooled."""
    right, count = cell("normal", "additive"), n // LEVEL_ROWS
    means = Block("g.means", WIDTH + 1, 2 * WIDTH + 1)
    truth = right.truth._replace(blocks=(*right.truth.blocks, means), levels=(Levels("g", 0, count),))

    def rows(rng, n):
        found, codes_n = right.rows(rng, n), np.arange(n) % count
        text_nd = 0.6 * found.columns_nq[:, :WIDTH] + 0.8 * rng.normal(size=(count, WIDTH))[codes_n]
        means_cd = np.stack([np.bincount(codes_n, column) / np.bincount(codes_n) for column in text_nd.T], 1)
        columns_nq = np.concatenate([text_nd, found.columns_nq[:, WIDTH : WIDTH + 1], means_cd[codes_n]], 1)
        return found._replace(columns_nq=columns_nq, levels_nc=codes_n[:, None])

    fitted = truth._replace(blocks=right.truth.blocks) if pooled else truth
    return Cell(f"normal.{'pooled' if pooled else 'category'}", truth, fitted, "c", rows)


def calibrate(chosen: Cell, truths: int, n: int, draws: int, seed: int) -> Ranks:
    """Draws truths and data, fits all of them at once, ranks the truths.

    Args:
      truths: how many.
      n: rows of each data set.
      draws: of each posterior.
    """
    known, rows = simulate(chosen, truths, n, seed)
    found, converged_b = _fit(chosen.fitted, rows, draws, seed)
    pairs = [
        (known[chosen.effect].reshape(truths), found[chosen.effect].reshape(truths, draws)),
        (known["text"] @ CONTRAST_D, found["text"] @ CONTRAST_D),
    ]
    return Ranks(*[(draws_bs < truth_b[:, None]).sum(1) for truth_b, draws_bs in pairs], converged_b, draws)


def simulate(chosen: Cell, truths: int, n: int, seed: int) -> tuple[dict[str, np.ndarray], Rows]:
    """Truths (b, ...) by site, and rows (b, n, ...) of the data that the model draws at each."""
    rng = np.random.default_rng(seed)
    rows = stack([chosen.rows(rng, n) for _ in range(truths)])
    known = simulate_batched(chosen.truth, rows, seed)
    rows = rows._replace(outcome_n=known["outcome"].astype(float))
    if chosen.truth.equations:
        rows = rows._replace(endogenous_nm=known["endogenous"][:, :, None])
    if chosen.truth.selection:
        rows = rows._replace(observed_n=known["observed"])
    return known, rows


def _fit(spec: Spec, rows: Rows, draws: int, seed: int):
    """The fit that `causal.fit` picks for such a design, of every data set: draws by site, and which converged."""
    last = spec.selection.exclusions if spec.selection else spec.first_blocks[-1]
    rows = rows._replace(columns_nq=rows.columns_nq[:, :, : last.stop])
    if not needs_sampling(spec):
        found, diagnostics = fit_batched(spec, rows, draws, seed)
        return found, diagnostics["converged"]
    found, diagnostics = fit_many(spec, rows, draws, seed, thin=THIN)
    good_b = (diagnostics["rhat"] < RHAT_LIMIT) & (diagnostics["ess"] > ESS_LIMIT)
    return found, good_b & (diagnostics["divergent"] < DIVERGENT_LIMIT)


def _rows(family: str, strength: float, rng: np.random.Generator, n: int) -> Rows:
    """Features that move with the confounder, and a column of sd `strength` for equations before the outcome's."""
    c_n1, ones = rng.normal(size=(n, 1)), np.ones(n)
    text_nd = 0.6 * c_n1 + 0.8 * rng.normal(size=(n, WIDTH))
    counted = FAMILIES[family].counts and family != "bernoulli"
    exposure_n = 1.0 + rng.poisson(19, size=n) if counted else ones
    return Rows(
        np.concatenate([text_nd, c_n1, strength * rng.normal(size=(n, 1))], 1), np.zeros((n, 0), int), np.zeros(n),
        np.zeros((n, 0)), exposure_n, ones, ones, ones, OFFSET.get(family, 0.0),
    )  # fmt: skip
