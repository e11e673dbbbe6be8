"""MoV as people write it in eager PyTorch today, to compare with.

**A** loops over the window: one slice, product and sum a tap, scores concatenated. **B** unfolds the keys and
multiplies at once. Both mask the taps outside the grid, so that they compute the same numbers as `coverfast.mov`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor


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
