"""Counter-based random numbers: a value is a function of (seed, iteration, sample, stream, position), not a state.

Philox-4x32-10 (Salmon et al., SC 2011) in integer tensor operations, so that a CPU, a GPU and any split of a batch
draw the same numbers, and a resumed run needs nothing stored.
"""

from __future__ import annotations

from math import pi
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

#: What a draw is for. Streams never share numbers; the values are part of the definition of a seed.
STREAM_SCALARS, STREAM_NOISE, STREAM_FILL, STREAM_ELASTIC, STREAM_ORDER, STREAM_CROP, STREAM_SPARE = range(7)
STREAM_FOREGROUND, STREAM_PARTNER = 7, 8
STREAM_DISTORTION, STREAM_SHUFFLE, STREAM_SHUFFLED_BOXES, STREAM_INPAINT = range(9, 13)


def philox_4x32(counter: tuple[Any, Any, Any, Any], seed: int) -> tuple[Any, ...]:
    """Four random 32-bit words for every counter of four 32-bit words (int64 tensors or arrays that broadcast).

    `seed` is the 64-bit key, low word first.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # The 64-bit product wraps, which leaves its bits as they are: shift and mask read both halves.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(seed: int, stream: int, iteration: int, samples: Tensor, count: int) -> Tensor:
    """`(B, count)` random words below 2^32 as int64, for the sample indices `(B,)`, on their device.

    Word `i` is output `i % 4` of counter `(i // 4, sample, iteration, stream)`.
    """
    blocks = torch.arange(-(-count // 4), device=samples.device)[None]
    zero = torch.zeros_like(blocks)
    words = philox_4x32((blocks, samples.long()[:, None] + zero, zero + iteration, zero + stream), seed)
    return torch.stack(torch.broadcast_tensors(*words), -1).flatten(1)[:, :count]


def uniform(seed: int, stream: int, iteration: int, samples: Tensor, count: int) -> Tensor:
    """`(B, count)` float32 in [0, 1): the upper 24 bits of each word, so exact on every device."""
    return (random_words(seed, stream, iteration, samples, count) >> 8).float() * 2.0**-24


def scalar_uniform(
    seed: int, stream: int, iteration: int, samples: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """The numbers of `uniform`, in NumPy and as float64: for the few that are drawn on the CPU at every step."""
    blocks = np.arange(-(-count // 4), dtype=np.int64)[None]
    zero = np.zeros_like(blocks)
    words: Any = philox_4x32((blocks, samples[:, None] + zero, zero + iteration, zero + stream), seed)
    found = np.stack(np.broadcast_arrays(*words), -1).reshape(len(samples), 4 * blocks.shape[1])[:, :count]
    return (found >> 8) * np.float64(2.0**-24)


def normal(seed: int, stream: int, iteration: int, samples: Tensor, count: int) -> Tensor:
    """`(B, count)` float32, standard normal, by Box-Muller from consecutive pairs of uniforms."""
    u = uniform(seed, stream, iteration, samples, 2 * -(-count // 2)).unflatten(1, (-1, 2))
    # 1 - u lies in (0, 1]: the logarithm is finite.
    radius, angle = (-2 * (1 - u[..., 0]).log()).sqrt(), 2 * pi * u[..., 1]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1)[:, :count]


def permutation(seed: int, epoch: int, count: int) -> Tensor:
    """The order of `count` samples in an epoch: a seeded permutation, int64 `(count,)`, on the CPU."""
    words = random_words(seed, STREAM_ORDER, epoch, torch.zeros(1, dtype=torch.long), 2 * count)
    keys = words.view(count, 2)
    return torch.argsort((keys[:, 0] << 31) ^ keys[:, 1], stable=True)
