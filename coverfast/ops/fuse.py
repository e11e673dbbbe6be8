"""Fusion of a displacement field with the affine map that follows it."""

from __future__ import annotations

import torch
from torch import Tensor

from coverfast import reference
from coverfast.checks import InputError, check_dvf, check_same, shape_of
from coverfast.geometry import axis_coordinates
from coverfast.ops.dispatch import choose


def fuse_affine(dvf: Tensor, theta: Tensor, *, impl: str = "auto") -> Tensor:
    """The one field of a displacement and an affine map after it, by which an image is sampled once (GVSL Eq. 12).

    `out(p) = Affine(p + dvf(p)) - p` with `Affine(x) = A(x - c) + t + c` about the grid's centre `c = (S - 1) / 2`, as
    in `affine_dvf`. Computed as `(A - I)(p - c + dvf(p)) + t + dvf(p)`, in which nothing cancels: under the identity a
    finite field is left exactly as it is.

    Args:
        dvf: `(B, n, *S)` in pixels, the displacement before the map; float32 or float64, any strides.
        theta: `(B, n, n + 1)`, `A | t`, `t` in pixels; same dtype and device.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        `(B, n, *S)` in pixels, dtype of `dvf`, contiguous. Differentiable in both; in Triton the gradient of `theta`, a
        sum over all pixels, is taken in a fixed order, the last step of it in float64.

    Raises:
        InputError: on a shape, dtype or device that does not fit. In Triton second-order gradients raise.
    """
    n = check_dvf("dvf", dvf)
    if not isinstance(theta, Tensor):
        raise InputError(f"theta must be a torch.Tensor, got {type(theta).__name__}")
    if theta.ndim != 3 or theta.shape[1] != n or theta.shape[2] != n + 1:
        raise InputError(f"theta must be (B, {n}, {n + 1}) for the {n} spatial axes of dvf, got {shape_of(theta)}")
    check_same("theta", theta, "dvf", dvf, "batch", "dtype", "device")
    chosen = choose("fuse", impl, dvf)
    if chosen == "triton":
        return torch.ops.coverfast.fuse_forward(dvf, theta)
    return reference.fuse_affine(dvf, theta) if chosen == "reference" else _torch(dvf, theta)


def _torch(dvf: Tensor, theta: Tensor) -> Tensor:
    """No matrix product: autocast and TF32 would round coordinates to a fraction of a pixel."""
    size = dvf.shape[2:]
    n = len(size)
    moves = theta - torch.eye(n, n + 1, dtype=theta.dtype, device=theta.device)
    *columns, shift = moves[(..., *[None] * n)].unbind(2)
    out = (dvf + shift).contiguous()
    for column, psi, p, s in zip(columns, dvf.unbind(1), axis_coordinates(size, dvf), size, strict=True):
        away = p - (s - 1) / 2 + psi
        out.addcmul_(column, away.unsqueeze(1))
    return out


# --- operators: Triton alone; in torch it is a few operations, which torch.compile sees through ----------------------


@torch.library.custom_op("coverfast::fuse_forward", mutates_args=(), schema="(Tensor dvf, Tensor theta) -> Tensor")
def _forward(dvf: Tensor, theta: Tensor) -> Tensor:
    from coverfast.kernels import fuse as kernels

    out = dvf.new_empty(dvf.shape)
    kernels.forward_launch(dvf, theta, out).run()
    return out


@_forward.register_fake
def _(dvf: Tensor, theta: Tensor) -> Tensor:
    return dvf.new_empty(dvf.shape)


@torch.library.custom_op(
    "coverfast::fuse_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor dvf, Tensor theta, bool to_dvf, bool to_theta) -> (Tensor, Tensor)",
)
def _backward(grad: Tensor, dvf: Tensor, theta: Tensor, to_dvf: bool, to_theta: bool) -> tuple[Tensor, Tensor]:
    from coverfast.kernels import fuse as kernels

    d_dvf, d_theta = kernels.backward(grad, dvf, theta, to_dvf=to_dvf, to_theta=to_theta)
    return dvf.new_empty(0) if d_dvf is None else d_dvf, theta.new_empty(0) if d_theta is None else d_theta


@_backward.register_fake
def _(grad: Tensor, dvf: Tensor, theta: Tensor, to_dvf: bool, to_theta: bool) -> tuple[Tensor, Tensor]:
    return dvf.new_empty(dvf.shape if to_dvf else (0,)), theta.new_empty(theta.shape if to_theta else (0,))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):  # type: ignore[no-untyped-def]
    to_dvf, to_theta = ctx.needs_input_grad
    d_dvf, d_theta = torch.ops.coverfast.fuse_backward(grad, *ctx.saved_tensors, to_dvf, to_theta)
    return d_dvf if to_dvf else None, d_theta if to_theta else None


_forward.register_autograd(_autograd, setup_context=_setup_context)
