"""The HTML page of a report, and the page over several; relative links, nothing from elsewhere, no scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from coverfast.disk import explained, write_atomically
from coverfast.report.colours import Array
from coverfast.report.curves import OTHERS, curves_sheet
from coverfast.report.features import features_sheet
from coverfast.report.gallery import Gallery, on_host
from coverfast.report.gallery_sheet import gallery_sheet
from coverfast.report.metrics import last_figures, meaning
from coverfast.report.overview import overview_sheet
from coverfast.report.pictures import Pictures
from coverfast.report.sheet import Sheet, need_matplotlib
from coverfast.report.similarity import similarity_sheet

if TYPE_CHECKING:
    from coverfast.methods import Shown

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; color: #222; background: #fff; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 1rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .6rem 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .2rem; }
p { max-width: 72ch; margin: .3rem 0 .7rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .6rem 0; font-size: .9rem; }
dt { color: #666; }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { display: block; overflow-x: auto; }
.scroll img { display: block; width: 100%; min-width: 700px; height: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e6e6e6; }
th { color: #666; font-weight: 500; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td code { white-space: nowrap; }
td:last-child { min-width: 16rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); gap: 1.6rem; }
.cards a { color: inherit; text-decoration: none; }
.cards small { color: #666; }
.cards img { width: 100%; height: auto; border: 1px solid #e6e6e6; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dt { margin-top: .4rem; } }
"""

_OVERVIEW = """Two views of one image, and where the pixels of view b come from in view a: the colour is the
direction of the displacement, its depth the length (wheel, bottom right). Look at <em>a over b, after warping</em>:
coloured fringes are what the network still gets wrong. Below them is view a warped by each level: the coarse
levels align the whole, the fine ones the details (COVER Fig. 7)."""
_FEATURES = """Pixels with like features have like colours, in both views, within a level. Trained well, the same
anatomy has the same colour in both views, and different structures differ. One flat colour, or a smooth gradient
without anatomy, is collapse; speckle that does not follow the image is over-dispersion."""
_SIMILARITY = """Each row is a pixel of view b. Level by level, coarse to fine, the network looks for it in view a
within a window (boxes, in the colours of the frames on the right) about where the level above points. The squares
show how it weighs the places of that window: their weighted mean is the vector found (ring); the cross is where the
pixel truly lies. A dark spot under the cross is a certain, right match; an even shade is no decision; a mark on the
frame lies beyond."""
_CURVES = """Thin or shaded: every iteration; bold: the running mean. The end-point ratio is the figure to watch:
1 is no better than predicting no displacement, 0 is exact. Held out well above learned from is overfitting. A cosine
between random pixels that goes to 1 while the rank goes to 1 is collapse; a cosine between neighbours that falls
towards that between random pixels is over-dispersion."""
_CURVES_OF_ANY = f"""Thin or shaded: every iteration; bold: the running mean. Held out much worse than learned from is
overfitting. Figures without a meaning in the table below are the method's own; {OTHERS} of them at most are drawn."""
_CURVES_NCC = """The local NCC is the figure to watch: it should rise above what it is before matching, and held out as
much as on what is learned from."""


class Entry(NamedTuple):
    """A report among several. folder: its name, below that of the index. note: a line on it. pictured: has pictures."""

    folder: str
    title: str
    note: str
    pictured: bool = True


class _Section(NamedTuple):
    """A part of the page. name: of the picture's file, without suffix. caption: in HTML."""

    name: str
    heading: str
    caption: str
    sheet: Sheet | None


def write_report(
    folder: str | Path,
    pictures: Pictures | Gallery | Shown | None,
    metrics: Mapping[str, Array] | None = None,
    *,
    title: str,
    about: Mapping[str, object] | None = None,
) -> Path:
    """Write `index.html` and its pictures into a folder, made if need be, and return the page.

    overview.png (where there are pictures), of COVER features.png and similarity.png (where a pixel is marked), and
    curves.png (where `metrics`, of `load_metrics`, have any) are each written whole or not at all, the page last.
    about: facts to head the page with. `InputError`: the pictures do not fit together, matplotlib is not installed, or
    a file cannot be written.
    """
    need_matplotlib()
    folder, metrics, seen = Path(folder), metrics or {}, on_host(pictures)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if isinstance(seen, Pictures):
        lead, sections = _of_cover(seen, metrics)
    else:
        lead, sections = _of_any(seen, metrics)
    parts = [f"<h1>{escape(title)}</h1>", html_facts(about or {}), f"<p>{lead}</p>" * bool(lead)]
    for name, heading, caption, sheet in sections:
        if sheet is not None:
            write_atomically(folder / f"{name}.png", sheet.png())
            wide, high = (int(v) for v in sheet.figure.bbox.size)
            size = f'width="{wide}" height="{high}"'
            parts += [
                f"<h2>{heading}</h2>",
                f"<p>{caption}</p>" * bool(caption),
                f'<a class="scroll" href="{name}.png"><img src="{name}.png" alt="{heading}" {size}></a>',
            ]
    parts.append(_table(metrics))
    page = folder / "index.html"
    write_atomically(page, html_page(title, parts))
    return page


def _of_cover(pictures: Pictures, metrics: Mapping[str, Array]) -> tuple[str, list[_Section]]:
    """The first sentence in HTML, and what follows."""
    error, ratio = pictures.end_point()
    lead = (
        f"On this sample the predicted displacement is {error:.2f} px off on average, {ratio:.2f} of the error of "
        "predicting none."
        if pictures.mask.any()
        else "The two views have no pixel in common: the crop is small for the image, and there is nothing to measure."
    )
    return lead, [
        _Section("overview", "Overview", _OVERVIEW, overview_sheet(pictures, metrics)),
        _Section("features", "Features", _FEATURES, features_sheet(pictures)),
        _Section("similarity", "Matches", _SIMILARITY, similarity_sheet(pictures)),
        _Section("curves", "Curves", _CURVES, curves_sheet(metrics)),
    ]


def _of_any(gallery: Gallery | None, metrics: Mapping[str, Array]) -> tuple[str, list[_Section]]:
    """The method's own sentence in HTML, and what follows."""
    text = f"{_CURVES_NCC} {_CURVES_OF_ANY}" if "ncc" in metrics else _CURVES_OF_ANY
    curves = _Section("curves", "Curves", text, curves_sheet(metrics))
    if gallery is None:
        return "", [curves]
    overview = _Section("overview", "Overview", escape(gallery.help), gallery_sheet(gallery, metrics))
    return escape(gallery.text), [overview, curves]


def write_index(folder: str | Path, entries: Sequence[Entry], *, title: str) -> Path:
    """Write `index.html` over several reports in folders below this one, and return it."""
    cards = [
        f'<a href="{escape(e.folder)}/index.html">'
        + f'<img src="{escape(e.folder)}/overview.png" alt="" loading="lazy">' * e.pictured
        + f"<div>{escape(e.title)}</div><small>{escape(e.note)}</small></a>"
        for e in entries
    ]
    page = Path(folder) / "index.html"
    write_atomically(page, html_page(title, [f"<h1>{escape(title)}</h1>", '<div class="cards">', *cards, "</div>"]))
    return page


def html_page(title: str, parts: Sequence[str]) -> str:
    """A page in the style of reports, of parts in HTML."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}<title>{escape(title)}</title><style>{_STYLE}</style></head>\n'
        f"<body><main>\n{body}\n</main></body>\n</html>\n"
    )


def html_facts(about: Mapping[str, object]) -> str:
    """Names and what they are, as HTML; nothing for none."""
    rows = [f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in about.items()]
    return f"<dl>{''.join(rows)}</dl>" if rows else ""


def _table(metrics: Mapping[str, Array]) -> str:
    rows = last_figures(metrics)
    if not rows:
        return ""
    lines = [
        f'<tr><td><code>{escape(name)}</code></td><td class="number">{last:.4g}</td><td class="number">{mean:.4g}</td>'
        f'<td class="number">{at}</td><td>{escape(meaning(name))}</td></tr>'
        for name, last, mean, at in rows
    ]
    titles = '<th>figure</th><th class="number">last</th><th class="number">mean of last 50</th>'
    titles += '<th class="number">iteration</th><th>what it is</th>'
    return f'<h2>Figures</h2>\n<div class="scroll"><table><tr>{titles}</tr>\n{chr(10).join(lines)}\n</table></div>'
