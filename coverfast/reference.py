"""The specification in code: each op as its definition, in a few obvious lines, slow, exact in float64.

The tests hold every other implementation to these. Arguments are already checked by the public functions of
`coverfast.ops`, whose docstrings say what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor

from coverfast.geometry import positions


def mov(q: Tensor, k: Tensor, window: Sequence[int], groups: int, scale: float) -> Tensor:
    """Mixture of vectors (COVER Eq. 7): softmax over the window of the scaled dot products, times the offsets."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.to(dtype), k.to(dtype)
    size, radius = q.shape[2:], [(w - 1) // 2 for w in window]
    pad = [r for r in reversed(radius) for _ in range(2)]
    padded, inside = F.pad(k, pad), F.pad(torch.ones_like(k[:, :1]), pad)
    offsets = list(product(*(range(-r, r + 1) for r in radius)))

    def taps(x: Tensor) -> Tensor:
        """`x` seen from every pixel at every offset of the window: `(B, C, T, P)`."""
        boxes = [[slice(r + i, r + i + s) for r, i, s in zip(radius, o, size, strict=True)] for o in offsets]
        return torch.stack([x[(slice(None), slice(None), *box)].flatten(2) for box in boxes], dim=2)

    queries = rearrange(q, "b (j d) ... -> b j d (...)", j=groups)
    keys = rearrange(taps(padded), "b (j d) t p -> b j d t p", j=groups)
    scores = scale * einsum(queries, keys, "b j d p, b j d t p -> b j t p")
    scores = scores.masked_fill(taps(inside)[:, :1] == 0, float("-inf"))
    weights = scores.softmax(dim=2)
    template = torch.tensor(offsets, dtype=dtype, device=q.device)
    vectors = einsum(weights, template, "b j t p, t n -> b j n p")
    return reduce(vectors, "b j n p -> b n p", "mean").unflatten(2, size)


def warp(x: Tensor, dvf: Tensor, mode: str, padding: str) -> Tensor:
    """`y(p) = x(p + dvf(p))`, multilinear over the corners of the cell, or nearest (SPEC 2)."""
    dtype = torch.float64 if torch.float64 in (x.dtype, dvf.dtype) else torch.float32
    size = x.shape[2:]
    coordinates = []
    for c, s in zip(positions(dvf), size, strict=True):
        if padding == "border":
            coordinates.append(torch.where(c.isnan(), 0, c).clamp(0, s - 1))
        else:
            # Anything beyond the outermost cells is outside all the same; -2 keeps the integers below in range.
            coordinates.append(torch.where((c > -2) & (c < s + 1), c, -2))

    def look_up(index: list[Tensor]) -> Tensor:
        inside = torch.ones_like(index[0], dtype=torch.bool)
        flat = torch.zeros_like(index[0])
        for i, s in zip(index, size, strict=True):
            inside &= (i >= 0) & (i <= s - 1)
            flat = flat * s + i.clamp(0, s - 1)
        rows = flat.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
        values = x.flatten(2).gather(2, rows).unflatten(2, flat.shape[1:])
        return values.masked_fill(~inside.unsqueeze(1), 0)

    if mode == "nearest":
        return look_up([c.round().long() for c in coordinates])
    low = [c.detach().floor() for c in coordinates]
    part = [c - f for c, f in zip(coordinates, low, strict=True)]
    out: Tensor | None = None
    for corner in product((0, 1), repeat=len(size)):
        weight = torch.ones_like(part[0])
        for bit, f in zip(corner, part, strict=True):
            weight = weight * (f if bit else 1 - f)
        index = [f.long() + bit for bit, f in zip(corner, low, strict=True)]
        if padding == "border":
            index = [i.clamp(max=s - 1) for i, s in zip(index, size, strict=True)]
        weight, values = weight.unsqueeze(1).to(dtype), look_up(index).to(dtype)
        # A corner without weight must not turn the pixel into NaN when its own value is not finite.
        term = weight * torch.where((weight == 0) & ~values.isfinite(), 0, values)
        out = term if out is None else out + term
    assert out is not None
    return out.to(x.dtype)


def upsample_dvf(coarse: Tensor, size: Sequence[int]) -> Tensor:
    """Twice the values, looked up at `(fine - 0.5) / 2`, clamped to the grid: linear in half-pixel geometry."""
    out = 2 * coarse
    for axis, s in enumerate(size, start=2):
        at = ((torch.arange(s, dtype=coarse.dtype, device=coarse.device) - 0.5) / 2).clamp(0, s // 2 - 1)
        cells = torch.arange(s // 2, dtype=coarse.dtype, device=coarse.device)
        hat = (1 - (rearrange(at, "f -> f 1") - rearrange(cells, "c -> 1 c")).abs()).clamp(min=0)
        out = einsum(out.movedim(axis, -1), hat, "... c, f c -> ... f").movedim(-1, axis)
    return out


def affine_dvf(theta: Tensor, size: Sequence[int], full_size: Sequence[int], origin: Sequence[int]) -> Tensor:
    """`A(p - c) + t + c - p` at every pixel `p` of a crop, about the centre `c` of the whole image (COVER Eq. 26)."""
    axes = [torch.arange(s, dtype=theta.dtype, device=theta.device) + o for s, o in zip(size, origin, strict=True)]
    p = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    c = (torch.tensor(full_size, dtype=theta.dtype, device=theta.device) - 1) / 2
    moved = einsum(theta[:, :, :-1], p - c, "b i j, ... j -> b ... i")
    moved = moved + theta[:, :, -1].reshape(-1, *[1] * len(size), len(size)) + c - p
    return rearrange(moved, "b ... i -> b i ...")


def inside_mask(dvf: Tensor) -> Tensor:
    """Where `0 <= p_i + psi_i(p) <= S_i - 1` on every axis (COVER Eq. 27)."""
    where = torch.stack(positions(dvf), 1)
    last = torch.tensor(dvf.shape[2:], device=dvf.device).reshape(1, -1, *[1] * (dvf.ndim - 2)) - 1
    return reduce((where >= 0) & (where <= last), "b i ... -> b 1 ...", "all")


def compose(fine: Tensor, coarse: Tensor) -> Tensor:
    """The fusion operation (COVER Eq. 28): the coarse field, up-sampled and doubled, looked up where `fine` points."""
    return fine + warp(upsample_dvf(coarse, fine.shape[2:]), fine, "linear", "border")


def fuse_affine(dvf: Tensor, theta: Tensor) -> Tensor:
    """`A(p + dvf(p) - c) + t + c - p` at every pixel `p`, about the grid's centre `c` (GVSL Eq. 12, SPEC 9)."""
    n, size = dvf.shape[1], dvf.shape[2:]
    axes = [torch.arange(s, dtype=dvf.dtype, device=dvf.device) for s in size]
    p = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    c = (torch.tensor(size, dtype=dvf.dtype, device=dvf.device).reshape(n, *[1] * n) - 1) / 2
    moved = einsum(theta[:, :, :-1], p + dvf - c, "b i j, b j ... -> b i ...")
    return moved + theta[:, :, -1].reshape(-1, n, *[1] * n) + c - p


def sample_norm(x: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Bias, then GroupNorm with one group: each sample over its channels and pixels."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    own, scale, moved = (rearrange(v.to(dtype), f"c -> 1 c {'1 ' * (x.ndim - 2)}") for v in (bias, weight, shift))
    value = x.to(dtype) + own
    away = value - reduce(value, "b ... -> b" + " 1" * (x.ndim - 1), "mean")
    spread = reduce(away * away, "b ... -> b" + " 1" * (x.ndim - 1), "mean")
    return (away / (spread + eps).sqrt() * scale + moved).to(x.dtype)


def masked_mean(values: Tensor, mask: Tensor | None, denominator: Tensor | float | None) -> Tensor:
    """Sum of `values` `(B, 1, *S)` where the mask is set, over `denominator` (default: pixels set, at least 1)."""
    if mask is None:
        total, count = values.sum(), torch.tensor(float(values.numel()), device=values.device)
    else:
        total, count = torch.where(mask, values, 0).sum(), mask.sum()
    return total / (count.clamp(min=1).to(values.dtype) if denominator is None else denominator)


def vector_loss(pred: Tensor, target: Tensor, mask: Tensor | None, denominator: Tensor | float | None) -> Tensor:
    """COVER Eq. 6 as a mean: L1 over components, mean over matched pixels."""
    return masked_mean(reduce((pred - target).abs(), "b n ... -> b 1 ...", "sum"), mask, denominator)


def end_point_error(pred: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean Euclidean distance between two fields over matched pixels, in pixels."""
    return masked_mean(torch.linalg.vector_norm(pred - target, dim=1, keepdim=True), mask, None)


def consistency_loss(
    feat_a: Tensor, feat_b: Tensor, dvf: Tensor, mask: Tensor | None, denominator: Tensor | float | None
) -> Tensor:
    """1 - mean cosine between the features of view b and those of view a brought over by the true field."""
    dtype = torch.float64 if feat_b.dtype == torch.float64 else torch.float32
    a, b = warp(feat_a, dvf, "linear", "zeros").to(dtype), feat_b.to(dtype)
    if mask is not None:  # features may be anything where they do not count
        a, b = (f.masked_fill(~mask, 0) for f in (a, b))
    dot = einsum(a, b, "b c ..., b c ... -> b ...").unsqueeze(1)
    norms = [torch.linalg.vector_norm(f, dim=1, keepdim=True).clamp(min=1e-6) for f in (a, b)]
    return 1 - masked_mean(dot / (norms[0] * norms[1]), mask, denominator)


def ncc_loss(x: Tensor, y: Tensor, window: Sequence[int], eps: float, denominator: Tensor | float | None) -> Tensor:
    """1 - mean squared correlation in the window around each pixel, clipped to the grid (GVSL Eq. 1, SPEC 9)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    n = len(window)
    pad = [w // 2 for w in reversed(window) for _ in range(2)]

    def taps(v: Tensor) -> Tensor:
        """What the window around every pixel shows, 0 out of the grid: `(B, C, *S, T)`."""
        v = F.pad(v, pad)
        for axis, w in enumerate(window, start=2):
            v = v.unfold(axis, w, 1)
        return v.flatten(-n)

    inside = taps(torch.ones_like(x, dtype=dtype))

    def mean(v: Tensor) -> Tensor:
        return reduce(v * inside, "... t -> ... 1", "sum") / reduce(inside, "... t -> ... 1", "sum")

    away_x, away_y = (v - mean(v) for v in (taps(x.to(dtype)), taps(y.to(dtype))))
    match = mean(away_x * away_y) ** 2 / ((mean(away_x**2) + eps) * (mean(away_y**2) + eps))
    return ((1 - match).sum() / (max(1, match.numel()) if denominator is None else denominator)).to(dtype)
