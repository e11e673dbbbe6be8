"""Warping: bring an image or a feature map of view a onto the grid of view b by a displacement vector field."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from coverfast import reference
from coverfast.checks import InputError, check_choice, check_dvf, check_map, check_same
from coverfast.geometry import positions
from coverfast.ops.dispatch import choose

MODES = ("linear", "nearest")
PADDINGS = ("zeros", "border")

_UNSIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def warp(x: Tensor, dvf: Tensor, *, mode: str = "linear", padding: str = "zeros", impl: str = "auto") -> Tensor:
    """Sample `x` where a displacement field points, `y(p) = x(p + dvf(p))` (backward warping).

    Coordinates are pixel indices (`align_corners=True` in the language of `grid_sample`), so integer displacements
    reproduce finite pixels bit for bit.

    Args:
        x: `(B, C, *S)`; floating, or any integer dtype (labels) with `mode="nearest"`.
        dvf: `(B, n, *S)` in pixels of this grid, float32 or float64.
        mode: "linear" (the corners of the cell) or "nearest" (round half to even; no gradient to `dvf`).
        padding: "zeros" (outside counts as 0, in the value and in the slope; a NaN coordinate gives 0) or "border"
            (coordinates clamped to the grid; a NaN coordinate reads index 0).
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        `(B, C, *S)`, dtype of `x`; interpolated in float32 (float64 when either input is).

    Raises:
        InputError: on a shape, dtype or device that does not fit. Second-order gradients raise.
    """
    n = check_map("x", x, floating=False)
    if check_dvf("dvf", dvf) != n:
        raise InputError(f"dvf must have the {n} spatial axes of x, got {dvf.ndim - 2}")
    check_same("dvf", dvf, "x", x, "batch", "size", "device")
    return resample(x, dvf, mode=mode, padding=padding, impl=impl)


def resample(x: Tensor, dvf: Tensor, *, mode: str = "linear", padding: str = "zeros", impl: str = "auto") -> Tensor:
    """`warp` onto another grid: as `warp`, but the field `(B, n, *T)` sets the output size `(B, C, *T)`.

    A crop of a warped image is the image resampled with the crop's field plus the crop's origin.
    """
    check_choice("mode", mode, MODES)
    check_choice("padding", padding, PADDINGS)
    if x.dtype.is_complex or (x.dtype.is_floating_point and x.dtype.itemsize == 1):
        raise InputError(f"x must be a float of 16 to 64 bits, an integer or bool, got {x.dtype}")
    if mode == "linear" and not x.dtype.is_floating_point:
        raise InputError(f"x must be floating for mode='linear', got {x.dtype}; use mode='nearest' for labels")
    if x.dtype in _UNSIGNED:  # torch cannot gather these; labels do not mind how their bits are called
        signed = resample(x.view(_UNSIGNED[x.dtype]), dvf, mode=mode, padding=padding, impl=impl)
        return signed.view(x.dtype)
    chosen = choose("warp", impl, x)
    if chosen == "reference":
        return reference.warp(x, dvf, mode, padding)
    return torch.ops.coverfast.warp_forward(x, dvf, mode, padding, chosen)


@torch.library.custom_op(
    "coverfast::warp_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor dvf, str mode, str padding, str impl) -> Tensor",
)
def _forward(x: Tensor, dvf: Tensor, mode: str, padding: str, impl: str) -> Tensor:
    return _torch_forward(x, dvf, mode, padding)


@_forward.register_fake
def _(x: Tensor, dvf: Tensor, mode: str, padding: str, impl: str) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], *dvf.shape[2:]))


@torch.library.custom_op(
    "coverfast::warp_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor dvf, str mode, str padding, str impl, bool to_x, bool to_dvf)"
    " -> (Tensor, Tensor)",
)
def _backward(
    grad: Tensor, x: Tensor, dvf: Tensor, mode: str, padding: str, impl: str, to_x: bool, to_dvf: bool
) -> tuple[Tensor, Tensor]:
    return _torch_backward(grad, x, dvf, mode, padding, to_x, to_dvf)


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, dvf: Tensor, mode: str, padding: str, impl: str, to_x: bool, to_dvf: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if to_x else (0,)), dvf.new_empty(dvf.shape if to_dvf else (0,))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, dvf, ctx.mode, ctx.padding, ctx.impl = inputs
    ctx.save_for_backward(x, dvf)


def _autograd(ctx, grad):  # type: ignore[no-untyped-def]
    to_x, to_dvf = ctx.needs_input_grad[0], ctx.needs_input_grad[1] and ctx.mode == "linear"
    dx, d_dvf = torch.ops.coverfast.warp_backward(
        grad, *ctx.saved_tensors, ctx.mode, ctx.padding, ctx.impl, to_x, to_dvf
    )
    return dx if to_x else None, d_dvf if to_dvf else None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


# --- the lean torch formulation: one gather a corner, weights and indices recomputed in the backward -------------


def _cells(x: Tensor, dvf: Tensor, padding: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Per axis, `(B, P)` each: index of the cell's lower corner, position in the cell, and whether the slope counts."""
    low, part, sloped = [], [], []
    for c, s in zip(positions(dvf), x.shape[2:], strict=True):
        c = c.flatten(1)
        if padding == "border":
            sloped.append((c >= 0) & (c < s - 1))
            c = c.nan_to_num(nan=0.0).clamp(0, s - 1)
        else:
            near = (c >= -1) & (c < s)
            sloped.append(near)
            c = torch.where(near, c, -2)
        floor = c.floor()
        low.append(floor.long())
        part.append(c - floor)
    return low, part, sloped


def _corners(
    low: list[Tensor], part: list[Tensor], size: torch.Size, *, skip_empty: bool
) -> Iterator[tuple[tuple[int, ...], Tensor, list[Tensor], Tensor]]:
    """For each corner of the cell: its bits, flat index, weight along each axis, and whether it is in the grid.

    With `skip_empty` a corner of weight 0 reads its neighbour of weight 1 instead, so that a value that is not
    finite next to an integer position leaves no NaN.
    """
    for bits in product((0, 1), repeat=len(size)):
        flat = torch.zeros_like(low[0])
        inside = torch.ones_like(low[0], dtype=torch.bool)
        weights = []
        for bit, i, f, s in zip(bits, low, part, size, strict=True):
            index = i + (bit * (f > 0) if skip_empty else bit)
            inside &= (index >= 0) & (index < s)
            flat = flat * s + index.clamp(0, s - 1)
            weights.append(f if bit else 1 - f)
        yield bits, flat, weights, inside


def _product(factors: list[Tensor]) -> Tensor:
    out = factors[0]
    for factor in factors[1:]:
        out = out * factor
    return out


def _compute_dtype(x: Tensor, dvf: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, dvf.dtype) else torch.float32


def _nearest_index(x: Tensor, dvf: Tensor, padding: str) -> tuple[Tensor, Tensor]:
    flat: Tensor | None = None
    inside: Tensor | None = None
    for c, s in zip(positions(dvf), x.shape[2:], strict=True):
        c = c.flatten(1)
        if padding == "border":
            c = c.nan_to_num(nan=0.0).clamp(0, s - 1)
        else:
            c = torch.where((c > -2) & (c < s + 1), c, -2)
        index = c.round().long()
        ok = (index >= 0) & (index < s)
        index = index.clamp(0, s - 1)
        flat, inside = (index, ok) if flat is None or inside is None else (flat * s + index, inside & ok)
    assert flat is not None
    assert inside is not None
    return flat, inside


def _rows(flat: Tensor, channels: int) -> Tensor:
    return flat.unsqueeze(1).expand(-1, channels, -1)


def _torch_forward(x: Tensor, dvf: Tensor, mode: str, padding: str) -> Tensor:
    source, shape = x.flatten(2), (*x.shape[:2], *dvf.shape[2:])
    if mode == "nearest":
        flat, inside = _nearest_index(x, dvf, padding)
        return source.gather(2, _rows(flat, x.shape[1])).masked_fill_(~inside.unsqueeze(1), 0).view(shape)
    dtype = _compute_dtype(x, dvf)
    low, part, _ = _cells(x, dvf, padding)
    out: Tensor | None = None
    for _, flat, weights, inside in _corners(low, part, x.shape[2:], skip_empty=True):
        values = source.gather(2, _rows(flat, x.shape[1])).masked_fill_(~inside.unsqueeze(1), 0).to(dtype)
        weight = _product(weights).unsqueeze(1).to(dtype)
        out = values.mul_(weight) if out is None else out.addcmul_(values, weight)
    assert out is not None
    return out.to(x.dtype).view(shape)


def _torch_backward(
    grad: Tensor, x: Tensor, dvf: Tensor, mode: str, padding: str, to_x: bool, to_dvf: bool
) -> tuple[Tensor, Tensor]:
    channels, dtype = x.shape[1], _compute_dtype(x, dvf)
    g = grad.flatten(2).to(dtype)
    source = x.flatten(2)
    dx = torch.zeros(source.shape if to_x else (0,), dtype=dtype, device=x.device)
    d_dvf = torch.zeros((*dvf.shape[:2], g.shape[2]) if to_dvf else (0,), dtype=dtype, device=x.device)
    if mode == "nearest":
        flat, inside = _nearest_index(x, dvf, padding)
        if to_x:
            dx.scatter_add_(2, _rows(flat, channels), g * inside.unsqueeze(1))
        return dx.to(x.dtype).view(x.shape if to_x else (0,)), d_dvf.to(dvf.dtype).view(dvf.shape if to_dvf else (0,))
    low, part, sloped = _cells(x, dvf, padding)
    for bits, flat, weights, inside in _corners(low, part, x.shape[2:], skip_empty=False):
        if to_x:
            weight = _product(weights).mul_(inside).unsqueeze(1).to(dtype)
            dx.scatter_add_(2, _rows(flat, channels), g * weight)
        if to_dvf:
            # d(out)/d(c_i) of this corner: its value times plus or minus the weights along the other axes.
            values = source.gather(2, _rows(flat, channels)).to(dtype)
            pull = values.mul_(g).sum(1).masked_fill_(~inside, 0)
            for axis, (bit, slope) in enumerate(zip(bits, sloped, strict=True)):
                others = [w for i, w in enumerate(weights) if i != axis]
                term = _product(others).to(dtype) * pull * slope
                d_dvf[:, axis] += term if bit else -term
    dx_out = dx.to(x.dtype).view(x.shape) if to_x else x.new_empty(0)
    return dx_out, d_dvf.to(dvf.dtype).view(dvf.shape) if to_dvf else dvf.new_empty(0)
