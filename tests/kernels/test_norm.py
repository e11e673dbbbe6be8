"""The kernels of the projections' norm against the definition, on the GPU or in Triton's interpreter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KERNEL_LAYOUTS, SLOPE_LAYOUTS, assert_near, assert_within_budget, laid_out, leaves, randn

pytest.importorskip("triton")

from coverfast.kernels import INTERPRETED
from coverfast.kernels.launch import ARCHITECTURES, Architecture, override
from coverfast.kernels.norm import forward_launches
from coverfast.ops.norm import sample_norm

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU (test_interpreter.py runs these without one)", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned")


def outcome(x, parameters, slope, impl, eps=1e-5):
    """Output and gradients of x, bias, weight and shift, on the CPU."""
    inputs = leaves(x, *parameters)
    out = sample_norm(*inputs, eps=eps, impl=impl)
    return [t.detach().cpu() for t in (out, *torch.autograd.grad(out, inputs, slope))]


def parameters_of(channels, device, dtype=torch.float64):
    return [randn(channels, seed=i + 5, dtype=dtype).to(device) for i in range(3)]


@st.composite
def problems(draw):
    """A map anywhere from its origin, its layout and that of the gradient, pixels of a tile."""
    size = draw(st.sampled_from(((1, 1), (3, 5), (7, 9), (1, 2, 3), (3, 4, 5))))
    shape = (draw(st.integers(0, 3)), draw(st.sampled_from((1, 2, 3, 8, 12))), *size)
    layouts = draw(st.sampled_from(KERNEL_LAYOUTS)), draw(st.sampled_from(SLOPE_LAYOUTS))
    return shape, *layouts, draw(st.sampled_from((0.0, -30.0, 1e3))), draw(st.sampled_from((2, 8, 64)))


@given(problems())
def test_equals_reference(device, problem):
    shape, layout, slope_layout, away, tile = problem
    x, slope = away + randn(*shape), randn(*shape, seed=1)
    expected = outcome(x, parameters_of(shape[1], "cpu"), laid_out(slope, slope_layout), "reference")
    with override(tile=tile):
        x, slope = laid_out(x.to(device), layout), laid_out(slope.to(device), slope_layout)
        if layout == "expanded":
            expected = outcome(x.cpu(), parameters_of(shape[1], "cpu"), slope.cpu(), "reference")
        found = outcome(x, parameters_of(shape[1], device), slope, "triton")
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_half_precision_within_budget(device, dtype, layout):
    x, slope = 3 + randn(2, 8, 9, 11), randn(2, 8, 9, 11, seed=1)
    x, slope = x.to(dtype), slope.to(dtype)
    truth = outcome(x.double(), parameters_of(8, "cpu"), slope.double(), "reference")
    halves = [outcome(laid_out(x.to(device), layout), parameters_of(8, device, torch.float32), slope.to(device), impl)
              for impl in ("triton", "torch")]  # fmt: skip
    assert_within_budget(*halves, truth, slack=1.0)
    assert halves[0][0].dtype == dtype


def test_a_large_mean_leaves_the_spread(device):
    """A deviation of 0.01 on a mean of 100: squares in float32 would lose all of it."""
    inputs = [(100 + 0.01 * randn(1, 4, 20, 31)).float(), torch.zeros(4), *parameters_of(4, "cpu", torch.float32)[1:]]
    exact = sample_norm(*(t.double() for t in inputs), eps=1e-12, impl="reference")
    found = sample_norm(*(t.to(device) for t in inputs), eps=1e-12, impl="triton")
    assert_near(found.cpu().double(), exact, atol=5e-3, rtol=0)


def test_the_result_has_rows_and_half_a_batch_is_read_in_place(device, launches):
    both = randn(4, 8, 3, 5, dtype=torch.float32).to(device)
    half = both.chunk(2)[1]
    out = sample_norm(half, *parameters_of(8, device, torch.float32), impl="triton")
    assert out.stride(1) == 1
    assert launches[0].arguments["x"].data_ptr() == half.data_ptr()
    assert [launch.kernel.__name__ for launch in launches] == ["norm_moments_kernel", "norm_apply_kernel"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_sample(device, value):
    x = randn(2, 3, 4, 5, dtype=torch.float32)
    x[1, 0, 0, 0] = value
    out = sample_norm(x.to(device), *parameters_of(3, device, torch.float32), impl="triton").cpu()
    assert out[0].isfinite().all()
    assert out[1].isnan().any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck_and_compile(device, layout):
    x = laid_out(randn(2, 3, 4, 5, dtype=torch.float32).to(device), layout)
    parameters = parameters_of(3, device, torch.float32)
    torch.library.opcheck(torch.ops.coverfast.norm_forward, (*leaves(x, *parameters), 1e-5))
    statistics = torch.ops.coverfast.norm_forward(x, *parameters, 1e-5)[1]
    arguments = (torch.ones_like(x), x, parameters[0], parameters[1], statistics)
    torch.library.opcheck(torch.ops.coverfast.norm_backward, arguments)
    compiled = torch.compile(sample_norm, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x, *parameters, impl="triton"), sample_norm(x, *parameters, impl="torch"), 1e-5, 1e-5)


def test_second_order_gradients_are_refused(device):
    inputs = leaves(randn(1, 2, 3, 4).to(device), *parameters_of(2, device))
    (dx,) = torch.autograd.grad(sample_norm(*inputs, impl="triton").sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.square().sum(), inputs[:1])


@pytest.mark.parametrize("on", [*ARCHITECTURES.values(), Architecture(1)], ids=str)
@pytest.mark.parametrize(("batch", "pixels"), [(1, 1), (2, 4096), (24, 9), (3000, 7)])
def test_programs_share_samples_evenly(on, batch, pixels):
    x = torch.empty(batch, 8, 1, pixels, device="meta")
    parameters, statistics = [torch.empty(8, device="meta")] * 3, torch.empty(batch, 2, device="meta")
    for launch in forward_launches(x, *parameters, 1e-5, x, statistics, on):
        split = launch.constants["SPLIT"]
        assert launch.programs == batch * split
        assert split & (split - 1) == 0
        assert 1 <= split <= max(1, 2 * -(-pixels // launch.constants["P"]))
