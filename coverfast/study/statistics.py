"""Means over seeds and test cases with intervals, and how well two runs agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, require
from coverfast.downstream.bootstrap import LEVEL, Interval

Array = NDArray[np.float64]

#: Replicates that are drawn, and the key they are drawn with.
REPLICATES, _KEY = 10_000, 0xB007
#: What an interval is, for whoever reads one.
METHOD = (
    f"Intervals: {LEVEL:.0%} percentile bootstrap of the mean, {REPLICATES} replicates, seeds and test cases drawn "
    "independently with replacement, cases of one patient together; a difference is paired in seed and case. With few "
    "seeds they are somewhat too narrow: of n seeds the bootstrap finds (n - 1) / n of the variance."
)


def apart(a: Interval, b: Interval) -> bool:
    """Whether two intervals have no value in common."""
    return a.low > b.high or b.low > a.high


def crossed_interval(
    scores: NDArray[Any], groups: Sequence[str] | None = None, replicates: int = REPLICATES
) -> Interval:
    """The mean of scores `(seeds, cases)` with the percentile interval of a bootstrap over both.

    A replicate draws as many seeds and as many cases as there are, with replacement and independently of each other,
    and takes the mean over the drawn seeds of the drawn cases: every seed saw the same test cases. The same scores give
    the same interval, and scores of one shape are drawn alike, so that `crossed_interval(a - b)` is the interval of a
    difference, paired in seed and case. Of n seeds the bootstrap finds (n - 1) / n of their variance: with three seeds
    an interval is somewhat too narrow.

    groups: the patient of each case: cases of one patient are drawn together; "" is a patient of its own.

    Raises:
        InputError: unless scores are two axes of finite numbers, at least one of each.
    """
    scores = np.asarray(scores, np.float64)
    require(
        scores.ndim == 2 and scores.size > 0 and bool(np.isfinite(scores).all()),
        f"scores must be (seeds, cases) of finite numbers, got shape {scores.shape}",
    )
    names = [g or f"\0{i}" for i, g in enumerate(groups or [""] * scores.shape[1])]
    require(len(names) == scores.shape[1], f"groups must be one for each of {scores.shape[1]} cases, got {len(names)}")
    _, patient = np.unique(names, return_inverse=True)
    rng = np.random.default_rng(_KEY)
    seeds, patients = (rng.multinomial(n, np.full(n, 1 / n), replicates) for n in (len(scores), int(patient.max()) + 1))
    cases = patients[:, patient]
    means = ((seeds @ scores / len(scores)) * cases).sum(axis=1) / cases.sum(axis=1)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(float(scores.mean()), float(low), float(high), scores.shape[1])


class Correlation(NamedTuple):
    """Pearson's coefficient of pairs and its two-sided p-value; None where a run scores all alike."""

    r: float | None
    p: float | None
    pairs: int


def correlation(a: NDArray[Any], b: NDArray[Any]) -> Correlation:
    """Pearson's correlation of two runs' scores of the same cases, `(N,)` each (COVER Table 4).

    Raises:
        InputError: for fewer than three cases, scores that are not finite, or without scipy.
    """
    try:
        from scipy.stats import pearsonr
    except ImportError as error:
        raise InputError("the p-value of a correlation needs the extra: pip install coverfast[io]") from error
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    require(
        a.shape == b.shape and a.ndim == 1 and len(a) >= 3 and bool(np.isfinite([a, b]).all()),
        f"scores must be two lists of at least 3 finite numbers each, got shapes {a.shape} and {b.shape}",
    )
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(None, None, len(a))
    found = pearsonr(a, b)
    return Correlation(float(found.statistic), float(found.pvalue), len(a))
