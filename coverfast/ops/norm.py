"""The norm of the pyramid's projections: bias, then GroupNorm with one group, in one operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coverfast import reference
from coverfast.checks import InputError, check_map, check_same, shape_of
from coverfast.layout import channels_last, new_like
from coverfast.ops.dispatch import choose


def sample_norm(
    x: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, *, eps: float = 1e-5, impl: str = "auto"
) -> Tensor:
    """Add a bias, normalise each sample over channels and pixels, scale and shift by channel (SPEC 4).

    Args:
        x: `(B, C, *S)`, floating.
        bias: `(C,)`, of the convolution before.
        weight: `(C,)`, factor after.
        shift: `(C,)`, addend after.
        eps: added to the variance.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        `(B, C, *S)` in the dtype of `x`, also under autocast; computed in float32 (float64 for float64). Channels-last
        from Triton: the kernels of `mov` then read it in place.
    """
    check_map("x", x)
    for name, value in (("bias", bias), ("weight", weight), ("shift", shift)):
        if value.shape != x.shape[1:2]:
            raise InputError(f"{name} must be (C,) = {shape_of(x)[1:2]}, got {shape_of(value)}")
        check_same(name, value, "x", x, "device")
    chosen = choose("norm", impl, x)
    if chosen == "reference":
        return reference.sample_norm(x, bias, weight, shift, eps)
    if chosen == "torch":
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        own = bias.to(dtype).reshape(-1, *[1] * (x.ndim - 2))
        return F.group_norm(x.to(dtype) + own, 1, weight.to(dtype), shift.to(dtype), eps).to(x.dtype)
    parameters = (p.contiguous() for p in (bias, weight, shift))
    return torch.ops.coverfast.norm_forward(x, *parameters, eps)[0]


# --- operators: Triton alone; in torch it is a few operations that torch.compile sees through ------------------------


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=channels_last(x))
    return y, _statistics(x, (x.shape[0], 2))


def _statistics(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


@torch.library.custom_op(
    "coverfast::norm_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor bias, Tensor weight, Tensor shift, float eps) -> (Tensor, Tensor)",
)
def _forward(x: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and the mean and one over the deviation of each sample."""
    from coverfast.kernels import norm as kernels

    y, statistics = _outputs(x)
    for launch in kernels.forward_launches(x, bias, weight, shift, eps, y, statistics):
        launch.run()
    return y, statistics


@_forward.register_fake
def _(x: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _outputs(x)


@torch.library.custom_op(
    "coverfast::norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor bias, Tensor weight, Tensor statistics) -> (Tensor, Tensor)",
)
def _backward(grad: Tensor, x: Tensor, bias: Tensor, weight: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and, `(3, C)`, of bias, weight and shift."""
    from coverfast.kernels import norm as kernels

    return kernels.backward(grad, x, bias, weight, statistics)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, bias: Tensor, weight: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    return new_like(x), _statistics(x, (3, x.shape[1]))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, bias, weight, shift, _ = inputs
    ctx.save_for_backward(x, bias, weight, output[1])
    ctx.dtypes = bias.dtype, weight.dtype, shift.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for it


def _autograd(ctx, grad, _):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 5
    dx, of = torch.ops.coverfast.norm_backward(grad, *ctx.saved_tensors)
    return dx, *(d.to(dtype) for d, dtype in zip(of.unbind(0), ctx.dtypes, strict=True)), None


_forward.register_autograd(_autograd, setup_context=_setup_context)
