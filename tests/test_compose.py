"""compose: two steps, border padding, and the field of two composed maps (SPEC 3)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_near, dvfs, gradients, leaves, randn, refused, sizes

from coverfast import affine_dvf, compose, inside_mask, upsample_dvf, warp

IMPLS = ("torch", "reference")


@st.composite
def pairs(draw, dtype=torch.float64):
    n = draw(st.sampled_from((2, 3)))
    coarse, batch = draw(sizes(n, 4 if n == 2 else 2)), draw(st.integers(0, 2))
    return draw(dvfs(batch, tuple(2 * s for s in coarse), dtype)), draw(dvfs(batch, coarse, dtype))


@given(pairs())
def test_equals_reference(pair):
    results = []
    for impl in IMPLS:
        fine, coarse = leaves(*pair)
        out = compose(fine, coarse, impl=impl)
        results.append([out, *gradients(out, [fine, coarse])])
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs)


@given(pairs())
def test_equals_the_two_steps(pair):
    fine, coarse = pair
    expected = fine + warp(upsample_dvf(coarse, fine.shape[2:]), fine, padding="border")
    for impl in IMPLS:
        assert_near(compose(fine, coarse, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [(10, 14), (8, 6, 10)], ids=str)
def test_two_affine_fields_give_the_field_of_the_composed_maps(size, impl):
    n, half = len(size), tuple(s // 2 for s in size)
    first, second = (torch.eye(n).double() + 0.1 * randn(n, n, seed=i) for i in (1, 2))
    t_first, t_second = 0.5 * randn(n, 1, seed=3), 0.5 * randn(n, 1, seed=4)
    fine = affine_dvf(torch.cat([first, t_first], 1)[None], size)
    coarse = affine_dvf(torch.cat([second, t_second / 2], 1)[None], half)
    # p -> first, then second: about the same centre the matrices multiply.
    both = affine_dvf(torch.cat([second @ first, second @ t_first + t_second], 1)[None], size)
    # Up-sampling clamps in the outermost fine pixels, so samples must keep away from them.
    axes = torch.meshgrid(*(torch.arange(s) for s in size), indexing="ij")
    looks = [p + fine[0, i] for i, p in enumerate(axes)]
    inside = torch.stack([(c >= 1) & (c <= s - 2) for c, s in zip(looks, size, strict=True)]).all(0)
    assert inside.float().mean() > 0.2
    out = compose(fine, coarse, impl=impl)
    assert_near(out[0][:, inside], both[0][:, inside], atol=1e-12)


def test_looking_the_coarse_field_up_directly_differs():
    fine, coarse = 2 * randn(1, 2, 8, 10), 2 * randn(1, 2, 4, 5, seed=1)
    axes = torch.meshgrid(torch.arange(8.0), torch.arange(10.0), indexing="ij")
    points = [(p + fine[0, i] - 0.5) / 2 for i, p in enumerate(axes)]
    grid = torch.stack([2 * c / (s - 1) - 1 for c, s in zip(points, (4, 5), strict=True)][::-1], -1)[None]
    direct = 2 * torch.nn.functional.grid_sample(coarse, grid, padding_mode="border", align_corners=True)
    assert float((compose(fine, coarse) - fine - direct).abs().max()) > 0.5


@pytest.mark.parametrize("impl", IMPLS)
def test_the_field_goes_on_beyond_the_border(impl):
    fine = torch.full((1, 2, 4, 6), 50.0)
    coarse = torch.full((1, 2, 2, 3), 1.5)
    assert not inside_mask(fine).any()
    assert torch.equal(compose(fine, coarse, impl=impl), torch.full_like(fine, 53.0))


def test_a_field_composed_with_zero_is_itself():
    fine, coarse = randn(2, 2, 4, 6), randn(2, 2, 2, 3)
    assert torch.equal(compose(fine, torch.zeros_like(coarse)), fine)
    assert torch.equal(compose(torch.zeros_like(fine), coarse), upsample_dvf(coarse, (4, 6)))


@pytest.mark.parametrize("size", [(2, 4), (2, 2, 2)], ids=str)
def test_gradcheck_inside_cells(size):
    n = len(size)
    fine = 2 * randn(1, n, *size)
    fine = fine.floor() + 0.2 + 0.6 * (fine - fine.floor())
    pair = leaves(fine, randn(1, n, *(s // 2 for s in size), seed=1))
    assert torch.autograd.gradcheck(compose, pair)


def test_refusals(monkeypatch):
    fine, coarse = torch.zeros(2, 2, 4, 6), torch.zeros(2, 2, 2, 3)
    with refused("fine", "(2, 4, 6)"):
        compose(fine[0], coarse)
    with refused("fine", "float16"):
        compose(fine.half(), coarse)
    with refused("coarse", "2 spatial axes"):
        compose(fine, torch.zeros(2, 3, 2, 3, 2))
    with refused("coarse", "batch of fine"):
        compose(fine, coarse[:1])
    with refused("coarse", "dtype of fine", "float64"):
        compose(fine, coarse.double())
    with refused("coarse", "device of fine", "meta"):
        compose(fine, coarse.to("meta"))
    with refused("fine", "twice", "(2, 3)", "(4, 5)"):
        compose(fine[..., 1:], coarse)
    with refused("impl", "cuda"):
        compose(fine, coarse, impl="cuda")
    monkeypatch.setattr("coverfast.ops.dispatch.KERNELS", frozenset())
    monkeypatch.setattr("coverfast.ops.dispatch._HAS_TRITON", True)
    with refused("impl='triton'", "compose", "this version has no Triton kernel for it"):
        compose(fine, coarse, impl="triton")
