"""Weak instruments: what the posterior mean, its lower bound and the verdict are worth as the instrument fades.

    python -m experiments.weak_instruments [--record]

The newsroom's constants as numbers: three features, p = strength z + s + u + noise, y = beta'x + 3 p + 2 u + noise.
A reward picks one of eight candidates N(0, I); its share is the chosen one's true beta'x over the oracle's. Prior sds
of gamma and of the control coefficient c0 are in units of y, per unit of p and per sd of the first stage's error (the
model's own scale: y and p over their sds). Where the instrument is strong the mean must be as good as the truth; where
it is weak the verdict must say so, and the lower bound must do little worse than the naive reward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from deconfound_jax.causal.batched import fit_batched, stack
from deconfound_jax.causal.classical.linear import two_stage, with_intercept
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.reward import model_form
from deconfound_jax.causal.spec import Prepared
from deconfound_jax.causal.terms import prepare
from deconfound_jax.causal.verdict import verdict
from deconfound_jax.config import Causal
from deconfound_jax.structs import Design, Logs, Roles
from experiments import rundir
from experiments.cli import parse_study, publish, tables_and_bars

BETA_D = np.array([0.3, 0.6, -0.3])  # E, W, C
GAMMA = 3.0  # of y on p
CANDIDATES = 8
STRONG, WEAK = 0.8, 0.03  # the strengths that bars are about
SHARE_BAR, VERDICT_BAR, COVERAGE_BAR, LOSS_BAR = 0.98, 0.90, 0.85, 0.05


@dataclasses.dataclass(frozen=True)
class WeakInstruments:
    """How many logs, how strong, under which priors."""

    name: str = "weak_instruments"  # of the record
    workdir: str = "runs/weak_instruments"
    seeds: tuple[int, ...] = tuple(range(100))
    strengths: tuple[float, ...] = (0.8, 0.1, 0.03)
    priors: tuple[tuple[float, float], ...] = ((2.0, 2.0), (2.0, 5.0), (5.0, 2.0))  # sds of (gamma, c0)
    rows: int = 1000  # of a log
    draws: int = 256  # of a posterior
    choices: int = 500  # sets of candidates that shares are means over


class Drawn(NamedTuple):
    """A log, its features, and the true gamma on the model's scale."""

    logs: Logs
    features_nd: np.ndarray
    gamma: float


def run(config: WeakInstruments, workdir, on_row: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Fits every log under every prior; writes and returns flat results.

    Returns:
      `share.<strength>.{naive,covariate,two_stage}` and `share.<strength>.<prior>.{mean,lower,improvement}` (means over
      seeds; lower: the text with the best 5% quantile of its reward, improvement: of its gain over the naive choice);
      `refused.<strength>.<prior>` (share of verdicts that are bounded or not_identified),
      `coverage90.<strength>.<prior>` of gamma; sentences under `failed`.
    """
    results: dict[str, Any] = {}
    candidates_nd = np.random.default_rng(0).normal(size=(config.choices * CANDIDATES, 3))
    for strength in config.strengths:
        drawn = [simulate(strength, config.rows, seed) for seed in config.seeds]
        found, over = baselines(drawn, candidates_nd, config)
        for prior in config.priors:
            found |= under_prior(drawn, candidates_nd, over, strength, prior, config)
        results |= {f"{key.split('.')[0]}.{strength:g}.{key.split('.', 1)[1]}": value for key, value in found.items()}
        if on_row:
            on_row(found)
    results["failed"] = failures(results, config)
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rundir.write_results(workdir, results)
    return results


def simulate(strength: float, n: int, seed: int) -> Drawn:
    """One log of the newsroom's constants: s moves wording and p, u moves p and y, z moves p alone."""
    rng = np.random.default_rng(seed)
    s, u, z, e0, e1, e2, e3, e4 = rng.normal(size=(8, n))
    features_nd = np.stack([e0, 0.6 * s + 0.8 * e1, 0.3 * s + np.sqrt(0.91) * e2], 1)
    p = strength * z + s + u + 0.3 * e3
    y = features_nd @ BETA_D + GAMMA * p + 2.0 * u + 0.5 * e4
    columns = {"text": np.asarray([f"t{i}" for i in range(n)], object), "outcome": y, "p": p, "z": z}
    return Drawn(Logs.of(columns, Roles()), features_nd, GAMMA * p.std() / y.std())


def scales(strength: float) -> tuple[float, float]:
    """Sds of p and y in the population: the model's scale, one for all logs so that they share a compilation."""
    var_p = strength**2 + 1 + 1 + 0.3**2
    mood = np.array([0.0, 0.6, 0.3])  # loading of s on the features
    var_text = BETA_D @ BETA_D + (BETA_D @ mood) ** 2 - (BETA_D**2) @ mood**2
    var_y = var_text + GAMMA**2 * var_p + 4.0 + 0.5**2 + 2 * GAMMA * (2.0 + BETA_D @ mood)
    return float(np.sqrt(var_p)), float(np.sqrt(var_y))


def baselines(drawn: Sequence[Drawn], candidates_nd: np.ndarray, config: WeakInstruments):
    """Shares of rewards without a prior on gamma (naive, p as a covariate, 2SLS), and the naive choices."""
    found, over = {}, []
    for name, design in (("covariate", "p"), ("naive", "")):
        fits = fit_all(drawn, Design.parse(design), Causal(draws=config.draws))
        rewards = [model_form(f, candidates_nd).mean for f, _ in fits]
        found[f"share.{name}"] = _mean([_share(reward_n, candidates_nd) for reward_n in rewards])
    for reward_n in rewards:  # for each candidate the one that the naive reward takes of its eight
        pick_c = reward_n.reshape(-1, CANDIDATES).argmax(1) + CANDIDATES * np.arange(len(reward_n) // CANDIDATES)
        over.append(np.repeat(pick_c, CANDIDATES))
    shares = []
    for log in drawn:
        p, z = log.logs.columns["p"], log.logs.columns["z"]
        beta_d = two_stage(log.logs.outcome_n, with_intercept(log.features_nd), p, z).coefficient_k[1:4]
        shares.append(_share(candidates_nd @ beta_d, candidates_nd))
    return found | {"share.two_stage": _mean(shares)}, over


def under_prior(
    drawn: Sequence[Drawn],
    candidates_nd: np.ndarray,
    over: Sequence[np.ndarray],
    strength: float,
    prior: tuple[float, float],
    config: WeakInstruments,
) -> dict[str, float]:
    """Shares by posterior mean and by lower bounds, verdicts, and coverage of gamma, under one prior."""
    sd_p, sd_y = scales(strength)
    causal = Causal(draws=config.draws, gamma_sd=prior[0] * sd_p / sd_y, control_sd=prior[1] / sd_y)
    mean, lower, improvement, refused, covered = [], [], [], [], []
    fits = fit_all(drawn, Design.parse("endogenous(p ~ z)"), causal)
    for log, over_n, (posterior, prepared) in zip(drawn, over, fits, strict=True):
        reward = model_form(posterior, candidates_nd)
        mean.append(_share(reward.mean, candidates_nd))
        lower.append(_share(reward.lower(0.05), candidates_nd))
        improvement.append(_share(reward.lower(0.05, over_n), candidates_nd))
        refused.append(verdict(posterior, prepared).status in ("bounded", "not_identified"))
        low, high = np.quantile(posterior["gamma"], [0.05, 0.95])
        covered.append(low <= log.gamma <= high)
    name = label(prior)
    return {
        f"share.{name}.mean": _mean(mean), f"share.{name}.lower": _mean(lower),
        f"share.{name}.improvement": _mean(improvement),
        f"refused.{name}": _mean(refused), f"coverage90.{name}": _mean(covered),
    }  # fmt: skip


def fit_all(drawn: Sequence[Drawn], design: Design, causal: Causal) -> list[tuple[Posterior, Prepared]]:
    """The exact fit of every log, in one batch."""
    prepared = [prepare(log.logs, log.features_nd, design, causal) for log in drawn]
    draws, diagnostics = fit_batched(prepared[0].spec, stack([p.rows for p in prepared]), causal.draws, causal.seed)
    fits = []
    for i, one in enumerate(prepared):
        known = {name: float(value[i]) for name, value in diagnostics.items() if name != "converged"}
        known |= {
            "method": "exact",
            "why": "closed form given a few scalars",
            "converged": bool(diagnostics["converged"][i]),
        }
        scaling = {name: np.asarray(value) for name, value in one.scaling.items()}
        fits.append((Posterior({name: value[i] for name, value in draws.items()}, design, scaling, known), one))
    return fits


def label(prior: tuple[float, float]) -> str:
    """A prior's name in keys."""
    return f"gamma{prior[0]:g}_control{prior[1]:g}"


def failures(results: Mapping[str, Any], config: WeakInstruments) -> list[str]:
    """Every bar that does not hold, as a sentence; the widest prior is the one widest in gamma.

    The lower bound's bar is that of the improvement; the bound of the reward itself is printed beside it.
    """
    widest, found = label(max(config.priors)), [(f"share.{STRONG:g}.two_stage", SHARE_BAR)]
    for prior in map(label, config.priors):
        found += [(f"share.{STRONG:g}.{prior}.mean", SHARE_BAR), (f"refused.{WEAK:g}.{prior}", VERDICT_BAR)]
        found.append((f"share.{WEAK:g}.{prior}.improvement", results.get(f"share.{WEAK:g}.naive", 0.0) - LOSS_BAR))
    found.append((f"coverage90.{WEAK:g}.{widest}", COVERAGE_BAR))
    failed = [(key, bar) for key, bar in found if results.get(key, 1.0) < bar]
    return [f"{key} is {results[key]:.3f}, expected at least {bar:.3f}" for key, bar in failed]


def tables(results: Mapping[str, Any], config: WeakInstruments) -> list[list[dict[str, Any]]]:
    """A row a strength for the rewards without prior, a row a strength and prior for ours."""
    base, ours = [], []
    for strength in config.strengths:
        row = {"strength": f"{strength:g}"}
        base.append(row | {name: results[f"share.{strength:g}.{name}"] for name in ("naive", "covariate", "two_stage")})
        for prior in config.priors:
            name = label(prior)
            ours.append(row | {
                "prior sd gamma": f"{prior[0]:g}", "prior sd c0": f"{prior[1]:g}",
                "share, mean": results[f"share.{strength:g}.{name}.mean"],
                "share, lower bound": results[f"share.{strength:g}.{name}.lower"],
                "share, lower bound of improvement": results[f"share.{strength:g}.{name}.improvement"],
                "bounded or not identified": results[f"refused.{strength:g}.{name}"],
                "90% intervals cover gamma": results[f"coverage90.{strength:g}.{name}"],
            })  # fmt: skip
    return [base, ours]


def _share(reward_n: np.ndarray, candidates_nd: np.ndarray) -> float:
    """True reward of the candidates that a reward picks, as a share of the best ones'."""
    truth_cg = (candidates_nd @ BETA_D).reshape(-1, CANDIDATES)
    pick_c = reward_n.reshape(-1, CANDIDATES).argmax(1)
    return float(truth_cg[np.arange(len(truth_cg)), pick_c].mean() / truth_cg.max(1).mean())


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def main(argv: Sequence[str] | None = None) -> None:
    config, record = parse_study(argv, WeakInstruments, __doc__)
    results = run(config, config.workdir)
    publish(config, "weak_instruments", tables_and_bars(tables(results, config), results["failed"]), record)


if __name__ == "__main__":
    main()
