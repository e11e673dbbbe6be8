"""View a in Triton: plans the launches of `views_device`: three, and for the blur one more and one an axis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from coverfast.kernels import views_device as device
from coverfast.kernels.launch import Architecture, Launch, architecture_of
from coverfast.kernels.pixels import sizes, strides, tile_for, wide
from coverfast.philox import STREAM_FILL, STREAM_NOISE

#: Pixels of a program; partial sums that one pass of `view_means_kernel` adds.
PIXELS, BLOCK = 512, 1024


def appearance_launches(
    images: Tensor,
    numbers: Tensor,
    params: Tensor,
    out: Tensor,
    *,
    boxes: int,
    taps: int,
    seed: int,
    iteration: int,
    on: Architecture | None = None,
) -> Iterator[Launch]:
    """The launches that fill out `(B, C, *S)`, contiguous float32.

    images: `(B, C, *S')`, any strides. numbers: as in `AffineDVF`, for the origin of the crop. params: `(B, WIDTH)`,
    see `views_device`. taps: of the blur, 0 for none. seed: the key as a signed number.
    """
    batch, channels, *size = out.shape
    tile = tile_for(size, on or architecture_of(out), total=PIXELS)
    programs = tile.programs(batch * channels, size)
    count = programs // max(1, batch * channels)
    partials, means = out.new_empty(programs), out.new_empty(batch * channels)
    shared: dict[str, Any] = {
        "numbers": numbers, "drawn": params, **sizes("size", size), "channels": channels,
        "seed": seed, "iteration": iteration,
    }  # fmt: skip
    constants = {"NDIM": len(size), "WIDTH": params.shape[1], "STREAM": STREAM_NOISE, **tile.constants}

    def source(x: Tensor, *, noise: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        arguments = {"source": x, **strides("i", x, with_x=True), **sizes("from", x.shape[2:])}
        return shared | arguments, constants | {"NOISE": noise, "WIDE": wide(x, out)}

    def appearance(x: Tensor, target: Tensor, *, noise: bool, adjust: bool) -> Launch:
        arguments, numbers_of = source(x, noise=noise)
        arguments |= {"means": means, "out": target, "boxes": boxes}
        numbers_of |= {"FILL": STREAM_FILL, "ADJUST": adjust}
        return Launch(device.view_appearance_kernel, programs, tile.warps, arguments, numbers_of)

    noisy = images
    if taps:
        noisy, other = torch.empty_like(out), torch.empty_like(out)
        yield appearance(images, noisy, noise=True, adjust=False)
        for axis in range(len(size)):
            yield _blur_launch(noisy, params, other, axis, taps)
            noisy, other = other, noisy
    arguments, numbers_of = source(noisy, noise=not taps)
    arguments |= {"partials": partials}
    yield Launch(device.view_sums_kernel, programs, tile.warps, arguments, numbers_of)
    pixels = {"partials": partials, "means": means, "count": count, "pixels": out[0, 0].numel() if batch else 1}
    yield Launch(device.view_means_kernel, batch * channels, 4, pixels, {"BLOCK": BLOCK})
    yield appearance(noisy, out, noise=not taps, adjust=True)


def _blur_launch(x: Tensor, params: Tensor, out: Tensor, axis: int, taps: int) -> Launch:
    batch, channels, *size = x.shape
    elements = x[0, 0].numel() if batch else 0
    arguments = {
        "x": x, "weights": params[:, -taps:], "out": out, "length": size[axis], "inner": x.stride(2 + axis),
        "channels": channels, "taps": taps, "elements": elements,
    }  # fmt: skip
    constants = {"STRIDE": params.shape[1], "TILE": PIXELS}
    return Launch(device.view_blur_kernel, -(-elements // PIXELS) * batch * channels, 4, arguments, constants)
