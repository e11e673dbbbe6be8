"""The scalar draws of the views: recomputed in plain Python from the uniforms, in the order that a seed means."""

from dataclasses import fields, replace
from math import ceil, cos, floor, log, pi, sin, sqrt, tan

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import views_of

from coverfast import ViewSettings
from coverfast.philox import STREAM_SCALARS, scalar_uniform, uniform
from coverfast.view_draws import NO_BLUR, Draws, blur_weights, draw, expected_mask

SETTINGS = ViewSettings(strength=0.7, blur=1.5, noise=0.3, translation=0.4)


# --- uniforms ---------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 4),
    iteration=st.integers(0, 2**32 - 1),
    samples=st.lists(st.integers(0, 2**32 - 1), max_size=4),
    count=st.integers(0, 41),
)
def test_scalars_are_the_uniforms(seed, stream, iteration, samples, count):
    found = scalar_uniform(seed, stream, iteration, np.array(samples, dtype=np.int64), count)
    expected = uniform(seed, stream, iteration, torch.tensor(samples, dtype=torch.long), count)
    assert found.dtype == np.float64
    assert found.shape == (len(samples), count)
    assert (found == expected.double().numpy()).all()


# --- by hand ----------------------------------------------------------------------------------------------------------


def by_hand(seed, iteration, sample, size, crop, settings):
    """The draws of one sample, one uniform after the other."""
    n, s = len(size), settings
    order = uniform(seed, STREAM_SCALARS, iteration, torch.tensor([sample]), 200)[0].double().tolist()
    left = iter(order[: (1 if n == 2 else 3) + n * (n - 1) + 2 * n + n + 11 + s.boxes * (2 * n + 1)])

    def signed(most):
        return (2 * next(left) - 1) * most

    matrix = np.eye(n)
    for i, j in [(0, 1)] if n == 2 else [(1, 2), (0, 2), (0, 1)]:
        angle, turn = signed(s.strength * s.rotation), np.eye(n)
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = cos(angle), sin(angle), -sin(angle), cos(angle)
        matrix = matrix @ turn
    shear = np.eye(n)
    for i in range(n):
        for j in range(n):
            if i != j:
                shear[i, j] = tan(signed(s.strength * s.shear))
    matrix = matrix @ shear @ np.diag([1 + signed(s.strength * s.scale) for _ in range(n)])
    shift = [signed(s.strength * s.translation) * length for length in size]

    origin = []
    for length, most in zip(size, crop, strict=True):
        step = floor(next(left) * (abs(length - most) + 1))
        origin.append(step if length > most else -step)

    def sometimes():
        return next(left) < s.probability

    noise = sometimes() * next(left) * s.noise
    blur = sometimes() * next(left) * s.blur
    contrast = sometimes() * (2 * next(left) - 1) * s.contrast
    brightness = sometimes() * next(left) * s.brightness
    brightness *= sqrt(-2 * log(1 - next(left))) * cos(2 * pi * next(left))

    painted, boxes = sometimes(), []
    for index in range(s.boxes):
        further = next(left) < 0.95
        painted = painted and (index == 0 or further)
        sides = []
        for length in crop:
            least = max(1, ceil(length / 10))
            sides.append(least + floor(next(left) * (max(least, 4 * length // 30) - least + 1)))
        starts = [floor(next(left) * (length - side + 1)) for length, side in zip(crop, sides, strict=True)]
        box = [[start, start + side] for start, side in zip(starts, sides, strict=True)]
        boxes.append(box if painted else [[0, 0]] * n)
    assert next(left, None) is None
    theta = np.column_stack([matrix, shift])
    return Draws(theta, np.array(origin), noise, blur, contrast, brightness, np.array(boxes).reshape(-1, n, 2))


@pytest.mark.parametrize("settings", [SETTINGS, ViewSettings(), replace(SETTINGS, boxes=0), replace(SETTINGS, boxes=1)])
@pytest.mark.parametrize(
    ("sizes", "crop"),
    [([[90, 61], [40, 33], [32, 70]], (32, 48)), ([[40, 60, 35], [9, 8, 50]], (8, 48, 31))],
    ids=str,
)
def test_every_draw_by_hand(sizes, crop, settings):
    samples, sizes = np.array([0, 5, 2**31 + 7][: len(sizes)]), np.array(sizes)
    for seed, iteration in ((0, 1), (2**64 - 1, 2**24 + 1)):
        found = draw(seed, iteration, samples, sizes, crop, settings)
        for index, (sample, size) in enumerate(zip(samples.tolist(), sizes.tolist(), strict=True)):
            expected = by_hand(seed, iteration, sample, size, crop, settings)
            for field in fields(Draws):
                ours, theirs = getattr(found, field.name)[index], getattr(expected, field.name)
                if field.name in ("origin", "boxes"):
                    assert ours.dtype == np.int64
                    np.testing.assert_array_equal(ours, theirs, field.name)
                else:
                    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12, err_msg=field.name)


# --- what the draws are -----------------------------------------------------------------------------------------------


def assert_same_draws(found, expected):
    for field in fields(Draws):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name), field.name)


@given(st.integers(2, 3), st.integers(0, 2**64 - 1), st.integers(0, 6), st.integers(0, 3))
def test_any_split_of_the_batch_gives_the_same_draws(n, seed, batch, boxes):
    drawn = np.random.default_rng(batch)
    sizes, samples = drawn.integers(8, 60, (batch, n)), drawn.permutation(100)[:batch]
    settings = replace(SETTINGS, boxes=boxes)
    whole = draw(seed, 3, samples, sizes, (20,) * n, settings)
    for first in range(batch + 1):
        for part in (slice(0, first), slice(first, batch)):
            found = draw(seed, 3, samples[part], sizes[part], (20,) * n, settings)
            assert_same_draws(found, Draws(**{f.name: getattr(whole, f.name)[part] for f in fields(Draws)}))


def test_each_origin_is_as_likely():
    sizes = np.tile([[12, 8, 5]], (3000, 1))
    origins = draw(1, 1, np.arange(3000), sizes, (8, 8, 9), SETTINGS).origin
    for axis, expected in enumerate((range(5), (0,), range(-4, 1))):
        values, counts = np.unique(origins[:, axis], return_counts=True)
        assert values.tolist() == list(expected)
        assert counts.min() > 0.85 * 3000 / len(expected)


@pytest.mark.parametrize("crop", [(1, 7), (9, 10), (31, 384), (3, 16, 200)], ids=str)
def test_boxes_lie_in_the_crop_and_have_the_sides_asked_for(crop):
    sizes = np.tile([crop], (500, 1))
    boxes = draw(2, 1, np.arange(500), sizes, crop, replace(SETTINGS, probability=1.0)).boxes
    start, stop = boxes[..., 0], boxes[..., 1]
    there = (stop > start).all(-1)
    assert there[:, 0].all()
    assert ((stop == start).all(-1) | there).all()
    for axis, length in enumerate(crop):
        least = max(1, ceil(length / 10))
        sides = (stop - start)[..., axis][there]
        assert set(sides.tolist()) == set(range(least, max(least, 4 * length // 30) + 1))
        assert start[..., axis].min() == 0
        assert stop[..., axis].max() == length


def test_probability_zero_leaves_the_appearance_alone():
    found = draw(3, 1, np.arange(50), np.full((50, 2), 30), (20, 20), replace(SETTINGS, probability=0.0))
    for name in ("noise", "blur", "contrast", "brightness", "boxes"):
        assert not getattr(found, name).any(), name
    assert found.theta.std() > 0


def test_a_blur_too_narrow_to_show_has_no_taps():
    sigma = np.array([0.0, 0.1, 0.6])
    assert blur_weights(sigma, NO_BLUR / 2).shape == (3, 0)
    weights = blur_weights(sigma, 0.6)
    assert weights.shape == (3, 2 * ceil(4 * 0.6) + 1)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_array_equal(weights[0].astype(np.float32), np.eye(7, dtype=np.float32)[3])
    np.testing.assert_allclose(weights, weights[:, ::-1])
    # Where the blur is left out, its weights would round to none beyond the centre.
    assert np.float32(1 + 2 * np.exp(-0.5 / NO_BLUR**2)) == 1


# --- how much of view b view a shows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "crop"), [([[30, 40], [19, 25], [60, 26]], (13, 25)), ([[20, 14, 31], [9, 30, 13]], (7, 13, 13))], ids=str
)
def test_the_expected_mask_is_that_of_the_views(sizes, crop):
    sizes = torch.tensor(sizes).repeat(20, 1)
    views = views_of(
        torch.zeros(len(sizes), 1, *sizes.amax(0)), crop, sizes=sizes, seed=0, iteration=0, settings=SETTINGS
    )
    # Seven points an axis, from the first pixel to the last.
    points = views.mask[(..., *(slice(None, None, (c - 1) // 6) for c in crop))]
    found = expected_mask(sizes.numpy(), crop, SETTINGS)
    assert 0.1 < found < 0.9
    assert found == pytest.approx(float(points.double().mean()), abs=2.5 / points.numel())
    assert found == pytest.approx(float(views.mask.double().mean()), abs=0.1)


def test_no_map_shows_everything():
    assert expected_mask(np.full((5, 3), 20), (16, 20, 4), replace(SETTINGS, strength=0.0)) == 1
