"""warp: the lean implementation against the definition, and the numbers of SPEC 2 written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, LAYOUTS, assert_near, dvfs, gradients, laid_out, leaves, randn, refused, sizes

from coverfast import affine_dvf, warp

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
