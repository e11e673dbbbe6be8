"""The overview of any method: its images, overlays and fields, and the curves."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from coverfast.report.colours import INK, Array, dvf_to_rgb, grey, overlay
from coverfast.report.curves import loss_panel, merit_panel
from coverfast.report.gallery import Gallery
from coverfast.report.pictures import Plane
from coverfast.report.sheet import GAP, TITLE, Grid, Sheet, Tile, heading_sizes, text_width
from coverfast.report.strip import BELOW, FOOT, draw_strip, has_curves, strip_height

# Pictures side by side, at least and at most.
_FEWEST, _MOST = 5, 7
# Inches of a line of a title.
_LINE = 0.18
# Lines along the longest axis of a grid.
_LINES = 16


class _Picture(NamedTuple):
    """What stands under a title. rgb: of a plane, `(rows, columns, 3)`. grid: a field to draw as lines."""

    title: str
    note: str
    rgb: Callable[[Plane], Array]
    grid: Array | None = None


def gallery_sheet(gallery: Gallery, metrics: Mapping[str, Array]) -> Sheet:
    """Images, overlays and fields, in rows; below them the curves, and the colours of displacements.

    A volume is shown by three orthogonal slices, with the displacement in the plane of each. A field is shown in
    colours, and as the grid that it makes of a regular one.
    """
    planes = gallery.planes
    scales = _scales(gallery, planes)
    rows = _rows(gallery, scales)
    columns = max(_FEWEST, *map(len, rows))
    grid = Grid([plane.shape(gallery.size) for plane in planes], columns, len(planes) > 1)
    heads = [TITLE + max(_above(picture, grid.wide) for picture in row) for row in rows]

    wheels, drawn = sorted(set(scales.values()), reverse=True), has_curves(metrics)
    foot = TITLE + strip_height(grid) if drawn or wheels else 0.0
    sheet = Sheet(sum(heads) + len(rows) * grid.height + foot + (BELOW if drawn else FOOT))
    top = 0.0
    for row, head in zip(rows, heads, strict=True):
        _row(sheet, grid, planes, row, top + head)
        top += head + grid.height
    panels = [panel for panel in (loss_panel(metrics), merit_panel(metrics)) if panel] if drawn else []
    draw_strip(sheet, grid, top + TITLE, metrics, panels, wheels)
    sheet.footnote("; ".join(_about(gallery)))
    return sheet


def _scales(gallery: Gallery, planes: Sequence[Plane]) -> dict[str, float]:
    """The displacement of full colour, px, of each field; a few pixels may have longer ones.

    One for fields of like lengths, so that they can be compared, and another for those that would look like none.
    """
    longest = {}
    for title, field in gallery.fields.items():
        lengths = np.concatenate([np.hypot(*plane.field(field)).ravel() for plane in planes])
        lengths = lengths[np.isfinite(lengths)]
        longest[title] = float(np.quantile(lengths, 0.995)) if lengths.size else 0.0
    most = max(longest.values(), default=0.0) or 1.0
    less = max((length for length in longest.values() if 2 * length < most), default=0.0) or most
    return {title: less if 2 * length < most else most for title, length in longest.items()}


def _rows(gallery: Gallery, scales: Mapping[str, float]) -> list[list[_Picture]]:
    """All in one row if they fit; or else images in rows of their own, a field always beside its grid."""
    images = [[_Picture(title, "", partial(_image, image))] for title, image in gallery.images.items()]
    others = [[_Picture(title, "", partial(_overlaid, *pair))] for title, pair in gallery.overlays.items()]
    several = len(set(scales.values())) > 1
    for title, field in gallery.fields.items():
        note = f"mean {_mean_length(field):.3g} px"
        note += f", wheel of {scales[title]:.3g} px" if several else ""
        coloured = _Picture(title, note, partial(_coloured, field, scales[title]))
        others.append([coloured, _Picture("the same as a grid", "", partial(_blank, field), field)])
    rows = _filled([*images, *others])
    return rows if len(rows) == 1 else [*_filled(images), *_filled(others)]


def _filled(parts: Sequence[list[_Picture]]) -> list[list[_Picture]]:
    """Parts in rows of like lengths."""
    count = sum(map(len, parts))
    share = math.ceil(count / math.ceil(count / _MOST)) if count else 0
    rows: list[list[_Picture]] = []
    for part in parts:
        if not rows or len(rows[-1]) + len(part) > share:
            rows.append([])
        rows[-1].extend(part)
    return rows


def _image(image: Array, plane: Plane) -> Array:
    return grey(plane.cut(image))


def _overlaid(a: Array, b: Array, plane: Plane) -> Array:
    first, second = _image(a, plane), _image(b, plane)
    return overlay(first, second, np.ones(first.shape[:2], bool))


def _coloured(field: Array, scale: float, plane: Plane) -> Array:
    return dvf_to_rgb(plane.field(field), scale)


def _blank(field: Array, plane: Plane) -> Array:
    return np.ones((*plane.shape(field.shape[1:]), 3))


def _mean_length(field: Array) -> float:
    lengths = np.sqrt((field.astype(np.float64) ** 2).sum(axis=0))
    lengths = lengths[np.isfinite(lengths)]
    return float(lengths.mean()) if lengths.size else float("nan")


def _heading(picture: _Picture, wide: float) -> tuple[str, float]:
    """The title in lines that fit a width in inches, and how far it stands above its place, where the note needs it."""
    large, small = heading_sizes(wide)
    room = max(1, int(1.2 * len(picture.title) * wide / text_width(picture.title, large)))
    lines = textwrap.wrap(picture.title, room)
    while room > 1 and max(text_width(line, large) for line in lines) > wide:
        room -= 1
        lines = textwrap.wrap(picture.title, room)
    both = text_width(lines[0], large) + GAP + text_width(picture.note, small)
    apart = bool(picture.note) and (len(lines) > 1 or both > wide)
    return "\n".join(lines), _LINE * apart


def _above(picture: _Picture, wide: float) -> float:
    """Inches that the title takes above its place, beyond a first line."""
    name, above = _heading(picture, wide)
    return _LINE * name.count("\n") + above


def _row(sheet: Sheet, grid: Grid, planes: list[Plane], row: list[_Picture], top: float) -> None:
    for plane, size in zip(planes, grid.sizes, strict=True):
        up = plane.axis is not None
        if up:
            sheet.row_name(top, size[1], plane.name)
        for column, picture in enumerate(row):
            (name, above), note = _heading(picture, grid.wide), picture.note
            names = (name, note) if plane is planes[0] else ("", "")
            rgb = picture.rgb(plane)
            tile = sheet.tile(grid.column(column), top, size, rgb, *names, up=up, head=grid.wide, above=above)
            if picture.grid is not None:
                _draw_grid(sheet, tile, plane.field(picture.grid), _step(picture.grid.shape[1:]))
        top += size[1] + GAP


def _step(size: tuple[int, ...]) -> int:
    """Pixels between the lines of a grid."""
    return max(1, round(max(size) / _LINES))


def _draw_grid(sheet: Sheet, tile: Tile, field: Array, step: int) -> None:
    """A regular grid, pale, and where a field `(2, rows, columns)` takes it."""
    rows, columns = field.shape[1:]
    still = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1).astype(np.float64)
    # Far beyond the frame all places look alike.
    moved = still + np.clip(np.moveaxis(field, 0, -1), -10.0 * max(rows, columns), 10.0 * max(rows, columns))
    for places, colour, thick in ((still, "#d9d9d9", 0.6), (moved, INK, 0.8)):
        down, across = (range((size - 1) % step // 2, size, step) for size in (rows, columns))
        lines = [*(places[row] for row in down), *(places[:, column] for column in across)]
        sheet.lines(tile, lines, colour, thick)


def _about(gallery: Gallery) -> list[str]:
    """The sentences below the pictures."""
    volume, step = len(gallery.size) == 3, _step(gallery.size)
    channels = {len(image) for image in gallery.images.values()} - {1, 3}
    about = ["slices through the middle of the edges"] if volume else []
    about += ["displacement in the plane of each"] if volume and gallery.fields else []
    about += ["of images with other than 1 or 3 channels, the first"] if channels else []
    about += ["overlays: first image magenta, second green, grey where they agree"] if gallery.overlays else []
    about += [f"grids: where the field takes lines that lie {step} px apart"] if gallery.fields else []
    return about
