"""Losses of vector contrastive learning and the figure of merit, masked to the pixels that both views show.

`mask` is `(B, 1, *S)` bool, or "inside" for the mask that the target field itself defines (`inside_mask`), or None
for every pixel. Sums run over the batch; `denominator` replaces the number of masked pixels by that of the whole
global batch when the batch is split. Everything is computed in float32 (float64 for float64).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from coverfast import reference
from coverfast.checks import InputError, check_dvf, check_map, check_same, shape_of
from coverfast.geometry import AffineDVF, as_dvf, inside_mask
from coverfast.ops.dispatch import choose
from coverfast.ops.warp import warp

Mask = Tensor | Literal["inside"] | None
Field = Tensor | AffineDVF


def vector_loss(
    pred: Tensor,
    target: Field,
    mask: Mask = None,
    *,
    denominator: Tensor | float | None = None,
    impl: str = "auto",
) -> Tensor:
    """L1 between predicted and true field, summed over components, mean over masked pixels (COVER Eq. 6).

    Args:
        pred: `(B, n, *S)` in pixels, float32 or float64.
        target: the true field, a tensor like `pred` or an `AffineDVF`.
        mask: see the module; a pixel outside it counts neither in the sum nor in the denominator.
        denominator: what to divide by, default `max(1, masked pixels)` of this batch.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        Scalar, in pixels.
    """
    dense, where = _check_fields(pred, target, mask)
    if choose("losses", impl, pred) == "reference":
        return reference.vector_loss(pred, dense, where, denominator)
    return _masked_mean((pred - dense).abs().sum(1, keepdim=True), where, denominator)


def end_point_error(pred: Tensor, target: Field, mask: Mask = None, *, impl: str = "auto") -> Tensor:
    """Mean Euclidean distance between predicted and true field over masked pixels, in pixels. Arguments as above."""
    dense, where = _check_fields(pred, target, mask)
    if choose("losses", impl, pred) == "reference":
        return reference.end_point_error(pred, dense, where)
    return _masked_mean(_norm(pred - dense, 0.0), where, None)


def consistency_loss(
    feat_a: Tensor,
    feat_b: Tensor,
    dvf: Field,
    mask: Mask = None,
    *,
    denominator: Tensor | float | None = None,
    impl: str = "auto",
) -> Tensor:
    """1 - mean cosine between `feat_b` and `feat_a` warped by the true field (COVER Sec. 3.2, L_con).

    Args:
        feat_a: features of view a, `(B, C, *S)`, floating.
        feat_b: features of view b, same shape, dtype and device.
        dvf: the true field from b into a, `(B, n, *S)` or an `AffineDVF`.
        mask: see the module.
        denominator: what to divide the sum of cosines by, default `max(1, masked pixels)` of this batch.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        Scalar in [0, 2]. Norms below 1e-6 count as 1e-6.
    """
    n = check_map("feat_a", feat_a)
    check_map("feat_b", feat_b)
    check_same("feat_b", feat_b, "feat_a", feat_a, "shape", "dtype", "device")
    dense = as_dvf(dvf)
    if check_dvf("dvf", dense) != n:
        raise InputError(f"dvf must have the {n} spatial axes of feat_a, got {dense.ndim - 2}")
    check_same("dvf", dense, "feat_a", feat_a, "batch", "size", "device")
    where = _check_mask(mask, dense)
    chosen = choose("losses", impl, feat_a)
    if chosen == "reference":
        return reference.consistency_loss(feat_a, feat_b, dense, where, denominator)
    dtype = torch.float64 if feat_a.dtype == torch.float64 else torch.float32
    a, b = warp(feat_a, dense, impl=chosen).to(dtype), feat_b.to(dtype)
    if where is not None:  # features may be anything where they do not count, also in the gradient
        a, b = a.masked_fill(~where, 0), b.masked_fill(~where, 0)
    cosine = (a * b).sum(1, keepdim=True) / (_norm(a, 1e-6) * _norm(b, 1e-6))
    return 1 - _masked_mean(cosine, where, denominator)


def _check_fields(pred: Tensor, target: Field, mask: Mask) -> tuple[Tensor, Tensor | None]:
    check_dvf("pred", pred)
    dense = as_dvf(target)
    check_dvf("target", dense)
    check_same("target", dense, "pred", pred, "shape", "device")
    return dense, _check_mask(mask, dense)


def _check_mask(mask: Mask, dvf: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if isinstance(mask, str):
        if mask != "inside":
            raise InputError(f"mask must be a bool tensor, 'inside' or None, got {mask!r}")
        return inside_mask(dvf)
    if not isinstance(mask, Tensor):
        raise InputError(f"mask must be a bool tensor, 'inside' or None, got {type(mask).__name__}")
    check_same("mask", mask, "the field", dvf, "device")
    expected = (dvf.shape[0], 1, *dvf.shape[2:])
    if mask.dtype != torch.bool or mask.shape != expected:
        raise InputError(f"mask must be bool {tuple(expected)}, got {mask.dtype} {shape_of(mask)}")
    return mask


def _norm(x: Tensor, least: float) -> Tensor:
    """`max(|x|, least)` over the channels, `(B, 1, *S)`; its gradient is 0 where `least` or 0 is the result.

    torch's own norm over an axis that is not the last takes several times as long on a CPU.
    """
    square = (x * x).sum(1, keepdim=True)
    enough = ~(square <= least**2)  # NaN stays NaN
    return torch.where(enough, torch.where(enough, square, 1).sqrt(), least)


def _masked_mean(values: Tensor, mask: Tensor | None, denominator: Tensor | float | None) -> Tensor:
    # `where`, not a product: a field may be infinite or NaN where the mask is off.
    total = values.sum() if mask is None else torch.where(mask, values, 0).sum()
    if denominator is None:
        if mask is None:
            return total / max(1, values.numel())
        return total / mask.sum().clamp(min=1).to(values.dtype)
    return total / denominator
