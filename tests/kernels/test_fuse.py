"""The kernels of fusion against the definition, on the GPU or in Triton's interpreter; unwritten memory is NaN."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import KERNEL_LAYOUTS, SLOPE_LAYOUTS, assert_near, gradients, laid_out, leaves, randn
from torch import Tensor

pytest.importorskip("triton")

from coverfast import AffineDVF, warp
from coverfast.kernels import INTERPRETED
from coverfast.kernels import fuse as kernels
from coverfast.kernels.launch import override
from coverfast.ops.fuse import fuse_affine

from .field_cases import (
    INF,
    MARKS,
    NAN,
    Guarded,
    Spec,
    assert_equals_reference,
    assert_precise,
    far_apart,
    field_like,
    gradients_of,
    theta_like,
)

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU (test_interpreter.py runs these without one)", allow_module_level=True)

pytestmark = MARKS

SMALL = {"tile": 4, "tile_y": 2}


@dataclass(frozen=True)
class FuseSpec(Spec):
    """A call of `fuse_affine`. Layouts of the field, the map, the gradient that comes back."""

    turn: float = 0.2

    def inputs(self, device: str = "cpu") -> list[Tensor]:
        dvf = field_like(self.batch, self.size, reach=self.reach, step=self.step, seed=self.seed)
        theta = theta_like(self.batch, len(self.size), seed=self.seed + 1, turn=self.turn)
        pairs = zip((dvf, theta), self.layouts, strict=False)
        return [laid_out(x.to(device, self.field_dtype), layout) for x, layout in pairs]

    def slope(self, device: str = "cpu") -> Tensor:
        return self._map(2, (self.batch, len(self.size), *self.size), self.field_dtype, device)

    def results(self, device: str = "cpu", impl: str = "triton", *, exact: bool = False) -> list[Tensor]:
        """Value, gradients of the field and of the map."""
        inputs, slope = self.inputs(device), self.slope(device)
        if exact:
            inputs, slope = [x.double() for x in inputs], slope.double()
        with self.launched():
            wanted = leaves(*inputs)
            return gradients_of(fuse_affine(*wanted, impl=impl), wanted, slope)


@st.composite
def fuse_specs(draw: st.DrawFn, field_dtypes: tuple[torch.dtype, ...] = (torch.float64,), least: int = 0) -> FuseSpec:
    """Any valid call that the interpreter ends within a second."""
    size = draw(st.tuples(*[st.integers(1, most) for most in draw(st.sampled_from(((5, 11), (5, 11), (2, 3, 9))))]))
    return FuseSpec(
        size,
        batch=draw(st.integers(least, 2)),
        field_dtype=draw(st.sampled_from(field_dtypes)),
        layouts=(
            draw(st.sampled_from(KERNEL_LAYOUTS)),
            draw(st.sampled_from(("contiguous", "sliced", "transposed", "expanded"))),
            draw(st.sampled_from(SLOPE_LAYOUTS)),
        ),
        reach=draw(st.sampled_from((0.4, 9.0, 40.0))),
        seed=draw(st.integers(0, 2**10)),
        tile=draw(st.sampled_from(((4, 8), (4, 8), (2, 4)))),
        turn=draw(st.sampled_from((0.0, 0.2, 1.0))),
    )


# --- values and gradients ---------------------------------------------------------------------------------------------


@given(fuse_specs())
def test_equals_reference(device, spec):
    ours = assert_equals_reference(spec, device)
    assert all(t.is_contiguous() for t in ours)


CORNERS = {
    "a pixel": FuseSpec((1, 1)),
    "a voxel": FuseSpec((1, 1, 1)),
    "two samples in rows": FuseSpec((2, 5), batch=2, layouts=("channels_last", "contiguous", "channels_last")),
    "fields apart": FuseSpec((4, 3), batch=2, layouts=("sliced", "sliced", "sliced_rows")),
    "fields crossed": FuseSpec((3, 6), batch=2, layouts=("transposed", "transposed", "expanded")),
    "a gradient of one number": FuseSpec((2, 2, 5), batch=2, layouts=("sliced_rows", "expanded", "scalar")),
    "an empty batch": FuseSpec((2, 4), batch=0),
    "an empty batch of volumes": FuseSpec((2, 2, 2), batch=0),
    "the library's own tile": FuseSpec((3, 40), batch=2, tile=None, fixed=None),
    "the library's own tile in 3D": FuseSpec((2, 5, 7), batch=2, tile=None, fixed=None),
    "more pixels than a tile": FuseSpec((5, 11), batch=2, tile=(2, 4)),
    "integer displacements": FuseSpec((4, 8), step=1.0, reach=3.0),
    "far beyond": FuseSpec((4, 4), reach=1e4),
}


@pytest.mark.parametrize("name", list(CORNERS))
def test_equals_reference_at(name, device):
    assert_equals_reference(CORNERS[name], device, 1e-9)


@settings(max_examples=6)
@given(fuse_specs(field_dtypes=(torch.float32,), least=1))
def test_float32_error_is_that_of_torch(device, spec):
    ours = assert_precise(spec, device)
    assert [t.dtype for t in ours] == [torch.float32] * 3


@pytest.mark.parametrize("size", [(3, 8), (2, 2, 8)], ids=str)
def test_the_identity_leaves_a_field_exactly_as_it_is(size, device):
    for dtype in (torch.float32, torch.float64):
        n = len(size)
        dvf = field_like(1, size, reach=40.0).to(device, dtype)
        theta = torch.eye(n, n + 1, device=device, dtype=dtype)[None]
        slope = randn(1, n, *size, seed=5).to(device, dtype)
        with override(**SMALL):
            inputs = leaves(dvf, theta)
            out = fuse_affine(*inputs, impl="triton")
            d_dvf, _ = torch.autograd.grad(out, inputs, slope)
            assert not fuse_affine(torch.zeros_like(dvf), theta, impl="triton").any()
        assert torch.equal(out, dvf)
        assert torch.equal(d_dvf, slope)


def test_nothing_cancels_far_from_the_centre(device):
    """By a map next to the identity pixels 2000 from the centre move by 0.02: float32 knows their places to 1e-4."""
    dvf = (1e-3 * randn(1, 2, 2, 4001)).float()
    theta = (torch.eye(2, 3) + 1e-5 * randn(1, 2, 3)).float()
    exact = fuse_affine(dvf.double(), theta.double(), impl="reference")
    with override(tile=1024, tile_y=2):
        found = fuse_affine(dvf.to(device), theta.to(device), impl="triton").cpu().double()
    assert float(exact.abs().max()) > 0.01
    assert float((found - exact).abs().max()) < 1e-8


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_stays_in_its_pixel(value, device):
    spec = FuseSpec((2, 6), batch=2, tile=(2, 4))
    dvf, theta = spec.inputs(device)
    expected = fuse_affine(dvf, theta, impl="torch")
    dvf[1, 0, 1, 2] = value
    with spec.launched():
        found = fuse_affine(dvf, theta, impl="triton")
    spoilt = torch.zeros(2, 1, 2, 6, dtype=torch.bool, device=device)
    spoilt[1, 0, 1, 2] = True
    assert not found[spoilt.expand_as(found)].isfinite().any()
    assert_near(found.masked_fill(spoilt, 0), expected.masked_fill(spoilt, 0))


# --- what it means ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3])
def test_maps_follow_one_another(n, device):
    size = (4, 7) if n == 2 else (2, 3, 7)
    first, second = theta_like(2, n, seed=1), theta_like(2, n, seed=3)
    matrix = second[..., :n]
    both = torch.cat([matrix @ first[..., :n], matrix @ first[..., n:] + second[..., n:]], 2)
    with override(tile=8, tile_y=4):
        found = fuse_affine(AffineDVF(first, size).dense().to(device), second.to(device), impl="triton").cpu()
    assert_near(found, AffineDVF(both, size).dense(), atol=1e-11)


def test_an_image_sampled_once_is_that_of_the_definition(device):
    x, dvf, theta = randn(1, 2, 5, 8), field_like(1, (5, 8)), theta_like(1, 2, seed=4, turn=0.1)
    expected = warp(x, fuse_affine(dvf, theta, impl="reference"), impl="reference")
    with override(tile=8, tile_y=4):
        fused = fuse_affine(dvf.to(device), theta.to(device), impl="triton")
        assert_near(warp(x.to(device), fused, impl="triton").cpu(), expected)


# --- sums -------------------------------------------------------------------------------------------------------------


def test_the_gradient_of_the_map_is_summed_the_same_way_on_every_run(device, launches):
    """In a fixed order, and as well as float32 knows the addends: partial sums by halves, their sum in float64."""
    size = (64, 128)
    inputs = leaves(field_like(1, size).float().to(device), theta_like(1, 2).float().to(device))
    slope = (1 + randn(1, 2, *size)).float().to(device)
    found = [torch.autograd.grad(fuse_affine(*inputs, impl="triton"), inputs[1], slope)[0].cpu() for _ in range(2)]
    partials = launches[1].arguments["partials"]
    assert partials.dtype == torch.float32
    assert partials.shape == (1, 16, 2, 3)
    assert torch.equal(*found)
    c = torch.tensor([31.5, 63.5])[:, None, None]
    p = torch.stack(torch.meshgrid(*(torch.arange(s) for s in size), indexing="ij"))
    away = torch.cat([p - c + inputs[0][0].detach().cpu().double(), torch.ones(1, *size).double()])
    g = slope[0].cpu().double()
    expected, moduli = torch.einsum("ihw,jhw->ij", g, away), torch.einsum("ihw,jhw->ij", g.abs(), away.abs())
    assert ((found[0][0] - expected).abs() <= 2**-23 * moduli).all()


def test_gradients_of_the_map_are_zero_where_they_must_be_and_nowhere_else(device):
    """A slope along one axis of one sample alone."""
    spec = FuseSpec((3, 5), batch=2, tile=(2, 4))
    inputs, slope = leaves(*spec.inputs(device)), torch.zeros(2, 2, 3, 5, device=device).double()
    slope[1, 1, :, 3:] = 1.0
    with spec.launched():
        d_dvf, d_theta = torch.autograd.grad(fuse_affine(*inputs, impl="triton"), inputs, slope)
    assert not d_theta[0].any()
    assert not d_theta[1, 0].any()
    assert (d_theta[1, 1] != 0).all()
    assert d_theta[1, 1, 2] == 6
    assert not d_dvf[0].any()
    assert not d_dvf[1, ..., :3].any()
    assert (d_dvf[1, ..., 3:] != 0).all()


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 6), (2, 3, 3)], ids=str)
def test_nothing_is_written_around_the_results(size, device):
    spec = FuseSpec(size, batch=2, tile=(2, 4))
    (dvf, theta), guard = spec.inputs(device), Guarded()
    out, d_dvf = guard.like(dvf), guard.like(dvf)
    with spec.launched():
        kernels.forward_launch(dvf, theta, out).run()
        launch, partials = kernels.backward_launch(spec.slope(device), dvf, theta, d_dvf, to_theta=True)
        written = guard.like(partials)
        replace(launch, arguments={**launch.arguments, "partials": written}).run()
    guard.assert_kept()
    for each in (out, d_dvf, written):
        assert (each != guard.MARK).all()


def test_fields_are_read_where_they_are(device, launches):
    for layout in ("contiguous", "sliced", "transposed"):
        spec = FuseSpec((2, 4), layouts=(layout,) * 3)
        (dvf, theta), slope = spec.inputs(device), spec.slope(device)
        launches.clear()
        with spec.launched():
            inputs = leaves(dvf, theta)
            torch.autograd.grad(fuse_affine(*inputs, impl="triton"), inputs, slope)
        assert [launch.kernel.__name__ for launch in launches] == ["fuse_forward_kernel", "fuse_backward_kernel"]
        for launch in launches:
            assert launch.arguments["dvf"].data_ptr() == dvf.data_ptr()
        assert launches[1].arguments["grad"].data_ptr() == slope.data_ptr()


def test_inputs_are_left_alone(device):
    spec = FuseSpec((2, 4))
    inputs, slope = leaves(*spec.inputs(device)), spec.slope(device)
    with spec.launched():
        torch.autograd.grad(fuse_affine(*inputs, impl="triton"), inputs, slope)
    for tensor, fresh in zip((*inputs, slope), (*spec.inputs(device), spec.slope(device)), strict=True):
        assert torch.equal(tensor, fresh)
        assert tensor._version == 0


#: Strides, or their products, beyond 2^31 elements: size of the field, strides of batch, channel and axes.
FAR = {
    "samples": ((2, 2), (2**32 + 24, 16, 4, 1)),
    "channels": ((2, 2), (8, 2**32 + 8, 2, 1)),
    "rows": ((4, 2), (8, 2, 2**30 + 8, 4)),
    "pixels": ((2, 4), (8, 2, 8, 2**30 + 8)),
    "planes": ((2, 2, 2), (8, 1, 2**31 + 8, 8, 4)),
}


@pytest.mark.parametrize("what", ["dvf", "slope"])
@pytest.mark.parametrize("axis", list(FAR))
def test_addresses_have_64_bits(axis, what, device):
    torch.use_deterministic_algorithms(False)  # which would fill all of the memory
    size, strides = FAR[axis]
    spec = FuseSpec(size, batch=2 if axis == "samples" else 1, field_dtype=torch.float32)
    (dvf, theta), slope = spec.inputs(device), spec.slope(device)
    dvf, slope = (far_apart(x, strides) if what == name else x for name, x in (("dvf", dvf), ("slope", slope)))
    with override(tile=4, tile_y=4):
        found = [fuse_affine(dvf, theta, impl="triton")]
        found += kernels.backward(slope, dvf, theta, to_dvf=True, to_theta=True)
    for a, b in zip(found, spec.results(impl="reference"), strict=True):
        assert_near(a.cpu(), b, atol=1e-5, rtol=1e-5)


# --- inside PyTorch ---------------------------------------------------------------------------------------------------


def test_opcheck(device):
    dvf, theta = FuseSpec((2, 2)).inputs(device)
    with override(**SMALL):
        torch.library.opcheck(torch.ops.coverfast.fuse_forward, tuple(leaves(dvf, theta)))
        for asked in ((True, True), (False, True), (True, False)):
            torch.library.opcheck(torch.ops.coverfast.fuse_backward, (torch.ones_like(dvf), dvf, theta, *asked))


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph(dynamic, device):
    torch.compiler.reset()

    def run(dvf, theta):
        return fuse_affine(2 * dvf, theta, impl="triton") + 1

    results = []
    with override(**SMALL):
        for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)):
            inputs = leaves(*FuseSpec((2, 4)).inputs(device))
            out = function(*inputs)
            results.append([out, *gradients(out, inputs)])
    for eager, compiled in zip(*results, strict=True):
        assert_near(compiled, eager, atol=1e-14, rtol=1e-14)
    torch.compiler.reset()


@pytest.mark.parametrize("size", [(2, 3), (2, 1, 3)], ids=str)
def test_gradcheck(size, device):
    inputs = leaves(*FuseSpec(size).inputs(device))
    with override(**SMALL):
        assert torch.autograd.gradcheck(lambda d, t: fuse_affine(d, t, impl="triton"), inputs, fast_mode=True)


def test_second_order_raises(device):
    inputs = leaves(*FuseSpec((2, 2)).inputs(device))
    with override(**SMALL):
        for wanted in inputs:
            out = fuse_affine(*inputs, impl="triton")
            (slope,) = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
            with pytest.raises(RuntimeError):
                torch.autograd.grad(slope.sum(), wanted)


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_alone_is_all_the_work(which, device, launches):
    spec = FuseSpec((2, 4))
    tensors, expected = spec.inputs(device), spec.results(device)[1 + which]
    tensors[which].requires_grad_()
    with spec.launched():
        (found,) = torch.autograd.grad(fuse_affine(*tensors, impl="triton"), tensors[which], spec.slope(device))
    assert_near(found.cpu(), expected, atol=1e-14, rtol=1e-14)
    asked = [launches[-1].constants[name] for name in ("TO_DVF", "TO_THETA")]
    assert asked == [which == 0, which == 1]


def test_auto_takes_the_kernels_on_a_gpu_alone(device, launches):
    dvf, theta = FuseSpec((2, 4)).inputs(device)
    assert_near(fuse_affine(dvf, theta), fuse_affine(dvf, theta, impl="torch"), atol=1e-12, rtol=1e-12)
    assert len(launches) == (0 if INTERPRETED else 1)
