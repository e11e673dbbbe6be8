"""The local normalised cross-correlation in Triton: plans the launches of the kernels in `ncc_device`.

A batch is served in parts, and in 3D the walks along z of a part in chunks, so that the maps between passes do not grow
with the batch and stay near the second-level cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

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
#: Bytes of the maps of a part, and of the slopes' maps of a chunk, unless one sample or column needs more.
PART, CHUNK = 48 * 2**20, 12 * 2**20
#: Maps of moments: x, y, x^2, y^2, x y.
MOMENTS = 5


def launches(
    x: Tensor,
    y: Tensor,
    window: Sequence[int],
    eps: float,
    d_x: Tensor | None,
    d_y: Tensor | None,
    partials: list[Tensor],
    on: Architecture | None = None,
) -> Iterator[Launch]:
    """The launches that sum the match, to be run one by one; they fill tensors that are added to `partials`, and d_x
    and d_y where these are given: the slopes of the sum by x and y, `(B, C, *S)`, contiguous, in the accumulator.
    """
    x, y = (image if image[:1].is_contiguous() else image.contiguous() for image in (x, y))
    on, (dtype, _), (batch, channels, *size) = on or architecture_of(x), accumulator(x), x.shape
    if not batch:
        return
    # A window that reaches beyond the grid on both sides of every pixel is as good as a narrower one.
    reach = tuple(2 * min(w // 2, s - 1) + 1 for w, s in zip(window, size, strict=True))
    wanted = (d_x is not None) + (d_y is not None)
    slopes, moments = 1 + 2 * wanted if wanted else 0, MOMENTS * (len(size) - 2)
    sample, columns = channels * prod(size) * dtype.itemsize, prod(size[1:])
    parts = _shares(batch, PART // max(1, (moments or slopes) * sample))
    lines = parts[0].stop * channels * size[0]  # of the first part, the largest
    chunks = _shares(columns, CHUNK // (slopes * lines * dtype.itemsize) if moments and slopes else columns)
    between = x.new_empty((moments, lines, columns), dtype=dtype)
    maps = x.new_empty(slopes * lines * chunks[0].stop, dtype=dtype)
    for part in parts:
        d = {name: None if target is None else target[part] for name, target in (("d_x", d_x), ("d_y", d_y))}
        yield from _Part(x[part], y[part], d, reach, eps, on).launches(chunks, between, maps, partials)


def _shares(count: int, most: int) -> list[slice]:
    """Even runs of `count` items, of `most` or one at most; the first is the longest."""
    each = -(-count // -(-count // max(1, most)))
    return [slice(first, min(first + each, count)) for first in range(0, count, each)]


@dataclass(frozen=True)
class _Grid:
    """What a pass serves, and how programs share it."""

    outer: int
    rows: int
    columns: int
    window: tuple[int, ...]
    on: Architecture

    @property
    def tile(self) -> int:
        """Lanes of a program: the most that waste the fewest."""
        tiles = [t for p in range(LANES.bit_length()) if (t := 1 << p) >= self.on.warp]
        return chosen("tile", min(reversed(tiles), key=lambda t: -(-self.columns // t) * t))

    @property
    def steps(self) -> int:
        """Rows of a walk: the most that leave enough of them."""
        steps, walks = LONG, self.outer * -(-self.columns // self.tile)
        while steps > SHORT and walks * -(-self.rows // steps) < EACH * self.on.processors:
            steps //= 2
        return chosen("rows", steps)

    @property
    def programs(self) -> int:
        return self.outer * -(-self.rows // self.steps) * -(-self.columns // self.tile)


@dataclass(frozen=True)
class _Part:
    """Some samples of a batch, and the slopes that are wanted of them."""

    x: Tensor
    y: Tensor
    d: dict[str, Tensor | None]
    window: tuple[int, ...]
    eps: float
    on: Architecture

    def launches(
        self, chunks: Sequence[slice], between: Tensor, maps: Tensor, partials: list[Tensor]
    ) -> Iterator[Launch]:
        """In 2D a pass for the match and the maps that make its slopes, and one for these. In 3D two passes along z
        stand between passes within planes, in whose memory the slopes' maps replace the moments that they are made of.
        """
        batch, channels, *size = self.x.shape
        volume, lines = len(size) == 3, batch * channels * size[0]
        slopes = 1 + 2 * sum(d is not None for d in self.d.values())
        flat = _Grid(prod(self.x.shape[:-2]), size[-2], size[-1], self.window[-2:], self.on)
        if volume:
            yield self._moments(flat, None, between[:, :lines].unflatten(2, size[1:]).flatten(1, 2))
        for chunk in chunks:
            count = chunk.stop - chunk.start
            grid = _Grid(batch * channels, size[0], count, (self.window[0], 1), self.on) if volume else flat
            own = maps[: slopes * lines * count].view(-1, lines, count)
            moments = between[:, :lines, chunk] if volume else None
            partials.append(maps.new_empty(grid.programs))
            yield self._moments(grid, moments, own, partials[-1], chunk.start)
            if volume and len(own):
                yield self._slopes(grid, own, between[:slopes, :lines, chunk])
        if len(maps):
            source = between[:slopes, :lines].unflatten(2, size[1:]).flatten(1, 2) if volume else own
            yield self._slopes(flat, source, None)

    def _moments(
        self, grid: _Grid, source: Tensor | None, out: Tensor, partials: Tensor | None = None, column: int = 0
    ) -> Launch:
        """A pass over the images, or over maps `(5, lines, columns)`; the last one has `partials`."""
        arguments = {"partials": out if partials is None else partials, "column": column, "eps": bits(self.eps)}
        arguments |= {"size_x": self.x.shape[-1]}
        constants = {"NDIM": self.x.ndim - 2, "WINDOW_Y": self.window[-2], "WINDOW_X": self.window[-1]}
        return self._launch(device.ncc_moments_kernel, grid, source, out, partials is not None, arguments, constants)

    def _slopes(self, grid: _Grid, source: Tensor, out: Tensor | None) -> Launch:
        """A pass over maps `(3 or 5, lines, columns)`; the last one has no `out`."""
        arguments = {name: source if d is None else d for name, d in self.d.items()}
        to = source if out is None else out
        return self._launch(device.ncc_slopes_kernel, grid, source, to, out is None, arguments, {})

    def _launch(
        self,
        kernel: Any,
        grid: _Grid,
        source: Tensor | None,
        out: Tensor,
        last: bool,
        own: dict[str, Any],
        constants: dict[str, Any],
    ) -> Launch:
        maps, (dtype, acc) = 0 if source is None else len(source), accumulator(self.x)
        arguments = {
            "x": self.x, "y": self.y, "maps": out if source is None else source, "out": out,
            "x_b": self.x.stride(0), "y_b": self.y.stride(0), "apart": 0 if source is None else source.stride(0),
            "pitch": 0 if source is None else source.stride(1), "out_apart": out.stride(0), "out_pitch": out.stride(1),
            "per_sample": self.x[:1].numel() // (grid.rows * grid.columns), "rows": grid.rows, "columns": grid.columns,
        }  # fmt: skip
        kept = grid.window[0] * (maps or MOMENTS) * dtype.itemsize // 4
        constants = constants | {
            "MAPS": maps, "LAST": last, **{f"TO_{n[-1].upper()}": last and d is not None for n, d in self.d.items()},
            "WINDOW_R": grid.window[0], "WINDOW_C": grid.window[1], "KEEP": kept <= KEPT, "TILE": grid.tile,
            "STEPS": grid.steps, "ACC": acc,
        }  # fmt: skip
        warps = chosen("warps", max(1, grid.tile // self.on.warp))
        return Launch(kernel, grid.programs, warps, arguments | own, constants)
