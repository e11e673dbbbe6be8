"""The kernels of warp against the definition, on the GPU or in Triton's interpreter; unwritten memory is NaN."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from strategies import DTYPES, assert_near, gradients, laid_out, leaves, randn
from torch import Tensor

pytest.importorskip("triton")

from coverfast import AffineDVF, upsample_dvf, warp
from coverfast.geometry import downsample_gradient
from coverfast.kernels import INTERPRETED
from coverfast.kernels import warp as kernels
from coverfast.kernels.launch import Launch, override
from coverfast.layout import channels_last
from coverfast.ops.warp import resample, warp_up

from .field_cases import (
    FIELD_DTYPES,
    INF,
    LABELS,
    MARKS,
    NAN,
    WILD,
    Guarded,
    WarpSpec,
    assert_equals_reference,
    assert_precise,
    far_apart,
    field_like,
    theta_like,
    warp_specs,
)

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU (test_interpreter.py runs these without one)", allow_module_level=True)

pytestmark = MARKS

#: A tile (y, x) that adds in another order; a compiler might round otherwise too.
OTHER = (1, 2) if INTERPRETED else (4, 4)
ROWS = ("channels_last", "contiguous", "channels_last")

# Where to look along the pixels 1, 3, 7, 2; what is there, and its slope.
LOOK = [-1.5, -1.0, -0.5, 0.0, 0.25, 1.0, 1.5, 2.0, 3.0, 3.5, 4.0, 5.0]
VALUES = {
    "zeros": [0, 0, 0.5, 1, 1.5, 3, 5, 7, 2, 1, 0, 0],
    "border": [1, 1, 1, 1, 1.5, 3, 5, 7, 2, 2, 2, 2],
}
SLOPES = {
    "zeros": [0, 1, 1, 2, 2, 4, 4, -5, -2, -2, 0, 0],
    "border": [0, 0, 0, 2, 2, 4, 4, -5, 0, 0, 0, 0],
}


# --- values and gradients ---------------------------------------------------------------------------------------------


@given(warp_specs())
def test_equals_reference(device, spec):
    assert_equals_reference(spec, device)


CORNERS = {
    "33 channels": WarpSpec((2, 3), channels=33, layouts=("channels_last",) * 3),
    "36 channels": WarpSpec((1, 2, 3), channels=36, layouts=("sliced_rows", "sliced", "contiguous"), fixed=True),
    "12 channels": WarpSpec((3, 2), channels=12, layouts=ROWS, padding="border", batch=2),
    "8 channels plane by plane": WarpSpec((2, 3), channels=8, layouts=("sliced", "transposed", "sliced_rows")),
    "rows and a gradient of one number": WarpSpec((2, 3), channels=3, layouts=("channels_last", "expanded", "scalar")),
    "one channel of three dimensions": WarpSpec((2, 1, 3), channels=1, batch=2, fixed=True, padding="border"),
    "one pixel": WarpSpec((1, 1), reach=0.6, fixed=True),
    "one pixel in 3D": WarpSpec((1, 1, 1), channels=3, reach=0.6, padding="border"),
    "an empty batch": WarpSpec((2, 3), batch=0),
    "an empty batch in fixed point": WarpSpec((2, 2), batch=0, fixed=True, form="coarse"),
    "the library's own tile": WarpSpec((3, 5), channels=1, tile=None, fixed=None),
    "the library's own tile in rows": WarpSpec((2, 8), channels=12, tile=None, fixed=None, layouts=ROWS),
    "more pixels than a tile": WarpSpec((5, 9), channels=4, tile=(2, 4), layouts=ROWS, fixed=True),
    "one lane": WarpSpec((2, 2), channels=1, tile=(1, 1)),
    "coarse fields": WarpSpec((4, 6), channels=4, form="coarse", layouts=ROWS),
    "coarse fields in 3D": WarpSpec((2, 4, 2), channels=1, form="coarse", layouts=("contiguous", "sliced"), reach=2.0),
    "coarse fields of one pixel": WarpSpec((2, 2, 2), channels=2, form="coarse", layouts=ROWS, fixed=True),
    "affine fields": WarpSpec((3, 5), channels=2, form="affine", batch=2, padding="border"),
    "affine fields in 3D": WarpSpec((2, 3, 2), channels=8, form="affine", batch=2, layouts=ROWS, fixed=True),
    "affine crops": WarpSpec((2, 3), channels=8, form="affine", batch=2, source=(5, 6), layouts=ROWS),
    "affine crops in 3D": WarpSpec((2, 1, 3), channels=1, form="affine", batch=2, source=(3, 4, 2), padding="border"),
    "dense crops": WarpSpec((2, 3), channels=2, batch=2, source=(4, 5), reach=3.0, padding="border", fixed=True),
    "a larger grid": WarpSpec((3, 5), channels=3, source=(2, 2), layouts=ROWS),
    "nearest": WarpSpec((3, 4), channels=3, mode="nearest", step=0.5, reach=3.0, fixed=True),
    "nearest in 3D": WarpSpec((2, 2, 3), channels=2, mode="nearest", step=0.5, padding="border", layouts=ROWS),
    "nearest of an affine crop": WarpSpec((3, 4), channels=1, mode="nearest", form="affine", source=(5, 5)),
}


def layouts_of(spec: WarpSpec) -> WarpSpec:
    return replace(spec, layouts=(*spec.layouts, *("contiguous",) * 3)[:3])


@pytest.mark.parametrize("name", list(CORNERS))
def test_equals_reference_at(name, device):
    assert_equals_reference(layouts_of(CORNERS[name]), device)


@pytest.mark.parametrize("dtype", LABELS, ids=str)
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_labels_of_every_integer_dtype(dtype, padding, device):
    for size, layout, form in (((1, 2, 3), "contiguous", "dense"), ((3, 4), "channels_last", "affine")):
        layouts = (layout, "contiguous", "contiguous")
        spec = WarpSpec(
            size, channels=2, form=form, dtype=dtype, mode="nearest", padding=padding, layouts=layouts, step=0.5
        )
        ours, theirs = spec.results(device)[0], spec.results(impl="reference")[0]
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs)
        assert len(ours.to(torch.int64).unique()) > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_nearest_copies_values_and_adds_gradients(dtype, padding, device):
    spec = WarpSpec((3, 4), channels=2, dtype=dtype, mode="nearest", padding=padding, step=0.5, reach=3.0)
    ours, theirs = spec.results(device), spec.results(impl="reference", exact=True)
    assert torch.equal(ours[0].double(), theirs[0])
    assert_near(ours[1].double(), theirs[1], atol=1e-6, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_values_and_slopes_by_hand(padding, axis, device):
    """A line of pixels along each axis, looked up at every kind of coordinate."""
    line, at = torch.tensor([1.0, 3.0, 7.0, 2.0]), torch.tensor(LOOK)
    x = line.view([4 if i == axis else 1 for i in range(3)])[None, None].double().to(device)
    field = torch.zeros(1, 3, 1, 1, len(LOOK)).double()
    field[:, 2] -= torch.arange(float(len(LOOK)))
    field[:, axis] += at
    x, field = leaves(x, field.to(device))
    with override(tile=16, tile_y=1):
        out = resample(x, field, padding=padding, impl="triton")
        (slope,) = torch.autograd.grad(out.sum(), field)
    assert out.flatten().tolist() == VALUES[padding]
    assert slope[0, axis].flatten().tolist() == SLOPES[padding]


@settings(max_examples=6)
@given(warp_specs(dtypes=DTYPES[:3], field_dtypes=FIELD_DTYPES, least=1))
def test_low_precision_error_is_that_of_torch(device, spec):
    ours = assert_precise(spec, device)
    assert [t.dtype for t in ours] == [spec.dtype, spec.dtype, spec.field_dtype][: len(ours)]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_low_precision_gradient_of_a_pixel_that_many_look_at(dtype, fixed, device):
    """Hundreds of small addends: in half precision the sum would stop growing."""
    x = torch.ones(1, 1, 1, 1, dtype=dtype, device=device).requires_grad_()
    field = torch.zeros(1, 2, 24, 32, device=device)
    with override(deterministic=int(fixed), tile=32, tile_y=8):
        out = resample(x, field, padding="border", impl="triton")
        (dx,) = torch.autograd.grad(out, x, torch.full_like(out, 0.75))
    assert dx.item() == 576


# --- coordinates and values that are extreme --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_wild_coordinates(padding, mode, n, device):
    size = (3, 8) if n == 2 else (2, 2, 8)
    spec = WarpSpec(size, channels=1, mode=mode, padding=padding)
    x, field, slope = spec.image(), spec.field(), spec.slope()
    for axis in range(n):
        at = (0, axis, *[axis % s for s in size[:-1]])
        field[at][: len(WILD)] = torch.tensor(WILD).double()
    results = []
    for impl, where in (("triton", device), ("reference", "cpu")):
        inputs = leaves(x.to(where), field.to(where))[: 1 if mode == "nearest" else 2]
        with override(tile=8, tile_y=4, deterministic=0):
            out = warp(
                inputs[0], inputs[1] if mode == "linear" else field.to(where), mode=mode, padding=padding, impl=impl
            )
            results.append([out, *torch.autograd.grad(out, inputs, slope.to(where))])
    for ours, theirs in zip(*results, strict=True):
        assert ours.isfinite().all()
        assert_near(ours.cpu(), theirs)


@pytest.mark.parametrize("value", WILD)
def test_wild_affine_and_coarse_fields(value, device):
    x = randn(1, 2, 2, 2).to(device)
    theta = torch.tensor([[[1.0, 0.0, value], [0.0, 1.0, 0.0]]], device=device)
    coarse = torch.full((1, 2, 1, 1), value, device=device)
    with override(tile=4, tile_y=2):
        for out in (
            warp(x, AffineDVF(theta, (2, 2)), impl="triton"),
            resample(x, AffineDVF(theta, (3, 1)), mode="nearest", impl="triton"),
            warp_up(x, coarse, impl="triton"),
        ):
            assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integer_shifts_are_exact_beside_infinities(dtype, n, device):
    size = (4, 8) if n == 2 else (2, 3, 4)
    for shift, layout, mode in (
        ((1, -2, 1), "channels_last", "linear"),
        ((-1, 1, 0), "contiguous", "linear"),
        ((0, 5, -2), "sliced", "nearest"),
    ):
        shift = shift[:n]
        x = randn(1, 2, *size, dtype=dtype, scale=100)
        for i, bad in enumerate((INF, -INF, NAN)):
            x.view(-1)[i::7] = bad
        expected = torch.zeros_like(x)
        to = tuple(slice(max(0, -o), max(0, min(s, s - o))) for o, s in zip(shift, size, strict=True))
        here = tuple(slice(max(0, o), max(0, min(s, s + o))) for o, s in zip(shift, size, strict=True))
        expected[(..., *to)] = x[(..., *here)]
        dvf = torch.tensor(shift).float().reshape(1, n, *[1] * n).expand(1, n, *size)
        with override(tile=8, tile_y=4):
            out = warp(laid_out(x, layout).to(device), dvf.to(device), mode=mode, impl="triton").cpu()
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_rows"])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_values_that_are_not_finite_spread_as_in_the_definition(padding, layout, device):
    x = randn(1, 3, 3, 8)
    for i, bad in enumerate((INF, NAN, -INF)):
        x.view(-1)[5 * i :: 23] = bad
    field = field_like(1, (3, 8), reach=3.0, step=0.5)
    with override(tile=8, tile_y=4):
        ours = warp(laid_out(x, layout).to(device), field.to(device), padding=padding, impl="triton").cpu()
    theirs = warp(x, field, padding=padding, impl="reference")
    assert 0 < int(theirs.isfinite().sum()) < theirs.numel()
    torch.testing.assert_close(ours, theirs, equal_nan=True, atol=1e-12, rtol=1e-12)


# --- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_identity_is_exact(dtype, layout, device):
    x = laid_out(randn(1, 3, 2, 4, dtype=dtype).to(device), layout)
    still = torch.zeros(1, 2, 2, 4, device=device)
    identity = AffineDVF(torch.eye(2, 3, device=device)[None], (2, 4), full_size=9, origin=3)
    for fixed in (0, 1):
        with override(tile=4, tile_y=2, deterministic=fixed):
            for out in (
                warp(*leaves(x), still, impl="triton"),
                warp(*leaves(x), identity, padding="border", impl="triton"),
                warp_up(*leaves(x), still[..., :1, :2], impl="triton"),
            ):
                assert torch.equal(out, x)
            (leaf,) = leaves(x)
            slope = laid_out(randn(*x.shape, seed=3, dtype=dtype).to(device), layout)
            (dx,) = torch.autograd.grad(warp(leaf, still, impl="triton"), leaf, slope)
            assert torch.equal(dx, slope)


@pytest.mark.parametrize("n", [2, 3])
def test_warping_back_restores_a_plane(n, device):
    """Linear interpolation reproduces a linear image, wherever both samples are inside."""
    size = (4, 8) if n == 2 else (3, 4, 8)
    theta = theta_like(1, n, turn=0.05)
    theta[..., -1] *= 0.2
    back = torch.linalg.inv(theta[:, :, :n])
    inverse = torch.cat([back, -back @ theta[:, :, n:]], 2)
    axes = torch.meshgrid(*(torch.arange(s).double() for s in size), indexing="ij")
    image = sum((i + 1) * a for i, a in enumerate(axes))[None, None].to(device)
    fields = [AffineDVF(t.to(device), size) for t in (theta, inverse)]
    with override(tile=8, tile_y=4):
        restored = warp(warp(image, fields[0], impl="triton"), fields[1], impl="triton")
        seen = warp(warp(torch.ones_like(image), fields[0], impl="triton"), fields[1], impl="triton") > 1 - 1e-9
    assert int(seen.sum()) >= 6
    assert_near(restored[seen], image[seen], atol=1e-10)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        WarpSpec((3, 5), channels=3, batch=2, reach=3.0),
        WarpSpec((2, 3), channels=12, source=(3, 4), padding="border", layouts=ROWS),
        WarpSpec((2, 4), channels=4, form="coarse", layouts=ROWS),
        WarpSpec((2, 1, 3), channels=2, form="affine", mode="nearest"),
    ],
    ids=lambda spec: f"{spec.form}-{spec.mode}-{spec.padding}",
)
def test_the_gradient_is_the_adjoint(spec, fixed, device):
    spec = replace(layouts_of(spec), fixed=fixed)
    out, dx, *_ = spec.results(device)
    assert_near((out * spec.slope()).sum(), (spec.image() * dx).sum())


@pytest.mark.parametrize(("n", "fixed"), [(2, False), (2, True), (3, False)])
def test_the_kernel_that_gathers_is_the_adjoint_of_up_sampling(n, fixed, device):
    for half in ((2, 1, 3),) if n == 3 else ((1, 1), (3, 4)):
        coarse, fine = randn(1, n, *half), randn(1, n, *(2 * s for s in half), seed=1)
        unit = torch.tensor(0.25, dtype=torch.float64, device=device) if fixed else None
        out = torch.empty_like(coarse, device=device)
        handed = (4 * fine).round() if fixed else fine
        with override(tile=4, tile_y=4):
            kernels.upsample_backward_launch(handed.to(device, torch.int64 if fixed else None), out, unit).run()
        fine = handed / 4 if fixed else handed
        assert_near((upsample_dvf(coarse, fine.shape[2:]) * fine).sum(), (coarse * out.cpu()).sum())
        assert_near(out.cpu(), downsample_gradient(fine))


@pytest.mark.parametrize("fixed", [False, True])
def test_gradients_are_zero_where_nobody_looks_and_nowhere_else(fixed, device):
    x, field = randn(1, 2, 2, 8).to(device), torch.full((1, 2, 2, 8), 0.25, device=device).double()
    field[:, 0, :, :] = 0
    field[:, 1, :, 3:] = -2.0
    field[:, 1, :, 7] = 40.0
    for padding in ("zeros", "border"):
        a, d = leaves(x, field)
        with override(tile=8, tile_y=2, deterministic=int(fixed)):
            dx, d_field = gradients(warp(a, d, padding=padding, impl="triton"), [a, d])
        # Pixels 0 to 2 look between 0 and 3, pixels 3 to 6 at 1 to 4, pixel 7 far beyond.
        assert (dx[..., :5] != 0).all()
        assert not dx[..., 5:7].any()
        assert (dx[..., 7] != 0).all() == (padding == "border")
        assert bool((dx[..., 7] != 0).any()) == (padding == "border")
        assert (d_field[:, 1, :, :7] != 0).all()
        assert not d_field[:, 1, :, 7].any()
        # Along y the first row looks at a cell, the second at the last pixel.
        assert (d_field[:, 0, 0, :7] != 0).all()
        assert bool((d_field[:, 0, 1, :7] != 0).all()) == (padding == "zeros")
        assert bool((d_field[:, 0, 1, :7] != 0).any()) == (padding == "zeros")


def test_forms_agree(device):
    """An affine field, the dense one and, where they are the same map, the coarse one."""
    x, size = randn(1, 3, 4, 8).to(device), (4, 8)
    theta = theta_like(1, 2).to(device)
    affine, coarse = AffineDVF(theta, size), field_like(1, (2, 4)).to(device)
    with override(tile=8, tile_y=4):
        assert_near(warp(x, affine, impl="triton"), warp(x, affine.dense(), impl="triton"))
        assert_near(warp_up(x, coarse, impl="triton"), warp(x, upsample_dvf(coarse, size), impl="triton"))
        crop = AffineDVF(theta, (2, 3), full_size=size, origin=torch.tensor([[1, 2]]))
        dense = crop.dense() + crop.origin.view(1, 2, 1, 1)
        assert_near(resample(x, crop, impl="triton"), resample(x, dense, impl="triton"))
        assert_near(resample(x, crop, impl="triton"), warp(x, affine, impl="triton")[..., 1:3, 2:5])


# --- sums that do not depend on their order ---------------------------------------------------------------------------


def flags(launches: list[Launch]) -> list[bool]:
    return [launch.constants["FIXED"] for launch in launches if "FIXED" in launch.constants]


@pytest.mark.parametrize(
    "spec", [WarpSpec((2, 4), channels=3), WarpSpec((2, 4), channels=4, form="coarse", layouts=ROWS)]
)
def test_deterministic_algorithms_choose_fixed_point(spec, device, launches):
    spec = replace(spec, fixed=None)
    torch.use_deterministic_algorithms(True)
    fixed = spec.results(device)
    assert True in flags(launches)
    assert [launch.arguments["dx"].dtype for launch in launches if "dx" in launch.arguments] == [torch.int64]
    launches.clear()
    torch.use_deterministic_algorithms(False)
    plain = spec.results(device)
    assert True not in flags(launches)
    for a, b in zip(fixed, plain, strict=True):
        assert_near(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fixed_point_gives_the_same_bits_in_any_order(dtype, device):
    """Tiles change the order in which pixels add to one another's corners."""
    x, field = randn(1, 2, 3, 4, dtype=dtype).to(device), field_like(1, (3, 4)).float().to(device)
    field[:, 0] = 1.3 - torch.arange(3.0, device=device)[:, None]  # all rows look at one
    found = []
    for tile in ((4, 4), (4, 4), OTHER):
        (leaf,) = leaves(x)
        with override(deterministic=1, tile_y=tile[0], tile=tile[1]):
            found.append(gradients(warp(leaf, field, impl="triton"), [leaf])[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("form", ["dense", "coarse", "affine"])
def test_fixed_point_of_gradients_that_are_zero_or_no_numbers(form, device):
    spec = WarpSpec((2, 4), channels=2, form=form, dtype=torch.float32, field_dtype=torch.float32)
    for value in (0.0, NAN, INF, -INF):
        (x,), field = leaves(spec.image(device)), spec.field(device)
        slope = torch.zeros_like(x)
        slope[0, 0, 1, 2] = value
        with override(deterministic=1, tile=4, tile_y=2):
            (dx,) = torch.autograd.grad(spec.call(x, field, "triton"), x, slope)
        assert dx.isnan().all() if value else torch.equal(dx, torch.zeros_like(dx))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_fixed_point_is_precise_at_any_scale(scale, device):
    results = []
    for fixed in (0, 1):
        x, field = leaves(randn(1, 2, 2, 4).float().to(device), field_like(1, (2, 4)).float().to(device))
        slope = scale * randn(1, 2, 2, 4, seed=1, dtype=torch.float32).to(device)
        with override(deterministic=fixed, tile=4, tile_y=2):
            (dx,) = torch.autograd.grad(warp(x, field, impl="triton"), x, slope)
        results.append(dx)
    assert_near(results[1], results[0], atol=1e-6 * scale, rtol=1e-6)


def test_without_deterministic_algorithms_what_is_no_number_stays_where_it_is(device):
    x = randn(1, 1, 2, 4).to(device).requires_grad_()
    slope = torch.ones_like(x)
    slope[..., 0] = NAN
    with override(deterministic=0, tile=4, tile_y=2):
        (dx,) = torch.autograd.grad(warp(x, torch.zeros(1, 2, 2, 4, device=device), impl="triton"), x, slope)
    assert dx[..., 0].isnan().all()
    assert (dx[..., 1:] == 1).all()


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "sliced_rows"])
@pytest.mark.parametrize("size", [(2, 4), (1, 2, 4)], ids=str)
def test_value_and_gradient_are_laid_out_as_the_image(layout, size, device):
    rows = layout in ("channels_last", "sliced_rows")
    for fixed in (0, 1):
        (x,) = leaves(laid_out(randn(2, 3, *size).to(device), layout))
        with override(tile=4, tile_y=2, deterministic=fixed):
            out = warp(x, field_like(2, size).to(device), mode="nearest", impl="triton")
            (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
        for found in (out, dx):
            assert found.is_contiguous(memory_format=channels_last(found) if rows else torch.contiguous_format)


def test_maps_are_read_where_they_are(device, launches):
    for layout in ("contiguous", "channels_last", "sliced", "sliced_rows"):
        x, field = laid_out(randn(1, 4, 2, 4).to(device), layout), laid_out(field_like(1, (2, 4)).to(device), "sliced")
        launches.clear()
        with override(tile=4, tile_y=2):
            warp(x, field, mode="nearest", impl="triton")
        (launch,) = launches
        assert launch.arguments["x"].data_ptr() == x.data_ptr()
        assert launch.arguments["field"].data_ptr() == field.data_ptr()
        assert launch.constants["ROWS"] == (layout in ("channels_last", "sliced_rows"))


@pytest.mark.parametrize(
    ("form", "layout", "size"),
    [
        ("dense", "contiguous", (3, 5)),
        ("coarse", "channels_last", (2, 6)),
        ("dense", "channels_last", (2, 3, 2)),
        ("coarse", "contiguous", (2, 2, 2)),
    ],
)
def test_nothing_is_written_around_the_results(form, layout, size, device):
    n = len(size)
    x, slope = (laid_out(randn(1, 3, *size, seed=i).to(device), layout) for i in (0, 1))
    field = field_like(1, tuple(s // 2 for s in size) if form == "coarse" else size, reach=9.0).to(device)
    guard = Guarded()
    out, dx, d_psi = guard.like(x), guard.like(x).zero_(), guard.like(torch.empty(1, n, *size, device=device).double())
    options = ("linear", "border" if form == "dense" else "zeros")
    with override(tile=4, tile_y=4):
        kernels.forward_launch(x, field, form, out, *options).run()
        kernels.backward_launch(slope, x, field, form, dx, d_psi, None, *options).run()
        guard.assert_kept()
        assert (out != guard.MARK).all()
        assert (d_psi != guard.MARK).all()
        if form == "coarse":
            d_coarse = guard.like(field)
            kernels.upsample_backward_launch(d_psi, d_coarse, None).run()
            guard.assert_kept()
            assert (d_coarse != guard.MARK).all()


def test_inputs_are_left_alone(device):
    for fixed in (0, 1):
        spec = WarpSpec((2, 4), channels=2)
        x, field = leaves(spec.image(device), spec.field(device))
        slope = spec.slope(device)
        with override(tile=4, tile_y=2, deterministic=fixed):
            torch.autograd.grad(warp(x, field, impl="triton"), [x, field], slope)
        assert torch.equal(x, spec.image(device))
        assert torch.equal(field, spec.field(device))
        assert torch.equal(slope, spec.slope(device))
        assert (x._version, field._version, slope._version) == (0, 0, 0)


#: Strides, or their products, beyond 2^31 elements: channels, batch and size, strides of batch, channel and axes.
FAR = {
    "samples in rows": (8, (2, 1, 2), (2**32 + 24, 1, 64, 8)),
    "samples in planes": (1, (2, 1, 2), (2**32 + 24, 64, 64, 8)),
    "planes": (8, (1, 3, 1, 2), (8, 1, 2**30 + 8, 64, 8)),
    "rows": (8, (1, 3, 2), (8, 1, 2**30 + 8, 8)),
    "pixels": (8, (1, 1, 4), (8, 1, 8, 2**30 + 8)),
    "channels": (3, (1, 1, 2), (8, 2**30 + 8, 2, 1)),
    "half as many rows": (8, (1, 3, 2), (8, 1, 2**29 + 8, 8)),
}


@pytest.mark.parametrize("axis", list(FAR))
@pytest.mark.parametrize("what", ["image", "field", "slope"])
def test_addresses_have_64_bits(axis, what, device):
    torch.use_deterministic_algorithms(False)  # which would fill all of the memory
    channels, (batch, *size), strides = FAR[axis]
    layouts = ("channels_last" if channels == 8 else "contiguous",) * 4
    spec = WarpSpec(tuple(size), channels, batch, dtype=torch.float16, field_dtype=torch.float32, layouts=layouts)
    tensors = {"image": spec.image(device), "field": spec.field(device), "slope": spec.slope(device)}
    if what == "field":  # of two channels
        strides = (strides[0], max(2, strides[1]), *strides[2:])
    tensors[what] = far_apart(tensors[what], strides)
    x, field, slope = tensors.values()
    with override(tile=4, tile_y=2):
        out = warp(x, field, impl="triton")
        options = ("dense", "linear", "zeros", "triton")
        # The gradient of the image alone would be as large as the image is wide.
        _, d_field = torch.ops.coverfast.warp_backward(slope, x, field, *options, False, True)
    expected = spec.results(impl="reference")
    assert_near(out.cpu(), expected[0], atol=1e-3, rtol=1e-3)
    assert_near(d_field.cpu(), expected[2], atol=1e-2, rtol=1e-2)


# --- inside PyTorch ---------------------------------------------------------------------------------------------------


FORMS = ("dense", "coarse", "affine", "crop")


def operator_arguments(form: str, n: int, device: str, mode: str = "linear") -> tuple[Tensor, Tensor, list[object]]:
    size = (2,) * (n - 1) + (4,)
    x = laid_out(randn(1, 2, *size, dtype=torch.float32).to(device), "channels_last")
    if form in ("affine", "crop"):
        field = AffineDVF(theta_like(1, n).float().to(device), size).numbers
    else:
        (field,) = leaves(field_like(1, tuple(s // 2 for s in size) if form == "coarse" else size).float().to(device))
    return x, field, [form, list(size), mode, "zeros", "triton"]


@pytest.mark.parametrize("form", FORMS)
def test_opcheck_forward(form, device):
    x, field, options = operator_arguments(form, 2, device)
    with override(tile=4, tile_y=2):
        torch.library.opcheck(torch.ops.coverfast.warp_forward, (*leaves(x), field, *options))


@pytest.mark.parametrize(
    ("form", "mode", "to"),
    [("dense", "linear", (True, True)), ("coarse", "linear", (False, True)), ("crop", "nearest", (True, False))],
)
def test_opcheck_backward(form, mode, to, device):
    x, field, (form, _, mode, padding, impl) = operator_arguments(form, 2, device, mode)
    arguments = (torch.ones_like(x), x, field.detach(), form, mode, padding, impl, *to)
    for fixed in (0, 1):
        with override(tile=4, tile_y=2, deterministic=fixed):
            torch.library.opcheck(torch.ops.coverfast.warp_backward, arguments)


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph(dynamic, device):
    torch.compiler.reset()
    theta = theta_like(1, 2).to(device)

    def run(x, field, coarse):
        affine = AffineDVF(theta, (2, 4))
        crop = AffineDVF(theta, (2, 3), full_size=(2, 4), origin=1)
        return torch.cat(
            [
                warp(x, field, impl="triton"),
                warp(x, affine, padding="border", impl="triton"),
                warp_up(x, coarse, impl="triton"),
                resample(x, crop, mode="nearest", impl="triton"),
            ],
            -1,
        )

    results = []
    with override(tile=4, tile_y=2):
        for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)):
            tensors = randn(1, 1, 2, 4), field_like(1, (2, 4)), field_like(1, (1, 2))
            inputs = leaves(*(t.to(device) for t in tensors))
            out = function(*inputs)
            results.append([out, *gradients(out, inputs)])
    for eager, compiled in zip(*results, strict=True):
        assert_near(compiled, eager, atol=1e-14, rtol=1e-14)
    torch.compiler.reset()


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_gradcheck_inside_cells(padding, device):
    field = 2 * randn(1, 2, 2, 3)
    field = field.floor() + 0.2 + 0.6 * (field - field.floor())
    inputs = leaves(randn(1, 1, 2, 3).to(device), field.to(device))
    with override(tile=4, tile_y=2):
        assert torch.autograd.gradcheck(
            lambda x, d: warp(x, d, padding=padding, impl="triton"), inputs, fast_mode=True, nondet_tol=1e-12
        )


def test_second_order_raises(device):
    x, field = leaves(randn(1, 1, 2, 2).to(device), (0.3 * randn(1, 2, 2, 2, seed=1)).to(device))
    with override(tile=2, tile_y=2):
        for wanted in (x, field):
            (slope,) = torch.autograd.grad(warp(x, field, impl="triton").square().sum(), wanted, create_graph=True)
            with pytest.raises(RuntimeError):
                torch.autograd.grad(slope.sum(), wanted)


@pytest.mark.parametrize(("which", "form"), [*product((0, 1), ("dense", "coarse"))])
def test_one_gradient_alone(which, form, device):
    spec = WarpSpec((2, 4), channels=2, form=form)
    tensors = [spec.image(device), spec.field(device)]
    expected = spec.results(device)[1 + which]
    tensors[which].requires_grad_()
    with spec.launched():
        (found,) = torch.autograd.grad(spec.call(*tensors, "triton"), tensors[which], spec.slope(device))
    assert_near(found.cpu(), expected, atol=1e-14, rtol=1e-14)


def test_autocast_changes_nothing(device):
    spec = WarpSpec((2, 4), channels=2, dtype=torch.float16, field_dtype=torch.float32)
    plain = spec.results(device)
    with torch.autocast(device, torch.bfloat16):
        cast = spec.results(device)
    for a, b in zip(plain, cast, strict=True):
        assert_near(a, b, atol=1e-6, rtol=1e-3)


def test_auto_takes_the_kernels_on_a_gpu_alone(device, launches):
    x, field = randn(1, 2, 2, 4).to(device), field_like(1, (2, 4)).to(device)
    assert_near(warp(x, field), warp(x, field, impl="torch" if INTERPRETED else "triton"), atol=0, rtol=0)
    assert len(launches) == (0 if INTERPRETED else 2)
