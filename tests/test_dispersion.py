"""Cosines and effective rank, on features whose dispersion is known."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coverfast.dispersion import dispersion, effective_rank

NAMES = ["cos_random", "cos_random_std", "cos_near", "cos_near_std", "rank"]


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def sampled(field, count=800, seed=0):
    """Features `(H, W, C)` at random pixels, and at those to the right of them."""
    rng = np.random.default_rng(seed)
    y, x = rng.integers(0, field.shape[0], count), rng.integers(0, field.shape[1] - 1, count)
    return field[y, x], field[y, x + 1]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def smooth(size, channels, seed=0):
    """Noise of deviation 1 that varies over a dozen pixels, around no common vector."""
    noise = np.fft.rfft2(normal(size, size, channels, seed=seed), axes=(0, 1))
    radius = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    return np.fft.irfft2(noise * np.exp(-((24 * radius) ** 2))[..., None], axes=(0, 1))


def by_loops(samples, neighbours):
    """The definitions, pair by pair."""

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / (np.sqrt(sum(a * a)) * np.sqrt(sum(b * b)))

    pairs = [cosine(samples[i], samples[j]) for i in range(len(samples)) for j in range(i)]
    near = [cosine(a, b) for a, b in zip(samples, neighbours, strict=True)]
    values = np.linalg.svd(samples - samples.mean(0), compute_uv=False) ** 2
    values = values[values > 1e-15 * values.max()] / values.sum()
    rank = np.prod(values**-values)
    return dict(zip(NAMES, (np.mean(pairs), np.std(pairs), np.mean(near), np.std(near), rank), strict=True))


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 2**16), st.sampled_from((1e-30, 1.0, 1e200)))
def test_by_the_definitions(count, channels, seed, scale):
    samples, neighbours = normal(2, count, channels, seed=seed)
    found = dispersion(scale * samples, scale * neighbours)
    assert list(found) == NAMES
    assert found == pytest.approx(by_loops(samples, neighbours), rel=1e-9, abs=1e-7)
    assert 1 <= found["rank"] <= min(channels, count - 1) + 1e-9


def test_collapsed_features_point_one_way():
    field = np.broadcast_to(normal(16), (40, 40, 16))
    expected = {"cos_random": 1, "cos_random_std": 0, "cos_near": 1, "cos_near_std": 0, "rank": 1}
    assert dispersion(*sampled(field)) == pytest.approx(expected, abs=1e-7)
    # What bfloat16 makes of equal features is no direction either, twice a thousandth is.
    assert effective_rank(field.reshape(-1, 16) + 1e-3 * normal(1600, 16) / 2) == 1
    assert effective_rank(field.reshape(-1, 16) + 2e-3 * normal(1600, 16)) > 10


def test_features_along_one_line_have_rank_1():
    samples = normal(16) + normal(300, 1) * normal(16, seed=1)
    assert effective_rank(samples) == pytest.approx(1, abs=1e-6)


def test_normal_features_use_every_direction():
    found = dispersion(normal(1000, 16), normal(1000, 16, seed=1))
    assert abs(found["cos_random"]) < 0.01
    assert found["cos_random_std"] == pytest.approx(16**-0.5, rel=0.05)
    assert abs(found["cos_near"]) < 0.05
    assert 15.5 < found["rank"] < 16
    assert effective_rank(normal(512, 512)) == pytest.approx(0.6 * 512, rel=0.05)  # as the docstring says


def test_a_smooth_field_is_alike_nearby_and_differs_afar():
    found = dispersion(*sampled(smooth(192, 12)))
    assert found["cos_near"] > 0.95
    assert abs(found["cos_random"]) < 0.05
    assert found["cos_near_std"] < found["cos_random_std"]


def test_over_dispersed_features_are_as_unlike_nearby_as_afar():
    # On a smooth field, a checkerboard of noise ten times as strong.
    board = np.indices((192, 192)).sum(0)[..., None] % 2 * 2 - 1
    found = dispersion(*sampled(smooth(192, 12) * 0.01 + board * np.abs(normal(192, 192, 1)) * normal(192, 192, 12)))
    assert found["cos_near"] == pytest.approx(found["cos_random"], abs=0.05)
    assert found["cos_near_std"] == pytest.approx(found["cos_random_std"], rel=0.15)


def test_a_vector_of_no_length_has_no_cosine():
    samples, neighbours = normal(2, 20, 4)
    whole = by_loops(samples, neighbours)
    found = dispersion(np.vstack([samples, np.zeros((5, 4))]), np.vstack([neighbours, normal(5, 4)]))
    assert [found[name] for name in NAMES[:4]] == pytest.approx([whole[name] for name in NAMES[:4]])
    neighbours[3:] = 0
    assert dispersion(samples, neighbours)["cos_near"] == pytest.approx(
        by_loops(samples[:3], neighbours[:3])["cos_near"]
    )


@pytest.mark.parametrize(
    "samples",
    [np.zeros((8, 4)), np.zeros((0, 4)), normal(1, 4), np.full((8, 4), np.nan), np.where(np.eye(8, 4), np.inf, 1)],
    ids=["zeros", "none", "one", "nan", "inf"],
)
def test_what_has_no_dispersion_is_nan(samples):
    found = dispersion(samples, samples)
    assert list(found) == NAMES
    assert np.isnan(list(found.values())).all()
    assert np.isnan(effective_rank(samples))


def test_one_value_that_is_not_finite_is_not_passed_over():
    samples, neighbours = normal(2, 20, 4)
    neighbours[7, 2] = np.nan
    assert np.isnan(list(dispersion(samples, neighbours).values())).all()


@given(arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 4)), elements=st.floats(width=32)))
def test_no_input_crashes_or_leaves_the_bounds(samples):
    found = dispersion(samples, samples[::-1])
    for name in ("cos_random", "cos_near"):
        assert np.isnan(found[name]) or abs(found[name]) <= 1 + 1e-9
    assert np.isnan(found["rank"]) or 1 <= found["rank"] <= min(samples.shape) + 1e-9
