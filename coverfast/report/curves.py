"""The curves of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from coverfast.report.colours import CONSISTENCY, FAINT, INK, VECTOR, Array
from coverfast.report.metrics import meaning, of_levels, stem_of
from coverfast.report.sheet import GAP, MARGIN, TITLE, WIDTH, Sheet, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Metrics = Mapping[str, Array]

# More points than this on a curve cannot be told apart.
_POINTS = 800
_COLUMNS, _TALL = 3, 2.6
# Left of a panel for the numbers of its axis, below it for those of the iterations.
_NUMBERS, _BELOW = 0.55, 0.55
#: Most panels of figures that have no meaning here.
OTHERS = 6
_COLOURS = (VECTOR, CONSISTENCY, "#7a4fa3", "#5a8a2e", "#b8468a", "#8a6d3b")
# Letters of a name, and of those of a row in a legend.
_NAME, _ROW = 40, 66


class Curve(NamedTuple):
    """Values to draw: key among the metrics, name in the legend, colour, line width."""

    key: str
    name: str
    colour: str
    thick: float = 1.9


@dataclass(frozen=True)
class Panel:
    """One set of axes. log: a logarithmic scale; zero: begins at 0; one: has a line at 1; share: in per cent."""

    title: str
    curves: Sequence[Curve]
    log: bool = False
    zero: bool = True
    one: bool = False
    share: bool = False

    def draw(self, axes: Axes, metrics: Metrics) -> None:
        """The curves that have data; "no iterations yet" where none has."""
        curves = _present(metrics, self.curves)
        _frame(axes, metrics["iteration"], self.title)
        tops = [_curve(axes, metrics["iteration"], metrics[c.key], c, positive=self.log) for c in curves]
        if self.log:
            axes.set_yscale("log")
            # A loss that begins at nothing must not flatten the others; within a decade plain numbers fit beside it.
            low, high = axes.get_ylim()
            low = max(low, min((_middle(metrics[c.key]) for c in curves), default=low) / 5)
            axes.set_ylim(bottom=low)
            if high < 10 * low:
                axes.yaxis.set_major_formatter(lambda v, _: f"{v:.3g}")
                axes.yaxis.set_minor_formatter(lambda v, _: f"{v:.3g}")
        else:
            axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.3g} %" if self.share else f"{v:.3g}")
            if self.zero:
                axes.set_ylim(0.0, max([*tops, 1.15 if self.one else 0.0]) or 1.0)
        if self.one:
            axes.axhline(1.0, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)))
        if len(curves) > 1:
            columns = min(3, len(curves), max(1, _ROW // (6 + max(len(c.name) for c in curves))))
            axes.legend(loc="best", ncols=columns, frameon=False, fontsize=8.5, borderaxespad=0.1)


LOSS = Panel(
    "loss (log scale)",
    (
        # The total lies just above its largest part: drawn wider, it shows as a rim.
        Curve("loss", "$L$", INK, 3.6),
        Curve("loss_vec", "$L_{vec}$, px", VECTOR),
        Curve("loss_con", "$L_{con}$", CONSISTENCY),
        Curve("loss_dice", "Dice", VECTOR),
        Curve("loss_ce", "cross-entropy", CONSISTENCY),
        Curve("loss_ncc", "1 - NCC", VECTOR),
        Curve("loss_smooth", "smoothness", CONSISTENCY),
        Curve("loss_restore", "restoration", _COLOURS[2]),
    ),
    log=True,
)
RATIO = Panel(
    "end-point ratio (0: exact, 1: no better than no displacement)",
    (Curve("epe_ratio", "learned from", VECTOR), Curve("val_epe_ratio", "held out", CONSISTENCY)),
    one=True,
)
NCC = Panel(
    "local NCC (1: the same but for contrast, 0: unrelated)",
    (
        Curve("ncc", "learned from", VECTOR),
        Curve("val_ncc", "held out", CONSISTENCY),
        Curve("ncc_before", "before matching", "#dfaa86", 1.4),
        Curve("val_ncc_before", "held out, before", "#8bbcc6", 1.4),
    ),
)
HELD_OUT = Panel(
    "loss: learned from, held out",
    (Curve("loss", "learned from", VECTOR), Curve("val_loss", "held out", CONSISTENCY)),
    zero=False,
)
AREA = Panel(
    "held-out cases: area under the ROC curve, accuracy",
    (Curve("val_auc", "AUC", VECTOR), Curve("val_accuracy", "accuracy", CONSISTENCY)),
    one=True,
)
COSINES = (Curve("cos_near", "neighbouring pixels", VECTOR), Curve("cos_random", "random pixels", INK))
RANKS = (Curve("rank", "finest level", VECTOR), Curve("rank_coarse", "coarsest level", INK))


def curves_sheet(metrics: Metrics) -> Sheet | None:
    """All panels that have data, three a row; None when none has.

    Of figures that this library does not know there are `OTHERS` panels at most.
    """
    panels = [panel for panel in _panels(metrics) if _present(metrics, panel.curves)]
    if not panels:
        return None
    pitch = TITLE + _TALL + _BELOW
    sheet = Sheet(-(-len(panels) // _COLUMNS) * pitch)
    wide = (WIDTH - 2 * MARGIN - (_COLUMNS - 1) * GAP) / _COLUMNS
    for number, panel in enumerate(panels):
        row, column = divmod(number, _COLUMNS)
        left = MARGIN + column * (wide + GAP) + _NUMBERS
        panel.draw(sheet.axes(left, row * pitch + TITLE, wide - _NUMBERS - 0.15, _TALL), metrics)
    return sheet


def _middle(values: Array) -> float:
    """The median of what a logarithm can show, 0 for nothing."""
    shown = values[np.isfinite(values) & (values > 0)]
    return float(np.median(shown)) if shown.size else 0.0


def loss_panel(metrics: Metrics) -> Panel:
    """`LOSS`, with every `loss_NAME` that only the run knows; linear where losses are negative."""
    known = {curve.key for curve in LOSS.curves}
    more = [key for key in metrics if key.startswith("loss_") and key not in known and _told(metrics, key)]
    curves = _present(metrics, LOSS.curves)
    curves += _named(more, [c for c in _COLOURS if c not in {curve.colour for curve in curves}])
    if any(np.nanmedian(metrics[curve.key]) < 0 for curve in curves):
        return Panel("loss", curves, zero=False)
    return replace(LOSS, curves=curves)


def merit_panel(metrics: Metrics) -> Panel | None:
    """What tells best how far a run is, of what it logged."""
    return next((panel for panel in (RATIO, NCC, *_held_out(metrics)) if _present(metrics, panel.curves)), None)


def _held_out(metrics: Metrics) -> list[Panel]:
    """The loss on held-out images, for runs without a ratio."""
    return [HELD_OUT] if _told(metrics, "val_loss") and not _present(metrics, RATIO.curves) else []


def _others(metrics: Metrics) -> list[Panel]:
    """A panel for each figure that is unknown here: of training and held out, or of all its levels."""
    found: dict[str, list[str]] = {}
    for key in metrics:
        stem = stem_of(key)
        if key != "iteration" and not meaning(key) and not stem.startswith("loss_") and _told(metrics, key):
            found.setdefault(stem, []).append(key)
    panels = []
    for stem, keys in list(found.items())[:OTHERS]:
        curves = _named(sorted(keys, key=lambda key: (len(key), key)), _COLOURS)
        if set(keys) == {stem, f"val_{stem}"}:
            curves = [Curve(stem, "learned from", VECTOR), Curve(f"val_{stem}", "held out", CONSISTENCY)]
        panels.append(Panel(_plain(keys[0] if len(keys) == 1 else stem), curves, zero=False))
    return panels


def _named(keys: Sequence[str], colours: Sequence[str]) -> list[Curve]:
    """Curves under their own names."""
    colours = colours if len(keys) <= len(colours) else ramp_of(len(keys))
    return [Curve(key, _plain(key), colour) for key, colour in zip(keys, colours, strict=False)]


def _plain(name: str) -> str:
    """A name to be read as it is, cut if it is long."""
    name = name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
    return name.replace("$", r"\$")


def _panels(metrics: Metrics) -> list[Panel]:
    found = of_levels(metrics, "ratio")
    ratios = [
        Curve(key, f"level {key.rpartition('_')[2]}", c) for key, c in zip(found, ramp_of(len(found)), strict=True)
    ]
    return [
        loss_panel(metrics),
        RATIO,
        NCC,
        *_held_out(metrics),
        Panel("held-out cases: mean DSC", [Curve("val_dsc", "", VECTOR)], one=True),
        AREA,
        Panel("share of right labels, augmented crops", [Curve("accuracy", "", VECTOR)], share=True),
        Panel("end-point ratio of each level", ratios, one=True),
        Panel("mean length of the displacement, px", [Curve("displacement", "", VECTOR)]),
        Panel("share of the displacement that folds", [Curve("folded", "", VECTOR)], share=True),
        Panel("cosine between features, finest level", COSINES, zero=False),
        Panel("effective rank of the features", RANKS),
        *_others(metrics),
        Panel("gradient norm (log scale)", [Curve("grad_norm", "", INK, 1.4)], log=True),
        Panel("learning rate", [Curve("lr", "", INK)]),
        Panel("share of the time waiting for data", [Curve("data_wait", "", INK, 1.4)], share=True),
    ]


def _told(metrics: Metrics, key: str) -> bool:
    return key in metrics and bool(np.isfinite(metrics[key]).any())


def _present(metrics: Metrics, curves: Iterable[Curve]) -> list[Curve]:
    return [curve for curve in curves if _told(metrics, curve.key)]


def ramp_of(count: int) -> list[str]:
    """Colours of levels, coarse to fine, from yellow over red to blue; of a single one ink."""
    if count < 2:
        return [INK] * count
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["plasma"](0.85 * (1 - i / (count - 1)))) for i in range(count)]


def _frame(axes: Axes, iteration: Array, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7, zorder=0)
    axes.set_xlabel("iteration", fontsize=9.5, color=INK, labelpad=3)
    # What stands to the right leaves a little room.
    room = axes.bbox.width / axes.figure.dpi + 0.2
    size = 10.5 * min(1.0, room / max(text_width(title, 10.5), 1e-6))
    axes.set_title(title, loc="left", fontsize=size, color=INK, pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}" if v < 10_000 else f"{v / 1000:g}k")
    if len(iteration) > 1:
        axes.set_xlim(iteration[0], iteration[-1])
    else:
        axes.set_xticks(iteration)
    if not len(iteration):
        axes.text(0.5, 0.5, "no iterations yet", transform=axes.transAxes, ha="center", color=FAINT)


def _curve(axes: Axes, x: Array, y: Array, curve: Curve, *, positive: bool) -> float:
    """The raw values thin (their range, where they are many), their running mean bold; returns the top to show."""
    good = np.isfinite(y) & ((y > 0) | (not positive))
    x, y = x[good], y[good]
    reach = len(y) // 50
    mean = running_mean(y, reach)
    at, low, high = thinned(x, y, _POINTS)
    if len(y) > _POINTS:
        axes.fill_between(at, low, high, color=curve.colour, alpha=0.2, linewidth=0)
    elif reach:
        axes.plot(x, y, color=curve.colour, alpha=0.28, linewidth=0.7)
    few = len(y) <= 30
    (line,) = axes.plot(at, np.interp(at, x, mean) if len(x) else at, color=curve.colour, linewidth=curve.thick)
    line.set(marker="o" if few else "", markersize=3.5, label=curve.name or "_")
    return float(np.quantile(y, 0.99)) * 1.08 if len(y) else 0.0


def running_mean(values: Array, reach: int) -> Array:
    """Mean over `reach` entries to either side, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    lo, hi = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return np.asarray((sums[hi] - sums[lo]) / (hi - lo))


def thinned(x: Array, y: Array, most: int) -> tuple[Array, Array, Array]:
    """Of values in at most `most` runs: where each lies, the lowest and the highest; the values if they are few."""
    if len(y) <= most:
        return x, y, y
    starts = np.arange(most) * len(y) // most
    counts = np.diff([*starts, len(y)])
    return np.add.reduceat(x, starts) / counts, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
