"""Pictures of saved results: bars of time and memory, a training step by its parts, and cost over receptive field."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coverfast.bench.compare import Results, Row, is_ours
from coverfast.bench.figures import Series, duration, facts_of, series_of, short, time_of, width_of, with_projections
from coverfast.report.colours import FAINT, INK
from coverfast.report.sheet import DPI

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS = ("#c2571a", "#e59a66", "#f3c9a8", "#8c3a0c")
_OTHERS = ("#1f7a8c", "#6a5a94", "#8a9a3b", "#4a4a4a", "#7cb8c4", "#b5a7d1", "#a8a8a8")
_GRID = "#e6e6e6"


# --- files -------------------------------------------------------------------------------------------------------


def draw(found: Results) -> bytes:
    """The picture of a file as PNG, with the digest of what it shows, in 64 colours: a third of the bytes."""
    from PIL import Image  # matplotlib needs it too
    from PIL.PngImagePlugin import PngInfo

    raw, small, text = io.BytesIO(), io.BytesIO(), PngInfo()
    DRAWN[found.bench](found).savefig(raw, format="png", dpi=DPI)
    text.add_text("Source", digest(found))
    picture = Image.open(raw).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    picture.save(small, "PNG", pnginfo=text, optimize=True)
    return small.getvalue()


def digest(found: Results) -> str:
    """Of all that a file says."""
    text = json.dumps([found.bench, found.provenance, found.rates, found.rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def digest_of(path: Path) -> str:
    """What results a picture shows; "" where there is none or it does not say."""
    data = path.read_bytes() if path.exists() else b""
    at = 8  # behind the signature; then length, kind, content and checksum of chunk after chunk
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        name, _, text = data[at + 8 : at + 8 + length].partition(b"\0")
        if kind == b"tEXt" and name == b"Source":
            return text.decode("latin-1")
        at += 12 + length
    return ""


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """Warm ones for ours, others for baselines."""
    names = dict.fromkeys(row["variant"] for row in rows)
    ours = [name for name in names if is_ours({"variant": name})]
    others = [name for name in names if name not in ours]
    pairs = [(n, c[i % len(c)]) for group, c in ((ours, _OURS), (others, _OTHERS)) for i, n in enumerate(group)]
    return dict(pairs)


def _why(row: Row) -> str:
    """A note in few words."""
    note = str(row.get("note") or "not measured")
    return "does not fit" if note.startswith("does not fit") else note.partition(":")[0][:24]


def _frame(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5, colors=INK, which="both")
    axes.set_axisbelow(True)


def _subtitle(found: Results) -> str:
    facts = found.provenance
    threads = f", {facts['threads']} threads" if "threads" in facts else ""
    return f"{facts.get('device', '')}{threads}, torch {facts.get('torch')}, commit {facts.get('commit')}"


def _figure(found: Results, title: str, wide: float, tall: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, tall), dpi=DPI, facecolor="white", layout="constrained")
    figure.suptitle(f"{title}   ({_subtitle(found)})", x=0.01, ha="left", fontsize=9.5, color=FAINT)
    return figure


# --- bars --------------------------------------------------------------------------------------------------------

#: Of these cases at most: a longer picture is not read.
_CASES = 18


def bars(found: Results) -> Figure:
    """Time and memory by case, a bar a variant, logarithmic; the last cases of many, which are the finest levels."""
    cases = list(dict.fromkeys(row["case"] for row in found.rows))[-_CASES:]
    rows = [row for row in found.rows if row["case"] in cases]
    colours = _colours(rows)
    places, middles, at = [], [], 0.0
    for case in cases:
        group = sorted((row for row in rows if row["case"] == case), key=lambda row: not is_ours(row))
        places += [(at + i, row) for i, row in enumerate(group)]
        middles.append(at + (len(group) - 1) / 2)
        at += len(group) + 0.9
    figure = _figure(found, found.path.stem, 11.0, 1.3 + 0.17 * at)
    left, right = figure.subplots(1, 2, sharey=True)
    both = any(row.get("both_ms") is not None for row in rows)
    way = "forward + backward" if both else "forward"
    key = "both_ms" if both else "forward_ms"
    _panel(left, f"{way}, ms", places, colours, lambda row: row.get(key) if time_of(row) else None, duration)
    memory = "extra memory at the peak, MB"
    _panel(right, memory, places, colours, lambda row: row.get("extra_mb"), lambda mb: f"{short(mb)} MB")
    left.set_yticks(middles, cases)
    left.set_ylim(at - 0.5, -0.9)
    _legend(figure, colours)
    return figure


def _panel(
    axes: Axes,
    title: str,
    places: Sequence[tuple[float, Row]],
    colours: dict[str, str],
    value: Callable[[Row], float | None],
    label: Callable[[float], str],
) -> None:
    _frame(axes, title)
    axes.grid(axis="x", color=_GRID, linewidth=0.7)
    axes.tick_params(axis="y", length=0)
    known = [v for _, row in places if (v := value(row) or 0.0) > 0]  # what grows by nothing has no logarithm
    low, high = (min(known) / 2, max(known)) if known else (1.0, 10.0)
    axes.set_xscale("log")
    axes.set_xlim(low, high * (high / low) ** 0.22)  # room for the last number
    for y, row in places:
        number = value(row)
        if number is None:
            axes.text(low * 1.03, y, _why(row), fontsize=7, color=FAINT, va="center", style="italic")
            continue
        axes.barh(y, max(number, low) - low, left=low, height=0.86, color=colours[row["variant"]])
        axes.text(max(number, low) * 1.03, y, label(number), fontsize=7, color=INK, va="center")


def _legend(figure: Figure, colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    across = len(patches) if sum(len(name) + 8 for name in colours) < 150 else 4
    figure.legend(handles=patches, loc="outside lower center", ncols=across, frameon=False, fontsize=8.5)


# --- a step by its parts -----------------------------------------------------------------------------------------

_PARTS = ("#b8b8b8", "#8a9a3b", "#1f7a8c", "#c2571a", "#e59a66", "#6a5a94", "#dcdcdc")


def step_bars(found: Results) -> Figure:
    """A step in ms by preset and variant, its parts one after another where they were measured; peak memory beside."""
    presets = list(dict.fromkeys(row["preset"] for row in found.rows))
    groups = [[row for row in found.rows if row["preset"] == preset] for preset in presets]
    parts = list(dict.fromkeys(name for row in found.rows for name in row.get("parts_ms") or ()))
    colours = {name: _PARTS[i % len(_PARTS)] for i, name in enumerate(parts)}
    heights = [len(group) + 1.6 for group in groups]
    figure = _figure(
        found, "training step, its parts from a profiled run without compilation", 11.0, 0.9 + 0.27 * sum(heights)
    )
    for axes, preset, group in zip(
        figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0], presets, groups, strict=True
    ):
        _frame(axes, f"{preset}: ms a step; peak memory")
        axes.grid(axis="x", color=_GRID, linewidth=0.7)
        axes.set_yticks(range(len(group)), [row["variant"] for row in group])
        axes.set_ylim(len(group) - 0.4, -0.6)
        _steps(axes, group, colours)
    if colours:
        _legend(figure, {**colours, "step, timed as a whole": INK})
    return figure


def _steps(axes: Axes, group: Sequence[Row], colours: dict[str, str]) -> None:
    ends = [max(row.get("step_ms") or 0.0, sum((row.get("parts_ms") or {}).values())) for row in group]
    top = max(ends, default=0.0) or 1.0
    axes.set_xlim(0, 1.2 * top)
    for y, (row, end) in enumerate(zip(group, ends, strict=True)):
        if not end:
            axes.text(0.005 * top, y, _why(row), fontsize=8, color=FAINT, va="center", style="italic")
            continue
        parts, left = row.get("parts_ms"), 0.0
        for name, ms in parts.items() if parts else [("", row["step_ms"])]:
            axes.barh(y, ms, left=left, height=0.72, color=colours.get(name, _OURS[0] if is_ours(row) else _OTHERS[0]))
            left += ms
        if parts and row.get("step_ms"):
            axes.plot([row["step_ms"]] * 2, [y - 0.42, y + 0.42], color=INK, linewidth=1.6)
        texts = [duration(row["step_ms"])] if row.get("step_ms") else []
        texts += [f"{short(row['peak_mb'])} MB"] if row.get("peak_mb") else []
        axes.text(end + 0.01 * top, y, ", ".join(texts), fontsize=8, color=INK, va="center")


# --- pyramids and direct templates -------------------------------------------------------------------------------

_FORMS = {"pyramid": _OURS, "direct": ("#125463", "#3f9db0", "#9fd0da", "#0a2f38")}
_SIGNS = ("o", "s", "^", "D")


def field_curves(found: Results) -> Figure:
    """FLOPs, seconds and memory over the width of the receptive field, a column for every (axes, window); of ours the
    first variant.
    """
    rows = found.rows
    series = sorted({series_of(row) for row in rows})
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    ours = [name for name in variants if is_ours({"variant": name})]
    names = [*ours[:1], *(name for name in variants if name not in ours)][: len(_SIGNS)]
    counted = with_projections(rows)
    figure = _figure(found, "pyramid and one direct template", max(8.5, 1.2 + 3.7 * len(series)), 9.0)
    grid = figure.subplots(3, len(series), squeeze=False, sharey="row")
    for column, of in enumerate(series):
        group = [row for row in rows if series_of(row) == of]
        timed = [row for row in group if bool(facts_of(row).get("projections")) == counted]
        _flops(grid[0][column], of, group)
        for axes, key, scale in ((grid[1][column], "both_ms", 1e-3), (grid[2][column], "extra_mb", 1.0)):
            _lines(axes, timed, names, key, scale)
        for axes in grid[:, column]:
            _widths(axes, sorted({width_of(row) for row in group}))
        grid[2][column].set_xlabel("receptive field, pixels", fontsize=9.5, color=INK)
    way = "with" if counted else "without"
    for axes, text in zip(
        grid[:, 0], ("FLOP, forward", f"s, forward + backward\n{way} projections", "extra MB at the peak"), strict=True
    ):
        axes.set_ylabel(text, fontsize=9.5, color=INK)
    for axes in grid[:, 0]:
        low, high = axes.get_ylim()
        low, high = (low, high) if low > 0 else (1.0, 10.0)  # of a row without any point
        axes.set_ylim(low, high * (high / low) ** 0.12)  # for what did not fit
    _curves_legend(figure, names)
    return figure


def _flops(axes: Axes, of: Series, group: Sequence[Row]) -> None:
    _frame(axes, f"{of[0]}D, window {of[1]} a level")
    for form, colours in _FORMS.items():
        for projections, dashes in ((True, "-"), (False, (0, (4, 2)))):
            points = {
                width_of(row): facts_of(row)["flops"]
                for row in group
                if facts_of(row)["form"] == form and bool(facts_of(row).get("projections")) == projections
            }
            shown = sorted(points.items())
            axes.plot(*zip(*shown, strict=True) if shown else ([], []), color=colours[0], linestyle=dashes, marker=".")


def _lines(axes: Axes, rows: Sequence[Row], names: Sequence[str], key: str, scale: float) -> None:
    _frame(axes, "")
    failed: dict[int, list[str]] = {}
    for form, colours in _FORMS.items():
        for number, name in enumerate(names):
            style: dict[str, Any] = {"color": colours[number], "marker": _SIGNS[number], "markersize": 4.5}
            mine = [row for row in rows if row["variant"] == name and facts_of(row)["form"] == form]
            points = sorted((width_of(row), scale * row[key]) for row in mine if (row.get(key) or 0) > 0)
            axes.plot(*zip(*points, strict=True) if points else ([], []), linewidth=1.7, **style)
            for row in (row for row in mine if row.get("note") and row.get(key) is None):
                width, reasons = width_of(row), failed.setdefault(width_of(row), [])
                place, above = (width, 0.97 - 0.06 * len(reasons)), axes.get_xaxis_transform()
                axes.plot(*place, **{**style, "marker": "x", "markersize": 6}, transform=above, clip_on=False)
                if _why(row) not in reasons:
                    at: dict[str, Any] = {"xycoords": above, "xytext": (-6, 0), "textcoords": "offset points"}
                    axes.annotate(_why(row), place, **at, ha="right", va="center", fontsize=7.5, color=FAINT)
                reasons.append(_why(row))


def _widths(axes: Axes, widths: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=_GRID, linewidth=0.7)


def _curves_legend(figure: Figure, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colours[i], marker=_SIGNS[i], markersize=4.5, label=f"{form}, {name}")
        for form, colours in _FORMS.items()
        for i, name in enumerate(names)
    ]
    plain: dict[str, Any] = {"color": INK, "linewidth": 1.3}
    handles.append(Line2D([], [], label="FLOP with projections", **plain))
    handles.append(Line2D([], [], linestyle=(0, (4, 2)), label="without", **plain))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)


#: What is drawn of a benchmark, by its name.
DRAWN: dict[str, Callable[[Results], Figure]] = dict.fromkeys(
    ("mov", "warp", "compose", "fuse", "norm", "losses", "ncc", "views", "head"), bars
)
DRAWN |= {"vpa": field_curves, "step": step_bars}
