"""deconfound_jax: language models aligned on the posterior of a deconfounded reward.

Importing this package is free of side effects: names are resolved when used.

    import deconfound_jax as dj
    posterior = dj.fit(logs, features, dj.Causal(design="category(week)"))
    reward = dj.model_form(posterior, features)
    dj.load("runs/newsroom").score(["a headline"])
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Design": "structs",
    "Logs": "structs",
    "Roles": "structs",
    "Causal": "config",
    "Checks": "config",
    "Run": "config",
    "read": "logs.read",
    "read_batches": "logs.batches",
    "split": "logs.split",
    "prepare": "causal.terms",
    "fit": "causal.fit",
    "fit_stream": "causal.stream",
    "Posterior": "causal.posterior",
    "Reward": "causal.reward",
    "Verdict": "causal.verdict",
    "verdict": "causal.verdict",
    "bounded_reward": "causal.interval",
    "model_form": "causal.reward",
    "text_form": "causal.reward",
    "residual_form": "causal.reward",
    "guarded_form": "causal.reward",
    "response_form": "causal.response",
    "orthogonal_form": "causal.orthogonal",
    "predict": "causal.predict",
    "encode": "models.encoder",
    "load_language_model": "models.language_model",
    "generate": "models.sample",
    "load": "saved",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"deconfound_jax has no {name!r}; it has {__all__}")
    home = importlib.import_module(f"deconfound_jax.{_HOMES[name]}")
    return getattr(home, name)


def __dir__() -> list[str]:
    return __all__
