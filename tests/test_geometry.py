"""Affine fields, masks and up-sampling: the conventions of SPEC 0."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_near, dvfs, leaves, randn, refused, sizes

from coverfast import AffineDVF, affine_dvf, inside_mask, reference, upsample_dvf
from coverfast.geometry import level_size


def thetas(batch, n, seed=0, dtype=torch.float32):
    matrix = torch.eye(n).double() + 0.3 * randn(batch, n, n, seed=seed)
    return torch.cat([matrix, 5 * randn(batch, n, 1, seed=seed + 1)], 2).to(dtype)


@given(st.sampled_from((2, 3)), st.data())
def test_affine_field_by_its_formula(n, data):
    size, full = data.draw(sizes(n, 5)), data.draw(sizes(n, 9))
    origin = data.draw(st.tuples(*[st.integers(-4, 4)] * n))
    theta = thetas(2, n, data.draw(st.integers(0, 99)), torch.float64)
    field = affine_dvf(theta, size, full_size=full, origin=origin)
    assert field.shape == (2, n, *size)
    centre = (np.array(full) - 1) / 2
    for b, p in product(range(2), product(*map(range, size))):
        matrix, shift = theta[b, :, :n].numpy(), theta[b, :, n].numpy()
        at = np.array(p) + origin
        expected = matrix @ (at - centre) + shift + centre - at
        np.testing.assert_allclose(field[(b, slice(None), *p)].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(512, 384), (33, 1), (65, 48, 31)], ids=str)
def test_the_identity_is_exactly_zero(size, dtype):
    n = len(size)
    theta = torch.cat([torch.eye(n), torch.zeros(n, 1)], 1)[None].to(dtype)
    assert not affine_dvf(theta, size).any()
    assert not affine_dvf(theta, size, full_size=[2 * s + 1 for s in size], origin=7).any()


@given(st.sampled_from((2, 3)), st.data())
def test_the_field_of_a_crop_is_the_crop_of_the_field(n, data):
    full = data.draw(st.tuples(*[st.integers(8, 14)] * n))
    size = data.draw(st.tuples(*[st.integers(1, 4)] * n))
    origins = data.draw(st.lists(st.tuples(*[st.integers(0, 4)] * n), min_size=3, max_size=3))
    theta = thetas(3, n, data.draw(st.integers(0, 99)))
    whole = affine_dvf(theta, full)

    def cut(origin):
        return whole[(..., *(slice(o, o + s) for o, s in zip(origin, size, strict=True)))]

    origin = origins[0]
    assert torch.equal(affine_dvf(theta, size, full_size=full, origin=origin), cut(origin))
    assert torch.equal(affine_dvf(theta, size, full_size=torch.tensor([full] * 3), origin=3), cut([3] * n))
    each = affine_dvf(theta, size, full_size=full, origin=torch.tensor(origins))
    for b, origin in enumerate(origins):
        assert torch.equal(each[b], cut(origin)[b])
    field = AffineDVF(theta, size, full_size=full, origin=torch.tensor(origins))
    assert torch.equal(field.dense(), each)
    assert torch.equal(inside_mask(field), inside_mask(each))


def test_every_sample_may_have_its_own_full_size():
    theta = thetas(2, 2)
    both = affine_dvf(theta, (4, 5), full_size=torch.tensor([[9, 10], [7, 5]]))
    for b, full in enumerate([(9, 10), (7, 5)]):
        assert torch.equal(both[b : b + 1], affine_dvf(theta[b : b + 1], (4, 5), full_size=full))


@given(st.sampled_from((2, 3)), st.data())
def test_inside_mask_by_brute_force(n, data):
    size = data.draw(sizes(n, 5))
    dvf = data.draw(dvfs(2, size))
    mask = inside_mask(dvf)
    assert (mask.shape, mask.dtype) == ((2, 1, *size), torch.bool)
    for b, p in product(range(2), product(*map(range, size))):
        looks = [i + float(dvf[(b, axis, *p)]) for axis, i in enumerate(p)]
        assert bool(mask[(b, 0, *p)]) == all(0 <= c <= s - 1 for c, s in zip(looks, size, strict=True))


def test_inside_mask_is_false_where_the_field_is_not_finite():
    dvf = torch.zeros(1, 2, 2, 3)
    dvf[0, 0, 0, 0], dvf[0, 1, 0, 1], dvf[0, 1, 1, 2] = torch.nan, torch.inf, -torch.inf
    assert inside_mask(dvf).flatten().tolist() == [False, False, True, True, True, False]


def upsampled_by_loops(coarse):
    """Fine pixel f sits at coarse (f - 0.5) / 2; linear between the neighbours, clamped, doubled."""
    coarse = coarse.numpy()
    n, fine = coarse.ndim - 2, [2 * s for s in coarse.shape[2:]]
    out = np.zeros((*coarse.shape[:2], *fine))
    for p in product(*map(range, fine)):
        at = [min(max((f - 0.5) / 2, 0), s - 1) for f, s in zip(p, coarse.shape[2:], strict=True)]
        for corner in product((0, 1), repeat=n):
            weight, index = 1.0, []
            for c, bit, s in zip(at, corner, coarse.shape[2:], strict=True):
                low = int(np.floor(c))
                weight *= (c - low) if bit else 1 - (c - low)
                index.append(min(low + bit, s - 1))
            out[(..., *p)] += 2 * weight * coarse[(..., *index)]
    return torch.from_numpy(out)


@given(st.sampled_from((2, 3)), st.data())
def test_upsampling_by_loops_and_by_interpolate(n, data):
    size = data.draw(sizes(n, 4))
    coarse = randn(2, n, *size, seed=data.draw(st.integers(0, 99)))
    fine = upsample_dvf(coarse, [2 * s for s in size])
    assert_near(fine, upsampled_by_loops(coarse), atol=1e-12)
    mode = "bilinear" if n == 2 else "trilinear"
    assert_near(fine, 2 * F.interpolate(coarse, scale_factor=2, mode=mode, align_corners=False), atol=1e-12)


def test_upsampling_keeps_float32():
    coarse = randn(1, 2, 3, 4, dtype=torch.float32)
    assert upsample_dvf(coarse, (6, 8)).dtype == torch.float32
    assert torch.equal(upsample_dvf(torch.ones(1, 3, 2, 1, 3), (4, 2, 6)), torch.full((1, 3, 4, 2, 6), 2.0))


@pytest.mark.parametrize("size", [(5, 8), (4, 3, 6)], ids=str)
def test_an_affine_field_upsampled_is_the_affine_field(size):
    # Around the centre the map is p -> A p + t in both grids: t doubles, half-pixel centres agree.
    n, theta = len(size), thetas(2, len(size), dtype=torch.float64)
    finer = theta.clone()
    finer[:, :, n] *= 2
    fine = tuple(2 * s for s in size)
    up, direct = upsample_dvf(affine_dvf(theta, size), fine), affine_dvf(finer, fine)
    interior = (..., *[slice(1, -1)] * n)
    assert_near(up[interior], direct[interior], atol=1e-12)
    assert not torch.allclose(up, direct, atol=1e-3)  # the border is clamped


def test_upsampling_gradcheck():
    (coarse,) = leaves(randn(1, 2, 1, 3))
    assert torch.autograd.gradcheck(lambda c: upsample_dvf(c, (2, 6)), coarse)


def test_the_affine_field_has_gradients():
    (theta,) = leaves(thetas(2, 2, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda t: affine_dvf(t, (2, 3), full_size=5, origin=1), theta)


def test_level_size():
    assert level_size((32, 48), 5) == (2, 3)
    for size in ((32, 40), (8, 16)):
        with refused("5 levels", "16", str(size)):
            level_size(size, 5)


def test_refusals():
    theta = thetas(2, 2)
    for wrong in (theta[0], theta[:, :, :2], torch.zeros(1, 4, 5), torch.zeros(1, 1, 2), [1]):
        with refused("theta", "(B, n, n + 1)"):
            affine_dvf(wrong, 4)
    with refused("theta", "float16"):
        affine_dvf(theta.half(), 4)
    for size in (0, (3,), (3, 4, 5), 2.5, "ab"):
        with refused("size", str(size)):
            affine_dvf(theta, size)
    with refused("full_size", "(3, 2)"):
        affine_dvf(theta, 4, full_size=torch.zeros(3, 2))
    with refused("full_size", "-3"):
        affine_dvf(theta, 4, full_size=-3)
    with refused("origin", "1.5"):
        affine_dvf(theta, 4, origin=1.5)
    coarse = torch.zeros(1, 2, 3, 4)
    for size in ((6, 9), (3, 4), (12, 16), 6):
        with refused("size", "twice", "(3, 4)"):
            upsample_dvf(coarse, size)
    with refused("coarse", "float16"):
        upsample_dvf(coarse.half(), (6, 8))
    with refused("dvf", "(1, 3, 3, 4)"):
        inside_mask(torch.zeros(1, 3, 3, 4))


@given(st.integers(2, 3), st.integers(0, 2**31))
def test_equals_the_definitions(n, seed):
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(1, 7, (n,), generator=generator).tolist()
    origin, extra = torch.randint(-3, 4, (2, n), generator=generator).tolist()
    full = [s + abs(e) for s, e in zip(size, extra, strict=True)]
    theta = torch.randn(2, n, n + 1, generator=generator, dtype=torch.float64)
    field = reference.affine_dvf(theta, size, full, origin)
    torch.testing.assert_close(affine_dvf(theta, size, full_size=full, origin=origin), field)
    assert torch.equal(inside_mask(field), reference.inside_mask(field))
    double = [2 * s for s in size]
    torch.testing.assert_close(upsample_dvf(field, double), reference.upsample_dvf(field, double))
