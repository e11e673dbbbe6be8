"""The losses in Triton, forward and backward: plans and runs the kernels of `losses_device`.

The consistency loss scatters to the features of view a as warping does. Where the sums must not depend on the order of
their addends, or where the field asks for a gradient too, the gradient of the features brought over is written out and
goes through the backward of `kernels.warp`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coverfast.kernels import losses_device as device
from coverfast.kernels import warp
from coverfast.kernels.launch import Architecture, Launch, architecture_of
from coverfast.kernels.pixels import (
    accumulator,
    channels_of,
    deterministic,
    field_arguments,
    sizes,
    strides,
    tile_for,
    wide,
)
from coverfast.layout import has_rows, new_like, rows_of

#: Pixels of a program that sums the errors of a field.
PIXELS = 512


def field_errors_launch(
    pred: Tensor, field: Tensor, form: str, mask: Tensor | None, inside: bool, on: Architecture | None = None
) -> tuple[Launch, Tensor]:
    """The launch that fills partials `(programs, 4)`, and these."""
    arguments, constants, programs, warps = _fields(pred, field, form, mask, inside, on)
    partials = pred.new_empty((programs, 4), dtype=torch.promote_types(pred.dtype, field.dtype))
    launch = Launch(device.field_errors_forward_kernel, programs, warps, {**arguments, "partials": partials}, constants)
    return launch, partials


def field_errors_backward_launch(
    grad: Tensor,
    pred: Tensor,
    field: Tensor,
    form: str,
    mask: Tensor | None,
    inside: bool,
    d_pred: Tensor,
    d_true: Tensor | None,
    on: Architecture | None = None,
) -> Launch:
    """The launch that fills d_pred and d_true, contiguous, from the gradient `(4,)` of the sums."""
    arguments, constants, programs, warps = _fields(pred, field, form, mask, inside, on)
    arguments |= {"grad": grad, "d_pred": d_pred, "d_true": d_pred if d_true is None else d_true}
    constants["TO_TRUE"] = d_true is not None
    return Launch(device.field_errors_backward_kernel, programs, warps, arguments, constants)


def _fields(pred, field, form, mask, inside, on):  # type: ignore[no-untyped-def]
    batch, n, *size = pred.shape
    tile = tile_for(size, on or architecture_of(pred), total=PIXELS)
    f_arguments, f_constants = field_arguments(field, form)
    del f_constants["ORIGIN"]
    arguments = {
        "pred": pred, "mask": pred if mask is None else mask, **f_arguments,
        **strides("p", pred, with_x=True), **sizes("size", size),
    }  # fmt: skip
    constants = {
        "NDIM": n, **f_constants, "MASK": _mask_kind(mask, inside),
        "WIDE": wide(pred, *([field] if form == "dense" else [])), **tile.constants,
    }  # fmt: skip
    return arguments, constants, tile.programs(batch, size), tile.warps


def _mask_kind(mask: Tensor | None, inside: bool) -> str:
    return "inside" if inside else "none" if mask is None else "tensor"


def consistency_launch(
    feat_a: Tensor,
    feat_b: Tensor,
    field: Tensor,
    form: str,
    mask: Tensor | None,
    inside: bool,
    on: Architecture | None = None,
) -> tuple[Launch, Tensor]:
    """The launch that fills partials `(programs, 2)`, and these."""
    arguments, constants, programs, warps = _features(feat_a, feat_b, field, form, mask, inside, on)
    partials = feat_a.new_empty((programs, 2), dtype=accumulator(feat_a)[0])
    launch = Launch(device.consistency_forward_kernel, programs, warps, {**arguments, "partials": partials}, constants)
    return launch, partials


def consistency_backward_launch(
    grad: Tensor,
    feat_a: Tensor,
    feat_b: Tensor,
    field: Tensor,
    form: str,
    mask: Tensor | None,
    inside: bool,
    d_a: Tensor,
    d_b: Tensor,
    *,
    dense: bool,
    on: Architecture | None = None,
) -> Launch:
    """The launch that fills d_b and adds to d_a (zeros before, in the accumulator), or fills it if `dense`."""
    arguments, constants, programs, warps = _features(feat_a, feat_b, field, form, mask, inside, on, d_a, d_b)
    unit = constants["UNIT"]
    arguments |= {"grad": grad, "d_a": d_a, "d_b_out": d_b, **strides("d", d_a, unit), **strides("e", d_b, unit)}
    constants |= {"D_X": d_a.stride(-1), "E_X": d_b.stride(-1), "DENSE": dense}
    return Launch(device.consistency_backward_kernel, programs, warps, arguments, constants)


def _features(feat_a, feat_b, field, form, mask, inside, on, *written):  # type: ignore[no-untyped-def]
    batch, channels, *size = feat_a.shape
    maps = (feat_a, rows_of(feat_b) if has_rows(feat_a) else feat_b)
    blocks = channels_of(*maps, *written)
    tile = tile_for(size, on or architecture_of(feat_a), blocks.lanes)
    unit = blocks.constants["UNIT"]
    f_arguments, f_constants = field_arguments(field, form)
    del f_constants["ORIGIN"]
    arguments = {
        "feat_a": maps[0], "feat_b": maps[1], "mask": feat_a if mask is None else mask, **f_arguments,
        **strides("a", maps[0], unit), **strides("b", maps[1], unit), **sizes("size", size), "channels": channels,
    }  # fmt: skip
    constants = {
        "NDIM": len(size), **f_constants, "MASK": _mask_kind(mask, inside), **blocks.constants,
        "A_X": maps[0].stride(-1), "B_X": maps[1].stride(-1),
        "WIDE": wide(*maps, *written, *([field] if form == "dense" else [])), **tile.constants,
        "ACC": accumulator(feat_a)[1], "SINGLE": channels <= blocks.lanes * blocks.chunk,
    }  # fmt: skip
    return arguments, constants, tile.programs(batch, size), tile.warps


def consistency_backward(
    grad: Tensor,
    feat_a: Tensor,
    feat_b: Tensor,
    field: Tensor,
    form: str,
    mask: Tensor | None,
    inside: bool,
    *,
    to_field: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of both features and, if asked, of a dense field, from the gradient `(2,)` of the sums."""
    dtype, _ = accumulator(feat_a)
    d_b, d_field = new_like(feat_b), None
    dense = to_field or deterministic()
    d_a = new_like(feat_a, dtype=dtype)
    if not dense:
        d_a.zero_()
    problem = (grad, feat_a, feat_b, field, form, mask, inside)
    consistency_backward_launch(*problem, d_a, d_b, dense=dense).run()
    if not dense:
        return d_a.to(feat_a.dtype), d_b, None
    brought = d_a
    got, d_field = warp.backward(brought, feat_a, field, form, "linear", "zeros", to_x=True, to_field=to_field)
    assert got is not None
    return got, d_b, d_field
