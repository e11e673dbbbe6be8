"""The kernels of mov against the definition, on the GPU or in Triton's interpreter; unwritten memory is NaN."""

import mmap
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from strategies import (
    DTYPES,
    MovCase,
    MovSpec,
    assert_near,
    assert_within_budget,
    gradients,
    laid_out,
    leaves,
    mov_specs,
    randn,
)
from torch import Tensor

pytest.importorskip("triton")

from coverfast import mov
from coverfast.kernels import INTERPRETED
from coverfast.kernels import mov as kernels
from coverfast.kernels.launch import override
from coverfast.layout import channels_last
from coverfast.ops.mov import _new_outputs

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU (test_interpreter.py runs these without one)", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned")


def value_and_gradients(case: MovCase, slope: Tensor, impl: str = "triton") -> list[Tensor]:
    """Output, dq and dk, brought to the CPU."""
    q, k = leaves(case.q, case.k)
    out = mov(q, k, **case.options, impl=impl)
    return [t.detach().cpu() for t in (out, *torch.autograd.grad(out, [q, k], slope))]


def reference(spec: MovSpec, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The definition on the CPU; offsets that leave the grid from every pixel are cut off first, to save time."""
    case, slope = spec.case(), spec.slope()
    window = tuple(min(w, 2 * s - 1) for w, s in zip(spec.window, spec.size, strict=True))
    q, k = (x.to(dtype or x.dtype) for x in (case.q, case.k))
    slope = slope.to(dtype or slope.dtype)
    return value_and_gradients(MovCase(q, k, window, case.groups, case.scale), slope, "reference")


def assert_equals_reference(spec: MovSpec, device: str) -> None:
    for ours, theirs in zip(value_and_gradients(spec.case(device), spec.slope(device)), reference(spec), strict=True):
        assert_near(ours, theirs)


# --- values and gradients ---------------------------------------------------------------------------------------------


@given(mov_specs())
def test_equals_reference(device, spec):
    assert_equals_reference(spec, device)


CORNERS = {
    "rows that do not divide y": MovSpec((3, 4), (3, 3), width=4),
    "three groups": MovSpec((2, 3), (3, 3), groups=3),
    "five groups of three channels": MovSpec((1, 5), (1, 3), groups=5, width=3, layouts=("sliced", "sliced_rows")),
    "four groups in 3D": MovSpec((2, 2, 3), (3, 3, 3), groups=4, width=8, layouts=("channels_last", "transposed")),
    "a window that differs by axis": MovSpec((2, 3, 4), (3, 1, 5), batch=2, slope_layout="sliced"),
    "a window wider than the grid": MovSpec((2, 3), (7, 9), width=3, slope_layout="scalar"),
    "a window wider than is unrolled": MovSpec((1, 13), (3, 11), width=5),
    "a wide window in 3D": MovSpec((2, 1, 4), (3, 3, 13), groups=2, slope_layout="expanded"),
    "one pixel": MovSpec((1, 1), (5, 5), groups=2, width=1),
    "one pixel in 3D": MovSpec((1, 1, 1), (3, 3, 11), width=8),
    "axes of size one": MovSpec((1, 3, 1), (3, 3, 5), layouts=("sliced", "contiguous")),
    "three tiles": MovSpec((1, 65), (1, 5), layouts=("expanded", "sliced_rows"), batch=2, slope_layout="sliced_rows"),
    "twelve channels": MovSpec((2, 3), (3, 3), groups=2, width=12, layouts=("sliced_rows", "channels_last")),
    "more channels than one load holds": MovSpec((1, 3), (1, 3), width=67, layouts=("transposed", "sliced_rows")),
    "an empty batch": MovSpec((2, 3), (3, 3), batch=0, groups=2),
    "scale zero": MovSpec((2, 3), (3, 3), scale=0.0, slope_layout="channels_last"),
    "a negative scale": MovSpec((2, 3), (3, 3), scale=-3.0, slope_layout="transposed"),
}


@pytest.mark.parametrize("name", list(CORNERS))
def test_equals_reference_at(name, device):
    assert_equals_reference(CORNERS[name], device)


def test_equals_reference_in_a_window_of_125(device):
    with override(tile=4):
        assert_equals_reference(MovSpec((2, 5), (125, 125), groups=2, width=3), device)


def test_equals_reference_in_a_window_of_61_in_3d(device):
    with override(tile=2):
        assert_equals_reference(MovSpec((2, 3, 2), (61, 61, 61), width=4), device)


SPLITS = [
    # size, window, override, constants that follow
    ((4, 7), (3, 3), {"rows": 1}, {"ROWS": 1, "TAPS": 3, "WINDOW_X": 3}),
    ((4, 7), (3, 3), {"rows": 3}, {"ROWS": 3, "TAPS": 3, "WINDOW_X": 3}),
    ((4, 3), (3, 3), {"rows": 5}, {"ROWS": 5, "TAPS": 3, "WINDOW_X": 3}),
    ((4, 3), (1, 3), {"rows": 4}, {"ROWS": 4, "TAPS": 3, "WINDOW_X": 3}),
    ((2, 2, 3), (3, 3, 3), {"rows": 2, "taps": 2}, {"ROWS": 2, "TAPS": 2, "WINDOW_X": 3}),
    ((2, 7), (3, 5), {"taps": 1}, {"TAPS": 1, "WINDOW_X": 5}),
    ((2, 7), (3, 5), {"taps": 2}, {"TAPS": 2, "WINDOW_X": 5}),
    ((2, 7), (3, 5), {"taps": 9}, {"TAPS": 9, "WINDOW_X": 5}),
    ((2, 6), (1, 9), {"taps": 4, "tile": 4}, {"TAPS": 4, "WINDOW_X": 9, "TILE": 4}),
    ((1, 6), (1, 11), {"taps": 1, "tile": 8}, {"TAPS": 1, "WINDOW_X": 0}),
    ((1, 16), (1, 11), {"taps": 4, "tile": 16}, {"TAPS": 4, "WINDOW_X": 0}),
    ((2, 6), (3, 11), {"taps": 4, "tile": 4}, {"TAPS": 4, "WINDOW_X": 0}),
    ((3, 4), (3, 13), {"taps": 3, "tile": 1, "rows": 2}, {"TAPS": 3, "WINDOW_X": 0, "TILE": 1}),
    ((2, 5), (3, 3), {"tile": 2}, {"TILE": 2}),
    ((2, 5), (3, 3), {"tile": 64, "warps": 1}, {"TILE": 64}),
]


@pytest.mark.parametrize(("size", "window", "numbers", "constants"), SPLITS, ids=str)
def test_the_split_into_programs_changes_nothing(size, window, numbers, constants, device, launches):
    spec = MovSpec(size, window, groups=3, width=2)
    with override(**numbers):
        assert_equals_reference(spec, device)
    assert len(launches) == 3
    for launch in launches:
        assert constants.items() <= launch.constants.items()


@given(mov_specs(dtypes=DTYPES[:3], least=1))
def test_low_precision_error_is_that_of_the_reference(device, spec):
    ours = value_and_gradients(spec.case(device), spec.slope(device))
    assert [t.dtype for t in ours] == [torch.float32, spec.dtype, spec.dtype]
    assert_within_budget(ours, reference(spec), reference(spec, torch.float64), 1 + max(spec.window))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("scale", [None, 5.0])
def test_low_precision_error_of_a_row(dtype, scale, device):
    spec = MovSpec((2, 32), (1, 5), groups=2, width=8, dtype=dtype, layouts=("channels_last",) * 2, scale=scale)
    ours = value_and_gradients(spec.case(device), spec.slope(device))
    assert_within_budget(ours, reference(spec), reference(spec, torch.float64), 6)


# --- logits that are extreme ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [-1e4, -1e30, 1e4, 1e30])
@pytest.mark.parametrize(("window", "taps"), [((3, 5), 1), ((3, 11), 3)])
def test_extreme_logits_stay_finite(level, window, taps, device):
    # With few taps a pass the first passes lie wholly out of the grid for the first pixels.
    q = torch.full((1, 2, 2, 3), abs(level) ** 0.5, device=device)
    q, k = leaves(q, q * (1 if level > 0 else -1))
    with override(taps=taps, tile=4):
        out = mov(q, k, window=window, scale=0.5, impl="triton")
        slopes = gradients(out, [q, k])
    assert_near(out, mov(torch.ones_like(q), torch.ones_like(k), window=window, impl="reference"), atol=1e-5)
    for gradient in slopes:
        assert gradient.isfinite().all()


def test_logits_beyond_all_precision_stay_finite(device):
    """Rounding alone moves them by 1e22 from one kernel to the next: a weight must not pass 1 for that."""
    q, k = leaves(*(randn(1, 6, 2, 5, seed=i, dtype=torch.float32, scale=1e15).to(device) for i in (1, 2)))
    out = mov(q, k, window=3, groups=2, impl="triton")
    assert float(out.detach().abs().max()) <= 1
    for gradient in gradients(out, [q, k]):
        assert float(gradient.abs().max()) < 1e18


def test_a_dominant_logit_far_from_the_rest_wins(device):
    q, k = torch.ones(1, 1, 1, 5, device=device), torch.full((1, 1, 1, 5), -3e4, device=device)
    k[..., 4] = 3e4
    q, k = leaves(q, k)
    out = mov(q, k, window=(1, 9), scale=1.0, impl="triton")
    assert out[0, 1, 0].tolist() == [4, 3, 2, 1, 0]
    assert all(g.isfinite().all() for g in gradients(out, [q, k]))


def test_a_scale_beyond_float32_is_kept(device):
    q, k = leaves(*(randn(1, 2, 2, 3, seed=i, scale=1e-100).to(device) for i in (1, 2)))
    results = []
    for impl in ("triton", "reference"):
        out = mov(q, k, window=3, scale=1e200, impl=impl)
        results.append([out, *(1e-100 * g for g in gradients(out, [q, k]))])
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_and_any_split_of_the_batch_give_the_same_bits(dtype, device):
    spec = MovSpec((3, 5), (3, 3), groups=3, width=4, batch=2, dtype=dtype)
    case, slope = spec.case(device), spec.slope(device)
    whole = value_and_gradients(case, slope)
    for a, b in zip(whole, value_and_gradients(case, slope), strict=True):
        assert torch.equal(a, b)
    parts = [
        value_and_gradients(MovCase(case.q[i : i + 1], case.k[i : i + 1], case.window, 3, None), slope[i : i + 1])
        for i in range(2)
    ]
    for a, *b in zip(whole, *parts, strict=True):
        assert torch.equal(a, torch.cat(b))


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_alone(which, device):
    tensors = [randn(1, 4, 2, 3, seed=i).to(device) for i in (1, 2)]
    both = leaves(*tensors)
    out = mov(*both, window=3, impl="triton")
    expected = gradients(out, both)[which]
    tensors[which].requires_grad_()
    assert torch.equal(gradients(mov(*tensors, window=3, impl="triton"), [tensors[which]])[0], expected)


def test_inputs_are_left_alone(device):
    for layout in ("contiguous", "channels_last"):
        spec = MovSpec((2, 3), (3, 3), groups=2, layouts=(layout, layout))
        case, slope = spec.case(device), spec.slope(device)
        q, k = leaves(case.q, case.k)
        out = mov(q, k, **case.options, impl="triton")
        torch.autograd.grad(out, [q, k], slope)
        assert torch.equal(q, spec.case(device).q)
        assert torch.equal(k, spec.case(device).k)
        assert torch.equal(slope, spec.slope(device))
        assert (q._version, k._version, slope._version) == (0, 0, 0)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_maps_with_contiguous_channels_are_read_where_they_are(device, launches):
    for layout, in_place in (("channels_last", True), ("sliced_rows", True), ("contiguous", False)):
        case = MovSpec((2, 3), (1, 3), width=4, layouts=(layout, layout)).case(device)
        launches.clear()
        value_and_gradients(case, torch.ones(1, 2, 2, 3, dtype=torch.float64, device=device))
        for launch in launches:
            for name in ("q", "k"):
                same = launch.arguments[name].data_ptr() == getattr(case, name).data_ptr()
                assert same == in_place
        _, dq, dk = (launch.arguments for launch in launches)
        assert dq["q"] is dk["q"], "one copy serves both gradients"
        assert dq["k"] is dk["k"], "one copy serves both gradients"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "sliced_rows"])
@pytest.mark.parametrize("size", [(2, 3), (2, 2, 3)], ids=str)
def test_gradients_are_laid_out_as_their_maps(layout, size, device):
    case = MovSpec(size, (1,) * len(size), width=3, batch=2, layouts=(layout, "contiguous")).case(device)
    q, k = leaves(case.q, case.k)
    dq, dk = gradients(mov(q, k, **case.options, impl="triton"), [q, k])
    rows = layout in ("channels_last", "sliced_rows")
    assert dq.is_contiguous(memory_format=channels_last(dq) if rows else torch.contiguous_format)
    assert dk.is_contiguous()


def test_the_gradient_that_comes_back_is_read_where_it_is(device, launches):
    for layout in ("contiguous", "channels_last", "sliced", "scalar"):
        spec = MovSpec((2, 3), (1, 3), slope_layout=layout)
        launches.clear()
        slope = spec.slope(device)
        value_and_gradients(spec.case(device), slope)
        for launch in launches[1:]:
            assert launch.arguments["grad"].stride() == slope.stride()
            assert launch.arguments["grad"].data_ptr() == slope.data_ptr()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(3, 5), (2, 3, 5)], ids=str)
def test_nothing_is_written_around_the_results(size, layout, device):
    """Results stand in the middle of marked memory; rows, columns, groups and channels all fall short of a tile."""
    around = []

    def guarded(like: Tensor) -> Tensor:
        around.append(torch.full((3, *like.shape), 7.0, dtype=like.dtype, device=like.device))
        if layout == "channels_last" and like.shape == case.q.shape:
            around[-1] = around[-1].flatten(0, 1).contiguous(memory_format=channels_last(like)).unflatten(0, (3, -1))
        return around[-1][1]

    case = MovSpec(size, (3,) * len(size), groups=3, width=3, layouts=(layout, layout)).case(device)
    options = (case.window, 3, 0.5)
    outputs = [guarded(t) for t in _new_outputs(case.q, 3)]
    kernels.forward_launch(case.q, case.k, *outputs, *options).run()
    dq, dk = guarded(case.q), guarded(case.k)
    for launch in kernels.backward_launches(torch.ones_like(outputs[0]), case.q, case.k, *outputs, dq, dk, *options):
        launch.run()
    assert [dq.is_contiguous(), dk.is_contiguous()] == [layout == "contiguous"] * 2
    for memory in around:
        assert (memory[::2] == 7).all()
        assert (memory[1] != 7).all()


def far_apart(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`x` at these strides, in memory that is taken only where it is written; on a GPU, all of it."""
    count = 1 + sum((s - 1) * t for s, t in zip(x.shape, strides, strict=True))
    if x.is_cuda:
        if torch.cuda.mem_get_info()[0] < 1.1 * count * x.element_size():
            pytest.skip("needs more memory")
        memory = torch.empty(count, dtype=x.dtype, device=x.device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = torch.frombuffer(mmap.mmap(-1, count * x.element_size(), flags=flags), dtype=x.dtype)
    return memory.as_strided(x.shape, strides).copy_(x)


#: Strides, or their products, beyond 2^31 elements: batch and size, window along x, strides of batch, channel and axes.
FAR = {
    "samples": ((2, 1, 3), 3, (2**31 + 24, 1, 64, 8)),
    "planes": ((1, 4, 1, 3), 3, (8, 1, 2**30 + 8, 64, 8)),
    "rows": ((1, 4, 3), 3, (8, 1, 2**30 + 8, 8)),
    "pixels": ((1, 1, 4), 5, (8, 1, 8, 2**30 + 8)),
    "pixels in a loop": ((1, 1, 4), 11, (8, 1, 8, 2**30 + 8)),
}
FAR_SLOPES = FAR | {
    "channels": ((1, 1, 4), 3, (2**32, 2**31 + 8, 4, 1)),
    "channels in 3D": ((1, 2, 1, 3), 3, (2**32, 2**30 + 8, 4, 4, 1)),
}


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("axis", list(FAR))
def test_addresses_have_64_bits(axis, width, device, launches):
    torch.use_deterministic_algorithms(False)  # which would fill all of the memory
    (batch, *size), window_x, strides = FAR[axis]
    window = (*[3] * (len(size) - 1), window_x)
    spec = MovSpec(tuple(size), window, width=width, batch=batch, dtype=torch.float16)
    case, slope = spec.case(device), spec.slope(device)
    with override(tile=4):
        far = MovCase(far_apart(case.q, strides), far_apart(case.k, strides), case.window, 1, None)
        ours = value_and_gradients(far, slope)
    assert_within_budget(ours, reference(spec), reference(spec, torch.float64), 4)
    for launch in launches:
        assert launch.constants["WIDE"] == axis.startswith("pixels")
        assert launch.constants["UNIT"] == width
        assert launch.arguments["q"].data_ptr() == far.q.data_ptr()


@pytest.mark.parametrize("axis", list(FAR_SLOPES))
def test_the_gradient_that_comes_back_has_64_bit_addresses(axis, device, launches):
    torch.use_deterministic_algorithms(False)
    (batch, *size), window_x, strides = FAR_SLOPES[axis]
    spec = MovSpec(tuple(size), (*[3] * (len(size) - 1), window_x), width=2, batch=batch, dtype=torch.float32)
    with override(tile=4):
        ours = value_and_gradients(spec.case(device), far_apart(spec.slope(device), strides))
    assert_within_budget(ours, reference(spec), reference(spec, torch.float64), 4)
    assert [launch.constants["WIDE"] for launch in launches] == [False, *[axis.startswith("pixels")] * 2]


# --- inside PyTorch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "groups", "dtype", "layout"),
    [((2, 3), 1, torch.float32, "channels_last"), ((1, 2, 3), 2, torch.bfloat16, "contiguous")],
    ids=str,
)
def test_opcheck(size, groups, dtype, layout, device):
    n = len(size)
    q, k = (laid_out(randn(1, 2 * groups, *size, seed=i, dtype=dtype).to(device), layout) for i in (1, 2))
    arguments = ([1] * (n - 1) + [3], groups, 0.5, "triton")
    outputs = torch.ops.coverfast.mov_forward(q, k, *arguments)
    torch.library.opcheck(torch.ops.coverfast.mov_forward, (*leaves(q, k), *arguments))
    grad = torch.ones_like(outputs[0])
    torch.library.opcheck(torch.ops.coverfast.mov_backward, (grad, q, k, *outputs, *arguments))


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph(dynamic, device):
    torch.compiler.reset()

    def run(q, k):
        return mov(q, k, window=3, groups=2, impl="triton") * 2

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)):
        inputs = leaves(*(randn(1, 4, 2, 3, seed=i).to(device) for i in (1, 2)))
        out = function(*inputs)
        results.append([out, *gradients(out, inputs)])
    for eager, compiled in zip(*results, strict=True):
        assert_near(compiled, eager, atol=0, rtol=0)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autocast_changes_nothing(dtype, device):
    spec = MovSpec((2, 3), (3, 3), groups=2, width=4, dtype=dtype)
    results = []
    for context in (nullcontext(), torch.autocast(device, torch.bfloat16)):
        with context:
            results.append(value_and_gradients(spec.case(device), spec.slope(device)))
    assert results[1][0].dtype == torch.float32
    for plain, cast in zip(*results, strict=True):
        assert_near(cast, plain, atol=0, rtol=0)


def test_second_order_raises(device):
    q, k = leaves(*(randn(1, 2, 2, 3, seed=i).to(device) for i in (1, 2)))
    (dq,) = torch.autograd.grad(mov(q, k, window=3, impl="triton").square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dq.sum(), q)


def test_auto_takes_the_kernels_on_a_gpu_alone(device, launches):
    q = randn(1, 2, 2, 3).to(device)
    assert torch.equal(mov(q, q, window=3), mov(q, q, window=3, impl="torch" if INTERPRETED else "triton"))
    assert len(launches) == (0 if INTERPRETED else 2)
