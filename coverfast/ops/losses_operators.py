"""The operators of the losses, registered with torch: Triton alone.

In torch the losses are a few operations that torch.compile sees through.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coverfast.layout import new_like


@torch.library.custom_op(
    "coverfast::field_errors_forward",
    mutates_args=(),
    schema="(Tensor pred, Tensor field, str form, Tensor? mask, bool inside) -> Tensor",
)
def _errors_forward(pred: Tensor, field: Tensor, form: str, mask: Tensor | None, inside: bool) -> Tensor:
    from coverfast.kernels import losses as kernels

    launch, partials = kernels.field_errors_launch(pred, field, form, mask, inside)
    launch.run()
    return partials.sum(0, dtype=torch.float64)


@_errors_forward.register_fake
def _(pred: Tensor, field: Tensor, form: str, mask: Tensor | None, inside: bool) -> Tensor:
    return pred.new_empty(4, dtype=torch.float64)


@torch.library.custom_op(
    "coverfast::field_errors_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor pred, Tensor field, str form, Tensor? mask, bool inside, bool to_field)"
    " -> (Tensor, Tensor)",
)
def _errors_backward(
    grad: Tensor, pred: Tensor, field: Tensor, form: str, mask: Tensor | None, inside: bool, to_field: bool
) -> tuple[Tensor, Tensor]:
    from coverfast.kernels import losses as kernels

    d_pred = pred.new_empty(pred.shape)
    d_field = field.new_empty(field.shape if to_field else (0,))
    problem = (pred, field, form, mask, inside)
    kernels.field_errors_backward_launch(grad.contiguous(), *problem, d_pred, d_field if to_field else None).run()
    return d_pred, d_field


@_errors_backward.register_fake
def _(
    grad: Tensor, pred: Tensor, field: Tensor, form: str, mask: Tensor | None, inside: bool, to_field: bool
) -> tuple[Tensor, Tensor]:
    return pred.new_empty(pred.shape), field.new_empty(field.shape if to_field else (0,))


def _errors_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    pred, field, ctx.form, mask, ctx.inside = inputs
    ctx.save_for_backward(pred, field, mask)


def _errors_autograd(ctx, grad):  # type: ignore[no-untyped-def]
    pred, field, mask = ctx.saved_tensors
    to_field = ctx.needs_input_grad[1]
    problem = (pred, field, ctx.form, mask, ctx.inside)
    d_pred, d_field = torch.ops.coverfast.field_errors_backward(grad, *problem, to_field)
    return d_pred, d_field if to_field else None, None, None, None


_errors_forward.register_autograd(_errors_autograd, setup_context=_errors_context)


@torch.library.custom_op(
    "coverfast::consistency_forward",
    mutates_args=(),
    schema="(Tensor feat_a, Tensor feat_b, Tensor field, str form, Tensor? mask, bool inside) -> Tensor",
)
def _consistency_forward(
    feat_a: Tensor, feat_b: Tensor, field: Tensor, form: str, mask: Tensor | None, inside: bool
) -> Tensor:
    """Sums over the pixels that count: cosines, 1; `(2,)` float64."""
    from coverfast.kernels import losses as kernels

    launch, partials = kernels.consistency_launch(feat_a, feat_b, field, form, mask, inside)
    launch.run()
    return partials.sum(0, dtype=torch.float64)


@_consistency_forward.register_fake
def _(feat_a: Tensor, feat_b: Tensor, field: Tensor, form: str, mask: Tensor | None, inside: bool) -> Tensor:
    return feat_a.new_empty(2, dtype=torch.float64)


@torch.library.custom_op(
    "coverfast::consistency_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor feat_a, Tensor feat_b, Tensor field, str form, Tensor? mask, bool inside,"
    " bool to_field) -> (Tensor, Tensor, Tensor)",
)
def _consistency_backward(
    grad: Tensor,
    feat_a: Tensor,
    feat_b: Tensor,
    field: Tensor,
    form: str,
    mask: Tensor | None,
    inside: bool,
    to_field: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from coverfast.kernels import losses as kernels

    problem = (grad, feat_a, feat_b, field, form, mask, inside)
    d_a, d_b, d_field = kernels.consistency_backward(*problem, to_field=to_field)
    return d_a, d_b, field.new_empty(0) if d_field is None else d_field


@_consistency_backward.register_fake
def _(
    grad: Tensor,
    feat_a: Tensor,
    feat_b: Tensor,
    field: Tensor,
    form: str,
    mask: Tensor | None,
    inside: bool,
    to_field: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return new_like(feat_a), new_like(feat_b), field.new_empty(field.shape if to_field else (0,))


def _consistency_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    feat_a, feat_b, field, ctx.form, mask, ctx.inside = inputs
    ctx.save_for_backward(feat_a, feat_b, field, mask)


def _consistency_autograd(ctx, grad):  # type: ignore[no-untyped-def]
    feat_a, feat_b, field, mask = ctx.saved_tensors
    to_field = ctx.needs_input_grad[2]
    problem = (feat_a, feat_b, field, ctx.form, mask, ctx.inside)
    d_a, d_b, d_field = torch.ops.coverfast.consistency_backward(grad, *problem, to_field)
    return d_a, d_b, d_field if to_field else None, None, None, None


_consistency_forward.register_autograd(_consistency_autograd, setup_context=_consistency_context)
