"""mov: the lean implementation against the definition, and the properties of SPEC 1."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    LAYOUTS,
    MovCase,
    assert_near,
    assert_within_budget,
    gradients,
    laid_out,
    leaves,
    mov_cases,
    randn,
    refused,
    run_python,
    sizes,
)
from torch import Tensor

import coverfast.ops.mov as module
from coverfast import mov


def value_and_gradients(case: MovCase, impl: str) -> list[Tensor]:
    q, k = leaves(case.q, case.k)
    out = mov(q, k, **case.options, impl=impl)
    return [out.detach(), *gradients(out, [q, k])]


@given(mov_cases())
def test_equals_reference(case):
    for ours, theirs in zip(value_and_gradients(case, "torch"), value_and_gradients(case, "reference"), strict=True):
        assert_near(ours, theirs)


@given(mov_cases(dtypes=DTYPES[:3], least=1))
def test_low_precision_error_is_that_of_the_reference(case):
    wide = MovCase(case.q.double(), case.k.double(), case.window, case.groups, case.scale)
    truth = value_and_gradients(wide, "reference")
    ours, theirs = value_and_gradients(case, "torch"), value_and_gradients(case, "reference")
    assert [t.dtype for t in ours] == [torch.float32, case.q.dtype, case.q.dtype]
    assert_within_budget(ours, theirs, truth, 1 + max(case.window))


@given(mov_cases(dtypes=DTYPES, least=1))
def test_stays_within_the_window(case):
    out = mov(20 * case.q, 20 * case.k, **case.options)
    for axis, width in enumerate(case.window):
        assert float(out[:, axis].abs().max()) <= (width - 1) / 2 + 1e-5


@settings(max_examples=10)
@given(st.sampled_from((2, 3)), st.data())
def test_finds_an_integer_shift(n, data):
    offset = data.draw(st.tuples(*[st.integers(-2, 2)] * n))
    size = (7, 9) if n == 2 else (5, 6, 7)
    q = torch.nn.functional.normalize(randn(2, 24, *size, seed=data.draw(st.integers(0, 99))), dim=1)
    k = q.roll(offset, tuple(range(2, 2 + n)))  # k(p + offset) = q(p) except where the roll wraps
    out = mov(q, k, window=5, scale=300.0)
    inside = tuple(slice(max(0, -o), min(s, s - o)) for o, s in zip(offset, size, strict=True))
    expected = torch.tensor(offset, dtype=out.dtype).reshape(-1, *[1] * n).expand_as(out)
    assert_near(out[(..., *inside)], expected[(..., *inside)], atol=1e-6)


@given(st.sampled_from((2, 3)), st.data())
def test_constant_features_give_the_mean_offset_inside(n, data):
    size = data.draw(sizes(n, 5))
    window = data.draw(st.tuples(*[st.sampled_from((1, 3, 7))] * n))
    q = randn(1, 3, *[1] * n).expand(1, 3, *size)
    out = mov(q, q, window=window)[0]
    for p in product(*(range(s) for s in size)):
        for axis, (i, w, s) in enumerate(zip(p, window, size, strict=True)):
            r = (w - 1) // 2
            mean = np.mean([o for o in range(-r, r + 1) if 0 <= i + o < s])
            assert float(out[(axis, *p)]) == pytest.approx(mean, abs=1e-12)


@given(mov_cases(least=1), st.sampled_from((-3e3, 7.0, 1e4)))
def test_a_constant_on_all_logits_changes_nothing(case, constant):
    def widen(x: Tensor, value: float) -> Tensor:
        x = x.unflatten(1, (case.groups, -1))
        return torch.cat([x, torch.full_like(x[:, :, :1], value)], 2).flatten(1, 2)

    scale = 0.7
    plain = mov(case.q, case.k, window=case.window, groups=case.groups, scale=scale)
    moved = mov(widen(case.q, 1.0), widen(case.k, constant), window=case.window, groups=case.groups, scale=scale)
    assert_near(moved, plain, atol=1e-9)


@given(mov_cases(least=1), st.randoms(use_true_random=False))
def test_the_order_of_groups_changes_nothing(case, random):
    order = list(range(case.groups))
    random.shuffle(order)
    q, k = (x.unflatten(1, (case.groups, -1))[:, order].flatten(1, 2) for x in (case.q, case.k))
    assert_near(mov(q, k, **case.options), mov(case.q, case.k, **case.options), atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS[:4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(5, 6), (3, 4, 5)], ids=str)
def test_the_layout_changes_nothing(layout, dtype, size):
    q, k = (randn(2, 6, *size, seed=i, dtype=dtype) for i in (1, 2))
    plain = value_and_gradients(MovCase(q, k, (5,) * len(size), 2, None), "torch")
    other = MovCase(laid_out(q, layout), laid_out(k, layout), (5,) * len(size), 2, None)
    for a, b in zip(value_and_gradients(other, "torch"), plain, strict=True):
        assert_near(a, b, atol=4 * torch.finfo(a.dtype).eps, rtol=4 * torch.finfo(a.dtype).eps)


@given(mov_cases(), st.sampled_from((1, 3, 20, 100, 700)), st.sampled_from((1, 10, 2**15)))
def test_the_block_size_changes_nothing(case, scores, lanes):
    whole = value_and_gradients(case, "torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SCORES_PER_BLOCK", scores)
        patch.setattr(module, "_LANES_PER_TAP", lanes)
        for a, b in zip(value_and_gradients(case, "torch"), whole, strict=True):
            assert_near(a, b)


def test_a_small_block_splits_rows_and_taps(monkeypatch):
    monkeypatch.setattr(module, "_SCORES_PER_BLOCK", 40)
    monkeypatch.setattr(module, "_LANES_PER_TAP", 1)
    runs, taps, row = module._plan(randn(3, 4, 6, 5), (3, 3), 2)
    assert len(runs) > 1
    assert taps < 9
    assert len(list(module._blocks(3, 6, row))) == 18


def test_a_wide_window_leaves_whole_grids_to_a_tap():
    """Few pixels a tap would be as many calls as there are taps, for every few rows."""
    runs, taps, row = module._plan(randn(1, 8, 96, 96), (121, 121), 1)
    assert len(list(module._blocks(1, 96, row))) == 1
    assert taps * 96 * 96 <= module._SCORES_PER_BLOCK
    assert sum(map(len, runs)) == 121**2


@pytest.mark.parametrize("level", [-1e4, -1e30, 1e4, 1e30])
@pytest.mark.parametrize("scores", [1, 2**23])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_extreme_logits_stay_finite(level, scores, impl, monkeypatch):
    # With one score a block the first runs lie wholly out of the grid for the first pixels.
    monkeypatch.setattr(module, "_SCORES_PER_BLOCK", scores)
    q = torch.full((1, 1, 3, 4), abs(level) ** 0.5)
    k = torch.full_like(q, abs(level) ** 0.5 * (1 if level > 0 else -1))
    q, k = leaves(q, k)
    out = mov(q, k, window=5, scale=1.0, impl=impl)
    assert_near(out, mov(torch.ones_like(q), torch.ones_like(k), window=5), atol=1e-5)
    for gradient in gradients(out, [q, k]):
        assert gradient.isfinite().all()


def test_a_dominant_logit_far_from_the_rest_wins():
    q, k = torch.ones(1, 1, 1, 5), torch.full((1, 1, 1, 5), -3e4)
    k[..., 4] = 3e4
    q, k = leaves(q, k)
    out = mov(q, k, window=(1, 9), scale=1.0)
    assert out[0, 1, 0].tolist() == [4, 3, 2, 1, 0]
    assert all(g.isfinite().all() for g in gradients(out, [q, k]))


@pytest.mark.parametrize(("size", "window", "groups"), [((3, 4), 3, 1), ((2, 3), (1, 5), 2), ((1, 2, 2), 3, 2)])
def test_gradcheck(size, window, groups):
    q, k = leaves(*(randn(1, 2 * groups, *size, seed=i) for i in (1, 2)))
    assert torch.autograd.gradcheck(lambda q, k: mov(q, k, window=window, groups=groups), (q, k))


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_alone(which):
    tensors = [randn(2, 4, 4, 3, seed=i) for i in (1, 2)]
    both = leaves(*tensors)
    expected = gradients(mov(*both, window=3), both)[which]
    tensors[which].requires_grad_()
    assert torch.equal(gradients(mov(*tensors, window=3), [tensors[which]])[0], expected)


@pytest.mark.parametrize(
    ("size", "groups", "dtype"), [((4, 5), 1, torch.float32), ((3, 2, 4), 2, torch.bfloat16)], ids=str
)
def test_opcheck(size, groups, dtype):
    n = len(size)
    q, k = (randn(2, 2 * groups, *size, seed=i, dtype=dtype) for i in (1, 2))
    arguments = ([3] * n, groups, 0.5, "torch")
    outputs = torch.ops.coverfast.mov_forward(q, k, *arguments)
    torch.library.opcheck(torch.ops.coverfast.mov_forward, (*leaves(q, k), *arguments))
    torch.library.opcheck(torch.ops.coverfast.mov_forward, (laid_out(q, "channels_last"), k, *arguments))
    grad = torch.ones_like(outputs[0])
    torch.library.opcheck(torch.ops.coverfast.mov_backward, (grad, q, k, *outputs, *arguments))


def test_second_order_raises():
    q, k = leaves(*(randn(1, 2, 3, 3, seed=i) for i in (1, 2)))
    (dq,) = torch.autograd.grad(mov(q, k, window=3).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dq.sum(), q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_output_is_float32_or_float64(dtype, impl):
    q = randn(1, 2, 3, 4, dtype=dtype)
    assert mov(q, q, window=3, impl=impl).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_nothing(dtype):
    q, k = (randn(2, 8, 6, 7, seed=i, dtype=dtype) for i in (1, 2))
    case = MovCase(q, k, (7, 7), 2, None)
    plain = value_and_gradients(case, "torch")
    with torch.autocast("cpu", torch.bfloat16):
        cast = value_and_gradients(case, "torch")
    for a, b in zip(cast, plain, strict=True):
        assert_near(a, b, atol=1e-6, rtol=1e-5)


def test_inputs_are_left_alone():
    q, k = (randn(2, 4, 5, 6, seed=i) for i in (1, 2))
    copies, (q, k) = (q.clone(), k.clone()), leaves(q, k)
    out = mov(q, k, window=5, groups=2)
    grad = torch.ones_like(out)
    out.backward(grad)
    assert torch.equal(q, copies[0])
    assert torch.equal(k, copies[1])
    assert (q._version, k._version, grad._version) == (0, 0, 0)
    assert torch.equal(grad, torch.ones_like(grad))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scores", [7, 100, 2**23])
@pytest.mark.parametrize(("size", "window"), [((5, 7), 3), ((2, 3), 9), ((3, 4, 5), (1, 5, 3))])
def test_every_element_is_written(scores, size, window, monkeypatch):
    monkeypatch.setattr(module, "_SCORES_PER_BLOCK", scores)
    q, k = leaves(*(randn(2, 6, *size, seed=i) for i in (1, 2)))
    window = (window,) * len(size) if isinstance(window, int) else window
    for tensor in torch.ops.coverfast.mov_forward(q, k, window, 2, 1.0, "torch"):
        assert tensor.isfinite().all()
    for gradient in gradients(mov(q, k, window=window, groups=2), [q, k]):
        assert gradient.isfinite().all()


def test_reproducible_to_the_bit():
    case = MovCase(randn(2, 8, 24, 30, seed=1).float(), randn(2, 8, 24, 30, seed=2).float(), (7, 7), 2, None)
    for a, b in zip(value_and_gradients(case, "torch"), value_and_gradients(case, "torch"), strict=True):
        assert torch.equal(a, b)


def test_scale_defaults_to_the_group_width():
    q, k = (randn(1, 6, 4, 4, seed=i) for i in (1, 2))
    assert torch.equal(mov(q, k, window=3, groups=2), mov(q, k, window=3, groups=2, scale=3**-0.5))
    assert not torch.allclose(mov(q, k, window=3, groups=2), mov(q, k, window=3, groups=2, scale=6**-0.5))


def test_auto_is_torch_on_the_cpu():
    q = randn(1, 4, 6, 6)
    assert torch.equal(mov(q, q, window=3), mov(q, q, window=3, impl="torch"))


_MEMORY = """
import torch
from coverfast import mov

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))

def both(*shape):
    q, k = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    mov(q, k, window=5).sum().backward()

both(1, 8, 4, 4, 4)
q, k = (torch.randn(1, 8, 64, 64, 64, requires_grad=True) for _ in range(2))
try:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
except OSError:
    pass
before = status("VmRSS")
mov(q, k, window=5).sum().backward()
print((status("VmHWM") - before) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the high-water mark from /proc")
def test_memory_of_a_volume():
    assert 20 < float(run_python(_MEMORY, MALLOC_MMAP_THRESHOLD_="65536")) <= 150


def test_refusals():
    q = randn(2, 6, 4, 5)
    with refused("q", "torch.Tensor", "list"):
        mov([1], q, window=3)
    with refused("q", "(B, C, *S)", "(6, 4, 5)"):
        mov(q[0], q, window=3)
    with refused("q", "(2, 0, 4, 5)"):
        mov(q[:, :0], q[:, :0], window=3)
    with refused("q", "int64"):
        mov(q.long(), q.long(), window=3)
    with refused("k", "shape of q", "(2, 6, 4, 4)"):
        mov(q, q[..., 1:], window=3)
    with refused("k", "dtype of q", "float32"):
        mov(q, q.float(), window=3)
    with refused("k", "device of q", "meta"):
        mov(q, q.to("meta"), window=3)
    for window in (4, (3, 2), (3,), (3, 3, 3), 0, -1, 2.5, True, "33", None):
        with refused("window", str(window)):
            mov(q, q, window=window)
    for groups in (4, 0, -1, 2.5, 2.0, "2", None):
        with refused("groups", str(groups)):
            mov(q, q, window=3, groups=groups)
    with refused("impl", "cuda"):
        mov(q, q, window=3, impl="cuda")


@pytest.mark.parametrize(
    ("kernels", "has_triton", "words"),
    [
        (("mov",), True, ("mov on cpu", "needs a GPU", "TRITON_INTERPRET=1")),
        ((), True, ("mov", "this version has no Triton kernel for it")),
        ((), False, ("mov", "the package triton is not installed")),
    ],
)
def test_triton_is_refused_where_it_cannot_run(kernels, has_triton, words, monkeypatch):
    monkeypatch.setattr("coverfast.ops.dispatch.KERNELS", frozenset(kernels))
    monkeypatch.setattr("coverfast.ops.dispatch._HAS_TRITON", has_triton)
    monkeypatch.setattr("coverfast.ops.dispatch.INTERPRETED", False)
    q = randn(1, 4, 5, 6)
    with refused("impl='triton'", "use impl='auto' or 'torch'", *words):
        mov(q, q, window=3, impl="triton")
    assert torch.equal(mov(q, q, window=3), mov(q, q, window=3, impl="torch"))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1"])
def test_a_scale_that_is_no_number_is_refused(scale):
    q = torch.zeros(1, 2, 3, 3)
    with refused("scale", repr(scale)):
        mov(q, q, window=3, scale=scale)
