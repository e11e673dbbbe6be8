"""A figure laid out in inches from its top left, so that tiles align and text never meets text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from coverfast.checks import InputError
from coverfast.report.colours import FAINT, INK, Array

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Inches, and dots an inch.
WIDTH, DPI = 16.0, 110
MARGIN, GAP, TITLE = 0.25, 0.12, 0.42
#: What one column of text takes at the left of rows that have names.
_ROW_NAME = 0.22


def need_matplotlib() -> None:
    """Raise `InputError` unless matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError("drawing needs the extra: pip install coverfast[plots]") from error


def heading_sizes(wide: float) -> tuple[float, float]:
    """Points of the letters of a name and of a note above a picture of a width in inches."""
    small = min(1.0, wide / 2.4)
    return 10.5 * small, 9 * small


def text_width(text: str, size: float) -> float:
    """Inches that a line takes."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return float(text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)[0]) / 72


@dataclass(frozen=True)
class Grid:
    """Columns of equal width for pictures of the given `(rows, columns)` in pixels, one below the other, at one scale.

    named: with room for names at the left.
    """

    shapes: Sequence[tuple[int, int]]
    columns: int
    named: bool

    @property
    def left(self) -> float:
        return MARGIN + (_ROW_NAME if self.named else 0.0)

    @property
    def wide(self) -> float:
        """Of a column, without the gap."""
        return (WIDTH - MARGIN - self.left - (self.columns - 1) * GAP) / self.columns

    @property
    def sizes(self) -> list[tuple[float, float]]:
        """Width and height of each picture, in inches."""
        inch = self.wide / max(wide for _, wide in self.shapes)
        return [(w * inch, float(np.clip(t * inch, 0.25 * self.wide, 4 * self.wide))) for t, w in self.shapes]

    @property
    def height(self) -> float:
        """Of all the pictures and the gaps below them."""
        return sum(tall + GAP for _, tall in self.sizes)

    def column(self, number: int) -> float:
        return self.left + number * (self.wide + GAP)


@dataclass(frozen=True)
class Tile:
    """An image `(rows, columns, 3)` on a sheet: its place and size in inches. up: row 0 is at the bottom."""

    rgb: Array
    left: float
    top: float
    wide: float
    tall: float
    up: bool
    name: str = ""
    note: str = ""
    inside: Array | None = None

    def at(self, row: Any, column: Any) -> tuple[Any, Any]:
        """Where a pixel lies on the sheet, (x, y) in inches; arrays of them for arrays."""
        rows, columns = self.rgb.shape[:2]
        down = (row + 0.5) / rows
        return self.left + self.wide * (column + 0.5) / columns, self.top + self.tall * (1 - down if self.up else down)


@dataclass
class Sheet:
    """A white figure of WIDTH by `height` inches. Tiles share one set of axes: one set each would take seconds."""

    height: float
    tiles: list[Tile] = field(default_factory=list)

    def __post_init__(self) -> None:
        need_matplotlib()
        from matplotlib.figure import Figure

        self.figure: Figure = Figure(figsize=(WIDTH, self.height), dpi=DPI, facecolor="white")
        self.canvas: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.canvas.set(xlim=(0, WIDTH), ylim=(self.height, 0), autoscale_on=False)
        self.canvas.set_axis_off()

    def axes(self, left: float, top: float, wide: float, tall: float) -> Axes:
        """Axes whose frame has this place and size."""
        bottom = 1 - (top + tall) / self.height
        return self.figure.add_axes((left / WIDTH, bottom, wide / WIDTH, tall / self.height))

    def write(self, left: float, top: float, text: str, size: float = 8.5, colour: str = FAINT, **style: Any) -> None:
        """Text whose top left is here."""
        self.canvas.text(left, top, text, fontsize=size, color=colour, **{"va": "top", "parse_math": False, **style})

    def row_name(self, top: float, tall: float, text: str) -> None:
        """The name of a row of tiles, along its left side."""
        self.write(MARGIN + 0.03, top + tall / 2, text, 9, INK, rotation=90, ha="left", va="center")

    def footnote(self, text: str) -> None:
        self.write(MARGIN, self.height - 0.14, text, va="bottom")

    def tile(
        self,
        left: float,
        top: float,
        size: tuple[float, float],
        rgb: Array,
        name: str = "",
        note: str = "",
        *,
        inside: Array | None = None,
        up: bool = False,
        frame: str = "",
        head: float | None = None,
        above: float = 0.0,
    ) -> Tile:
        """Show an image as large as it fits into `size`; hatched where it is not `inside`.

        Its name and a note stand above, over a width of `head`, by default that of `size`; the name `above` the note's
        place, in inches. frame: its colour.
        """
        from matplotlib.patches import Rectangle

        rows, columns = rgb.shape[:2]
        scale = min(size[0] / columns, size[1] / rows)
        made = Tile(rgb, left, top, columns * scale, rows * scale, up, name, note, inside)
        box = ((left, top), made.wide, made.tall)
        if inside is not None:
            hatched = {"facecolor": "#dcdcdc", "edgecolor": "#b4b4b4", "hatch": "////", "linewidth": 0, "zorder": -1}
            self.canvas.add_patch(Rectangle(*box, **hatched))  # type: ignore[arg-type]
            rgb = np.dstack([rgb, inside])
        extent = (left, left + made.wide, top + made.tall, top)
        self.canvas.imshow(rgb, extent=extent, aspect="auto", origin="lower" if up else "upper")
        edge, thick = (frame, 2.0) if frame else ("#bbbbbb", 0.6)
        self.canvas.add_patch(Rectangle(*box, fill=False, edgecolor=edge, linewidth=thick))
        head = size[0] if head is None else head
        large, small = heading_sizes(head)
        self.write(left, top - 0.06 - above, name, large, INK, va="bottom")
        self.write(left + head, top - 0.06, note, small, va="bottom", ha="right")
        self.tiles.append(made)
        return made

    def mark(self, tile: Tile, place: Array, sign: str, colour: str) -> None:
        """A sign at a place `(row, column)` in pixels, on the frame where that lies beyond it."""
        row, column = np.clip(place, -0.5, np.array(tile.rgb.shape[:2]) - 0.5)
        self.sign(*tile.at(row, column), sign, colour)

    def sign(self, x: float, y: float, sign: str, colour: str, size: float = 11) -> None:
        """A sign with a white rim, to be seen on any grey."""
        for ink, thick in (("white", 0.36), (colour, 0.18)):
            (line,) = self.canvas.plot([x], [y], linestyle="none", marker=sign, markersize=size, clip_on=False)
            line.set(markeredgecolor=ink, markeredgewidth=thick * size, markerfacecolor="none")

    def box(self, tile: Tile, place: Array, shape: Array, colour: str) -> None:
        """The outline of a box of `shape` pixels about a place `(row, column)`, as far as it lies in the tile."""
        from matplotlib.patches import Rectangle

        (x0, y0), (x1, y1) = (tile.at(*(place + s * shape / 2)) for s in (-1, 1))
        outline = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.3)
        self.canvas.add_patch(outline)
        self._cut_off(outline, tile)

    def lines(self, tile: Tile, lines: Sequence[Array], colour: str, thick: float) -> None:
        """Lines through places `(K, 2)`, (row, column) in pixels, as far as they lie in the tile."""
        from matplotlib.collections import LineCollection

        drawn = LineCollection([np.column_stack(tile.at(*line.T)) for line in lines], colors=colour, linewidths=thick)
        self.canvas.add_collection(drawn, autolim=False)
        self._cut_off(drawn, tile)

    def _cut_off(self, drawn: Artist, tile: Tile) -> None:
        from matplotlib.patches import Rectangle

        frame = Rectangle((tile.left, tile.top), tile.wide, tile.tall, transform=self.canvas.transData)
        drawn.set_clip_path(frame)

    def png(self) -> bytes:
        image = io.BytesIO()
        self.figure.savefig(image, format="png", dpi=DPI)
        return image.getvalue()
