"""Pictures of predictions: label maps over their images, the true ones and the errors beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from coverfast.checks import require
from coverfast.disk import write_atomically
from coverfast.report.class_colours import class_colours, label_overlay
from coverfast.report.colours import INK, Array, grey
from coverfast.report.page import html_facts, html_page
from coverfast.report.pictures import Plane
from coverfast.report.sheet import GAP, MARGIN, TITLE, WIDTH, Grid, Sheet

#: What may be wrong with a pixel, and the colour it is shown in.
ERRORS = {"missed": (0.23, 0.51, 1.0), "too much": (1.0, 0.60, 0.10), "wrong class": (0.90, 0.20, 0.85)}
# Pixels of the longer side of a picture, at least and at most.
_FINE, _FINEST = 480, 1024
_LINE = 0.24


@dataclass(frozen=True)
class CaseView:
    """A case to show. image: `(C, *S)` in [0, 1]. prediction, truth: class indices `(*S)`, 0 is the background; None
    where there is none. spacing: mm along S. note: a line on it.
    """

    name: str
    image: Array
    spacing: Sequence[float]
    prediction: Array | None = None
    truth: Array | None = None
    note: str = ""

    def __post_init__(self) -> None:
        size = self.image.shape[1:]
        require(len(size) in (2, 3), f"image must be (C, *S) with 2 or 3 spatial axes, got {self.image.shape}")
        require(len(self.spacing) == len(size), f"spacing must be {len(size)} numbers, got {tuple(self.spacing)}")
        for name, labels in (("prediction", self.prediction), ("truth", self.truth)):
            require(
                labels is None or labels.shape == size,
                f"{name} must be on the grid of the image, {size}, got {getattr(labels, 'shape', None)}",
            )

    @property
    def planes(self) -> list[Plane]:
        """All of an image; of a volume the slices across each axis with most errors, or else with most foreground."""
        size = self.image.shape[1:]
        if len(size) == 2:
            return [Plane()]
        shown = [self.prediction != self.truth] if self.prediction is not None and self.truth is not None else []
        shown += [labels > 0 for labels in (self.truth, self.prediction) if labels is not None]
        counted = next((mask for mask in shown if mask.any()), None)
        if counted is None:
            return [Plane(axis, size[axis] // 2, size[axis]) for axis in range(3)]
        others = [tuple(a for a in range(3) if a != axis) for axis in range(3)]
        return [Plane(axis, int(counted.sum(axis=others[axis]).argmax()), size[axis]) for axis in range(3)]


def case_sheet(view: CaseView, names: Sequence[str]) -> Sheet:
    """Image, truth, prediction and errors side by side; of a volume three orthogonal slices, one below the other.

    names: of the classes.
    """
    assert view.truth is not None
    assert view.prediction is not None
    planes = view.planes
    grid = Grid([_shape(view, plane) for plane in planes], 4, len(planes) > 1)
    legend = [*_classes(names, view), *((f"error: {name}", colour) for name, colour in ERRORS.items())]
    sheet = Sheet(TITLE + grid.height + _legend_height(legend))
    colours, top = class_colours(len(names)), TITLE
    for plane, size in zip(planes, grid.sizes, strict=True):
        image = grey(_fine(view, plane, view.image))
        truth, found = (_fine(view, plane, labels[None])[0] for labels in (view.truth, view.prediction))
        tiles = {
            "image": image,
            "truth": overlaid(image, truth, colours),
            "prediction": overlaid(image, found, colours),
            "errors": overlaid(image, _errors(found, truth), np.array([(0, 0, 0), *ERRORS.values()]), fill=0.6),
        }
        first = top == TITLE
        for column, (name, rgb) in enumerate(tiles.items()):
            sheet.tile(
                *(grid.column(column), top, size, rgb, name if first else ""),
                view.note if first and name == "prediction" else "",
                up=plane.axis is not None,
                head=grid.wide,
            )
        if plane.axis is not None:
            sheet.row_name(top, size[1], plane.name)
        top += size[1] + GAP
    _draw_legend(sheet, top + 0.1, legend)
    return sheet


def overlay_sheet(view: CaseView, names: Sequence[str]) -> Sheet:
    """An image, and below a volume's slices or beside a 2D image the prediction over it, if there is one."""
    planes = view.planes
    labelled = view.prediction is not None
    columns = len(planes) if len(planes) > 1 else 2
    grid = Grid([_shape(view, plane) for plane in planes], columns, False)
    tall = max(size[1] for size in grid.sizes)
    legend = _classes(names, view) if labelled else []
    rows = 2 if labelled and len(planes) > 1 else 1
    sheet = Sheet(TITLE + rows * (tall + GAP) + _legend_height(legend))
    colours = class_colours(len(names))
    for number, (plane, size) in enumerate(zip(planes, grid.sizes, strict=True)):
        image, up = grey(_fine(view, plane, view.image)), plane.axis is not None
        name, note = (plane.name, view.note if number == 0 else "") if up else ("image", "")
        sheet.tile(grid.column(number), TITLE, size, image, name, note, up=up, head=grid.wide)
        if view.prediction is not None:
            rgb = overlaid(image, _fine(view, plane, view.prediction[None])[0], colours)
            place = (grid.column(number), TITLE + tall + GAP) if up else (grid.column(1), TITLE)
            sheet.tile(*place, size, rgb, "" if up else "prediction", "" if up else view.note, up=up, head=grid.wide)
    _draw_legend(sheet, TITLE + rows * (tall + GAP) + 0.1, legend)
    return sheet


def write_page(
    folder: Path,
    title: str,
    about: Mapping[str, object],
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    pictures: Sequence[tuple[str, str, Sheet]],
) -> Path:
    """Write `index.html` with facts, a table (its headings and rows) and pictures, and the pictures; return the page.

    pictures: name of the file without suffix, what it shows, the sheet. The folder must be there.
    """
    headings, rows = table
    parts = [f"<h1>{escape(title)}</h1>", html_facts(about)]
    lines = ["".join(f'<th class="number">{escape(h)}</th>' for h in headings)]
    lines += ["".join(f'<td class="number">{escape(cell)}</td>' for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    parts.append(f'<h2>Figures</h2>\n<div class="scroll"><table>{body}</table></div>')
    for name, caption, sheet in pictures:
        write_atomically(folder / f"{name}.png", sheet.png())
        image = f'<img src="{name}.png" alt="{escape(caption)}">'
        parts += [f"<h2>{escape(name.capitalize())}</h2>", f"<p>{escape(caption)}</p>"]
        parts.append(f'<a class="scroll" href="{name}.png">{image}</a>')
    page = folder / "index.html"
    write_atomically(page, html_page(title, parts))
    return page


def overlaid(image: Array, labels: Array, colours: Array, fill: float = 0.35) -> Array:
    """Class indices `(H, W)` in colour over a picture `(H, W, 3)`: a veil of strength `fill`, and outlines."""
    veil = label_overlay(labels, colours, fill)
    return np.asarray(image + (veil[..., :3] - image) * veil[..., 3:])


def _errors(found: Array, truth: Array) -> Array:
    """0 where right, otherwise the place of the kind of error in `ERRORS`, from 1."""
    wrong = found != truth
    kinds = np.where(found == 0, 1, np.where(truth == 0, 2, 3))
    return np.where(wrong, kinds, 0)


def _shape(view: CaseView, plane: Plane) -> tuple[int, int]:
    """Rows and columns of the picture of a plane, in square pixels; all planes at one scale."""
    size = view.image.shape[1:]
    extent = [s * mm for s, mm in zip(size, view.spacing, strict=True)]
    scale = float(np.clip(max(size), _FINE, _FINEST)) / max(extent)
    high, wide = (max(1, round(v * scale)) for axis, v in enumerate(extent) if axis != plane.axis)
    return high, wide


def _fine(view: CaseView, plane: Plane, array: Array) -> Array:
    """A plane of `(C, *S)` in the pixels of its picture, each that of the nearest one."""
    cut = plane.cut(array)
    shape = _shape(view, plane)
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(int), old - 1)
        for new, old in zip(shape, cut.shape[1:], strict=True)
    )
    return cut[:, rows[:, None], columns]


def _classes(names: Sequence[str], view: CaseView) -> list[tuple[str, Any]]:
    """Names and colours of the foreground classes that the case has."""
    colours = class_colours(len(names))
    maps = [labels for labels in (view.truth, view.prediction) if labels is not None]
    there = sorted(set().union(*(np.unique(labels).tolist() for labels in maps)) - {0})
    return [(names[k], colours[k]) for k in there]


def _places(legend: Sequence[tuple[str, Any]]) -> list[tuple[float, int]]:
    """Where each entry of a legend begins: inches from the left, and its line."""
    places, left, line = [], MARGIN, 0
    for name, _ in legend:
        long = 0.42 + 0.085 * len(name)
        if left + long > WIDTH - MARGIN and left > MARGIN:
            left, line = MARGIN, line + 1
        places.append((left, line))
        left += long
    return places


def _legend_height(legend: Sequence[tuple[str, Any]]) -> float:
    return 0.25 + _LINE * (_places(legend)[-1][1] + 1) if legend else 0.15


def _draw_legend(sheet: Sheet, top: float, legend: Sequence[tuple[str, Any]]) -> None:
    from matplotlib.patches import Rectangle

    for (name, colour), (left, line) in zip(legend, _places(legend), strict=True):
        down = top + line * _LINE
        sheet.canvas.add_patch(Rectangle((left, down), 0.16, 0.16, facecolor=tuple(colour), edgecolor="#bbbbbb"))
        sheet.write(left + 0.23, down + 0.08, name, 10, INK, va="center")
