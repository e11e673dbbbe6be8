"""MoV as people write it in eager PyTorch today, to compare with.

**A** loops over the window: one slice, product and sum a tap, scores concatenated. **B** unfolds the keys and
multiplies at once. Both mask the taps outside the grid, so that they compute the same numbers as `coverfast.mov`.
FlexAttention does too, but over a raster of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def _window(q: Tensor, k: Tensor, window: Sequence[int]) -> tuple[list[tuple[int, ...]], Tensor, Tensor]:
    pad = [w // 2 for w in reversed(window) for _ in range(2)]
    inside = F.pad(torch.zeros_like(k[:1, :1]), pad, value=float("-inf"))
    return list(product(*(range(w) for w in window))), F.pad(k, pad), inside


def _offsets(taps: list[tuple[int, ...]], window: Sequence[int], like: Tensor) -> Tensor:
    centre = torch.tensor([w // 2 for w in window], dtype=like.dtype, device=like.device)
    return torch.tensor(taps, dtype=like.dtype, device=like.device) - centre


def mov_a(q: Tensor, k: Tensor, *, window: Sequence[int], groups: int = 1) -> Tensor:
    """Formulation A: a Python loop over the taps, scores concatenated (and kept for the backward)."""
    taps, padded, outside = _window(q, k, window)
    size, d = q.shape[2:], q.shape[1] // groups
    scores = []
    for tap in taps:
        box = [slice(t, t + s) for t, s in zip(tap, size, strict=True)]
        here = (slice(None), slice(None), *box)
        score = (q * padded[here]).unflatten(1, (groups, d)).sum(2) * d**-0.5
        scores.append(score + outside[here])
    weights = torch.stack(scores, 2).softmax(2)
    return torch.einsum("bjt...,tn->bjn...", weights, _offsets(taps, window, weights)).mean(1)


def mov_b(q: Tensor, k: Tensor, *, window: Sequence[int], groups: int = 1) -> Tensor:
    """Formulation B: keys unfolded, multiplied with the queries at once (products kept for the backward)."""
    taps, padded, outside = _window(q, k, window)
    d = q.shape[1] // groups
    for axis, w in enumerate(window, start=2):
        padded, outside = padded.unfold(axis, w, 1), outside.unfold(axis, w, 1)
    n = len(window)
    padded, outside = padded.flatten(-n), outside.flatten(-n)
    scores = (q.unsqueeze(-1) * padded).unflatten(1, (groups, d)).sum(2) * d**-0.5 + outside
    weights = scores.softmax(-1)
    return (weights @ _offsets(taps, window, weights)).movedim(-1, 2).mean(1)


def mov_flex(q: Tensor, k: Tensor, *, window: Sequence[int], groups: int = 1) -> Tensor:
    """FlexAttention over all pixels in raster order, its mask the window truncated at the border.

    Values are absolute coordinates, the query's own subtracted afterwards; heads are padded to 16 channels. Computed in
    float32: coordinates beyond 256 are not exact in half precision, and their means are off by up to half a pixel.
    """
    n, (batch, channels, *size) = len(window), q.shape
    pixels, d = prod(size), channels // groups

    def heads(x: Tensor) -> Tensor:
        rows = x.float().reshape(batch, groups, d, pixels).transpose(2, 3)
        return F.pad(rows, (0, max(0, 16 - d)))

    grid = torch.meshgrid(*(torch.arange(s, device=q.device, dtype=torch.float32) for s in size), indexing="ij")
    own = torch.stack(grid, -1).reshape(pixels, n)
    values = F.pad(own, (0, 16 - n)).expand(batch, groups, pixels, 16)
    attend: Callable[..., Tensor] = _compiled_flex() if q.is_cuda else flex_attention  # type: ignore[assignment]
    mask = _window_mask(tuple(size), tuple(window), q.device.type)
    found = attend(heads(q), heads(k), values, block_mask=mask, scale=d**-0.5)
    return (found[..., :n] - own).mean(1).transpose(1, 2).reshape(batch, n, *size)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=1)
def _window_mask(size: tuple[int, ...], window: tuple[int, ...], device: str) -> BlockMask:
    def inside(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        kept = query == query
        for s, w in zip(reversed(size), reversed(window), strict=True):
            kept = kept & ((query % s - key % s).abs() <= w // 2)
            query, key = query // s, key // s
        return kept

    pixels = prod(size)
    return create_block_mask(inside, None, None, pixels, pixels, device=device, _compile=device == "cuda")
