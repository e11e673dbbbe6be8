"""What stands at the foot of an overview: curves, and what the colours of displacements mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from coverfast.report.colours import INK, Array, dvf_to_rgb
from coverfast.report.curves import Panel
from coverfast.report.sheet import GAP, MARGIN, WIDTH, Grid, Sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Below the frames of curves, for their numbers and a footnote; for a footnote alone; inches.
BELOW, FOOT = 0.82, 0.4


def has_curves(metrics: Mapping[str, Array]) -> bool:
    return bool(np.isfinite(metrics.get("loss", np.empty(0))).any())


def strip_height(grid: Grid) -> float:
    """Of the frames at the foot, inches."""
    return float(np.clip(grid.sizes[0][1], 2.3, 2.6))


def draw_strip(
    sheet: Sheet, grid: Grid, top: float, metrics: Mapping[str, Array], panels: Sequence[Panel], scales: Sequence[float]
) -> None:
    """Two panels side by side, as far as there are, and at the right a wheel of colours for each scale, px."""
    tall = strip_height(grid)
    first = grid.columns - len(scales)
    half = ((grid.column(first) if scales else WIDTH - MARGIN + GAP) - grid.left - 1.3) / 2
    for panel, left in zip(panels, (grid.left + 0.45, grid.left + half + 1.05), strict=False):
        panel.draw(sheet.axes(left, top, half, tall), metrics)
    for number, scale in enumerate(scales):
        _wheel(sheet.axes(grid.column(first + number), top, grid.wide, tall), scale, up=grid.named)


def _wheel(axes: Axes, scale: float, *, up: bool) -> None:
    """The colour of every displacement up to `scale` px, as a disc; directions are those of the pictures."""
    at = np.linspace(-1, 1, 301)
    dvf = np.stack(np.meshgrid(at, at, indexing="ij")) * scale
    alpha = np.clip((1 - np.hypot(dvf[0], dvf[1]) / scale) * 150, 0, 1)
    rgba = np.dstack([dvf_to_rgb(dvf, scale), alpha])
    axes.imshow(rgba[::-1] if up else rgba, extent=(-1, 1, 1, -1), interpolation="bilinear")
    wide, high = axes.bbox.size
    axes.set(xlim=(-1.15, 1.75), ylim=(2.9 * high / wide - 1.15, -1.15), aspect="equal")
    axes.axis("off")
    axes.set_title("displacement", loc="left", fontsize=10.5, color=INK, pad=5)
    axes.contour(at, at, np.hypot(dvf[0], dvf[1]) / scale, [0.5], colors=INK, linewidths=0.5, alpha=0.4)
    axes.plot([0, 1], [0, 0], color=INK, linewidth=0.8)
    axes.text(0.5, 0.03, f"{scale / 2:.3g}", fontsize=8.5, color=INK, ha="center", va="top")
    axes.text(1.05, 0.0, f"{scale:.3g} px", fontsize=9, color=INK, ha="left", va="center")
