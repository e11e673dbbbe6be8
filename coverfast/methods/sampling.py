"""Pixels at which features are looked at while training: spread evenly, made on the device, the same on every one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Pixels looked at in the finest features.
POINTS = 1024

# Fractions of 2^32 along each axis from one pixel to the next, the powers of 1 / g with g^(n + 1) = g + 1: their
# multiples fill a box evenly, wherever one starts and stops (M. Roberts, 2018).
_STEPS = {2: (0xC13FA9A9, 0x91E10DA5), 3: (0xD1B54A33, 0xABC98389, 0x8CB92BA7)}


def some_pixels(iteration: int, rows: Tensor, count: int = POINTS) -> tuple[Tensor, ...]:
    """Indices of `count` pixels of `rows` `(B, *S, C)`, int64 `(count,)` an axis: equally many of each sample.

    Made on the device, where a copy from the host would have to be waited for.
    """
    batch, *size = rows.shape[:-1]
    k = torch.arange(count, device=rows.device)
    steps = zip(size, _STEPS[len(size)], strict=True)
    # The product wraps; its lower 32 bits are those of the fraction all the same.
    return k * batch // count, *((((k + iteration * count) * step & 0xFFFFFFFF) * s >> 32) for s, step in steps)


def beside(at: tuple[Tensor, ...], size: Sequence[int]) -> tuple[Tensor, ...]:
    """The next pixel along one axis, or at the end of it the one before; axes take turns, those of one pixel do not."""
    wide = [axis for axis, s in enumerate(size) if s > 1]
    turn = torch.arange(len(at[0]), device=at[0].device) % max(1, len(wide))
    found = list(at)
    for place, axis in enumerate(wide):
        i = at[axis + 1]
        found[axis + 1] = i + (turn == place) * (1 - 2 * (i + 1 == size[axis]))
    return tuple(found)
