"""MoV in Triton, forward and backward: plans the launches of the kernels in `mov_device` and runs them.

The kernels read maps as rows of channels, so a map whose channels are not contiguous is first copied to the
channels-last layout, once a direction: two passes over memory against about a hundred more instructions a tap. Maps
that are channels-last already, sliced or not, are read where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from coverfast.kernels import mov_device as device
from coverfast.kernels.launch import Architecture, Launch, architecture_of, bits, chosen
from coverfast.layout import has_rows, rows_of


@dataclass(frozen=True)
class Shape:
    """The numbers of a launch that a rule chooses."""

    rows: int  # along y, that a lane serves together
    taps: int  # of a window row, whose keys are held at once
    tile: int  # pixels along x
    lanes: int  # groups, rounded up to a power of two
    warps: int


#: Most rows and taps, forward and backward, by the 32-bit words of a group's channels: more rows share each load and
#: more taps share a rescaling, until registers run out. Chosen by counting instructions and registers for sm_90
#: (`coverfast bench static`); no GPU has timed them yet.
SHARING = {8: ((4, 5), (4, 5)), 16: ((3, 2), (3, 1)), 32: ((2, 2), (2, 1))}

#: Warps a multiprocessor must keep for rows to be shared (one a scheduler), and the widest window whose taps
#: are unrolled.
FILL, UNROLLED = 4, 9


def choose(
    size: Sequence[int], batch: int, groups: int, words: int, window_x: int, on: Architecture, *, backward: bool
) -> Shape:
    """The shape of a launch: tiles that waste the fewest lanes, then as many rows a lane as still fill the device."""
    lanes = 1 << (groups - 1).bit_length()
    tiles = [1 << p for p in range(8) if on.warp <= (lanes << p) <= max(128, lanes)] or [max(1, on.warp // lanes)]
    tile = chosen("tile", min(reversed(tiles), key=lambda t: -(-size[-1] // t) * t))
    warps = chosen("warps", min(16, max(1, tile * lanes // on.warp)))
    most, taps = next((row for limit, row in SHARING.items() if words <= limit), ((1, 1), (1, 1)))[backward]
    planes = batch * (size[0] if len(size) == 3 else 1) * -(-size[-1] // tile)
    filled = planes * (size[-2] // most) * warps >= FILL * on.processors
    rows = most if filled else min(most, 2, size[-2])
    if window_x <= UNROLLED:  # passes of about one length
        taps = -(-window_x // -(-window_x // taps))
    return Shape(chosen("rows", rows), chosen("taps", taps), tile, lanes, warps)


def forward_launch(
    q: Tensor,
    k: Tensor,
    out: Tensor,
    lse: Tensor,
    vectors: Tensor,
    window: Sequence[int],
    groups: int,
    scale: float,
    on: Architecture | None = None,
) -> Launch:
    """The launch that fills out `(B, n, *S)`, lse `(B, J, *S)` in base 2 and, for several groups, vectors
    `(B, J, n, *S)`: contiguous, float32 (float64 for float64 maps). See `coverfast.mov` for the rest.
    """
    q, k = rows_of(q), rows_of(k)
    arguments, constants, shape, programs = _common(q, k, window, groups, scale, on, backward=False)
    constants["TOP"] = torch.finfo(out.dtype).min
    tensors = {"q": q, "k": k, "out": out, "lse": lse, "vectors": vectors}
    return Launch(device.mov_forward_kernel, programs, shape.warps, tensors | arguments, constants)


def backward_launches(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    out: Tensor,
    lse: Tensor,
    vectors: Tensor,
    dq: Tensor,
    dk: Tensor,
    window: Sequence[int],
    groups: int,
    scale: float,
    on: Architecture | None = None,
) -> tuple[Launch, Launch]:
    """The launches that fill dq, then dk, each contiguous or channels-last, from the results of the forward."""
    q, k = rows_of(q), rows_of(k)
    arguments, constants, shape, programs = _common(
        q, k, window, groups, scale, on, backward=True, widest=grad.stride(-1)
    )
    pulled = torch.empty_like(lse)
    sides = {"lse": lse, "pulled": pulled, "grad": grad}
    arguments |= _strides("g", grad) | {"g_c": grad.stride(1), "g_x": grad.stride(-1)}
    launches = []
    for name, kernel, target in (("dq", device.mov_dq_kernel, dq), ("dk", device.mov_dk_kernel, dk)):
        d_arguments, d_constants = _target(target, q.shape[1] // groups)
        tensors = {"q": q, "k": k, **sides, name: target}
        if name == "dq":
            tensors["vectors"] = vectors if groups > 1 else out
        everything = tensors | arguments | d_arguments
        launches.append(Launch(kernel, programs, shape.warps, everything, constants | d_constants, unit=("g_x",)))
    return launches[0], launches[1]


def _common(
    q: Tensor,
    k: Tensor,
    window: Sequence[int],
    groups: int,
    scale: float,
    on: Architecture | None,
    *,
    backward: bool,
    widest: int = 1,
) -> tuple[dict[str, Any], dict[str, Any], Shape, int]:
    """What the three kernels share: arguments, constants, shape and number of programs.

    `widest` is the largest stride along x of any other tensor: offsets along a row may need 64 bits.
    """
    batch, channels, *size = q.shape
    width = channels // groups
    size_z, size_y, size_x = (1, *size) if len(size) == 2 else size
    radius_z, radius_y, radius_x = (1, *window) if len(window) == 2 else window
    radius_z, radius_y, radius_x = radius_z // 2, radius_y // 2, radius_x // 2
    double = q.dtype == torch.float64
    words, on = width * (2 if double else 1), on or architecture_of(q)
    shape = choose(size, batch, groups, words, 2 * radius_x + 1, on, backward=backward)
    unit = min(_unit(q, width), _unit(k, width))
    span = max(channels, widest, q.stride(-1), k.stride(-1)) * (size_x + radius_x + 2 * shape.tile)
    arguments = {
        **_strides("q", q, unit), **_strides("k", k, unit),
        "size_z": size_z, "size_y": size_y, "size_x": size_x,
        "radius_z": radius_z, "radius_y": radius_y, "radius_x": radius_x,
        "scale": bits(scale),
    }  # fmt: skip
    constants = {
        "NDIM": len(size), "GROUPS": groups, "WIDTH": width, "ACC": tl.float64 if double else tl.float32,
        "Q_X": q.stride(-1), "K_X": k.stride(-1), "UNIT": unit, "CHUNK": _chunk(unit, width), "WIDE": span >= 2**31,
        "WINDOW_X": 2 * radius_x + 1 if 2 * radius_x + 1 <= UNROLLED else 0,
        "ROWS": shape.rows, "TAPS": shape.taps, "TILE": shape.tile, "LANES": shape.lanes,
    }  # fmt: skip
    programs = batch * size_z * -(-size_y // shape.rows) * -(-size_x // shape.tile)
    return arguments, constants, shape, programs


def _chunk(unit: int, width: int) -> int:
    """Channels that one load brings to a lane: a unit, but no more than 16 loads a row."""
    return max(min(unit, width), (1 << (width - 1).bit_length()) // 16)


def _unit(x: Tensor, width: int) -> int:
    """Elements, at most 16 bytes, that divide where every row begins."""
    most = 16 // x.element_size()
    starts = (x.data_ptr() // x.element_size(), width, *(s for d, s in enumerate(x.stride()) if d != 1))
    return gcd(most, *starts)


def _strides(name: str, x: Tensor, unit: int = 1) -> dict[str, int]:
    """From sample to sample, plane to plane (0 in 2D) and line to line of `x`, in units, as arguments."""
    s_b, _, *s = x.stride()
    s_z = s[0] if len(s) == 3 else 0
    return {f"{name}_b": s_b // unit, f"{name}_z": s_z // unit, f"{name}_y": s[-2] // unit}


def _target(x: Tensor, width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where a gradient is written: arguments and constants."""
    rows = has_rows(x)
    unit = _unit(x, width) if rows else 1
    return _strides("d", x, unit) | {"d_c": x.stride(1)}, {"D_X": x.stride(-1), "D_UNIT": unit, "D_ROWS": rows}
