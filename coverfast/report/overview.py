"""The overview: both views, the true and the predicted field, the warp of every level, the curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from coverfast.report.colours import Array, dvf_to_rgb, grey, overlay
from coverfast.report.curves import RATIO, loss_panel
from coverfast.report.pictures import Pictures, Plane
from coverfast.report.sheet import GAP, TITLE, Grid, Sheet
from coverfast.report.strip import BELOW, FOOT, draw_strip, has_curves, strip_height


def overview_sheet(pictures: Pictures, metrics: Mapping[str, Array]) -> Sheet:
    """Views, fields, overlays and the warp of every level (COVER Fig. 7), and below them the curves, if there are.

    A volume is shown by three orthogonal slices, with the displacement in the plane of each; error and ratio are those
    of the whole.
    """
    p, planes = pictures, pictures.planes
    volume, channels = len(planes) > 1, len(pictures.x_a)
    grid = Grid([plane.shape(p.size) for plane in planes], max(6, len(p.warped) + 1), volume)
    block = TITLE + grid.height - GAP
    drawn = has_curves(metrics)
    sheet = Sheet(2 * block + TITLE + strip_height(grid) + (BELOW if drawn else FOOT))
    scale = _scale(p)
    top = TITLE
    for plane in planes:
        _row(sheet, grid, p, plane, top, block, scale)
        top += grid.sizes[planes.index(plane)][1] + GAP

    draw_strip(sheet, grid, 2 * block + TITLE, metrics, [loss_panel(metrics), RATIO] if drawn else [], [scale])
    about = ["slices through the middle of what is seen, displacement in the plane of each"] if volume else []
    about += [f"channel 1 of {channels}"] if channels not in (1, 3) else []
    about.append("a over b: a in magenta, b in green, grey where they agree; hatched: the truth points outside a")
    sheet.footnote("; ".join(about))
    return sheet


def _scale(p: Pictures) -> float:
    """The largest true displacement that is shown, px."""
    lengths = [np.hypot(*plane.field(p.dvf_true))[plane.cut(p.mask)[0].astype(bool)] for plane in p.planes]
    return float(np.concatenate(lengths).max(initial=0.0)) or 1.0


def _row(sheet: Sheet, grid: Grid, p: Pictures, plane: Plane, top: float, block: float, scale: float) -> None:
    """One plane: views, fields and overlays, and a `block` below the warps of all levels."""
    number, levels = p.planes.index(plane), len(p.warped)
    size, volume = grid.sizes[number], plane.axis is not None
    inside = plane.cut(p.mask)[0].astype(bool)
    a, b = grey(plane.cut(p.x_a)), grey(plane.cut(p.x_b))
    warps = [grey(plane.cut(w)) for w in p.warped]

    def show(column: int, rgb: Array, name: str, note: str = "", down: float = 0.0, **style: Any) -> None:
        names = (name, note) if number == 0 else ("", "")
        sheet.tile(grid.column(column), top + down, size, rgb, *names, up=volume, head=grid.wide, **style)

    if volume:
        sheet.row_name(top, size[1], plane.name)
        sheet.row_name(block + top, size[1], plane.name)
    predicted = plane.field(p.prediction)
    show(0, a, "view a")
    show(1, b, "view b")
    show(2, dvf_to_rgb(plane.field(p.dvf_true), scale), "true displacement", inside=inside)
    show(3, dvf_to_rgb(predicted, scale), "predicted", p.summary())
    show(4, overlay(a, b, inside), "a over b", "before", inside=inside)
    show(5, overlay(warps[-1], b, inside), "a over b", "after warping", inside=inside)
    for level, image in enumerate(warps):
        show(level, image, f"a warped, level {level}", f"stride {p.stride(level)}", block)
    show(levels, b, "view b", "target", block)
