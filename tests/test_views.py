"""SeVR: ranges, geometry and reproducibility of the two views (SPEC 5)."""

from dataclasses import replace
from math import pi

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_near, randn, refused, views_of

from coverfast import AffineDVF, ViewSettings, affine_dvf, inside_mask, warp
from coverfast.appearance import blur
from coverfast.philox import STREAM_FILL, STREAM_NOISE, normal, uniform
from coverfast.view_draws import affine_draws, blur_weights, draw, sample_affine

PLAIN = ViewSettings(probability=0.0)  # the spatial map alone
STILL = ViewSettings(strength=0.0, probability=1.0, noise=0, blur=0, contrast=0, brightness=0, boxes=0)


def images(batch, *size, channels=1, seed=0):
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def cut(x, origin, crop):
    return x[(..., *(slice(o, o + c) for o, c in zip(origin, crop, strict=True)))]


def crops(x, views):
    """The crop that view a was made of, before its appearance."""
    return torch.stack([cut(i, o, views.target.size) for i, o in zip(x, views.target.origin.tolist(), strict=True)])


def uniforms(batch, n, seed=0):
    return torch.rand(batch, affine_draws(n), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(u, n, strength=1.0):
    """Rotation, shear, scale and translation as SPEC 5 builds them, from one row of uniforms."""
    s = 2 * np.asarray(u) - 1
    turns, shears = (1, 2) if n == 2 else (3, 6)
    angles, sh = s[:turns] * strength * pi / 9, np.tan(s[turns : turns + shears] * strength * pi / 32)
    scales = 1 + s[turns + shears : turns + shears + n] * strength * 0.5
    shift = s[turns + shears + n :] * strength * 0.2

    def turn(angle, i, j):
        r = np.eye(n)
        r[[i, j], [i, j]], r[i, j], r[j, i] = np.cos(angle), np.sin(angle), -np.sin(angle)
        return r

    if n == 2:
        rotation = turn(angles[0], 0, 1)
    else:
        rotation = turn(angles[0], 1, 2) @ turn(angles[1], 0, 2) @ turn(angles[2], 0, 1)
    shear = np.eye(n)
    shear[~np.eye(n, dtype=bool)] = sh
    return rotation, shear, scales, shift


@pytest.mark.parametrize("n", [2, 3])
@given(st.floats(0, 1.9), st.integers(0, 2**16))
def test_the_matrix_is_rotation_shear_scale(n, strength, seed):
    sizes, u = torch.tensor([[40, 60, 20][:n]]), uniforms(1, n, seed)
    theta = sample_affine(u.numpy(), sizes.numpy(), ViewSettings(strength=strength))[0]
    rotation, shear, scales, shift = parts(u[0], n, strength)
    np.testing.assert_allclose(theta[:, :n], rotation @ shear @ np.diag(scales), atol=1e-12)
    np.testing.assert_allclose(theta[:, n], shift * sizes[0].numpy(), atol=1e-12)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("n", [2, 3])
def test_each_range_is_filled(n, strength):
    sizes, alone = torch.tensor([[40, 60, 20][:n]]).expand(4000, n), {"rotation": 0, "shear": 0, "scale": 0}
    alone["translation"] = 0

    def sample(**which):
        settings = ViewSettings(strength=strength, **(alone | which))
        return torch.from_numpy(sample_affine(uniforms(4000, n).numpy(), sizes.numpy(), settings))

    def fills(values, low, high):
        assert float(values.min()) >= low - 1e-9
        assert float(values.max()) <= high + 1e-9
        assert float(values.max() - values.min()) > 0.95 * (high - low)
        assert float(values.mean()) == pytest.approx((low + high) / 2, abs=0.05 * (high - low))

    eye = torch.eye(n).double().expand(4000, n, n)
    turned = sample(rotation=pi / 9)[:, :, :n]
    assert_near(turned @ turned.mT, eye, atol=1e-12)
    assert_near(torch.linalg.det(turned), torch.ones(4000).double(), atol=1e-12)
    if n == 2:
        fills(torch.atan2(turned[:, 0, 1], turned[:, 0, 0]), -strength * pi / 9, strength * pi / 9)
    sheared = sample(shear=pi / 32)[:, :, :n]
    assert (sheared.diagonal(dim1=1, dim2=2) == 1).all()
    for i, j in [(i, j) for i in range(n) for j in range(n) if i != j]:
        fills(sheared[:, i, j].atan(), -strength * pi / 32, strength * pi / 32)
    scaled = sample(scale=0.5)[:, :, :n]
    assert torch.equal(scaled, torch.diag_embed(scaled.diagonal(dim1=1, dim2=2)))
    for axis in range(n):
        fills(scaled[:, axis, axis], 1 - strength / 2, 1 + strength / 2)
    moved = sample(translation=0.2)
    assert torch.equal(moved[:, :, :n], eye)
    for axis in range(n):
        fills(moved[:, axis, n] / sizes[0, axis], -0.2 * strength, 0.2 * strength)


@pytest.mark.parametrize("size", [(40, 50), (14, 16, 12)], ids=str)
def test_no_strength_is_no_map(size):
    x, crop = images(3, *size), tuple(s - 5 for s in size)
    views = views_of(x, crop, settings=replace(PLAIN, strength=0.0))
    assert not views.dvf.any()
    assert views.mask.all()
    assert torch.equal(views.x_b, crops(x, views))
    assert_near(views.x_a, views.x_b, atol=1e-6)


@pytest.mark.parametrize(("size", "crop"), [((50, 41), (32, 24)), ((20, 17, 18), (12, 9, 16))], ids=str)
def test_view_b_is_the_crop_of_the_warped_image(size, crop):
    x = images(4, *size, channels=2)
    views = views_of(x, crop, seed=5, settings=PLAIN)
    whole = affine_dvf(views.target.theta, size)
    origins = views.target.origin.tolist()
    assert len({tuple(o) for o in origins}) > 1
    for b, origin in enumerate(origins):
        assert all(0 <= o <= s - c for o, s, c in zip(origin, size, crop, strict=True))
        assert torch.equal(views.dvf[b], cut(whole[b], origin, crop))
        assert_near(views.x_b[b], cut(warp(x, whole)[b], origin, crop), atol=2e-4)
    assert_near(views.x_a, crops(x, views), atol=1e-6)
    assert torch.equal(views.mask, inside_mask(views.dvf))


@pytest.mark.parametrize("elastic", [0.0, 4.0])
@pytest.mark.parametrize(("size", "crop"), [((60, 50), (40, 32)), ((22, 18, 20), (16, 12, 16))], ids=str)
def test_view_a_warped_by_the_truth_is_view_b(size, crop, elastic):
    settings = replace(PLAIN, elastic=elastic, elastic_spacing=10.0)
    views = views_of(images(4, *size), crop, seed=3, settings=settings)
    assert isinstance(views.target, AffineDVF) == (elastic == 0)
    assert 0.1 < float(views.mask.float().mean()) < 1
    gap = (warp(views.x_a, views.dvf) - views.x_b) * views.mask
    assert float(gap.abs().max()) < 2e-4
    assert float((views.x_a - views.x_b).abs().mean()) > 0.05


def test_the_elastic_part_is_smooth_and_of_its_strength():
    settings = ViewSettings(probability=0, rotation=0, shear=0, scale=0, translation=0, elastic=5, elastic_spacing=16)
    views = views_of(images(8, 96, 80), (64, 64), settings=settings)
    # A cubic B-spline of independent control points keeps 0.48 of their standard deviation, for two axes.
    assert float(views.dvf.std()) == pytest.approx(0.48 * 5, rel=0.2)
    for axis in (2, 3):
        assert float(views.dvf.diff(n=2, dim=axis).abs().max()) < 20 / 16**2 * 5
        assert float(views.dvf.diff(dim=axis).abs().max()) > 0.1
    half = views_of(images(8, 96, 80), (64, 64), settings=replace(settings, strength=0.5))
    assert_near(half.dvf, views.dvf / 2, atol=1e-5)
    whole = views_of(images(8, 96, 80), (96, 80), settings=settings).dvf
    gaps = [
        min(float((cut(whole[b], (i, j), (64, 64)) - views.dvf[b]).abs().max()) for i in range(33) for j in range(17))
        for b in range(8)
    ]
    assert max(gaps) < 1e-4  # a crop's field is a crop of the whole field


def applied(settings, batch=400, size=(20, 20), channels=1, value=None):
    x = images(batch, *size, channels=channels) if value is None else torch.full((batch, channels, *size), value)
    return x, views_of(x, size, settings=settings)


SETTINGS = [{"noise": 0.02}, {"blur": 20.0}, {"contrast": 0.5}, {"brightness": 0.1}, {"boxes": 1}]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_each_appearance_has_its_probability(setting):
    for probability, low, high in ((0.0, 0, 0), (0.9, 0.84, 0.96), (1.0, 0.97, 1)):
        x, views = applied(replace(STILL, probability=probability, **setting))
        assert torch.equal(views.x_b, x)
        changed = (views.x_a - x).abs().flatten(1).amax(1) > 1e-6
        assert low <= float(changed.float().mean()) <= high


def test_noise():
    x, views = applied(replace(STILL, noise=0.02), channels=2)
    noise = views.x_a - x
    deviation = noise.flatten(1).std(1)
    assert float(deviation.max()) < 0.02 * 1.15
    assert float(deviation.max()) > 0.018
    assert float(deviation.mean()) == pytest.approx(0.01, rel=0.15)
    assert abs(float(noise.mean())) < 1e-4
    apart = noise.flatten(2).std(2)
    assert float((apart[:, 0] / apart[:, 1]).log().abs().median()) < 0.1  # one deviation for all channels
    assert abs(float(torch.corrcoef(noise.transpose(0, 1).flatten(1))[0, 1])) < 0.02  # drawn apart, though


def test_contrast():
    x, views = applied(replace(STILL, contrast=0.5), channels=2)
    axes = (2, 3)
    assert_near(views.x_a.mean(axes), x.mean(axes), atol=1e-5)
    gamma = views.x_a.std(axes) / x.std(axes)
    assert_near(gamma[:, 0], gamma[:, 1], atol=1e-4)
    assert 0.5 - 1e-4 <= float(gamma.min()) < 0.55
    assert 1.45 < float(gamma.max()) <= 1.5 + 1e-4
    assert float(gamma.mean()) == pytest.approx(1, abs=0.05)


def test_brightness():
    x, views = applied(replace(STILL, brightness=0.1), batch=2000, size=(4, 5), channels=2)
    shift = (views.x_a - x).flatten(1)
    assert float(shift.std(1).max()) < 1e-6
    beta = shift[:, 0].double()
    assert float(beta.square().mean()) == pytest.approx(0.1**2 / 3, rel=0.15)
    assert abs(float(beta.mean())) < 0.006
    assert float(beta.pow(4).mean() / beta.square().mean() ** 2) == pytest.approx(3 * 9 / 5, rel=0.25)  # s is drawn


@pytest.mark.parametrize("crop", [(30, 47), (20, 30, 40)], ids=str)
def test_one_box(crop):
    _, views = applied(replace(STILL, boxes=1), batch=80, size=crop, channels=2, value=2.0)
    painted = views.x_a != 2
    assert torch.equal(painted[:, 0], painted[:, 1])
    fill = views.x_a[painted]
    assert 0 <= float(fill.min()) < 0.01
    assert 0.99 < float(fill.max()) < 1
    assert float(fill.mean()) == pytest.approx(0.5, abs=0.02)
    seen = [set() for _ in crop]
    for box in painted[:, 0]:
        where = box.nonzero()
        sides = (where.amax(0) - where.amin(0) + 1).tolist()
        assert len(where) == np.prod(sides)
        for axis, side in enumerate(sides):
            seen[axis].add(side)
    for sides, size in zip(seen, crop, strict=True):
        assert sides == set(range(-(-size // 10), 4 * size // 30 + 1))
    # Boxes reach every edge of the crop.
    assert all(painted.any(0)[0].movedim(axis, 0)[i].any() for axis in range(len(crop)) for i in (0, -1))


def test_the_number_of_boxes():
    crop, before, share = (30, 30), None, []
    for boxes in range(1, 11):
        _, views = applied(replace(STILL, boxes=boxes), batch=250, size=crop, value=2.0)
        painted = (views.x_a != 2).flatten(1)
        if before is not None:
            assert (painted >= before).all()
            share.append(float((painted & ~before).any(1).float().mean()))
        before = painted
    assert share[0] == pytest.approx(0.95, abs=0.05)
    assert share[-1] == pytest.approx(0.95**9, abs=0.1)
    assert ViewSettings().boxes == 10


@pytest.mark.parametrize("size", [(9, 11), (5, 6, 7)], ids=str)
def test_blur_by_direct_sums(size):
    x, sigma = randn(3, 2, *size, dtype=torch.float32), torch.tensor([0.0, 0.4, 1.5])
    expected = x.double().numpy()
    for axis in range(2, x.ndim):
        length, out = x.shape[axis], np.empty_like(expected)
        for b in range(3):
            rows = np.moveaxis(expected[b], axis - 1, 0)
            for i in range(length):
                taps = np.arange(-40, 41)
                weights = (taps == 0) if sigma[b] == 0 else np.exp(-0.5 * (taps / float(sigma[b])) ** 2)
                picked = rows[np.clip(i + taps, 0, length - 1)]
                np.moveaxis(out[b], axis - 1, 0)[i] = np.tensordot(weights / weights.sum(), picked, 1)
        expected = out
    out = blur(x, torch.from_numpy(blur_weights(sigma.double().numpy(), 1.5)))
    assert_near(out.double(), torch.from_numpy(expected), atol=2e-4)
    assert_near(out[0], x[0], atol=1e-6)


@pytest.mark.parametrize("size", [(30, 41), (14, 21, 16)], ids=str)
def test_view_a_by_the_definition(size):
    """In order: noise, blur, contrast about the mean, brightness, boxes; one draw for all channels of a sample."""
    settings = ViewSettings(probability=1.0, noise=0.3, blur=1.0, brightness=0.5)
    crop, samples, keys = tuple(s - 6 for s in size), torch.tensor([7, 2**31 + 1, 0]), (2**63 + 9, 2**24 + 5)
    x = images(3, *size, channels=2)
    views = views_of(x, crop, seed=keys[0], iteration=keys[1], samples=samples, settings=settings)
    drawn = draw(*keys, samples.numpy(), np.tile([size], (3, 1)), crop, settings)
    axes, shape = tuple(range(1, 1 + len(crop))), (2, *crop)

    def dense(function, stream, sample):
        found = function(keys[0], stream, keys[1], sample[None], int(np.prod(shape)))
        return found[0].double().numpy().reshape(shape)

    for b, sample in enumerate(samples):
        out = cut(x[b], drawn.origin[b], crop).double().numpy()
        out = out + drawn.noise[b] * dense(normal, STREAM_NOISE, sample)
        out = blur(torch.from_numpy(out)[None], torch.from_numpy(blur_weights(drawn.blur, 1.0))[b : b + 1])[0].numpy()
        middle = out.mean(axes, keepdims=True)
        out = middle + (1 + drawn.contrast[b]) * (out - middle) + drawn.brightness[b]
        fill = dense(uniform, STREAM_FILL, sample)
        for box in drawn.boxes[b]:
            here = (slice(None), *(slice(*side) for side in box))
            out[here] = fill[here]
        assert_near(views.x_a[b].double(), torch.from_numpy(out), atol=3e-6)
    assert (drawn.boxes[..., 1] > drawn.boxes[..., 0]).any()


def test_the_views_are_one_batch():
    views = views_of(images(3, 20, 20, channels=2), 16)
    assert views.pair.shape == (6, 2, 16, 16)
    assert views.pair.is_contiguous()
    assert torch.equal(torch.cat([views.x_a, views.x_b]), views.pair)
    assert views.x_a.data_ptr() == views.pair.data_ptr()
    assert views.shown == "inside"
    assert torch.equal(views.mask, inside_mask(views.target))


def same(views, others):
    for name in ("x_a", "x_b", "dvf", "mask"):
        assert torch.equal(getattr(views, name), getattr(others, name)), name


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("size", "crop"), [((50, 41), (32, 24)), ((230, 220), (200, 192)), ((18, 20, 17), 16)], ids=str
)
def test_the_split_of_the_batch_changes_no_bit(size, crop, channels):
    x, settings = images(5, *size, channels=channels), ViewSettings(blur=1.0, elastic=2.0)
    options = {"seed": 2**40 + 1, "iteration": 12, "settings": settings}
    samples = torch.arange(100, 105)
    whole = views_of(x, crop, samples=samples, **options)
    assert not torch.equal(whole.x_a[0], whole.x_a[1])
    for part in (slice(0, 1), slice(1, 2), slice(1, 4), slice(3, 5)):
        split = views_of(x[part], crop, samples=samples[part], **options)
        for name in ("x_a", "x_b", "dvf", "mask"):
            assert torch.equal(getattr(split, name), getattr(whole, name)[part]), name
    same(views_of(x, crop, samples=samples, **options), whole)


def test_seed_iteration_and_sample_change_the_views():
    x = images(1, 40, 40).expand(2, -1, -1, -1)
    base = views_of(x, 32)
    assert not torch.equal(base.x_b[0], base.x_b[1])
    for options in ({"seed": 1}, {"iteration": 2}, {"samples": torch.tensor([2, 3])}):
        other = views_of(x, 32, **options)
        assert not torch.equal(other.x_a, base.x_a)
        assert not torch.equal(other.x_b, base.x_b)


@pytest.mark.parametrize("n", [2, 3])
def test_sizes_may_differ_within_a_batch(n):
    sizes = torch.tensor([[30, 24, 20], [24, 31, 18], [26, 26, 26]])[:, :n]
    singles, full = [images(1, *size.tolist(), seed=i) for i, size in enumerate(sizes)], sizes.amax(0).tolist()
    x = torch.zeros(3, 1, *full)
    for i, single in enumerate(singles):
        x[(slice(i, i + 1), slice(None), *map(slice, single.shape[2:]))] = single
    together = views_of(x, 16, sizes=sizes, seed=4)
    for i, single in enumerate(singles):
        alone = views_of(single, 16, samples=torch.tensor([i]), seed=4)
        for name in ("x_a", "x_b", "dvf", "mask"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i]), (i, name)


def test_refusals_of_what_no_counter_holds():
    x = images(2, 20, 24)
    for seed in (-1, 2**64, 1.0):
        with refused("seed", str(seed)):
            views_of(x, 16, seed=seed)
    for iteration in (-1, 2**32, 1.5):
        with refused("iteration", str(iteration)):
            views_of(x, 16, iteration=iteration)
    for samples in ([0, -1], [2**32, 0], [0.0, 1.0]):
        with refused("samples", "2^32"):
            views_of(x, 16, samples=torch.tensor(samples))
    for sizes in ([[20, 25], [20, 24]], [[20, 0], [20, 24]], [[20.0, 24.0], [20.0, 24.0]]):
        with refused("sizes", "(20, 24)"):
            views_of(x, 16, sizes=torch.tensor(sizes), pad=True)
    last = views_of(x, 16, seed=2**64 - 1, iteration=2**32 - 1, samples=torch.tensor([2**32 - 1, 0]))
    assert last.pair.isfinite().all()
