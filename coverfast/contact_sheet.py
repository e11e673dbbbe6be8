"""A picture of what shards hold, as the network sees it."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, check_choice, require
from coverfast.disk import write_atomically
from coverfast.samples import SPLITS, Sample
from coverfast.shards import Shard

PathLike = str | os.PathLike[str]

# Inches, and dots an inch; a caption line is LINE high, a character of it about CHARACTER wide.
WIDTH, MARGIN, GAP, TITLE, LINE, CHARACTER, DPI = 16.0, 0.25, 0.12, 0.45, 0.15, 0.068, 110
INK, FAINT = "#222222", "#8a8a8a"
# Pictures are kept no finer than this many pixels a side; the sheet shows fewer.
_FINEST = 1024


@dataclass(frozen=True)
class _Tile:
    """Panels `(rows, columns)`, uint8, row 0 at the bottom, each with its width and height in mm, and a caption."""

    panels: list[tuple[NDArray[np.uint8], float, float]]
    caption: tuple[str, str]
    dtype: str
    range: tuple[float, float]

    @property
    def width(self) -> float:
        return sum(width for _, width, _ in self.panels)

    @property
    def height(self) -> float:
        return max(height for _, _, height in self.panels)


def contact_sheet(
    paths: PathLike | Sequence[PathLike], out: PathLike, *, count: int = 48, split: str | None = None
) -> int:
    """Write a PNG of up to `count` samples, evenly spread over the shards at `paths`, and return their number.

    Every image is shown in [0, 1] as training sees it, the first channel of several, in its physical aspect ratio:
    2D as it is; a volume by its three middle slices, axial (seen from above), coronal and sagittal for volumes
    stored towards superior, anterior and right. split: only samples of that one (train, val, test). No more than
    `count` samples are read. `InputError`: no path, a count below 1, no sample in the split, matplotlib not
    installed, a shard that is not sound, or a file that cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("drawing needs the extra: pip install coverfast[plots]") from error
    shards = [Path(p) for p in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    require(len(shards) > 0, "paths must be at least 1 shard, got none")
    require(isinstance(count, int) and count >= 1, f"count must be an int of at least 1, got {count!r}")
    if split is not None:
        check_choice("split", split, SPLITS)
    found = [_indices(path, split) for path in shards]
    total = sum(map(len, found))
    require(total > 0, f"the split {split} must have at least 1 sample, got 0 in {', '.join(map(str, shards))}")
    tiles = list(_tiles(shards, found, min(count, total)))

    # Every sample fills the same cell: one scale in mm would shrink the small ones to dots.
    aspect = float(np.clip(np.median([t.width / t.height for t in tiles]), 0.25, 6))
    columns = min(len(tiles), max(1, round(math.sqrt(1.5 * len(tiles) / aspect))))
    rows = math.ceil(len(tiles) / columns)
    wide = min((WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns, 5.0 * max(aspect, 1.0))
    tall = wide / aspect
    pitch = tall + 2 * LINE + 2 * GAP
    total_height = TITLE + MARGIN + rows * pitch
    figure = Figure(figsize=(WIDTH, total_height), dpi=DPI, facecolor="white")
    # One set of axes in inches from the top left: hundreds of small ones would take minutes.
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(total_height, 0), autoscale_on=False)
    axes.set_axis_off()

    def write(x: float, y: float, text: str, size: float, colour: str, **style: Any) -> None:
        axes.text(x, y, text, fontsize=size, color=colour, parse_math=False, va="top", **style)

    room = int((WIDTH - 2 * MARGIN) / (CHARACTER * 1.45))
    write(MARGIN, MARGIN * 0.7, _title(shards, tiles, total, split, room), 11.5, INK, weight="bold")
    for number, tile in enumerate(tiles):
        x = MARGIN + (number % columns) * (wide + GAP)
        y = TITLE + number // columns * pitch
        scale = min(wide / tile.width, tall / tile.height)
        left = x + (wide - scale * tile.width) / 2
        for picture, width, height in tile.panels:
            top = y + (tall - scale * height) / 2
            extent = (left, left + scale * width, top + scale * height, top)
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=extent, aspect="auto", origin="lower")
            left += scale * width
        for line, (text, colour) in enumerate(zip(tile.caption, (INK, FAINT), strict=True)):
            write(x, y + tall + 0.05 + line * LINE, shorten(text, int(wide / CHARACTER)), 7.5, colour)
    axes.set(xlim=(0, WIDTH), ylim=(total_height, 0))
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        figure.savefig(image, format="png", dpi=DPI)
    write_atomically(Path(out), image.getvalue())
    return len(tiles)


def shorten(text: str, length: int) -> str:
    """Cut the middle of a text to `length` characters (at least 5); what does not print becomes "?"."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    length = max(length, 5)
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def _indices(path: Path, split: str | None) -> NDArray[np.int64]:
    with Shard(path) as shard:
        if split is None:
            return np.arange(len(shard))
        return np.flatnonzero(shard.splits == SPLITS.index(split))


def _tiles(shards: list[Path], found: list[NDArray[np.int64]], count: int) -> Iterator[_Tile]:
    """A tile of every `total / count`-th sample, one shard open at a time."""
    ends = np.cumsum([len(f) for f in found])
    picks = np.arange(count) * ends[-1] // count
    for path, indices, end in zip(shards, found, ends, strict=True):
        mine = picks[(picks < end) & (picks >= end - len(indices))] - (end - len(indices))
        if mine.size:
            with Shard(path) as shard:
                yield from (_tile(shard.read(int(i))) for i in indices[mine])


def _tile(sample: Sample) -> _Tile:
    stored, mm = sample.pixels[:1], sample.spacing
    if stored.ndim == 3:
        panels = [(stored[:, ::-1], mm[0], mm[1])]  # row 0 of a 2D image is at the top
    else:
        z, y, x = (size // 2 for size in stored.shape[1:])
        panels = [
            (stored[:, z], mm[1], mm[2]),
            (stored[:, :, y], mm[0], mm[2]),
            (stored[:, :, :, x], mm[0], mm[1]),
        ]
    size = "x".join(map(str, sample.pixels.shape[1:]))
    channels = f"channel 1 of {len(sample.pixels)}, " if len(sample.pixels) > 1 else ""
    # Without a unit: 1 stands for unknown, too.
    spacing = "x".join(f"{v:.3g}" for v in (mm if len(set(mm)) > 1 else mm[:1]))
    return _Tile(
        [
            (_grey(replace(sample, pixels=picture)), picture.shape[2] * across, picture.shape[1] * down)
            for picture, down, across in panels
        ],
        (sample.source, f"{channels}{size} px, spacing {spacing}, {sample.split}"),
        sample.pixels.dtype.name,
        (sample.lo, sample.hi),
    )


def _grey(sample: Sample) -> NDArray[np.uint8]:
    """The first channel in [0, 255], by means of blocks where it is finer than the sheet can show."""
    image = sample.normalised()[0]
    for axis, size in enumerate(image.shape):
        block = size // _FINEST
        if block > 1:
            blocks = np.arange(0, size - size % block, block)
            image = np.add.reduceat(image.take(range(size - size % block), axis), blocks, axis) / block
    return np.rint(image * 255).astype(np.uint8)


def _title(shards: list[Path], tiles: list[_Tile], total: int, split: str | None, room: int) -> str:
    more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
    low, high = min(t.range[0] for t in tiles), max(t.range[1] for t in tiles)
    dtypes = ", ".join(sorted({t.dtype for t in tiles}))
    samples = f"{len(tiles):,} of {total:,} sample{'s' * (total != 1)}{f' ({split})' if split else ''}"
    facts = f"{more}  ·  {samples}  ·  {dtypes}  ·  {low:g} to {high:g} shown as black to white"
    return shorten(str(shards[0]), room - len(facts)) + facts
