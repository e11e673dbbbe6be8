"""The operators as people write them in eager PyTorch today, to compare with.

`mov` in two formulations: **A** loops over the window, one slice, product and sum a tap, scores concatenated; **B**
unfolds the keys and multiplies at once. Both mask the taps outside the grid, so that they compute the same numbers as
`coverfast.mov`. FlexAttention does too, but over a raster of pixels. Everything that warps goes through `grid_sample`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


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


def mov_compiled(q: Tensor, k: Tensor, *, window: Sequence[int], groups: int = 1) -> Tensor:
    """Formulation A as `torch.compile` makes it, for one shape: every tap unrolled."""
    return _compiled_a()(q, k, window=window, groups=groups)


@cache
def _compiled_a() -> Callable[..., Tensor]:
    return torch.compile(mov_a, dynamic=False)


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
    mask = _window_mask(tuple(size), tuple(window), q.device.type)
    found = _flex(compiled=q.is_cuda)(heads(q), heads(k), values, block_mask=mask, scale=d**-0.5)
    return (found[..., :n] - own).mean(1).transpose(1, 2).reshape(batch, n, *size)


@cache
def _flex(*, compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention  # type: ignore[return-value]


@lru_cache(maxsize=1)
def _window_mask(size: tuple[int, ...], window: tuple[int, ...], device: str) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    def inside(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        kept = query == query
        for s, w in zip(reversed(size), reversed(window), strict=True):
            kept = kept & ((query % s - key % s).abs() <= w // 2)
            query, key = query // s, key // s
        return kept

    pixels = prod(size)
    return create_block_mask(inside, None, None, pixels, pixels, device=device, _compile=device == "cuda")


# --- fields ------------------------------------------------------------------------------------------------------


def sampling_grid(dvf: Tensor) -> Tensor:
    """The grid that `grid_sample` wants for a field in pixels, `(B, *S, n)`: normalised to [-1, 1], x first."""
    n, axes = dvf.shape[1], []
    for axis, size in enumerate(dvf.shape[2:]):
        p = torch.arange(size, dtype=dvf.dtype, device=dvf.device).reshape([-1 if i == axis else 1 for i in range(n)])
        axes.append(2 * (p + dvf[:, axis]) / max(1, size - 1) - 1)
    return torch.stack(axes[::-1], -1)


def sample(x: Tensor, grid: Tensor) -> Tensor:
    """`x` at the points of a grid, zeros outside; in the grid's precision, as under autocast."""
    return F.grid_sample(x.to(grid.dtype), grid, padding_mode="zeros", align_corners=True).to(x.dtype)


def warp_eager(x: Tensor, dvf: Tensor) -> Tensor:
    """The warp of registration code: a grid from the field, then `grid_sample`."""
    return sample(x, sampling_grid(dvf))


def warp_up_eager(x: Tensor, coarse: Tensor) -> Tensor:
    """The field of the level above up-sampled and doubled, then the warp."""
    return warp_eager(x, _upsampled(coarse))


def compose_eager(fine: Tensor, coarse: Tensor) -> Tensor:
    """Up-sample and double, look up with border padding, add."""
    return fine + F.grid_sample(_upsampled(coarse), sampling_grid(fine), padding_mode="border", align_corners=True)


def _upsampled(coarse: Tensor) -> Tensor:
    mode = "bilinear" if coarse.ndim == 4 else "trilinear"
    return 2 * F.interpolate(coarse, scale_factor=2, mode=mode, align_corners=False)


def fuse_eager(dvf: Tensor, theta: Tensor) -> Tensor:
    """The affine grid of registration code: homogeneous coordinates about the centre, one matrix product, then minus
    the grid.
    """
    n, size = dvf.shape[1], dvf.shape[2:]
    axes = [torch.arange(s, dtype=dvf.dtype, device=dvf.device) - (s - 1) / 2 for s in size]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(1, n, -1)
    looks = grid + dvf.flatten(2)
    return (theta @ torch.cat([looks, torch.ones_like(looks[:, :1])], 1) - grid).reshape(dvf.shape)


def ncc_eager(x: Tensor, y: Tensor, *, window: int = 9, eps: float = 1e-5, separable: bool = False) -> Tensor:
    """The local correlation of registration code: convolutions of x, y, x^2, y^2, x y with a box of ones, here over the
    pixels that the window has in the grid; `separable`: one convolution an axis instead of one.
    """
    n = x.ndim - 2
    convolve = F.conv2d if n == 2 else F.conv3d
    shapes = [[window if i == axis else 1 for i in range(n)] for axis in range(n)] if separable else [[window] * n]
    boxes = [x.new_ones(1, 1, *shape) for shape in shapes]
    count = x.new_ones(())
    for s in x.shape[2:]:
        i, r = torch.arange(s, dtype=x.dtype, device=x.device), window // 2
        count = count.unsqueeze(-1) * ((i + r).clamp(max=s - 1) - (i - r).clamp(min=0) + 1)

    def mean(v: Tensor) -> Tensor:
        for box in boxes:
            v = convolve(v, box, padding=[w // 2 for w in box.shape[2:]])
        return v / count

    m_x, m_y = mean(x), mean(y)
    cross = mean(x * y) - m_x * m_y
    v_x, v_y = mean(x * x) - m_x * m_x, mean(y * y) - m_y * m_y
    return 1 - (cross * cross / ((v_x + eps) * (v_y + eps))).mean()


def consistency_eager(feat_a: Tensor, feat_b: Tensor, dvf: Tensor, mask: Tensor) -> Tensor:
    """All channels warped, then the cosine; the field and its mask are there already."""
    warped = sample(feat_a, sampling_grid(dvf)).to(dvf.dtype)
    cosine = F.cosine_similarity(warped, feat_b.to(dvf.dtype), dim=1, eps=1e-6).unsqueeze(1)
    return 1 - (cosine * mask).sum() / mask.sum().clamp(min=1)


def vector_eager(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """L1 with a dense target and its mask, both there already."""
    return ((pred - target).abs().sum(1, keepdim=True) * mask).sum() / mask.sum().clamp(min=1)


def end_point_eager(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean distance with a dense target and its mask, both there already."""
    return ((pred - target).norm(dim=1, keepdim=True) * mask).sum() / mask.sum().clamp(min=1)
