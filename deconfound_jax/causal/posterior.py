"""The posterior as a value: draws by site, the design, the way back to units."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from deconfound_jax.causal.builders import site_of
from deconfound_jax.causal.spec import equations_of
from deconfound_jax.structs import Design

if TYPE_CHECKING:
    from deconfound_jax.causal.verdict import Verdict

VERSION = 1  # of the file format


@dataclasses.dataclass(frozen=True)
class Posterior:
    """Draws (s, ...) by site on standardised scales, with what turns them into units.

    `scaling` holds, by name, means and sds of features, outcome and columns, and
    each category's level names and means. `diagnostics["converged"]` is False
    where the fit's own check failed; `status` says so in words.
    """

    draws: Mapping[str, np.ndarray]
    design: Design
    scaling: Mapping[str, np.ndarray]
    diagnostics: Mapping[str, Any]

    def __getitem__(self, site: str) -> np.ndarray:
        if site not in self.draws:
            raise KeyError(f"posterior: no site {site!r}; it has {sorted(self.draws)}")
        return self.draws[site]

    @property
    def converged(self) -> bool:
        return bool(self.diagnostics["converged"])

    @property
    def status(self) -> str:
        return "converged" if self.converged else "not converged"

    @property
    def verdict(self) -> Verdict | None:
        """What the checks say of this fit; None where nobody asked (`verdict.judged`)."""
        from deconfound_jax.causal.verdict import Verdict  # it reads posteriors

        return Verdict.from_json(self.diagnostics["verdict"]) if "verdict" in self.diagnostics else None

    def effect(self, column: str) -> np.ndarray:
        """Draws (s,) of a scalar effect in units of y per unit of the column (link scale).

        Of a linear or treatment term its coefficient, of an endogenous one gamma.

        Raises:
          KeyError: no such term; it names those there are.
        """
        terms = {t.column: t for t in self.design.terms if t.kind in ("linear", "treatment", "endogenous")}
        if column not in terms:
            raise KeyError(f"posterior.effect: expected one of {sorted(terms)}, got {column!r}")
        site = site_of(column)
        if terms[column].kind == "endogenous":
            columns = tuple(t.column for t in self.design.endogenous_terms)
            site = "gamma" + equations_of(columns)[columns.index(column)].suffix
        unit = float(np.ravel(self.scaling[f"{site_of(column)}.sd"])[0])
        return self[site].reshape(len(self[site]), -1)[:, 0] * float(self.scaling["outcome.sd"]) / unit

    def save(self, path: epath.PathLike) -> None:
        """Writes one .npz: arrays and a JSON header, no pickle."""
        header = {"version": VERSION, "design": self.design.to_json(), "diagnostics": dict(self.diagnostics)}
        arrays = {f"draws/{k}": v for k, v in self.draws.items()} | {f"scaling/{k}": v for k, v in self.scaling.items()}
        with epath.Path(path).open("wb") as file:
            np.savez(file, header=np.array(json.dumps(header)), **arrays)

    @classmethod
    def load(cls, path: epath.PathLike) -> Posterior:
        """Reads what `save` wrote; ValueError for another version."""
        with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as data:
            header = json.loads(str(data["header"]))
            if header["version"] != VERSION:
                raise ValueError(f"posterior {path}: expected format version {VERSION}, got {header['version']}")
            parts = {"draws": {}, "scaling": {}}
            for name in data.files:
                if "/" in name:
                    part, key = name.split("/", 1)
                    parts[part][key] = data[name]
        return cls(parts["draws"], Design.from_json(header["design"]), parts["scaling"], header["diagnostics"])
