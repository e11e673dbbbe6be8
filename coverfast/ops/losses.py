"""Losses of vector contrastive learning and the figure of merit, masked to the pixels that both views show.

`mask` is `(B, 1, *S)` bool, or "inside" for the mask that the target field itself defines (`inside_mask`), or None
for every pixel. Sums run over the batch; `denominator` replaces the number of masked pixels by that of the whole
global batch when the batch is split. Everything is computed in float32 (float64 for float64).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from coverfast import reference
from coverfast.checks import InputError, check_dvf, check_map, check_same, shape_of
from coverfast.geometry import AffineDVF, as_dvf, inside_mask
from coverfast.ops import losses_operators as _registered  # noqa: F401
from coverfast.ops.dispatch import choose
from coverfast.ops.warp import Field, check_affine, warp

Mask = Tensor | Literal["inside"] | None


class FieldErrors(NamedTuple):
    """How far a predicted field is from the true one: scalars.

    Attributes:
        l1: the vector loss, `vector_loss`.
        epe: the end-point error, `end_point_error`, in pixels.
        still: the end-point error of predicting no displacement.
        mask: share of pixels that count, float64: times the pixels it is their number.
    """

    l1: Tensor
    epe: Tensor
    still: Tensor
    mask: Tensor


def field_errors(
    pred: Tensor,
    target: Field,
    mask: Mask = None,
    *,
    denominator: Tensor | float | None = None,
    impl: str = "auto",
) -> FieldErrors:
    """Loss and figures of merit of a field at once: one pass over the pixels in Triton. Arguments of `vector_loss`."""
    check_dvf("pred", pred)
    if choose("losses", impl, pred) == "triton":
        sums = _triton_sums(pred, target, mask)
        count = sums[3].clamp(min=1)
        means = (sums[:3] / count).to(_dtype(pred, target))
        l1 = means[0] if denominator is None else (sums[0] / denominator).to(means.dtype)
        share = sums[3] / max(1, pred[:, 0].numel())
        return FieldErrors(l1, means[1].detach(), means[2].detach(), share.detach())
    dense, where = _check_fields(pred, target, mask)
    loss = vector_loss(pred, dense, where, denominator=denominator, impl=impl)
    with torch.no_grad():
        epe = end_point_error(pred, dense, where, impl=impl)
        still = end_point_error(torch.zeros_like(dense), dense, where, impl=impl)
        share = torch.ones_like(loss) if where is None else where.sum().double() / max(1, where.numel())
    share = share.double()
    return FieldErrors(loss, epe, still, share)


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
        target: the true field, a tensor like `pred` or an `AffineDVF`, which Triton never writes out.
        mask: see the module; a pixel outside it counts neither in the sum nor in the denominator.
        denominator: what to divide by, default `max(1, masked pixels)` of this batch.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        Scalar, in pixels.
    """
    check_dvf("pred", pred)
    chosen = choose("losses", impl, pred)
    if chosen == "triton":
        sums = _triton_sums(pred, target, mask)
        return (sums[0] / (sums[3].clamp(min=1) if denominator is None else denominator)).to(_dtype(pred, target))
    dense, where = _check_fields(pred, target, mask)
    if chosen == "reference":
        return reference.vector_loss(pred, dense, where, denominator)
    return _masked_mean((pred - dense).abs().sum(1, keepdim=True), where, denominator)


def end_point_error(pred: Tensor, target: Field, mask: Mask = None, *, impl: str = "auto") -> Tensor:
    """Mean Euclidean distance between predicted and true field over masked pixels, in pixels. Arguments as above."""
    check_dvf("pred", pred)
    chosen = choose("losses", impl, pred)
    if chosen == "triton":
        sums = _triton_sums(pred, target, mask)
        return (sums[1] / sums[3].clamp(min=1)).to(_dtype(pred, target))
    dense, where = _check_fields(pred, target, mask)
    if chosen == "reference":
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
        feat_a: features of view a, `(B, C, *S)`, floating. Their gradient scatters, as that of `warp` does.
        feat_b: features of view b, same shape, dtype and device.
        dvf: the true field from b into a, `(B, n, *S)` or an `AffineDVF`.
        mask: see the module.
        denominator: what to divide the sum of cosines by, default `max(1, masked pixels)` of this batch.
        impl: "auto", "triton", "torch" or "reference". Triton warps, multiplies and sums in one pass: neither the
            warped features nor field or mask are written.

    Returns:
        Scalar in [0, 2]. Norms below 1e-6 count as 1e-6.
    """
    n = check_map("feat_a", feat_a)
    check_map("feat_b", feat_b)
    check_same("feat_b", feat_b, "feat_a", feat_a, "shape", "dtype", "device")
    chosen = choose("losses", impl, feat_a)
    dtype = torch.float64 if feat_a.dtype == torch.float64 else torch.float32
    field, form = _form(dvf) if chosen == "triton" else (as_dvf(dvf), "dense")
    size = feat_a.shape[2:]
    if form == "dense":
        if check_dvf("dvf", field) != n:
            raise InputError(f"dvf must have the {n} spatial axes of feat_a, got {field.ndim - 2}")
        check_same("dvf", field, "feat_a", feat_a, "batch", "size", "device")
    else:
        assert isinstance(dvf, AffineDVF)
        check_affine("dvf", dvf, "feat_a", feat_a)
    if chosen == "triton":
        where, inside = _mask_of(mask, field, size)
        sums = torch.ops.coverfast.consistency_forward(feat_a, feat_b, field, form, where, inside)
        return (1 - sums[0] / (sums[1].clamp(min=1) if denominator is None else denominator)).to(dtype)
    where = _check_mask(mask, field)
    if chosen == "reference":
        return reference.consistency_loss(feat_a, feat_b, field, where, denominator)
    a, b = warp(feat_a, field, impl=chosen).to(dtype), feat_b.to(dtype)
    if where is not None:  # features may be anything where they do not count, also in the gradient
        a, b = a.masked_fill(~where, 0), b.masked_fill(~where, 0)
    cosine = (a * b).sum(1, keepdim=True) / (_norm(a, 1e-6) * _norm(b, 1e-6))
    return 1 - _masked_mean(cosine, where, denominator)


# --- what Triton takes -----------------------------------------------------------------------------------------------


def _form(target: Field) -> tuple[Tensor, str]:
    """The numbers of an affine field, or a dense one; an affine field that asks for a gradient is written out."""
    if isinstance(target, AffineDVF) and not target.numbers.requires_grad:
        return target.numbers, "affine"
    return as_dvf(target), "dense"


def _dtype(pred: Tensor, target: Field) -> torch.dtype:
    return torch.promote_types(pred.dtype, (target.numbers if isinstance(target, AffineDVF) else target).dtype)


def _triton_sums(pred: Tensor, target: Field, mask: Mask) -> Tensor:
    """Sums over the pixels that count: L1, L2, L2 of the true field, 1; `(4,)` float64."""
    field, form = _form(target)
    if form == "dense":
        check_dvf("target", field)
        check_same("target", field, "pred", pred, "shape", "device")
    else:
        assert isinstance(target, AffineDVF)
        check_affine("target", target, "pred", pred)
    where, inside = _mask_of(mask, field, pred.shape[2:])
    return torch.ops.coverfast.field_errors_forward(pred, field, form, where, inside)


def _mask_of(mask: Mask, field: Tensor, size: torch.Size) -> tuple[Tensor | None, bool]:
    """The mask as contiguous bytes, or whether the kernel makes it."""
    if isinstance(mask, Tensor):
        return _check_given(mask, (field.shape[0], 1, *size), field).contiguous().view(torch.uint8), False
    if mask is None:
        return None, False
    _check_word(mask)
    return None, True


# --- torch -----------------------------------------------------------------------------------------------------------


def _check_fields(pred: Tensor, target: Field, mask: Mask) -> tuple[Tensor, Tensor | None]:
    check_dvf("pred", pred)
    dense = as_dvf(target)
    check_dvf("target", dense)
    check_same("target", dense, "pred", pred, "shape", "device")
    return dense, _check_mask(mask, dense)


def _check_mask(mask: Mask, dvf: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        _check_word(mask)
        return inside_mask(dvf)
    return _check_given(mask, (dvf.shape[0], 1, *dvf.shape[2:]), dvf)


def _check_word(mask: object) -> None:
    if not isinstance(mask, str) or mask != "inside":
        got = repr(mask) if isinstance(mask, str) else type(mask).__name__
        raise InputError(f"mask must be a bool tensor, 'inside' or None, got {got}")


def _check_given(mask: Tensor, expected: tuple[int, ...], field: Tensor) -> Tensor:
    check_same("mask", mask, "the field", field, "device")
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
