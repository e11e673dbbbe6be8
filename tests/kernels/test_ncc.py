"""The kernels of the local correlation against the definition, on the GPU or in Triton's interpreter; unwritten memory
is NaN.
"""

from dataclasses import dataclass, replace
from math import inf, nan, prod, sqrt

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import DTYPES, KERNEL_LAYOUTS, assert_near, gradients, laid_out, leaves, randn

pytest.importorskip("triton")

from coverfast.kernels import INTERPRETED
from coverfast.kernels import ncc as kernels
from coverfast.kernels.launch import override
from coverfast.layout import new_like
from coverfast.ops.ncc import ncc_loss

from .field_cases import MARKS, Guarded, far_apart

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU (test_interpreter.py runs these without one)", allow_module_level=True)

pytestmark = MARKS


@dataclass(frozen=True)
class Spec:
    """A call, in numbers; pixels of a tile and rows of a walk."""

    size: tuple[int, ...]
    window: tuple[int, ...]
    batch: int = 1
    channels: int = 1
    dtype: torch.dtype = torch.float64
    layouts: tuple[str, str] = ("contiguous", "contiguous")
    wanted: tuple[bool, bool] = (True, True)
    tile: int | None = 8
    rows: int | None = 4
    seed: int = 0

    def images(self, device="cpu"):
        """Two in [0, 1] that have half of what they show in common."""
        shape = (self.batch, self.channels, *self.size)
        x, own = (randn(*shape, seed=2 * self.seed + i).sigmoid() for i in (0, 1))
        pair = zip((x, (x + own) / 2), self.layouts, strict=True)
        return [laid_out(image.to(device, self.dtype), layout) for image, layout in pair]

    def results(self, device="cpu", impl="triton", *, exact=False):
        """The loss and the gradients that are wanted, of a sum, so that they are of the order of 1; on the CPU."""
        pair = [image.double() if exact else image for image in self.images(device)]
        inputs = [image.detach().requires_grad_(asks) for image, asks in zip(pair, self.wanted, strict=True)]
        numbers = {"tile": self.tile, "rows": self.rows}
        with override(**{name: number for name, number in numbers.items() if number}):
            loss = ncc_loss(*inputs, self.window, denominator=1.0, impl=impl)
            slopes = torch.autograd.grad(loss, [x for x in inputs if x.requires_grad]) if any(self.wanted) else ()
        return [t.detach().cpu() for t in (loss, *slopes)]


def assert_equals_reference(spec, device):
    for a, b in zip(spec.results(device), spec.results(impl="reference"), strict=True):
        assert_near(a, b, atol=1e-9, rtol=1e-9)


@st.composite
def specs(draw):
    """Any valid call that the interpreter ends within half a second."""
    n = draw(st.sampled_from((2, 3)))
    size = draw(st.tuples(*[st.integers(1, most) for most in ((6, 7) if n == 2 else (2, 3, 4))]))
    window = draw(st.tuples(*[st.sampled_from((1, 3, 5, 9))] * (n - 1), st.sampled_from((1, 3, 5, 21))))
    batch, channels = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    reach = [min(w, 2 * s - 1) for w, s in zip(window, size, strict=True)]
    assume(batch * channels * prod(size[:-2]) * (size[-2] + reach[-2]) * reach[-1] <= 30)
    return Spec(
        size,
        window,
        batch,
        channels,
        layouts=draw(st.tuples(*[st.sampled_from(KERNEL_LAYOUTS)] * 2)),
        wanted=draw(st.sampled_from(((True, True), (False, True), (True, False), (False, False)))),
        tile=draw(st.sampled_from((4, 8))),
        rows=draw(st.sampled_from((1, 2, 8))),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=6)
@given(specs())
def test_equals_reference(device, spec):
    assert_equals_reference(spec, device)


CORNERS = {
    "one pixel": Spec((1, 1), (3, 9)),
    "one voxel": Spec((1, 1, 1), (3, 1, 3), channels=2),
    "many tiles and walks": Spec((5, 6), (3, 3), tile=4, rows=2, wanted=(False, True)),
    "rows that registers do not hold": Spec((7, 2), (13, 3), rows=8, wanted=(True, False)),
    "a volume, windows beyond it": Spec((2, 2, 3), (9, 9, 9), wanted=(False, True)),
    "planes of two samples": Spec((3, 2, 3), (3, 3, 1), batch=2, layouts=("expanded", "sliced"), wanted=(False, True)),
    "the library's own launch": Spec((2, 3, 4), (3, 3, 3), tile=None, rows=None, wanted=(False, True)),
}


@pytest.mark.parametrize("name", list(CORNERS))
def test_equals_reference_at(name, device):
    assert_equals_reference(CORNERS[name], device)


@pytest.mark.slow
@settings(max_examples=10)
@given(specs(), st.sampled_from(((3, 4, 5), (12, 13), (1, 17))), st.sampled_from((3, 9, 11, 13)))
def test_equals_reference_in_wider_windows(device, spec, size, width):
    assert_equals_reference(replace(spec, size=size, window=(width,) * len(size), batch=min(1, spec.batch)), device)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(
    "spec",
    [Spec((3, 8), (3, 3), wanted=(False, True)), Spec((2, 2, 4), (3, 1, 3), wanted=(True, False))],
    ids=["2D", "3D"],
)
def test_low_precision_against_float64(spec, dtype, device):
    """Sums in float32, gradients rounded once."""
    spec = replace(spec, dtype=dtype)
    found, truth = spec.results(device), spec.results(impl="reference", exact=True)
    assert [t.dtype for t in found] == [torch.float32, *[dtype] * sum(spec.wanted)]
    assert abs(float(found[0] - truth[0])) < 1e-6 * prod(spec.size)
    for a, b in zip(found[1:], truth[1:], strict=True):
        assert bool(((a - b).abs() <= torch.finfo(dtype).eps * b.abs() + 4e-6 * b.abs().max()).all())


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(0.0, torch.float32), (1.0, torch.float32), (0.0, torch.bfloat16), (0.5, torch.bfloat16)],
    ids=str,
)
def test_constant_regions_are_harmless(value, dtype, device):
    """One value everywhere, and in a patch: losses are finite, gradients below the bound that the docstring states."""
    noise, patch = (randn(1, 1, 3, 8, seed=i).sigmoid() for i in (3, 4))
    patch[..., :5] = value  # windows whose windows lie in it: the first columns
    pairs = (torch.full_like(noise, value), noise), (patch, noise)
    for index, pair in enumerate(pairs):
        inputs = leaves(*(image.to(device, dtype) for image in pair))
        with override(tile=8, rows=8):
            loss = ncc_loss(*inputs, 3, denominator=1.0, impl="triton")
            slopes = torch.autograd.grad(loss, inputs)
        assert 0 <= loss <= noise.numel()
        for slope in slopes:
            assert slope.abs().max() <= 2 * sqrt(2**2 * 3**2 / 1e-5)  # not NaN either
            still = slope if index == 0 else slope[..., :3]
            assert still.abs().max() < 0.02
        if index == 0:
            assert loss.item() == pytest.approx(prod(noise.shape), abs=1e-3)


def test_a_match_is_never_beyond_one(device):
    """Not even where rounding exceeds eps, as in images that are not in [0, 1]."""
    still = torch.full((1, 1, 1, 8), 200.3, device=device)
    noise = still + 2e-4 * randn(1, 1, 1, 8, dtype=torch.float32).to(device)
    with override(tile=8, rows=4):
        for pair in ((still, still), (still, noise), (noise, noise)):
            assert 0 <= ncc_loss(*pair, (1, 9), eps=1e-12, impl="triton") <= 1


@pytest.mark.parametrize(("which", "bad"), [(0, nan), (1, inf), (0, -inf)])
def test_a_pixel_that_is_not_finite_shows(which, bad, device):
    inputs = Spec((2, 4), ()).images(device)
    inputs[which][0, 0, 1, 1] = bad
    inputs = leaves(*inputs)
    with override(tile=4, rows=4):
        loss = ncc_loss(*inputs, (1, 3), impl="triton")
        slopes = torch.autograd.grad(loss, inputs)
    assert loss.isnan()
    for slope in slopes:
        assert slope[..., 1, :].isnan().any()
        assert slope[..., 0, :].isfinite().all()  # windows of one row


def test_a_batch_in_parts_is_the_same(device, launches, monkeypatch):
    spec = Spec((2, 2, 4), (1, 3, 3), batch=2, wanted=(False, True))
    whole = spec.results(device)
    before = len(launches)
    monkeypatch.setattr(kernels, "PART", 5 * 16 * 8)  # one sample
    monkeypatch.setattr(kernels, "CHUNK", 3 * 2 * 3 * 8)  # three of its eight columns
    for a, b in zip(spec.results(device), whole, strict=True):
        assert_near(a, b, atol=1e-12, rtol=1e-12)
    assert (before, len(launches) - before) == (4, 2 * (1 + 2 * 3 + 1))


def test_gives_the_same_bits(device):
    spec = Spec((3, 6), (3, 3), dtype=torch.float32, tile=4, rows=2, wanted=(False, True))
    for a, b in zip(spec.results(device), spec.results(device), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layouts", [("channels_last", "contiguous"), ("sliced", "sliced_rows")])
def test_gradients_lie_as_their_images(layouts, device):
    pair = Spec((2, 3), (3, 3), channels=2, layouts=layouts).images(device)
    inputs = leaves(*pair)
    with override(tile=4, rows=4):
        slopes = torch.autograd.grad(ncc_loss(*inputs, 3, impl="triton"), inputs)
    for image, slope in zip(pair, slopes, strict=True):
        assert slope.stride() == new_like(image).stride()


@pytest.mark.parametrize("size", [(3, 5), (2, 2, 3)], ids=str)
def test_nothing_is_written_around_the_slopes(size, device):
    x, y = Spec(size, (), batch=2).images(device)
    guard = Guarded()
    targets = guard.like(x), guard.like(y)
    with override(tile=8, rows=2):
        for launch in kernels.launches(x, y, (1,) * (len(size) - 1) + (3,), 1e-5, *targets, []):
            launch.run()
    guard.assert_kept()
    assert all((written != guard.MARK).all() for written in targets)


@pytest.mark.parametrize("which", [0, 1])
def test_samples_may_be_far_apart_and_are_read_in_place(which, device, launches):
    spec = Spec((2, 3), (3, 3), batch=2, dtype=torch.float16, layouts=("contiguous", "contiguous"))
    pair = spec.images(device)
    pair[which] = far_apart(pair[which], (2**32 + 24, 6, 3, 1))
    with override(tile=4, rows=4):
        loss = ncc_loss(*pair, 3, denominator=1.0, impl="triton")
    assert launches[0].arguments["xy"[which]].data_ptr() == pair[which].data_ptr()
    assert_near(loss.cpu(), ncc_loss(*spec.images(), 3, denominator=1.0, impl="torch"), atol=1e-4, rtol=1e-4)


def test_inputs_are_left_alone(device):
    spec = Spec((3, 4), (3, 3))
    inputs = leaves(*spec.images(device))
    with override(tile=4, rows=4):
        torch.autograd.grad(ncc_loss(*inputs, 3, impl="triton"), inputs)
    for tensor, fresh in zip(inputs, spec.images(device), strict=True):
        assert torch.equal(tensor, fresh)
        assert tensor._version == 0


# --- inside PyTorch ---------------------------------------------------------------------------------------------------


def test_opcheck_and_compile(device):
    x, y = Spec((2, 3), (), dtype=torch.float32).images(device)
    (y,) = leaves(y)
    with override(tile=4, rows=4):
        torch.library.opcheck(torch.ops.coverfast.ncc_forward, (x, y, [3, 1], 1e-5, False, True, "triton"))
        torch.compiler.reset()
        results = []
        for function in (ncc_loss, torch.compile(ncc_loss, fullgraph=True, backend="aot_eager")):
            loss = function(x, y, (3, 1), impl="triton")
            results.append([loss, *gradients(loss, [y])])
        torch.compiler.reset()
    for eager, compiled in zip(*results, strict=True):
        assert_near(compiled, eager, atol=1e-6, rtol=1e-6)


def test_second_order_gradients_are_refused(device):
    x, y = leaves(*Spec((2, 3), ()).images(device))
    with override(tile=4, rows=4):
        (slope,) = torch.autograd.grad(ncc_loss(x, y, 3, impl="triton"), y, create_graph=True)
    with pytest.raises(RuntimeError):
        (slope.square().sum() + y.sum()).backward()


def test_auto_takes_the_kernels_on_a_gpu_alone_and_only_what_is_asked_for(device, launches):
    x, y = Spec((2, 3), ()).images(device)
    ncc_loss(x, y, 3)
    assert len(launches) == (0 if INTERPRETED else 1)
    launches.clear()
    with override(tile=4, rows=4):
        ncc_loss(x, y, 3, impl="triton")
        assert len(launches) == 1
        ncc_loss(x, *leaves(y), 3, impl="triton")
    assert [launch.constants["MAPS"] for launch in launches[1:]] == [0, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 128, 128, 128), (24, 1, 384, 384)], ids=str)
def test_at_real_sizes(shape, dtype):
    """As its own torch formulation in float64, in the memory of 4.25 maps beside the images."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, own = (torch.rand(shape, generator=generator, device="cuda") for _ in range(2))
    x, y = x.to(dtype), ((x + own) / 2).to(dtype)
    results = []
    for impl, pair in (("triton", (x, y)), ("torch", (x.double(), y.double()))):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (wanted,) = leaves(pair[1])
        loss = ncc_loss(pair[0], wanted, denominator=1.0, impl=impl)
        results.append([loss.detach(), *torch.autograd.grad(loss, wanted)])
        if impl == "triton":
            assert torch.cuda.max_memory_allocated() - before < 4.5 * 4 * x.numel()
    (loss, slope), (exact, truth) = results
    assert abs(float(loss - exact)) < 1e-6 * x.numel()
    allowed = torch.finfo(dtype).eps * truth.abs() + 1e-5 * truth.abs().max()
    assert bool(((slope - truth).abs() <= allowed).all())
