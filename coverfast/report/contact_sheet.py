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
from coverfast.report.class_colours import class_colours, label_overlay
from coverfast.samples import SPLITS, LabelClass, Sample
from coverfast.shards import Shard

PathLike = str | os.PathLike[str]

# Inches, and dots an inch; a caption line is LINE high, a character of it about CHARACTER wide.
WIDTH, MARGIN, GAP, TITLE, LINE, CHARACTER, DPI = 16.0, 0.25, 0.12, 0.45, 0.15, 0.068, 110
INK, FAINT = "#222222", "#8a8a8a"
# Pictures are kept no finer than this many pixels a side; the sheet shows fewer.
_FINEST = 1024
# Lines of a legend at most.
_LEGEND = 4


@dataclass(frozen=True)
class _Panel:
    """A picture `(rows, columns)`, uint8, row 0 at the bottom, its width and height in mm, and its class indices."""

    picture: NDArray[np.uint8]
    width: float
    height: float
    labels: NDArray[np.uint8] | None


@dataclass(frozen=True)
class _Tile:
    """A sample's panels and caption. classes: what the indices of its labels stand for."""

    panels: list[_Panel]
    caption: tuple[str, str]
    classes: tuple[LabelClass, ...]
    dtype: str
    range: tuple[float, float]

    @property
    def width(self) -> float:
        return sum(panel.width for panel in self.panels)

    @property
    def height(self) -> float:
        return max(panel.height for panel in self.panels)


def contact_sheet(
    paths: PathLike | Sequence[PathLike], out: PathLike, *, count: int = 48, split: str | None = None
) -> int:
    """Write a PNG of up to `count` samples, evenly spread over the shards at `paths`, and return their number.

    Every image is shown in [0, 1] as training sees it, the first channel of several, in its physical aspect ratio:
    2D as it is; a volume by its three middle slices, axial (seen from above), coronal and sagittal for volumes
    stored towards superior, anterior and right. Label maps lie over them in colours, outlined, with a legend of the
    classes that are to be seen; the caption says the class of the image. split: only samples of that one (train,
    val, test). No more than `count` samples are read. `InputError`: no path, a count below 1, no sample in the
    split, matplotlib not installed, a shard that is not sound, or a file that cannot be written.
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

    classes = sorted({tile.classes[i] for tile in tiles for i in _shown_classes(tile)})
    colours = class_colours(len(classes) + 1)
    entries = _legend(classes, colours[1:])
    title = TITLE + (0.1 + 1.6 * LINE * (1 + max(row for row, *_ in entries)) if entries else 0)

    # Every sample fills the same cell: one scale in mm would shrink the small ones to dots.
    aspect = float(np.clip(np.median([t.width / t.height for t in tiles]), 0.25, 6))
    columns = min(len(tiles), max(1, round(math.sqrt(1.5 * len(tiles) / aspect))))
    rows = math.ceil(len(tiles) / columns)
    wide = min((WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns, 5.0 * max(aspect, 1.0))
    tall = wide / aspect
    pitch = tall + 2 * LINE + 2 * GAP
    total_height = title + MARGIN + rows * pitch
    figure = Figure(figsize=(WIDTH, total_height), dpi=DPI, facecolor="white")
    # One set of axes in inches from the top left: hundreds of small ones would take minutes.
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(total_height, 0), autoscale_on=False)
    axes.set_axis_off()

    def write(x: float, y: float, text: str, size: float, colour: str, **style: Any) -> None:
        axes.text(x, y, text, fontsize=size, color=colour, parse_math=False, **{"va": "top"} | style)

    room = int((WIDTH - 2 * MARGIN) / (CHARACTER * 1.45))
    write(MARGIN, MARGIN * 0.7, _title(shards, tiles, total, split, room), 11.5, INK, weight="bold")
    for row, x, swatch, name in entries:
        y = TITLE + 1.6 * LINE * row
        if swatch is not None:
            axes.fill_between([x, x + LINE], y, y + LINE, color=swatch, linewidth=0)
        write(x + 1.5 * LINE, y + LINE / 2, name, 8.5, INK, va="center_baseline")
    for number, tile in enumerate(tiles):
        x = MARGIN + (number % columns) * (wide + GAP)
        y = title + number // columns * pitch
        scale = min(wide / tile.width, tall / tile.height)
        left = x + (wide - scale * tile.width) / 2
        own = colours[[0, *(1 + classes.index(c) if c in classes else 0 for c in tile.classes[1:])]]
        for panel in tile.panels:
            top = y + (tall - scale * panel.height) / 2
            extent = (left, left + scale * panel.width, top + scale * panel.height, top)
            shape: dict[str, Any] = {"extent": extent, "aspect": "auto", "origin": "lower"}
            axes.imshow(panel.picture, cmap="gray", vmin=0, vmax=255, **shape)
            if panel.labels is not None:
                axes.imshow(label_overlay(panel.labels, own), interpolation="nearest", **shape)
            left += scale * panel.width
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
                for i in indices[mine]:
                    sample = shard.read(int(i))
                    labels = None if sample.labels is None else shard.check_labels(int(i), sample.labels)
                    yield _tile(sample, labels, shard.label_classes)


def _tile(sample: Sample, labels: NDArray[np.uint8] | None, classes: tuple[LabelClass, ...]) -> _Tile:
    mm = sample.spacing
    everything = slice(None)
    cuts: list[tuple[tuple[Any, ...], float, float]]  # of S, and mm down and across
    if sample.pixels.ndim == 3:
        cuts = [((slice(None, None, -1), everything), mm[0], mm[1])]  # row 0 of a 2D image is at the top
    else:
        z, y, x = (size // 2 for size in sample.pixels.shape[1:])
        cuts = [
            ((z, everything, everything), mm[1], mm[2]),
            ((everything, y, everything), mm[0], mm[2]),
            ((everything, everything, x), mm[0], mm[1]),
        ]
    panels = []
    for cut, down, across in cuts:
        part = sample.pixels[(slice(1), *cut)]
        seen = None if labels is None else _thinned(labels[cut])
        picture = _grey(replace(sample, pixels=part))
        panels.append(_Panel(picture, part.shape[2] * across, part.shape[1] * down, seen))
    size = "x".join(map(str, sample.pixels.shape[1:]))
    channels = f"channel 1 of {len(sample.pixels)}, " if len(sample.pixels) > 1 else ""
    # Without a unit: 1 stands for unknown, too.
    spacing = "x".join(f"{v:.3g}" for v in (mm if len(set(mm)) > 1 else mm[:1]))
    target = f", {sample.target}" if sample.target else ""
    return _Tile(
        panels,
        (sample.source, f"{channels}{size} px, spacing {spacing}, {sample.split}{target}"),
        classes,
        sample.pixels.dtype.name,
        (sample.lo, sample.hi),
    )


def _thinned(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The middles of the blocks that `_grey` makes pixels of."""
    for axis, size in enumerate(labels.shape):
        block = max(1, size // _FINEST)
        labels = labels.take(range(block // 2, size - size % block, block), axis)
    return labels


def _shown_classes(tile: _Tile) -> list[int]:
    """The indices, but for the background, that its pictures show."""
    found = [np.unique(panel.labels) for panel in tile.panels if panel.labels is not None]
    return [int(i) for i in np.unique(np.concatenate(found)) if i > 0] if found else []


def _legend(
    classes: Sequence[LabelClass], colours: NDArray[np.float64]
) -> list[tuple[int, float, NDArray[np.float64] | None, str]]:
    """Line, place in inches, colour and name of every class, as many as there is room for."""
    entries: list[tuple[int, float, NDArray[np.float64] | None, str]] = []
    row, x = 0, MARGIN
    for number, (kind, colour) in enumerate(zip(classes, colours, strict=True)):
        name = shorten(kind.name if kind.name == str(kind.value) else f"{kind.value} {kind.name}", 40)
        width = 3 * LINE + len(name) * CHARACTER * 1.15
        if row == _LEGEND - 1 and x + width > WIDTH - MARGIN - 1.5:
            entries.append((row, x, None, f"and {len(classes) - number} more"))
            break
        if x + width > WIDTH - MARGIN:
            row, x = row + 1, MARGIN
        entries.append((row, x, colour, name))
        x += width
    return entries


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
