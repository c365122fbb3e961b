"""Known answers: our reference estimators and posteriors beside the peers', on public trials and studies.

    python -m experiments.known_answers --data ../shared/data [--record]

Runs in the environment of `make peers` (two cores: about two minutes); rows whose peer or data is missing say so.
A reference estimator must equal its peer to 1e-6; a posterior with default priors must have its mean within half a
standard error of the reference estimator of the same design; the randomized answer is printed beside them, and is
a bar (1.96 standard errors of the difference) only where the design identifies it; the overlap check must fire
where it should.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from etils import epath

from experiments import known_logs, rundir
from experiments.cli import markdown, parse_study, publish
from experiments.known_studies import STUDIES, Answer, Believed, KnownAnswers, Row, Shared

PEERS = ("causaldata", "doubleml", "econml", "linearmodels", "statsmodels")
PARITY, HALF, SIGMAS = 1e-6, 0.5, 1.96  # the bars


def run(config: KnownAnswers, workdir, read: Callable | None = None,
        on_row: Callable[[Row], None] | None = None) -> dict[str, Any]:  # fmt: skip
    """Runs every study whose data is there; writes and returns flat results.

    Args:
      config: see `KnownAnswers`.
      workdir: where results.json goes.
      read: name of a log -> columns, in place of the public ones; raises `known_logs.Missing`.
      on_row: sees each row as it is found.

    Returns:
      `<study>.<estimator>.{ours,error,peer,relative_difference,randomized}`, `<study>.<posterior>.{mean,sd,reference,
      distance}`, `<study>.overlap.{effective_rows,share,fires}`; lists of sentences under `skipped` and `failed`, how
      many `bars` there were, the peers' `versions`.
    """
    read, found, skipped = read or functools.partial(known_logs.read, config.data), [], []
    for name, study in STUDIES.items():
        try:
            for row in study(read, config):
                found.append(row)
                if on_row:
                    on_row(row)
        except known_logs.Missing as why:
            skipped.append(f"{name}: {why}")
    without = [row for row in found if isinstance(row, Answer) and row.by.startswith("skipped")]
    skipped += [f"{row.study}.{row.name}: peer {row.by}" for row in without]
    results = flat(found) | {"skipped": skipped, "failed": failures(found), "bars": bars(found)}
    results["versions"] = _versions()
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rundir.write_results(workdir, results)
    return results


def flat(found: Sequence[Row]) -> dict[str, Any]:
    """One flat object, keys as `run` says."""
    results: dict[str, Any] = {}
    for row in found:
        if isinstance(row, Answer):
            values = {"ours": row.ours, "error": row.error, "peer": row.peer, "relative_difference": row.apart}
            values |= {"randomized": row.randomized}
        elif isinstance(row, Believed):
            values = {"mean": row.mean, "sd": row.sd, "reference": row.reference, "distance": row.distance}
        else:
            values = {"effective_rows": row.effective_rows, "share": row.share, "fires": row.fires}
        name = "overlap" if isinstance(row, Shared) else row.name
        results |= {f"{row.study}.{name}.{key}": value for key, value in values.items() if value is not None}
    return results


def failures(found: Sequence[Row]) -> list[str]:
    """Every bar that does not hold, as a sentence."""
    failed = []
    for row in found:
        if isinstance(row, Shared):
            if row.fires != row.expected_to_fire:
                failed.append(f"{row.study}: the overlap check {'fires' if row.fires else 'does not fire'}")
            continue
        place = f"{row.study}.{row.name}"
        if isinstance(row, Believed):
            if not abs(row.distance) <= HALF:
                failed.append(f"{place}: mean {row.distance:+.2f} standard errors from {row.of}, bar {HALF}")
            if not row.converged:
                failed.append(f"{place}: not converged")
            continue
        if row.apart is not None and not row.apart <= PARITY:
            failed.append(f"{place}: {row.apart:.1e} from {row.by}, bar {PARITY:.0e}")
        if row.bar and not abs(row.ours - row.randomized) <= SIGMAS * math.hypot(row.error, row.randomized_error):
            failed.append(f"{place}: {row.ours:.4g}, randomized {row.randomized:.4g}, bar {SIGMAS} errors")
    return failed


def bars(found: Sequence[Row]) -> int:
    """How many bars the rows were held to: each can add one sentence to `failures`."""
    asked = [2 if isinstance(row, Believed) else 1 for row in found if not isinstance(row, Answer)]
    return sum(asked) + sum((row.peer is not None) + row.bar for row in found if isinstance(row, Answer))


def tables(found: Sequence[Row]) -> list[list[dict[str, Any]]]:
    """Estimators beside peers, posteriors beside estimators, overlap."""
    estimators, posteriors, shared = [], [], []
    for row in found:
        if isinstance(row, Answer):
            estimators.append({
                "study": row.study, "estimator": row.name, "ours": _cell(row.ours), "se": _cell(row.error, 2),
                "peer": row.by if row.peer is None else f"{_cell(row.peer)} {row.by}", "apart": _cell(row.apart, 1),
                "randomized": row.randomized and _cell(row.randomized) + " (bar)" * row.bar,
            })  # fmt: skip
        elif isinstance(row, Believed):
            posteriors.append({
                "study": row.study, "design": row.name, "mean": _cell(row.mean), "sd": _cell(row.sd, 2),
                "reference": f"{_cell(row.reference)} {row.of}", "se": _cell(row.error, 2),
                "distance in se": f"{row.distance:+.2f}",
            })  # fmt: skip
        else:
            fires = "fires" if row.fires else "does not fire"
            shared.append({"study": row.study, "overlap check": fires, "effective rows": _cell(row.effective_rows, 3),
                           "share": row.share})  # fmt: skip
    return [table for table in (estimators, posteriors, shared) if table]


def main(argv: Sequence[str] | None = None) -> None:
    config, record = parse_study(argv, KnownAnswers, __doc__)
    found: list[Row] = []
    results = run(config, config.workdir, on_row=found.append)
    pieces = ["\n\n".join(markdown(rows) for rows in tables(found))]
    for title, key in (("Skipped", "skipped"), ("Bars that do not hold", "failed")):
        if results[key]:
            pieces.append("\n".join([f"{title}:", "", *[f"- {line}" for line in results[key]]]))
    if results["versions"]:
        pieces.append(f"Peers: {', '.join(results['versions'])}.")
    asked = results["bars"]
    pieces.append(f"Bars: {asked - len(results['failed'])} of {asked} hold.")
    publish(config, "known_answers", "\n\n".join(pieces), record)


def _versions() -> list[str]:
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]}
    return [f"{name} {installed[name]}" for name in PEERS if name in installed]


def _cell(value: float | None, digits: int = 5) -> str | None:
    return None if value is None else f"{value:.{digits}g}"


if __name__ == "__main__":
    main()
