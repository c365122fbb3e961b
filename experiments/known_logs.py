"""The logs behind `known_answers`: public trials and observational studies, each a dict of columns.

They come from PyPI's `causaldata` or from Parquet files in a folder; what is not there raises `Missing`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

import numpy as np
from etils import epath

Columns = Mapping[str, np.ndarray]

CARD = ("exper", "black", "south", "married", "smsa")
NSW = ("age", "educ", "black", "hisp", "marr", "nodegree", "re74", "re75")
NHEFS = ("sex", "race", "age", "age2", "smokeintensity", "smokeintensity2", "smokeyrs", "smokeyrs2", "wt71", "wt712")
NHEFS_LEVELS = ("education", "exercise", "active")


class Missing(Exception):
    """Data that is not on this machine; the message says what to install or where to put it."""


def card(folder: str) -> Columns:
    """Card (1995): log wage and schooling of 3,003 men; growing up near a college is the instrument."""
    return _complete(_causaldata("close_college"), ("lwage", "educ", "nearc4", *CARD))


def nsw_experimental(folder: str) -> Columns:
    """LaLonde's job training trial, the subsample of Dehejia and Wahba (1999): 445 men, earnings in dollars."""
    return _complete(_causaldata("nsw_mixtape"), ("re78", "treat", *NSW))


def nsw_observational(folder: str, controls: str) -> Columns:
    """The trial's 185 treated men beside the controls of a survey: `psid` or `cps`."""
    name = {"psid": "psid_controls", "cps": "cps_controls"}[controls]
    chosen = f"(source = 'nsw_dw' and treat = 1) or source = '{name}'"
    columns = ", ".join(["re78", "treat", *["married as marr" if c == "marr" else c for c in NSW]])
    return _parquet(folder, "causal_benchmarks/lalonde_all.parquet", f"select {columns} from log where {chosen}")


def nhefs(folder: str) -> Columns:
    """Quitting smoking and weight gained in kg, 1971 to 1982 (Hernan and Robins, chapter 12): 1,566 smokers."""
    data = dict(_causaldata("nhefs_complete"))
    for name in ("age", "smokeintensity", "smokeyrs", "wt71"):
        data[f"{name}2"] = data[name] ** 2
    return _complete(data, ("wt82_71", "qsmk", *NHEFS, *NHEFS_LEVELS))


def outvote(folder: str) -> Columns:
    """Outvote (Schein et al. 2021): does texting friends bring them to vote? Encouragement Z, texted D, voted Y."""
    query = "select Y, D, Z, Q from log where M = 1 and Q <= 103"
    return _parquet(folder, "outvote/outvote.parquet", query)


def s2_rct(folder: str) -> Columns:
    """2,238 papers with a link shown or not, and whether it was clicked (Keith et al. 2023)."""
    query = "select text, click, treatment, field_is_engineering as field from log"
    return _parquet(folder, "s2_rct/subpopB_engineering_business.parquet", query)


def fact_check(folder: str) -> Columns:
    """Sharing false headlines: no fact-check (control), one shown (forced), one offered (optional, opt-in inside)."""
    query = """
        select exp_response as share, Condition = 'Optional' as offered, Condition = 'Forced' as forced,
               option_cond = 'Opt_in' as opted, participant
        from log where "Group" = 'Share' and not veracity and Condition in ('Control', 'Forced', 'Optional')
        order by participant, qualtrics_question_num"""
    return _parquet(folder, "fact_check/responses_long.parquet", query)


def text_features(texts, width: int, buckets: int = 4096) -> np.ndarray:
    """Leading `width` directions of hashed word counts (n, width): no outcome is read, nothing is downloaded.

    log(1 + count) of each word, hashed to `buckets` by CRC-32, rows of unit length, centred; then a singular value
    decomposition.
    """
    from scipy.sparse.linalg import svds

    counts_nb = np.zeros((len(texts), buckets))
    for row, text in enumerate(texts):
        for word in re.findall(r"[a-z]{3,}", str(text).lower()):
            counts_nb[row, zlib.crc32(word.encode()) % buckets] += 1
    counts_nb = np.log1p(counts_nb)
    counts_nb /= np.maximum(np.linalg.norm(counts_nb, axis=1, keepdims=True), 1e-12)
    start = np.random.default_rng(0).normal(size=min(counts_nb.shape))
    left, size, _ = svds(counts_nb - counts_nb.mean(0), k=width, v0=start)
    return (left * size)[:, ::-1]


def _causaldata(name: str) -> Columns:
    try:
        import causaldata
    except ImportError as error:
        raise Missing("causaldata is not installed") from error
    frame = getattr(causaldata, name).load_pandas().data
    return {str(column): frame[column].to_numpy() for column in frame.columns}


def _parquet(folder: str, name: str, query: str) -> Columns:
    path = epath.Path(folder) / name
    if not folder or not path.exists():
        raise Missing(f"{name} is not in the data folder")
    import duckdb

    connection = duckdb.connect()
    connection.execute(f"create view log as select * from read_parquet('{path}')")
    found = connection.execute(query).fetchnumpy()
    return {n: v if v.dtype == object else np.asarray(v, np.float64) for n, v in found.items()}


def _complete(data: Columns, names: tuple[str, ...]) -> Columns:
    """These columns as numbers, rows without a gap."""
    kept = {name: np.asarray(data[name], np.float64) for name in names}
    whole = np.isfinite(np.stack(list(kept.values()), 1)).all(1)
    return {name: value[whole] for name, value in kept.items()}


def read(folder: str, name: str) -> Columns:
    """A log by its name in `LOGS`; `Missing` where its package or file is not here."""
    return LOGS[name](folder)


LOGS = {
    "card": card,
    "nsw": nsw_experimental,
    "nsw_psid": lambda folder: nsw_observational(folder, "psid"),
    "nsw_cps": lambda folder: nsw_observational(folder, "cps"),
    "nhefs": nhefs,
    "outvote": outvote,
    "s2_rct": s2_rct,
    "fact_check": fact_check,
}
