"""Losses and figure of merit against plain numpy; masks, splits of the batch, values that are not finite."""

import math
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, KERNEL_LAYOUTS, assert_near, gradients, laid_out, leaves, randn, refused, sizes

from coverfast import AffineDVF, consistency_loss, end_point_error, inside_mask, vector_loss, warp
from coverfast.kernels.launch import Architecture
from coverfast.layout import has_rows, new_like
from coverfast.ops.losses import field_errors

IMPLS = ("torch", "reference")


@st.composite
def problems(draw):
    """Two fields, two feature maps and a mask (a tensor, "inside" or None) with its bool array."""
    n = draw(st.sampled_from((2, 3)))
    size, batch, seed = draw(sizes(n, 5)), draw(st.integers(1, 3)), draw(st.integers(0, 99))
    pred, target = (3 * randn(batch, n, *size, seed=seed + i) for i in (1, 2))
    a, b = (randn(batch, draw(st.integers(1, 4)), *size, seed=seed + 3) for _ in range(2))
    b = randn(*a.shape, seed=seed + 4)
    mask = draw(st.sampled_from((None, "inside", "random", "empty")))
    if mask == "random":
        mask = randn(batch, 1, *size, seed=seed + 5) > 0
    elif mask == "empty":
        mask = torch.zeros(batch, 1, *size, dtype=torch.bool)
    return pred, target, a, b, mask


def as_array(mask, target):
    if mask is None:
        return np.ones((target.shape[0], *target.shape[2:]), bool)
    return (inside_mask(target) if isinstance(mask, str) else mask)[:, 0].numpy()


def mean_over(values, mask):
    return sum(values[p] for p in zip(*np.nonzero(mask), strict=True)) / max(1, int(mask.sum()))


@pytest.mark.parametrize("impl", IMPLS)
@given(problems())
def test_field_losses_by_brute_force(impl, problem):
    pred, target, _, _, mask = problem
    where, gap = as_array(mask, target), (pred - target).numpy()
    l1 = mean_over(np.abs(gap).sum(1), where)
    l2 = mean_over(np.sqrt((gap**2).sum(1)), where)
    assert float(vector_loss(pred, target, mask, impl=impl)) == pytest.approx(l1, rel=1e-12)
    assert float(end_point_error(pred, target, mask, impl=impl)) == pytest.approx(l2, rel=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@given(problems())
def test_consistency_by_brute_force(impl, problem):
    _, dvf, a, b, mask = problem
    a_there, b_here = warp(a, dvf, impl="reference").numpy(), b.numpy()
    norms = [np.maximum(np.sqrt((f**2).sum(1)), 1e-6) for f in (a_there, b_here)]
    cosine = (a_there * b_here).sum(1) / (norms[0] * norms[1])
    expected = 1 - mean_over(cosine, as_array(mask, dvf))
    assert float(consistency_loss(a, b, dvf, mask, impl=impl)) == pytest.approx(expected, abs=1e-12)


@given(problems())
def test_gradients_equal_reference(problem):
    pred, target, a, b, mask = problem
    results = []
    for impl in IMPLS:
        p, t, fa, fb, d = leaves(pred, target, a, b, target)
        results.append(
            [
                *gradients(vector_loss(p, t, mask, impl=impl), [p, t]),
                *gradients(consistency_loss(fa, fb, d, mask, impl=impl), [fa, fb, d]),
            ]
        )
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs)


def test_an_empty_mask_costs_nothing():
    pred, target, a, b = randn(2, 2, 3, 4), randn(2, 2, 3, 4, seed=1), randn(2, 5, 3, 4), randn(2, 5, 3, 4, seed=2)
    empty = torch.zeros(2, 1, 3, 4, dtype=torch.bool)
    pred, a, b = leaves(pred, a, b)
    for impl in IMPLS:
        loss = vector_loss(pred, target, empty, impl=impl)
        consistency = consistency_loss(a, b, target, empty, impl=impl)
        assert (loss.item(), consistency.item(), end_point_error(pred, target, empty, impl=impl).item()) == (
            0,
            1,
            0,
        )
        for gradient in gradients(loss + consistency, [pred, a, b]):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("what", ["pred", "target", "feat_b"])
def test_what_the_mask_hides_is_harmless(what, bad, impl):
    values = {name: randn(2, 2, 3, 4, seed=i, dtype=torch.float32) for i, name in enumerate(("pred", "target"))}
    values |= {name: randn(2, 5, 3, 4, seed=i, dtype=torch.float32) for i, name in enumerate(("feat_a", "feat_b"))}
    mask = torch.ones(2, 1, 3, 4, dtype=torch.bool)
    mask[0, 0, 1, 2] = mask[1, 0, 0, 0] = False
    results = []
    for case in (values, values | {what: torch.where(mask, values[what], bad)}):
        pred, a, b = leaves(case["pred"], case["feat_a"], case["feat_b"])
        vector = vector_loss(pred, case["target"], mask, impl=impl)
        consistency = consistency_loss(a, b, case["target"], mask, impl=impl)
        error = end_point_error(pred, case["target"], mask, impl=impl)
        slopes = gradients(vector + consistency, [pred, a, b])
        results.append([x.detach() for x in (vector, consistency, error, *slopes)])
    for plain, spoilt in zip(*results, strict=True):
        assert_near(spoilt, plain, atol=1e-7, rtol=1e-6)


def test_inside_means_inside_mask():
    pred, target, a, b = (
        randn(1, 2, 6, 6),
        3 * randn(1, 2, 6, 6, seed=1),
        randn(1, 4, 6, 6),
        randn(1, 4, 6, 6, seed=2),
    )
    mask = inside_mask(target)
    assert 0 < int(mask.sum()) < 36
    assert vector_loss(pred, target, "inside") == vector_loss(pred, target, mask)
    assert end_point_error(pred, target, "inside") == end_point_error(pred, target, mask)
    assert consistency_loss(a, b, target, "inside") == consistency_loss(a, b, target, mask)
    assert vector_loss(pred, target, "inside") != vector_loss(pred, target)


def test_an_affine_target_equals_the_dense_one():
    theta = torch.tensor([[[0.9, 0.2, 1.0], [-0.2, 1.1, 0.5]]]).expand(2, 2, 3)
    field = AffineDVF(theta, (5, 6), full_size=(9, 9), origin=torch.tensor([[1, 2], [0, 3]]))
    dense, pred, a, b = (
        field.dense(),
        randn(2, 2, 5, 6).float(),
        randn(2, 3, 5, 6).float(),
        randn(2, 3, 5, 6).float(),
    )
    for mask in (None, "inside", inside_mask(dense)):
        assert vector_loss(pred, field, mask) == vector_loss(pred, dense, mask)
        assert end_point_error(pred, field, mask) == end_point_error(pred, dense, mask)
        assert consistency_loss(a, b, field, mask) == consistency_loss(a, b, dense, mask)


@pytest.mark.parametrize("impl", IMPLS)
@given(problems(), st.sampled_from((float, torch.tensor)))
def test_parts_of_a_batch_add_up_under_the_common_denominator(impl, problem, kind):
    pred, target, a, b, mask = problem
    count = int(as_array(mask, target).sum())
    whole = vector_loss(pred, target, mask, impl=impl)
    whole_con = 1 - consistency_loss(a, b, target, mask, impl=impl)
    parts, parts_con = [], []
    for part in (slice(0, 1), slice(1, None)):
        cut = mask[part] if isinstance(mask, torch.Tensor) else mask
        options = {"denominator": kind(float(max(1, count))), "impl": impl}
        parts.append(vector_loss(pred[part], target[part], cut, **options))
        parts_con.append(1 - consistency_loss(a[part], b[part], target[part], cut, **options))
    assert_near(sum(parts), whole)
    assert_near(sum(parts_con), whole_con)


@pytest.mark.parametrize("impl", IMPLS)
def test_features_without_a_norm(impl):
    a, b = randn(1, 3, 2, 4), randn(1, 3, 2, 4, seed=1)
    a[:, :, 0], b[:, :, 1] = 0, 0
    still = torch.zeros(1, 2, 2, 4)
    a, b = leaves(a, b)
    loss = consistency_loss(a, b, still, impl=impl)
    assert loss.item() == 1
    assert all(g.isfinite().all() for g in gradients(loss, [a, b]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_cosine_is_one_for_equal_features_of_any_size(dtype):
    # In half precision the squares of these would overflow or vanish.
    a = torch.cat([randn(1, 3, 2, 4) * 1e-4, randn(1, 3, 2, 4) * 1e4], 2).to(dtype)
    loss = consistency_loss(a, a, torch.zeros(1, 2, 4, 4))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(loss.item()) < 1e-6
    assert consistency_loss(a, -a, torch.zeros(1, 2, 4, 4)).item() == pytest.approx(2)


def test_autocast_changes_nothing():
    pred, target, a, b = (randn(2, c, 8, 9, seed=c).float() for c in (2, 2, 6, 6))
    plain = vector_loss(pred, target), consistency_loss(a, b, target)
    with torch.autocast("cpu", torch.bfloat16):
        cast = vector_loss(pred, target), consistency_loss(a, b, target)
    assert [c.dtype for c in cast] == [torch.float32] * 2
    assert cast == plain


def test_gradcheck():
    pred, target, a, b = randn(1, 2, 2, 3), randn(1, 2, 2, 3, seed=1), randn(1, 3, 2, 3), randn(1, 3, 2, 3, seed=2)
    dvf = target.floor() + 0.2 + 0.6 * (target - target.floor())
    mask = torch.tensor([[[[True, False, True], [True, True, False]]]])
    pred, a, b, dvf = leaves(pred, a, b, dvf)
    assert torch.autograd.gradcheck(lambda p: vector_loss(p, target, mask), pred)
    assert torch.autograd.gradcheck(lambda a, b, d: consistency_loss(a, b, d, mask), (a, b, dvf))


def test_refusals(monkeypatch):
    pred, mask = torch.zeros(2, 2, 3, 4), torch.ones(2, 1, 3, 4, dtype=torch.bool)
    features = torch.zeros(2, 5, 3, 4)
    for loss in (vector_loss, end_point_error):
        with refused("pred", "float16"):
            loss(pred.half(), pred)
        with refused("target", "shape of pred", "(2, 2, 3, 3)"):
            loss(pred, pred[..., 1:])
        with refused("target", "device of pred", "meta"):
            loss(pred, pred.to("meta"))
        with refused("target", "torch.Tensor"):
            loss(pred, 3)
    with refused("feat_a", "int64"):
        consistency_loss(features.long(), features, pred)
    with refused("feat_b", "shape of feat_a"):
        consistency_loss(features, features[:, 1:], pred)
    with refused("feat_b", "dtype of feat_a"):
        consistency_loss(features, features.double(), pred)
    with refused("dvf", "size of feat_a", "(3, 3)"):
        consistency_loss(features, features, pred[..., 1:])
    with refused("dvf", "2 spatial axes"):
        consistency_loss(features, features, torch.zeros(2, 3, 3, 4, 5))
    for loss in (lambda m: vector_loss(pred, pred, m), lambda m: consistency_loss(features, features, pred, m)):
        for wrong in (mask.float(), mask[:, 0], mask[..., 1:], "outside", mask.to("meta"), [True]):
            with refused("mask"):
                loss(wrong)
    with refused("impl", "cuda"):
        vector_loss(pred, pred, impl="cuda")
    monkeypatch.setattr("coverfast.ops.dispatch.KERNELS", frozenset())
    monkeypatch.setattr("coverfast.ops.dispatch._HAS_TRITON", True)
    for loss in (
        lambda: vector_loss(pred, pred, impl="triton"),
        lambda: end_point_error(pred, pred, impl="triton"),
    ):
        with refused("impl='triton'", "losses", "this version has no Triton kernel for it"):
            loss()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_prediction_that_is_not_a_number_shows(impl):
    pred = randn(1, 2, 4, 4)
    pred[0, 0, 1, 1] = float("nan")
    for loss in (vector_loss, end_point_error):
        assert loss(pred, torch.zeros_like(pred), impl=impl).isnan()


def theta_like(n, batch=2):
    return torch.cat([torch.eye(n).double() + 0.2 * randn(batch, n, n), randn(batch, n, 1, seed=1)], 2)


@pytest.mark.parametrize("impl", IMPLS)
@given(problems(), st.sampled_from((None, 2.5)))
def test_field_errors_are_the_separate_functions(impl, problem, denominator):
    pred, target, _, _, mask = problem
    (pred,) = leaves(pred)
    errors = field_errors(pred, target, mask, denominator=denominator, impl=impl)
    loss = vector_loss(pred, target, mask, denominator=denominator, impl=impl)
    assert_near(errors.l1, loss)
    assert_near(errors.epe, end_point_error(pred, target, mask, impl=impl).detach())
    assert_near(errors.still, end_point_error(torch.zeros_like(pred), target, mask, impl=impl))
    assert errors.mask.item() == pytest.approx(as_array(mask, target).mean())
    assert_near(*(gradients(value, [pred])[0] for value in (errors.l1, loss)))
    assert not any(error.requires_grad for error in errors[1:])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n", [2, 3])
def test_field_errors_of_an_affine_target(n, impl):
    size = (4, 5, 3)[:n]
    field, pred = AffineDVF(theta_like(n), size, full_size=7), randn(2, n, *size)
    for mask in (None, "inside", inside_mask(field)):
        for ours, theirs in zip(
            field_errors(pred, field, mask, impl=impl), field_errors(pred, field.dense(), mask, impl=impl), strict=True
        ):
            assert_near(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_theta_that_asks_for_a_gradient_gets_it(impl):
    pred, a, b = randn(2, 2, 4, 5), randn(2, 3, 4, 5), randn(2, 3, 4, 5, seed=1)
    for loss in (
        lambda field: vector_loss(pred, field, "inside", impl=impl),
        lambda field: end_point_error(pred, field, impl=impl),
        lambda field: field_errors(pred, field, impl=impl).l1,
        lambda field: consistency_loss(a, b, field, "inside", impl=impl),
    ):
        slopes = []
        for form in (lambda field: field, AffineDVF.dense):
            (theta,) = leaves(theta_like(2))
            slopes.append(gradients(loss(form(AffineDVF(theta, (4, 5)))), [theta])[0])
        assert slopes[0].abs().max() > 0
        assert_near(*slopes)


@pytest.mark.parametrize("impl", IMPLS)
def test_refusals_of_affine_fields_and_masks(impl):
    pred, features, mask = randn(2, 2, 3, 4), randn(2, 5, 3, 4), torch.ones(2, 1, 3, 4, dtype=torch.bool)
    for wrong in (
        AffineDVF(theta_like(2), (4, 3)),
        AffineDVF(theta_like(2, 1), (3, 4)),
        AffineDVF(theta_like(3), (3, 4, 2)),
    ):
        for loss in (vector_loss, end_point_error, field_errors):
            with refused("target", "pred", "4"):
                loss(pred, wrong, impl=impl)
        with refused("dvf", "feat_a"):
            consistency_loss(features, features, wrong, impl=impl)
    right = AffineDVF(theta_like(2), (3, 4))
    for wrong in (mask.float(), mask[:, 0], mask[..., 1:], mask[:1], "outside", mask.to("meta"), [True], mask.numpy()):
        for loss in (vector_loss, end_point_error, field_errors):
            with refused("mask", "bool" if not isinstance(wrong, torch.Tensor) or not wrong.is_meta else "device"):
                loss(pred, right, wrong, impl=impl)
        with refused("mask"):
            consistency_loss(features, features, right, wrong, impl=impl)


# --- plans of the kernels' launches: neither a GPU nor the interpreter is needed --------------------------------------


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
    return import_module("coverfast.kernels.losses")


ON, LAYOUT = Architecture(132), st.sampled_from(KERNEL_LAYOUTS)


def meta(*shape, dtype=torch.float32, layout="contiguous"):
    return laid_out(torch.empty(shape, dtype=dtype, device="meta"), layout)


def covering(launch, batch, size):
    """As many programs as tiles that cover the grids of the batch."""
    y, x = (len(range(0, s, launch.constants[name])) for s, name in zip(size[-2:], ("TILE_Y", "TILE_X"), strict=True))
    return launch.programs == batch * (size[0] if len(size) == 3 else 1) * y * x


@given(st.data())
def test_field_errors_are_planned_as_their_fields_lie(kernels, data):
    n = data.draw(st.sampled_from((2, 3)))
    size, batch = data.draw(st.tuples(*[st.integers(1, 90)] * n)), data.draw(st.integers(0, 3))
    form, kind = (
        data.draw(st.sampled_from(("dense", "affine"))),
        data.draw(st.sampled_from(("none", "inside", "tensor"))),
    )
    pred = meta(batch, n, *size, layout=data.draw(LAYOUT))
    field = meta(batch, n, *size, layout=data.draw(LAYOUT)) if form == "dense" else meta(batch, n, n + 3)
    mask = meta(batch, 1, *size, dtype=torch.uint8) if kind == "tensor" else None
    problem = (pred, field, form, mask, kind == "inside")
    forward, partials = kernels.field_errors_launch(*problem, ON)
    d_true = pred if form == "dense" else None
    backward = kernels.field_errors_backward_launch(meta(4), *problem, pred, d_true, ON)
    assert partials.shape == (forward.programs, 4)
    for launch in (forward, backward):
        c, a = launch.constants, launch.arguments
        assert covering(launch, batch, size)
        assert c["TILE_Y"] * c["TILE_X"] <= kernels.PIXELS
        assert (c["NDIM"], c["FIELD"], c["MASK"], c["WIDE"]) == (n, form, kind, False)
        b, channel, *axes = pred.stride()
        assert [a[f"p_{axis}"] for axis in "bczyx"] == [b, channel, axes[0] if n == 3 else 0, *axes[-2:]]
    assert backward.constants["TO_TRUE"] == (form == "dense")


@given(st.data())
def test_consistency_is_planned_as_its_features_lie(kernels, data):
    n = data.draw(st.sampled_from((2, 3)))
    size, batch = data.draw(st.tuples(*[st.integers(1, 90)] * n)), data.draw(st.integers(0, 3))
    channels, dtype = (
        data.draw(st.sampled_from((1, 2, 3, 8, 12, 32, 33, 36, 65, 512))),
        data.draw(st.sampled_from(DTYPES)),
    )
    a, b = (meta(batch, channels, *size, dtype=dtype, layout=data.draw(LAYOUT)) for _ in range(2))
    field, dense = meta(batch, n, *size), data.draw(st.booleans())
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    forward, partials = kernels.consistency_launch(a, b, field, "dense", None, True, ON)
    targets = new_like(a, dtype=exact), new_like(b)
    problem = (meta(2, dtype=torch.float64), a, b, field, "dense", None, True)
    backward = kernels.consistency_backward_launch(*problem, *targets, dense=dense, on=ON)
    assert (partials.shape, partials.dtype) == ((forward.programs, 2), exact)
    assert backward.constants["DENSE"] == dense
    for launch, maps in (
        (forward, {"a": "feat_a", "b": "feat_b"}),
        (backward, {"a": "feat_a", "b": "feat_b", "d": "d_a", "e": "d_b_out"}),
    ):
        c, arguments = launch.constants, launch.arguments
        assert covering(launch, batch, size)
        assert c["TILE_Y"] * c["TILE_X"] * c["LANES"] <= 128
        assert c["ROWS"] == all(has_rows(arguments[name]) for name in maps.values())
        assert c["SINGLE"] == (channels <= c["LANES"] * c["CHUNK"])
        assert arguments["feat_a"] is a
        assert has_rows(arguments["feat_b"]) or not has_rows(a)
        for prefix, name in maps.items():
            found = arguments[name].stride()
            strides = [s * c["UNIT"] for s in (arguments[f"{prefix}_{axis}"] for axis in "bzy")]
            assert strides == [found[0], found[2] if n == 3 else 0, found[-2]]
            assert arguments[f"{prefix}_c"] == found[1]
        for name, stride in (("A_X", a), ("B_X", arguments["feat_b"])):
            assert c[name] == stride.stride(-1)


@pytest.mark.parametrize("which", ["feat_a", "feat_b", "field", "pred"])
def test_far_pixels_have_64_bit_offsets(kernels, which):
    maps = {name: meta(1, 2, 2, 4) for name in ("feat_a", "feat_b", "field", "pred")}
    for wide in (False, True):
        if wide:
            maps[which] = torch.empty_strided((1, 2, 2, 4), (2, 1, 2, 2**30), device="meta")
        a, b, field, pred = maps.values()
        if wide and which == "feat_a":
            b = maps["feat_b"].contiguous(memory_format=torch.channels_last)
        consistency, _ = kernels.consistency_launch(a, b, field, "dense", None, False, ON)
        errors, _ = kernels.field_errors_launch(pred, field, "dense", None, False, ON)
        assert consistency.constants["WIDE"] == (wide and which != "pred")
        assert errors.constants["WIDE"] == (wide and which in ("field", "pred"))


def test_an_empty_batch_launches_nothing(kernels):
    launch, partials = kernels.field_errors_launch(meta(0, 2, 3, 4), meta(0, 2, 5), "affine", None, True, ON)
    assert (launch.programs, partials.shape) == (0, (0, 4))
    launch.run()


def test_what_leaves_the_grid_in_half_precision_leaves_no_nan_inside() -> None:
    """The cosine of a pixel that is warped to nothing has a slope of 1e6, which float16 cannot hold."""
    features = [torch.rand(1, 3, 3, 4, generator=torch.Generator().manual_seed(i)).half() for i in (0, 1)]
    a, b = (f.requires_grad_() for f in features)
    field = torch.zeros(1, 2, 3, 4)
    field[:, 1, :, 2:] = 9.0
    consistency_loss(a, b, field, impl="torch").backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert a.grad[..., :2].abs().sum() > 0
