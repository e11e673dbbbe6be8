"""From numbers to colours: displacements, images over one another, feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import require

Array = NDArray[Any]

INK, FAINT, VECTOR, CONSISTENCY = "#222222", "#767676", "#c2571a", "#1f7a8c"
# OKLab to linear sRGB (B. Ottosson, 2020).
LAB_TO_CONE = np.array([[1, 0.396338, 0.215804], [1, -0.105561, -0.063854], [1, -0.089484, -1.291486]])
CONE_TO_RGB = np.array([[4.07674, -3.30771, 0.23097], [-1.26844, 2.60976, -0.34132], [-0.0042, -0.70342, 1.70762]])


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


def grey(image: Array) -> Array:
    """`(C, H, W)` as `(H, W, 3)` in [0, 1]: three channels are colour, the first of any other number is grey."""
    picked = image if image.shape[0] == 3 else np.repeat(image[:1], 3, axis=0)
    return np.asarray(np.clip(np.nan_to_num(np.moveaxis(picked, 0, -1).astype(np.float64)), 0.0, 1.0))


def overlay(a: Array, b: Array, inside: Array) -> Array:
    """`a` in magenta over `b` in green, `(H, W, 3)`, both made grey first."""
    a, b = a.mean(axis=-1), b.mean(axis=-1)
    if inside.any():
        # The views differ in contrast and brightness by design; what should show is where structures lie.
        a = (a - a[inside].mean()) * (b[inside].std() / max(float(a[inside].std()), 1e-6)) + b[inside].mean()
    return np.clip(np.stack([a, b, a], axis=-1), 0.0, 1.0)


def feature_colours(maps: Sequence[Array]) -> tuple[list[Array], float]:
    """Colour feature maps `(C, H, W)` of one level, all of them alike, as `(H, W, 3)` in [0, 1].

    Red, green and blue are the first three principal components over the pixels of all maps, each from its
    percentile 1 to 99; the largest loading of each is positive, so that colours do not flip from one report to the
    next. What is not finite, or all the same, is mid grey. Also returns the share of the variance that is shown.
    """
    pixels = np.concatenate([m.reshape(len(m), -1).T for m in maps]).astype(np.float64)
    good = np.isfinite(pixels).all(axis=1)
    colours = np.full((len(pixels), 3), 0.5)
    share = float("nan")
    if good.any():
        centred = pixels[good] - pixels[good].mean(axis=0)
        values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
        main = vectors[:, ::-1][:, :3]
        main = main * np.where(np.take_along_axis(main, np.abs(main).argmax(axis=0)[None], axis=0) < 0, -1.0, 1.0)
        scores = centred @ main
        low, high = np.quantile(scores, (0.01, 0.99), axis=0)
        told = high - low > 1e-9 * np.abs(pixels[good]).max()
        shown = np.clip((scores - low) / np.where(told, high - low, 1.0), 0.0, 1.0)
        colours[good, : main.shape[1]] = np.where(told, shown, 0.5)
        share = float(values[::-1][:3].sum() / values.sum()) if values.sum() > 0 else float("nan")
    ends = np.cumsum([m[0].size for m in maps])[:-1]
    parts = np.split(colours, ends)
    return [part.reshape(*m.shape[1:], 3) for part, m in zip(parts, maps, strict=True)], share
