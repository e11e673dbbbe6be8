"""Grids, affine maps and displacement vector fields: the conventions of the library, once.

Images are `(B, C, *S)` with `S = (H, W)` or `(D, H, W)`; pixel centres sit at integers. A displacement vector
field (DVF) is `(B, n, *S)`, float32, in pixels of its own grid, channel `i` along spatial axis `i`; it lives on
view b and points into view a (backward warping): `x_b(p) = x_a(p + psi(p))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coverfast.checks import InputError, check_dvf, check_same, per_axis, shape_of

Size = int | Sequence[int]


def axis_coordinates(size: Sequence[int], like: Tensor) -> list[Tensor]:
    """Pixel indices along each axis, shaped to broadcast over `*S`, with the dtype and device of `like`."""
    n = len(size)
    return [
        torch.arange(s, dtype=like.dtype, device=like.device).reshape([-1 if i == axis else 1 for i in range(n)])
        for axis, s in enumerate(size)
    ]


def positions(dvf: Tensor) -> list[Tensor]:
    """Where each pixel looks, `p_i + psi_i(p)`: one tensor `(B, *S)` an axis."""
    return [p + dvf[:, i] for i, p in enumerate(axis_coordinates(dvf.shape[2:], dvf))]


def affine_dvf(
    theta: Tensor, size: Size, *, full_size: Size | Tensor | None = None, origin: Size | Tensor = 0
) -> Tensor:
    """The DVF of an affine map about the image centre, `A(p - c) + t + c - p` (COVER Eq. 26).

    Args:
        theta: `(B, n, n + 1)`, `A | t`; `t` in pixels; float32 or float64.
        size: size `*S` of the field, an int or one per axis.
        full_size: size of the whole image whose centre `c = (full_size - 1) / 2` the map turns about; default
            `size`. A tensor `(B, n)` gives every sample its own.
        origin: index of the field's first pixel in the whole image (a crop); an int, one per axis, or `(B, n)`.

    Returns:
        `(B, n, *S)` in pixels, dtype of `theta`. A crop's field equals the crop of the whole field, bit for bit,
        and the field of the identity is exactly zero.
    """
    return AffineDVF(theta, size, full_size=full_size, origin=origin).dense()


def _check_theta(theta: Tensor) -> int:
    if not isinstance(theta, Tensor) or theta.ndim != 3 or theta.shape[2] != theta.shape[1] + 1:
        got = shape_of(theta) if isinstance(theta, Tensor) else type(theta).__name__
        raise InputError(f"theta must be (B, n, n + 1) with n = 2 or 3, got {got}")
    if theta.shape[1] not in (2, 3):
        raise InputError(f"theta must be (B, n, n + 1) with n = 2 or 3, got {shape_of(theta)}")
    if theta.dtype not in (torch.float32, torch.float64):
        raise InputError(f"theta must be float32 or float64, got {theta.dtype}")
    return 2 if theta.shape[1] == 2 else 3  # a constant to torch.compile, whatever it makes of shapes


def _per_sample(name: str, value: Size | Tensor, theta: Tensor, least: int | None = 1) -> Tensor:
    n = theta.shape[1]
    if isinstance(value, Tensor):
        if value.shape != (theta.shape[0], n):
            raise InputError(f"{name} as a tensor must be (B, n) = {(theta.shape[0], n)}, got {shape_of(value)}")
        return value.to(theta)
    values = per_axis(name, value, n, least=-(2**31) if least is None else least)
    # Filled on the device: a copy from the host would make it wait, and cannot be captured.
    return torch.stack([theta.new_full((theta.shape[0],), float(v)) for v in values], 1)


class AffineDVF:
    """An affine ground-truth field kept as its few numbers; accepted wherever a target field is.

    Arguments as in `affine_dvf`. The Triton kernels compute the field in registers; `dense()` writes it.

    Attributes:
        numbers: `(B, n, n + 3)`, `A | t | c | o` a sample and axis: the map, the image's centre, the first pixel.
        size: size `*S` of the field.
    """

    def __init__(
        self, theta: Tensor, size: Size, full_size: Size | Tensor | None = None, origin: Size | Tensor = 0
    ) -> None:
        n = _check_theta(theta)
        self.size = per_axis("size", size, n)
        centre = (_per_sample("full_size", self.size if full_size is None else full_size, theta) - 1) / 2
        start = _per_sample("origin", origin, theta, least=None)
        self.numbers = torch.cat([theta, centre[..., None], start[..., None]], 2)

    @classmethod
    def of(cls, numbers: Tensor, size: tuple[int, ...]) -> AffineDVF:
        """From its attributes."""
        field = cls.__new__(cls)
        field.numbers, field.size = numbers, size
        return field

    @property
    def theta(self) -> Tensor:
        """`A | t`, `(B, n, n + 1)`."""
        return self.numbers[..., :-2]

    def to(self, *args: Any, **kwargs: Any) -> AffineDVF:
        """As `Tensor.to`: another device or dtype."""
        return AffineDVF.of(self.numbers.to(*args, **kwargs), self.size)

    def __repr__(self) -> str:
        """Batch, size, dtype and device."""
        found = self.numbers
        return f"AffineDVF(batch={found.shape[0]}, size={self.size}, dtype={found.dtype}, device='{found.device}')"

    @property
    def full_size(self) -> Tensor:
        """Size of the whole image, `(B, n)` int64."""
        return (2 * self.numbers[..., -2] + 1).long()

    @property
    def origin(self) -> Tensor:
        """Index of the field's first pixel in the whole image, `(B, n)` int64."""
        return self.numbers[..., -1].long()

    def dense(self) -> Tensor:
        """The field itself, `(B, n, *S)`."""
        n, numbers = len(self.size), self.numbers
        # (A - I)(p - c) + t: nothing to cancel, so the identity is exactly zero.
        shift = numbers[..., :n] - torch.eye(n, dtype=numbers.dtype, device=numbers.device)
        away = numbers[..., -1] - numbers[..., -2]
        arms = [p + away[:, i].reshape(-1, *[1] * n) for i, p in enumerate(axis_coordinates(self.size, numbers))]
        channels = []
        for i in range(n):
            terms = [shift[:, i, j].reshape(-1, *[1] * n) * arms[j] for j in range(n)]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            channels.append(total + numbers[:, i, n].reshape(-1, *[1] * n))
        return torch.stack(channels, dim=1)


def as_dvf(field: Tensor | AffineDVF) -> Tensor:
    """The dense field of a target given either way."""
    return field.dense() if isinstance(field, AffineDVF) else field


def inside_mask(dvf: Tensor | AffineDVF) -> Tensor:
    """Where a DVF points inside its own grid, `0 <= p_i + psi_i(p) <= S_i - 1` on every axis (COVER Eq. 27).

    Returns:
        `(B, 1, *S)` bool; False at non-finite displacements.
    """
    dvf = as_dvf(dvf)
    check_dvf("dvf", dvf)
    inside = torch.ones_like(dvf[:, 0], dtype=torch.bool)
    for position, size in zip(positions(dvf), dvf.shape[2:], strict=True):
        inside = inside & (position >= 0) & (position <= size - 1)
    return inside.unsqueeze(1)


def upsample_dvf(coarse: Tensor, size: Size) -> Tensor:
    """Bring a DVF to a grid of twice the size: linear in half-pixel geometry, clamped, values doubled.

    A coarse pixel `c` covers the fine pixels `2c` and `2c + 1` (what 2x pooling does), so `fine = 2c + 0.5`, and a
    displacement of one coarse pixel is two fine ones (COVER Eq. 28).

    Args:
        coarse: `(B, n, *S)`, float32 or float64.
        size: the fine size, exactly `2 * S`.
    """
    n = check_dvf("coarse", coarse)
    size = per_axis("size", size, n)
    if any(fine != 2 * s for fine, s in zip(size, coarse.shape[2:], strict=True)):
        raise InputError(
            f"size must be exactly twice the coarse size {shape_of(coarse)[2:]}, got {tuple(int(s) for s in size)}"
        )
    out = 2 * coarse
    for axis in range(2, 2 + n):
        before = torch.cat([out.narrow(axis, 0, 1), out.narrow(axis, 0, out.shape[axis] - 1)], axis)
        after = torch.cat([out.narrow(axis, 1, out.shape[axis] - 1), out.narrow(axis, -1, 1)], axis)
        pair = torch.stack([0.75 * out + 0.25 * before, 0.75 * out + 0.25 * after], axis + 1)
        out = pair.flatten(axis, axis + 1)
    return out


def downsample_gradient(grad: Tensor) -> Tensor:
    """The transpose of `upsample_dvf`: what a gradient `(B, n, *2S)` of the fine field is to the coarse one."""
    out = 2 * grad
    for axis in range(2, out.ndim):
        even, odd = out.unflatten(axis, (-1, 2)).unbind(axis + 1)
        last = even.shape[axis] - 1
        out = 0.75 * (even + odd)
        out.narrow(axis, 0, last).add_(even.narrow(axis, 1, last), alpha=0.25)
        out.narrow(axis, 0, 1).add_(even.narrow(axis, 0, 1), alpha=0.25)
        out.narrow(axis, 1, last).add_(odd.narrow(axis, 0, last), alpha=0.25)
        out.narrow(axis, last, 1).add_(odd.narrow(axis, last, 1), alpha=0.25)
    return out


def downsample_dvf(dvf: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Bring a DVF and its mask to a grid of half the size: a truth to hold a coarser pyramid level against (SPEC 6).

    Args:
        dvf: `(B, n, *S)` with an even size, float32 or float64.
        mask: `(B, 1, *S)` bool, the pixels that count.

    Returns:
        The field averaged over the `2^n` fine pixels of each coarse one and halved, since a coarse pixel is two fine
        ones; and the mask, set where all of these pixels count. The field may be anything where that is off.
    """
    check_dvf("dvf", dvf)
    check_same("mask", mask, "dvf", dvf, "batch", "size", "device")
    if any(s % 2 for s in dvf.shape[2:]):
        raise InputError(f"dvf must have an even size on every axis, got {shape_of(dvf)[2:]}")
    for axis in range(2, dvf.ndim):
        even, odd = dvf.unflatten(axis, (-1, 2)).unbind(axis + 1)
        dvf = 0.5 * (even + odd)
        even, odd = mask.unflatten(axis, (-1, 2)).unbind(axis + 1)
        mask = even & odd
    return 0.5 * dvf, mask


def check_stride(name: str, size: Sequence[int], stride: int) -> None:
    """Refuse a size that is no multiple of the coarsest stride of a network."""
    if any(s % stride or s < stride for s in size):
        raise InputError(
            f"{name} must have a size divisible by {stride}, the coarsest stride of the network, on every axis, got "
            f"{tuple(int(s) for s in size)}"
        )


def level_size(size: Sequence[int], levels: int) -> tuple[int, ...]:
    """Size of the coarsest of `levels` pyramid levels; refuses a size that cannot be halved so often."""
    divisor = 2 ** (levels - 1)
    if any(s % divisor or s < divisor for s in size):
        raise InputError(
            f"a pyramid of {levels} levels needs a size divisible by {divisor} on every axis, "
            f"got {tuple(int(s) for s in size)}"
        )
    return tuple(s // divisor for s in size)
