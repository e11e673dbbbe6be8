"""Warping: bring an image or a feature map of view a onto the grid of view b by a displacement vector field."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from coverfast import reference
from coverfast.checks import InputError, check_choice, check_dvf, check_map, check_same, shape_of
from coverfast.geometry import AffineDVF, downsample_gradient, positions, upsample_dvf
from coverfast.layout import has_rows, new_like
from coverfast.ops.dispatch import choose

MODES = ("linear", "nearest")
PADDINGS = ("zeros", "border")

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64, torch.bool: torch.uint8}


Field = Tensor | AffineDVF


def warp(x: Tensor, dvf: Field, *, mode: str = "linear", padding: str = "zeros", impl: str = "auto") -> Tensor:
    """Sample `x` where a displacement field points, `y(p) = x(p + dvf(p))` (backward warping).

    Coordinates are pixel indices (`align_corners=True` in the language of `grid_sample`), so integer displacements
    reproduce finite pixels bit for bit.

    Args:
        x: `(B, C, *S)`; floating, or any integer dtype (labels) with `mode="nearest"`.
        dvf: `(B, n, *S)` in pixels of this grid, float32 or float64; or an `AffineDVF`, which Triton never writes out.
        mode: "linear" (the corners of the cell) or "nearest" (round half to even; no gradient to `dvf`).
        padding: "zeros" (outside counts as 0, in the value and in the slope; a NaN coordinate gives 0) or "border"
            (coordinates clamped to the grid; a NaN coordinate reads index 0).
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        `(B, C, *S)`, dtype of `x`, channels-last where the channels of `x` are contiguous; interpolated in float32
        (float64 when either input is). The gradient to `x` scatters: on a GPU its last bits change from run to run,
        unless `torch.use_deterministic_algorithms(True)` asks for sums in fixed point.

    Raises:
        InputError: on a shape, dtype or device that does not fit. Second-order gradients raise.
    """
    n = check_map("x", x, floating=False)
    if isinstance(dvf, AffineDVF):
        check_affine("dvf", dvf, "x", x)
        field, form = _numbers(dvf, "affine")
        return _warp(x, field, form, x.shape[2:], mode, padding, impl)
    if check_dvf("dvf", dvf) != n:
        raise InputError(f"dvf must have the {n} spatial axes of x, got {dvf.ndim - 2}")
    check_same("dvf", dvf, "x", x, "batch", "size", "device")
    return _warp(x, dvf, "dense", dvf.shape[2:], mode, padding, impl)


def resample(x: Tensor, dvf: Field, *, mode: str = "linear", padding: str = "zeros", impl: str = "auto") -> Tensor:
    """`warp` onto another grid: as `warp`, but the field `(B, n, *T)` sets the output size `(B, C, *T)`.

    An `AffineDVF` is that of a crop of `x`: its origin is added to where it points. A tensor must hold the crop's
    origin already.
    """
    n = check_map("x", x, floating=False)
    axes = len(dvf.size) if isinstance(dvf, AffineDVF) else check_dvf("dvf", dvf)
    if axes != n:
        raise InputError(f"dvf must have the {n} spatial axes of x, got {axes}")
    check_same("dvf", dvf.numbers if isinstance(dvf, AffineDVF) else dvf, "x", x, "batch", "device")
    if isinstance(dvf, AffineDVF):
        field, form = _numbers(dvf, "crop")
        return _warp(x, field, form, dvf.size, mode, padding, impl)
    return _warp(x, dvf, "dense", dvf.shape[2:], mode, padding, impl)


def warp_up(x: Tensor, coarse: Tensor, *, impl: str = "auto") -> Tensor:
    """`warp(x, upsample_dvf(coarse, size of x))`, linear with zeros; in Triton the fine field is never written.

    Args:
        x: `(B, C, *S)`, floating.
        coarse: field of the level above, `(B, n, *S/2)`, in pixels of its own grid.
        impl: "auto", "triton", "torch" or "reference".
    """
    n = check_map("x", x)
    if check_dvf("coarse", coarse) != n:
        raise InputError(f"coarse must have the {n} spatial axes of x, got {coarse.ndim - 2}")
    check_same("coarse", coarse, "x", x, "batch", "device")
    if any(f != 2 * c for f, c in zip(x.shape[2:], coarse.shape[2:], strict=True)):
        raise InputError(f"x must be exactly twice the size of coarse, {shape_of(coarse)[2:]}, got {shape_of(x)[2:]}")
    return _warp(x, coarse, "coarse", x.shape[2:], "linear", "zeros", impl)


def check_affine(name: str, field: AffineDVF, other_name: str, other: Tensor) -> None:
    """Check that an affine field is on the grids of a map."""
    found, expected = (field.numbers.shape[0], *field.size), (other.shape[0], *other.shape[2:])
    if found != expected:
        raise InputError(f"{name} must have the batch and size of {other_name}, {tuple(expected)}, got {found}")
    check_same(name, field.numbers, other_name, other, "device")


def _numbers(dvf: AffineDVF, form: str) -> tuple[Tensor, str]:
    """What the operator takes of an affine field; one that asks for a gradient is written out."""
    if not dvf.numbers.requires_grad:
        return dvf.numbers, form
    return _psi(dvf.numbers, form, dvf.size), "dense"


def _warp(x: Tensor, field: Tensor, form: str, size: Sequence[int], mode: str, padding: str, impl: str) -> Tensor:
    check_choice("mode", mode, MODES)
    check_choice("padding", padding, PADDINGS)
    if x.dtype.is_complex or (x.dtype.is_floating_point and x.dtype.itemsize == 1):
        raise InputError(f"x must be a float of 16 to 64 bits, an integer or bool, got {x.dtype}")
    if mode == "linear" and not x.dtype.is_floating_point:
        raise InputError(f"x must be floating for mode='linear', got {x.dtype}; use mode='nearest' for labels")
    if x.dtype in _SIGNED:  # torch cannot gather these; labels do not mind how their bits are called
        signed = _warp(x.view(_SIGNED[x.dtype]), field, form, size, mode, padding, impl)
        return signed.view(x.dtype)
    chosen = choose("warp", impl, x)
    if chosen == "reference":
        return reference.warp(x, _psi(field, form, size), mode, padding)
    return torch.ops.coverfast.warp_forward(x, field, form, size, mode, padding, chosen)


def _psi(field: Tensor, form: str, size: Sequence[int]) -> Tensor:
    """Displacements into `x` of a field in any form: "dense", "coarse", "affine", or "crop" (affine, plus origin)."""
    if form == "dense":
        return field
    if form == "coarse":
        return upsample_dvf(field, size)
    psi = AffineDVF.of(field, tuple(size)).dense()
    return psi + field[..., -1].reshape(len(field), len(size), *[1] * len(size)) if form == "crop" else psi


# --- operators -------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "coverfast::warp_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor field, str form, SymInt[] size, str mode, str padding, str impl) -> Tensor",
)
def _forward(x: Tensor, field: Tensor, form: str, size: Sequence[int], mode: str, padding: str, impl: str) -> Tensor:
    out = new_like(x, size)
    if impl == "triton":
        from coverfast.kernels import warp as kernels

        kernels.forward_launch(x, field, form, out, mode, padding).run()
        return out
    found = _torch_forward(x, _psi(field, form, size), mode, padding)
    return found if out.is_contiguous() else out.copy_(found)


@_forward.register_fake
def _(x: Tensor, field: Tensor, form: str, size: Sequence[int], mode: str, padding: str, impl: str) -> Tensor:
    return new_like(x, size)


@torch.library.custom_op(
    "coverfast::warp_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor field, str form, str mode, str padding, str impl, bool to_x, bool to_field)"
    " -> (Tensor, Tensor)",
)
def _backward(
    grad: Tensor, x: Tensor, field: Tensor, form: str, mode: str, padding: str, impl: str, to_x: bool, to_field: bool
) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        from coverfast.kernels import warp as kernels

        dx, d_field = kernels.backward(grad, x, field, form, mode, padding, to_x=to_x, to_field=to_field)
        return x.new_empty(0) if dx is None else dx, field.new_empty(0) if d_field is None else d_field
    psi = _psi(field, form, grad.shape[2:])
    dx, d_field = _torch_backward(grad, x, psi, mode, padding, to_x, to_field)
    if to_x and has_rows(x):
        dx = new_like(x).copy_(dx)
    return dx, downsample_gradient(d_field) if to_field and form == "coarse" else d_field


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, field: Tensor, form: str, mode: str, padding: str, impl: str, to_x: bool, to_field: bool
) -> tuple[Tensor, Tensor]:
    return new_like(x) if to_x else x.new_empty(0), field.new_empty(field.shape if to_field else (0,))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, field, ctx.form, _, ctx.mode, ctx.padding, ctx.impl = inputs
    ctx.save_for_backward(x, field)


def _autograd(ctx, grad):  # type: ignore[no-untyped-def]
    to_x, to_field = ctx.needs_input_grad[0], ctx.needs_input_grad[1] and ctx.mode == "linear"
    if not (to_x or to_field):
        return (None,) * 7
    dx, d_field = torch.ops.coverfast.warp_backward(
        grad, *ctx.saved_tensors, ctx.form, ctx.mode, ctx.padding, ctx.impl, to_x, to_field
    )
    return dx if to_x else None, d_field if to_field else None, None, None, None, None, None


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


def _scatter(dx: Tensor, flat: Tensor, values: Tensor) -> None:
    """Add `(B, C, P)` values at pixels `(B, P)`; on a GPU deterministic in one dimension only."""
    rows = _rows(flat, dx.shape[1])
    if not (dx.is_cuda and torch.are_deterministic_algorithms_enabled()):
        dx.scatter_add_(2, rows, values)
        return
    plane = torch.arange(dx.shape[0] * dx.shape[1], device=dx.device).view(*dx.shape[:2], 1) * dx.shape[2]
    dx.view(-1).scatter_add_(0, (rows + plane).flatten(), values.flatten())


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
            _scatter(dx, flat, g * inside.unsqueeze(1))
        return dx.to(x.dtype).view(x.shape if to_x else (0,)), d_dvf.to(dvf.dtype).view(dvf.shape if to_dvf else (0,))
    low, part, sloped = _cells(x, dvf, padding)
    for bits, flat, weights, inside in _corners(low, part, x.shape[2:], skip_empty=False):
        if to_x:
            # Not weight 0 outside the grid: a gradient that overflowed there would leave NaN inside.
            weight = _product(weights).unsqueeze(1).to(dtype)
            _scatter(dx, flat, (g * weight).masked_fill_(~inside.unsqueeze(1), 0))
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
