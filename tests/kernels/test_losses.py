"""The kernels of the losses against the definition, on the GPU or in Triton's interpreter; unwritten memory is NaN."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from strategies import DTYPES, assert_near, assert_within_budget, gradients, laid_out, leaves, randn

pytest.importorskip("triton")

from coverfast import AffineDVF, consistency_loss, end_point_error, inside_mask, vector_loss, warp
from coverfast.kernels import INTERPRETED
from coverfast.kernels import losses as kernels
from coverfast.kernels.launch import override
from coverfast.layout import channels_last
from coverfast.ops.losses import field_errors

from .field_cases import (
    INF,
    MARKS,
    NAN,
    WILD,
    Guarded,
    LossSpec,
    assert_equals_reference,
    assert_precise,
    far_apart,
    field_like,
    loss_specs,
    theta_like,
)

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU (test_interpreter.py runs these without one)", allow_module_level=True)

pytestmark = MARKS

#: A tile (y, x) that adds in another order; a compiler might round otherwise too.
OTHER = (1, 2) if INTERPRETED else (4, 4)
ROWS = ("channels_last",) * 4
SMALL = {"tile": 4, "tile_y": 2}


def assert_field_errors_equal_reference(spec: LossSpec, device: str) -> None:
    for ours, theirs in zip(spec.field_results(device), spec.field_results(impl="reference"), strict=True):
        assert_near(ours, theirs)


# --- values and gradients ---------------------------------------------------------------------------------------------


@settings(max_examples=16)
@given(loss_specs())
def test_field_errors_equal_reference(device, spec):
    assert_field_errors_equal_reference(spec, device)


@settings(max_examples=10)
@given(loss_specs())
def test_consistency_equals_reference(device, spec):
    assert_equals_reference(spec, device)


CORNERS = {
    "33 channels in rows": LossSpec((2, 3), channels=33, layouts=ROWS, mask="inside"),
    "72 channels, more than a step": LossSpec((1, 2), channels=72, dtype=torch.float64, layouts=ROWS),
    "36 channels, written out": LossSpec((2, 2), channels=36, layouts=ROWS, fixed=True, mask="some"),
    "12 channels, 3D": LossSpec((2, 2, 4), channels=12, layouts=ROWS, form="affine", mask="inside", fixed=True, seed=9),
    "8 channels plane by plane": LossSpec((2, 3), channels=8, layouts=("sliced", "contiguous", "sliced", "sliced")),
    "rows against planes": LossSpec(
        (3, 4), channels=3, layouts=("sliced_rows", "contiguous", "expanded", "transposed")
    ),
    "planes against rows": LossSpec(
        (3, 4), channels=3, layouts=("contiguous", "channels_last", "sliced", "contiguous")
    ),
    "one channel": LossSpec((3, 4), channels=1, mask="some", mask_layout="sliced", batch=2),
    "a masked volume": LossSpec((2, 2, 3), channels=3, layouts=ROWS, mask="some", mask_layout="sliced"),
    "one pixel": LossSpec((1, 1), mask="inside", reach=0.4, step=1.0),
    "one pixel in 3D": LossSpec((1, 1, 1), channels=3, mask="some", fixed=True),
    "an empty batch": LossSpec((2, 3), batch=0),
    "an empty batch with a mask": LossSpec((2, 3), batch=0, mask="inside", fixed=True, denominator=3.0),
    "an empty mask": LossSpec((2, 3), batch=2, mask="none"),
    "the library's own tile": LossSpec((3, 8), channels=2, tile=None, fixed=None, mask="inside"),
    "the library's own tile in rows": LossSpec((2, 8), channels=12, tile=None, fixed=None, layouts=ROWS, form="affine"),
    "more pixels than a tile": LossSpec((4, 6), channels=4, tile=(2, 4), layouts=ROWS, mask="inside", batch=2),
    "integer displacements": LossSpec((3, 4), step=1.0, mask="inside", fixed=True),
    "affine with a mask": LossSpec((3, 4), form="affine", mask="some", mask_layout="sliced", denominator=7.0),
}


@pytest.mark.parametrize("name", list(CORNERS))
def test_equals_reference_at(name, device):
    assert_field_errors_equal_reference(CORNERS[name], device)
    assert_equals_reference(CORNERS[name], device)


@settings(max_examples=5)
# The cosine of a single channel is constant: its gradient would be rounding and nothing else.
@given(loss_specs(dtypes=DTYPES[:3], field_dtypes=DTYPES[2:3], least=1).filter(lambda spec: spec.channels > 1))
def test_low_precision_error_is_that_of_torch(device, spec):
    ours = assert_precise(spec, device)
    assert [t.dtype for t in ours] == [torch.float32, spec.dtype, spec.dtype, torch.float32][: len(ours)]


@pytest.mark.parametrize("fixed", [False, True])
def test_features_in_low_precision_meet_a_field_in_float64(fixed, device):
    """The field says where to look; the arithmetic is that of the features."""
    spec = LossSpec((2, 3), channels=3, dtype=torch.float16, layouts=ROWS, mask="some", fixed=fixed)
    ours, truth = spec.results(device), spec.results(impl="reference", exact=True)
    assert [t.dtype for t in ours] == [torch.float32, torch.float16, torch.float16, torch.float64]
    for a, b in zip(ours, truth, strict=True):
        assert_near(a.double(), b, atol=1e-5, rtol=2e-3)


@settings(max_examples=8)
@given(loss_specs(field_dtypes=DTYPES[2:3], least=1))
def test_float32_error_of_fields_is_that_of_torch(device, spec):
    ours, truth = spec.field_results(device), spec.field_results(impl="reference", exact=True)
    assert_within_budget(ours, spec.field_results(impl="torch"), truth, 4 + spec.reach)


@pytest.mark.parametrize("form", ["dense", "affine"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_fields_of_two_precisions_meet_in_the_better_one(dtypes, form, device):
    spec = LossSpec((3, 6), form=form, seed=1)
    pred, target = spec.pred().to(dtypes[0]), spec.target().to(dtypes[1])
    results = []
    for impl, where in (("triton", device), ("reference", "cpu")):
        with spec.launched():
            (p,), t = leaves(pred.to(where)), target.to(where)
            losses = [loss(p, t, "inside", impl=impl) for loss in (vector_loss, end_point_error)]
            losses += field_errors(p, t, "inside", impl=impl)[:2]
            results.append([*losses, *torch.autograd.grad(sum(losses), p)])
    assert [x.dtype for x in results[0]] == [torch.float64] * 4 + [dtypes[0]]
    for ours, theirs in zip(*results, strict=True):
        assert (theirs != 0).any()
        assert_near(ours.cpu(), theirs, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "fixed"), [*zip(DTYPES, (0, 1, 0, 1), strict=True)], ids=str)
def test_cosine_is_one_for_equal_features_of_any_size(dtype, fixed, device):
    # In half precision the squares of these would overflow or vanish.
    a = torch.cat([randn(1, 3, 1, 4) * 1e-4, randn(1, 3, 1, 4) * 1e4], 2).to(device, dtype)
    still = torch.zeros(1, 2, 2, 4, device=device)
    with override(**SMALL, deterministic=fixed):
        inputs = leaves(a, a)
        loss = consistency_loss(*inputs, still, impl="triton")
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert abs(loss.item()) < 1e-6
        assert consistency_loss(a, -a, still, impl="triton").item() == pytest.approx(2)
        for slope in gradients(loss, inputs):
            assert slope.dtype == dtype
            assert slope.isfinite().all()


@pytest.mark.parametrize("fixed", [0, 1])
def test_features_without_a_norm(fixed, device):
    a, b = randn(1, 3, 2, 4), randn(1, 3, 2, 4, seed=1)
    a[:, :, 0, :2], b[:, :, 1, :2] = 0, 0
    a[:, :, 0, 2], b[:, :, 1, 2] = 3e-8, 4e-8
    results = []
    for impl, where in (("triton", device), ("reference", "cpu")):
        inputs = leaves(a.to(where), b.to(where))
        with override(**SMALL, deterministic=fixed):
            loss = consistency_loss(*inputs, torch.zeros(1, 2, 2, 4, device=where).double(), impl=impl)
            results.append([loss, *gradients(loss, inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours.cpu(), theirs, atol=1e-10, rtol=1e-7)


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bad", "fixed"), [(NAN, 1), (INF, 0), (-INF, 1), (1e30, 0)])
def test_what_the_mask_hides_is_harmless(bad, fixed, device):
    pred, target = (randn(1, 2, 2, 4, seed=i, dtype=torch.float32, scale=0.1) for i in (0, 1))
    a, b = (laid_out(randn(1, 3, 2, 4, seed=i, dtype=torch.float32), "channels_last") for i in (2, 3))
    mask = torch.ones(1, 1, 2, 4, dtype=torch.bool)
    mask[..., 2:] = False  # what counts looks at the first three columns at most
    spoilt = [torch.where(mask, x, bad) for x in (pred, target, b)]
    spoilt.insert(2, torch.where(torch.arange(4) < 3, a, bad))
    results = []
    for values in ((pred, target, a, b), spoilt):
        p, t, fa, fb = (x.to(device) for x in values)
        inputs = leaves(p, fa, fb)
        with override(**SMALL, deterministic=fixed):
            options = {"mask": mask.to(device), "impl": "triton"}
            found = [loss(inputs[0], t, **options) for loss in (vector_loss, end_point_error)]
            found.append(consistency_loss(*inputs[1:], t, **options))
            results.append([*found, *gradients(sum(found), inputs)])
    for plain, odd in zip(*results, strict=True):
        assert plain.isfinite().all()
        assert_near(odd, plain, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("n", [2, 3])
def test_wild_displacements_count_outside_and_nowhere_else(n, device):
    size = (2, 8) if n == 2 else (2, 2, 8)
    target = field_like(1, size)
    for axis in range(n):
        target[(0, axis, *[axis % 2] * (n - 1))][: len(WILD)] = torch.tensor(WILD).double()
    pred, a, b = field_like(1, size, seed=1), randn(1, 2, *size), randn(1, 2, *size, seed=1)
    results = []
    for impl, where in (("triton", device), ("reference", "cpu")):
        inputs = leaves(*(x.to(where) for x in (pred, a, b, target)))
        p, fa, fb, t = inputs
        with override(tile=8, tile_y=2, deterministic=0):
            errors = field_errors(p, t, "inside", impl=impl)
            consistency = consistency_loss(fa, fb, t, "inside", impl=impl)
            results.append([*errors, consistency, *gradients(errors.l1 + consistency, inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert theirs.isfinite().all()
        assert_near(ours.cpu(), theirs)


@pytest.mark.parametrize("loss", [vector_loss, end_point_error])
@pytest.mark.parametrize("which", [0, 1])
def test_an_error_that_is_not_a_number_shows(which, loss, device):
    fields = [randn(1, 2, 2, 4).to(device), torch.zeros(1, 2, 2, 4, device=device).double()]
    fields[which][0, 0, 1, 1] = NAN
    (pred,) = leaves(fields[0])
    with override(**SMALL):
        value = loss(pred, fields[1], impl="triton")
        (slope,) = torch.autograd.grad(value, pred)
    assert value.isnan()
    assert slope[0, 0, 1, 1].isnan()
    slope[0, :, 1, 1] = 0
    assert slope.isfinite().all()


def test_gradients_are_zero_outside_the_mask_and_nowhere_else_inside(device):
    size = (2, 8)
    mask = torch.zeros(1, 1, *size, dtype=torch.bool, device=device)
    mask[..., 2:5] = True
    pred, a, b = (randn(1, c, *size, seed=c).to(device) for c in (2, 3, 4))
    b = b[:, :3]
    target = torch.full((1, 2, *size), 0.25, device=device).double()
    target[:, 0] = 0
    for fixed in (0, 1):
        inputs = leaves(pred, a, b, target)
        p, fa, fb, t = inputs
        with override(tile=8, tile_y=2, deterministic=fixed):
            loss = vector_loss(p, t, mask, impl="triton") + consistency_loss(fa, fb, t, mask, impl="triton")
            d_p, d_a, d_b, d_t = torch.autograd.grad(loss, inputs)
        for slope in (d_p, d_b, d_t):
            assert (slope[..., 2:5] != 0).all()
            assert not slope[..., :2].any()
            assert not slope[..., 5:].any()
        # Pixels 2 to 4 look between 2 and 5.
        assert (d_a[..., 2:6] != 0).all()
        assert not d_a[..., :2].any()
        assert not d_a[..., 6:].any()


# --- forms of the field -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "dtype"), [(2, torch.float32), (3, torch.float64)], ids=str)
def test_an_affine_field_with_its_own_mask_equals_the_dense_one_with_that_mask(n, dtype, device):
    size = (3, 8) if n == 2 else (2, 2, 4)
    field = AffineDVF(theta_like(1, n).to(device, dtype), size, full_size=[s + 2 for s in size], origin=1)
    dense, mask = field.dense(), inside_mask(field)
    assert 0 < int(mask.sum()) < mask.numel()
    pred, a, b = (
        randn(1, n, *size).to(device, dtype),
        randn(1, 4, *size).to(device),
        randn(1, 4, *size, seed=1).to(device),
    )
    a, b = (laid_out(x, "channels_last") for x in (a, b))
    results = []
    for arguments in ((field, "inside"), (dense, mask), (dense, "inside"), (field, mask)):
        inputs = leaves(pred, a, b)
        with override(tile=8, tile_y=4, deterministic=0):
            errors = field_errors(inputs[0], *arguments, impl="triton")
            consistency = consistency_loss(*inputs[1:], *arguments, impl="triton")
            losses = vector_loss(inputs[0], *arguments, impl="triton"), end_point_error(pred, *arguments, impl="triton")
            results.append([*errors, consistency, *losses, *gradients(errors.l1 + consistency, inputs)])
    for others in zip(*results, strict=True):
        for other in others[1:]:
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5
            assert_near(other, others[0], atol=tolerance, rtol=tolerance)


def test_an_affine_field_that_asks_for_a_gradient_gets_it(device):
    theta, size = theta_like(1, 2), (2, 4)
    pred, a, b = (randn(1, c, *size, seed=c) for c in (2, 3, 4))
    results = []
    for impl, where in (("triton", device), ("reference", "cpu")):
        (t,) = leaves(theta.to(where))
        features = a.to(where), b[:, :3].to(where)
        with override(**SMALL):
            field = AffineDVF(t, size)
            loss = vector_loss(pred.to(where), field, "inside", impl=impl)
            loss = loss + consistency_loss(*features, field, "inside", impl=impl)
            loss = loss + warp(features[0], field, impl=impl).sum()
            results.append([loss, *torch.autograd.grad(loss, t)])
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours.cpu(), theirs)


def test_field_errors_are_the_separate_functions(device):
    for spec in (LossSpec((3, 4), mask="inside", batch=2), LossSpec((2, 2, 2), form="affine", mask="some")):
        pred, target, mask = spec.pred(device), spec.target(device), spec.shown(device)
        with spec.launched():
            errors = field_errors(*leaves(pred), target, mask, denominator=5.0, impl="triton")
            assert_near(errors.l1, vector_loss(pred, target, mask, denominator=5.0, impl="triton"))
            assert_near(errors.epe, end_point_error(pred, target, mask, impl="triton"))
            assert_near(errors.still, end_point_error(torch.zeros_like(pred), target, mask, impl="triton"))
        shown = inside_mask(target) if isinstance(mask, str) else mask
        assert 0 < errors.mask == shown.double().mean() < 1
        assert errors.l1.requires_grad
        assert not any(error.requires_grad for error in errors[1:])


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_parts_of_a_batch_add_up_under_the_common_denominator(kind, device):
    spec = LossSpec((2, 4), channels=3, batch=2, mask="some")
    (a, b), pred, target, mask = spec.features(device), spec.pred(device), spec.target(device), spec.shown(device)
    count = kind(float(mask.sum()))
    count = count.to(device) if isinstance(count, torch.Tensor) else count
    with spec.launched():
        whole = vector_loss(pred, target, mask, impl="triton"), 1 - consistency_loss(a, b, target, mask, impl="triton")
        parts = [
            (
                vector_loss(pred[i], target[i], mask[i], denominator=count, impl="triton"),
                1 - consistency_loss(a[i], b[i], target[i], mask[i], denominator=count, impl="triton"),
            )
            for i in (slice(0, 1), slice(1, 2))
        ]
    for together, *apart in zip(whole, *parts, strict=True):
        assert_near(sum(apart), together)


# --- sums that do not depend on their order ---------------------------------------------------------------------------


def test_deterministic_algorithms_choose_fixed_point(device, launches):
    found = []
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic)
        spec = LossSpec((2, 4), channels=4, layouts=ROWS, form="affine", mask="inside", fixed=None)
        launches.clear()
        found.append(spec.results(device))
        _, backward, *scattered = launches
        assert backward.constants["DENSE"] == deterministic
        assert [launch.constants["FIXED"] for launch in scattered] == [True] * deterministic
        assert [launch.arguments["dx"].dtype for launch in scattered] == [torch.int64] * deterministic
    for a, b in zip(*found, strict=True):
        assert_near(a, b, atol=1e-12, rtol=1e-12)


def test_a_field_that_asks_for_a_gradient_takes_no_fixed_point_unless_asked(device, launches):
    torch.use_deterministic_algorithms(False)
    LossSpec((2, 4), fixed=None).results(device)
    assert [launch.constants.get("FIXED") for launch in launches] == [None, None, False]
    assert launches[1].constants["DENSE"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fixed_point_gives_the_same_bits_in_any_order(dtype, device):
    spec = LossSpec((3, 4), channels=4, layouts=ROWS, form="affine", dtype=dtype, field_dtype=torch.float32, fixed=True)
    found = [replace(spec, tile=tile).results(device) for tile in ((4, 4), (4, 4), OTHER)]
    for a, b in zip(found[0], found[1], strict=True):
        assert torch.equal(a, b)
    # The loss itself adds the sums of other programs.
    for a, b in zip(found[0][1:], found[2][1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [0.0, NAN, INF])
def test_fixed_point_of_gradients_that_are_zero_or_no_numbers(value, device):
    a, b = leaves(*(randn(1, 3, 2, 4, seed=i, dtype=torch.float32).to(device) for i in (0, 1)))
    with override(**SMALL, deterministic=1):
        loss = consistency_loss(a, b, torch.full((1, 2, 2, 4), 0.3, device=device), impl="triton")
        d_a, d_b = torch.autograd.grad(loss, [a, b], torch.tensor(value, device=device))
    if value:
        assert d_a.isnan().all()
        assert not d_b.isfinite().any()
    else:
        assert torch.equal(d_a, torch.zeros_like(d_a))
        assert torch.equal(d_b, torch.zeros_like(d_b))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layouts", [("channels_last", "contiguous"), ("contiguous", "channels_last"), ("sliced_rows", "sliced")]
)
def test_gradients_are_laid_out_as_their_features(layouts, device):
    for fixed in (False, True):
        spec = LossSpec((2, 4), channels=3, layouts=(*layouts, "contiguous", "contiguous"), fixed=fixed)
        a, b = leaves(*spec.features(device))
        with spec.launched():
            slopes = torch.autograd.grad(consistency_loss(a, b, spec.target(device), impl="triton"), [a, b])
        for slope, layout in zip(slopes, layouts, strict=True):
            rows = layout in ("channels_last", "sliced_rows")
            assert slope.is_contiguous(memory_format=channels_last(slope) if rows else torch.contiguous_format)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("layout", "size"), [("contiguous", (3, 5)), ("channels_last", (2, 3, 2))])
def test_nothing_is_written_around_the_gradients_of_the_features(layout, size, dense, device):
    a, b = (laid_out(randn(1, 3, *size, seed=i).to(device), layout) for i in (0, 1))
    field, grad = field_like(1, size, reach=9.0).to(device), torch.ones(2, device=device).double()
    guard = Guarded()
    d_a, d_b = guard.like(a), guard.like(b)
    if not dense:
        d_a.zero_()
    with override(tile=4, tile_y=4):
        kernels.consistency_backward_launch(grad, a, b, field, "dense", None, True, d_a, d_b, dense=dense).run()
    guard.assert_kept()
    for written in (d_a, d_b):
        assert (written != guard.MARK).all()


@pytest.mark.parametrize("size", [(3, 5), (2, 3, 2)], ids=str)
def test_nothing_is_written_around_the_gradients_of_the_fields(size, device):
    pred, target, grad = (
        field_like(2, size).to(device),
        field_like(2, size, seed=1).to(device),
        torch.ones(4, device=device),
    )
    guard = Guarded()
    d_pred, d_true = guard.like(pred), guard.like(target)
    with override(tile=4, tile_y=2):
        kernels.field_errors_backward_launch(grad.double(), pred, target, "dense", None, True, d_pred, d_true).run()
    guard.assert_kept()
    for written in (d_pred, d_true):
        assert (written != guard.MARK).all()


def test_every_program_leaves_its_own_sums(device):
    pred, target = field_like(2, (3, 5)).to(device), field_like(2, (3, 5), seed=1).to(device)
    with override(tile=4, tile_y=2):
        launch, partials = kernels.field_errors_launch(pred, target, "dense", None, False)
        launch.run()
    assert len(partials) == launch.programs == 2 * 2 * 2
    assert partials[:, 3].tolist() == 2 * [8, 2, 4, 1]


def test_inputs_are_left_alone(device):
    spec = LossSpec((2, 4), channels=2, mask="some")
    inputs = leaves(*spec.features(device), spec.pred(device), spec.target(device))
    mask = spec.shown(device)
    with spec.launched():
        loss = consistency_loss(*inputs[:2], inputs[3], mask, impl="triton") + vector_loss(
            *inputs[2:], mask, impl="triton"
        )
        torch.autograd.grad(loss, inputs)
    again = (*spec.features(device), spec.pred(device), spec.target(device), spec.shown(device))
    for tensor, fresh in zip((*inputs, mask), again, strict=True):
        assert torch.equal(tensor, fresh)
        assert tensor._version == 0


#: Strides, or their products, beyond 2^31 elements: channels, batch and size, strides of batch, channel and axes.
FAR = {
    "samples in rows": (8, (2, 1, 2), (2**32 + 24, 1, 64, 8)),
    "planes": (8, (1, 3, 1, 2), (8, 1, 2**30 + 8, 64, 8)),
    "rows": (8, (1, 3, 2), (8, 1, 2**30 + 8, 8)),
    "pixels": (8, (1, 1, 4), (8, 1, 8, 2**30 + 8)),
    "channels": (3, (1, 1, 2), (8, 2**30 + 8, 2, 1)),
}


@pytest.mark.parametrize("what", ["feat_a", "feat_b", "target"])
@pytest.mark.parametrize("axis", list(FAR))
def test_addresses_have_64_bits(axis, what, device):
    torch.use_deterministic_algorithms(False)  # which would fill all of the memory
    channels, (batch, *size), strides = FAR[axis]
    layouts = ("channels_last" if channels == 8 else "contiguous",) * 4
    spec = LossSpec(
        tuple(size), channels, batch, dtype=torch.float16, field_dtype=torch.float32, layouts=layouts, reach=0.7
    )
    a, b = spec.features(device)
    tensors = {"feat_a": a, "feat_b": b, "target": spec.target(device)}
    if what == "target":
        strides = (strides[0], max(2, strides[1]), *strides[2:])
    tensors[what] = far_apart(tensors[what], strides)
    grad = torch.tensor([-1.0, 0.0], device=device).double()
    with override(**SMALL):
        loss = consistency_loss(*tensors.values(), denominator=1.0, impl="triton")
        d_a, d_b = (torch.empty_like(x, dtype=d) for x, d in ((a, torch.float32), (b, b.dtype)))
        problem = (grad, *tensors.values(), "dense", None, False)
        kernels.consistency_backward_launch(*problem, d_a, d_b, dense=True).run()
        if what == "target":
            errors = vector_loss(spec.pred(device), tensors["target"], impl="triton")
            assert_near(errors.cpu(), vector_loss(spec.pred(), spec.target(), impl="reference"), atol=1e-5, rtol=1e-5)
    fa, fb = leaves(*(x.float() for x in spec.features()))
    expected = consistency_loss(fa, fb, spec.target(), denominator=1.0, impl="reference")
    assert_near(loss.cpu(), expected, atol=1e-4, rtol=1e-4)
    assert_near(d_b.float().cpu(), torch.autograd.grad(expected, fb)[0], atol=2e-3, rtol=2e-3)


# --- inside PyTorch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "affine"])
def test_opcheck_field_errors(form, device):
    spec = LossSpec((2, 2), form=form, field_dtype=torch.float32)
    pred, target, (mask, inside) = spec.pred(device), spec.target(device), (None, True)
    if form == "dense":
        mask, inside = replace(spec, mask="some").shown(device).view(torch.uint8), False
    field = target if isinstance(target, torch.Tensor) else target.numbers
    with override(**SMALL):
        inputs = leaves(pred, field) if form == "dense" else [*leaves(pred), field]
        torch.library.opcheck(torch.ops.coverfast.field_errors_forward, (*inputs, form, mask, inside))
        arguments = (torch.ones(4, device=device).double(), pred, field, form, mask, inside, form == "dense")
        torch.library.opcheck(torch.ops.coverfast.field_errors_backward, arguments)


@pytest.mark.parametrize("form", ["dense", "affine"])
def test_opcheck_consistency(form, device):
    layouts = ("channels_last", "contiguous", "contiguous", "contiguous")
    spec = LossSpec((2, 2), form=form, dtype=torch.bfloat16, field_dtype=torch.float32, layouts=layouts)
    (a, b), target, (mask, inside) = spec.features(device), spec.target(device), (None, True)
    if form == "dense":
        mask, inside = replace(spec, mask="some").shown(device).view(torch.uint8), False
    field = target if isinstance(target, torch.Tensor) else target.numbers
    with override(**SMALL, deterministic=int(form == "dense")):
        inputs = leaves(a, b, field) if form == "dense" else [*leaves(a, b), field]
        torch.library.opcheck(torch.ops.coverfast.consistency_forward, (*inputs, form, mask, inside))
        grad = torch.ones(2, device=device).double()
        arguments = (grad, a, b, field, form, mask, inside, form == "dense")
        torch.library.opcheck(torch.ops.coverfast.consistency_backward, arguments)


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph(dynamic, device):
    torch.compiler.reset()
    theta = theta_like(1, 2).to(device)

    def run(pred, target, a, b):
        affine = AffineDVF(theta, (2, 4))
        errors = field_errors(pred, affine, "inside", impl="triton")
        return torch.stack(
            [
                vector_loss(pred, target, "inside", impl="triton"),
                end_point_error(pred, target, impl="triton"),
                *errors,
                consistency_loss(a, b, target, inside_mask(target), impl="triton"),
                consistency_loss(a, b, affine, "inside", impl="triton"),
            ]
        )

    results = []
    with override(**SMALL):
        for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)):
            tensors = field_like(1, (2, 4)), field_like(1, (2, 4), seed=1), randn(1, 2, 2, 4), randn(1, 2, 2, 4, seed=1)
            inputs = leaves(*(t.to(device) for t in tensors))
            out = function(*inputs)
            results.append([out, *gradients(out, inputs)])
    for eager, compiled in zip(*results, strict=True):
        assert_near(compiled, eager, atol=1e-12, rtol=1e-12)
    torch.compiler.reset()


def test_gradcheck(device):
    pred, target = randn(1, 2, 2, 3), randn(1, 2, 2, 3, seed=1)
    a, b = (laid_out(randn(1, 3, 2, 3, seed=i), "channels_last") for i in (2, 3))
    dvf = target.floor() + 0.2 + 0.6 * (target - target.floor())
    mask = torch.tensor([[[[True, False, True], [True, True, False]]]], device=device)
    inputs = leaves(*(x.to(device) for x in (pred, a, b, dvf)))

    def losses(p, fa, fb, d):
        options = {"mask": mask, "impl": "triton"}
        return vector_loss(p, d, **options), end_point_error(p, d, **options), consistency_loss(fa, fb, d, **options)

    with override(**SMALL):
        assert torch.autograd.gradcheck(losses, inputs, fast_mode=True, nondet_tol=1e-12)


def test_second_order_raises(device):
    pred, target = leaves(field_like(1, (2, 2)).to(device), field_like(1, (2, 2), seed=1).to(device))
    a, b = leaves(randn(1, 2, 2, 2).to(device), randn(1, 2, 2, 2, seed=1).to(device))
    with override(tile=2, tile_y=2):
        for loss, wanted in (
            (end_point_error(pred, target, impl="triton"), pred),
            (consistency_loss(a, b, target, impl="triton"), b),
        ):
            (slope,) = torch.autograd.grad(loss.square(), wanted, create_graph=True)
            with pytest.raises(RuntimeError):
                torch.autograd.grad(slope.square().sum(), wanted)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_gradient_alone(which, device):
    spec = LossSpec((2, 4), channels=2)
    tensors, expected = [*spec.features(device), spec.target(device)], spec.results(device)[1 + which]
    tensors[which].requires_grad_()
    with spec.launched():
        loss = consistency_loss(*tensors, impl="triton")
        (found,) = torch.autograd.grad(loss, tensors[which], loss.new_tensor(0.7))
    assert_near(found.cpu(), expected, atol=1e-14, rtol=1e-14)


def test_autocast_changes_nothing(device):
    spec = LossSpec((2, 4), channels=2, dtype=torch.float16, field_dtype=torch.float32, mask="inside")
    plain = [*spec.results(device), *spec.field_results(device)]
    with torch.autocast(device, torch.bfloat16):
        cast = [*spec.results(device), *spec.field_results(device)]
    for a, b in zip(plain, cast, strict=True):
        assert_near(a, b, atol=1e-6, rtol=1e-3)


def test_auto_takes_the_kernels_on_a_gpu_alone(device, launches):
    pred, target = field_like(1, (2, 4)).to(device), field_like(1, (2, 4), seed=1).to(device)
    assert_near(vector_loss(pred, target), vector_loss(pred, target, impl="torch"))
    consistency_loss(pred, target, target)
    assert len(launches) == (0 if INTERPRETED else 2)
