"""Crops weighted to the foreground: where an image is brighter than Otsu's threshold, and a random place there.

A map is a function of the stored pixels and a place one of (seed, iteration, position in the global batch), so that
crops stay the same for any number of reading processes, any split over ranks and any restart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coverfast.philox import STREAM_FOREGROUND, scalar_uniform
from coverfast.shard_set import ShardSet

Ints = NDArray[np.int64]

#: Cells of a map along each axis, at most.
_CELLS = 32
#: Grey levels that Otsu's threshold separates.
_LEVELS = 256
#: Pixels read at a time, and pixels whose float64 form stays in a core's cache.
_SLAB, _CACHED = 1 << 22, 1 << 15
#: Bytes of maps that a process keeps: those of 4000 volumes of 256^3.
_KEPT = 256 << 20


class ForegroundMap(NamedTuple):
    """How many pixels of each cell of an image are foreground.

    counts: `(*cells)` unsigned integers, summed over channels. side: pixels of a cell along each axis; those at the
    high end may have fewer. size: of the image.
    """

    counts: NDArray[Any]
    side: tuple[int, ...]
    size: tuple[int, ...]

    def pick(self, u: NDArray[np.float64]) -> Ints:
        """A pixel `(B, n)` for each row of uniforms `(B, 1 + n)`.

        Cells are as likely as they have foreground; in a cell all pixels are alike, so that foreground is at most a
        cell away.
        """
        summed = np.cumsum(self.counts, dtype=np.int64)
        cell = np.searchsorted(summed, u[:, 0] * summed[-1], side="right")
        first = np.stack(np.unravel_index(cell, self.counts.shape), axis=-1) * self.side
        length = np.minimum(self.side, np.asarray(self.size) - first)
        return np.asarray(first + np.floor(u[:, 1:] * length).astype(np.int64))


class ForegroundMaps:
    """The maps of the samples of a set, each made of a whole sample when it is first asked for.

    The first ones are kept, up to `_KEPT` bytes: a stream that visits all in turn would ask for none of the last ones.
    """

    def __init__(self, data: ShardSet) -> None:
        self.data = data
        self._kept: dict[int, ForegroundMap | None] = {}
        self._room = _KEPT

    def __getitem__(self, index: int) -> ForegroundMap | None:
        """The map of a sample, None for a constant image; `InputError` names one that cannot be read."""
        if index in self._kept:
            return self._kept[index]
        found = foreground_map(self.data, index)
        size = found.counts.nbytes if found else 0
        if size <= self._room:
            self._kept[index] = found
            self._room -= size
        return found


def foreground_map(data: ShardSet, index: int) -> ForegroundMap | None:
    """The map of a sample: pixels brighter than Otsu's threshold, in cells of 1/32 of the size along each axis.

    None if all pixels are of one grey level. Of a large image little more than a byte a pixel is held.
    """
    size = tuple(data.sizes[index].tolist())
    side = tuple(-(-s // _CELLS) for s in size)
    levels, histogram = np.empty((data.channels, *size), np.uint8), np.zeros(_LEVELS, np.int64)
    rows = side[0] * max(1, _SLAB * size[0] // levels.size // side[0])
    for first in range(0, size[0], rows):
        slab = slice(first, min(first + rows, size[0]))
        (stored,) = data.pixels(index, [[slab, *(slice(0, s) for s in size[1:])]])
        for channel, found in zip(levels, stored, strict=True):
            histogram += _to_levels(found.reshape(-1), data.scaling[index], channel[slab].reshape(-1))
    threshold = otsu(histogram)
    if threshold is None:
        return None
    counts = []
    for first in range(0, size[0], side[0]):
        count = (levels[:, first : first + side[0]] > threshold).sum((0, 1))
        for axis, (s, width) in enumerate(zip(size[1:], side[1:], strict=True)):
            count = np.add.reduceat(count, np.arange(0, s, width), axis)
        counts.append(count)
    kind = np.min_scalar_type(data.channels * int(np.prod(side)))
    return ForegroundMap(np.stack(counts).astype(kind), side, size)


def _to_levels(stored: NDArray[Any], scaling: NDArray[np.float64], out: NDArray[np.uint8]) -> Ints:
    """The grey levels of pixels, `[0, 1]` in `_LEVELS` equal steps, into `out`; their histogram."""
    slope, intercept, lo, hi = scaling.tolist()
    histogram = np.zeros(_LEVELS, np.int64)
    if hi <= lo:  # as everywhere, such an image is 0
        slope, intercept, lo, hi = 0.0, 0.0, 0.0, 1.0
    for start in range(0, len(stored), _CACHED):
        part = slice(start, start + _CACHED)
        values = stored[part].astype(np.float64)
        values *= slope
        values += intercept - lo
        values /= hi - lo
        values *= _LEVELS
        out[part] = np.clip(values, 0, _LEVELS - 1, out=values)
        histogram += np.bincount(out[part], minlength=_LEVELS)
    return histogram


def otsu(histogram: Ints) -> int | None:
    """The last level of the darker of two classes with the largest variance between them (Otsu 1979).

    None where all pixels are of one level.
    """
    counts = histogram.astype(np.float64)
    dark, dark_sum = np.cumsum(counts)[:-1], np.cumsum(counts * np.arange(len(counts)))[:-1]
    bright, bright_sum = counts.sum() - dark, (counts * np.arange(len(counts))).sum() - dark_sum
    both = (dark > 0) & (bright > 0)
    if not both.any():
        return None
    gap = dark_sum / np.maximum(dark, 1) - bright_sum / np.maximum(bright, 1)
    return int(np.argmax(np.where(both, dark * bright * gap**2, -1)))


def foreground_draws(
    seed: int, iteration: int, samples: Ints, ndim: int, share: float
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which of the positions `(B,)` of a batch are to show foreground, and the uniforms `(B, 1 + n)` of the places."""
    if not share:  # the usual case: spare its draws
        return np.zeros(len(samples), np.bool_), np.zeros((len(samples), 1 + ndim))
    u = scalar_uniform(seed, STREAM_FOREGROUND, iteration, samples, 2 + ndim)
    return u[:, 0] < share, u[:, 1:]
