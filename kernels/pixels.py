"""What the launches of the pixel-wise kernels (warp, composition, losses, views) have in common.

They all serve tiles of pixels, read a displacement field in one of several forms, and know strides as arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from coverfast.kernels.launch import Architecture, chosen
from coverfast.layout import has_rows

#: Lanes of a program, and the most of them that share a pixel.
LANES, BLOCKS = 128, 8


@dataclass(frozen=True)
class Tile:
    """Pixels that a program serves, lanes that share a pixel, warps."""

    y: int
    x: int
    lanes: int
    warps: int

    def programs(self, batch: int, size: Sequence[int]) -> int:
        """How many tiles cover the grids of a batch."""
        return batch * prod(size[:-2]) * -(-size[-2] // self.y) * -(-size[-1] // self.x)

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time constants of a kernel whose lanes are pixels."""
        return {"TILE_Y": self.y, "TILE_X": self.x}


def tile_for(size: Sequence[int], on: Architecture, lanes: int = 1, total: int = LANES) -> Tile:
    """A tile as high as `total` lanes allow, of the width that wastes the fewest; neighbours along x are read at once.

    At least 32 lanes along x, or 8 where lanes share a pixel, but no more than the grid is wide.
    """
    pixels = total // lanes
    least = min(pixels, 32 if lanes == 1 else 8, 1 << (size[-1] - 1).bit_length())
    widths = [w for p in range(pixels.bit_length()) if (w := 1 << p) >= least]
    x = chosen("tile", min(reversed(widths), key=lambda t: -(-size[-1] // t) * t))
    y = chosen("tile_y", max(1, min(pixels // x, 1 << (size[-2] - 1).bit_length())))
    return Tile(y, x, lanes, chosen("warps", min(4, max(1, y * x * lanes // on.warp))))


def sizes(prefix: str, size: Sequence[int]) -> dict[str, int]:
    """`{prefix}_z`, `_y`, `_x`; one plane in 2D."""
    z, y, x = (1, *size) if len(size) == 2 else size
    return {f"{prefix}_z": z, f"{prefix}_y": y, f"{prefix}_x": x}


def strides(prefix: str, x: Tensor, unit: int = 1, *, with_x: bool = False) -> dict[str, int]:
    """`{prefix}_b`, `_z`, `_y` in units of elements, `_c` (and `_x`) in elements."""
    s_b, s_c, *s = x.stride()
    found = {"b": s_b // unit, "c": s_c, "z": (s[0] if len(s) == 3 else 0) // unit, "y": s[-2] // unit}
    if with_x:
        found["x"] = s[-1]
    return {f"{prefix}_{name}": value for name, value in found.items()}


def field_arguments(field: Tensor, form: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants of a displacement field: "dense", "coarse", "affine" or "crop" (see `ops.warp`)."""
    if form in ("affine", "crop"):
        found = {f"f_{axis}": 0 for axis in "bczyx"}
        return {"field": field.contiguous(), **found}, {"FIELD": "affine", "ORIGIN": form == "crop"}
    return {"field": field, **strides("f", field, with_x=True)}, {"FIELD": form, "ORIGIN": False}


@dataclass(frozen=True)
class Channels:
    """How the channels of maps are read: in rows, `chunk` at a time, or one by one."""

    rows: bool
    chunk: int
    lanes: int

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time constants of a kernel whose lanes are blocks of channels."""
        return {"ROWS": self.rows, "CHUNK": self.chunk, "UNIT": self.chunk if self.rows else 1, "LANES": self.lanes}


def channels_of(*maps: Tensor) -> Channels:
    """Rows where all maps have them, in loads of up to 16 bytes that every row is aligned to."""
    channels = maps[0].shape[1]
    if not all(has_rows(x) for x in maps):
        return Channels(rows=False, chunk=1, lanes=1)
    chunk = gcd(*(_unit(x, channels) for x in maps))
    return Channels(rows=True, chunk=chunk, lanes=min(BLOCKS, 1 << (-(-channels // chunk) - 1).bit_length()))


def _unit(x: Tensor, channels: int) -> int:
    """Elements, at most 16 bytes, that divide where every row begins."""
    starts = (x.data_ptr() // x.element_size(), *(s for d, s in enumerate(x.stride()) if d != 1))
    return gcd(16 // min(16, x.element_size()), channels, *starts)


def wide(*tensors: Tensor) -> bool:
    """Whether offsets within a sample of any tensor need 64 bits."""
    spans = (sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) for x in tensors)
    return any(span >= 2**31 - 2**16 for span in spans)


def accumulator(*tensors: Tensor) -> tuple[torch.dtype, Any]:
    """What is summed in: float64 if any tensor is, else float32; for torch and for Triton."""
    double = any(x.dtype == torch.float64 for x in tensors)
    return (torch.float64, tl.float64) if double else (torch.float32, tl.float32)


# --- sums in an order that does not matter ---------------------------------------------------------------------------


@dataclass(frozen=True)
class FixedPoint:
    """Integers that sums are taken in: `value * scale` is added, the sum is `integer * unit`; both device scalars."""

    scale: Tensor
    unit: Tensor

    def value(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """The sums as numbers."""
        return total.to(self.unit.dtype).mul_(self.unit).to(dtype)


def fixed_point(values: Tensor, dtype: torch.dtype, addends: int) -> FixedPoint:
    """Units so fine that `addends` of the largest of `values` still fit into 62 bits.

    Over 2^21 pixels an addend is cut by less than 2^-38 of the largest. Where a value is not finite all sums are NaN.
    """
    top = (
        torch.linalg.vector_norm(values, torch.inf, dtype=dtype)
        if values.numel()
        else values.new_zeros((), dtype=dtype)
    )
    bits = 61 - max(1, addends).bit_length()
    least = 2.0 ** (bits - (126 if dtype == torch.float32 else 1000))  # below, the scale itself would be infinite
    scale = torch.exp2(bits - top.clamp(min=least).log2().ceil())
    return FixedPoint(scale, torch.where(top.isfinite(), 1 / scale, torch.nan))


def deterministic() -> bool:
    """Whether sums must not depend on the order of their addends (`torch.use_deterministic_algorithms`)."""
    return bool(chosen("deterministic", torch.are_deterministic_algorithms_enabled()))
