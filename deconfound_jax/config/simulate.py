"""The newsroom simulation's constants (`docs/method.md`)."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Newsroom:
    """y = beta'x + gamma p + kappa u + article + week + noise; p = pi z + s + u + noise."""

    articles: int = 800
    headlines: int = 5  # of an article
    weeks: int = 20
    topics: int = 40  # articles draw their words from one of these
    instrument: float = 0.8  # pi; 0.03 is weak
    gamma: float = 3.0  # popularity's own effect on y
    kappa: float = 2.0  # u's effect on y: popularity is endogenous unless 0
    exclusion: float = 0.0  # z's own effect on y; the assumption says 0
    entangled: bool = True  # wording moves with the mood s that also moves p
