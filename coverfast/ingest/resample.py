"""Images on another grid along the same axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, require

Array = NDArray[Any]

# Standard deviations of the anti-aliasing Gaussian that are summed on either side.
_REACH = 3.0
# Pixels by which rounding may put a position beyond the border.
_SLACK = 1e-6


def smoothing(step: float) -> float:
    """Standard deviation, in old pixels, of the Gaussian before sampling every `step` old pixels.

    With `fwhm = 2 sqrt(2 ln 2) sigma`, old pixels of full width 1 become new ones of full width `step`: variances
    add, so `sigma = sqrt(step^2 - 1) / (2 sqrt(2 ln 2))`; 0 for steps up to 1.
    """
    return math.sqrt(max(0.0, step * step - 1) / (8 * math.log(2)))


def resample_to(
    pixels: Array,
    size: Sequence[int],
    step: Sequence[float],
    origin: Sequence[float],
    *,
    order: int = 1,
    fill: Callable[[Array], Any] = np.min,
) -> Array:
    """Sample `pixels`, `(C, *S)`, on a grid of `size`: index o lies at `origin + step * o`, in pixels of S.

    Pixel centres are at integers, so an axis scaled by f has step 1 / f and origin (step - 1) / 2. order 1:
    linear, axes that shrink are smoothed first (volumes: a Gaussian, `smoothing`; 2D: Pillow's triangle of
    half-width `step`). order 0: the nearest pixel, for labels. Half a pixel around the border repeats it; beyond
    that pixels get `fill(those inside)`. The dtype is kept, integers are rounded; steps of 1 from whole origins copy.
    `InputError`: order, a step that is not positive, a grid that misses the image, scipy or Pillow not installed.
    """
    require(order in (0, 1), f"order must be 0 or 1, got {order!r}")
    require(all(s > 0 for s in step), f"step must be positive on every axis, got {tuple(step)}")
    axes = list(zip(pixels.shape[1:], size, step, origin, strict=True))
    first = [max(0, math.ceil((-0.5 - o) / s - _SLACK)) for _, _, s, o in axes]
    last = [min(count, math.floor((old - 0.5 - o) / s + _SLACK) + 1) for old, count, s, o in axes]
    require(
        all(f < e for f, e in zip(first, last, strict=True)),
        f"the grid must have pixels inside the image {pixels.shape[1:]}, got size {tuple(size)}, step {tuple(step)}, "
        f"origin {tuple(origin)}",
    )
    counts = [e - f for f, e in zip(first, last, strict=True)]
    start = [o + s * f for f, (_, _, s, o) in zip(first, axes, strict=True)]
    if all(s == 1 and float(o).is_integer() for s, o in zip(step, start, strict=True)):
        inside = pixels[(slice(None), *(slice(int(o), int(o) + n) for o, n in zip(start, counts, strict=True)))]
    elif order == 0:
        positions = [o + s * np.arange(n) for n, s, o in zip(counts, step, start, strict=True)]
        nearest = [
            np.clip(np.floor(p + 0.5).astype(np.int64), 0, old - 1)
            for p, old in zip(positions, pixels.shape[1:], strict=True)
        ]
        inside = pixels[np.ix_(np.arange(len(pixels)), *nearest)]
    else:
        sampled = _sampled_image if pixels.ndim == 3 else _sampled_volume
        inside = np.stack([to_dtype(sampled(part, counts, step, start), pixels.dtype) for part in pixels])
    beyond = [(f, count - e) for f, e, count in zip(first, last, size, strict=True)]
    if not any(map(any, beyond)):
        return np.ascontiguousarray(inside)
    return np.pad(inside, [(0, 0), *beyond], constant_values=fill(inside))


def _sampled_volume(part: Array, size: Sequence[int], step: Sequence[float], start: Sequence[float]) -> Array:
    # float32 holds 16 bits with room to spare; wider integers would lose their last digits.
    dtype = np.float64 if part.dtype.kind != "f" and part.dtype.itemsize > 2 else np.float32
    along_z, along_y, along_x = (_operator(*axis, dtype) for axis in zip(part.shape, size, step, start, strict=True))
    # A plane at a time, and only those that are reached: the whole volume is never held in floating point.
    begin, end = int(along_z.indices.min()), int(along_z.indices.max()) + 1
    planes = np.empty((end - begin, *size[1:]), dtype)
    for plane, stored in zip(planes, part[begin:end], strict=True):
        plane[:] = (along_x @ (along_y @ stored.astype(dtype)).T).T
    return (along_z[:, begin:end] @ planes.reshape(len(planes), -1)).reshape(tuple(size))


def _operator(old: int, size: int, step: float, start: float, dtype: type[np.floating[Any]]) -> Any:
    """Smoothing and linear sampling along one axis of `old` pixels, a sparse `(size, old)` matrix.

    It is what scipy.ndimage makes of unit vectors. The matrix skips what lies between the samples, several times
    faster than filtering the volume.
    """
    try:
        from scipy import ndimage, sparse
    except ImportError as error:
        raise InputError("resampling volumes needs the extra: pip install coverfast[io]") from error
    units = np.eye(old)
    if sigma := smoothing(step):
        units = ndimage.gaussian_filter1d(units, sigma, axis=0, mode="nearest", truncate=_REACH)
    sampled = ndimage.affine_transform(units, (step, 1.0), (start, 0.0), (size, old), order=1, mode="nearest")
    return sparse.csr_array(sampled.astype(dtype))


def _sampled_image(part: Array, size: Sequence[int], step: Sequence[float], start: Sequence[float]) -> Array:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("scaling images needs the extra: pip install coverfast[io]") from error
    # Pillow's box has to lie within the image; where a pixel reaches over the border, that is repeated.
    edges = [(o + 0.5 - s / 2, o + 0.5 + s * (n - 0.5)) for n, s, o in zip(size, step, start, strict=True)]
    border = [
        (max(0, math.ceil(-low - _SLACK)), max(0, math.ceil(high - old - _SLACK)))
        for (low, high), old in zip(edges, part.shape, strict=True)
    ]
    if any(map(any, border)):
        part = np.pad(part, border, mode="edge")
    (top, bottom), (left, right) = (
        (max(0.0, low + before), min(float(old), high + before))
        for (low, high), (before, _), old in zip(edges, border, part.shape, strict=True)
    )
    # The triangle filter grows with the reduction (no aliasing) and cannot ring outside the value range.
    image = Image.fromarray(part.astype(np.float32))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=(left, top, right, bottom)))


def to_dtype(values: Array, dtype: np.dtype[Any]) -> Array:
    """Rounded to the nearest integer (half to even) and clipped to the range of an integer `dtype`."""
    if dtype.kind == "f":
        return values.astype(dtype)
    info = np.iinfo(dtype)
    top = float(info.max)
    if top > info.max:  # 2^63 - 1 and 2^64 - 1 are no floats, and what they round to overflows
        top = math.nextafter(top, 0)
    # float32 holds the ends of 16 bits, not those of 32.
    rounded = np.rint(values.astype(np.float64) if dtype.itemsize > 2 else values)
    return np.clip(rounded, info.min, top, out=rounded).astype(dtype)
