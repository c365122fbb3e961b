"""The studies of `known_answers`: one function each, columns in, estimates beside peers and posteriors out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from deconfound_jax.causal.classical.crossfit import standardised
from deconfound_jax.causal.classical.doubly_robust import aipw, partially_linear
from deconfound_jax.causal.classical.glm import logit
from deconfound_jax.causal.classical.linear import liml, ols, two_stage, with_intercept
from deconfound_jax.causal.fit import fit
from deconfound_jax.causal.overlap import overlap
from deconfound_jax.config import Causal
from deconfound_jax.simulate.resample import confound_trial
from deconfound_jax.structs import Design, Logs, Roles
from experiments import known_logs, known_peers
from experiments.known_logs import Columns

Read = Callable[[str], Columns]  # a log by its name; raises `known_logs.Missing`


@dataclasses.dataclass(frozen=True)
class KnownAnswers:
    """Where the data is, and how long to run."""

    name: str = "known_answers"  # of the record
    data: str = "../shared/data"  # folder of Parquet files; causaldata needs none
    workdir: str = "runs/known_answers"
    draws: int = 2000  # posterior draws
    text_width: int = 20  # features of an abstract
    resamples: int = 100  # confounded logs made from the s2 trial
    seeds: tuple[int, ...] = (0,)  # of folds, draws and the first resample


class Answer(NamedTuple):
    """A reference estimator beside its peer and, where one was run, the randomized answer."""

    study: str
    name: str
    ours: float
    error: float | None
    peer: float | None = None
    by: str = "-"
    randomized: float | None = None
    bar: bool = False  # the design identifies the randomized answer
    randomized_error: float = 0.0  # standard error of the randomized answer

    @property
    def apart(self) -> float | None:
        """Relative difference from the peer."""
        return None if self.peer is None else abs(self.ours - self.peer) / max(abs(self.peer), 1e-12)


class Believed(NamedTuple):
    """A posterior with default priors beside the reference estimator of the same design."""

    study: str
    name: str
    of: str  # the reference estimator
    mean: float
    sd: float
    reference: float
    error: float
    converged: bool

    @property
    def distance(self) -> float:
        """In standard errors of the reference estimator."""
        return (self.mean - self.reference) / self.error


class Shared(NamedTuple):
    """Whether treated and controls share covariates, and whether they should be found to."""

    study: str
    effective_rows: float
    share: float  # of the smaller arm
    fires: bool
    expected_to_fire: bool


Row = Answer | Believed | Shared


def card(read: Read, config: KnownAnswers) -> Iterator[Row]:
    """Schooling and log wages: least squares, and 2SLS with the nearby college."""
    data = read("card")
    exogenous = with_intercept(*[data[c] for c in known_logs.CARD])
    covariates = " + ".join(known_logs.CARD)
    plain = _ols("card", "ols", data["lwage"], np.concatenate([exogenous, data["educ"][:, None]], 1))
    yield plain
    yield believe(plain, "posterior_covariate", data, "lwage", f"{covariates} + treatment(educ)", "educ", config)
    parts = (data["lwage"], exogenous, data["educ"][:, None], data["nearc4"][:, None])
    staged = two_stage(*parts, robust=False)
    peer = known_peers.call(known_peers.linearmodels_2sls, *parts)
    answer = Answer("card", "2sls", staged.coefficient_k[-1], staged.error_k[-1], *peer)
    yield answer
    yield believe(answer, "posterior", data, "lwage", f"{covariates} + endogenous(educ ~ nearc4)", "educ", config)
    likely = liml(*parts, robust=False)
    peer = known_peers.call(known_peers.linearmodels_liml, *parts)
    yield Answer("card", "liml", likely.coefficient_k[-1], likely.error_k[-1], *peer)
    peer = known_peers.call(known_peers.linearmodels_first_stage_f, *parts)
    yield Answer("card", "first_stage_f", staged.first_stage_f_m[0], None, *peer)


def nsw(read: Read, config: KnownAnswers) -> Iterator[Row]:
    """Job training: the trial's difference of means is the answer; survey controls share too little to find it."""
    data = read("nsw")
    difference = _ols("nsw", "experimental", data["re78"], with_intercept(data["treat"]))
    yield difference
    yield from _observational("nsw_trial", data, "re78", "treat", known_logs.NSW, config, difference, bar=True)
    for study in ("nsw_psid", "nsw_cps"):
        data = read(study)
        yield _ols(study, "naive", data["re78"], with_intercept(data["treat"]), difference)
        yield from _observational(study, data, "re78", "treat", known_logs.NSW, config, difference, shared=False)


def nhefs(read: Read, config: KnownAnswers) -> Iterator[Row]:
    """Quitting smoking and weight: adjusted for what a smoker's chart says."""
    data = read("nhefs")
    levels = [data[c][:, None] == np.unique(data[c])[None, 1:] for c in known_logs.NHEFS_LEVELS]
    data = dict(data) | {
        f"{c}.{i}": column.astype(float)
        for c, block in zip(known_logs.NHEFS_LEVELS, levels, strict=True)
        for i, column in enumerate(block.T)
    }
    names = (*known_logs.NHEFS, *[name for name in data if "." in name])
    yield _ols("nhefs", "naive", data["wt82_71"], with_intercept(data["qsmk"]))
    yield from _observational("nhefs", data, "wt82_71", "qsmk", names, config)
    x_nk = np.stack([*[data[c] for c in known_logs.NHEFS], data["qsmk"]], 1)
    codes_nc = np.stack([data[c] for c in known_logs.NHEFS_LEVELS], 1).astype(int)
    found = ols(data["wt82_71"], x_nk, codes_nc)
    peer = known_peers.call(known_peers.linearmodels_absorbed, data["wt82_71"], x_nk, codes_nc)
    answer = Answer("nhefs", "absorbed", found.coefficient_k[-1], found.error_k[-1], *peer)
    yield answer
    absorbed = [f"category({c}, absorbed)" for c in known_logs.NHEFS_LEVELS]
    design = " + ".join([*known_logs.NHEFS, *absorbed, "treatment(qsmk)"])
    yield believe(answer, "posterior_absorbed", data, "wt82_71", design, "qsmk", config)


def outvote(read: Read, config: KnownAnswers) -> Iterator[Row]:
    """Encouragement as instrument: the Wald ratio beside the naive contrast of texters and the rest."""
    data = read("outvote")
    yield _ols("outvote", "naive", data["Y"], with_intercept(data["D"]))
    yield _ols("outvote", "itt", data["Y"], with_intercept(data["Z"]))
    yield _ols("outvote", "first_stage", data["D"], with_intercept(data["Z"]))
    yield from _wald("outvote", data, "Y", "D", "Z", config)


def fact_check(read: Read, config: KnownAnswers) -> Iterator[Row]:
    """An offer, randomized, as encouragement to look; those who took it up differ from those who did not."""
    data = read("fact_check")
    forced, offered = data["forced"] == 1, data["offered"] == 1
    plain, inside = _take(data, ~offered), _take(data, offered)
    shown = _ols("fact_check", "forced", plain["share"], with_intercept(plain["forced"]), None, plain["participant"])
    yield shown
    took = with_intercept(inside["opted"])
    yield _ols("fact_check", "naive_opt_in", inside["share"], took, shown, inside["participant"])
    # A person is randomized, not a headline: persons' means, of equally many headlines each, are the rows.
    people, person_n = np.unique(data["participant"][~forced], return_inverse=True)
    means = {
        name: np.bincount(person_n, value[~forced], len(people)) / np.bincount(person_n)
        for name, value in data.items()
        if name in ("share", "opted", "offered")
    }
    yield _ols("fact_check", "itt", means["share"], with_intercept(means["offered"]))
    yield from _wald("fact_check", means, "share", "opted", "offered", config)


def s2_rct(read: Read, config: KnownAnswers) -> Iterator[Row]:
    """The trial made into a confounded log; the abstract's words stand in for the field that confounds it."""
    data = read("s2_rct")
    difference = _ols("s2", "trial", data["click"], with_intercept(data["treatment"]))
    yield difference
    text_nd = known_logs.text_features(data["text"], config.text_width)
    propensity_n = np.where(data["field"] == 1, 0.15, 0.85)
    kept = confound_trial(data["treatment"], propensity_n, config.seeds[0]).index_m
    log = _take(data, kept)
    yield _ols("s2", "naive", log["click"], with_intercept(log["treatment"]), difference)
    yield from _observational("s2", log, "click", "treatment", (), config, difference, features_nd=text_nd[kept])
    x_nk = with_intercept(text_nd[kept], log["treatment"])
    found = logit(log["click"], x_nk)
    peer = known_peers.call(known_peers.statsmodels_logit, log["click"], x_nk)
    answer = Answer("s2", "logit", found.coefficient_k[-1], found.error_k[-1], *peer)
    yield answer
    yield believe(answer, "posterior_logit", log, "click", "treatment(treatment)", "treatment", config,
                  text_nd[kept], "bernoulli")  # fmt: skip
    yield from _resamples(data, text_nd, propensity_n, difference.ours, config)


def believe(answer: Answer, name: str, data: Columns, outcome: str, design: str, column: str, config: KnownAnswers,
            features_nd=None, family="normal") -> Believed:  # fmt: skip
    """Fits the design with default priors and reads the effect of `column`, in units of the outcome."""
    n = len(data[outcome])
    columns = dict(data) | {"text": np.full(n, "", object)}
    logs = Logs.of(columns, Roles(text="text", outcome=outcome))
    features_nd = np.zeros((n, 0)) if features_nd is None else features_nd
    causal = Causal(family=family, draws=config.draws, seed=config.seeds[0])
    posterior = fit(logs, features_nd, causal, Design.parse(design, family))
    effect_s = posterior.effect(column)
    return Believed(answer.study, name, answer.name, float(effect_s.mean()), float(effect_s.std()),
                    answer.ours, answer.error, posterior.converged)  # fmt: skip


def _ols(study, name, y_n, x_nk, randomized=None, cluster_n=None, bar=False) -> Answer:
    found = ols(y_n, x_nk, cluster_n=cluster_n, robust=cluster_n is not None)
    peer = known_peers.call(known_peers.statsmodels_ols, y_n, x_nk)
    return Answer(study, name, found.coefficient_k[-1], found.error_k[-1], *peer, *_beside(randomized, bar))


def _observational(study, data, outcome, treatment, names, config, randomized=None, bar=False, shared=True,
                   features_nd=None):  # fmt: skip
    """Least squares, partially linear DML and AIPW on the same covariates, a posterior, and the overlap check."""
    y_n, d_n = data[outcome], data[treatment]
    x_nq = standardised(np.stack([data[c] for c in names], 1) if features_nd is None else features_nd)
    plain = _ols(study, "ols", y_n, with_intercept(x_nq, d_n), randomized, None, bar)
    yield plain
    linear = partially_linear(y_n, d_n, x_nq, seed=config.seeds[0])
    for name, peer in (
        ("dml", known_peers.call(known_peers.doubleml_plr, y_n, d_n, linear)),
        ("dml_econml", known_peers.call(known_peers.econml_linear_dml, y_n, d_n, x_nq, linear)),
    ):
        yield Answer(study, name, linear.effect, linear.error, *peer, *_beside(randomized, bar))
    weighted = aipw(y_n, d_n, x_nq, fold_n=linear.fold_n)
    peer = known_peers.call(known_peers.doubleml_irm, y_n, d_n, weighted)
    yield Answer(study, "aipw", weighted.effect, weighted.error, *peer, *_beside(randomized, bar))
    design = " + ".join([*names, f"treatment({treatment})"])
    yield believe(plain, "posterior", data, outcome, design, treatment, config, features_nd)
    yield from _shared(study, d_n, x_nq, shared)


def _beside(randomized: Answer | None, bar: bool):
    """The randomized answer, whether it is a bar, and its error, as `Answer` holds them."""
    return (None, False) if randomized is None else (randomized.ours, bar, randomized.error)


def _wald(study, data, outcome, taken, offered, config):
    parts = (data[outcome], np.ones((len(data[outcome]), 1)), data[taken][:, None], data[offered][:, None])
    found = two_stage(*parts)
    peer = known_peers.call(known_peers.linearmodels_2sls, *parts)
    answer = Answer(study, "wald", found.coefficient_k[-1], found.error_k[-1], *peer)
    yield answer
    yield believe(answer, "posterior", data, outcome, f"endogenous({taken} ~ {offered})", taken, config)


def _take(data, rows):
    return {name: value[rows] for name, value in data.items()}


def _resamples(data, text_nd, propensity_n, randomized, config):
    """Means over many confounded logs: naive, given the field (which identifies the effect), given the text."""
    field_n = data["field"] - data["field"].mean()
    found = {"resampled_naive": [], "resampled_field": [], "resampled_text": []}
    for seed in range(config.seeds[0], config.seeds[0] + config.resamples):
        kept = confound_trial(data["treatment"], propensity_n, seed).index_m
        y_n, d_n = data["click"][kept], data["treatment"][kept]
        given_field = [field_n[kept], field_n[kept] * d_n]  # centred over the trial: the effect is that at its mean
        for name, x in (("naive", []), ("field", given_field), ("text", [*text_nd[kept].T])):
            x_nk = np.stack([np.ones(len(kept)), d_n, *x], 1)
            found[f"resampled_{name}"].append(np.linalg.lstsq(x_nk, y_n, rcond=None)[0][1])
    for name, effects in found.items():
        error = float(np.std(effects, ddof=1) / np.sqrt(len(effects)))
        yield Answer("s2", name, float(np.mean(effects)), error, None, "-", randomized, name == "resampled_field")


def _shared(study, d_n, x_nq, expected) -> Iterator[Shared]:
    """The overlap check of the verdict, on the covariates that the estimators adjust for."""
    found = overlap(d_n, x_nq)
    fires = found.effective_rows < 50 or found.share < 0.05
    yield Shared(study, float(found.effective_rows), float(found.share), bool(fires), not expected)


STUDIES = {"card": card, "nsw": nsw, "nhefs": nhefs, "outvote": outvote, "s2_rct": s2_rct, "fact_check": fact_check}
