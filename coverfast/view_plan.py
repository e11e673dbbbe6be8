"""What is drawn for the views of a batch, and where they look: the host's part, before any pixel is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch import Tensor

from coverfast.checks import InputError, per_axis, shape_of
from coverfast.geometry import AffineDVF, Size
from coverfast.philox import STREAM_ELASTIC, normal
from coverfast.view_draws import Draws, blur_weights, draw, regions_of
from coverfast.view_settings import ViewSettings


@dataclass(frozen=True, eq=False)
class Plan:
    """What is drawn for a batch and where it looks.

    Attributes:
        crop, seed, iteration, samples, sizes: as given, checked.
        draws: the scalar parameters.
        cut: `(B, n)` first pixel of each crop in what the images hold.
        affine: the affine field of the crop; on the images' device, like all below.
        target: the field `(B, n, *crop)` of the crop itself, with an elastic part where there is one.
        into: the same, but looking into the images, see `resample`.
        params: `(B, P)` numbers of the appearance for the kernel.
        weights: `(B, taps)` of the blur.
        padded: whether a crop reaches beyond an image.
    """

    crop: tuple[int, ...]
    seed: int
    iteration: int
    samples: Tensor
    sizes: Tensor
    draws: Draws
    cut: Tensor
    affine: AffineDVF
    target: AffineDVF | Tensor
    into: AffineDVF | Tensor
    params: Tensor
    weights: np.ndarray
    padded: bool

    @property
    def for_kernels(self) -> tuple[Tensor, Tensor, Tensor, str, int, int]:
        """What `ops.views` asks for: numbers, params, field, form, seed, iteration."""
        numbers, into = self.affine.numbers, self.into
        field, form = (into, "dense") if isinstance(into, Tensor) else (numbers, "crop")
        return numbers, self.params, field, form, self.seed, self.iteration

    @property
    def taps(self) -> int:
        """Weights of the blur in `params`."""
        return int(self.weights.shape[1])


def plan_views(
    images: Tensor,
    crop: Size,
    *,
    seed: int,
    iteration: int,
    samples: Tensor | None = None,
    sizes: Tensor | None = None,
    corner: Tensor | None = None,
    focus: Tensor | None = None,
    settings: ViewSettings | None = None,
    pad: bool = False,
) -> Plan:
    """Draw what `make_views` needs for a batch and check what was given; see there."""
    n, settings = images.ndim - 2, settings or ViewSettings()
    crop = per_axis("crop", crop, n)
    for name, value, bits in (("seed", seed, 64), ("iteration", iteration, 32)):
        if not isinstance(value, int) or not 0 <= value < 2**bits:
            raise InputError(f"{name} must be an int in [0, 2^{bits}), got {value!r}")
    batch, device = len(images), images.device
    samples = torch.arange(batch) if samples is None else samples.cpu()
    sizes = torch.tensor(images.shape[2:]).expand(batch, n) if sizes is None else sizes.cpu()
    if samples.shape != (batch,) or sizes.shape != (batch, n):
        raise InputError(
            f"samples must be (B,) and sizes (B, n) for B = {batch}, got {shape_of(samples)} and {shape_of(sizes)}"
        )
    if samples.dtype.is_floating_point or (batch and not 0 <= int(samples.min()) <= int(samples.max()) < 2**32):
        raise InputError("samples must be integers in [0, 2^32)")
    held = torch.tensor(images.shape[2:])
    if sizes.dtype.is_floating_point or bool((sizes < 1).any() or (corner is None and (sizes > held).any())):
        raise InputError(f"sizes must be integers from 1 to those of images, {shape_of(images)[2:]}")
    room = sizes - torch.tensor(crop)
    padded = bool((room < 0).any())
    if padded and not pad:
        small = sizes[(room < 0).any(1)][0].tolist()
        raise InputError(f"crop must fit into every image, {tuple(small)} at the smallest, got {crop}")
    if focus is not None and (focus.shape != (batch, n) or focus.dtype.is_floating_point):
        raise InputError(f"focus must be (B, n) integers like sizes, got {focus.dtype} of shape {shape_of(focus)}")
    about = None if focus is None else focus.cpu().numpy()
    draws = draw(seed, iteration, samples.numpy(), sizes.numpy(), crop, settings, about)
    first = (
        np.zeros((batch, n), np.int64) if corner is None else _check_corner(corner, draws, sizes, held, crop, settings)
    )
    weights = blur_weights(draws.blur, settings.blur)
    params = np.concatenate(
        [
            samples.numpy().astype(np.uint32)[:, None].view(np.float32),
            np.stack([draws.noise, draws.contrast, draws.brightness], 1),
            draws.boxes.reshape(batch, settings.boxes * 2 * n),
            weights,
        ],
        1,
        dtype=np.float32,
    )
    # The field's numbers and the parameters, in one copy to the device.
    ends = (sizes.numpy() - 1)[..., None] / 2 - first[..., None], (draws.origin - first)[..., None]
    numbers = np.concatenate([draws.theta, *ends], 2).astype(np.float32)
    sent = torch.from_numpy(np.concatenate([numbers.ravel(), params.ravel()])).to(device, non_blocking=True)
    affine = AffineDVF.of(sent[: numbers.size].view(numbers.shape), crop)
    target: AffineDVF | Tensor = affine
    into: AffineDVF | Tensor = affine  # where view b looks in the whole image
    origin, cut = torch.from_numpy(draws.origin), torch.from_numpy(draws.origin - first)
    if settings.elastic * settings.strength > 0:
        target = affine.dense() + _elastic(seed, iteration, samples, sizes, origin, crop, settings).to(device)
        into = target + shift(cut, target)
    there = sent[numbers.size :].view(params.shape)
    return Plan(crop, seed, iteration, samples, sizes, draws, cut, affine, target, into, there, weights, padded)


def _check_corner(
    corner: Tensor, draws: Draws, sizes: Tensor, held: Tensor, crop: Sequence[int], settings: ViewSettings
) -> np.ndarray:
    """`corner` as an array, once the images are known to hold what the views look at."""
    if corner.shape != sizes.shape or corner.dtype.is_floating_point:
        raise InputError(f"corner must be (B, n) integers like sizes, got {corner.dtype} of shape {shape_of(corner)}")
    first, needed = corner.cpu().numpy().astype(np.int64), regions_of(draws, sizes.numpy(), crop, settings)
    if (first < 0).any() or (first > needed[..., 0]).any() or (first + held.numpy() < needed[..., 1]).any():
        raise InputError(
            f"images must hold the pixels {needed.tolist()} of each image (see ViewRegions), got {held.tolist()} "
            f"pixels from {first.tolist()} on"
        )
    return first


def shift(origin: Tensor, like: Tensor) -> Tensor:
    """The pixels `origin`, `(B, n)`, to be added to positions of fields `like`."""
    return origin.to(like).reshape(*origin.shape, *[1] * origin.shape[1])


def _elastic(
    seed: int,
    iteration: int,
    samples: Tensor,
    sizes: Tensor,
    origin: Tensor,
    crop: Sequence[int],
    settings: ViewSettings,
) -> Tensor:
    """A smooth field `(B, n, *crop)`: cubic B-splines over control points of the whole image."""
    fields = []
    for sample, size, start in zip(samples, sizes.tolist(), origin.tolist(), strict=True):
        n = len(size)
        counts = [ceil(s / settings.elastic_spacing) + 3 for s in size]
        total = n
        for count in counts:
            total *= count
        field = normal(seed, STREAM_ELASTIC, iteration, sample[None], total).view(n, *counts)
        field = field * settings.elastic * settings.strength
        for axis, (count, first, length) in enumerate(zip(counts, start, crop, strict=True)):
            at = (torch.arange(length) + first)[:, None] / settings.elastic_spacing - torch.arange(count) + 1
            t = at.abs().float()
            basis = torch.where(t < 1, 2 / 3 - t**2 + t**3 / 2, (2 - t).clamp(min=0) ** 3 / 6)
            field = (field.movedim(axis + 1, -1) @ basis.T).movedim(-1, axis + 1)
        fields.append(field)
    return torch.stack(fields) if fields else torch.zeros(0, len(crop), *crop)
