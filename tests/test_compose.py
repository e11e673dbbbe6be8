"""compose: two steps, border padding, and the field of two composed maps (SPEC 3)."""

import math
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KERNEL_LAYOUTS, assert_near, dvfs, gradients, laid_out, leaves, randn, refused, sizes

from coverfast import affine_dvf, compose, inside_mask, upsample_dvf, warp
from coverfast.kernels.launch import Architecture

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


# --- plans of the kernels' launches: neither a GPU nor the interpreter is needed --------------------------------------


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
    return import_module("coverfast.kernels.compose")


ON = Architecture(132)


def meta(*shape, dtype=torch.float32, layout="contiguous"):
    return laid_out(torch.empty(shape, dtype=dtype, device="meta"), layout)


@given(st.data())
def test_composition_is_planned_as_its_fields_lie(kernels, data):
    n, layout = data.draw(st.sampled_from((2, 3))), st.sampled_from(KERNEL_LAYOUTS)
    half = data.draw(st.tuples(*[st.integers(1, 60)] * n))
    size, batch = tuple(2 * s for s in half), data.draw(st.integers(0, 3))
    fine, grad, coarse = (meta(batch, n, *s, layout=data.draw(layout)) for s in (size, size, half))
    out, scale = meta(batch, n, *size), data.draw(st.sampled_from((None, meta())))
    launches = [
        kernels.forward_launch(fine, coarse, out, ON),
        kernels.backward_launch(grad, fine, coarse, out, meta(batch, n, *size), scale, ON),
    ]
    for launch in launches:
        c, a = launch.constants, launch.arguments
        assert launch.programs == batch * math.prod(size[:-2]) * -(-size[-2] // c["TILE_Y"]) * -(
            -size[-1] // c["TILE_X"]
        )
        assert c["NDIM"] == n
        assert not c["WIDE"]
        assert [a[f"size_{axis}"] for axis in "zyx"] == [*([1] * (3 - n)), *size]
        for prefix, name in (("f", "fine"), ("c", "coarse"), ("g", "grad"))[: 2 + (launch is launches[1])]:
            b, channel, *axes = a[name].stride()
            expected = [b, channel, axes[0] if n == 3 else 0, *axes[-2:]]
            assert [a[f"{prefix}_{axis}"] for axis in "bczyx"] == expected
    assert launches[1].constants["FIXED"] == (scale is not None)


def test_the_gradient_of_the_coarse_field_is_planned_on_the_coarse_grid(kernels):
    out, d_up = meta(2, 3, 4, 5, 6), meta(2, 3, 8, 10, 12)
    for unit in (None, meta()):
        launch = kernels.upsample_backward_launch(d_up, out, unit, ON)
        c = launch.constants
        assert launch.programs == 2 * 3 * 4 * -(-5 // c["TILE_Y"]) * -(-6 // c["TILE_X"])
        assert [launch.arguments[f"size_{axis}"] for axis in "zyx"] == [4, 5, 6]
        assert c["FIXED"] == (unit is not None)


def test_an_empty_batch_launches_nothing(kernels):
    fine, coarse = meta(0, 2, 4, 6), meta(0, 2, 2, 3)
    launch = kernels.forward_launch(fine, coarse, fine, ON)
    assert launch.programs == 0
    launch.run()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_any_field_with_far_pixels_has_64_bit_offsets(kernels, which):
    fields = [meta(1, 2, 2, 4), meta(1, 2, 1, 2), meta(1, 2, 2, 4)]
    launches = []
    for strides in (fields[which].stride(), (2, 1, 2**31, 2**31)):
        fields[which] = torch.empty_strided(fields[which].shape, strides, device="meta")
        fine, coarse, grad = fields
        out = meta(1, 2, 2, 4)
        launches.append(
            [
                kernels.forward_launch(fine, coarse, out, ON),
                kernels.backward_launch(grad, fine, coarse, out, out, None, ON),
            ]
        )
    wide = [[launch.constants["WIDE"] for launch in pair] for pair in launches]
    assert wide == [[False, False], [which < 2, True]]
