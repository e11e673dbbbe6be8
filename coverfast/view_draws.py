"""The scalar draws of the views: spatial maps, crops, amounts and boxes, on the CPU and in float64.

Uniforms are taken in a fixed order from the Philox stream of each sample, so that a sample's views depend on the seed,
the iteration and its position in the global batch alone. In NumPy, whose small operations take a third of torch's time:
a training step waits for these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, pi

import numpy as np
from numpy.typing import NDArray

from coverfast.philox import STREAM_SCALARS, scalar_uniform
from coverfast.view_settings import ViewSettings

Array = NDArray[np.float64]

#: A Gaussian narrower than this has no weight beyond its centre pixel in float32.
NO_BLUR = 0.15

# apply? and amount of noise, blur, contrast; apply? and two and a normal's pair for brightness; apply? for boxes
_APPEARANCE_DRAWS = 2 + 2 + 2 + 4 + 1


@dataclass(frozen=True)
class Draws:
    """What is drawn for a batch of B samples.

    Attributes:
        theta: `(B, n, n + 1)`, `A | t` in pixels, `A = R * Sh * Sc` (COVER Eq. 26).
        origin: `(B, n)` int64, first pixel of the crop in the image; negative where the image is placed in the crop.
        noise: `(B,)` standard deviation.
        blur: `(B,)` standard deviation in pixels.
        contrast: `(B,)` factor on the difference from the mean, minus 1.
        brightness: `(B,)` shift.
        boxes: `(B, boxes, n, 2)` first pixel and one past the last; empty where there is none.
    """

    theta: Array
    origin: NDArray[np.int64]
    noise: Array
    blur: Array
    contrast: Array
    brightness: Array
    boxes: NDArray[np.int64]


class _Uniforms:
    """Uniforms in [0, 1) of each sample, taken in order."""

    def __init__(self, seed: int, iteration: int, samples: NDArray[np.int64], count: int) -> None:
        self.values = scalar_uniform(seed, STREAM_SCALARS, iteration, samples, count)
        self.used = 0

    def take(self, count: int) -> Array:
        self.used += count
        return self.values[:, self.used - count : self.used]


def draw(
    seed: int,
    iteration: int,
    samples: NDArray[np.int64],
    sizes: NDArray[np.int64],
    crop: Sequence[int],
    settings: ViewSettings,
    focus: NDArray[np.int64] | None = None,
) -> Draws:
    """The draws of the samples `(B,)`, whose images have `(B, n)` sizes; crops about `focus`, see `centred`."""
    n = sizes.shape[1]
    count = affine_draws(n) + n + _APPEARANCE_DRAWS + (2 * n + 1) * settings.boxes
    uniforms = _Uniforms(seed, iteration, samples, count)
    theta = sample_affine(uniforms.take(affine_draws(n)), sizes, settings)
    # An image larger than the crop is cut at random, a smaller one placed at random: the origin is then negative.
    room = sizes - np.asarray(crop)
    origin = np.floor(uniforms.take(n) * (np.abs(room) + 1)).astype(np.int64) * np.sign(room)
    origin = centred(origin, focus, sizes, crop)
    u = uniforms.take(_APPEARANCE_DRAWS)
    apply = u < settings.probability
    noise = apply[:, 0] * u[:, 1] * settings.noise
    blur = apply[:, 2] * u[:, 3] * settings.blur
    contrast = apply[:, 4] * (2 * u[:, 5] - 1) * settings.contrast
    standard = np.sqrt(-2 * np.log(1 - u[:, 8])) * np.cos(2 * pi * u[:, 9])
    brightness = apply[:, 6] * u[:, 7] * settings.brightness * standard
    boxes = _boxes(uniforms.take((2 * n + 1) * settings.boxes), apply[:, 10], crop)
    return Draws(theta, origin, noise, blur, contrast, brightness, boxes)


def centred(
    origin: NDArray[np.int64], focus: NDArray[np.int64] | None, sizes: NDArray[np.int64], crop: Sequence[int]
) -> NDArray[np.int64]:
    """First pixels `(B, n)` of crops about the pixels `focus` of images of `(B, n)` sizes, as far as they fit.

    `origin` stays where there is no focus (-1, or None for all), and along an axis that is no longer than the crop.
    """
    if focus is None:
        return origin
    room = sizes - np.asarray(crop)
    about = np.clip(focus - np.asarray(crop) // 2, 0, np.maximum(room, 0))
    return np.where((focus >= 0) & (room > 0), about, origin)


def sample_affine(u: Array, sizes: NDArray[np.int64], settings: ViewSettings) -> Array:
    """Random affine maps `theta = [A | t]`, `A = R * Sh * Sc` (COVER Eq. 26).

    Args:
        u: `(B, affine_draws(n))` uniforms in [0, 1), in the order rotations, shears, scales, translations.
        sizes: `(B, n)` image sizes in pixels.
        settings: the ranges.

    Returns:
        `(B, n, n + 1)`; `t` in pixels.
    """
    batch, n = sizes.shape
    s = 2 * u - 1
    planes = [(0, 1)] if n == 2 else [(1, 2), (0, 2), (0, 1)]  # R = Rz Ry Rx; Rz turns the (y, x) plane
    angles, s = s[:, : len(planes)] * settings.strength * settings.rotation, s[:, len(planes) :]
    matrix: Array | None = None
    for k, (i, j) in enumerate(planes):
        turn = np.tile(np.eye(n), (batch, 1, 1))
        turn[:, i, i] = turn[:, j, j] = np.cos(angles[:, k])
        turn[:, i, j] = np.sin(angles[:, k])
        turn[:, j, i] = -turn[:, i, j]
        matrix = turn if matrix is None else matrix @ turn
    assert matrix is not None
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    sheared = np.tile(np.eye(n), (batch, 1, 1))
    rows, columns = zip(*pairs, strict=True)
    sheared[:, rows, columns] = np.tan(s[:, : len(pairs)] * settings.strength * settings.shear)
    s = s[:, len(pairs) :]
    matrix = matrix @ sheared * (1 + s[:, None, :n] * settings.strength * settings.scale)
    shift = s[:, n : 2 * n] * settings.strength * settings.translation * sizes
    return np.concatenate([matrix, shift[..., None]], -1)


def affine_draws(n: int) -> int:
    """How many uniforms `sample_affine` takes in `n` dimensions."""
    return (1 if n == 2 else 3) + n * (n - 1) + 2 * n


def _boxes(u: Array, present: NDArray[np.bool_], crop: Sequence[int]) -> NDArray[np.int64]:
    """Boxes to in-paint; sides from 1/10 to 4/30 of each axis, inside the crop."""
    n = len(crop)
    u = u.reshape(len(u), u.shape[1] // (2 * n + 1), 2 * n + 1)
    chain = u[:, :, 0] < 0.95  # each further one with this probability
    chain[:, :1] = True
    present = present[:, None] & np.logical_and.accumulate(chain, 1)
    size = np.asarray(crop)
    least = np.maximum(1, -(-size // 10))
    most = np.maximum(least, 4 * size // 30)
    side = least + np.floor(u[:, :, 1 : n + 1] * (most - least + 1))
    start = np.floor(u[:, :, n + 1 :] * (size - side + 1))
    return (np.stack([start, start + side], -1) * present[..., None, None]).astype(np.int64)


def blur_weights(sigma: Array, largest: float) -> Array:
    """Gaussian weights `(B, taps)` of the blur, normalised; no taps where the blur is off or too narrow to show."""
    if largest < NO_BLUR:
        return np.zeros((len(sigma), 0))
    reach = ceil(4 * largest)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / np.maximum(sigma, 1e-3)[:, None]) ** 2)
    return weights / weights.sum(1, keepdims=True)


@dataclass(frozen=True)
class ViewRegions:
    """Which part of each image `make_views` looks at, so that no more of it need be read.

    crop: one size per axis. settings: ranges of the transforms.
    """

    crop: tuple[int, ...]
    settings: ViewSettings

    def __call__(
        self,
        seed: int,
        iteration: int,
        samples: NDArray[np.int64],
        sizes: NDArray[np.int64],
        focus: NDArray[np.int64] | None = None,
    ) -> NDArray[np.int64]:
        """First pixel and one past the last, `(B, n, 2)`, of images of `(B, n)` sizes; see `make_views`."""
        found = draw(seed, iteration, samples, sizes, self.crop, self.settings, focus)
        return regions_of(found, sizes, self.crop, self.settings)


def regions_of(
    found: Draws, sizes: NDArray[np.int64], crop: Sequence[int], settings: ViewSettings
) -> NDArray[np.int64]:
    """`ViewRegions` of views that have been drawn."""
    n = sizes.shape[1]
    if settings.elastic * settings.strength > 0:  # its displacements have no bound
        return np.stack([np.zeros_like(sizes), sizes], -1)
    last = np.asarray(crop) - 1
    corners = np.stack(np.meshgrid(*[[0, 1]] * n, indexing="ij")).reshape(n, -1) * last[:, None]
    centre, start = ((sizes - 1) / 2)[..., None], found.origin[..., None]
    seen = found.theta[:, :, :n] @ (corners + start - centre) + found.theta[:, :, n:] + centre
    # A pixel to either side for the linear weights, and one for the rounding of the field to float32.
    low = np.minimum(np.floor(seen.min(-1)).astype(np.int64) - 1, found.origin)
    high = np.maximum(np.floor(seen.max(-1)).astype(np.int64) + 3, found.origin + last + 1)
    low, high = np.clip(low, 0, sizes - 1), np.clip(high, 1, sizes)
    return np.stack([low, np.maximum(high, low + 1)], -1).astype(np.int64)


def expected_mask(sizes: NDArray[np.int64], crop: Sequence[int], settings: ViewSettings) -> float:
    """Mean share of view b that view a shows too, for images of `(N, n)` sizes: what a pretraining can learn from.

    Estimated on a few points of each of N random views.
    """
    n = sizes.shape[1]
    found = draw(0, 0, np.arange(len(sizes)), sizes, crop, settings)
    axes = [np.linspace(0, c - 1, 7) for c in crop]
    points = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(n, -1)
    centre, start = ((sizes - 1) / 2)[..., None], found.origin[..., None]
    seen = found.theta[:, :, :n] @ (points + start - centre) + found.theta[:, :, n:] + centre - start
    inside = (seen >= 0) & (seen <= np.asarray(crop)[:, None] - 1)
    return float(inside.all(1).mean())
