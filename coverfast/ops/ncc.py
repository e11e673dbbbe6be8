"""Local normalised cross-correlation: how alike two images are around every pixel, whatever their brightness there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from coverfast import reference
from coverfast.checks import InputError, check_map, check_same, check_window
from coverfast.layout import new_like
from coverfast.ops.dispatch import choose


def ncc_loss(
    x: Tensor,
    y: Tensor,
    window: int | Sequence[int] = 9,
    *,
    eps: float = 1e-5,
    denominator: Tensor | float | None = None,
    impl: str = "auto",
) -> Tensor:
    """1 - mean squared local correlation of two images (SPEC 9; GVSL Eq. 1, which prints its sum as what to minimise).

    In the window around a pixel, clipped to the grid, with variances `v_x` and `v_y` and covariance `cross`, the match
    is `cross^2 / ((v_x + eps) (v_y + eps))`, in [0, 1): unchanged where an image becomes `a x + b`, up to `eps`, and 0
    where one is constant. The gradient at a pixel is at most `2 sqrt(2^n W / eps) / denominator`, `W` the pixels of a
    window.

    Args:
        x: images `(B, C, *S)`; float16, bfloat16, float32, float64, any strides. Channels are compared one by one.
        y: images to compare them with; same shape, dtype and device.
        window: odd width in pixels, an int or one per axis; may exceed the grid.
        eps: a variance, for intensities in [0, 1] (else times their range squared): 1e-5 is a deviation of 0.003, less
            than a grey level of an 8-bit image, but a hundred times what rounding leaves of a variance in float32.
        denominator: what to divide the sum of `1 - match` by, default the pixels of all channels, `B C prod(S)`; those
            of the whole global batch where this is a part of it.
        impl: "auto", "triton", "torch" or "reference". Triton reads images whose samples are contiguous in place; any
            other is copied first. Both it and torch find the gradients in the forward pass, of images that ask for one.

    Returns:
        Scalar, float32 (float64 for float64), in [0, 1] without a `denominator`; 0 of an empty batch.

    Raises:
        InputError: on a shape, dtype, device, window or eps that does not fit. Second-order gradients raise,
            but those of the reference.
    """
    ndim = check_map("x", x)
    check_map("y", y)
    check_same("y", y, "x", x, "shape", "dtype", "device")
    sizes = check_window(window, ndim)
    if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not 0 < eps < inf:
        raise InputError(f"eps must be a positive number, got {eps!r}")
    chosen = choose("ncc", impl, x)
    if chosen == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return reference.ncc_loss(x, y, sizes, eps, denominator)
    to_x, to_y = (image.requires_grad and torch.is_grad_enabled() for image in (x, y))
    matched = torch.ops.coverfast.ncc_forward(x, y, sizes, float(eps), to_x, to_y, chosen)[0]
    return ((x.numel() - matched) / (max(1, x.numel()) if denominator is None else denominator)).to(_exact(x))


# --- operators -------------------------------------------------------------------------------------------------------
# The forward finds the slopes of the summed match too: all that they need is at hand there, and one map is kept instead
# of three.


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _slopes(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty(x.shape if wanted else (0,), dtype=_exact(x))


@torch.library.custom_op(
    "coverfast::ncc_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor y, int[] window, float eps, bool to_x, bool to_y, str impl) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    x: Tensor, y: Tensor, window: Sequence[int], eps: float, to_x: bool, to_y: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of all matches, float64, and its slopes by x and y, contiguous, where they are wanted."""
    d_x, d_y = _slopes(x, to_x), _slopes(y, to_y)
    wanted = d_x if to_x else None, d_y if to_y else None
    with torch.autocast(x.device.type, enabled=False):
        if impl == "triton":
            from coverfast.kernels import ncc as kernels

            partials = [d_x.new_zeros(1)]
            for launch in kernels.launches(x, y, window, eps, *wanted, partials):
                launch.run()
            matched = torch.cat(partials).sum(dtype=torch.float64)
        else:
            matched = _torch_forward(x, y, window, eps, *wanted)
    return matched, d_x, d_y


@_forward.register_fake
def _(
    x: Tensor, y: Tensor, window: Sequence[int], eps: float, to_x: bool, to_y: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((), dtype=torch.float64), _slopes(x, to_x), _slopes(y, to_y)


@torch.library.custom_op(
    "coverfast::ncc_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor y, Tensor d_x, Tensor d_y, bool to_x, bool to_y) -> (Tensor, Tensor)",
)
def _backward(
    grad: Tensor, x: Tensor, y: Tensor, d_x: Tensor, d_y: Tensor, to_x: bool, to_y: bool
) -> tuple[Tensor, Tensor]:
    found = _gradients(x, y, to_x, to_y)
    for gradient, slopes in zip(found, (d_x, d_y), strict=True):
        if gradient.numel():
            torch.mul(slopes, grad.to(slopes.dtype), out=gradient)
    return found


@_backward.register_fake
def _(grad: Tensor, x: Tensor, y: Tensor, d_x: Tensor, d_y: Tensor, to_x: bool, to_y: bool) -> tuple[Tensor, Tensor]:
    return _gradients(x, y, to_x, to_y)


def _gradients(x: Tensor, y: Tensor, to_x: bool, to_y: bool) -> tuple[Tensor, Tensor]:
    return new_like(x) if to_x else x.new_empty(0), new_like(y) if to_y else y.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, y, _, _, ctx.to_x, ctx.to_y, _ = inputs
    # The images say how gradients lie in memory, and keep second-order gradients from being taken for zero.
    ctx.save_for_backward(x, y, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for the slopes


def _autograd(ctx, grad, _grad_d_x, _grad_d_y):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 7
    d_x, d_y = torch.ops.coverfast.ncc_backward(grad, *ctx.saved_tensors, ctx.to_x, ctx.to_y)
    return d_x if ctx.to_x else None, d_y if ctx.to_y else None, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


# --- the lean torch formulation --------------------------------------------------------------------------------------

#: Pixels that are served together, so that their maps stay in a cache.
_BLOCK = 2**18


def _torch_forward(
    x: Tensor, y: Tensor, window: Sequence[int], eps: float, d_x: Tensor | None, d_y: Tensor | None
) -> Tensor:
    """The sum of all matches; fills the slopes. With the window's a, b and c, `match` has the slope `a x + b y + c` by
    a pixel of y in it, and a pixel is in those windows that are centred on one of its own window.
    """
    size = x.shape[2:]
    # A window that reaches beyond the grid on both sides of every pixel is as good as a narrower one.
    radii = [min(w // 2, s - 1) for w, s in zip(window, size, strict=True)]
    n = _counts(radii, size, x)
    least, matched = eps * n * n, x.new_zeros((), dtype=torch.float64)
    targets = [None if d is None else d.flatten(0, 1) for d in (d_x, d_y)]
    for part, u, v in _blocks(x, y, n.dtype):
        s_u, s_v = _box(u, radii), _box(v, radii)
        # Everything n^2 times as large: fewer divisions, and where images are constant no remainder of one.
        v_u = (n * _box(u * u, radii)).sub_(s_u * s_u).clamp_(min=0)
        v_v = (n * _box(v * v, radii)).sub_(s_v * s_v).clamp_(min=0)
        # Rounding leaves no negative variance, and no covariance without one.
        most = v_u.sqrt().mul_(v_v.sqrt())
        cross = (n * _box(u * v, radii)).sub_(s_u * s_v).clamp_(-most, most)
        over_u, over_v = v_u.add_(least).reciprocal_(), v_v.add_(least).reciprocal_()
        shared = cross * over_u * over_v
        match = cross.mul_(shared)
        matched += match.sum(dtype=torch.float64)
        if d_x is None and d_y is None:
            continue
        a = shared.mul_(2 * n)
        sum_a = _box(a, radii)
        match.mul_(-2 * n)
        for target, own, other, s_own, s_other, over in (
            (targets[0], u, v, s_u, s_v, over_u), (targets[1], v, u, s_v, s_u, over_v),
        ):  # fmt: skip
            if target is not None:
                b = over.mul_(match)
                c = (a * s_other).addcmul_(b, s_own).div_(-n)
                torch.mul(sum_a, other, out=target[part]).addcmul_(_box(b, radii), own).add_(_box(c, radii))
    return matched


def _blocks(x: Tensor, y: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some images at a time, shifted by half a unit: of [0, 1] the difference of squares then loses least."""
    images = [image.flatten(0, 1) for image in (x, y)]
    step = max(1, _BLOCK // prod(x.shape[2:]))
    for first in range(0, len(images[0]), step):
        part = slice(first, first + step)
        u, v = (image[part].to(dtype, memory_format=torch.contiguous_format) - 0.5 for image in images)
        yield part, u, v


def _counts(radii: Sequence[int], size: Sequence[int], like: Tensor) -> Tensor:
    """Pixels of the window around each pixel, `(*S)`."""
    n = torch.ones((), dtype=_exact(like), device=like.device)
    for axis, (r, s) in enumerate(zip(radii, size, strict=True)):
        i = torch.arange(s, dtype=n.dtype, device=n.device)
        n = n * ((i + r).clamp(max=s - 1) - (i - r).clamp(min=0) + 1).reshape(-1, *[1] * (len(size) - 1 - axis))
    return n


def _box(x: Tensor, radii: Sequence[int]) -> Tensor:
    """Sums over the window around each pixel, clipped to the grid; `x` `(N, *S)`.

    Along each axis by sums of 1, 2, 4, ... pixels: few additions, and no digits lost as in cumulative sums.
    """
    for axis, r in enumerate(radii, start=-len(radii)):
        size, left, first, width = x.shape[axis], 2 * r + 1, 0, 1
        runs, total = F.pad(x, [0, 0] * (-1 - axis) + [r, r]), None
        while left:
            if left % 2:
                part = runs.narrow(axis, first, size)
                total = part if total is None else total + part
                first += width
            left //= 2
            if left:
                rest = runs.shape[axis] - width
                runs = runs.narrow(axis, 0, rest) + runs.narrow(axis, width, rest)
                width *= 2
        assert total is not None
        x = total
    return x
