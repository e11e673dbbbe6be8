"""Metrics against MONAI and scikit-learn on random and degenerate masks; bootstrap intervals."""

from __future__ import annotations

import math
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from coverfast import InputError
from coverfast.downstream import bootstrap
from coverfast.downstream.bootstrap import bootstrap_difference, bootstrap_mean, bootstrap_statistic
from coverfast.downstream.metrics import (
    SEGMENTATION_METRICS,
    auc,
    auc_one_vs_rest,
    dice,
    dice_per_class,
    hausdorff95,
    iou,
    score_case,
    surface_dice,
)

monai = pytest.importorskip("monai.metrics")
pytest.importorskip("scipy")

SPACINGS = st.sampled_from([0.1, 0.3, 0.5, 0.7, 1.0, 1.25, 2.5, 5.0])
TOLERANCES = st.sampled_from([0.0, 0.3, 0.5, 1.0, 2.1, 5.0])


def theirs(prediction, truth, spacing, tolerance):
    """What MONAI makes of two masks: DSC, IoU, HD95, surface Dice."""
    p, t = (torch.tensor(mask)[None, None].float() for mask in (prediction, truth))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every empty mask
        found = (
            monai.compute_dice(p, t, include_background=True, ignore_empty=False),
            monai.compute_iou(p, t, include_background=True, ignore_empty=False),
            monai.compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=list(spacing)),
            monai.compute_surface_dice(p, t, [tolerance], include_background=True, spacing=list(spacing)),
        )
    return [float(value) for value in found]


def ours(prediction, truth, spacing, tolerance):
    return [
        dice(prediction, truth),
        iou(prediction, truth),
        hausdorff95(prediction, truth, spacing),
        surface_dice(prediction, truth, spacing, tolerance),
    ]


def check(prediction, truth, spacing, tolerance):
    mine, reference = ours(prediction, truth, spacing, tolerance), theirs(prediction, truth, spacing, tolerance)
    if not (prediction.any() or truth.any()):
        # Where a class is rightly absent MONAI has no surface Dice (NaN, left out of its means). It is 1 here, as DSC
        # and IoU are (SPEC 8): finding that there is nothing to find is right.
        assert math.isnan(reference[3])
        reference[3] = 1.0
    elif not (prediction.any() and truth.any()):
        # MONAI's distance (the largest) is infinite there; so should its percentile be, but torch.quantile makes NaN
        # of what lies between two infinities. Infinite here: NaN is for classes that both lack.
        assert not math.isfinite(reference[2])
        reference[2] = math.inf
    # MONAI's distances and their percentiles are float32.
    np.testing.assert_allclose(mine, reference, rtol=1e-5, atol=1e-6, equal_nan=True)
    return mine


@st.composite
def mask_pairs(draw):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=7))
    masks = [draw(hnp.arrays(bool, shape, elements=st.booleans(), fill=st.just(draw(st.booleans())))) for _ in "ab"]
    return *masks, tuple(draw(SPACINGS) for _ in shape), draw(TOLERANCES)


@given(mask_pairs())
@settings(max_examples=150)
def test_random_masks(case):
    check(*case)


def blob(shape, *box):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*ends) for ends in box)] = True
    return mask


@pytest.mark.parametrize("shape", [(9, 12), (6, 8, 10)])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_degenerate_masks(shape, scale):
    n, spacing = len(shape), (5.0 * scale, 0.7 * scale, 1.3 * scale)[: len(shape)]
    empty, full = np.zeros(shape, bool), np.ones(shape, bool)
    one, corner, last = (
        blob(shape, *[(3, 4)] * n),
        blob(shape, *[(0, 2)] * n),
        blob(shape, *[(s - 1, s) for s in shape]),
    )
    assert check(empty, empty, spacing, 1.0) == pytest.approx([1, 1, math.nan, 1], nan_ok=True)
    for other in (one, corner, full):
        assert check(empty, other, spacing, 1.0) == [0, 0, math.inf, 0]
        assert check(other, empty, spacing, 1.0) == [0, 0, math.inf, 0]
        assert check(other, other, spacing, 0.0) == [1, 1, 0, 1]
    assert check(one, last, spacing, 1.0)[:2] == [0, 0]
    across = math.sqrt(sum(((s - 4) * mm) ** 2 for s, mm in zip(shape, spacing, strict=True)))
    assert hausdorff95(one, last, spacing) == pytest.approx(across)
    for pair in ((corner, full), (full, last), (corner, last), (one, corner)):
        check(*pair, spacing, 2.0)


def test_a_border_pixel_is_on_the_surface():
    """What lies beyond the image is not the mask: one that fills it has a surface of all border pixels."""
    full, inner = np.ones((40, 40), bool), blob((40, 40), (1, 39), (1, 39))
    assert check(full, inner, (2.0, 2.0), 1.9)[2:] == [2.0, 0.0]


def test_spacing_belongs_to_its_axis():
    one, down, right = (blob((9, 9), (r, r + 1), (c, c + 1)) for r, c in ((2, 2), (5, 2), (2, 5)))
    assert hausdorff95(one, down, (2.0, 0.5)) == 6.0
    assert hausdorff95(one, right, (2.0, 0.5)) == 1.5
    assert surface_dice(one, right, (2.0, 0.5), 1.5) == 1.0
    assert surface_dice(one, right, (2.0, 0.5), 1.4) == 0.0


def test_a_distance_of_exactly_the_tolerance_is_within():
    one, other = blob((1, 8), (0, 1), (1, 2)), blob((1, 8), (0, 1), (4, 5))
    assert surface_dice(one, other, (0.1, 0.1), 0.3) == 1.0  # 3 * 0.1 > 0.3 in floating point


@st.composite
def maps(draw):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6))
    classes = draw(st.integers(2, 5))
    arrays = [draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, classes - 1), fill=st.just(0))) for _ in "ab"]
    return *arrays, classes, tuple(draw(SPACINGS) for _ in shape), draw(TOLERANCES)


@given(maps())
def test_all_classes_at_once_are_each_by_itself(case):
    prediction, truth, classes, spacing, tolerance = case
    scores = score_case(prediction, truth, classes, spacing, tolerance)
    assert list(scores) == list(SEGMENTATION_METRICS)
    for label in range(1, classes):
        expected = ours(prediction == label, truth == label, spacing, tolerance)
        np.testing.assert_allclose([s[label - 1] for s in scores.values()], expected, rtol=1e-12, equal_nan=True)
    np.testing.assert_array_equal(dice_per_class(prediction, truth, classes), scores["dsc"])


sklearn_metrics = pytest.importorskip("sklearn.metrics")


@st.composite
def scored(draw):
    count = draw(st.integers(2, 30))
    # Few different values: many ties.
    scores = draw(hnp.arrays(np.float64, count, elements=st.integers(0, 6).map(lambda v: v / 6)))
    return scores, draw(hnp.arrays(bool, count))


@given(scored())
@example((np.array([0.5, 0.5]), np.array([True, False])))
def test_auc(case):
    scores, labels = case
    if labels.all() or not labels.any():
        assert math.isnan(auc(scores, labels))  # scikit-learn warns, or refuses by its version
    else:
        assert auc(scores, labels) == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=1e-12)


@given(st.integers(3, 5), st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_auc_one_vs_rest(classes, more, seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.concatenate([np.arange(classes), rng.integers(classes, size=more)]))
    probabilities = rng.dirichlet(np.ones(classes), len(labels)).round(1) + 0.05
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    expected = sklearn_metrics.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert auc_one_vs_rest(probabilities, labels) == pytest.approx(expected, abs=1e-12)
    # A class that no case has: scikit-learn refuses, here the mean is over the others.
    wider = np.concatenate([probabilities, np.zeros((len(labels), 1))], axis=1)
    assert auc_one_vs_rest(wider, labels) == auc_one_vs_rest(probabilities, labels)
    assert math.isnan(auc_one_vs_rest(probabilities, np.zeros(len(labels), int)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dice(np.zeros((2, 2)), np.zeros((2, 2), bool)), "prediction must be a boolean mask, got float64"),
        (lambda: iou(np.zeros((2, 2), bool), np.zeros((2, 3), bool)), r"the shape of the truth, \(2, 3\)"),
        (lambda: hausdorff95(*[np.zeros((2, 2), bool)] * 2, (1.0,)), "spacing must be 2 positive numbers"),
        (lambda: surface_dice(*[np.zeros((2, 2), bool)] * 2, (1.0, 1.0), -1), "tolerance must be at least 0 mm"),
        (lambda: dice_per_class(np.full((2, 2), 3), np.zeros((2, 2), int), 3), "class indices must be below 3, got 3"),
        (lambda: dice_per_class(np.zeros((2, 2), int), np.full((2, 2), 3), 3), "class indices must be below 3, got 3"),
        (lambda: auc(np.array([0.1, np.nan]), np.array([0, 1])), "scores must be finite, got 1"),
        (lambda: auc_one_vs_rest(np.zeros((3, 2)), np.zeros(2)), r"must be \(N, K\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    zeros = np.zeros((2, 2), bool)
    assert dice(zeros, zeros) == 1
    with pytest.raises(InputError, match=r"pip install coverfast\[io\]"):
        hausdorff95(zeros, zeros, (1.0, 1.0))


def test_the_interval_of_a_mean_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).gamma(2.0, size=40)
    found = bootstrap_mean(values)
    ends = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    assert (found.value, found.cases) == (values.mean(), 40)
    assert (found.low, found.high) == pytest.approx(ends, abs=0.05 * values.std())
    assert found == bootstrap_mean(values)
    assert found != bootstrap_mean(values, seed=1)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [i.low <= 1.0 <= i.high for i in (bootstrap_mean(rng.gamma(4.0, 0.25, size=50)) for _ in range(200))]
    assert 0.88 <= np.mean(inside) <= 0.99


def test_values_that_are_not_finite_are_no_cases():
    values = np.array([1.0, np.nan, 2.0, np.inf, 4.0])
    assert bootstrap_mean(values) == bootstrap_mean(values[[0, 2, 4]])
    assert bootstrap_mean(values).plain()["cases"] == 3
    none = bootstrap_mean(np.array([np.nan]))
    assert none.plain() == {"value": None, "low": None, "high": None, "cases": 0}
    assert bootstrap_mean(np.array([0.5])).plain() == {"value": 0.5, "low": None, "high": None, "cases": 1}


def test_cases_of_one_patient_are_drawn_together():
    values = np.repeat(np.random.default_rng(1).normal(size=12), 10)
    patients = [f"p{i // 10}" for i in range(120)]
    alone, together = bootstrap_mean(values), bootstrap_mean(values, groups=patients)
    once = bootstrap_mean(values[::10])
    assert together.value == alone.value
    assert (together.low, together.high) == pytest.approx((once.low, once.high))
    assert together.high - together.low > 2 * (alone.high - alone.low)
    # No patient known: each case by itself.
    assert bootstrap_mean(values, groups=[""] * 120) == alone
    assert math.isnan(bootstrap_mean(values, groups=["p"] * 120).low)


def test_paired_differences_are_sharper_than_the_means():
    rng = np.random.default_rng(2)
    hard = rng.normal(size=30)
    a, b = hard + 0.1 + 0.01 * rng.normal(size=30), hard
    found = bootstrap_difference(a, b)
    assert 0.08 < found.low < found.value < found.high < 0.12
    mean = bootstrap_mean(a)
    assert mean.high - mean.low > 20 * (found.high - found.low)
    b[3] = np.nan
    assert bootstrap_difference(a, b).cases == 29


def test_the_interval_of_an_auc(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 300)
    rng = np.random.default_rng(5)
    labels = np.arange(60) % 2
    scores = labels + rng.normal(size=60)
    found = bootstrap_statistic(auc, scores, labels)
    assert found.value == auc(scores, labels)
    assert 0.5 < found.low < found.value < found.high < 1
    assert found == bootstrap_statistic(auc, scores, labels, groups=[str(i) for i in range(60)])
    # One positive among three: a draw without it has no AUC, a third of all.
    assert bootstrap_statistic(auc, np.array([0.1, 0.2, 0.9]), np.array([0, 0, 1])).plain()["low"] is not None
    assert bootstrap_statistic(auc, np.array([0.1, 0.2]), np.array([0, 0])).plain()["value"] is None
