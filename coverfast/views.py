"""Self-vector regression (SeVR): from one image two views, and the displacement field that relates them.

View a is a crop of the image with a new appearance; view b is the same crop of the image after a random affine map.
Scalar parameters are drawn on the CPU (`coverfast.view_draws`), dense noise on the images' device; both are functions
of (seed, iteration, position in the global batch), see `coverfast.philox`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch import Tensor

from coverfast.checks import InputError, check_map, per_axis, shape_of
from coverfast.geometry import AffineDVF, Size, as_dvf, axis_coordinates, inside_mask, positions
from coverfast.ops.dispatch import choose
from coverfast.ops.losses import Mask
from coverfast.ops.warp import resample
from coverfast.philox import STREAM_ELASTIC, STREAM_FILL, STREAM_NOISE, normal, uniform
from coverfast.view_draws import Draws, blur_weights, draw, regions_of
from coverfast.view_settings import ViewSettings


@dataclass(frozen=True, eq=False)
class Views:
    """Two views of each image of a batch and their ground truth.

    Attributes:
        pair: `(2 B, C, *S)` float32, all views a, then all views b: one batch for a backbone.
        target: the field from b into a, `x_b(p) = x(p + psi(p))`; its numbers, or a tensor with an elastic part.
        shown: pixels of b that view a shows too: "inside" where the field alone says so, otherwise bool `(B, 1, *S)`.
    """

    pair: Tensor
    target: Tensor | AffineDVF
    shown: Mask

    @property
    def x_a(self) -> Tensor:
        """`(B, C, *S)`, the crop with a new appearance."""
        return self.pair[: len(self.pair) // 2]

    @property
    def x_b(self) -> Tensor:
        """`(B, C, *S)`, the same crop of the spatially transformed image."""
        return self.pair[len(self.pair) // 2 :]

    @property
    def dvf(self) -> Tensor:
        """The ground-truth field, `(B, n, *S)`."""
        return as_dvf(self.target)

    @property
    def mask(self) -> Tensor:
        """`shown` as a tensor, `(B, 1, *S)` bool."""
        return self.shown if isinstance(self.shown, Tensor) else inside_mask(self.target)


def make_views(
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
    impl: str = "auto",
) -> Views:
    """Draw two views of each image.

    Args:
        images: `(B, C, *S)` floating in [0, 1], on the device the views are made on. Images smaller than the batch
            are zero-filled at the high end of each axis.
        crop: size of the views, an int or one per axis.
        seed: 64-bit key of the random numbers.
        iteration: training iteration, the counter's first coordinate.
        samples: `(B,)` position of each image in the global batch, on the CPU; default `0 .. B-1`.
        sizes: `(B, n)` true size of each image, on the CPU; default the size of `images`.
        corner: `(B, n)` first pixel of what `images` holds of each image, on the CPU; default 0. The part must be what
            `ViewRegions` asks for; the views are those of the whole image.
        focus: `(B, n)` pixel of each whole image that its crop is centred on, as far as it fits, on the CPU; -1, the
            default, for a random crop.
        settings: ranges of the transforms.
        pad: allow crops larger than an image: it is placed at random inside a zero crop, and the mask is off where
            either end of a displacement lies in the padding.
        impl: "auto", "triton" or "torch"; "reference" warps by the definition.

    Returns:
        `Views`; the same whatever the split of the batch, and on every device and in every `impl` to rounding.
    """
    n = check_map("images", images)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        given = settings or ViewSettings()
        return _make_views(images, n, crop, seed, iteration, samples, sizes, corner, focus, given, pad, impl)


def _make_views(
    images: Tensor,
    n: int,
    crop: Size,
    seed: int,
    iteration: int,
    samples: Tensor | None,
    sizes: Tensor | None,
    corner: Tensor | None,
    focus: Tensor | None,
    settings: ViewSettings,
    pad: bool,
    impl: str,
) -> Views:
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
    chosen = choose("views", impl, images)
    images = images.float()
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
    shown: Mask = "inside"
    origin, cut = torch.from_numpy(draws.origin), torch.from_numpy(draws.origin - first)
    if settings.elastic * settings.strength > 0:
        target = affine.dense() + _elastic(seed, iteration, samples, sizes, origin, crop, settings).to(device)
        into = target + _shift(cut, target)
    if padded:
        dvf = as_dvf(target)
        shift = _shift(origin, dvf)
        shown = inside_mask(dvf) & _in_image(torch.zeros_like(dvf) + shift, sizes) & _in_image(dvf + shift, sizes)

    pair = images.new_empty(2 * batch, images.shape[1], *crop)
    views = Views(pair, target, shown)
    if chosen == "triton":
        from coverfast.ops.views import fill_pair

        counts, there = {"boxes": settings.boxes, "taps": weights.shape[1]}, sent[numbers.size :].view(params.shape)
        field, form = (into, "dense") if isinstance(into, Tensor) else (affine.numbers, "crop")
        fill_pair(pair, images, affine.numbers, there, field, form, seed, iteration, **counts)
    else:
        views.x_a.copy_(_appearance(_cut(images, cut, crop), seed, iteration, samples, draws, settings, weights))
        views.x_b.copy_(resample(images, into, impl=chosen))
    return views


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


def _shift(origin: Tensor, like: Tensor) -> Tensor:
    return origin.to(like).reshape(*origin.shape, *[1] * origin.shape[1])


def _cut(images: Tensor, origin: Tensor, crop: Sequence[int]) -> Tensor:
    """Crop each image at its origin; what lies outside the image is zero."""
    out = images.new_zeros(*images.shape[:2], *crop)
    for x, y, start in zip(images, out, origin.tolist(), strict=True):
        low = [max(0, o) for o in start]
        high = [min(s, o + c) for s, o, c in zip(x.shape[1:], start, crop, strict=True)]
        here = (..., *(slice(a - o, b - o) for a, b, o in zip(low, high, start, strict=True)))
        y[here] = x[(..., *(slice(a, b) for a, b in zip(low, high, strict=True)))]
    return out


def _in_image(dvf: Tensor, sizes: Tensor) -> Tensor:
    """Where positions lie inside each sample's true image, `(B, 1, *S)` bool."""
    inside = torch.ones_like(dvf[:, 0], dtype=torch.bool)
    for axis, position in enumerate(positions(dvf)):
        last = (sizes[:, axis] - 1).to(dvf).reshape(-1, *[1] * (dvf.ndim - 2))
        inside = inside & (position >= 0) & (position <= last)
    return inside.unsqueeze(1)


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


def _appearance(
    x: Tensor,
    seed: int,
    iteration: int,
    samples: Tensor,
    draws: Draws,
    settings: ViewSettings,
    weights: np.ndarray,
) -> Tensor:
    """Noise, blur, contrast, brightness and in-painting, each with its probability (COVER Sec. B.1)."""
    n, elements = x.ndim - 2, x[0].numel() if len(x) else 0
    on_device = samples.to(x.device)

    def per_sample(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(x).reshape(-1, *[1] * (n + 1))

    if settings.noise:
        noise = normal(seed, STREAM_NOISE, iteration, on_device, elements).view(x.shape)
        x = x + per_sample(draws.noise) * noise
    if weights.shape[1]:
        x = _blur(x, torch.from_numpy(weights))
    # Image by image: torch sums a batch in another order than a single image, and the split must not show.
    means = [image.mean(tuple(range(1, 1 + n)), keepdim=True) for image in x]
    x = x + per_sample(draws.contrast) * (x - (torch.stack(means) if means else x))
    x = x + per_sample(draws.brightness)
    if not settings.boxes:
        return x
    fill = uniform(seed, STREAM_FILL, iteration, on_device, elements).view(x.shape)
    return torch.where(_boxes(x, torch.from_numpy(draws.boxes)), fill, x)


def _blur(x: Tensor, weights: Tensor) -> Tensor:
    """Blur with one set of weights `(B, taps)` a sample along every axis, edges repeated."""
    reach = weights.shape[1] // 2
    weights = weights.to(x)
    for axis in range(2, x.ndim):
        length = x.shape[axis]
        out = torch.zeros_like(x)
        for tap, offset in enumerate(range(-reach, reach + 1)):
            index = (torch.arange(length, device=x.device) + offset).clamp(0, length - 1)
            out += weights[:, tap].reshape(-1, *[1] * (x.ndim - 1)) * x.index_select(axis, index)
        x = out
    return x


def _boxes(x: Tensor, boxes: Tensor) -> Tensor:
    """Union of the boxes `(B, boxes, n, 2)`, `(B, 1, *S)` bool."""
    n = x.ndim - 2
    mask = torch.zeros_like(x[:, :1], dtype=torch.bool)
    axes = axis_coordinates(x.shape[2:], mask.int())
    for box in boxes.to(x.device).unbind(1):
        inside = torch.ones_like(mask[:, 0])
        for axis, p in enumerate(axes):
            first, last = (box[:, axis, end].reshape(-1, *[1] * n) for end in (0, 1))
            inside = inside & (p >= first) & (p < last)
        mask |= inside.unsqueeze(1)
    return mask
