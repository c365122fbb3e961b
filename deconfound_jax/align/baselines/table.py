"""The baselines by name: one signature, `(data, config, key) -> RewardModel`, and the config each takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from deconfound_jax.align.baselines.calibration import posthoc
from deconfound_jax.align.baselines.causal_rewards import causal_rewards, conditional_causal_rewards
from deconfound_jax.align.baselines.causal_rm import causal_rm_dr, causal_rm_ips
from deconfound_jax.align.baselines.inform import inform
from deconfound_jax.align.baselines.linear import covariate, naive, projection, residual
from deconfound_jax.align.baselines.odin import odin
from deconfound_jax.align.baselines.rrm import rrm
from deconfound_jax.config import Causal, CausalRewards, CausalRm, InfoRm, Lowess, Odin, Rrm


class Baseline(NamedTuple):
    """A fit and the config it takes."""

    fit: Callable
    config: Any


BASELINES = {
    "naive": Baseline(naive, Causal()),
    "covariate": Baseline(covariate, Causal()),
    "residual": Baseline(residual, Causal()),
    "projection": Baseline(projection, Causal()),
    "odin": Baseline(odin, Odin()),
    "causal_rewards": Baseline(causal_rewards, CausalRewards()),
    "conditional_causal_rewards": Baseline(conditional_causal_rewards, CausalRewards()),
    "posthoc": Baseline(posthoc, Lowess()),
    "rrm": Baseline(rrm, Rrm()),
    "inform": Baseline(inform, InfoRm()),
    "causal_rm_ips": Baseline(causal_rm_ips, CausalRm()),
    "causal_rm_dr": Baseline(causal_rm_dr, CausalRm()),
}
