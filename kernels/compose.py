"""Composition in Triton, forward and backward: plans and runs the kernels of `compose_device`."""

from __future__ import annotations

import torch
from torch import Tensor

from coverfast.kernels import compose_device as device
from coverfast.kernels.launch import Architecture, Launch, architecture_of
from coverfast.kernels.pixels import deterministic, fixed_point, sizes, strides, tile_for, wide
from coverfast.kernels.warp import upsample_backward_launch


def forward_launch(fine: Tensor, coarse: Tensor, out: Tensor, on: Architecture | None = None) -> Launch:
    """The launch that fills out `(B, n, *S)`, contiguous."""
    batch, n, *size = fine.shape
    tile = tile_for(size, on or architecture_of(fine))
    arguments = {
        "fine": fine, "coarse": coarse, "out": out, **strides("f", fine, with_x=True),
        **strides("c", coarse, with_x=True), **sizes("size", size),
    }  # fmt: skip
    constants = {"NDIM": n, "WIDE": wide(fine, coarse, out), **tile.constants}
    return Launch(device.compose_forward_kernel, tile.programs(batch, size), tile.warps, arguments, constants)


def backward_launch(
    grad: Tensor,
    fine: Tensor,
    coarse: Tensor,
    d_fine: Tensor,
    d_up: Tensor,
    scale: Tensor | None,
    on: Architecture | None = None,
) -> Launch:
    """The launch that fills d_fine and adds to d_up (zeros; int64 with `scale`), both `(B, n, *S)` contiguous."""
    batch, n, *size = fine.shape
    tile = tile_for(size, on or architecture_of(fine))
    arguments = {
        "grad": grad, "fine": fine, "coarse": coarse, "d_fine": d_fine, "d_up": d_up,
        "scale": fine if scale is None else scale, **strides("g", grad, with_x=True),
        **strides("f", fine, with_x=True), **strides("c", coarse, with_x=True), **sizes("size", size),
    }  # fmt: skip
    constants = {"NDIM": n, "WIDE": wide(grad, fine, coarse, d_up), **tile.constants, "FIXED": scale is not None}
    return Launch(device.compose_backward_kernel, tile.programs(batch, size), tile.warps, arguments, constants)


def backward(grad: Tensor, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of both fields; that of the coarse one scatters to the fine grid first, as `kernels.warp` says."""
    pixels = grad[0, 0].numel() if len(grad) else 0
    fixed = fixed_point(grad, fine.dtype, pixels) if deterministic() else None
    d_fine = torch.empty_like(fine, memory_format=torch.contiguous_format)
    d_up = torch.zeros_like(d_fine, dtype=fine.dtype if fixed is None else torch.int64)
    backward_launch(grad, fine, coarse, d_fine, d_up, None if fixed is None else fixed.scale).run()
    d_coarse = torch.empty_like(coarse, memory_format=torch.contiguous_format)
    upsample_backward_launch(d_up, d_coarse, None if fixed is None else fixed.unit).run()
    return d_fine, d_coarse
