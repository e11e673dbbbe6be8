"""Fusion of an affine map and a field in Triton, forward and backward: plans and runs the kernels of `fuse_device`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coverfast.kernels import fuse_device as device
from coverfast.kernels.launch import Architecture, Launch, architecture_of
from coverfast.kernels.pixels import Tile, sizes, strides, tile_for, wide

#: Pixels of a program.
PIXELS = 512


def forward_launch(dvf: Tensor, theta: Tensor, out: Tensor, on: Architecture | None = None) -> Launch:
    """The launch that fills out `(B, n, *S)`, contiguous."""
    arguments, constants, tile = _problem(dvf, theta, on)
    programs = tile.programs(len(dvf), dvf.shape[2:])
    return Launch(device.fuse_forward_kernel, programs, tile.warps, {**arguments, "out": out}, constants)


def backward_launch(
    grad: Tensor, dvf: Tensor, theta: Tensor, d_dvf: Tensor | None, *, to_theta: bool, on: Architecture | None = None
) -> tuple[Launch, Tensor]:
    """The launch that fills d_dvf `(B, n, *S)`, contiguous, and the partial sums of theta's gradient
    `(B, programs of a sample, n, n + 1)`; and these. Without `to_theta` they stay unwritten.
    """
    arguments, constants, tile = _problem(dvf, theta, on, grad)
    batch, n, *size = dvf.shape
    programs = tile.programs(1, size)
    partials = dvf.new_empty((batch, programs if to_theta else 0, n, n + 1))
    arguments |= {"grad": grad, "d_dvf": dvf if d_dvf is None else d_dvf, "partials": partials}
    arguments |= strides("g", grad, with_x=True)
    constants |= {"TO_DVF": d_dvf is not None, "TO_THETA": to_theta}
    return Launch(device.fuse_backward_kernel, batch * programs, tile.warps, arguments, constants), partials


def _problem(
    dvf: Tensor, theta: Tensor, on: Architecture | None, *others: Tensor
) -> tuple[dict[str, Any], dict[str, Any], Tile]:
    n, *size = dvf.shape[1:]
    tile = tile_for(size, on or architecture_of(dvf), total=PIXELS)
    arguments = {
        "dvf": dvf, "theta": theta.contiguous(), **strides("d", dvf, with_x=True), **sizes("size", size),
    }  # fmt: skip
    return arguments, {"NDIM": n, "WIDE": wide(dvf, *others), **tile.constants}, tile


def backward(
    grad: Tensor, dvf: Tensor, theta: Tensor, *, to_dvf: bool, to_theta: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients that are asked for: of the field, and of theta, whose sums are the same bits on every run."""
    d_dvf = torch.empty_like(dvf, memory_format=torch.contiguous_format) if to_dvf else None
    launch, partials = backward_launch(grad, dvf, theta, d_dvf, to_theta=to_theta)
    launch.run()
    return d_dvf, partials.sum(1, dtype=torch.float64).to(theta.dtype) if to_theta else None
