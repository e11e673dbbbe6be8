"""The projections' norm in Triton, forward and backward: plans and runs the kernels of `norm_device`."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor

from coverfast.kernels import norm_device as device
from coverfast.kernels.launch import Architecture, Launch, architecture_of, bits, chosen
from coverfast.kernels.pixels import accumulator
from coverfast.layout import channels_last, new_like

#: Elements of a tile; programs that a multiprocessor holds; most programs that share a sample.
ELEMENTS, RESIDENT, MOST = 2048, 8, 512


def dense(x: Tensor) -> Tensor:
    """`x` itself where each sample is dense, in rows or plane by plane; otherwise a copy."""
    return x if _rows(x) or x[:1].is_contiguous() else x.contiguous()


def _rows(x: Tensor) -> bool:
    return x[:1].is_contiguous(memory_format=channels_last(x))


def forward_launches(
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    y: Tensor,
    statistics: Tensor,
    on: Architecture | None = None,
) -> Iterator[Launch]:
    """The launches that fill y, channels-last, and statistics `(B, 2)`."""
    x = dense(x)
    programs, constants, pixels = _shared(on, x)
    partials = statistics.new_empty(len(x), constants["SPLIT"], 2)
    constants |= {"X_ROWS": _rows(x)}
    arguments = {"x": x, "bias": bias, "partials": partials, "x_b": x.stride(0), "pixels": pixels}
    yield Launch(device.norm_moments_kernel, programs, 4, arguments, constants)
    arguments = arguments | {"weight": weight, "shift": shift, "y": y, "statistics": statistics, "eps": bits(eps)}
    yield Launch(device.norm_apply_kernel, programs, 4, arguments, constants)


def backward_launches(
    grad: Tensor,
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    statistics: Tensor,
    dx: Tensor,
    d_parameters: Tensor,
    on: Architecture | None = None,
) -> Iterator[Launch]:
    """The launches that fill dx and d_parameters `(3, C)`, of bias, weight and shift; to be run one by one."""
    grad, x = dense(grad), dense(x)
    programs, constants, pixels = _shared(on, x, grad)
    partials = statistics.new_empty(len(x), constants["SPLIT"], 3, x.shape[1])
    layouts = {"X_ROWS": _rows(x), "G_ROWS": _rows(grad)}
    shared = {"grad": grad, "x": x, "bias": bias, "statistics": statistics, "pixels": pixels}
    shared |= {"x_b": x.stride(0), "g_b": grad.stride(0)}
    yield Launch(device.norm_sums_kernel, programs, 4, shared | {"partials": partials}, constants | layouts)
    sums = partials.sum(1)
    arguments = shared | {"weight": weight, "sums": sums, "dx": dx}
    yield Launch(device.norm_backward_kernel, programs, 4, arguments, constants | layouts)
    arguments = {"weight": weight, "statistics": statistics, "sums": sums, "out": d_parameters, "pixels": pixels}
    small = {name: constants[name] for name in ("C", "BLOCK", "ACC")}
    yield Launch(device.norm_parameters_kernel, 1, 4, arguments | {"batch": len(x)}, small)


def _shared(on: Architecture | None, x: Tensor, *others: Tensor) -> tuple[int, dict[str, Any], int]:
    """Programs, constants, pixels of a sample."""
    batch, channels, pixels = len(x), x.shape[1], prod(x.shape[2:])
    block = 1 << (channels - 1).bit_length()
    tile = chosen("tile", max(1, ELEMENTS // block))
    room = (on or architecture_of(x)).processors * RESIDENT // max(1, batch)
    split = min(MOST, 1 << max(0, room.bit_length() - 1), 1 << (-(-pixels // tile) - 1).bit_length())
    unit = gcd(16 // x.element_size(), pixels, *(m.stride(0) for m in (x, *others)))
    unit = gcd(unit, *(m.data_ptr() // m.element_size() for m in (x, *others)))
    constants = {
        "C": channels,
        "P": tile,
        "BLOCK": block,
        "UNIT": unit,
        "SPLIT": max(1, split),
        "ACC": accumulator(x)[1],
    }
    return batch * constants["SPLIT"], constants, pixels


def backward(grad: Tensor, x: Tensor, bias: Tensor, weight: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """dx, in the layout of x, and the gradients `(3, C)` of bias, weight and shift."""
    d_parameters = statistics.new_empty(3, x.shape[1])
    dx = new_like(x)
    direct = _rows(dense(x)) == _rows(dx)
    target = dx if direct else torch.empty_like(dense(x))
    for launch in backward_launches(grad, x, bias, weight, statistics, target, d_parameters):
        launch.run()
    return dx if direct else dx.copy_(target), d_parameters
