"""The launches of one forward and backward of each operator, planned on a case's inputs, which need no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from coverfast.bench.problems import Case
from coverfast.kernels.launch import Architecture, Launch, architecture_of
from coverfast.layout import new_like


def mov_launches(case: Case, inputs: Sequence[Tensor], on: Architecture) -> Iterator[Launch]:
    """Forward, dq, dk."""
    from coverfast.kernels import mov as kernels
    from coverfast.ops import mov as op

    (q, k), (window, groups) = inputs, (case.level.window, case.level.groups)
    outputs = op._new_outputs(q, groups)
    yield kernels.forward_launch(q, k, *outputs, window, groups, 1.0, on)
    gradients, grad = (new_like(q), new_like(k)), torch.empty_like(outputs[0])
    yield from kernels.backward_launches(grad, q, k, *outputs, *gradients, window, groups, 1.0, on)


def warp_launches(case: Case, inputs: Sequence[Tensor], on: Architecture) -> Iterator[Launch]:
    """By a dense field, or as the pyramid by that of the level above; backward also in fixed point."""
    from coverfast.kernels import warp as kernels

    (x, field), form = inputs, case.facts["field"]
    d_psi = field.new_empty((*field.shape[:2], *x.shape[2:]))
    yield kernels.forward_launch(x, field, form, new_like(x), "linear", "zeros", on)
    for dtype, scale in ((field.dtype, None), (torch.int64, field.new_empty(()))):
        dx = new_like(x, dtype=dtype)
        yield kernels.backward_launch(x, x, field, form, dx, d_psi, scale, "linear", "zeros", on)
    if form == "coarse":
        yield kernels.upsample_backward_launch(d_psi, torch.empty_like(field), None, on)


def compose_launches(case: Case, inputs: Sequence[Tensor], on: Architecture) -> Iterator[Launch]:
    """Forward; backward, also in fixed point."""
    from coverfast.kernels import compose as kernels
    from coverfast.kernels.warp import upsample_backward_launch

    fine, coarse = inputs
    yield kernels.forward_launch(fine, coarse, fine, on)
    for dtype, scale in ((fine.dtype, None), (torch.int64, fine.new_empty(()))):
        d_up = torch.empty_like(fine, dtype=dtype)
        yield kernels.backward_launch(fine, fine, coarse, fine, d_up, scale, on)
        yield upsample_backward_launch(d_up, coarse, scale, on)


def fuse_launches(case: Case, inputs: Sequence[Tensor], on: Architecture) -> Iterator[Launch]:
    """Forward; backward to both, and to the field alone, as where the map is given."""
    from coverfast.kernels import fuse as kernels

    dvf, theta = inputs
    yield kernels.forward_launch(dvf, theta, dvf, on)
    for to_theta in (True, False):
        yield kernels.backward_launch(dvf, dvf, theta, dvf, to_theta=to_theta, on=on)[0]


def norm_launches(case: Case, inputs: Sequence[Tensor], on: Architecture) -> Iterator[Launch]:
    """Forward, backward."""
    from coverfast.kernels import norm as kernels
    from coverfast.ops import norm as op

    x, bias, weight, shift = inputs
    y, statistics = op._outputs(x)
    yield from kernels.forward_launches(x, bias, weight, shift, 1e-5, y, statistics, on)
    sums = statistics.new_empty(3, len(bias))
    yield from kernels.backward_launches(y, x, bias, weight, statistics, new_like(x), sums, on)


def losses_launches(case: Case, inputs: Sequence[Tensor], on: Architecture) -> Iterator[Launch]:
    """Errors of a field or consistency of features, against an affine truth; backward, also through dense gradients."""
    from coverfast.kernels import losses as kernels

    *maps, numbers = inputs
    truth = numbers, "affine", None, True
    if len(maps) == 1:
        (pred,) = maps
        grad = pred.new_empty(4, dtype=torch.float64)
        yield kernels.field_errors_launch(pred, *truth, on)[0]
        yield kernels.field_errors_backward_launch(grad, pred, *truth, pred, None, on)
        return
    feat_a, feat_b = maps
    grad = feat_a.new_empty(2, dtype=torch.float64)
    yield kernels.consistency_launch(feat_a, feat_b, *truth, on)[0]
    for dense in (False, True):
        d_a = new_like(feat_a, dtype=numbers.dtype)
        problem = (grad, feat_a, feat_b, *truth, d_a, new_like(feat_b))
        yield kernels.consistency_backward_launch(*problem, dense=dense, on=on)


def ncc_launches(case: Case, inputs: Sequence[Tensor], on: Architecture) -> Iterator[Launch]:
    """Value alone; value and slopes by the second image."""
    from coverfast.kernels import ncc as kernels

    x, y = inputs
    for slopes in (None, torch.empty_like(y)):
        yield from kernels.launches(x, y, case.facts["window"], 1e-5, None, slopes, [], on)


def views_launches(case: Case, inputs: Sequence[Tensor], on: Architecture) -> Iterator[Launch]:
    """View a with the default settings, without blur, and with it; view b."""
    from coverfast.kernels import views as kernels
    from coverfast.kernels.warp import forward_launch

    images, n, boxes = inputs[0].float(), len(case.level.size), 10
    out = images.new_empty((*images.shape[:2], *case.level.size))
    numbers = images.new_empty(len(images), n, n + 3)
    for taps in (0, 5):
        params = images.new_empty(len(images), 4 + 2 * n * boxes + taps)
        drawn = {"boxes": boxes, "taps": taps, "seed": 2**40, "iteration": 2}
        yield from kernels.appearance_launches(images, numbers, params, out, **drawn, on=on)
    yield forward_launch(images, numbers, "crop", out, "linear", "zeros", on)


#: By operator.
LAUNCHES: dict[str, Callable[[Case, Sequence[Tensor], Architecture], Iterator[Launch]]] = {
    "mov": mov_launches,
    "warp": warp_launches,
    "compose": compose_launches,
    "fuse": fuse_launches,
    "norm": norm_launches,
    "losses": losses_launches,
    "ncc": ncc_launches,
    "views": views_launches,
}


def _on_gpu() -> Tensor:
    return torch.empty(0, device="cuda")


def shared_numbers(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """What `kernels.launch.override` needs for `mov` to run on a small grid what it runs on the whole one on this GPU.

    The other kernels depend on the size along x alone, which a check on a GPU leaves whole.
    """
    if case.op != "mov":  # a pyramid has several
        return {}
    on = architecture_of(_on_gpu())
    launch = next(mov_launches(case, case.make("meta", dtype, None, 0), on))
    return {"rows": launch.constants["ROWS"], "tile": launch.constants["TILE"], "warps": launch.warps}
