"""Fusion of the displacement fields of two pyramid levels."""

from __future__ import annotations

import torch
from torch import Tensor

from coverfast import reference
from coverfast.checks import InputError, check_dvf, check_same, shape_of
from coverfast.geometry import upsample_dvf
from coverfast.ops.dispatch import choose
from coverfast.ops.warp import warp


def compose(fine: Tensor, coarse: Tensor, *, impl: str = "auto") -> Tensor:
    """Add to a field what the coarser level's field says where it points (COVER Eq. 28).

    `out(p) = fine(p) + up(p + fine(p))`, `up` the coarse field up-sampled and doubled, looked up with border padding
    (a displacement field does not drop to zero outside the grid).

    Args:
        fine: `(B, n, *S)` in fine pixels, found between `f_b` and the already warped `f_a`; float32 or float64.
        coarse: `(B, n, *S/2)` in coarse pixels; same dtype and device.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        `(B, n, *S)` in fine pixels. For two affine fields: the field of the composed maps wherever samples are inside.
    """
    if check_dvf("fine", fine) != check_dvf("coarse", coarse):
        raise InputError(f"coarse must have the {fine.ndim - 2} spatial axes of fine, got {coarse.ndim - 2}")
    check_same("coarse", coarse, "fine", fine, "batch", "dtype", "device")
    if any(f != 2 * c for f, c in zip(fine.shape[2:], coarse.shape[2:], strict=True)):
        raise InputError(
            f"fine must be exactly twice the size of coarse, {shape_of(coarse)[2:]}, got {shape_of(fine)[2:]}"
        )
    chosen = choose("compose", impl, fine)
    if chosen == "triton":
        return torch.ops.coverfast.compose_forward(fine, coarse)
    if chosen == "reference":
        return reference.compose(fine, coarse)
    return fine + warp(upsample_dvf(coarse, fine.shape[2:]), fine, padding="border", impl=chosen)


# --- operators: Triton alone; in torch it is the two steps, which torch.compile sees through -------------------------


@torch.library.custom_op("coverfast::compose_forward", mutates_args=(), schema="(Tensor fine, Tensor coarse) -> Tensor")
def _forward(fine: Tensor, coarse: Tensor) -> Tensor:
    from coverfast.kernels import compose as kernels

    out = fine.new_empty(fine.shape)
    kernels.forward_launch(fine, coarse, out).run()
    return out


@_forward.register_fake
def _(fine: Tensor, coarse: Tensor) -> Tensor:
    return fine.new_empty(fine.shape)


@torch.library.custom_op(
    "coverfast::compose_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor fine, Tensor coarse) -> (Tensor, Tensor)",
)
def _backward(grad: Tensor, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
    from coverfast.kernels import compose as kernels

    return kernels.backward(grad, fine, coarse)


@_backward.register_fake
def _(grad: Tensor, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
    return fine.new_empty(fine.shape), coarse.new_empty(coarse.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):  # type: ignore[no-untyped-def]
    return torch.ops.coverfast.compose_backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_autograd, setup_context=_setup_context)
