"""fuse_affine: a displacement, then an affine map, as one field (GVSL Eq. 12, with the choice of SPEC 9)."""

import math
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KERNEL_LAYOUTS, assert_near, dvfs, gradients, laid_out, leaves, randn, refused, sizes

from coverfast import affine_dvf, warp
from coverfast.kernels.launch import Architecture
from coverfast.ops.dispatch import KERNELS
from coverfast.ops.fuse import fuse_affine

IMPLS = ("torch", "reference")
THETA_LAYOUTS = ("contiguous", "sliced", "transposed", "expanded")


def thetas(batch, n, seed=0, turn=0.2):
    """Affine maps that turn, shear and scale a little, and move by some pixels."""
    matrix = torch.eye(n).double() + turn * randn(batch, n, n, seed=seed)
    return torch.cat([matrix, 2 * randn(batch, n, 1, seed=seed + 1)], 2)


def identity(batch, n, dtype=torch.float64):
    return torch.eye(n, n + 1, dtype=dtype).expand(batch, n, n + 1)


def after(second, first):
    """The map that does first, then second, about one centre."""
    n = first.shape[1]
    matrix = second[..., :n]
    return torch.cat([matrix @ first[..., :n], matrix @ first[..., n:] + second[..., n:]], 2)


@st.composite
def calls(draw):
    """A field and a map, both however they lie."""
    n = draw(st.sampled_from((2, 3)))
    size, batch = draw(sizes(n, 7 if n == 2 else 4)), draw(st.integers(0, 2))
    dvf = laid_out(draw(dvfs(batch, size)), draw(st.sampled_from(KERNEL_LAYOUTS)))
    theta = thetas(batch, n, draw(st.integers(0, 2**10)), draw(st.sampled_from((0.0, 0.1, 1.0))))
    return dvf, laid_out(theta, draw(st.sampled_from(THETA_LAYOUTS)))


# --- values and gradients --------------------------------------------------------------------------------------------


@given(calls())
def test_equals_reference(call):
    results = []
    for impl in IMPLS:
        dvf, theta = leaves(*call)
        out = fuse_affine(dvf, theta, impl=impl)
        results.append([out, *gradients(out, [dvf, theta])])
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs, atol=1e-10, rtol=1e-10)
    assert all(result[0].is_contiguous() for result in results)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_pixel_by_hand(impl):
    """On a grid of 3 x 5 about (1, 2): p = (0, 4) moved by (0.5, -1) is (0.5, 3), (-0.5, 1) from the centre."""
    dvf = torch.zeros(1, 2, 3, 5)
    dvf[0, :, 0, 4] = torch.tensor([0.5, -1.0])
    theta = torch.tensor([[[0.0, 2.0, 10.0], [-1.0, 0.0, 20.0]]])
    # A maps that to (2, 0.5), the rest to (13, 22.5), which is (13, 18.5) from p.
    assert fuse_affine(dvf, theta, impl=impl)[0, :, 0, 4].tolist() == [13.0, 18.5]


@given(calls())
def test_the_identity_leaves_a_field_exactly_as_it_is(call):
    dvf, n = call[0], call[0].shape[1]
    for dtype in (torch.float32, torch.float64):
        field, theta = leaves(dvf.to(dtype), identity(len(dvf), n, dtype))
        out = fuse_affine(field, theta, impl="torch")
        assert torch.equal(out, field)
        slope = randn(*dvf.shape, dtype=dtype)
        assert torch.equal(torch.autograd.grad(out, field, slope)[0], slope)


@pytest.mark.parametrize("size", [(5, 8), (3, 4, 6)], ids=str)
def test_a_field_of_zeros_leaves_the_affine_field(size):
    theta = thetas(2, len(size))
    still = torch.zeros(2, len(size), *size).double()
    for impl in IMPLS:
        assert_near(fuse_affine(still, theta, impl=impl), affine_dvf(theta, size), atol=1e-12)
    found = fuse_affine(still.float(), theta.float())
    assert_near(found, affine_dvf(theta.float(), size), atol=4e-6, rtol=1e-6)
    assert not fuse_affine(still, identity(2, len(size))).any()


def test_nothing_cancels_far_from_the_centre():
    """By a map next to the identity pixels 2000 from the centre move by 0.02: float32 knows their places to 1e-4."""
    dvf = 1e-3 * randn(1, 2, 2, 4001)
    theta = identity(1, 2) + 1e-5 * randn(1, 2, 3)
    exact = fuse_affine(dvf, theta, impl="reference")
    assert float(exact.abs().max()) > 0.01
    found = fuse_affine(dvf.float(), theta.float()).double()
    # Of `A - I` float32 keeps 2^-24, the last place of the ones in A: that is an error of theta, not of the sum.
    rounded = fuse_affine(dvf.float().double(), theta.float().double(), impl="reference")
    assert float((found - rounded).abs().max()) < 1e-8


def test_autocast_rounds_no_coordinates():
    dvf, theta = randn(1, 2, 40, 60, dtype=torch.float32), thetas(1, 2).float()
    expected = fuse_affine(dvf, theta)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fuse_affine(dvf, theta), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [(2, 3), (2, 1, 3)], ids=str)
def test_gradcheck(size, impl):
    pair = leaves(randn(2, len(size), *size), thetas(2, len(size), 1))
    assert torch.autograd.gradcheck(lambda d, t: fuse_affine(d, t, impl=impl), pair)


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_alone(which):
    tensors = [randn(2, 2, 3, 4), thetas(2, 2)]
    both = leaves(*tensors)
    expected = gradients(fuse_affine(*both), both)[which]
    tensors[which].requires_grad_()
    assert_near(gradients(fuse_affine(*tensors), [tensors[which]])[0], expected)


# --- what it means ---------------------------------------------------------------------------------------------------


def looked_up(x, theta, dvf):
    """`x(Affine(p + dvf(p)))` pixel by pixel, zeros outside: each point is moved, then pushed through the map."""
    n, out = dvf.shape[1], torch.zeros_like(x)
    c = torch.tensor([(s - 1) / 2 for s in x.shape[2:]]).double()
    for b in range(len(x)):
        for p in torch.cartesian_prod(*(torch.arange(s) for s in x.shape[2:])):
            at = theta[b, :, :n] @ (p + dvf[(b, slice(None), *p)] - c) + c + theta[b, :, n]
            low = at.floor()
            for corner in torch.cartesian_prod(*[torch.arange(2)] * n):
                i = low.long() + corner
                if all(0 <= k < s for k, s in zip(i, x.shape[2:], strict=True)):
                    weight = (1 - (at - i).abs()).prod()
                    out[(b, slice(None), *p)] += weight * x[(b, slice(None), *i)]
    return out


@pytest.mark.parametrize("size", [(6, 9), (3, 4, 5)], ids=str)
def test_an_image_sampled_once_shows_what_the_definition_says(size):
    n = len(size)
    x, dvf, theta = randn(2, 2, *size), randn(2, n, *size, seed=1), thetas(2, n, 2, turn=0.1)
    theta[:, :, n] /= 2
    expected = looked_up(x, theta, dvf)
    assert float((expected != 0).double().mean()) > 0.5
    for impl in IMPLS:
        assert_near(warp(x, fuse_affine(dvf, theta, impl=impl)), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [(10, 14), (8, 6, 10)], ids=str)
def test_maps_follow_one_another(size, impl):
    """About one centre their matrices multiply: the field of one fused with another, any field with both in turn."""
    n = len(size)
    first, second, dvf = thetas(2, n, 1), thetas(2, n, 3), 3 * randn(2, n, *size, seed=5)
    both = after(second, first)
    assert_near(fuse_affine(affine_dvf(first, size), second, impl=impl), affine_dvf(both, size), atol=1e-11)
    in_turn = fuse_affine(fuse_affine(dvf, first, impl=impl), second, impl=impl)
    assert_near(in_turn, fuse_affine(dvf, both, impl=impl), atol=1e-11)


def test_a_map_and_its_inverse_give_the_field_back():
    dvf, theta = 3 * randn(2, 3, 4, 5, 6), thetas(2, 3)
    inverse = torch.linalg.inv(theta[..., :3])
    back = torch.cat([inverse, -inverse @ theta[..., 3:]], 2)
    assert_near(fuse_affine(fuse_affine(dvf, theta), back), dvf, atol=1e-11)


def test_the_displacement_comes_before_the_map():
    """A ramp warped by the affine field, then by the displacement, where interpolation is exact."""
    size = (24, 30)
    ramp = torch.stack(torch.meshgrid(*(torch.arange(s).double() for s in size), indexing="ij"))[None]
    theta, dvf = thetas(1, 2, 1, turn=0.2), randn(1, 2, *size, seed=7).clamp(-2, 2)
    inner = (..., slice(8, 16), slice(10, 20))
    twice = warp(warp(ramp, affine_dvf(theta, size)), dvf)[inner]
    assert_near(warp(ramp, fuse_affine(dvf, theta))[inner], twice)
    other_order = warp(warp(ramp, dvf), affine_dvf(theta, size))[inner]
    assert float((other_order - twice).abs().max()) > 0.5


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refusals(monkeypatch):
    dvf, theta = torch.zeros(2, 2, 4, 6), identity(2, 2, torch.float32)
    with refused("dvf", "(2, 4, 6)"):
        fuse_affine(dvf[0], theta)
    with refused("dvf", "float16"):
        fuse_affine(dvf.half(), theta)
    with refused("dvf", "one channel per spatial axis", "(2, 3, 4, 6)"):
        fuse_affine(torch.zeros(2, 3, 4, 6), theta)
    with refused("theta", "torch.Tensor", "list"):
        fuse_affine(dvf, theta.tolist())
    for other in (theta[0], theta[:, :1], theta[..., :2], identity(2, 3, torch.float32), torch.zeros(2, 2, 3, 1)):
        with refused("theta must be (B, 2, 3)", "dvf", str(tuple(other.shape))):
            fuse_affine(dvf, other)
    with refused("theta", "batch of dvf", "2", "1"):
        fuse_affine(dvf, theta[:1])
    with refused("theta", "dtype of dvf", "float32", "float64"):
        fuse_affine(dvf, theta.double())
    with refused("theta", "device of dvf", "meta"):
        fuse_affine(dvf, theta.to("meta"))
    with refused("impl", "cuda"):
        fuse_affine(dvf, theta, impl="cuda")
    monkeypatch.setattr("coverfast.ops.dispatch.KERNELS", frozenset())
    monkeypatch.setattr("coverfast.ops.dispatch._HAS_TRITON", True)
    with refused("impl='triton'", "fuse", "this version has no Triton kernel for it"):
        fuse_affine(dvf, theta, impl="triton")


# --- plans of the kernels' launches: neither a GPU nor the interpreter is needed --------------------------------------


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
    return import_module("coverfast.kernels.fuse")


ON = Architecture(132)


def meta(*shape, dtype=torch.float32, layout="contiguous"):
    return laid_out(torch.empty(shape, dtype=dtype, device="meta"), layout)


@given(st.data())
def test_fusion_is_planned_as_its_field_lies(kernels, data):
    n, layout = data.draw(st.sampled_from((2, 3))), st.sampled_from(KERNEL_LAYOUTS)
    size, batch = data.draw(st.tuples(*[st.integers(1, 120)] * n)), data.draw(st.integers(0, 3))
    dvf, grad = (meta(batch, n, *size, layout=data.draw(layout)) for _ in range(2))
    theta, out = meta(batch, n, n + 1, layout=data.draw(st.sampled_from(THETA_LAYOUTS))), meta(batch, n, *size)
    to_theta = data.draw(st.booleans())
    forward = kernels.forward_launch(dvf, theta, out, ON)
    backward, partials = kernels.backward_launch(grad, dvf, theta, out, to_theta=to_theta, on=ON)
    for launch in (forward, backward):
        c, a = launch.constants, launch.arguments
        tiles = math.prod(size[:-2]) * -(-size[-2] // c["TILE_Y"]) * -(-size[-1] // c["TILE_X"])
        assert launch.programs == batch * tiles
        assert c["NDIM"] == n
        assert not c["WIDE"]
        assert a["theta"].is_contiguous()
        assert [a[f"size_{axis}"] for axis in "zyx"] == [*([1] * (3 - n)), *size]
        for prefix, name in (("d", "dvf"), ("g", "grad"))[: 1 + (launch is backward)]:
            b, channel, *axes = a[name].stride()
            expected = [b, channel, axes[0] if n == 3 else 0, *axes[-2:]]
            assert [a[f"{prefix}_{axis}"] for axis in "bczyx"] == expected
    assert partials.shape == (batch, tiles if to_theta else 0, n, n + 1)
    assert backward.constants["TO_THETA"] == to_theta


def test_an_empty_batch_launches_nothing(kernels):
    dvf, theta = meta(0, 2, 4, 6), meta(0, 2, 3)
    for launch in (
        kernels.forward_launch(dvf, theta, dvf, ON),
        kernels.backward_launch(dvf, dvf, theta, dvf, to_theta=True, on=ON)[0],
    ):
        assert launch.programs == 0
        launch.run()


@pytest.mark.parametrize("which", [0, 1])
def test_any_field_with_far_pixels_has_64_bit_offsets(kernels, which):
    fields, theta = [meta(1, 2, 2, 4), meta(1, 2, 2, 4)], meta(1, 2, 3)
    wide = []
    for strides in (fields[which].stride(), (2, 1, 2**31, 2**31)):
        fields[which] = torch.empty_strided(fields[which].shape, strides, device="meta")
        dvf, grad = fields
        forward = kernels.forward_launch(dvf, theta, dvf, ON)
        backward = kernels.backward_launch(grad, dvf, theta, dvf, to_theta=True, on=ON)[0]
        wide.append([launch.constants["WIDE"] for launch in (forward, backward)])
    assert wide == [[False, False], [which == 0, True]]


@pytest.mark.slow
@pytest.mark.skipif("fuse" not in KERNELS, reason="needs the package triton")
def test_every_target_compiles_and_nothing_spills():
    from coverfast.bench import static
    from coverfast.kernels.launch import ARCHITECTURES

    rows = static.table(ops=["fuse"])
    kinds = {("fuse_forward", ()), ("fuse_backward", ()), ("fuse_backward", ("to_theta",))}
    for target in ARCHITECTURES:
        for preset in static.PRESETS:
            found = [(r.kernel, r.flags) for r in rows if (r.target, r.levels) == (target, (f"{preset} level 4",))]
            assert len(found) == 3
            assert set(found) == kinds
    assert [r for r in rows if r.spills] == []
