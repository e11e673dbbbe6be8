"""Warping in Triton, forward and backward: plans and runs the kernels of `warp_device`.

The gradient of the image scatters: pixels that look into the same cell add to the same corners, by atomic additions
whose order, and so whose last bits, change from run to run. Under `torch.use_deterministic_algorithms(True)` they add
64-bit integers, multiples of a power of two fine enough for the largest gradient: the same bits on every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coverfast.kernels import warp_device as device
from coverfast.kernels.launch import Architecture, Launch, architecture_of
from coverfast.kernels.pixels import (
    FixedPoint,
    accumulator,
    channels_of,
    deterministic,
    field_arguments,
    fixed_point,
    sizes,
    strides,
    tile_for,
    wide,
)
from coverfast.layout import has_rows, new_like, rows_of


def forward_launch(
    x: Tensor, field: Tensor, form: str, out: Tensor, mode: str, padding: str, on: Architecture | None = None
) -> Launch:
    """The launch that fills out `(B, C, *S)`; the field in one of the forms of `ops.warp`."""
    batch, channels, *size = out.shape
    _, kind = accumulator(x, field)
    blocks = channels_of(x, out)
    tile = tile_for(size, on or architecture_of(x), blocks.lanes)
    f_arguments, f_constants = field_arguments(field, form)
    unit = blocks.constants["UNIT"]
    arguments = {
        "x": x, "out": out, **f_arguments, **strides("x", x, unit), **strides("y", out, unit),
        **sizes("size", size), **sizes("from", x.shape[2:]), "channels": channels,
    }  # fmt: skip
    constants = {
        "NDIM": len(size), **f_constants, "NEAREST": mode == "nearest", "BORDER": padding == "border",
        **blocks.constants, "X_X": x.stride(-1), "Y_X": out.stride(-1), "WIDE": wide(x, out, *_dense(field, form)),
        **tile.constants, "ACC": kind,
    }  # fmt: skip
    return Launch(device.warp_forward_kernel, tile.programs(batch, size), tile.warps, arguments, constants)


def backward_launch(
    grad: Tensor,
    x: Tensor,
    field: Tensor,
    form: str,
    dx: Tensor | None,
    d_psi: Tensor | None,
    scale: Tensor | None,
    mode: str,
    padding: str,
    on: Architecture | None = None,
) -> Launch:
    """The launch that adds to dx (zeros, in the accumulator or int64 with `scale`) and fills d_psi `(B, n, *S)`."""
    batch, channels, *size = grad.shape
    grad = rows_of(grad) if has_rows(x) else grad
    target = x if dx is None else dx
    maps = [grad, x, target]
    blocks = channels_of(*maps)
    tile = tile_for(size, on or architecture_of(x), blocks.lanes)
    f_arguments, f_constants = field_arguments(field, form)
    unit = blocks.constants["UNIT"]
    arguments = {
        "grad": grad, "x": x, "dx": target, "d_field": x if d_psi is None else d_psi,
        "scale": x if scale is None else scale, **f_arguments,
        **strides("g", grad, unit), **strides("x", x, unit), **strides("d", target, unit),
        **sizes("size", size), **sizes("from", x.shape[2:]), "channels": channels,
    }  # fmt: skip
    constants = {
        "NDIM": len(size), **f_constants, "NEAREST": mode == "nearest", "BORDER": padding == "border",
        **blocks.constants, "G_X": grad.stride(-1), "X_X": x.stride(-1), "D_X": target.stride(-1),
        "WIDE": wide(*maps, *_dense(field, form)), **tile.constants, "ACC": accumulator(x, field)[1],
        "TO_X": dx is not None, "TO_FIELD": d_psi is not None, "FIXED": scale is not None,
    }  # fmt: skip
    return Launch(device.warp_backward_kernel, tile.programs(batch, size), tile.warps, arguments, constants)


def upsample_backward_launch(d_up: Tensor, out: Tensor, unit: Tensor | None, on: Architecture | None = None) -> Launch:
    """The launch that fills out `(B, n, *S)` with the transpose of up-sampling, from d_up `(B, n, *2S)`."""
    batch, n, *size = out.shape
    tile = tile_for(size, on or architecture_of(out))
    arguments = {"grad": d_up, "scale": out if unit is None else unit, "out": out, **sizes("size", size)}
    constants = {"NDIM": n, "FIXED": unit is not None, "WIDE": wide(d_up), **tile.constants}
    return Launch(device.upsample_backward_kernel, tile.programs(batch * n, size), tile.warps, arguments, constants)


def backward(
    grad: Tensor, x: Tensor, field: Tensor, form: str, mode: str, padding: str, *, to_x: bool, to_field: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the field, as many as are asked for."""
    dtype, _ = accumulator(x, field)
    fixed: FixedPoint | None = None
    dx = d_psi = None
    if to_x:
        if deterministic():
            fixed = fixed_point(grad, dtype, grad[0, 0].numel() if len(grad) else 0)
        dx = new_like(x, dtype=dtype if fixed is None else torch.int64).zero_()
    if to_field:
        d_psi = field.new_empty((len(grad), grad.ndim - 2, *grad.shape[2:]))
    scale = None if fixed is None else fixed.scale
    backward_launch(grad, x, field, form, dx, d_psi, scale, mode, padding).run()
    if dx is not None:
        dx = dx.to(x.dtype) if fixed is None else fixed.value(dx, x.dtype)
    if d_psi is not None and form == "coarse":
        d_up, d_psi = d_psi, torch.empty_like(field, memory_format=torch.contiguous_format)
        upsample_backward_launch(d_up, d_psi, None).run()
    return dx, d_psi


def _dense(field: Tensor, form: str) -> tuple[Tensor, ...]:
    return (field,) if form in ("dense", "coarse") else ()
