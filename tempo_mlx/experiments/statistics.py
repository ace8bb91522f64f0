"""Statistics of one value for each prompt, computed by SciPy and statsmodels.

With fewer prompts than a statistic needs, it is left out and a note says so.
"""

from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame, Series
from scipy import special, stats
from statsmodels.api import OLS, WLS  # type: ignore[import-untyped]
from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]

from ..errors import TempoError

CONFIDENCE = 0.95
#: Fewest prompts for an interval or a test; two would leave one degree of freedom.
MIN_PROMPTS = 3
#: Fewest prompts for a bootstrap interval; with fewer, resamples repeat too often.
MIN_BOOTSTRAP = 6
#: Fewest prompts for a signed-rank test; with five its smallest p is 2 / 2^5 = 0.06.
MIN_WILCOXON = 6
#: Largest |z| that is not an outlier's.
OUTLIER = 3.0

TOO_SMALL = "n too small"
NO_VARIANCE = "no variance between prompts"

#: Spread that is rounding, relative to the size of the values.
ROUNDING = 1e-12


def check_finite(name: str, values: Any) -> np.ndarray:
    """The values as an array of floats.

    Raises:
        TempoError: naming the values and the place of the first that is NaN or infinite.
    """
    array = np.asarray(values, float)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        place = ", ".join(str(i) for i in bad[0])
        raise TempoError(f"{name} must be finite, got {array[tuple(bad[0])]} at [{place}]")
    return array


def t_interval(n: Any, mean: Any, sd: Any) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of Student's t-interval of means over n values with standard deviations sd.

    Args:
        n, mean, sd: arrays of one shape. NaN where n is below :data:`MIN_PROMPTS`.
    """
    n, mean, sd = np.asarray(n), np.asarray(mean, float), np.asarray(sd, float)
    low, high = (np.full(mean.shape, np.nan) for _ in range(2))
    given = (n >= MIN_PROMPTS) & (sd > 0)
    scale = sd[given] / np.sqrt(n[given])
    bounds = stats.t.interval(CONFIDENCE, n[given] - 1, loc=mean[given], scale=scale)
    low[given], high[given] = bounds
    # SciPy has no interval of width 0.
    exact = (n >= MIN_PROMPTS) & (sd == 0)
    low[exact] = high[exact] = mean[exact]
    return low, high


def bootstrap_interval(
    values: Any, resamples: int, rng: np.random.Generator, axis: int = -1
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the BCa bootstrap interval of the mean (Efron 1987), resampling prompts.

    A prompt is a cluster of tokens, heads and runs, and its value is the cluster's mean, so drawing
    values with replacement draws clusters.

    Args:
        values: one for each prompt along the axis.

    Returns:
        Bounds; NaN if there are fewer than :data:`MIN_BOOTSTRAP` values or they do not vary.
    """
    values = check_finite("values", values)
    if values.shape[axis] < MIN_BOOTSTRAP or np.any(_constant(values, axis)):
        empty = np.full(values.mean(axis=axis).shape, np.nan)
        return empty, empty
    found = stats.bootstrap(
        (values,),
        np.mean,
        axis=axis,
        n_resamples=resamples,
        confidence_level=CONFIDENCE,
        method="BCa",
        rng=rng,
        vectorized=True,
    )
    return found.confidence_interval.low, found.confidence_interval.high


def _constant(values: np.ndarray, axis: int = -1) -> np.ndarray:
    spread = np.ptp(values, axis=axis)
    return np.asarray(spread <= ROUNDING * np.abs(values).max(axis=axis))


def differences(first: Series, second: Series) -> Series:
    """second - first, for the prompts in both.

    Args:
        first, second: values indexed by prompt.

    Raises:
        TempoError: if a prompt occurs twice, or a value is not finite.
    """
    for name, values in (("first", first), ("second", second)):
        if values.index.has_duplicates:
            twice = values.index[values.index.duplicated()][0]
            raise TempoError(f"{name} must have one value for each prompt, {twice!r} has several")
        check_finite(name, values)
    shared = first.index.intersection(second.index)
    return second.loc[shared] - first.loc[shared]


def mean_tests(values: Any) -> dict[str, Any]:
    """Test whether the mean of differences is 0.

    Args:
        values: one difference for each prompt; siblings minus controls, or one
            condition minus another.

    Returns:
        n, t, df, p_t (paired t-test; Student 1908), w, p_w (signed-rank test; Wilcoxon 1945), d_z,
        d_z_low, d_z_high (see :func:`cohen_d_z`) and note: why some are None.

    Raises:
        TempoError: if a value is not finite.
    """
    values = check_finite("values", values)
    n = len(values)
    found: dict[str, Any] = dict.fromkeys(
        ("t", "df", "p_t", "w", "p_w", "d_z", "d_z_low", "d_z_high")
    )
    found = {"n": n, **found, "note": ""}
    if n < MIN_PROMPTS:
        return found | {"note": TOO_SMALL}
    if _constant(values):
        return found | {"note": NO_VARIANCE}
    t = stats.ttest_1samp(values, 0.0)
    d_z, low, high = cohen_d_z(values)
    found |= {"t": float(t.statistic), "df": int(t.df), "p_t": float(t.pvalue)}
    found |= {"d_z": d_z, "d_z_low": low, "d_z_high": high}
    if n < MIN_WILCOXON:
        return found | {"note": f"{TOO_SMALL} for Wilcoxon"}
    w = stats.wilcoxon(values)
    return found | {"w": float(w.statistic), "p_w": float(w.pvalue)}


def cohen_d_z(values: Any) -> tuple[float, float, float]:
    """Cohen's d for paired values, and its interval.

    d_z = mean of the differences over their standard deviation (Cohen 1988, p. 48; named d_z in
    Lakens 2013), not corrected for small n. The interval is that of the noncentrality of t over
    sqrt(n) (Cumming and Finch 2001).

    Args:
        values: at least two differences that are not all the same.
    """
    values = check_finite("values", values)
    n = len(values)
    t = float(stats.ttest_1samp(values, 0.0).statistic)
    tail = (1 - CONFIDENCE) / 2
    low, high = (special.nctdtrinc(n - 1, p, t) for p in (1 - tail, tail))
    return t / np.sqrt(n), float(low) / np.sqrt(n), float(high) / np.sqrt(n)


def holm(p_values: Any) -> np.ndarray:
    """p-values of one family, adjusted by Holm (1979). NaN stays NaN and is not counted."""
    adjusted = np.array(p_values, float)
    given = np.isfinite(adjusted)
    if given.any():
        adjusted[given] = multipletests(adjusted[given], method="holm")[1]
    return adjusted


def influence(values: Series) -> DataFrame:
    """How each prompt influences the mean.

    Args:
        values: indexed by prompt, finite.

    Returns:
        Indexed as the values: value, z (over the sample's standard deviation), outlier (|z| > 3;
        impossible below 11 values, where |z| is at most (n - 1) / sqrt(n), Shiffler 1988), and
        leave-one-out: mean_without, dfbetas (shift of the mean in standard errors; Belsley, Kuh
        and Welsch 1980), influential (|dfbetas| > 2 / sqrt(n), theirs), p_without (of the t-test).
        NaN and NA below 3 values, or where they do not vary.
    """
    array = check_finite("values", values)
    n = len(array)
    found = DataFrame({"value": array}, index=values.index)
    if n < MIN_PROMPTS or _constant(array):
        names = ("z", "mean_without", "dfbetas", "p_without")
        nothing: dict[str, Any] = dict.fromkeys(names, np.nan)
        nothing |= dict.fromkeys(("outlier", "influential"), pd.NA)
        return found.assign(**nothing)
    without = np.array([np.delete(array, i) for i in range(n)])
    tested = (n > MIN_PROMPTS) & ~_constant(without)
    p_without = np.full(n, np.nan)
    p_without[tested] = stats.ttest_1samp(without[tested], 0.0, axis=1).pvalue
    dfbetas = OLS(array, np.ones(n)).fit().get_influence().dfbetas[:, 0]
    z = stats.zscore(array, ddof=1)
    return found.assign(
        z=z,
        outlier=np.abs(z) > OUTLIER,
        mean_without=without.mean(axis=1),
        dfbetas=dfbetas,
        influential=np.abs(dfbetas) > 2 / np.sqrt(n),
        p_without=p_without,
    )


def clustered_mean(
    values: np.ndarray, clusters: np.ndarray, weights: np.ndarray
) -> tuple[float, float, float, int]:
    """A weighted mean with an interval that allows for correlation within clusters.

    The standard error is cluster-robust (Liang and Zeger 1986), with t of clusters - 1 degrees of
    freedom.

    Args:
        values, clusters (numbers), weights: [N].

    Returns:
        Mean, bounds (NaN for fewer than :data:`MIN_PROMPTS` clusters), number of clusters.
    """
    values, n = check_finite("values", values), len(np.unique(clusters))
    if n < MIN_PROMPTS or _constant(values):
        return float(np.average(values, weights=weights)), np.nan, np.nan, n
    fit = WLS(values, np.ones(len(values)), weights=weights).fit(
        cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True
    )
    low, high = fit.conf_int(alpha=1 - CONFIDENCE)[0]
    return float(fit.params[0]), float(low), float(high), n
