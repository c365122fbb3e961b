"""Small numeric logs that break one assumption at a time, with the truth beside them.

    x = e + a_s s d + a_h h d + a_c c d' + group,   d = beta / |beta|     wording: three features
    p = pi z + pi_2 z2 + s + u + .3 e               popularity; s the mood that also moves wording, u unseen
    y = beta'x + gamma p + kappa u + delta z + delta_2 z2 + .5 c + b_h h + week + group + noise e

The mood and the unseen cause h load on wording along beta, so what they leave behind reverses the ranking when it is
strong enough: bias = -b_h a_h / (1 + a_h^2) d for h alone.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from deconfound_jax.structs import Logs, Roles

BETA = np.array([0.3, 0.6, -0.3])  # the newsroom's E, W, C


@dataclasses.dataclass(frozen=True)
class World:
    """Constants of one log; the defaults are clean, without a first stage."""

    rows: int = 1500
    groups: int = 100
    weeks: int = 8
    text: float = 0.3  # scale of beta: the text moves little of y
    noise: float = 1.0
    mood: float = 0.0  # a_s
    instrument: float = 0.0  # pi
    second: float = 0.0  # pi_2
    gamma: float = 0.0
    kappa: float = 0.0
    exclusion: float = 0.0  # delta
    second_exclusion: float = 0.0  # delta_2
    hidden_text: float = 0.0  # a_h
    hidden_outcome: float = 0.0  # b_h
    group_text: float = 0.0
    group_outcome: float = 0.0
    treatment_noise: float = 0.0  # t = 1 where c + noise > 0; 0 draws t by a coin
    copy_noise: float = 0.0  # column `copy` = the second feature + noise


class Failure(NamedTuple):
    """A log, its features, and what the log never shows."""

    logs: Logs
    features_nd: np.ndarray
    beta_d: np.ndarray  # true effect of the features
    hidden_n: np.ndarray
    placebo_n: np.ndarray  # an outcome that text cannot move: h, c and noise


def simulate(world: World, seed: int) -> Failure:
    """One log of the world.

    Example:
      >>> simulate(World(rows=50), seed=0).features_nd.shape
      (50, 3)
    """
    rng = np.random.default_rng(seed)
    s, u, z, z2, c, h, e_p, e_y, e_t, e_copy, e_placebo = rng.normal(size=(11, world.rows))
    e_x = rng.normal(size=(world.rows, 3))
    group_n = np.arange(world.rows) % world.groups
    week_n = rng.integers(world.weeks, size=world.rows)
    by_group = rng.normal(size=(world.groups, 2))[group_n]
    week_effect_n = 0.5 * rng.normal(size=world.weeks)[week_n]

    d = BETA / np.linalg.norm(BETA)
    loading_n = world.mood * s + world.hidden_text * h + world.group_text * by_group[:, 0]
    features_nd = e_x + loading_n[:, None] * d[None, :] + 0.3 * c[:, None] * np.array([[0.0, 1.0, 0.0]])
    beta_d = world.text * BETA
    p = world.instrument * z + world.second * z2 + s + u + 0.3 * e_p
    treated_n = (c + world.treatment_noise * e_t > 0) if world.treatment_noise else e_t > 0
    y = features_nd @ beta_d + world.gamma * p + world.kappa * u + 0.5 * c + week_effect_n + world.noise * e_y
    y = y + world.exclusion * z + world.second_exclusion * z2 - world.hidden_outcome * h
    y = y + world.group_outcome * by_group[:, 1] + 0.3 * treated_n
    columns = {
        "text": np.asarray([f"t{i}" for i in range(world.rows)], object),
        "outcome": y, "p": p, "z": z, "z2": z2, "c": c, "t": treated_n.astype(float),
        "copy": features_nd[:, 1] + world.copy_noise * e_copy,
        "week": np.asarray([f"w{i}" for i in week_n], object),
        "group": np.asarray([f"g{i}" for i in group_n], object),
    }  # fmt: skip
    placebo_n = -world.hidden_outcome * h + 0.5 * c + e_placebo
    return Failure(Logs.of(columns, Roles(group="group")), features_nd, beta_d, h, placebo_n)
