"""Pictures of studies: scores over labelled cases, an example, two runs against each other, features by class."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coverfast.downstream.bootstrap import Interval
from coverfast.report.cases import overlaid
from coverfast.report.class_colours import class_colours
from coverfast.report.colours import CONSISTENCY, FAINT, INK, VECTOR
from coverfast.report.sheet import DPI, need_matplotlib
from coverfast.study.statistics import Correlation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]
#: Inches: 1320 pixels.
_WIDE = 12.0
_GRID = "#e6e6e6"
#: Of scratch and of what is pretrained; by hue or by lightness, any two differ for the colour-blind too.
_COLOURS = (CONSISTENCY, VECTOR, "#3f1f69", "#e0a500", "#6b0f2e")
_MODES: dict[str, dict[str, Any]] = {
    "fine-tuned": {"linestyle": "-", "marker": "o"},
    "linear": {"linestyle": (0, (4, 2)), "marker": "s", "markerfacecolor": "white"},
}


class Arm(NamedTuple):
    """Scores of a way to train: init "scratch", "pretrained" or a method; mode "fine-tuned" or "linear"."""

    init: str
    mode: str
    cases: int
    dsc: Interval


class Gain(NamedTuple):
    """What pretraining changes: one init minus another, paired. apart: whether the intervals of the two are."""

    init: str
    minus: str
    mode: str
    cases: int
    dsc: Interval
    apart: bool


class Example(NamedTuple):
    """A plane of a test case as the networks see it.

    image: `(H, W, 3)` in [0, 1]. truth: class indices `(H, W)`. predictions: by init and mode, class indices and DSC.
    """

    name: str
    image: Array
    truth: Array
    predictions: Mapping[tuple[str, str], tuple[Array, float]]


class Cloud(NamedTuple):
    """Features of pixels of one network on two axes, by PCA and by t-SNE `(N, 2)`; share: of the variance in PCA's."""

    name: str
    pca: Array
    tsne: Array
    share: float
    note: str


# --- transfer ----------------------------------------------------------------------------------------------------


def transfer_picture(arms: Sequence[Arm], gains: Sequence[Gain], about: str) -> bytes:
    """DSC over the number of labelled cases, a curve for each init and mode, and beside it what pretraining changes."""
    colours = _colours(arm.init for arm in arms)
    bases = list(dict.fromkeys(gain.minus for gain in gains))
    figure = _figure(5.0, about, wide=_WIDE * (0.7 + 0.3 * len(bases)))
    left, *right = figure.subplots(1, 1 + len(bases), width_ratios=(1.45, *(1 for _ in bases)))
    _curves(left, "DSC on the test cases, %", arms, colours)
    for axes, minus in zip(right, bases, strict=True):
        mine = [gain for gain in gains if gain.minus == minus]
        inits = {gain.init for gain in mine}
        _curves(axes, f"{inits.pop() if len(inits) == 1 else 'each'} minus {minus}, DSC points", mine, colours)
        axes.axhline(0, color=FAINT, linewidth=1.0)
    return _png(figure)


def _curves(axes: Axes, title: str, found: Sequence[Arm] | Sequence[Gain], colours: Mapping[str, str]) -> None:
    """Values with intervals over labelled cases, a curve for each init and mode."""
    _frame(axes, title)
    numbers = sorted({one.cases for one in found})
    curves = [(init, mode) for mode in _MODES for init in dict.fromkeys(one.init for one in found)]
    for place, (init, mode) in enumerate(curves):
        mine = sorted((one for one in found if (one.init, one.mode) == (init, mode)), key=lambda one: one.cases)
        x = np.log2([one.cases for one in mine]) + (place - (len(curves) - 1) / 2) * 0.035
        mean, low, high = 100 * np.array([one.dsc[:3] for one in mine]).T
        axes.plot(x, mean, color=colours[init], linewidth=1.8, markersize=6, label=f"{init}, {mode}", **_MODES[mode])
        axes.errorbar(x, mean, [mean - low, high - mean], fmt="none", ecolor=colours[init], elinewidth=1.1, capsize=3)
    axes.set_xticks(np.log2(numbers), [str(n) for n in numbers])
    axes.set_xlim(np.log2(numbers[0]) - 0.25, np.log2(numbers[-1]) + 0.25)
    axes.set_xlabel("labelled training cases", fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=9.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _colours(inits: Iterable[str]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(inits), cycle(_COLOURS), strict=False))


def convergence_picture(curves: Mapping[str, Mapping[int, Sequence[float]]], about: str) -> bytes:
    """Validation DSC over iterations by init, those of each seed thin and their mean."""
    figure = _figure(5.0, about, wide=7.6)
    axes = figure.subplots()
    _frame(axes, "DSC on the validation cases, %")
    for (init, curve), colour in zip(curves.items(), _colours(curves).values(), strict=True):
        iterations, scores = list(curve), 100 * np.array(list(curve.values()))
        axes.plot(iterations, scores, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(iterations, scores.mean(axis=1), "o-", color=colour, markersize=5, linewidth=1.8, label=init)
    axes.set_xlim(left=0)
    axes.set_xlabel("iterations of fine-tuning", fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=9.5, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    return _png(figure)


def example_picture(example: Example, names: Sequence[str], about: str) -> bytes:
    """A test case: image, truth, and what each network says, with its DSC."""
    colours = class_colours(len(names))
    rows, columns = example.truth.shape
    inits = list(dict.fromkeys(init for init, _ in example.predictions))
    whole = max(_WIDE, 3.0 * (1 + len(inits)))
    wide = (whole - 0.4) / (1 + len(inits))
    tall = float(np.clip(wide * rows / columns, 0.4 * wide, 1.6 * wide))
    height = 2 * (tall + 0.32) + 0.6 + 0.3 * _legend_rows(len(names) - 1)
    figure = _figure(height, f"{about}   {example.name}", whole)
    panels = figure.subplots(2, 1 + len(inits))
    tiles = [(panels[0, 0], "image", np.zeros_like(example.truth), ""), (panels[1, 0], "truth", example.truth, "")]
    for row, mode in zip(panels, _MODES, strict=True):
        for axes, init in zip(row[1:], inits, strict=True):
            labels, dsc = example.predictions[init, mode]
            tiles.append((axes, f"{_short(init)}, {mode}", labels, f"DSC {100 * dsc:.1f} %"))
    for axes, name, labels, note in tiles:
        axes.set_axis_off()
        axes.imshow(overlaid(example.image, labels, colours, fill=0.65), interpolation="nearest")
        axes.set_title(name, loc="left", fontsize=10.5, color=INK, pad=5)
        axes.set_title(note, loc="right", fontsize=9.5, color=FAINT, pad=5)
    _class_legend(figure, names[1:], colours[1:])
    return _png(figure)


# --- retest ------------------------------------------------------------------------------------------------------


def retest_picture(a: Array, b: Array, names: tuple[str, str], found: Correlation, about: str) -> bytes:
    """A point a test case: its DSC in the first run and in the second."""
    figure = _figure(7.0, about, wide=7.6)
    axes = figure.subplots()
    said = "no correlation: one run gives all cases the same" if found.r is None else f"Pearson r = {found.r:.3f}"
    _frame(axes, f"{said}{'' if found.p is None else f', p = {found.p:.2g}'}, {found.pairs} test cases")
    low, high = 100 * min(a.min(), b.min()), 100 * max(a.max(), b.max())
    room = 0.06 * max(high - low, 1.0)
    ends = (low - room, high + room)
    axes.plot(ends, ends, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.scatter(100 * a, 100 * b, s=34, color=VECTOR, edgecolor="white", linewidth=0.7, zorder=2)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.grid(axis="x", color=_GRID, linewidth=0.7)
    axes.set_xlabel(f"DSC of {names[0]}, %", fontsize=10, color=INK)
    axes.set_ylabel(f"DSC of {names[1]}, %", fontsize=10, color=INK)
    return _png(figure)


# --- features ----------------------------------------------------------------------------------------------------


def features_picture(clouds: Sequence[Cloud], classes: Array, names: Sequence[str], about: str) -> bytes:
    """A row a network: its pixels' features by PCA and by t-SNE, coloured by class (COVER Fig. 6)."""
    colours = class_colours(len(names))
    figure = _figure(4.9 * len(clouds) + 0.7 + 0.3 * _legend_rows(len(names)), about)
    panels = figure.subplots(len(clouds), 2, squeeze=False)
    # Drawn in an order of their own, so that no class covers another for being the last.
    order = np.random.default_rng(0).permutation(len(classes))
    for row, cloud in zip(panels, clouds, strict=True):
        heads = (f"PCA, {cloud.share:.0%} of the variance", cloud.note)
        for axes, points, head, note in zip(
            row, (cloud.pca, cloud.tsne), (_end_of(cloud.name), "t-SNE"), heads, strict=True
        ):
            axes.scatter(*points[order].T, s=9, c=colours[classes[order]], linewidth=0)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color("#bbbbbb")
            axes.set_title(head, loc="left", fontsize=10.5, color=INK, pad=5, parse_math=False)
            axes.set_title(note, loc="right", fontsize=9.5, color=FAINT, pad=5)
    _class_legend(figure, names, colours)
    return _png(figure)


# --- all ---------------------------------------------------------------------------------------------------------


def _figure(tall: float, about: str, wide: float = _WIDE) -> Figure:
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, tall), dpi=DPI, facecolor="white", layout="constrained")
    figure.suptitle(about, x=0.01, ha="left", fontsize=9.5, color=FAINT, parse_math=False)
    return figure


def _frame(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9.5, colors=INK)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _class_legend(figure: Figure, names: Sequence[str], colours: Array) -> None:
    from matplotlib.lines import Line2D

    dots: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 7}
    handles = [
        Line2D([], [], color=tuple(colour), label=_short(name), **dots)
        for name, colour in zip(names, colours, strict=True)
    ]
    columns = -(-len(handles) // _legend_rows(len(handles)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5)


def _legend_rows(count: int) -> int:
    return -(-count // 9)


def _end_of(name: str) -> str:
    return name if len(name) <= 44 else f"…{name[-43:]}"


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI)
    return image.getvalue()
