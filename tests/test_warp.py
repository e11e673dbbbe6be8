"""warp: the lean implementation against the definition, and the numbers of SPEC 2 written out by hand."""

import math
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    KERNEL_LAYOUTS,
    LAYOUTS,
    assert_near,
    dvfs,
    gradients,
    laid_out,
    leaves,
    randn,
    refused,
    sizes,
)

from coverfast import AffineDVF, affine_dvf, upsample_dvf, warp
from coverfast.geometry import downsample_gradient
from coverfast.kernels.launch import Architecture, override
from coverfast.layout import channels_last, has_rows, new_like
from coverfast.ops.warp import resample, warp_up

IMPLS = ("torch", "reference")
PADDINGS = ("zeros", "border")
INF, NAN = math.inf, math.nan

# One row of pixels, and where to look along it.
ROW = [1.0, 3.0, 7.0, 2.0]
LOOK = [-1.5, -1.0, -0.5, 0.0, 0.25, 1.0, 1.5, 2.0, 3.0, 3.5, 4.0, 5.0]
VALUES = {
    "zeros": [0, 0, 0.5, 1, 1.5, 3, 5, 7, 2, 1, 0, 0],
    "border": [1, 1, 1, 1, 1.5, 3, 5, 7, 2, 2, 2, 2],
}
SLOPES = {
    "zeros": [0, 1, 1, 2, 2, 4, 4, -5, -2, -2, 0, 0],
    "border": [0, 0, 0, 2, 2, 4, 4, -5, 0, 0, 0, 0],
}


@st.composite
def cases(draw):
    n = draw(st.sampled_from((2, 3)))
    size, batch = draw(sizes(n, 6 if n == 2 else 4)), draw(st.integers(0, 3))
    x = randn(batch, draw(st.integers(1, 4)), *size, seed=draw(st.integers(0, 99)))
    return laid_out(x, draw(st.sampled_from(LAYOUTS))), draw(dvfs(batch, size))


def look(values, where, **options):
    """`values` (a row) looked up at each of `where`; also gives the slope along the row."""
    x = torch.as_tensor(values).reshape(1, 1, 1, -1).expand(len(where), -1, -1, -1)
    dvf = torch.zeros(len(where), 2, 1, x.shape[-1], dtype=torch.float64)
    dvf[:, 1, 0, 0] = torch.tensor(where, dtype=torch.float64)
    dvf.requires_grad_()
    out = warp(x, dvf, **options)[:, 0, 0, 0]
    if options.get("mode") == "nearest":
        return out.detach(), None
    (slope,) = torch.autograd.grad(out.double().sum(), dvf)
    return out.detach(), slope[:, 1, 0, 0]


@given(cases(), st.sampled_from(PADDINGS))
def test_linear_equals_reference(case, padding):
    results = []
    for impl in IMPLS:
        x, dvf = leaves(*case)
        out = warp(x, dvf, padding=padding, impl=impl)
        results.append([out, *gradients(out, [x, dvf])])
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs)


@given(cases(), st.sampled_from(PADDINGS))
def test_nearest_equals_reference(case, padding):
    results = []
    for impl in IMPLS:
        x, dvf = leaves(*case)
        out = warp(x, dvf, mode="nearest", padding=padding, impl=impl)
        results.append([out, *gradients(out, [x])])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_values_and_slopes_by_hand(padding, impl):
    out, slope = look(torch.tensor(ROW, dtype=torch.float64), LOOK, padding=padding, impl=impl)
    assert out.tolist() == VALUES[padding]
    assert slope.tolist() == SLOPES[padding]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("padding", "expected"), [("zeros", -5.0), ("border", 0.0)])
def test_slope_of_an_axis_of_one_pixel(padding, expected, impl):
    dvf = torch.zeros(1, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    out = warp(torch.full((1, 1, 1, 1), 5.0, dtype=torch.float64), dvf, padding=padding, impl=impl)
    assert out.item() == 5
    assert torch.autograd.grad(out.sum(), dvf)[0].flatten().tolist() == [expected, expected]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@settings(max_examples=12)
@given(st.sampled_from((2, 3)), st.sampled_from(IMPLS), st.data())
def test_integer_shifts_are_exact_beside_infinities(dtype, mode, n, impl, data):
    size = (6, 5) if n == 2 else (3, 4, 5)
    shift = data.draw(st.tuples(*[st.integers(-6, 6)] * n))
    x = randn(1, 2, *size, seed=data.draw(st.integers(0, 99)), dtype=dtype, scale=100)
    for i, bad in enumerate((INF, -INF, NAN)):
        x.view(-1)[i::7] = bad
    dvf = torch.tensor(shift).float().reshape(1, n, *[1] * n).expand(1, n, *size)
    expected = torch.zeros_like(x)
    to = tuple(slice(max(0, -o), max(0, min(s, s - o))) for o, s in zip(shift, size, strict=True))
    here = tuple(slice(max(0, o), max(0, min(s, s + o))) for o, s in zip(shift, size, strict=True))
    expected[(..., *to)] = x[(..., *here)]
    out, finite = warp(x, dvf, mode=mode, impl=impl), expected.isfinite()
    assert out.dtype == dtype
    assert torch.equal(out[finite], expected[finite])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_pixels_that_nobody_looks_at_may_be_anything(mode, impl):
    x, dvf = torch.tensor(ROW).reshape(1, 1, 1, -1).clone(), torch.zeros(1, 2, 1, 4)
    x[..., 0], x[..., 3] = INF, NAN
    dvf[:, 1, 0] = torch.tensor([-40.0, 0.0, 0.0, 40.0])
    x, dvf = leaves(x, dvf)
    out = warp(x, dvf, mode=mode, impl=impl)
    assert out.flatten().tolist() == [0, 3, 7, 0]
    if mode == "linear":
        slope = gradients(out[..., [0, 1, 3]], [dvf])[0]
        assert slope[..., [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_wild_displacements(mode, impl):
    where = [NAN, INF, -INF, 1e30, -1e30, 2.0**31, -(2.0**31), 2.0**63, -(2.0**63), 1.7e308, -1.7e308]
    row = torch.tensor(ROW, dtype=torch.float64)
    out, slope = look(row, where, mode=mode, impl=impl)
    assert out.tolist() == [0] * len(where)
    assert slope is None or slope.tolist() == [0] * len(where)
    out, slope = look(row, where, mode=mode, padding="border", impl=impl)
    assert out.tolist() == [ROW[0], *[ROW[-1], ROW[0]] * 5]
    assert slope is None or slope.tolist() == [0] * len(where)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("n", [2, 3])
def test_wild_displacements_leave_the_rest_alone(n, padding, impl):
    size = (4, 5, 3)[:n]
    x, dvf = randn(2, 3, *size), randn(2, n, *size, seed=1)
    wild = dvf.clone()
    wild[0, 0, 1, 2], wild[0, 1, 2, 2], wild[1, 0, 0, 0] = NAN, INF, -1e30
    tame = (wild == dvf).all(1, keepdim=True)
    x, dvf, wild = leaves(x, dvf, wild)
    out, plain = (warp(x, d, padding=padding, impl=impl) for d in (wild, dvf))
    assert torch.equal(out * tame, plain * tame)
    dx, d_wild = gradients(out * tame, [x, wild])
    dx_plain, d_plain = gradients(plain * tame, [x, dvf])
    assert_near(dx, dx_plain)
    assert_near(d_wild, d_plain)
    dx, d_wild = gradients(warp(x, wild, padding=padding, impl=impl), [x, wild])
    assert dx.isfinite().all()
    assert d_wild.isfinite().all()
    assert not d_wild[wild != dvf].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16], ids=str
)
def test_nearest_rounds_half_to_even(dtype, impl):
    row = torch.tensor([1, 2, 3, 4]).to(dtype)
    where = [-0.75, -0.5, 0.5, 1.5, 2.5, 3.0, 3.5]
    for padding, expected in (("zeros", [0, 1, 1, 3, 3, 4, 0]), ("border", [1, 1, 1, 3, 3, 4, 4])):
        out, _ = look(row, where, mode="nearest", padding=padding, impl=impl)
        assert out.dtype == dtype
        assert torch.equal(out, torch.tensor(expected).to(dtype))


@given(cases(), st.sampled_from(PADDINGS))
def test_nearest_invents_no_label(case, padding):
    labels = (10 * case[0]).to(torch.int32)
    out = warp(labels, case[1], mode="nearest", padding=padding)
    assert set(out.unique().tolist()) <= {0, *labels.unique().tolist()}


def test_identity_is_exact():
    for dtype in DTYPES:
        x = randn(2, 3, 5, 4, dtype=dtype)
        assert torch.equal(warp(x, torch.zeros(2, 2, 5, 4)), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_image_with_float32_field(dtype, impl):
    x, dvf = randn(2, 3, 40, 30, dtype=dtype), 20 * randn(2, 2, 40, 30, seed=1, dtype=torch.float32)
    truth = warp(x.double(), dvf.double(), impl="reference")
    out = warp(x, dvf, impl=impl)
    assert out.dtype == dtype
    assert_near(out.double(), truth, atol=1e-4, rtol=torch.finfo(dtype).eps)
    x, dvf = leaves(x, dvf)
    dx, d_dvf = gradients(warp(x, dvf, impl=impl), [x, dvf])
    assert (dx.dtype, d_dvf.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("n", [2, 3])
def test_not_shifted_by_half_a_pixel(n):
    size = (9, 14) if n == 2 else (6, 9, 7)
    x, dvf = randn(2, 3, *size), 2 * randn(2, n, *size, seed=1)
    points = torch.stack([c + dvf[:, i] for i, c in enumerate(torch.meshgrid(*map(torch.arange, size), indexing="ij"))])
    last = torch.tensor(size).reshape(n, *[1] * (n + 1)) - 1
    grid = (2 * points / last - 1).flip(0).movedim(0, -1)

    def sampled(align):
        return F.grid_sample(x, grid, padding_mode="border", align_corners=align)

    out = warp(x, dvf, padding="border")
    assert_near(out, sampled(True), atol=1e-4)
    assert float((out - sampled(False)).abs().max()) > 0.1


@pytest.mark.parametrize("n", [2, 3])
def test_warp_by_an_affine_field_is_the_transformed_image(n):
    size = (40, 33) if n == 2 else (20, 17, 22)
    theta = torch.cat([torch.eye(n).double() + 0.15 * randn(n, n), 3 * randn(n, 1, seed=1)], 1)[None]
    points = torch.stack(torch.meshgrid(*(torch.arange(s).double() for s in size), indexing="ij"))
    centre = (torch.tensor(size).double().reshape(n, *[1] * n) - 1) / 2

    def image(p):
        return sum((0.11 * (axis + 1) * p[axis] + axis).sin() for axis in range(n))

    mapped = torch.einsum("ij,j...->i...", theta[0, :, :n], points - centre) + centre
    mapped = mapped + theta[0, :, n].reshape(n, *[1] * n)
    inside = ((mapped >= 0) & (mapped <= 2 * centre)).all(0)
    out = warp(image(points)[None, None], affine_dvf(theta, size))[0, 0]
    assert inside.float().mean() > 0.3
    # Linear interpolation is off by at most an eighth of the second derivative, an axis.
    bound = sum((0.11 * (axis + 1)) ** 2 for axis in range(n)) / 8
    assert float((out - image(mapped))[inside].abs().max()) <= bound


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("n", [2, 3])
def test_gradcheck_inside_cells(n, padding):
    size = (3, 4) if n == 2 else (2, 3, 2)
    x, dvf = randn(1, 2, *size), 3 * randn(1, n, *size, seed=1)
    dvf = dvf.floor() + 0.2 + 0.6 * (dvf - dvf.floor())
    x, dvf = leaves(x, dvf)
    assert torch.autograd.gradcheck(lambda x, d: warp(x, d, padding=padding), (x, dvf))


def test_second_order_raises():
    x, dvf = leaves(randn(1, 1, 3, 3), 0.3 * randn(1, 2, 3, 3, seed=1))
    (slope,) = torch.autograd.grad(warp(x, dvf).square().sum(), dvf, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(slope.sum(), dvf)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize(("size", "dtype"), [((3, 4), torch.float32), ((2, 3, 2), torch.bfloat16)], ids=str)
def test_opcheck(mode, size, dtype):
    x, dvf = randn(2, 3, *size, dtype=dtype), randn(2, len(size), *size, seed=1, dtype=torch.float32)
    for padding in PADDINGS:
        torch.library.opcheck(
            torch.ops.coverfast.warp_forward, (*leaves(x, dvf), "dense", size, mode, padding, "torch")
        )
        for to in ((True, True), (True, False), (False, True)):
            arguments = (torch.ones_like(x), x, dvf, "dense", mode, padding, "torch", *to)
            torch.library.opcheck(torch.ops.coverfast.warp_backward, arguments)


def test_inputs_are_left_alone():
    x, dvf = leaves(randn(2, 3, 4, 5), randn(2, 2, 4, 5, seed=1))
    copies = x.detach().clone(), dvf.detach().clone()
    warp(x, dvf).sum().backward()
    assert torch.equal(x, copies[0])
    assert torch.equal(dvf, copies[1])


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_alone(which):
    tensors = [randn(2, 3, 4, 5), randn(2, 2, 4, 5, seed=1)]
    both = leaves(*tensors)
    expected = gradients(warp(*both), both)[which]
    tensors[which].requires_grad_()
    assert torch.equal(gradients(warp(*tensors), [tensors[which]])[0], expected)


def test_refusals(monkeypatch):
    x, dvf = randn(2, 3, 4, 5), torch.zeros(2, 2, 4, 5)
    with refused("x", "(B, C, *S)", "(3, 4, 5)"):
        warp(x[0], dvf)
    with refused("dvf", "float16"):
        warp(x, dvf.half())
    with refused("dvf", "int64"):
        warp(x, dvf.long())
    with refused("dvf", "(2, 3, 4, 5)"):
        warp(x, torch.zeros(2, 3, 4, 5))
    with refused("dvf", "2 spatial axes"):
        warp(x, torch.zeros(2, 3, 4, 5, 6))
    with refused("dvf", "size of x"):
        warp(x, dvf[..., 1:])
    with refused("dvf", "batch of x"):
        warp(x, dvf[:1])
    with refused("dvf", "device of x", "meta"):
        warp(x, dvf.to("meta"))
    with refused("dvf", "torch.Tensor", "NoneType"):
        warp(x, None)
    with refused("x", "linear", "int32"):
        warp(x.int(), dvf)
    with refused("mode", "cubic"):
        warp(x, dvf, mode="cubic")
    with refused("padding", "reflect"):
        warp(x, dvf, padding="reflect")
    with refused("impl", "cuda"):
        warp(x, dvf, impl="cuda")
    monkeypatch.setattr("coverfast.ops.dispatch.KERNELS", frozenset())
    monkeypatch.setattr("coverfast.ops.dispatch._HAS_TRITON", True)
    with refused("impl='triton'", "warp", "this version has no Triton kernel for it"):
        warp(x, dvf, impl="triton")


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_unsigned_labels_keep_their_values(dtype, impl):
    largest = torch.iinfo(dtype).max
    labels = torch.tensor([[0, 1], [largest - 1, largest]], dtype=dtype)[None, None]
    dvf = torch.zeros(1, 2, 2, 2)
    dvf[0, 1] = 1
    out = warp(labels, dvf, mode="nearest", impl=impl)
    assert out.dtype == dtype
    assert out[0, 0].tolist() == [[1, 0], [largest, 0]]


def test_numbers_without_a_meaning_here_are_refused():
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        with refused("x", str(dtype)):
            warp(torch.zeros(1, 1, 2, 2).to(dtype), torch.zeros(1, 2, 2, 2), mode="nearest")


# --- memory, and fields in other forms than a dense tensor ------------------------------------------------------------


def theta_like(n, batch=2, dtype=torch.float64):
    return torch.cat([torch.eye(n).double() + 0.2 * randn(batch, n, n), randn(batch, n, 1, seed=1)], 2).to(dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "sliced_rows"])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("size", [(4, 5), (3, 4, 2)], ids=str)
def test_value_and_gradient_are_laid_out_as_the_image(size, mode, layout):
    rows = layout in ("channels_last", "sliced_rows")
    (x,) = leaves(laid_out(randn(2, 3, *size), layout))
    out = warp(x, randn(2, len(size), *size, seed=1), mode=mode)
    for found in (out, *gradients(out, [x])):
        assert found.is_contiguous(memory_format=channels_last(found) if rows else torch.contiguous_format)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("n", [2, 3])
def test_an_affine_field_equals_its_dense_field(n, padding, mode):
    size = (5, 6, 4)[:n]
    (x,) = leaves(randn(2, 3, *size))
    field = AffineDVF(theta_like(n), size, full_size=9, origin=1)
    options = {"mode": mode, "padding": padding}
    expected = [warp(x, field.dense(), **options)]
    expected += gradients(expected[0], [x])
    for impl in IMPLS:
        out = warp(x, field, **options, impl=impl)
        for ours, theirs in zip((out, *gradients(out, [x])), expected, strict=True):
            assert_near(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n", [2, 3])
def test_a_crop_of_an_affine_field_sees_the_crop_of_the_warped_image(n, impl):
    full, size, origins = (6, 7, 5)[:n], (2, 3, 4)[:n], torch.tensor([[1, 2, 0], [4, 0, 1]])[:, :n]
    x, theta = randn(2, 3, *full), theta_like(n)
    whole = warp(x, AffineDVF(theta, full))
    out = resample(x, AffineDVF(theta, size, full_size=full, origin=origins), impl=impl)
    for i, origin in enumerate(origins.tolist()):
        box = tuple(slice(o, o + s) for o, s in zip(origin, size, strict=True))
        assert_near(out[i], whole[(i, slice(None), *box)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("half", [(3, 2), (1, 1), (2, 1, 3)], ids=str)
def test_warp_up_equals_the_two_steps(half, impl):
    size = tuple(2 * s for s in half)
    results = []
    for function in (
        lambda x, c: warp_up(x, c, impl=impl),
        lambda x, c: warp(x, upsample_dvf(c, size), impl="reference"),
    ):
        inputs = leaves(laid_out(randn(2, 3, *size), "channels_last"), randn(2, len(half), *half, seed=1))
        out = function(*inputs)
        results.append([out, *gradients(out, inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs)


@pytest.mark.parametrize("n", [2, 3])
def test_downsample_gradient_is_the_transpose_of_upsample_dvf(n):
    for half in ((1, 1, 1), (3, 2, 4), (2, 1, 5)):
        coarse = randn(2, n, *half[:n])
        fine = randn(2, n, *(2 * s for s in half[:n]), seed=1)
        assert_near((upsample_dvf(coarse, fine.shape[2:]) * fine).sum(), (coarse * downsample_gradient(fine)).sum())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_theta_that_asks_for_a_gradient_gets_it(impl):
    x, size = randn(2, 3, 4, 5), (4, 5)
    results = []
    for function in (
        lambda t: warp(x, AffineDVF(t, size), impl=impl),
        lambda t: warp(x, AffineDVF(t, size).dense(), impl=impl),
        lambda t: resample(x, AffineDVF(t, size), impl=impl),
    ):
        (theta,) = leaves(theta_like(2))
        results.append(gradients(function(theta), [theta])[0])
    assert results[0].abs().min() > 0
    for other in results[1:]:
        assert_near(other, results[0])


@pytest.mark.parametrize("form", ["coarse", "affine", "crop"])
def test_opcheck_of_other_forms(form):
    x, size = randn(2, 3, 4, 2, dtype=torch.float32), [4, 2]
    field = randn(2, 2, 2, 1, seed=1, dtype=torch.float32)
    if form != "coarse":
        field = AffineDVF(theta_like(2, dtype=torch.float32), (4, 2), origin=1).numbers
    inputs = leaves(x, field) if form == "coarse" else [*leaves(x), field]
    torch.library.opcheck(torch.ops.coverfast.warp_forward, (*inputs, form, size, "linear", "zeros", "torch"))
    arguments = (torch.ones_like(x), x, field, form, "linear", "zeros", "torch", True, form == "coarse")
    torch.library.opcheck(torch.ops.coverfast.warp_backward, arguments)


def test_refusals_of_fields_in_other_forms():
    x, theta = randn(2, 3, 4, 6), theta_like(2)
    with refused("dvf", "batch and size of x", "(2, 4, 6)", "(2, 6, 4)"):
        warp(x, AffineDVF(theta, (6, 4)))
    with refused("dvf", "batch and size of x", "(2, 4, 6)", "(1, 4, 6)"):
        warp(x, AffineDVF(theta[:1], (4, 6)))
    with refused("dvf", "batch and size of x", "(2, 4, 6, 2)"):
        warp(x, AffineDVF(theta_like(3), (4, 6, 2)))
    with refused("dvf", "device of x", "meta"):
        warp(x, AffineDVF(theta.to("meta"), (4, 6)))
    for field in (AffineDVF(theta_like(3), (4, 6, 2)), randn(2, 3, 4, 6, 2)):
        with refused("dvf", "2 spatial axes"):
            resample(x, field)
    for field in (AffineDVF(theta[:1], (2, 3)), randn(1, 2, 2, 3)):
        with refused("dvf", "batch of x"):
            resample(x, field)
    with refused("x", "linear", "int32"):
        warp(x.int(), AffineDVF(theta, (4, 6)))
    coarse = randn(2, 2, 2, 3)
    with refused("x", "twice the size of coarse", "(2, 3)", "(4, 5)"):
        warp_up(x[..., 1:], coarse)
    with refused("coarse", "batch of x"):
        warp_up(x, coarse[:1])
    with refused("coarse", "2 spatial axes"):
        warp_up(x, randn(2, 3, 2, 3, 2))
    with refused("coarse", "float16"):
        warp_up(x, coarse.half())
    with refused("x", "int64"):
        warp_up(x.long(), coarse)


# --- plans of the kernels' launches: neither a GPU nor the interpreter is needed --------------------------------------


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
    return import_module("coverfast.kernels.warp")


@pytest.fixture(scope="module")
def pixels():
    pytest.importorskip("triton")
    return import_module("coverfast.kernels.pixels")


def meta(*shape, dtype=torch.bfloat16, layout="channels_last"):
    return laid_out(torch.empty(shape, dtype=dtype, device="meta"), layout)


ON, LAYOUT = Architecture(132), st.sampled_from(KERNEL_LAYOUTS)


@settings(max_examples=200)
@given(
    size=st.lists(st.integers(1, 600), min_size=2, max_size=3),
    batch=st.integers(0, 3),
    lanes=st.sampled_from((1, 2, 4, 8)),
    total=st.sampled_from((128, 512)),
    warp_size=st.sampled_from((32, 64)),
)
def test_tiles_are_powers_of_two_that_cover_the_grid(pixels, size, batch, lanes, total, warp_size):
    tile = pixels.tile_for(size, Architecture(132, warp_size), lanes, total)
    assert tile.x >= min(size[-1], 32 if lanes == 1 else 8), "neighbours along x are read at once"
    for number in (tile.y, tile.x, tile.warps):
        assert number & (number - 1) == 0
    assert tile.y * tile.x * lanes <= total
    assert tile.y < 2 * size[-2]
    assert 1 <= tile.warps <= 4
    assert tile.warps * warp_size <= max(warp_size, tile.y * tile.x * lanes)
    rows, columns = (len(range(0, s, t)) for s, t in zip(size[-2:], (tile.y, tile.x), strict=True))
    assert tile.programs(batch, size) == batch * rows * columns * (size[0] if len(size) == 3 else 1)


@settings(max_examples=60)
@given(st.data())
def test_warp_is_planned_as_its_tensors_lie(kernels, data):
    n = data.draw(st.sampled_from((2, 3)))
    size = data.draw(st.tuples(*[st.integers(1, 90)] * n))
    batch, channels = data.draw(st.integers(0, 3)), data.draw(st.sampled_from((1, 2, 3, 8, 12, 32, 33, 36, 512)))
    form = data.draw(st.sampled_from(("dense", "coarse", "affine", "crop")))
    size = tuple(2 * s for s in size) if form == "coarse" else size
    source = tuple(s + 1 for s in size) if form == "crop" else size
    x = meta(batch, channels, *source, dtype=data.draw(st.sampled_from(DTYPES)), layout=data.draw(LAYOUT))
    grad = meta(batch, channels, *size, dtype=x.dtype, layout=data.draw(LAYOUT))
    shape = (
        (batch, n, n + 3) if form in ("affine", "crop") else (batch, n, *(s // (1 + (form == "coarse")) for s in size))
    )
    field = torch.empty(shape, device="meta")
    dx, d_psi = new_like(x, dtype=torch.float32), torch.empty(batch, n, *size, device="meta")
    forward = kernels.forward_launch(x, field, form, new_like(x, size), "linear", "zeros", ON)
    backward = kernels.backward_launch(grad, x, field, form, dx, d_psi, None, "linear", "border", ON)
    for launch, maps in ((forward, {"x": "x", "y": "out"}), (backward, {"x": "x", "g": "grad", "d": "dx"})):
        c, a = launch.constants, launch.arguments
        assert launch.programs == batch * math.prod(size[:-2]) * -(-size[-2] // c["TILE_Y"]) * -(
            -size[-1] // c["TILE_X"]
        )
        assert c["TILE_Y"] * c["TILE_X"] * c["LANES"] <= 128
        assert c["LANES"] * c["CHUNK"] < 2 * channels + 16 // x.element_size()
        assert c["ROWS"] == all(has_rows(a[name]) for name in maps.values())
        assert c["CHUNK"] == 1 or c["ROWS"]
        assert not c["WIDE"]
        assert [a[f"size_{axis}"] for axis in "zyx"] == [*([1] * (3 - n)), *size]
        assert [a[f"from_{axis}"] for axis in "zyx"] == [*([1] * (3 - n)), *source]
        for prefix, name in maps.items():
            assert c["UNIT"] * a[name].element_size() <= 16
            strides = [s * c["UNIT"] for s in (a[f"{prefix}_b"], a[f"{prefix}_z"], a[f"{prefix}_y"])]
            expected = a[name].stride()
            assert strides == [expected[0], expected[2] if n == 3 else 0, expected[-2]]
            assert a[f"{prefix}_c"] == expected[1]
            assert c[f"{prefix.upper()}_X"] == expected[-1]
    assert not forward.constants["BORDER"]
    assert backward.constants["BORDER"]
    assert (forward.constants["FIELD"], forward.constants["ORIGIN"]) == (
        "affine" if form == "crop" else form,
        form == "crop",
    )


def test_warp_plans_what_is_asked_for(kernels):
    x, field, d_psi = meta(2, 8, 4, 6), meta(2, 2, 4, 6, dtype=torch.float32), torch.empty(2, 2, 4, 6, device="meta")
    scale = torch.empty((), device="meta")
    for dx, d_field, fixed in ((x, None, None), (None, d_psi, None), (x.long(), d_psi, scale)):
        launch = kernels.backward_launch(x, x, field, "dense", dx, d_field, fixed, "nearest", "zeros", ON)
        flags = [launch.constants[name] for name in ("TO_X", "TO_FIELD", "FIXED", "NEAREST")]
        assert flags == [dx is not None, d_field is not None, fixed is not None, True]


def test_an_empty_batch_launches_nothing(kernels):
    x, field = meta(0, 8, 4, 6), meta(0, 2, 4, 6, dtype=torch.float32)
    launch = kernels.forward_launch(x, field, "dense", x, "linear", "zeros", ON)
    assert launch.programs == 0
    launch.run()


@pytest.mark.parametrize(
    ("dtype", "channels", "unit", "lanes"),
    [
        (torch.bfloat16, 32, 8, 4),
        (torch.float16, 512, 8, 8),
        (torch.float32, 8, 4, 2),
        (torch.float64, 8, 2, 4),
        (torch.int64, 6, 2, 4),
        (torch.uint8, 16, 16, 1),
        (torch.bfloat16, 36, 4, 8),
        (torch.bfloat16, 33, 1, 8),
        (torch.float32, 1, 1, 1),
        (torch.float32, 3, 1, 4),
    ],
    ids=str,
)
def test_lanes_read_what_every_row_is_aligned_to(pixels, dtype, channels, unit, lanes):
    rows, planes = (meta(2, channels, 3, 5, dtype=dtype, layout=layout) for layout in ("channels_last", "contiguous"))
    found = pixels.channels_of(rows, rows)
    assert (found.rows, found.chunk, found.lanes) == (True, unit, lanes)
    assert found.constants["UNIT"] == unit
    if channels > 1:
        for maps in ((rows, planes), (planes, rows)):
            assert pixels.channels_of(*maps).constants == {"ROWS": False, "CHUNK": 1, "UNIT": 1, "LANES": 1}


@pytest.mark.parametrize(("start", "unit"), [(0, 8), (8, 8), (4, 4), (2, 2), (1, 1)])
def test_maps_that_start_off_the_boundary_are_read_in_smaller_steps(pixels, start, unit):
    around, whole = (laid_out(torch.zeros(1, c, 4, 5, dtype=torch.bfloat16), "channels_last") for c in (16, 8))
    assert around.data_ptr() % 16 == 0
    view = around[:, start : start + 8]
    for maps in ((view, whole), (whole, view)):
        assert pixels.channels_of(*maps).chunk == unit


@pytest.mark.parametrize(
    ("shape", "strides", "wide"),
    [
        ((1, 8, 4, 5), (160, 1, 40, 8), False),
        ((2, 8, 4, 5), (2**40, 1, 40, 8), False),  # samples are reckoned in 64 bits in any case
        ((1, 8, 4, 5), (8, 1, 2**30, 8), True),
        ((1, 8, 1, 3), (8, 1, 8, 2**30), True),
        ((1, 3, 1, 2), (8, 2**30, 8, 1), True),
        ((1, 8, 3, 1, 2), (8, 1, 2**30, 16, 8), True),
        ((1, 8, 1, 2**28), (8, 1, 2**31, 8), True),
        ((1, 8, 1, 2**20), (8, 1, 2**23, 8), False),
    ],
    ids=str,
)
def test_offsets_within_a_sample_have_64_bits_where_they_need_them(kernels, shape, strides, wide):
    far, n = torch.empty_strided(shape, strides, dtype=torch.bfloat16, device="meta"), len(shape) - 2
    near = meta(*shape, layout="channels_last" if strides[1] == 1 else "contiguous")
    field = torch.empty(shape[0], n, *shape[2:], device="meta")
    affine = torch.empty(shape[0], n, n + 3, device="meta")
    for x, out in ((far, near), (near, far)) if shape[-1] < 9 else ((far, far),):
        launch = kernels.forward_launch(x, affine, "affine", out, "linear", "zeros", ON)
        assert launch.constants["WIDE"] == wide
    if shape[-1] < 9:
        for grad, dx in ((far, near), (near, far)):
            launch = kernels.backward_launch(grad, near, affine, "affine", dx, None, None, "linear", "zeros", ON)
            assert launch.constants["WIDE"] == wide
        launch = kernels.forward_launch(near, field, "dense", near, "linear", "zeros", ON)
        assert not launch.constants["WIDE"]


def test_a_field_with_far_pixels_widens_its_warp(kernels):
    x, far = meta(1, 8, 1, 3), torch.empty_strided((1, 2, 1, 3), (2, 1, 2, 2**30), device="meta")
    assert kernels.forward_launch(x, far, "dense", x, "linear", "zeros", ON).constants["WIDE"]
    assert kernels.backward_launch(x, x, far, "dense", x, None, None, "linear", "zeros", ON).constants["WIDE"]


def test_a_gradient_in_planes_is_brought_into_rows_once(kernels):
    x, grad = (laid_out(torch.zeros(1, 8, 4, 6), layout) for layout in ("channels_last", "contiguous"))
    field = torch.zeros(1, 2, 4, 6)
    launch = kernels.backward_launch(grad, x, field, "dense", new_like(x), None, None, "linear", "zeros", ON)
    assert launch.arguments["x"] is x
    assert has_rows(launch.arguments["grad"])
    assert launch.constants["ROWS"]
    launch = kernels.backward_launch(x, grad, field, "dense", new_like(grad), None, None, "linear", "zeros", ON)
    assert launch.arguments["grad"] is x
    assert not launch.constants["ROWS"]


# --- sums in fixed point ----------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    value=st.floats(2.0**-120, 2.0**127, width=32),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    addends=st.one_of(st.integers(0, 100), st.integers(0, 2**45)),
)
@example(value=3.4028234663852886e38, dtype=torch.float32, addends=2**21)
@example(value=2.0**-66, dtype=torch.float32, addends=1)
@example(value=2.0**-120, dtype=torch.float32, addends=0)
@example(value=1.0, dtype=torch.float64, addends=2**45)
@example(value=1.0000001192092896, dtype=torch.float32, addends=2**21)
def test_fixed_point_never_overflows(pixels, value, dtype, addends):
    values = torch.tensor([0.3 * value, -value], dtype=dtype)
    fixed = pixels.fixed_point(values, dtype, addends)
    each = int((values * fixed.scale).to(torch.int64).abs().max())
    assert each * max(1, addends) <= 2**62
    assert float(fixed.scale).hex().startswith("0x1.0000000000000p"), "a power of two"
    assert fixed.unit * fixed.scale == 1
    if value >= 2.0**-66:
        # All bits but those for the sum, its sign and two that rounding up to powers of two takes.
        assert each >= 2 ** (60 - max(1, addends).bit_length())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fixed_point_sums_are_exact_for_what_fits(pixels, dtype):
    for values, exact in (((64 * randn(1000)).round().to(dtype) / 64, True), (randn(1000, seed=1).to(dtype), False)):
        fixed, expected = pixels.fixed_point(values, dtype, 1000), math.fsum(values.tolist())
        total = (values * fixed.scale).to(torch.int64).sum()
        error = abs(fixed.value(total, torch.float64).item() - expected)
        assert error <= (0 if exact else 1000 * fixed.unit.item() + torch.finfo(dtype).eps * abs(expected))


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_fixed_point_of_what_is_no_number_is_no_number(pixels, bad):
    fixed = pixels.fixed_point(torch.tensor([1.0, bad, 2.0]), torch.float32, 3)
    assert fixed.value(torch.tensor([0, 5]), torch.float32).isnan().all()


@pytest.mark.parametrize("values", [torch.zeros(3), torch.zeros(0), torch.zeros(2, 0, 3)], ids=lambda v: str(v.shape))
def test_fixed_point_of_nothing_is_zero(pixels, values):
    fixed = pixels.fixed_point(values.half(), torch.float32, 0)
    assert fixed.scale.isfinite()
    assert fixed.value(torch.tensor([0]), torch.float16).tolist() == [0]


def test_sums_are_fixed_where_torch_asks_for_it_or_a_test_does(pixels):
    assert not pixels.deterministic()
    with override(deterministic=1):
        assert pixels.deterministic()
    torch.use_deterministic_algorithms(True)
    try:
        assert pixels.deterministic()
        with override(deterministic=0):
            assert not pixels.deterministic()
    finally:
        torch.use_deterministic_algorithms(False)
