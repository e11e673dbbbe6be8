"""Statistics of studies: intervals over seeds and test cases, correlation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from coverfast import InputError
from coverfast.downstream.bootstrap import Interval
from coverfast.study.statistics import apart, correlation, crossed_interval


def test_interval_of_one_seed_is_the_percentile_bootstrap_of_scipy() -> None:
    scores = np.random.default_rng(1).beta(5, 2, 24)
    found = crossed_interval(scores[None])
    whole = stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    assert (found.value, found.cases) == (pytest.approx(scores.mean()), 24)
    assert (found.low, found.high) == pytest.approx((whole.low, whole.high), abs=0.004)


def test_interval_over_seeds_and_cases_is_that_of_drawing_both() -> None:
    rng = np.random.default_rng(2)
    scores = rng.normal(0.6, 0.05, (4, 1)) + rng.normal(0, 0.1, 16) + rng.normal(0, 0.02, (4, 16))
    means = []
    for _ in range(10_000):
        seeds, cases = rng.integers(0, 4, 4), rng.integers(0, 16, 16)
        means.append(scores[seeds][:, cases].mean())
    found, width = crossed_interval(scores), np.ptp(np.quantile(means, (0.025, 0.975)))
    assert (found.low, found.high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.04 * width)
    assert found.high - found.low > 1.2 * np.ptp(crossed_interval(scores.mean(axis=0)[None])[1:3])


def test_cases_of_one_patient_are_drawn_together() -> None:
    scores = np.random.default_rng(3).random((2, 12))
    twice, patients = np.repeat(scores, 2, axis=1), [f"p{i:02d}" for i in range(12) for _ in range(2)]
    assert crossed_interval(twice, patients)[1:3] == pytest.approx(crossed_interval(scores)[1:3], abs=0.01)
    assert np.ptp(crossed_interval(twice)[1:3]) < 0.9 * np.ptp(crossed_interval(twice, patients)[1:3])
    assert crossed_interval(scores, [""] * 12) == crossed_interval(scores)


@given(arrays(np.float64, (3, 8), elements=st.floats(0, 1)), st.floats(-0.5, 0.5))
def test_differences_are_paired_in_seed_and_case(scores: np.ndarray, gain: float) -> None:
    found = crossed_interval((scores + gain) - scores)
    assert found[:3] == pytest.approx((gain, gain, gain), abs=1e-12)


def test_intervals_are_apart_only_without_a_value_in_common() -> None:
    low, high = Interval(0.5, 0.4, 0.6, 9), Interval(0.7, 0.61, 0.8, 9)
    assert apart(low, high)
    assert apart(high, low)
    assert not apart(low, high._replace(low=0.6))


@given(arrays(np.float64, (2, 12), elements=st.floats(0, 1).map(lambda v: round(v, 3))))
def test_correlation_and_p_value_are_those_of_the_t_distribution(runs: np.ndarray) -> None:
    found = correlation(*runs)
    if np.ptp(runs, axis=1).min() == 0:
        assert found[:2] == (None, None)
        return
    r = float(np.corrcoef(runs)[0, 1])
    assert found.r == pytest.approx(r, abs=1e-9)
    if abs(r) < 0.999999:
        assert found.p == pytest.approx(2 * stats.t.sf(abs(r) * np.sqrt(10 / (1 - r * r)), 10), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("scores", [np.zeros(3), np.zeros((0, 3)), np.array([[0.5, np.nan]])])
def test_scores_that_make_no_interval_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(InputError, match="scores must be"):
        crossed_interval(scores)


def test_scores_that_make_no_correlation_are_refused() -> None:
    for a, b in ((np.zeros(2), np.zeros(2)), (np.zeros(4), np.zeros(3)), (np.full(4, np.nan), np.zeros(4))):
        with pytest.raises(InputError, match="at least 3 finite numbers"):
            correlation(a, b)
