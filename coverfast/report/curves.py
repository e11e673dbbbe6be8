"""The curves of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from coverfast.report.colours import CONSISTENCY, FAINT, INK, VECTOR, Array
from coverfast.report.metrics import of_levels
from coverfast.report.sheet import GAP, MARGIN, TITLE, WIDTH, Sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Metrics = Mapping[str, Array]

# More points than this on a curve cannot be told apart.
_POINTS = 800
_COLUMNS, _TALL = 3, 2.6
# Left of a panel for the numbers of its axis, below it for those of the iterations.
_NUMBERS, _BELOW = 0.55, 0.55


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
        else:
            axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.3g} %" if self.share else f"{v:.3g}")
            if self.zero:
                axes.set_ylim(0.0, max([*tops, 1.15 if self.one else 0.0]) or 1.0)
        if self.one:
            axes.axhline(1.0, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)))
        if len(curves) > 1:
            axes.legend(loc="best", ncols=min(3, len(curves)), frameon=False, fontsize=8.5, borderaxespad=0.1)


LOSS = Panel(
    "loss (log scale)",
    (
        # The total lies just above its largest part: drawn wider, it shows as a rim.
        Curve("loss", "$L$", INK, 3.6),
        Curve("loss_vec", "$L_{vec}$, px", VECTOR),
        Curve("loss_con", "$L_{con}$", CONSISTENCY),
        Curve("loss_dice", "Dice", VECTOR),
        Curve("loss_ce", "cross-entropy", CONSISTENCY),
    ),
    log=True,
)
RATIO = Panel(
    "end-point ratio (0: exact, 1: no better than no displacement)",
    (Curve("epe_ratio", "learned from", VECTOR), Curve("val_epe_ratio", "held out", CONSISTENCY)),
    one=True,
)
AREA = Panel(
    "held-out cases: area under the ROC curve, accuracy",
    (Curve("val_auc", "AUC", VECTOR), Curve("val_accuracy", "accuracy", CONSISTENCY)),
    one=True,
)
COSINES = (Curve("cos_near", "neighbouring pixels", VECTOR), Curve("cos_random", "random pixels", INK))
RANKS = (Curve("rank", "finest level", VECTOR), Curve("rank_coarse", "coarsest level", INK))


def curves_sheet(metrics: Metrics) -> Sheet | None:
    """All panels that have data, three a row; None when none has."""
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


def _panels(metrics: Metrics) -> list[Panel]:
    found = of_levels(metrics, "ratio")
    ratios = [
        Curve(key, f"level {key.rpartition('_')[2]}", c) for key, c in zip(found, ramp_of(len(found)), strict=True)
    ]
    return [
        LOSS,
        RATIO,
        Panel("held-out cases: mean DSC", [Curve("val_dsc", "", VECTOR)], one=True),
        AREA,
        Panel("share of right labels, augmented crops", [Curve("accuracy", "", VECTOR)], share=True),
        Panel("end-point ratio of each level", ratios, one=True),
        Panel("cosine between features, finest level", COSINES, zero=False),
        Panel("effective rank of the features", RANKS),
        Panel("gradient norm (log scale)", [Curve("grad_norm", "", INK, 1.4)], log=True),
        Panel("learning rate", [Curve("lr", "", INK)]),
        Panel("share of the time waiting for data", [Curve("data_wait", "", INK, 1.4)], share=True),
    ]


def _present(metrics: Metrics, curves: Sequence[Curve]) -> list[Curve]:
    return [c for c in curves if c.key in metrics and np.isfinite(metrics[c.key]).any()]


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
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=5)
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
