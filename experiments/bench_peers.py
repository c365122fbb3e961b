"""The peers' side of the benchmark: two-stage least squares on the rows that `bench_jobs.narrow` fits.

    python -m experiments.bench_peers '{"job": "linearmodels", "rows": 5000, "width": 8, "seed": 0}'

One effect with exogenous controls and the classical standard error, by each package's own estimator; econml's
orthogonal estimator (cross-fitted, linear nuisances) aims at the same effect and is run, too.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import numpy as np

from experiments.bench_jobs import peak_gb, simulate


class Peer(NamedTuple):
    """A package, its estimator, and how many fp64 copies of the data it was seen to hold."""

    package: str
    estimate: Callable
    copies: float


def linearmodels(features_nd, z_n, p_n, y_n) -> tuple[float, float]:
    from linearmodels.iv import IV2SLS

    controls = np.column_stack([np.ones(len(y_n)), features_nd])
    fitted = IV2SLS(y_n, controls, p_n, z_n).fit(cov_type="unadjusted")
    return float(fitted.params.iloc[-1]), float(fitted.std_errors.iloc[-1])


def econml_2sls(features_nd, z_n, p_n, y_n) -> tuple[float, float]:
    from econml.sklearn_extensions.linear_model import StatsModels2SLS

    controls = np.column_stack([np.ones(len(y_n)), features_nd])
    fitted = StatsModels2SLS(cov_type="nonrobust")
    fitted.fit(np.column_stack([z_n, controls]), np.column_stack([p_n, controls]), y_n)
    return float(fitted._param[0]), float(np.sqrt(fitted._param_var[0, 0]))


def econml_ortho_iv(features_nd, z_n, p_n, y_n) -> tuple[float, float]:
    from econml.iv.dml import OrthoIV
    from sklearn.linear_model import LinearRegression as Linear

    fitted = OrthoIV(model_y_xw=Linear(), model_t_xw=Linear(), model_z_xw=Linear(), cv=2, random_state=0)
    fitted.fit(y_n, p_n, Z=z_n, W=features_nd)
    return float(np.ravel(fitted.intercept_)[0]), float(np.ravel(fitted.intercept__inference().stderr)[0])


def pyfixest(features_nd, z_n, p_n, y_n) -> tuple[float, float]:
    import pandas as pd
    from pyfixest.estimation import feols

    names = [f"x{i}" for i in range(features_nd.shape[1])]
    frame = pd.DataFrame(features_nd, columns=names).assign(z=z_n, p=p_n, y=y_n)
    fitted = feols(f"y ~ {' + '.join(names)} | p ~ z", frame, vcov="iid")
    return float(fitted.coef()["p"]), float(fitted.se()["p"])


PEERS = {
    "econml_2sls": Peer("econml", econml_2sls, 6.0),
    "econml_ortho_iv": Peer("econml", econml_ortho_iv, 5.0),
    "linearmodels": Peer("linearmodels", linearmodels, 13.0),
    "pyfixest": Peer("pyfixest", pyfixest, 18.0),
}


def needed_gb(name: str, rows: int, width: int) -> float:
    """Memory that a peer is expected to take."""
    return 0.5 + PEERS[name].copies * rows * (width + 3) * 8 / 1e9


def available_gb() -> float:
    """Memory that is free now; infinity where the system does not tell."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024 / 1e9


def measure(job: str, rows: int, width: int, seed: int, repeats: int = 2) -> dict[str, float | str]:
    """One peer's first call on few rows (imports, compilation), then the log: the fastest of `repeats`."""
    seconds = []
    for n in (5 * width + 500, *[rows] * repeats):
        data = simulate(n, width, 1, seed)
        arrays = data.features_nd.astype(np.float64), *(data.columns[c] for c in ("z", "p", "outcome"))
        begin = time.perf_counter()
        gamma, se = PEERS[job].estimate(*arrays)
        seconds.append(time.perf_counter() - begin)
    version = f"{PEERS[job].package} {metadata.version(PEERS[job].package)}"
    found = {"first_call_seconds": seconds[0], "seconds": min(seconds[1:]), "gamma": gamma, "gamma_se": se}
    return found | {"version": version, "peak_gb": peak_gb()}


def main(argv: list[str] | None = None) -> None:
    print(json.dumps(measure(**json.loads((argv or sys.argv[1:])[0]))))


if __name__ == "__main__":
    main()
