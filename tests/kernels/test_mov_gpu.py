"""The kernels of mov as training runs them: real sizes, compiled graphs, CUDA graphs, memory. Need a GPU."""

import random
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from strategies import DTYPES, SLOPE_LAYOUTS, MovCase, MovSpec, assert_near, assert_within_budget, laid_out, leaves
from torch import Tensor

from coverfast import mov
from coverfast.kernels.launch import override

pytestmark = pytest.mark.gpu


def maps(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[Tensor]:
    """Normal queries and keys, channels-last, that require a gradient."""
    generator = torch.Generator("cuda").manual_seed(seed)
    drawn = (torch.randn(shape, generator=generator, dtype=dtype, device="cuda") for _ in range(2))
    return leaves(*(laid_out(x, "channels_last") for x in drawn))


def slope_like(out: Tensor, seed: int = 9) -> Tensor:
    generator = torch.Generator(out.device).manual_seed(seed)
    return torch.randn(out.shape, generator=generator, dtype=out.dtype, device=out.device)


def value_and_gradients(q: Tensor, k: Tensor, slope: Tensor | None = None, **options: object) -> list[Tensor]:
    out = mov(q, k, **options)
    return [out.detach(), *torch.autograd.grad(out, [q, k], slope_like(out) if slope is None else slope)]


def corners(size: tuple[int, ...], width: int) -> Iterator[tuple[slice, ...]]:
    """The boxes of this width at the corners of a grid, and the one in the middle."""
    yield from product(*((slice(0, width), slice(s - width, s)) for s in size))
    yield tuple(slice(s // 2 - width // 2, s // 2 - width // 2 + width) for s in size)


def assert_right_around(
    box: tuple[slice, ...], q: Tensor, k: Tensor, slope: Tensor, results: list[Tensor], window: int, groups: int
) -> None:
    """Compare inside a box, two radii from where it is cut: further off, nothing that is cut away has a say."""
    here = (slice(None), slice(None), *box)
    size, margin = q.shape[2:], window - 1
    inside = [
        slice(0 if b.start == 0 else margin, None if b.stop == s else -margin) for b, s in zip(box, size, strict=True)
    ]
    inner = (slice(None), slice(None), *inside)

    def definition(dtype: torch.dtype) -> list[Tensor]:
        a, b = leaves(*(x[here].cpu().to(dtype) for x in (q, k)))
        out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        found = value_and_gradients(
            a, b, slope[here].cpu().to(out_dtype), window=window, groups=groups, impl="reference"
        )
        return [x[inner] for x in found]

    ours = [x[here].cpu()[inner] for x in results]
    assert all(x.numel() for x in ours)
    assert_within_budget(ours, definition(q.dtype), definition(torch.float64), 1 + window)


SCENES = {
    "the finest level of a volume": ((2, 8, 128, 128, 128), 5, 1, 11),
    "a coarse level of a volume": ((2, 32, 16, 16, 16), 5, 4, 11),
    "the finest level of pictures": ((24, 8, 384, 384), 7, 1, 15),
    "the middle level of pictures": ((24, 32, 96, 96), 7, 4, 15),
}


@pytest.mark.parametrize("scene", list(SCENES))
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_real_sizes(scene, dtype):
    shape, window, groups, width = SCENES[scene]
    q, k = maps(*shape, dtype=dtype)
    results = value_and_gradients(q, k, window=window, groups=groups)
    slope = slope_like(results[0])
    for box in corners(shape[2:], width):
        assert_right_around(box, q, k, slope, results, window, groups)


def test_a_whole_volume_equals_the_torch_implementation():
    q, k = maps(2, 8, 128, 128, 128)
    ours = value_and_gradients(q, k, window=5)
    theirs = value_and_gradients(*leaves(q.float(), k.float()), window=5, impl="torch")
    assert_near(ours[0], theirs[0], atol=1e-4, rtol=1e-4)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert a.dtype == torch.bfloat16
        assert_near(a.float(), b, atol=1e-3, rtol=2**-7)


@pytest.mark.parametrize(("groups", "width", "gigabytes"), [(1, 8, 30), (3, 3, 50)])
def test_beyond_two_to_the_31_elements(groups, width, gigabytes):
    size = (648, 648, 648)
    assert groups * width * 648**3 > 2**31
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB")
    q, k = maps(1, groups * width, *size)
    out = mov(q, k, window=3, groups=groups)
    pattern = torch.linspace(-1, 1, 648, device="cuda").view(1, 1, 1, 1, 648)
    slope = (pattern + pattern.transpose(-1, -2)[..., :1]).expand_as(out)
    results = [out.detach(), *torch.autograd.grad(out, [q, k], slope)]
    for box in corners(size, 7):
        assert_right_around(box, q, k, slope, results, 3, groups)


#: Constants of the kernels, from a short list so that few are compiled: groups, width, window along x, layouts.
KINDS = [
    (1, 8, 7, ("channels_last", "channels_last")),
    (4, 3, 3, ("contiguous", "channels_last")),
    (5, 1, 11, ("sliced_rows", "contiguous")),
    (1, 8, 5, ("contiguous", "contiguous")),
    (3, 5, 3, ("channels_last", "sliced_rows")),
    (2, 16, 13, ("channels_last", "channels_last")),
]


def test_two_hundred_shapes():
    draw = random.Random(0)
    for index in range(200):
        groups, width, window_x, layouts = KINDS[index % len(KINDS)]
        most = (40, 70) if index % len(KINDS) < 3 else (9, 9, 40)
        spec = MovSpec(
            tuple(draw.randint(1, m) for m in most),
            (*(draw.choice((1, 3, 5)) for _ in most[1:]), window_x),
            groups=groups,
            width=width,
            batch=draw.randint(1, 3),
            layouts=layouts,
            slope_layout=draw.choice(SLOPE_LAYOUTS),
            scale=draw.choice((None, 1.0, -0.5)),
            seed=index,
        )
        with override(rows=(4, 3, 2, 1, 4, 2)[index % len(KINDS)]):  # small grids alone would never share four rows
            ours = [x.cpu() for x in _results(spec, "cuda", "triton")]
        theirs = [x.cpu() for x in _results(spec, "cpu", "reference")]
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10, msg=lambda message, s=spec: f"{s}: {message}")


def _results(spec: MovSpec, device: str, impl: str) -> list[Tensor]:
    case: MovCase = spec.case(device)
    return value_and_gradients(*leaves(case.q, case.k), spec.slope(device), **case.options, impl=impl)


def test_the_same_bits_on_every_run():
    q, k = maps(2, 32, 48, 52, 44)
    first = value_and_gradients(q, k, window=5, groups=4)
    for _ in range(3):
        for a, b in zip(first, value_and_gradients(q, k, window=5, groups=4), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_cuda_graph_replays_forward_and_backward(layout):
    shape = (2, 8, 24, 20, 28)
    q, k = leaves(*(laid_out(x, layout) for x in maps(*shape)))
    slope = torch.ones(2, 3, *shape[2:], device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            value_and_gradients(q, k, slope, window=5)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(q, k, slope, window=5)
    for seed in (1, 2):
        with torch.no_grad():
            for x, fresh in zip((q, k), maps(*shape, seed=seed), strict=True):
                x.copy_(fresh)
            slope.copy_(slope_like(slope, seed))
        graph.replay()
        for a, b in zip(captured, value_and_gradients(q, k, slope, window=5), strict=True):
            assert torch.equal(a, b)


def test_the_host_never_waits_for_the_device():
    q, k = maps(2, 16, 20, 24, 28)
    slope = torch.ones(2, 3, 20, 24, 28, device="cuda")
    for inputs in ((q, k), leaves(q.contiguous(), k.contiguous())):
        plain = value_and_gradients(*inputs, slope, window=5, groups=2)
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = value_and_gradients(*inputs, slope, window=5, groups=2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for a, b in zip(plain, again, strict=True):
            assert torch.equal(a, b)


def test_kernels_run_on_the_current_stream():
    q, k = maps(2, 8, 64, 64, 64)
    slope = torch.ones(2, 3, 64, 64, 64, device="cuda")
    expected = value_and_gradients(q, k, slope, window=5)
    source = [x.detach().clone() for x in (q, k)]
    with torch.no_grad():
        q.zero_()
        k.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            q.copy_(source[0])
            k.copy_(source[1])
        results = value_and_gradients(q, k, slope, window=5)
    stream.synchronize()
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dynamic", [None, True])
def test_inductor_compiles_it_as_one_graph(dynamic):
    torch.compiler.reset()

    def run(q: Tensor, k: Tensor) -> Tensor:
        return 2 * mov(q * 1.5, k, window=5, groups=2)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for size in ((16, 20, 24), (10, 20, 12)):
        q, k = maps(2, 16, *size, dtype=torch.float32)
        results = []
        for function in (run, compiled):
            out = function(q, k)
            results.append([out.detach(), *torch.autograd.grad(out, [q, k], slope_like(out))])
        for a, b in zip(*results, strict=True):
            assert_near(a, b, atol=1e-4, rtol=1e-4)
    torch.compiler.reset()


def test_autocast_hands_over_low_precision_and_gets_float32():
    q, k = maps(2, 8, 12, 16, 20)
    with torch.autocast("cuda", torch.float16):
        results = value_and_gradients(q, k, window=5)
    for a, b in zip(results, value_and_gradients(q, k, window=5), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert results[0].dtype == torch.float32


def test_memory_of_a_volume():
    """Output, gradients, log-sum-exp and one number a query: nothing grows with the window."""
    q, k = maps(2, 8, 128, 128, 128)
    mov(q, k, window=5).sum().backward()
    q.grad = k.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = mov(q, k, window=5)
    out.sum().backward()
    torch.cuda.synchronize()
    growth = torch.cuda.max_memory_allocated() - before
    written = sum(x.numel() * x.element_size() for x in (out, q.grad, k.grad))
    assert written < growth < 260e6
