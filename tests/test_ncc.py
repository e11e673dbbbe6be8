"""The local correlation against plain numpy: values, gradients, constant regions, parts of a batch; its launches."""

import math
from importlib import import_module
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    KERNEL_LAYOUTS,
    assert_near,
    gradients,
    laid_out,
    leaves,
    randn,
    refused,
    sizes,
)

from coverfast.kernels.launch import ARCHITECTURES, Architecture
from coverfast.layout import new_like
from coverfast.ops import ncc
from coverfast.ops.ncc import ncc_loss

IMPLS = ("torch", "reference")
WINDOWS = (1, 3, 5, 9, 11)


def images(*shape, seed=0, dtype=torch.float64):
    """Two in [0, 1] that have half of what they show in common."""
    x, own = (randn(*shape, seed=seed + i).sigmoid() for i in (0, 1))
    return x.to(dtype), ((x + own) / 2).to(dtype)


@st.composite
def problems(draw, dtype=torch.float64):
    """Two images in any layouts, and a window that may exceed them."""
    n = draw(st.sampled_from((2, 3)))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), *draw(sizes(n, 6 if n == 2 else 4)))
    window = draw(st.tuples(*[st.sampled_from(WINDOWS if n == 2 else WINDOWS[:4])] * n))
    x, y = images(*shape, seed=draw(st.integers(0, 99)), dtype=dtype)
    return *(laid_out(image, draw(st.sampled_from(KERNEL_LAYOUTS))) for image in (x, y)), window


def outcome(x, y, *arguments, slope=1.0, **options):
    """The loss and the gradients of both images."""
    inputs = leaves(x, y)
    loss = ncc_loss(*inputs, *arguments, **options)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, loss.new_tensor(slope))]


def bound(window, eps=1e-5, denominator=1.0):
    """That of the docstring."""
    return 2 * math.sqrt(2 ** len(window) * math.prod(window) / eps) / denominator


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=12)
@given(problems())
def test_by_brute_force(impl, problem):
    x, y, window = problem
    total = 0.0
    for u, v in zip(x.flatten(0, 1).numpy(), y.flatten(0, 1).numpy(), strict=True):
        for pixel in product(*map(range, u.shape)):
            box = tuple(slice(max(0, p - w // 2), p + w // 2 + 1) for p, w in zip(pixel, window, strict=True))
            a, b = u[box] - u[box].mean(), v[box] - v[box].mean()
            total += 1 - (a * b).mean() ** 2 / (((a * a).mean() + 1e-3) * ((b * b).mean() + 1e-3))
    assert float(ncc_loss(x, y, window, eps=1e-3, impl=impl)) == pytest.approx(total / x.numel(), abs=1e-12)


@given(problems())
def test_torch_equals_reference(problem):
    ours, theirs = (outcome(*problem, impl=impl) for impl in IMPLS)
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl):
    inputs = leaves(*images(1, 1, 3, 4))
    assert torch.autograd.gradcheck(lambda x, y: ncc_loss(x, y, (3, 5), eps=1e-2, impl=impl), inputs)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(("mean", "contrast", "allowed"), [(0.5, 1.0, 2e-6), (0.5, 0.05, 1e-5), (0.7, 0.05, 5e-4)])
@pytest.mark.parametrize("shape", [(2, 2, 13, 22), (2, 1, 11, 6, 12)], ids=str)
def test_low_precision_against_float64(shape, mean, contrast, allowed, dtype):
    """Gradients are rounded once, to the dtype of the images. Where these are flat, and far from 0.5, rounding in
    float32 shows, as up to 1e-7 beside a variance.
    """
    x, y = (mean + contrast * (image - 0.5) for image in images(*shape))
    x, y = x.to(dtype), y.to(dtype)
    found = outcome(x, y, denominator=1.0)
    truth = outcome(x.double(), y.double(), denominator=1.0, impl="reference")
    assert [t.dtype for t in found] == [torch.float32, dtype, dtype]
    assert abs(float(found[0] - truth[0])) < allowed * x.numel()
    for a, b in zip(found[1:], truth[1:], strict=True):
        assert bool(((a - b).abs() <= torch.finfo(dtype).eps * b.abs() + allowed * b.abs().max()).all())


# --- constant regions -------------------------------------------------------------------------------------------------


def constants(shape, value, kind):
    image = torch.full(shape, value)
    if kind == "a patch":  # one value in a window and a half of noise, wide enough for whole windows
        image = randn(*shape, dtype=torch.float32).sigmoid()
        image[..., :12, :12] = value
    return image


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["everywhere", "a patch"])
@pytest.mark.parametrize("impl", IMPLS)
def test_constant_regions_are_harmless(impl, kind, value, dtype):
    shape, window = (1, 1, 20, 22), (9, 9)
    still, noise = constants(shape, value, kind).to(dtype), images(*shape, seed=5, dtype=dtype)[0]
    for pair in ((still, noise), (noise, still), (still, still)):
        loss, *slopes = outcome(*pair, denominator=1.0, impl=impl)
        assert 0 <= loss <= 440
        assert all(slope.abs().max() <= bound(window) for slope in slopes)  # nor NaN
        alone = ncc_loss(*pair, impl=impl)
        assert alone.isfinite()
        if kind == "everywhere":
            assert alone == pytest.approx(1, abs=1e-5)
            # Of a constant image against noise: covariance is rounding, but eps keeps its slope small.
            assert all(slope.abs().max() < 0.1 for slope in slopes)
        else:  # pixels whose windows' windows lie in the patch
            assert all(slope[..., :4, :4].abs().max() < 0.1 for slope in slopes)
            matched = pair[0] is pair[1]
            assert matched or all(slope[..., 13:, 13:].abs().max() > 0.1 for slope in slopes)


@pytest.mark.parametrize("value", [0.1, 200.3, 1e4])
def test_a_match_is_never_beyond_one(value):
    """Not even where rounding exceeds eps, as in images that are not in [0, 1]."""
    still = torch.full((1, 1, 13, 14), value)
    noise = still + value / 1e6 * randn(1, 1, 13, 14, dtype=torch.float32)
    for pair in ((still, still), (still, noise), (noise, noise)):
        loss, *slopes = outcome(*pair, eps=1e-12)
        assert 0 <= loss <= 1
        assert all(slope.isfinite().all() for slope in slopes)


def test_the_bound_holds_for_what_is_steepest():
    """A step of 2 sqrt(eps) in an image that is constant otherwise, at every place of a small grid."""
    steepest = 0.0
    for row, column in product(range(6), range(6)):
        x = torch.zeros(1, 1, 12, 12)
        x[..., row, column] = 0.02
        y = x.clone()
        y[..., row, (column + 1) % 6] = -0.005
        for slope in outcome(x, y, (3, 3), denominator=1.0)[1:]:
            assert slope.abs().max() <= bound((3, 3))
            steepest = max(steepest, float(slope.abs().max()))
    assert steepest > bound((3, 3)) / 50


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(2, 1, 12, 14), (1, 1, 8, 9, 10)], ids=str)
def test_a_perfect_match_costs_nothing_and_intensity_does_not_matter(shape, impl):
    x, y = images(*shape, dtype=torch.float32)
    assert 0 < ncc_loss(x, x, impl=impl) < 2e-3
    assert 0 < ncc_loss(x, 1 - x, impl=impl) < 2e-3
    assert ncc_loss(x, torch.rand_like(x), impl=impl) > 0.8
    plain = ncc_loss(x, y, impl=impl)
    assert ncc_loss(0.7 * x + 0.2, y, impl=impl) == pytest.approx(float(plain), abs=1e-3)
    assert ncc_loss(x, 0.2 - 0.5 * y, impl=impl) == pytest.approx(float(plain), abs=1e-3)
    assert ncc_loss(255 * x, 255 * y, eps=1e-5 * 255**2, impl=impl) == pytest.approx(float(plain), abs=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_window_beyond_the_grid_is_the_whole_grid(impl):
    x, y = images(1, 1, 4, 5)
    whole = 1 - np.corrcoef(x.ravel(), y.ravel())[0, 1] ** 2
    assert float(ncc_loss(x, y, (9, 31), eps=1e-12, impl=impl)) == pytest.approx(whole, abs=1e-8)


@pytest.mark.parametrize("kind", [float, lambda count: torch.tensor(count, dtype=torch.float64)])
@pytest.mark.parametrize("impl", IMPLS)
def test_parts_of_a_batch_add_up_under_the_common_denominator(impl, kind):
    x, y = images(3, 2, 5, 6, dtype=torch.float32)
    whole = outcome(x, y, 3, impl=impl)
    parts = [
        outcome(x[part], y[part], 3, denominator=kind(float(x.numel())), impl=impl)
        for part in (slice(0, 1), slice(1, 3))
    ]
    assert all(part[0].dtype == torch.float32 for part in parts)
    assert_near(sum(part[0] for part in parts), whole[0], atol=1e-6, rtol=1e-6)
    for ours, *theirs in zip(whole[1:], *(part[1:] for part in parts), strict=True):
        assert_near(torch.cat(theirs), ours, atol=1e-7, rtol=1e-5)


def test_blocks_of_images_change_nothing(monkeypatch):
    x, y = images(3, 2, 5, 6)
    whole = outcome(x, y, 3, impl="torch")
    monkeypatch.setattr(ncc, "_BLOCK", 4 * 30)
    for a, b in zip(outcome(x, y, 3, impl="torch"), whole, strict=True):
        assert_near(a, b, atol=1e-14, rtol=1e-12)


def test_an_empty_batch_costs_nothing():
    for impl in IMPLS:
        loss, *slopes = outcome(*images(0, 1, 3, 4), impl=impl)
        assert loss == 0
        assert all(slope.shape == (0, 1, 3, 4) for slope in slopes)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_pixel_that_is_not_finite_shows(bad, impl):
    x, y = images(1, 1, 6, 6)
    x[0, 0, 2, 2] = bad
    assert all(t.isnan().any() for t in outcome(x, y, 3, impl=impl))


# --- inside PyTorch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1])
def test_no_work_for_an_image_that_asks_for_no_gradient(which, monkeypatch):
    pair = list(images(1, 1, 5, 6))
    expected = outcome(*pair, 3, impl="torch")[1 + which]
    pair[which].requires_grad_()
    asked = []

    def spy(*arguments):
        asked.append([d is not None for d in arguments[-2:]])
        return found(*arguments)

    found = ncc._torch_forward
    monkeypatch.setattr(ncc, "_torch_forward", spy)
    loss = ncc_loss(*pair, 3, impl="torch")
    assert_near(torch.autograd.grad(loss, pair[which])[0], expected)
    with torch.no_grad():
        assert not ncc_loss(*pair, 3, impl="torch").requires_grad
    assert asked == [[which == 0, which == 1], [False, False]]


@pytest.mark.parametrize("layouts", [("channels_last", "contiguous"), ("sliced", "sliced_rows")])
def test_gradients_lie_as_their_images(layouts):
    pair = [laid_out(image, layout) for image, layout in zip(images(2, 3, 5, 6), layouts, strict=True)]
    for image, slope in zip(pair, outcome(*pair, 3)[1:], strict=True):
        assert slope.stride() == new_like(image).stride()


def test_autocast_changes_nothing():
    x, y = images(1, 1, 9, 9, dtype=torch.float32)
    for impl in IMPLS:
        plain = outcome(x, y, impl=impl)
        with torch.autocast("cpu", torch.bfloat16):
            cast = outcome(x, y, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("wanted", [(True, True), (False, True)])
def test_opcheck(wanted):
    pair = [image.requires_grad_(asks) for image, asks in zip(images(1, 2, 4, 5), wanted, strict=True)]
    pair[1] = laid_out(pair[1].detach(), "channels_last").requires_grad_()
    torch.library.opcheck(torch.ops.coverfast.ncc_forward, (*pair, [3, 3], 1e-5, *wanted, "torch"))
    _, *slopes = torch.ops.coverfast.ncc_forward(*pair, [3, 3], 1e-5, *wanted, "torch")
    arguments = (torch.ones(()).double(), *(image.detach() for image in pair), *slopes, *wanted)
    torch.library.opcheck(torch.ops.coverfast.ncc_backward, arguments)


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(ncc_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for function in (ncc_loss, compiled):
        x, y = images(2, 1, 6, 7)
        (y,) = leaves(y)
        loss = function(x, y, 3, denominator=torch.tensor(50.0))
        results.append([loss, *gradients(loss, [y])])
    for eager, graph in zip(*results, strict=True):
        assert_near(graph, eager)
    torch.compiler.reset()


def test_second_order_gradients_are_refused():
    x, y = leaves(*images(1, 1, 4, 5))
    (slope,) = torch.autograd.grad(ncc_loss(x, y, 3), y, create_graph=True)
    with pytest.raises(RuntimeError):
        (slope.square().sum() + y.sum()).backward()  # not y's own gradient alone


def test_refusals(monkeypatch):
    x = torch.zeros(2, 1, 4, 5)
    for pair, words in (
        ((x.long(), x), ("x", "int64")),
        ((x[0], x[0]), ("x", "(B, C, *S)", "(1, 4, 5)")),
        ((x, x[..., 1:]), ("y", "shape of x", "(2, 1, 4, 4)")),
        ((x, x.half()), ("y", "dtype of x", "float16")),
        ((x, x.to("meta")), ("y", "device of x", "meta")),
        ((x, None), ("y", "torch.Tensor", "NoneType")),
    ):
        with refused(*words):
            ncc_loss(*pair)
    for window in (4, (3, 4), (3, 3, 3), 0, -1, "9", 3.0):
        with refused("window", repr(window)):
            ncc_loss(x, x, window)
    for eps in (0, -1e-5, math.inf, math.nan, None, True):
        with refused("eps", "positive", repr(eps)):
            ncc_loss(x, x, eps=eps)
    with refused("impl", "cuda"):
        ncc_loss(x, x, impl="cuda")
    monkeypatch.setattr("coverfast.ops.dispatch.KERNELS", frozenset())
    monkeypatch.setattr("coverfast.ops.dispatch._HAS_TRITON", True)
    with refused("impl='triton'", "ncc", "no Triton kernel"):
        ncc_loss(x, x, impl="triton")


# --- plans of the kernels' launches: neither a GPU nor the interpreter is needed --------------------------------------


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
    return import_module("coverfast.kernels.ncc")


def meta(*shape, dtype=torch.float32, layout="contiguous"):
    return laid_out(torch.empty(shape, dtype=dtype, device="meta"), layout)


@given(st.data())
def test_launches_cover_the_images(kernels, data):
    n, batch = data.draw(st.sampled_from((2, 3))), data.draw(st.integers(0, 3))
    channels, size = data.draw(st.integers(1, 3)), data.draw(st.tuples(*[st.integers(1, 200)] * n))
    window = data.draw(st.tuples(*[st.sampled_from((1, 3, 9, 13, 401))] * n))
    on = data.draw(st.sampled_from((*ARCHITECTURES.values(), Architecture(1))))
    dtype, wanted = data.draw(st.sampled_from(DTYPES)), data.draw(st.tuples(st.booleans(), st.booleans()))
    x, y = (meta(batch, channels, *size, dtype=dtype, layout=data.draw(st.sampled_from(KERNEL_LAYOUTS))) for _ in "xy")
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    d_x, d_y = (meta(batch, channels, *size, dtype=exact) if asked else None for asked in wanted)
    partials, served, programs = [], {}, []
    launches = list(kernels.launches(x, y, window, 1e-5, d_x, d_y, partials, on))
    for launch in launches:
        c, a = launch.constants, launch.arguments
        walks, tiles = -(-a["rows"] // c["STEPS"]), -(-a["columns"] // c["TILE"])
        outer, rest = divmod(launch.programs, walks * tiles)
        assert rest == 0
        assert (a["x"].shape, a["x"].dtype) == (a["y"].shape, dtype)
        assert [a[f"{v}_b"] for v in "xy"] == [a[v].stride(0) for v in "xy"]
        assert all(a[v][:1].is_contiguous() for v in "xy")
        assert on.warp <= c["TILE"] == launch.warps * on.warp
        assert c["WINDOW_R"] * (c["MAPS"] or 5) * (exact.itemsize // 4) <= 64 or not c["KEEP"]
        assert c["WINDOW_R"] < 2 * a["rows"]
        key = launch.kernel.__name__, c["MAPS"], c["LAST"]
        served[key] = served.get(key, 0) + outer * a["rows"] * a["columns"]
        if key[0] == "ncc_moments_kernel" and c["LAST"]:
            programs.append((launch.programs,))
            assert a["partials"] is partials[len(programs) - 1]
        if c["MAPS"] == 0 or (key[0] == "ncc_slopes_kernel" and c["LAST"]):
            assert a["per_sample"] * a["rows"] * a["columns"] == x[:1].numel()
    assert [p.shape for p in partials] == programs
    assert set(served.values()) <= {x.numel()}
    passes = n - 1
    assert len(served) == (passes * (1 + any(wanted)) if batch else 0)


def test_a_batch_is_served_in_parts_of_bounded_memory(kernels):
    def planned(*shape):
        x = meta(*shape)
        return list(kernels.launches(x, x, (9,) * (len(shape) - 2), 1e-5, None, x, [], ARCHITECTURES["sm_90"]))

    volumes = planned(6, 1, 128, 128, 128)
    assert len(volumes) == 6 * (1 + 2 * 2 + 1)
    memory = {launch.arguments["out"].untyped_storage() for launch in volumes}
    assert sorted({len(m) for m in memory}) == [4 * 3 * 128**3 // 2, 4 * 5 * 128**3]
    assert sum({len(m) for m in memory}) <= kernels.PART + kernels.CHUNK
    assert len(planned(4, 1, 64, 64, 64)) == 4
    flat = planned(24, 1, 384, 384)
    assert [launch.kernel.__name__ for launch in flat] == ["ncc_moments_kernel", "ncc_slopes_kernel"]
    assert all(launch.programs >= 3 * 132 for launch in (*volumes, *flat))
