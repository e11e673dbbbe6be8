"""The kernels of warp, composition and losses as training runs them: real sizes, CUDA graphs, memory. Need a GPU."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from math import prod

import pytest
import torch
from strategies import assert_near, assert_within_budget, laid_out, leaves
from torch import Tensor

from coverfast import (
    AffineDVF,
    VectorPyramid,
    compose,
    consistency_loss,
    end_point_error,
    upsample_dvf,
    vector_loss,
    warp,
)
from coverfast.ops.fuse import fuse_affine
from coverfast.ops.losses import field_errors
from coverfast.ops.warp import resample, warp_up

from .field_cases import theta_like

pytestmark = pytest.mark.gpu


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype, device="cuda")


def features(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, layout: str = "channels_last") -> Tensor:
    return laid_out(normal(*shape, dtype=dtype, seed=seed), layout)


def field(batch: int, size: Sequence[int], seed: int = 0, reach: float = 3.0) -> Tensor:
    """Displacements of some pixels in whole 64ths: where they point is exact in float32, at integers too."""
    dvf = normal(batch, len(size), *size, seed=seed).mul_(64 * reach / 2).clamp_(-64 * reach, 64 * reach)
    return dvf.round_().div_(64)


def affine(batch: int, size: Sequence[int], seed: int = 0) -> AffineDVF:
    return AffineDVF(theta_like(batch, len(size), seed=seed, turn=0.05).float().cuda(), tuple(size))


def value_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], slope: Tensor | None = None
) -> list[Tensor]:
    """What `function` gives for leaves of the inputs, and the gradients of all of them."""
    inputs = leaves(*inputs)
    out = function(*inputs)
    slope = normal(*out.shape, seed=9).to(out.dtype) if slope is None else slope
    return [out.detach(), *torch.autograd.grad(out, inputs, slope)]


def needs(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB")


def assert_precise(function: Callable[..., Tensor], inputs: Sequence[Tensor], slack: float) -> None:
    """Errors at most twice those of torch in the same precision, against torch in float64."""
    ours, eager = (value_and_gradients(partial(function, impl=impl), inputs) for impl in ("triton", "torch"))
    slope = normal(*ours[0].shape, seed=9).to(ours[0].dtype).double()
    truth = value_and_gradients(partial(function, impl="torch"), [x.double() for x in inputs], slope)
    assert_within_budget(ours, eager, truth, slack)
    for x in truth:
        assert float(x.abs().max()) > 1e-3


# --- real sizes -------------------------------------------------------------------------------------------------------

SCENES = {
    "projections of a volume": ((2, 8, 128, 128, 128), torch.bfloat16),
    "features of pictures": ((24, 32, 384, 384), torch.bfloat16),
    "features of a volume": ((2, 32, 128, 128, 128), torch.float32),
}


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("scene", list(SCENES))
def test_warp_at_real_sizes(scene, padding):
    needs(30)
    shape, dtype = SCENES[scene]
    inputs = features(*shape, dtype=dtype), field(shape[0], shape[2:])
    assert_precise(partial(warp, padding=padding), inputs, 2 + shape[1])


@pytest.mark.parametrize("scene", list(SCENES))
def test_warp_up_at_real_sizes(scene):
    needs(30)
    shape, dtype = SCENES[scene]
    inputs = features(*shape, dtype=dtype), field(shape[0], [s // 2 for s in shape[2:]], reach=2.0)
    assert_precise(warp_up, inputs, 8 + shape[1])


@pytest.mark.parametrize("scene", list(SCENES))
def test_warp_of_an_affine_field_at_real_sizes(scene):
    """Where it points is rounded otherwise: by at most a few 1e-5 pixels."""
    needs(20)
    shape, dtype = SCENES[scene]
    x, dvf = features(*shape, dtype=dtype), affine(shape[0], shape[2:])
    ours = value_and_gradients(partial(warp, dvf=dvf, impl="triton"), [x])
    theirs = value_and_gradients(partial(warp, dvf=dvf.dense(), impl="torch"), [x])
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a.float(), b.float(), atol=2e-3, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("size", [(24, (384, 384)), (2, (128, 128, 128))], ids=str)
def test_compose_at_real_sizes(size):
    needs(10)
    batch, size = size
    inputs = field(batch, size), field(batch, [s // 2 for s in size], seed=1)
    assert_precise(compose, inputs, 16)


@pytest.mark.parametrize("size", [(24, (384, 384)), (2, (128, 128, 128))], ids=str)
def test_fuse_at_real_sizes(size):
    needs(10)
    batch, size = size
    n = len(size)
    dvf, theta = field(batch, size), theta_like(batch, n, turn=0.05).float().cuda()
    slope = normal(batch, n, *size, seed=9)
    ours = value_and_gradients(partial(fuse_affine, impl="triton"), (dvf, theta), slope)
    truth = value_and_gradients(partial(fuse_affine, impl="torch"), [dvf.double(), theta.double()], slope.double())
    for a, b in zip(ours[:2], truth[:2], strict=True):
        assert_near(a.double(), b, atol=2e-5, rtol=1e-6)
    # A sum of 2^17 to 2^21 addends of up to 200: errors of float32 are a fraction of the sum of their moduli.
    moduli = float(slope.abs().sum()) / batch * max(size) / 2
    assert float((ours[2].double() - truth[2]).abs().max()) <= 2**-23 * moduli


@pytest.mark.parametrize("scene", list(SCENES))
def test_consistency_at_real_sizes(scene):
    """The sum of the cosines, so that gradients are of the order of 1."""
    needs(40)
    shape, dtype = SCENES[scene]
    inputs = features(*shape, dtype=dtype), features(*shape, dtype=dtype, seed=1), field(shape[0], shape[2:])

    total = partial(consistency_loss, mask="inside", denominator=1.0)
    one = torch.ones((), device="cuda")
    ours, eager = (value_and_gradients(partial(total, impl=impl), inputs, one) for impl in ("triton", "torch"))
    truth = value_and_gradients(partial(total, impl="torch"), [x.double() for x in inputs], one.double())
    assert abs(float(ours[0] - truth[0])) < 1e-6 * shape[0] * prod(shape[2:])
    assert_within_budget(ours[1:], eager[1:], truth[1:], 2.0)
    plain = value_and_gradients(partial(total, dvf=inputs[2], impl="triton"), inputs[:2], one)
    assert torch.equal(plain[0], ours[0])
    for a, b in zip(plain[1:], ours[1:3], strict=True):
        assert_near(a.float(), b.float(), atol=1e-5, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("size", [(24, (384, 384)), (2, (128, 128, 128))], ids=str)
def test_field_errors_at_real_sizes(size):
    batch, size = size
    pred, target = field(batch, size), field(batch, size, seed=1)
    slope = torch.tensor(1e6, device="cuda")
    for loss in (vector_loss, end_point_error):
        ours = value_and_gradients(partial(loss, mask="inside", impl="triton"), [pred, target], slope)
        doubles = pred.double(), target.double()
        truth = value_and_gradients(partial(loss, mask="inside", impl="torch"), doubles, slope.double())
        for a, b in zip(ours, truth, strict=True):
            assert_near(a.double(), b, atol=1e-6, rtol=1e-5)
        assert float(truth[1].abs().max()) > 1e-2


# --- more than 2^31 elements ------------------------------------------------------------------------------------------


def corners(size: Sequence[int], width: int) -> Iterator[tuple[slice, ...]]:
    """The boxes of this width at the corners of a grid, and the one in the middle."""
    yield from product(*((slice(0, width), slice(s - width, s)) for s in size))
    yield tuple(slice(s // 2 - width // 2, s // 2 - width // 2 + width) for s in size)


def assert_right_around(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], slope: Tensor, found: Sequence[Tensor], width: int = 12
) -> None:
    """Value and gradients in boxes of the last sample, 4 pixels from where they are cut: fields reach 2 at most."""
    size = inputs[0].shape[2:]
    for box in corners(size, width):
        cut = (slice(-1, None), slice(None), *box)
        inner = tuple(
            slice(4 if b.start else 0, width if b.stop == s else width - 4) for b, s in zip(box, size, strict=True)
        )
        near = [x[cut].double().cpu() for x in inputs]
        expected = value_and_gradients(partial(function, impl="reference"), near, slope[cut].double().cpu())
        for a, b in zip(found, expected, strict=True):
            ours, theirs = a[cut].cpu().double()[(..., *inner)], b[(..., *inner)]
            assert float(theirs.abs().max()) > 0.1
            assert_near(ours, theirs, atol=2e-2, rtol=2e-2)


def short_field(batch: int, size: Sequence[int]) -> Tensor:
    """Reaches 2 pixels; without temporaries as large as itself."""
    generator = torch.Generator("cuda").manual_seed(1)
    dvf = torch.empty(batch, len(size), *size, device="cuda")
    return dvf.uniform_(-64, 64, generator=generator).round_().div_(32)


def large(shape: Sequence[int], layout: str, seed: int) -> Tensor:
    memory_format = torch.channels_last_3d if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=memory_format)
    return x.normal_(generator=torch.Generator("cuda").manual_seed(seed))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_warp_beyond_two_to_the_31_elements_a_sample(layout):
    """The second sample begins beyond what 32 bits count."""
    needs(110)
    shape = (2, 8, 648, 648, 648)
    assert prod(shape[1:]) > 2**31
    x, slope = (large(shape, layout, seed) for seed in (0, 1))
    inputs = x, short_field(2, shape[2:])
    found = value_and_gradients(partial(warp, impl="triton"), inputs, slope)
    assert_right_around(warp, inputs, slope, found)


def test_consistency_beyond_two_to_the_31_elements_a_sample():
    needs(110)
    shape = (2, 8, 648, 648, 648)
    inputs = leaves(*(large(shape, "channels_last", seed) for seed in (0, 1)))
    dvf = short_field(2, shape[2:])
    loss = consistency_loss(*inputs, dvf, denominator=1.0, impl="triton")
    slopes = torch.autograd.grad(loss, inputs)
    for box in corners(shape[2:], 12):
        cut = (slice(-1, None), slice(None), *box)
        inner = [slice(4 if s.start else 0, 12 if s.stop == 648 else 8) for s in box]
        fa, fb = leaves(*(x[cut].double().cpu() for x in inputs))
        there = consistency_loss(fa, fb, dvf[cut].double().cpu(), denominator=1.0, impl="reference")
        for ours, theirs in zip(slopes, torch.autograd.grad(there, (fa, fb)), strict=True):
            assert_near(ours[cut].cpu().double()[(..., *inner)], theirs[(..., *inner)], atol=5e-3, rtol=2e-2)


def test_compose_beyond_two_to_the_31_elements_a_sample():
    needs(60)
    size = (900, 900, 900)
    assert 3 * prod(size) > 2**31
    fine, coarse = short_field(1, size), short_field(1, [s // 2 for s in size])
    slope = torch.empty_like(fine).normal_(generator=torch.Generator("cuda").manual_seed(2))
    out, d_fine, d_coarse = value_and_gradients(partial(compose, impl="triton"), (fine, coarse), slope)
    for box in corners([s // 2 for s in size], 8):
        cut = (slice(None), slice(None), *box)
        around = (slice(None), slice(None), *(slice(2 * b.start, 2 * b.stop) for b in box))
        inner = [slice(3 if b.start else 0, 8 if b.stop == 450 else 5) for b in box]
        wide = [slice(6 if b.start else 0, 16 if b.stop == 450 else 10) for b in box]
        inputs = [fine[around].double().cpu(), coarse[cut].double().cpu()]
        expected = value_and_gradients(partial(compose, impl="reference"), inputs, slope[around].double().cpu())
        for ours, theirs, at, part in (
            (out, expected[0], around, wide),
            (d_fine, expected[1], around, wide),
            (d_coarse, expected[2], cut, inner),
        ):
            assert_near(ours[at].cpu().double()[(..., *part)], theirs[(..., *part)], atol=1e-4, rtol=1e-4)


def test_fuse_beyond_two_to_the_31_elements_a_sample():
    """The identity and a shift: what comes of any other map depends on where the pixel is, which a box hides."""
    needs(45)
    size = (900, 900, 900)
    dvf, theta = short_field(1, size), torch.eye(3, 4, device="cuda")[None].clone()
    theta[..., 3] = torch.tensor([1.0, -2.0, 3.0], device="cuda")
    slope = torch.empty_like(dvf).normal_(generator=torch.Generator("cuda").manual_seed(2))
    out, d_dvf, d_theta = value_and_gradients(partial(fuse_affine, impl="triton"), (dvf, theta), slope)
    assert torch.equal(d_dvf, slope)
    for axis, shift in enumerate((1.0, -2.0, 3.0)):
        assert torch.equal(out[:, axis], dvf[:, axis] + shift)
        total = slope[:, axis].sum(dtype=torch.float64)
        assert float((d_theta[0, axis, 3] - total).abs()) <= 2**-23 * float(slope[:, axis].abs().sum())


# --- every op, as one call --------------------------------------------------------------------------------------------

SIZE = (24, 20, 28)


def calls() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Each op as a function of tensors that ask for a gradient; everything else is on the device beforehand."""
    x, y = (features(2, 8, *SIZE, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    planes = x.float().contiguous()
    dvf, other, coarse = field(2, SIZE), field(2, SIZE, seed=1), field(2, [s // 2 for s in SIZE], seed=2)
    target, crop = affine(2, SIZE), AffineDVF(theta_like(2, 3).float().cuda(), (8, 12, 16), full_size=SIZE, origin=3)
    mask = normal(2, 1, *SIZE, seed=5) > 0
    count = torch.ones((), device="cuda")
    return {
        "warp": (warp, [x, dvf]),
        "warp of planes": (lambda x, d: warp(x, d, padding="border"), [planes, dvf]),
        "nearest": (lambda x: warp(x, dvf, mode="nearest"), [x]),
        "warp, affine": (lambda x: warp(x, target), [x]),
        "resample": (lambda x: resample(x, crop), [x]),
        "warp_up": (warp_up, [x, coarse]),
        "compose": (compose, [dvf, coarse]),
        "fuse_affine": (fuse_affine, [dvf, target.theta.contiguous()]),
        "vector_loss": (lambda p: vector_loss(p, target, "inside", denominator=count), [dvf]),
        "vector_loss, dense": (lambda p, t: vector_loss(p, t, mask), [dvf, other]),
        "end_point_error": (lambda p, t: end_point_error(p, t, "inside"), [dvf, other]),
        "field_errors": (lambda p: torch.stack(field_errors(p, target, "inside")), [dvf]),
        "consistency": (lambda a, b: consistency_loss(a, b, target, "inside", denominator=count), [x, y]),
        "consistency, dense": (lambda a, b, d: consistency_loss(a, b, d, mask), [x, y, dvf]),
    }


CALLS = (
    *("warp", "warp of planes", "nearest", "warp, affine", "resample", "warp_up", "compose", "fuse_affine"),
    *("vector_loss", "vector_loss, dense", "end_point_error", "field_errors", "consistency", "consistency, dense"),
)


def test_every_call_is_listed():
    assert tuple(calls()) == CALLS


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_replays(run: Callable[[], list[Tensor]], inputs: Sequence[Tensor], atol: float, rtol: float) -> None:
    """A captured CUDA graph gives what a call gives, for whatever the inputs hold by then."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (1, 2):
        with torch.no_grad():
            for i, x in enumerate(inputs):
                x.add_((4 * normal(*x.shape, seed=seed + 9 * i)).round() / 16)
        graph.replay()
        for a, b in zip(captured, run(), strict=True):
            assert_near(a, b, atol=atol, rtol=rtol)
        assert any(float(a.float().abs().max()) > 0 for a in captured[1:])


@pytest.mark.parametrize("fixed", [False, True], ids=["plain", "deterministic"])
@pytest.mark.parametrize("name", CALLS)
def test_a_cuda_graph_replays_forward_and_backward(name, fixed):
    function, inputs = calls()[name]
    inputs = leaves(*inputs)
    slope = torch.ones_like(function(*inputs))

    def run() -> list[Tensor]:
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, slope)]

    with deterministic(fixed):
        assert_replays(run, inputs, *((0.0, 0.0) if fixed else (1e-4, 2e-2)))


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_cuda_graph_replays_the_pyramid(ndim):
    torch.manual_seed(0)
    channels, coarse = (32, 16, 8), (3, 4, 2)[:ndim]
    pyramid = VectorPyramid(ndim, channels, (4, 2, 1)).cuda()
    maps = [
        features(2, c, *(s * 2**level for s in coarse), seed=10 * view + level)
        for view in range(2)
        for level, c in enumerate(channels)
    ]
    maps = leaves(*maps)
    slope = normal(2, ndim, *(4 * s for s in coarse), seed=3)

    def run() -> list[Tensor]:
        out = pyramid(maps[:3], maps[3:])
        return [out.detach(), *torch.autograd.grad(out, [*maps, *pyramid.parameters()], slope)]

    assert_replays(run, maps, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("fixed", [False, True], ids=["plain", "deterministic"])
@pytest.mark.parametrize("name", CALLS)
def test_the_host_never_waits_for_the_device(name, fixed):
    function, inputs = calls()[name]
    slope = torch.ones_like(function(*inputs))
    with deterministic(fixed):
        value_and_gradients(function, inputs, slope)
        torch.cuda.set_sync_debug_mode("error")
        try:
            value_and_gradients(function, inputs, slope)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CALLS)
def test_deterministic_algorithms_give_the_same_bits_on_every_run(name):
    function, inputs = calls()[name]
    slope = torch.ones_like(function(*inputs))
    with deterministic(True):
        first = value_and_gradients(function, inputs, slope)
        for _ in range(4):
            for a, b in zip(first, value_and_gradients(function, inputs, slope), strict=True):
                assert torch.equal(a, b)
    for a, b in zip(first, value_and_gradients(function, inputs, slope), strict=True):
        assert_near(a.float(), b.float(), atol=1e-5, rtol=2e-2)


def test_deterministic_sums_of_many_addends_to_one_pixel():
    """All of a volume looks at a few pixels: thousands of additions to each, in any order."""
    x, dvf = features(1, 8, 64, 64, 64), torch.zeros(1, 3, 64, 64, 64, device="cuda")
    for axis in range(3):
        dvf[:, axis] = 30.25 - torch.arange(64.0, device="cuda").view([-1 if i == axis else 1 for i in range(3)])
    with deterministic(True):
        found = [value_and_gradients(partial(warp, dvf=dvf), [x])[1] for _ in range(4)]
    for other in found[1:]:
        assert torch.equal(other, found[0])
    assert int((found[0] != 0).sum()) == 8 * 8
    slope = normal(*x.shape, seed=9).double()
    exact = value_and_gradients(partial(warp, dvf=dvf.double()), [x.double()], slope)[1]
    assert_near(found[0].double(), exact, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_kernels_run_on_the_current_stream(name):
    function, inputs = calls()[name]
    slope = torch.ones_like(function(*inputs))
    expected = value_and_gradients(function, inputs, slope)
    late = [torch.zeros_like(x) for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, source in zip(late, inputs, strict=True):
            x.copy_(source)
        found = value_and_gradients(function, late, slope)
    stream.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert_near(a.float(), b.float(), atol=1e-4, rtol=2e-2)


@pytest.mark.parametrize("name", ["warp", "warp_up", "compose", "fuse_affine", "field_errors", "consistency"])
def test_inductor_compiles_it_as_one_graph(name):
    torch.compiler.reset()
    function, inputs = calls()[name]

    def run(*tensors: Tensor) -> Tensor:
        return 2 * function(*(t * 1.5 for t in tensors))

    slope = torch.ones_like(run(*inputs))
    eager, compiled = (value_and_gradients(f, inputs, slope) for f in (run, torch.compile(run, fullgraph=True)))
    for a, b in zip(eager, compiled, strict=True):
        assert_near(b.float(), a.float(), atol=1e-3, rtol=2e-2)
    torch.compiler.reset()


# --- memory -----------------------------------------------------------------------------------------------------------


def growth(run: Callable[[], object]) -> int:
    """Bytes by which the memory in use grows at most while a call, compiled before, runs."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


SLACK = 8 * 2**20


def test_composition_writes_its_result_and_nothing_else():
    fine, coarse = leaves(field(2, (128, 128, 128)), field(2, (64, 64, 64), seed=1))
    assert growth(lambda: compose(fine, coarse)) <= nbytes(fine) + SLACK
    assert growth(lambda: fine + warp(upsample_dvf(coarse, (128, 128, 128)), fine, padding="border")) > 2 * nbytes(fine)
    # Backward: both gradients and the gradient of the up-sampled field.
    out = compose(fine, coarse)
    slope = torch.ones_like(out)
    allowed = 2 * nbytes(fine) + nbytes(coarse)
    assert growth(lambda: torch.autograd.grad(out, [fine, coarse], slope, retain_graph=True)) <= allowed + SLACK


def test_fusion_writes_its_result_and_nothing_else():
    dvf, theta = leaves(field(2, (128, 128, 128)), theta_like(2, 3).float().cuda())
    assert growth(lambda: fuse_affine(dvf, theta)) <= nbytes(dvf) + SLACK
    out = fuse_affine(dvf, theta)
    slope = torch.ones_like(out)
    assert growth(lambda: torch.autograd.grad(out, [dvf, theta], slope, retain_graph=True)) <= nbytes(dvf) + SLACK
    assert growth(lambda: torch.autograd.grad(out, [theta], slope, retain_graph=True)) <= SLACK


def test_warping_up_or_by_an_affine_field_writes_no_field():
    x, coarse, dvf = features(2, 4, 128, 128, 128), field(2, (64, 64, 64)), affine(2, (128, 128, 128))
    assert growth(lambda: warp_up(x, coarse)) <= nbytes(x) + SLACK
    assert growth(lambda: warp(x, dvf)) <= nbytes(x) + SLACK


def test_consistency_writes_neither_warped_features_nor_field_nor_mask():
    shape = (2, 32, 128, 128, 128)
    a, b = leaves(*(features(*shape, seed=seed) for seed in (0, 1)))
    dvf = affine(2, shape[2:])
    with torch.no_grad():
        assert growth(lambda: consistency_loss(a, b, dvf, "inside")) <= SLACK
    assert growth(lambda: consistency_loss(a, b, dvf, "inside")) <= SLACK
    loss = consistency_loss(a, b, dvf, "inside")
    assert growth(lambda: torch.autograd.grad(loss, [a, b], retain_graph=True)) <= 2 * nbytes(a) + SLACK


def test_field_errors_write_their_sums_alone():
    pred, dvf = field(2, (128, 128, 128)), affine(2, (128, 128, 128))
    assert growth(lambda: field_errors(pred, dvf, "inside")) <= SLACK
    (pred,) = leaves(pred)
    loss = vector_loss(pred, dvf, "inside")
    assert growth(lambda: torch.autograd.grad(loss, [pred], retain_graph=True)) <= nbytes(pred) + SLACK
