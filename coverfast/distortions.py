"""GVSL's appearance transforms: Bezier intensity, local shuffling, in-painting (GVSL Sec. 3.1.1 and Appendix C).

The transforms are those of Models Genesis (Zhou et al., MICCAI 2019), batched. Few numbers are drawn on the CPU, dense
ones on the images' device; all are functions of (seed, iteration, position in the global batch), see
`coverfast.philox`, and all arithmetic on them is exact or rounded once, so that every device finds the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coverfast.checks import InputError, check_map, require, shape_of
from coverfast.philox import (
    STREAM_DISTORTION,
    STREAM_INPAINT,
    STREAM_SHUFFLE,
    STREAM_SHUFFLED_BOXES,
    random_words,
    scalar_uniform,
    uniform,
)

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

#: Cells of the lookup of a Bezier curve. Its values are multiples of 2^-20: then their differences are exact in
#: float32 and interpolation cannot step back at the border of two cells.
_CELLS, _FINE = 1024, 2.0**-20

#: Each further box to in-paint comes with this probability (Models Genesis).
_FURTHER = 0.95


@dataclass(frozen=True)
class DistortionSettings:
    """How often and how strongly `distort` changes an image; the defaults are in the manner of Models Genesis.

    Chosen here: that in-painting is as likely as there in- and out-painting together, and that curves only increase.

    Attributes:
        bezier: probability of a random intensity curve.
        shuffle: probability of local shuffling.
        inpaint: probability of in-painting.
        shuffle_side: longest side of a shuffled box, as a fraction of the axis.
        shuffle_share: expected share of the boxes that are shuffled; 0.85 of its voxels is what Models Genesis' 10,000
            boxes cover of a crop of 64 x 64 x 32.
        boxes: most boxes to in-paint; after the first, each further one has probability 0.95.
    """

    bezier: float = 0.9
    shuffle: float = 0.5
    inpaint: float = 0.9
    shuffle_side: float = 0.1
    shuffle_share: float = 0.85
    boxes: int = 5

    def __post_init__(self) -> None:
        """Refuse what is no probability, share or number."""
        for name, value in vars(self).items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
            require(number, f"{name} must be a finite number, got {value!r}")
        for name in ("bezier", "shuffle", "inpaint", "shuffle_side", "shuffle_share"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} must be in [0, 1], got {value}")
        require(
            isinstance(self.boxes, int) and self.boxes >= 0,
            f"boxes must be an int that is not negative, got {self.boxes}",
        )


def distort(
    x: Tensor,
    *,
    seed: int,
    iteration: int,
    samples: Tensor | None = None,
    settings: DistortionSettings | None = None,
) -> Tensor:
    """Give each image a new appearance; its anatomy stays where it is (GVSL Sec. 3.1.1; Models Genesis).

    In this order, each with its probability and the same for all channels of an image but for the noise:

    - Bezier: intensities through an increasing curve from (0, 0) to (1, 1), cubic, two control points drawn.
    - Shuffling: random cuts of every axis make boxes; the pixels of a box are permuted, so that the histogram stays.
    - In-painting: boxes with sides from 1/6 to 1/3 of each axis are filled with uniform noise in [0, 1).

    Args:
        x: `(B, C, *S)` floating in [0, 1]; values beyond are clamped.
        seed: 64-bit key of the random numbers.
        iteration: training iteration, the counter's first coordinate.
        samples: `(B,)` integers, position of each image in the global batch, on the CPU; default `0 .. B-1`.
        settings: probabilities and sizes.

    Returns:
        `(B, C, *S)` float32 in [0, 1], contiguous, without gradient: the same bits whatever the split of the batch, and
        on every device. `x` is left as it is.

    Raises:
        InputError: if something is not as described.
    """
    check_map("x", x)
    positions = _checked_positions(len(x), seed, iteration, samples)
    settings = settings or DistortionSettings()
    channels, *size = x.shape[1:]
    with torch.no_grad():
        out = x.float().contiguous().clamp(0, 1)
        drawn = _draw(seed, iteration, positions, size, settings)
        sent = _sent(drawn.tables, x.device)
        if "curves" in sent:
            out = _look_up(out, sent["curves"].float() * _FINE)
        if "cuts" in sent:
            rows, where = sent["rows"], sent["shuffled"]
            words = random_words(seed, STREAM_SHUFFLE, iteration, where, -(-prod(size) // 2))
            chosen = random_words(seed, STREAM_SHUFFLED_BOXES, iteration, where, drawn.shuffled_boxes)
            on = chosen < round(settings.shuffle_share * 2**32)
            out.index_copy_(0, rows, _shuffle(out.index_select(0, rows), sent["cuts"], words, on))
        if "painted" in sent:
            most = [_sides(s)[1] for s in size]
            count = max(len(boxes) for _, boxes in drawn.inpainted)
            noise = uniform(seed, STREAM_INPAINT, iteration, sent["painted"], count * channels * prod(most))
            _inpaint(out, drawn.inpainted, noise.view(-1, count, channels, *most))
    return out


def _checked_positions(batch: int, seed: int, iteration: int, samples: Tensor | None) -> Ints:
    """Positions in the global batch, once seed, iteration and samples are known to fit into a counter."""
    for name, value, bits in (("seed", seed, 64), ("iteration", iteration, 32)):
        if not isinstance(value, int) or not 0 <= value < 2**bits:
            raise InputError(f"{name} must be an int in [0, 2^{bits}), got {value!r}")
    if samples is None:
        return np.arange(batch)
    require(isinstance(samples, Tensor), f"samples must be a torch.Tensor, got {type(samples).__name__}")
    if samples.shape != (batch,) or samples.dtype.is_floating_point:
        raise InputError(
            f"samples must be ({batch},) integers, one an image of x, got {samples.dtype} of shape {shape_of(samples)}"
        )
    positions = samples.cpu().numpy().astype(np.int64)
    require(bool(((positions >= 0) & (positions < 2**32)).all()), "samples must be in [0, 2^32)")
    return positions


# --- the draws, on the CPU -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draws:
    """What is drawn for a batch of B images.

    Attributes:
        tables: for the device, int64; a transform that no image gets has none. curves: `(B, cells + 1)`, see
            `_curves`. rows: `(P,)` images that are shuffled. shuffled, painted: the positions in the global batch of
            those and of the in-painted. cuts: see `_cuts`.
        shuffled_boxes: number of boxes to shuffle in, of the image that has most.
        inpainted: rows of the in-painted images, with their boxes `(k, n, 2)`, first pixel and one past the last.
    """

    tables: dict[str, Ints]
    shuffled_boxes: int
    inpainted: list[tuple[int, Ints]]


def _draw(seed: int, iteration: int, samples: Ints, size: Sequence[int], settings: DistortionSettings) -> _Draws:
    n, tables, shuffled_boxes = len(size), {}, 0
    of_boxes, of_cuts = (1 + 2 * n) * settings.boxes, sum(size) if settings.shuffle else 0
    u = scalar_uniform(seed, STREAM_DISTORTION, iteration, samples, 7 + of_boxes + of_cuts)
    bent, shuffled, painted = (u[:, :3] < (settings.bezier, settings.shuffle, settings.inpaint)).T
    if bent.any():
        tables["curves"] = _curves(u[:, 3:7], bent)
    if shuffled.any():
        cuts = _cuts(u[shuffled, 7 + of_boxes :], size, settings.shuffle_side)
        ends = np.cumsum(size) - 1
        shuffled_boxes = int((cuts[:, 3][:, ends] + 1).prod(1).max())
        tables |= {"rows": np.flatnonzero(shuffled), "shuffled": samples[shuffled], "cuts": cuts}
    boxes = _boxes(u[:, 7 : 7 + of_boxes].reshape(len(u), settings.boxes, 1 + 2 * n), size)
    inpainted = [(int(row), boxes[row]) for row in np.flatnonzero(painted)] if settings.boxes else []
    if inpainted:
        tables["painted"] = samples[painted]
    return _Draws(tables, shuffled_boxes, inpainted)


def _curves(u: Array, bent: NDArray[np.bool_]) -> Ints:
    """Bezier curves at equidistant x, in units of 2^-20, `(B, cells + 1)`; straight where not `bent`.

    u: `(B, 4)`, x of two control points and their y. Sorted on both axes, they make the curve increase.
    """
    control = np.sort(u.reshape(-1, 2, 2), -1)[..., None]
    t = np.linspace(0, 1, _CELLS + 1)
    points = control[:, :, 0] * (3 * (1 - t) ** 2 * t) + control[:, :, 1] * (3 * (1 - t) * t**2) + t**3
    found = np.tile(t, (len(u), 1))
    for row in np.flatnonzero(bent):
        found[row] = np.interp(t, *points[row])
    # What was rounded on the way must not step back.
    return np.maximum.accumulate(np.round(found / _FINE), 1).astype(np.int64)


def _cuts(u: Array, size: Sequence[int], share: float) -> Ints:
    """Random intervals of every axis, `(P, 4, sum of S)`: what a pixel has on each axis, one axis after the other.

    Which is: the first pixel of its interval, its place in it, the interval's length and its number. Lengths are
    uniform from 1 to `share` of the axis, the last one cut off. u: `(P, sum of S)`.
    """
    found = []
    for part, length in zip(np.split(u, np.cumsum(size)[:-1], 1), size, strict=True):
        lengths = 1 + np.floor(part * max(1, round(share * length)))
        begins = np.zeros((len(u), length + 1), np.int64)
        begins[:, 0] = 1
        np.put_along_axis(begins, np.minimum(np.cumsum(lengths, 1), length).astype(np.int64), 1, 1)
        number = np.cumsum(begins, 1)[:, :-1] - 1
        first = np.maximum.accumulate(begins[:, :-1] * np.arange(length), 1)
        rows = length * np.arange(len(u))[:, None]
        lengths = np.bincount((rows + number).ravel(), minlength=len(u) * length)[rows + number]
        found.append(np.stack([first, np.arange(length) - first, lengths, number], 1))
    return np.concatenate(found, 2)


def _sides(length: int) -> tuple[int, int]:
    """The least and the most pixels that a box to in-paint has on an axis."""
    least = max(1, length // 6)
    return least, max(least, length // 3)


def _boxes(u: Array, size: Sequence[int]) -> list[Ints]:
    """Of each image the boxes to in-paint, if it is, `(k, n, 2)`; u: `(B, boxes, 1 + 2n)`."""
    n, chain = len(size), u[:, :, 0] < _FURTHER
    chain[:, :1] = True
    least, most = np.array([_sides(s) for s in size]).T
    side = least + np.floor(u[:, :, 1 : n + 1] * (most - least + 1))
    start = np.floor(u[:, :, n + 1 :] * (np.asarray(size) - side + 1))
    counts = np.logical_and.accumulate(chain, 1).sum(1)
    found = np.stack([start, start + side], -1).astype(np.int64)
    return [boxes[:count] for boxes, count in zip(found, counts, strict=True)]


# --- the transforms, on the device -----------------------------------------------------------------------------------


def _sent(tables: dict[str, Ints], device: torch.device) -> dict[str, Tensor]:
    """Tables on a device, in one copy that the host does not wait for."""
    if not tables:
        return {}
    flat = torch.from_numpy(np.concatenate([table.ravel() for table in tables.values()]))
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([table.size for table in tables.values()])
    return {name: part.view(table.shape) for part, (name, table) in zip(parts, tables.items(), strict=True)}


def _look_up(x: Tensor, curves: Tensor) -> Tensor:
    """Each image of x `(B, C, *S)` through its curve `(B, cells + 1)`, linear between the points."""
    at = x.flatten(1) * _CELLS
    cell = at.long().clamp_(0, _CELLS - 1)  # NaN reads some cell, not what lies outside the table
    low, high = curves.gather(1, cell), curves.gather(1, cell + 1)
    return (low + (high - low) * (at - cell)).view(x.shape)


def _shuffle(x: Tensor, cuts: Tensor, words: Tensor, on: Tensor) -> Tensor:
    """Permute the pixels of x `(P, C, *S)` within the boxes between `cuts`, see `_cuts`; channels alike.

    One stable sort of (image, box, random number) lists the pixels of every box in random order; where a pixel stands
    in the list of all boxes when nothing is shuffled is known, and it takes what stands there.

    words: `(P, pixels / 2)`, 32 random bits each, for two pixels. on: `(P, boxes)`, which boxes are shuffled.
    """
    batch, channels, *size = x.shape
    pixels, boxes = prod(size), on.shape[1]
    # 32 bits are worked on and sorted in half the time of 64.
    width = torch.int32 if batch * max(boxes << 16, pixels) < 2**31 else torch.int64
    cuts = cuts.to(width)
    start = place = box = cuts.new_zeros(1)
    before = length = cuts.new_ones(1)
    for axis, part in enumerate(cuts.split(size, 2)):
        before = before * length
        first, within, length, number = part.unflatten(2, [s if i == axis else 1 for i, s in enumerate(size)]).unbind(1)
        start = torch.addcmul(start, before, first * prod(size[axis + 1 :]))  # pixels in all boxes before
        place = torch.addcmul(within, place, length)
        box = torch.addcmul(number, box, number.narrow(1 + axis, size[axis] - 1, 1) + 1)
    place, box = (start + place).flatten(1).long(), box.flatten(1)
    # 16 bits are enough: the few equal numbers of a box keep their order, and all of a box that stays are 0.
    halves = torch.cat([words & 0xFFFF, words >> 16], 1)[:, :pixels].to(width)
    image = torch.arange(batch, dtype=width, device=x.device)[:, None]
    key = ((box + image * boxes) << 16).addcmul_(halves, on.to(width).gather(1, box.long()))
    taken = key.flatten().sort(stable=True).indices.view(batch, pixels).gather(1, place).sub_(image * pixels)
    return x.flatten(2).gather(2, taken[:, None].expand(-1, channels, -1)).view(x.shape)


def _inpaint(x: Tensor, inpainted: list[tuple[int, Ints]], noise: Tensor) -> None:
    """Fill the boxes of some images of x, in place, with noise `(images, boxes, C, *longest sides)`."""
    for (row, boxes), fills in zip(inpainted, noise, strict=True):
        for box, fill in zip(boxes.tolist(), fills, strict=False):
            sides = [slice(last - first) for first, last in box]
            x[row][(slice(None), *(slice(*ends) for ends in box))] = fill[(slice(None), *sides)]
