"""Feature maps of both views as colours."""

from __future__ import annotations

from coverfast.report.colours import feature_colours, grey
from coverfast.report.pictures import Pictures
from coverfast.report.sheet import GAP, TITLE, Grid, Sheet


def features_sheet(pictures: Pictures) -> Sheet:
    """Both views and their maps of every level: the first three principal components, the same for both views."""
    p, planes = pictures, pictures.planes
    volume = len(planes) > 1
    grid = Grid([plane.shape(p.size) for plane in planes], max(6, len(p.features_a) + 1), named=True)
    sheet = Sheet(TITLE + 2 * grid.height + 0.35)
    coloured = [
        feature_colours([plane.cut(view) for view in pair for plane in planes])
        for pair in zip(p.features_a, p.features_b, strict=True)
    ]
    top = TITLE
    for row, (view, plane, size) in enumerate(
        (view, plane, size) for view in "ab" for plane, size in zip(planes, grid.sizes, strict=True)
    ):
        sheet.row_name(top, size[1], f"view {view}" + (f", {plane.name}" if volume else ""))
        image = grey(plane.cut(p.x_a if view == "a" else p.x_b))
        sheet.tile(grid.column(0), top, size, image, "image" * (row == 0), up=volume, head=grid.wide)
        for level, (maps, share) in enumerate(coloured):
            names = (f"level {level}", f"{len(p.features_a[level])} channels, {share:.0%}") if row == 0 else ("", "")
            sheet.tile(grid.column(level + 1), top, size, maps[row], *names, up=volume, head=grid.wide)
        top += size[1] + GAP
    sheet.footnote(
        "red, green, blue: first three principal components of a level's features, one basis for both views; "
        "per cent: share of the variance that they hold"
    )
    return sheet
