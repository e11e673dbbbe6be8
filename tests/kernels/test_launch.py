"""Plans of launches: neither a GPU nor the interpreter is needed."""

from math import prod

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import DTYPES, KERNEL_LAYOUTS, laid_out, run_python
from torch import Tensor

pytest.importorskip("triton")

from coverfast.kernels import mov as kernels
from coverfast.kernels.launch import ARCHITECTURES, Architecture, Launch, bits, chosen, override
from coverfast.layout import new_like, rows_of
from coverfast.ops.mov import _new_outputs


def plan(
    q: Tensor, k: Tensor | None = None, *, window: int = 3, groups: int = 1, grad: Tensor | None = None
) -> list[Launch]:
    """The launches of a forward and a backward: forward, dq, dk."""
    k = q if k is None else k
    outputs = _new_outputs(q, groups)
    grad = torch.empty_like(outputs[0]) if grad is None else grad
    options = ((window,) * (q.ndim - 2), groups, 0.5)
    return [
        kernels.forward_launch(q, k, *outputs, *options),
        *kernels.backward_launches(grad, q, k, *outputs, new_like(q), new_like(k), *options),
    ]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, layout: str = "channels_last") -> Tensor:
    return laid_out(torch.empty(shape, dtype=dtype, device="meta"), layout)


# --- the shape of a launch --------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(
    size=st.lists(st.integers(1, 600), min_size=2, max_size=3),
    batch=st.integers(0, 30),
    groups=st.integers(1, 600),
    words=st.integers(1, 200),
    radius=st.integers(0, 63),
    on=st.sampled_from([*ARCHITECTURES.values(), Architecture(1), Architecture(500)]),
    backward=st.booleans(),
)
@example([1, 1], 0, 1, 1, 0, Architecture(132), False)
@example([128, 128, 128], 2, 1, 8, 2, Architecture(132), True)
@example([3, 33], 1, 65, 8, 2, Architecture(304, warp=64), True)
def test_every_rule_gives_a_launch(size, batch, groups, words, radius, on, backward):
    shape = kernels.choose(size, batch, groups, words, 2 * radius + 1, on, backward=backward)
    assert shape.lanes >= groups
    assert shape.lanes < 2 * groups
    for number in (shape.tile, shape.lanes, shape.warps):
        assert number & (number - 1) == 0, "a power of two"
    assert 1 <= shape.warps <= 16
    assert shape.tile * shape.lanes >= on.warp, "no warp is part empty from the start"
    assert shape.warps * on.warp <= max(shape.tile * shape.lanes, on.warp)
    assert 1 <= shape.rows <= size[-2]
    assert shape.taps >= 1
    if 2 * radius + 1 <= kernels.UNROLLED:
        assert shape.taps <= 2 * radius + 1


@settings(max_examples=60)
@given(st.data())
def test_programs_cover_the_grid_and_nothing_twice(data):
    n = data.draw(st.sampled_from((2, 3)))
    size = data.draw(st.tuples(*[st.integers(1, 90)] * n))
    batch, groups = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 5))
    width, window = data.draw(st.integers(1, 40)), data.draw(st.sampled_from((1, 3, 5, 9, 11)))
    dtype, layout = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(KERNEL_LAYOUTS))
    q = meta(batch, groups * width, *size, dtype=dtype, layout=layout)
    for launch in plan(q, window=window, groups=groups):
        c = launch.constants
        rows, tiles = -(-size[-2] // c["ROWS"]), -(-size[-1] // c["TILE"])
        assert launch.programs == batch * prod(size[:-2]) * rows * tiles
        assert c["GROUPS"] * c["WIDTH"] == q.shape[1]
        assert c["CHUNK"] & (c["CHUNK"] - 1) == 0
        assert -(-width // c["CHUNK"]) <= 16
        assert c["UNIT"] * q.element_size() <= 16
        for name in ("b", "z", "y"):
            stride = {"b": 0, "z": 2, "y": q.ndim - 2}[name]
            expected = 0 if name == "z" and n == 2 else launch.arguments["q"].stride(stride)
            assert launch.arguments[f"q_{name}"] * c["UNIT"] == expected
        assert c["Q_X"] == launch.arguments["q"].stride(-1)
        assert c["WINDOW_X"] == (window if window <= kernels.UNROLLED else 0)
        assert not c["WIDE"]


def test_a_large_volume_shares_rows_and_a_small_one_fills_the_device():
    large, small = (plan(meta(2, 8, *[s] * 3), window=5)[0].constants for s in (128, 8))
    assert large["ROWS"] > small["ROWS"] >= 1


def test_an_override_holds_inside_its_block_alone():
    q = meta(1, 8, 20, 40)
    usual = plan(q)[0]
    with override(rows=3, tile=16):
        with override(taps=1, rows=1, warps=2):
            inner = plan(q)[0]
        outer = plan(q)[0]
    assert (inner.constants["ROWS"], inner.constants["TAPS"], inner.constants["TILE"], inner.warps) == (1, 1, 16, 2)
    assert (outer.constants["ROWS"], outer.constants["TAPS"]) == (3, usual.constants["TAPS"])
    assert plan(q)[0].constants == usual.constants
    with pytest.raises(KeyError), override(rows=7):
        raise KeyError
    assert chosen("rows", 2) == 2


def test_an_empty_batch_launches_nothing():
    for launch in plan(meta(0, 8, 4, 5), groups=2):
        assert launch.programs == 0
        launch.run()


@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, -2.5, 1e300, 5e-324])
def test_a_number_travels_as_its_bits(value):
    assert torch.tensor([bits(value)]).view(torch.float64).item().hex() == value.hex()


# --- alignment --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "width", "unit"),
    [
        (torch.bfloat16, 8, 8),
        (torch.float16, 16, 8),
        (torch.float32, 8, 4),
        (torch.float64, 8, 2),
        (torch.float32, 2, 2),
        (torch.bfloat16, 6, 2),
        (torch.bfloat16, 3, 1),
    ],
    ids=str,
)
def test_unit_is_what_every_row_is_aligned_to(dtype, width, unit):
    for launch in plan(meta(2, 2 * width, 3, 5, dtype=dtype), groups=2):
        assert launch.constants["UNIT"] == unit


@pytest.mark.parametrize(("start", "unit"), [(0, 8), (8, 8), (4, 4), (2, 2), (1, 1), (3, 1)])
def test_a_map_that_starts_off_the_boundary_has_a_smaller_unit(start, unit):
    around = laid_out(torch.zeros(1, 16, 4, 5, dtype=torch.bfloat16), "channels_last")
    assert around.data_ptr() % 16 == 0
    view, other = around[:, start : start + 8], laid_out(torch.zeros(1, 8, 4, 5, dtype=torch.bfloat16), "channels_last")
    for q, k in ((view, other), (other, view)):
        for launch in plan(q, k):
            assert launch.arguments["q"] is q
            assert launch.arguments["k"] is k
            assert launch.constants["UNIT"] == unit
            assert launch.constants["CHUNK"] <= max(unit, 1)


def test_rows_that_lie_off_the_boundary_have_a_smaller_unit():
    storage = torch.zeros(4000, dtype=torch.bfloat16)
    for strides, unit in (((800, 1, 80, 8), 8), ((800, 1, 82, 8), 2), ((804, 1, 80, 8), 4), ((800, 1, 80, 9), 1)):
        q = storage.as_strided((2, 8, 4, 5), strides)
        assert plan(q)[0].constants["UNIT"] == unit


# --- 64 bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "strides", "wide"),
    [
        ((1, 8, 4, 5), (160, 1, 40, 8), False),
        ((2, 8, 4, 5), (2**40, 1, 2**35, 8), False),  # the kernels reckon lines in 64 bits in any case
        ((1, 8, 1, 3), (8, 1, 8, 2**30), True),
        ((1, 8, 1, 2**28), (8, 1, 2**31, 8), True),
        ((1, 8, 1, 2**20), (8, 1, 2**23, 8), False),
    ],
    ids=str,
)
def test_offsets_along_a_row_have_64_bits_where_they_need_them(shape, strides, wide):
    far = torch.empty_strided(shape, strides, dtype=torch.bfloat16, device="meta")
    near = meta(*shape)
    for q, k in ((far, near), (near, far)):
        launches = plan(q, k) if wide or shape[-1] < 9 else plan(q)
        assert {launch.constants["WIDE"] for launch in launches} == {wide}


def test_a_gradient_with_far_pixels_widens_the_backward_alone():
    grad = torch.empty_strided((1, 2, 1, 3), (2, 1, 2, 2**30), device="meta")
    assert [launch.constants["WIDE"] for launch in plan(meta(1, 8, 1, 3), grad=grad)] == [False, True, True]


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6, 3, 4, 5), (1, 1, 4, 5), (2, 6, 1, 1)], ids=str)
def test_rows_are_read_in_place_or_copied_once(shape):
    x = torch.arange(prod(shape), dtype=torch.float32).view(shape)
    for layout in ("channels_last", "sliced_rows"):
        rows = laid_out(x, layout)
        assert rows_of(rows) is rows
    for layout in ("contiguous", "sliced", "transposed"):
        rows = rows_of(laid_out(x, layout))
        assert torch.equal(rows, x)
        assert shape[1] == 1 or rows.stride(1) == 1
        assert rows_of(rows) is rows


@pytest.mark.parametrize("n", [2, 3])
def test_gradients_are_written_in_rows_where_their_map_has_rows(n):
    size = (2, 4, 5)[-n:]
    for layout, rows in (("channels_last", True), ("sliced_rows", True), ("contiguous", False), ("sliced", False)):
        x = meta(2, 8, *size, layout=layout)
        target = new_like(x)
        arguments, constants = kernels._target(target, 8)
        assert constants["D_ROWS"] == rows
        assert constants["D_X"] == (8 if rows else 1)
        assert constants["D_UNIT"] == (8 if rows else 1)
        assert arguments["d_c"] == target.stride(1)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_triton_is_loaded_with_the_kernels_and_no_sooner():
    code = "import sys, torch, coverfast; coverfast.mov; before = 'triton' in sys.modules; "
    code += "import coverfast.kernels.mov; print(before, 'triton' in sys.modules)"
    assert run_python(code) == "False True"
