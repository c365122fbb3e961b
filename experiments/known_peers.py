"""The peers behind `known_answers`: each estimate computed by another library, in this process.

A function takes arrays and returns the coefficient wanted (the last one). `call` runs it, or says why it cannot.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np


def call(function: Callable, *arguments, **named) -> tuple[float | None, str]:
    """The peer's number and its name; None, and the library that is missing, where it is not installed."""
    name = function.__doc__.split(":")[0]
    try:
        # Their deprecations are theirs to mend.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(np.ravel(function(*arguments, **named))[-1]), name
    except ImportError as error:
        return None, f"skipped: {error.name or name} is not installed"


def statsmodels_ols(y_n, x_nk):
    """statsmodels: ordinary least squares."""
    import statsmodels.api as sm

    return sm.OLS(y_n, x_nk).fit().params


def statsmodels_logit(y_n, x_nk):
    """statsmodels: logistic regression."""
    import statsmodels.api as sm

    return sm.GLM(y_n, x_nk, family=sm.families.Binomial()).fit(tol=1e-12).params


def linearmodels_absorbed(y_n, x_nk, codes_nc):
    """linearmodels: least squares with absorbed levels."""
    import pandas
    from linearmodels.iv import AbsorbingLS

    levels = pandas.DataFrame({f"c{i}": pandas.Categorical(column) for i, column in enumerate(np.asarray(codes_nc).T)})
    return AbsorbingLS(y_n, x_nk, absorb=levels).fit().params


def linearmodels_2sls(y_n, exogenous_nk, endogenous_nm, instruments_nq):
    """linearmodels: two-stage least squares."""
    from linearmodels.iv import IV2SLS

    return IV2SLS(y_n, exogenous_nk, endogenous_nm, instruments_nq).fit().params


def linearmodels_liml(y_n, exogenous_nk, endogenous_nm, instruments_nq):
    """linearmodels: limited-information maximum likelihood."""
    from linearmodels.iv import IVLIML

    return IVLIML(y_n, exogenous_nk, endogenous_nm, instruments_nq).fit().params


def linearmodels_first_stage_f(y_n, exogenous_nk, endogenous_nm, instruments_nq):
    """linearmodels: partial F of the instruments in the first stage."""
    from linearmodels.iv import IV2SLS

    fitted = IV2SLS(y_n, exogenous_nk, endogenous_nm, instruments_nq).fit(cov_type="unadjusted", debiased=True)
    return fitted.first_stage.diagnostics["f.stat"]


def doubleml_plr(y_n, d_n, ours):
    """doubleml: partially linear model, our folds and nuisances."""
    from doubleml import DoubleMLData, DoubleMLPLR
    from doubleml.utils import DMLDummyRegressor

    data = DoubleMLData.from_arrays(np.zeros((len(y_n), 1)), y_n, d_n)
    model = DoubleMLPLR(data, DMLDummyRegressor(), DMLDummyRegressor(), draw_sample_splitting=False)
    model.set_sample_splitting([_splits(ours.fold_n)])
    given = {"ml_l": ours.outcome_hat_n[:, None], "ml_m": ours.treatment_hat_n[:, None]}
    return model.fit(external_predictions={"d": given}).coef


def doubleml_irm(y_n, d_n, ours):
    """doubleml: interactive model (AIPW), our folds and nuisances."""
    from doubleml import DoubleMLData, DoubleMLIRM
    from doubleml.utils import DMLDummyClassifier, DMLDummyRegressor, PSProcessorConfig

    data = DoubleMLData.from_arrays(np.zeros((len(y_n), 1)), y_n, d_n)
    model = DoubleMLIRM(
        data,
        DMLDummyRegressor(),
        DMLDummyClassifier(),
        draw_sample_splitting=False,
        ps_processor_config=PSProcessorConfig(clipping_threshold=ours.clip),
    )
    model.set_sample_splitting([_splits(ours.fold_n)])
    given = {"ml_g0": ours.control_hat_n, "ml_g1": ours.treated_hat_n, "ml_m": ours.propensity_n}
    return model.fit(external_predictions={"d": {name: value[:, None] for name, value in given.items()}}).coef


def econml_linear_dml(y_n, d_n, standardised_nq, ours, penalty=1.0):
    """econml: LinearDML, our folds, ridge nuisances by scikit-learn."""
    from econml.dml import LinearDML
    from sklearn.linear_model import Ridge

    model = LinearDML(model_y=Ridge(penalty), model_t=Ridge(penalty), cv=_splits(ours.fold_n))
    return model.fit(y_n, d_n, X=None, W=standardised_nq).const_marginal_ate()


def _splits(fold_n):
    return [(np.flatnonzero(fold_n != fold), np.flatnonzero(fold_n == fold)) for fold in np.unique(fold_n)]
