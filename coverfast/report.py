"""The picture of a pretraining run: one sample seen through the network, and the loss curves."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, require
from coverfast.disk import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]

METRICS = ("iteration", "loss", "loss_vec", "loss_con", "epe", "epe_ratio", "seconds")
WIDTH_IN, DPI = 16.0, 110
INK, FAINT, VECTOR, CONSISTENCY = "#222222", "#8a8a8a", "#c2571a", "#1f7a8c"
# OKLab to linear sRGB (B. Ottosson, 2020).
LAB_TO_CONE = np.array([[1, 0.396338, 0.215804], [1, -0.105561, -0.063854], [1, -0.089484, -1.291486]])
CONE_TO_RGB = np.array([[4.07674, -3.30771, 0.23097], [-1.26844, 2.60976, -0.34132], [-0.0042, -0.70342, 1.70762]])


@dataclass(frozen=True)
class Pictures:
    """One sample, as numpy arrays without a batch axis; `S` is `(H, W)` or `(D, H, W)`, n its length.

    `x_a`, `x_b`: the views, `(C, *S)`, in [0, 1]. `dvf_true`: `(n, *S)`, px, on the grid of b, pointing into a.
    `mask`: `(1, *S)`, True where the truth points inside a. `dvf_levels`: the predictions coarse to fine, each
    `(n, *S_l)` in the pixels of its own level, the last one of size S. `warped`: `x_a` warped by each level's
    prediction brought to full size, `(C, *S)` each. Raises `InputError` if the shapes do not fit together.
    """

    x_a: Array
    x_b: Array
    dvf_true: Array
    mask: Array
    dvf_levels: Sequence[Array]
    warped: Sequence[Array]

    def __post_init__(self) -> None:
        require(self.x_a.ndim in (3, 4), f"x_a must be (C, *S) with 2 or 3 spatial axes, got {self.x_a.shape}")
        size = self.x_a.shape[1:]
        require(len(self.dvf_levels) >= 1, "dvf_levels must hold at least one level, got none")
        require(
            len(self.warped) == len(self.dvf_levels),
            f"warped must have one image a level, {len(self.dvf_levels)}, got {len(self.warped)}",
        )
        field, finest = (len(size), *size), self.dvf_levels[-1]
        expected = [("x_b", self.x_b, self.x_a.shape), ("mask", self.mask, (1, *size))]
        expected += [("dvf_true", self.dvf_true, field), ("the last of dvf_levels", finest, field)]
        expected += [(f"warped[{i}]", w, self.x_a.shape) for i, w in enumerate(self.warped)]
        for name, array, shape in expected:
            require(array.shape == shape, f"{name} must have shape {shape}, got {array.shape}")


def load_metrics(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read a run's metrics.jsonl: one float64 array a name in `METRICS`, an entry a line, null as NaN.

    Other keys are ignored. A last line cut off in the middle, as a killed run leaves it, is dropped; any other
    line that is no JSON object with these numbers raises `InputError`, as does a file that cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    except OSError as error:
        raise InputError(f"metrics file {path} cannot be read: {error.strerror or error}") from error
    rows: list[list[float]] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(f"{path} line {number} must be a JSON object, got {line[:40]!r}") from error
        require(isinstance(entry, dict), f"{path} line {number} must be a JSON object, got {line[:40]!r}")
        for name in METRICS:
            found = entry.get(name, "nothing")
            ok = found is None or isinstance(found, (int, float))
            require(ok, f"{path} line {number} must hold a number {name!r}, got {found!r}")
        rows.append([np.nan if entry[name] is None else float(entry[name]) for name in METRICS])
    table = np.array(rows, dtype=np.float64).reshape(len(rows), len(METRICS))
    return {name: table[:, i] for i, name in enumerate(METRICS)}


def dvf_to_rgb(dvf: Array, scale: float | None = None) -> Array:
    """Colour a displacement field `(2, H, W)` in px, as `(H, W, 3)`, float64 in [0, 1].

    Hue is direction, saturation is magnitude: white stands still, `scale` px and more are fully saturated (None:
    the largest magnitude in the field). All hues are equally light (OKLab). What is not finite is mid grey.
    """
    require(dvf.ndim == 3 and dvf.shape[0] == 2, f"dvf must be (2, H, W), got shape {dvf.shape}")
    require(scale is None or scale > 0, f"scale must be positive, got {scale!r}")
    bad = ~np.isfinite(dvf).all(axis=0)
    v = np.where(bad, 0.0, dvf.astype(np.float64))
    length = np.hypot(v[0], v[1])
    reach = scale if scale is not None else float(length.max(initial=0.0)) or 1.0
    shrink = 1 / np.maximum(length, reach)
    lab = np.stack([1 - 0.30 * length * shrink, 0.155 * v[1] * shrink, 0.155 * v[0] * shrink], axis=-1)
    linear = np.clip((lab @ LAB_TO_CONE.T) ** 3 @ CONE_TO_RGB.T, 0.0, 1.0)
    rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    rgb[bad] = 0.5
    return np.clip(rgb, 0.0, 1.0)


def pretrain_figure(pictures: Pictures, metrics: Mapping[str, Array]) -> Figure:
    """Draw both views, the true and the predicted field, the warp of every level, and the curves of `metrics`.

    A volume is shown by its middle slice along the first axis (axial where that is z) with the in-plane
    displacement; the error and its ratio are those of the whole volume. `metrics` is what `load_metrics` returns.
    Raises `InputError` if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("drawing needs the extra: pip install coverfast[plots]") from error

    p, inside = pictures, _slice(pictures.mask)[0].astype(bool)
    true, predicted = _slice(p.dvf_true)[-2:], _slice(p.dvf_levels[-1])[-2:]
    a, b, levels = _grey(_slice(p.x_a)), _grey(_slice(p.x_b)), [_grey(_slice(w)) for w in p.warped]
    scale = float(np.hypot(true[0], true[1])[inside].max(initial=0.0)) or 1.0
    epe, ratio = _end_point(p)

    # Everything is placed in inches from the top left, so that tiles align and text never meets text.
    columns, (height, width) = max(6, len(levels) + 1), inside.shape
    margin, gap, title = 0.25, 0.12, 0.42
    tile = (WIDTH_IN - 2 * margin - (columns - 1) * gap) / columns
    tall = tile * float(np.clip(height / width, 0.25, 4))
    curves = max(2.3, min(tall, 2.6))
    total = 3 * title + 2 * tall + curves + 0.82
    figure = Figure(figsize=(WIDTH_IN, total), dpi=DPI, facecolor="white")

    def place(row: int, column: float, wide: float, indent: float = 0.0) -> Axes:
        x = margin + column * (tile + gap) + indent
        y, high = (row + 1) * title + row * tall, curves if row == 2 else tall
        return figure.add_axes((x / WIDTH_IN, 1 - (y + high) / total, wide / WIDTH_IN, high / total))

    _tile(place(0, 0, tile), a, "view a")
    _tile(place(0, 1, tile), b, "view b")
    _tile(place(0, 2, tile), dvf_to_rgb(true, scale), "true displacement", inside=inside)
    _tile(place(0, 3, tile), dvf_to_rgb(predicted, scale), "predicted", f"error {epe:.2f} px, ratio {ratio:.2f}")
    _tile(place(0, 4, tile), _overlay(a, b, inside), "a over b", "before", inside)
    _tile(place(0, 5, tile), _overlay(levels[-1], b, inside), "a over b", "after warping", inside)
    for i, (image, dvf) in enumerate(zip(levels, p.dvf_levels, strict=True)):
        stride = p.x_a.shape[-1] / dvf.shape[-1]
        _tile(place(1, i, tile), image, f"a warped, level {i}", f"stride {stride:g}")
    _tile(place(1, len(levels), tile), b, "view b", "target")

    half = ((columns - 1) * (tile + gap) - 1.3) / 2
    _loss_curves(place(2, 0, half, 0.45), metrics)
    _ratio_curve(place(2, 0, half, half + 1.05), metrics)
    _wheel(place(2, columns - 1, tile), scale)

    z, channels = p.x_a.shape[1], p.x_a.shape[0]
    about = [f"middle slice along z ({z // 2} of {z}), in-plane displacement"] if p.x_a.ndim == 4 else []
    about += [f"channel 1 of {channels}"] if channels not in (1, 3) else []
    about.append("a over b: a in magenta, b in green, grey where they agree; hatched: the truth points outside a")
    figure.text(margin / WIDTH_IN, 0.14 / total, "; ".join(about), fontsize=8.5, color=FAINT, va="bottom")
    return figure


def write_report(path: str | Path, pictures: Pictures, metrics: Mapping[str, Array]) -> None:
    """Write `pretrain_figure` as a PNG, whole or not at all: a reader never sees half a picture.

    Raises `InputError` if matplotlib is not installed or the file cannot be written.
    """
    image = io.BytesIO()
    pretrain_figure(pictures, metrics).savefig(image, format="png", dpi=DPI)
    write_atomically(path, image.getvalue())


def _slice(array: Array) -> Array:
    """The whole of `(C, H, W)`, or the middle slice of `(C, D, H, W)` along D."""
    return array if array.ndim == 3 else array[:, array.shape[1] // 2]


def _end_point(p: Pictures) -> tuple[float, float]:
    """End-point error of the finest prediction inside the mask, in px, and its ratio to no displacement."""
    inside = p.mask[0].astype(bool)

    def mean(dvf: Array) -> float:
        return float(np.sqrt((dvf.astype(np.float64) ** 2).sum(axis=0))[inside].sum() / max(1, inside.sum()))

    still, error = mean(p.dvf_true), mean(p.dvf_levels[-1] - p.dvf_true)
    return error, error / still if still > 0 else float("nan")


def _grey(image: Array) -> Array:
    """Three channels are colour, the first of any other number is grey; `(H, W, 3)` in [0, 1]."""
    picked = image if image.shape[0] == 3 else np.repeat(image[:1], 3, axis=0)
    return np.asarray(np.clip(np.nan_to_num(np.moveaxis(picked, 0, -1).astype(np.float64)), 0.0, 1.0))


def _overlay(a: Array, b: Array, inside: Array) -> Array:
    """`a` in magenta over `b` in green, `(H, W, 3)`, both made grey first."""
    a, b = a.mean(axis=-1), b.mean(axis=-1)
    if inside.any():
        # The views differ in contrast and brightness by design; what should show is where structures lie.
        a = (a - a[inside].mean()) * (b[inside].std() / max(float(a[inside].std()), 1e-6)) + b[inside].mean()
    return np.clip(np.stack([a, b, a], axis=-1), 0.0, 1.0)


def _tile(axes: Axes, rgb: Array, name: str, note: str = "", inside: Array | None = None) -> None:
    if inside is not None:
        axes.patch.set(facecolor="#dcdcdc", edgecolor="#b4b4b4", hatch="////", linewidth=0)
        rgb = np.dstack([rgb, inside])
    axes.imshow(rgb, interpolation="nearest", aspect="equal")
    axes.set(xticks=[], yticks=[], anchor="N")
    for spine in axes.spines.values():
        spine.set(color="#bbbbbb", linewidth=0.6)
    small = min(1.0, float(axes.bbox.width) / (2.4 * DPI))
    axes.set_title(name, loc="left", fontsize=10.5 * small, color=INK, pad=5)
    axes.set_title(note, loc="right", fontsize=9 * small, color=FAINT, pad=5)


def _running_mean(values: Array, reach: int) -> Array:
    """Mean over `reach` entries to either side, fewer at the ends; NaN entries do not count."""
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    at = np.arange(len(values))
    lo, hi = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    number = counts[hi] - counts[lo]
    return np.where(number > 0, (sums[hi] - sums[lo]) / np.maximum(number, 1), np.nan)


def _curve(axes: Axes, x: Array, y: Array, colour: str, name: str, wide: float = 1.9) -> None:
    """The raw values thin, their running mean bold."""
    reach = len(y) // 50
    if reach:
        axes.plot(x, y, color=colour, alpha=0.28, linewidth=0.7)
    (line,) = axes.plot(x, _running_mean(y, reach), color=colour, linewidth=wide, label=name)
    line.set_marker("o" if len(y) == 1 else "")


def _frame(axes: Axes, metrics: Mapping[str, Array], name: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7, zorder=0)
    axes.set_xlabel("iteration", fontsize=9.5, color=INK, labelpad=3)
    axes.set_title(name, loc="left", fontsize=10.5, color=INK, pad=5)
    x = metrics["iteration"]
    if len(x) > 1:
        axes.set_xlim(x[0], x[-1])
    else:
        axes.set_xticks(x)
    if not len(x):
        axes.text(0.5, 0.5, "no iterations yet", transform=axes.transAxes, ha="center", color=FAINT)


def _loss_curves(axes: Axes, metrics: Mapping[str, Array]) -> None:
    _frame(axes, metrics, "loss (log scale)")
    names = {"loss": ("$L$", INK), "loss_vec": ("$L_{vec}$, px", VECTOR), "loss_con": ("$L_{con}$", CONSISTENCY)}
    for key, (label, colour) in names.items():
        y = np.where(metrics[key] > 0, metrics[key], np.nan)
        # The total lies just above its largest part: drawn wider, it shows as a rim.
        _curve(axes, metrics["iteration"], y, colour, label, 3.6 if key == "loss" else 1.9)
    axes.set_yscale("log")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9.5, borderaxespad=0.1)


def _ratio_curve(axes: Axes, metrics: Mapping[str, Array]) -> None:
    _frame(axes, metrics, "end-point ratio (0: exact, 1: no better than no displacement)")
    _curve(axes, metrics["iteration"], metrics["epe_ratio"], VECTOR, "ratio")
    axes.axhline(1.0, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)))
    values = metrics["epe_ratio"][np.isfinite(metrics["epe_ratio"])]
    axes.set_ylim(0, max(1.15, float(np.quantile(values, 0.99)) * 1.05 if len(values) else 0.0))


def _wheel(axes: Axes, scale: float) -> None:
    """The colour of every displacement up to `scale` px, as a disc; y points down, as in the pictures."""
    at = np.linspace(-1, 1, 301)
    dvf = np.stack(np.meshgrid(at, at, indexing="ij")) * scale
    alpha = np.clip((1 - np.hypot(dvf[0], dvf[1]) / scale) * 150, 0, 1)
    axes.imshow(np.dstack([dvf_to_rgb(dvf, scale), alpha]), extent=(-1, 1, 1, -1), interpolation="bilinear")
    wide, high = axes.bbox.size
    axes.set(xlim=(-1.15, 1.75), ylim=(2.9 * high / wide - 1.15, -1.15), aspect="equal")
    axes.axis("off")
    axes.set_title("displacement", loc="left", fontsize=10.5, color=INK, pad=5)
    axes.contour(at, at, np.hypot(dvf[0], dvf[1]) / scale, [0.5], colors=INK, linewidths=0.5, alpha=0.4)
    axes.plot([0, 1], [0, 0], color=INK, linewidth=0.8)
    axes.text(0.5, 0.03, f"{scale / 2:.3g}", fontsize=8.5, color=INK, ha="center", va="top")
    axes.text(1.05, 0.0, f"{scale:.3g} px", fontsize=9, color=INK, ha="left", va="center")
