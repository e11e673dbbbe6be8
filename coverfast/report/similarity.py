"""What is matched at a few marked pixels, level by level."""

from __future__ import annotations

import numpy as np

from coverfast.report.colours import VECTOR, Array, grey
from coverfast.report.curves import ramp_of
from coverfast.report.pictures import Pictures, Plane
from coverfast.report.sheet import MARGIN, TITLE, Grid, Sheet

_FOUND = "#00a5c8"
_DARK = np.array([0.16, 0.12, 0.36])


def similarity_sheet(pictures: Pictures) -> Sheet | None:
    """A row a marked pixel: where it lies in b, where in a, and the weights over the window of every level.

    None without a marked pixel.
    """
    p = pictures
    if not len(p.points):
        return None
    planes = [p.plane_of(point) for point in range(len(p.points))]
    grid = Grid([plane.shape(p.size) for plane in planes], max(7, len(p.similarity) + 2), named=False)
    talls = [max(grid.wide, min(tall, 2 * grid.wide)) for _, tall in grid.sizes]
    sheet = Sheet(sum(talls) + TITLE * len(talls) + 0.45)
    top = TITLE
    for point, (plane, tall) in enumerate(zip(planes, talls, strict=True)):
        _views(sheet, grid, p, point, plane, top, tall)
        for level in range(len(p.similarity)):
            _weights(sheet, grid, p, point, plane, level, top)
        top += tall + TITLE
    x = MARGIN
    for sign, colour, text in (
        ("+", VECTOR, "where the pixel truly lies"),
        ("o", _FOUND, "where the network finds it"),
        ("", "", "on a frame: beyond it;   squares: weights over the window, white 0, dark the largest (given above)"),
    ):
        if sign:
            sheet.sign(x + 0.06, sheet.height - 0.22, sign, colour, 8)
            x += 0.22
        sheet.write(x, sheet.height - 0.22, text, va="center")
        x += 2.0
    return sheet


def _views(sheet: Sheet, grid: Grid, p: Pictures, point: int, plane: Plane, top: float, tall: float) -> None:
    """The pixel in view b; in view a its true place, the predicted one and the windows of all levels."""
    here, place = p.points[point].astype(np.float64), tuple(p.points[point])
    true, found = (here + field[(slice(None), *place)] for field in (p.dvf_true, p.prediction))
    volume, target = plane.axis is not None, plane
    if plane.axis is not None:  # a slice of a through the true place
        target = Plane(plane.axis, int(np.clip(np.rint(true[plane.axis]), 0, plane.size - 1)), plane.size)
    size = (grid.wide, tall)
    b = sheet.tile(grid.column(0), top, size, grey(plane.cut(p.x_b)), f"{point + 1}  view b", plane.name, up=volume)
    sheet.mark(b, plane.within(here), "+", VECTOR)
    a = sheet.tile(grid.column(1), top, size, grey(target.cut(p.x_a)), "view a", target.name, up=volume)
    for level, colour in enumerate(ramp_of(len(p.similarity))):
        shape = np.array(p.similarity[level].shape[1:]) * p.stride(level)
        sheet.box(a, plane.within(p.windows[level][point]), plane.within(shape), colour)
    sheet.mark(a, plane.within(true), "+", VECTOR)
    sheet.mark(a, plane.within(found), "o", _FOUND)


def _weights(sheet: Sheet, grid: Grid, p: Pictures, point: int, plane: Plane, level: int, top: float) -> None:
    """The weights over the window of a level, summed across the plane; true and found vector in it."""
    weights = p.similarity[level][point]
    if plane.axis is not None:
        weights = weights.sum(plane.axis)
    largest = float(weights.max(initial=0.0))
    names = (f"level {level}, stride {p.stride(level)}", f"{largest:.2g}")
    size, frame = (grid.wide, grid.wide), ramp_of(len(p.similarity))[level]
    rgb = _shade(weights / largest if largest > 0 else weights)
    shown = sheet.tile(grid.column(level + 2), top, size, rgb, *names, up=plane.axis is not None, frame=frame)
    middle = np.array(weights.shape) // 2
    for vector, sign, colour in ((p.vectors_true[level][point], "+", VECTOR), (p.vectors[level][point], "o", _FOUND)):
        if np.isfinite(vector).all():
            sheet.mark(shown, plane.within(vector) + middle, sign, colour)


def _shade(weights: Array) -> Array:
    """0 to 1 as white to dark, `(H, W, 3)`."""
    return np.asarray(1 - np.nan_to_num(weights)[..., None] * (1 - _DARK))
