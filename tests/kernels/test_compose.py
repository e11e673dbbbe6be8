"""The kernels of composition against the definition, on the GPU or in Triton's interpreter; unwritten memory is NaN."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from strategies import DTYPES, assert_near, gradients, leaves, randn

pytest.importorskip("triton")

from coverfast import AffineDVF, compose, upsample_dvf, warp
from coverfast.kernels import INTERPRETED
from coverfast.kernels import compose as kernels
from coverfast.kernels.launch import override

from .field_cases import (
    INF,
    MARKS,
    NAN,
    WILD,
    ComposeSpec,
    Guarded,
    assert_equals_reference,
    assert_precise,
    compose_specs,
    far_apart,
    field_like,
    theta_like,
)

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU (test_interpreter.py runs these without one)", allow_module_level=True)

pytestmark = MARKS

#: A tile (y, x) that adds in another order; a compiler might round otherwise too.
OTHER = (1, 2) if INTERPRETED else (2, 4)


# --- values and gradients ---------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(compose_specs())
def test_equals_reference(device, spec):
    assert_equals_reference(spec, device)


CORNERS = {
    "a coarse pixel": ComposeSpec((2, 2), fixed=True),
    "a coarse voxel": ComposeSpec((2, 2, 2), reach=1.0),
    "two samples in rows": ComposeSpec((2, 4), batch=2, layouts=("channels_last", "channels_last", "channels_last")),
    "fields apart": ComposeSpec((4, 4), batch=2, layouts=("sliced", "sliced_rows", "scalar"), fixed=True),
    "fields crossed": ComposeSpec((4, 6), batch=2, layouts=("transposed", "expanded", "expanded"), step=0.5),
    "fields in 3D apart": ComposeSpec(
        (2, 2, 4), layouts=("sliced_rows", "transposed", "sliced"), fixed=True, step=0.25
    ),
    "an empty batch": ComposeSpec((2, 4), batch=0),
    "an empty batch in fixed point": ComposeSpec((2, 2, 2), batch=0, fixed=True),
    "the library's own tile": ComposeSpec((2, 10), tile=None, fixed=None),
    "more pixels than a tile": ComposeSpec((4, 10), tile=(2, 4), reach=6.0),
    "integer displacements": ComposeSpec((4, 8), step=1.0, reach=3.0),
    "far beyond": ComposeSpec((4, 4), reach=1e4, fixed=True),
}


@pytest.mark.parametrize("name", list(CORNERS))
def test_equals_reference_at(name, device):
    spec = CORNERS[name]
    assert_equals_reference(replace(spec, layouts=(*spec.layouts, *["contiguous"] * 3)[:3]), device, 1e-9)


@settings(max_examples=3)
@given(compose_specs(field_dtypes=DTYPES[2:3], least=1))
def test_float32_error_is_that_of_torch(device, spec):
    ours = assert_precise(spec, device)
    assert [t.dtype for t in ours] == [torch.float32] * 3
    assert all(t.is_contiguous() for t in ours)


@pytest.mark.parametrize(("n", "fixed"), [(2, 0), (2, 1), (3, 0)])
def test_wild_displacements_along_one_axis_leave_the_others_alone(n, fixed, device):
    size = (2, 8) if n == 2 else (2, 2, 8)
    fine, coarse = field_like(1, size), field_like(1, tuple(s // 2 for s in size), seed=1)
    for axis, line in zip(range(n), product((0, 1), repeat=n - 1), strict=False):
        fine[(0, axis, *line)][: len(WILD)] = torch.tensor(WILD).double()
    slope = randn(*fine.shape, seed=2)
    results = []
    for impl, where in (("triton", device), ("reference", "cpu")):
        inputs = leaves(fine.to(where), coarse.to(where))
        with override(tile=8, tile_y=2, deterministic=fixed):
            out = compose(*inputs, impl=impl)
            results.append([out, *torch.autograd.grad(out, inputs, slope.to(where))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, equal_nan=True, atol=1e-10, rtol=1e-10)
    for slopes in results[0][1:]:
        assert slopes.isfinite().all()


# --- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3])
def test_two_affine_fields_give_the_field_of_the_composed_maps(n, device):
    size = (8, 8) if n == 2 else (4, 6, 6)
    first, second = theta_like(1, n, seed=1, turn=0.05), theta_like(1, n, seed=2, turn=0.05)
    first[..., -1] *= 0.2
    second[..., -1] *= 0.2
    matrix = second[:, :, :n] @ first[:, :, :n]
    shift = second[:, :, :n] @ first[:, :, n:] + second[:, :, n:]
    fine, both = (AffineDVF(t, size).dense() for t in (first, torch.cat([matrix, shift], 2)))
    halved = torch.cat([second[:, :, :n], second[:, :, n:] / 2], 2)
    coarse = AffineDVF(halved, [s // 2 for s in size]).dense()
    axes = torch.meshgrid(*(torch.arange(s) for s in size), indexing="ij")
    looks = [p + fine[0, i] for i, p in enumerate(axes)]
    # Up-sampling clamps in the outermost fine pixels, so samples must keep away from them.
    inside = torch.stack([(c >= 1) & (c <= s - 2) for c, s in zip(looks, size, strict=True)]).all(0)
    assert int(inside.sum()) >= 8
    with override(tile=8, tile_y=8):
        out = compose(fine.to(device), coarse.to(device), impl="triton").cpu()
    assert_near(out[0][:, inside], both[0][:, inside], atol=1e-12)


@pytest.mark.parametrize("n", [2, 3])
def test_an_up_sampled_affine_field_is_looked_up_as_the_affine_one(n, device):
    """With still fine displacements: what is composed is the affine field itself, but at the border."""
    size = (8, 8) if n == 2 else (4, 4, 8)
    theta = theta_like(1, n)
    halved = torch.cat([theta[:, :, :n], theta[:, :, n:] / 2], 2)
    coarse, affine = AffineDVF(halved, [s // 2 for s in size]).dense(), AffineDVF(theta, size).dense()
    with override(tile=8, tile_y=8):
        out = compose(torch.zeros_like(affine).to(device), coarse.to(device), impl="triton").cpu()
    inner = (..., *[slice(1, -1)] * n)
    assert_near(out[inner], affine[inner], atol=1e-12)
    assert_near(out, upsample_dvf(coarse, size), atol=1e-12)


def test_a_field_composed_with_zero_is_itself(device):
    fine, coarse = leaves(randn(1, 2, 2, 4).to(device), torch.zeros(1, 2, 1, 2, device=device).double())
    with override(tile=4, tile_y=2):
        out = compose(fine, coarse, impl="triton")
        d_fine, _ = gradients(out, [fine, coarse])
    assert torch.equal(out, fine)
    assert torch.equal(d_fine, randn(*out.shape, seed=99).to(device))


def test_the_field_goes_on_beyond_the_border(device):
    fine = torch.full((1, 2, 2, 4), 50.0, device=device)
    coarse = torch.full((1, 2, 1, 2), 1.5, device=device)
    with override(tile=4, tile_y=2):
        assert torch.equal(compose(fine, coarse, impl="triton"), torch.full_like(fine, 53.0))


@pytest.mark.parametrize("fixed", [0, 1])
def test_the_gradient_of_the_coarse_field_is_the_adjoint(fixed, device):
    """The composition is linear in the coarse field."""
    spec = ComposeSpec((4, 6), reach=3.0, fixed=bool(fixed))
    out, _, d_coarse = spec.results(device)
    fine, coarse = spec.fields()
    assert_near(((out - fine) * spec.slope()).sum(), (coarse * d_coarse).sum())


@pytest.mark.parametrize("fixed", [0, 1])
def test_gradients_are_zero_where_they_must_be_and_nowhere_else(fixed, device):
    coarse, fine = randn(1, 2, 1, 4).to(device), torch.zeros(1, 2, 2, 8, device=device).double()
    fine[:, 1] = 0.25 - torch.arange(8.0)  # all look between the first two fine pixels: coarse 0 and 1
    fine[:, 1, :, 7] = -40.0
    inputs = leaves(fine, coarse)
    with override(tile=8, tile_y=2, deterministic=fixed):
        out = compose(*inputs, impl="triton")
        # A plain gradient passes straight on to the fine field: what remains is the slope of the coarse one.
        d_fine, d_coarse = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert (d_coarse[..., :2] != 0).all()
    assert not d_coarse[..., 2:].any()
    along_x = d_fine[:, 1] - 1
    assert (along_x[..., :7] != 0).all()
    assert not along_x[..., 7].any(), "clamped"
    assert (d_fine[:, 0] == 1).all(), "one coarse row: no slope along y"


# --- sums that do not depend on their order ---------------------------------------------------------------------------


def test_deterministic_algorithms_choose_fixed_point(device, launches):
    spec = ComposeSpec((4, 6), fixed=None)
    found = []
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic)
        launches.clear()
        found.append(spec.results(device))
        forward, backward, gathered = launches
        assert "FIXED" not in forward.constants
        assert [launch.constants["FIXED"] for launch in (backward, gathered)] == [deterministic] * 2
        expected = torch.int64 if deterministic else torch.float64
        assert backward.arguments["d_up"].dtype == gathered.arguments["grad"].dtype == expected
    for a, b in zip(*found, strict=True):
        assert_near(a, b, atol=1e-12, rtol=1e-12)


def test_fixed_point_gives_the_same_bits_in_any_order(device):
    fine, coarse = field_like(1, (2, 4), reach=3.0).float().to(device), field_like(1, (1, 2)).float().to(device)
    found = []
    for tile in ((2, 4), (2, 4), OTHER):
        inputs = leaves(fine, coarse)
        with override(deterministic=1, tile_y=tile[0], tile=tile[1]):
            found.append(gradients(compose(*inputs, impl="triton"), inputs))
    for first, *others in zip(*found, strict=True):
        for other in others:
            assert torch.equal(first, other)


@pytest.mark.parametrize("value", [0.0, NAN, INF, -INF])
def test_fixed_point_of_gradients_that_are_zero_or_no_numbers(value, device):
    inputs = leaves(field_like(1, (2, 4)).float().to(device), field_like(1, (1, 2)).float().to(device))
    slope = torch.zeros(1, 2, 2, 4, device=device)
    slope[0, 1, 1, 2] = value
    with override(deterministic=1, tile=4, tile_y=2):
        d_fine, d_coarse = torch.autograd.grad(compose(*inputs, impl="triton"), inputs, slope)
    assert d_coarse.isnan().all() if value else torch.equal(d_coarse, torch.zeros_like(d_coarse))
    assert not d_fine[..., :2].any()
    assert not d_fine[..., 0, :].any()


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 6), (2, 2, 2)], ids=str)
def test_nothing_is_written_around_the_results(size, device):
    fine, coarse = field_like(1, size, reach=9.0).to(device), field_like(1, tuple(s // 2 for s in size)).to(device)
    guard = Guarded()
    out, d_fine, d_up = guard.like(fine), guard.like(fine), guard.like(fine).zero_()
    with override(tile=4, tile_y=4):
        kernels.forward_launch(fine, coarse, out).run()
        kernels.backward_launch(
            randn(*size, seed=5)[None, None].to(device).expand_as(fine), fine, coarse, d_fine, d_up, None
        ).run()
    guard.assert_kept()
    for written in (out, d_fine, d_up):
        assert (written != guard.MARK).all()


def test_fields_are_read_where_they_are(device, launches):
    for layout in ("contiguous", "sliced", "transposed"):
        spec = ComposeSpec((2, 4), layouts=(layout,) * 3)
        fine, coarse, slope = *spec.fields(device), spec.slope(device)
        launches.clear()
        with spec.launched():
            inputs = leaves(fine, coarse)
            torch.autograd.grad(compose(*inputs, impl="triton"), inputs, slope)
        for launch in launches[:2]:
            assert launch.arguments["fine"].data_ptr() == fine.data_ptr()
            assert launch.arguments["coarse"].data_ptr() == coarse.data_ptr()
        assert launches[1].arguments["grad"].data_ptr() == slope.data_ptr()


def test_inputs_are_left_alone(device):
    spec = ComposeSpec((2, 4))
    inputs, slope = leaves(*spec.fields(device)), spec.slope(device)
    with spec.launched():
        torch.autograd.grad(compose(*inputs, impl="triton"), inputs, slope)
    for tensor, fresh in zip((*inputs, slope), (*spec.fields(device), spec.slope(device)), strict=True):
        assert torch.equal(tensor, fresh)
        assert tensor._version == 0


#: Strides, or their products, beyond 2^31 elements: size of the fine field, strides of batch, channel and axes.
FAR = {
    "samples": ((2, 2), (2**32 + 24, 16, 4, 1)),
    "channels": ((2, 2), (8, 2**32 + 8, 2, 1)),
    "rows": ((4, 2), (8, 2, 2**30 + 8, 4)),
    "pixels": ((2, 4), (8, 2, 8, 2**30 + 8)),
    "planes": ((2, 2, 2), (8, 1, 2**31 + 8, 8, 4)),
}


@pytest.mark.parametrize("what", ["fine", "coarse", "slope"])
@pytest.mark.parametrize("axis", list(FAR))
def test_addresses_have_64_bits(axis, what, device):
    torch.use_deterministic_algorithms(False)  # which would fill all of the memory
    size, strides = FAR[axis]
    if what == "coarse":
        size = tuple(2 * s for s in size) if axis != "planes" else (4, 2, 2)
    spec = ComposeSpec(size, batch=2 if axis == "samples" else 1, field_dtype=torch.float32)
    fine, coarse = spec.fields(device)
    tensors = {"fine": fine, "coarse": coarse, "slope": spec.slope(device)}
    tensors[what] = far_apart(tensors[what], strides)
    fine, coarse, slope = tensors.values()
    with override(tile=4, tile_y=4):
        out = compose(fine, coarse, impl="triton")
        d_fine, d_up = torch.empty_like(out), torch.zeros_like(out)
        kernels.backward_launch(slope, fine, coarse, d_fine, d_up, None).run()
    expected = spec.results(impl="reference")
    for a, b in zip((out, d_fine), expected, strict=False):
        assert_near(a.cpu(), b, atol=1e-5, rtol=1e-5)


# --- inside PyTorch ---------------------------------------------------------------------------------------------------


def test_opcheck(device):
    fine, coarse = field_like(1, (2, 2)).to(device), field_like(1, (1, 1)).to(device)
    with override(tile=2, tile_y=2):
        torch.library.opcheck(torch.ops.coverfast.compose_forward, tuple(leaves(fine, coarse)))
        torch.library.opcheck(torch.ops.coverfast.compose_backward, (torch.ones_like(fine), fine, coarse))


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph(dynamic, device):
    torch.compiler.reset()

    def run(fine, coarse):
        return compose(2 * fine, coarse, impl="triton") + 1

    results = []
    with override(tile=4, tile_y=2):
        for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)):
            inputs = leaves(field_like(1, (2, 4)).to(device), field_like(1, (1, 2)).to(device))
            out = function(*inputs)
            results.append([out, *gradients(out, inputs)])
    for eager, compiled in zip(*results, strict=True):
        assert_near(compiled, eager, atol=1e-14, rtol=1e-14)
    torch.compiler.reset()


def test_gradcheck_inside_cells(device):
    fine = 2 * randn(1, 2, 2, 4)
    fine = fine.floor() + 0.2 + 0.6 * (fine - fine.floor())
    inputs = leaves(fine.to(device), randn(1, 2, 1, 2, seed=1).to(device))
    with override(tile=4, tile_y=2):
        assert torch.autograd.gradcheck(
            lambda f, c: compose(f, c, impl="triton"), inputs, fast_mode=True, nondet_tol=1e-12
        )


def test_second_order_raises(device):
    inputs = leaves(field_like(1, (2, 2)).to(device), field_like(1, (1, 1)).to(device))
    with override(tile=2, tile_y=2):
        for wanted in inputs:
            out = compose(*inputs, impl="triton")
            (slope,) = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
            with pytest.raises(RuntimeError):
                torch.autograd.grad(slope.sum(), wanted)


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_alone(which, device):
    spec = ComposeSpec((2, 4))
    tensors, expected = spec.fields(device), spec.results(device)[1 + which]
    tensors[which].requires_grad_()
    with spec.launched():
        (found,) = torch.autograd.grad(compose(*tensors, impl="triton"), tensors[which], spec.slope(device))
    assert_near(found.cpu(), expected, atol=1e-14, rtol=1e-14)


def test_auto_takes_the_kernels_on_a_gpu_alone(device, launches):
    fine, coarse = field_like(1, (2, 4)).to(device), field_like(1, (1, 2)).to(device)
    two_steps = fine + warp(upsample_dvf(coarse, (2, 4)), fine, padding="border", impl="torch")
    assert_near(compose(fine, coarse), two_steps, atol=1e-12, rtol=1e-12)
    assert len(launches) == (0 if INTERPRETED else 1)
