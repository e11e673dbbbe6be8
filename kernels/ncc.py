"""The local normalised cross-correlation in Triton: plans the launches of the kernels in `ncc_device`.

A batch is served in parts, so that the maps between passes do not grow with it and stay near the second-level cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from coverfast.kernels import ncc_device as device
from coverfast.kernels.launch import Architecture, Launch, architecture_of, bits, chosen
from coverfast.kernels.pixels import accumulator

#: Most lanes of a program; programs that every multiprocessor should have.
LANES, EACH = 128, 3
#: Most and fewest rows of a walk, which begins with reading all but one row of a window.
LONG, SHORT = 64, 8
#: Registers of a lane for the rows in its window.
KEPT = 64
#: Bytes of the maps between passes, more only where one sample needs them.
SCRATCH = 2**26


@dataclass(frozen=True)
class _Pass:
    """Grids `(outer, rows, columns)`, `of_sample` of them a sample, the window on them, and how programs share them."""

    outer: int
    rows: int
    columns: int
    of_sample: int
    window: tuple[int, int]
    tile: int
    steps: int

    @property
    def programs(self) -> int:
        return self.outer * -(-self.rows // self.steps) * -(-self.columns // self.tile)


def _passes(shape: Sequence[int], window: Sequence[int], on: Architecture) -> list[_Pass]:
    """Within planes; in 3D then along z."""
    batch, channels, *size = shape
    planes = channels * prod(size[:-2])
    found = [_pass(batch * planes, size[-2], size[-1], planes, (window[-2], window[-1]), on)]
    if len(size) == 3:
        found.append(_pass(batch * channels, size[0], size[1] * size[2], channels, (window[0], 1), on))
    return found


def _pass(outer: int, rows: int, columns: int, of_sample: int, window: tuple[int, int], on: Architecture) -> _Pass:
    """The widest tile that wastes the fewest lanes, and walks as long as leave enough of them."""
    tiles = [t for p in range(LANES.bit_length()) if (t := 1 << p) >= on.warp]
    tile = chosen("tile", min(reversed(tiles), key=lambda t: -(-columns // t) * t))
    steps, walks = LONG, outer * -(-columns // tile)
    while steps > SHORT and walks * -(-rows // steps) < EACH * on.processors:
        steps //= 2
    return _Pass(outer, rows, columns, of_sample, window, tile, chosen("rows", steps))


class Plan(NamedTuple):
    """The launches, in order, and the partial sums of the match that they fill."""

    launches: list[Launch]
    partials: Tensor


def plan(
    x: Tensor,
    y: Tensor,
    window: Sequence[int],
    eps: float,
    d_x: Tensor | None,
    d_y: Tensor | None,
    on: Architecture | None = None,
) -> Plan:
    """What sums the match and, where they are given, fills its slopes by x and y: `(B, C, *S)`, contiguous, in the
    accumulator.
    """
    x, y = (image if image[:1].is_contiguous() else image.contiguous() for image in (x, y))
    on, (dtype, _), (batch, channels, *size) = on or architecture_of(x), accumulator(x), x.shape
    # A window that reaches beyond the grid on both sides of every pixel is as good as a narrower one.
    reach = [2 * min(w // 2, s - 1) + 1 for w, s in zip(window, size, strict=True)]
    targets = [d for d in (d_x, d_y) if d is not None]
    sums, slopes = 5 * (len(size) - 2), 1 + 2 * len(targets) if targets else 0
    pixels = channels * prod(size)
    most = max(1, min(batch, SCRATCH // max(1, (sums + slopes) * pixels * dtype.itemsize)))
    between, maps = (x.new_empty(count * most * pixels, dtype=dtype) for count in (sums, slopes))
    parts = [slice(first, min(first + most, batch)) for first in range(0, batch, most)]
    passes = [_passes((p.stop - p.start, channels, *size), reach, on) for p in parts]
    counts = [last.programs for *_, last in passes]
    partials = x.new_empty(sum(counts), dtype=dtype)
    launches = list[Launch]()
    for part, grids, own in zip(parts, passes, partials.split(counts), strict=True):
        mine = {name: None if d is None else d[part] for name, d in (("d_x", d_x), ("d_y", d_y))}
        launches += _moments(x[part], y[part], reach, eps, mine, grids, between, maps, own, on)
        launches += _slopes(x[part], y[part], mine, grids, between, maps, on) if targets else ()
    return Plan(launches, partials)


_Targets = Mapping[str, Tensor | None]


def _moments(
    x: Tensor,
    y: Tensor,
    window: Sequence[int],
    eps: float,
    targets: _Targets,
    passes: Sequence[_Pass],
    between: Tensor,
    maps: Tensor,
    partials: Tensor,
    on: Architecture,
) -> Iterator[Launch]:
    """From images to the match and the maps of its slopes."""
    for p in passes:
        last = p is passes[-1]
        arguments: dict[str, Any] = {"size_x": x.shape[-1], "eps": bits(eps)}
        arguments |= {"maps": between, "out": maps if last else between, "partials": partials}
        constants = {"NDIM": x.ndim - 2, "WINDOW_Y": window[-2], "WINDOW_X": window[-1]}
        constants |= _constants(p, 0 if p is passes[0] else 5, x, targets, last=last)
        yield _launch(device.ncc_moments_kernel, p, x, y, arguments, constants, on)


def _slopes(
    x: Tensor, y: Tensor, targets: _Targets, passes: Sequence[_Pass], between: Tensor, maps: Tensor, on: Architecture
) -> Iterator[Launch]:
    """From those maps to the slopes."""
    count = 1 + 2 * sum(d is not None for d in targets.values())
    for p in passes:
        arguments = {"maps": maps if p is passes[0] else between, "out": between}
        arguments |= {name: maps if d is None else d for name, d in targets.items()}
        constants = _constants(p, count, x, targets, last=p is passes[-1])
        yield _launch(device.ncc_slopes_kernel, p, x, y, arguments, constants, on)


def _constants(p: _Pass, maps: int, x: Tensor, targets: _Targets, *, last: bool) -> dict[str, Any]:
    dtype, acc = accumulator(x)
    kept = p.window[0] * (maps or 5) * dtype.itemsize // 4
    return {
        "MAPS": maps, "LAST": last, "TO_X": last and targets["d_x"] is not None,
        "TO_Y": last and targets["d_y"] is not None, "WINDOW_R": p.window[0], "WINDOW_C": p.window[1],
        "KEEP": kept <= KEPT, "TILE": p.tile, "STEPS": p.steps, "ACC": acc,
    }  # fmt: skip


def _launch(
    kernel: Any, p: _Pass, x: Tensor, y: Tensor, own: dict[str, Any], constants: dict[str, Any], on: Architecture
) -> Launch:
    images = {"x": x, "y": y, "x_b": x.stride(0), "y_b": y.stride(0), "pixels": x.numel()}
    grid = {"per_sample": p.of_sample, "rows": p.rows, "columns": p.columns}
    return Launch(kernel, p.programs, chosen("warps", max(1, p.tile // on.warp)), images | grid | own, constants)
