"""Self-vector regression (SeVR): from one image two views, and the displacement field that relates them.

View a is a crop of the image with a new appearance; view b is the same crop of the image after a random affine map.
Scalar parameters are drawn on the CPU, dense noise on the images' device; both are functions of (seed, iteration,
position in the global batch), see `coverfast.philox`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, pi

import torch
from torch import Tensor

from coverfast.checks import InputError, check_map, per_axis, shape_of
from coverfast.geometry import AffineDVF, Size, as_dvf, axis_coordinates, inside_mask, positions
from coverfast.ops.warp import resample
from coverfast.philox import STREAM_ELASTIC, STREAM_FILL, STREAM_NOISE, STREAM_SCALARS, normal, uniform
from coverfast.view_settings import ViewSettings

#: A Gaussian narrower than this has no weight beyond its centre pixel in float32.
_NO_BLUR = 0.15


@dataclass(frozen=True)
class Views:
    """Two views of each image of a batch and their ground truth.

    Attributes:
        x_a: `(B, C, *S)` float32, the crop with a new appearance.
        x_b: `(B, C, *S)` float32, the same crop of the spatially transformed image.
        target: the field from b into a, `x_b(p) = x(p + psi(p))`; its numbers, or a tensor with an elastic part.
        mask: `(B, 1, *S)` bool, pixels of b that view a shows too.
    """

    x_a: Tensor
    x_b: Tensor
    target: Tensor | AffineDVF
    mask: Tensor

    @property
    def dvf(self) -> Tensor:
        """The ground-truth field, `(B, n, *S)`."""
        return as_dvf(self.target)


class _Draws:
    """The scalar draws of a batch, taken in a fixed order: `(B, count)` uniforms in [0, 1), float64, on the CPU."""

    def __init__(self, seed: int, iteration: int, samples: Tensor, count: int) -> None:
        self.values = uniform(seed, STREAM_SCALARS, iteration, samples, count).double()
        self.used = 0

    def take(self, count: int) -> Tensor:
        self.used += count
        return self.values[:, self.used - count : self.used]


def sample_affine(u: Tensor, sizes: Tensor, settings: ViewSettings) -> Tensor:
    """Random affine maps `theta = [A | t]`, `A = R * Sh * Sc` (COVER Eq. 26).

    Args:
        u: `(B, affine_draws(n))` uniforms in [0, 1), in the order rotations, shears, scales, translations.
        sizes: `(B, n)` image sizes in pixels.
        settings: the ranges.

    Returns:
        `(B, n, n + 1)`, dtype of `u`; `t` in pixels.
    """
    batch, n = sizes.shape
    s = 2 * u - 1
    planes = [(0, 1)] if n == 2 else [(1, 2), (0, 2), (0, 1)]  # R = Rz Ry Rx; Rz turns the (y, x) plane
    angles, s = s[:, : len(planes)] * settings.strength * settings.rotation, s[:, len(planes) :]
    eye = torch.eye(n, dtype=u.dtype).expand(batch, n, n)
    matrix = eye
    for (i, j), angle in zip(planes, angles.unbind(1), strict=True):
        turn = eye.clone()
        turn[:, i, i] = turn[:, j, j] = angle.cos()
        turn[:, i, j], turn[:, j, i] = angle.sin(), -angle.sin()
        matrix = matrix @ turn
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    shear, s = (s[:, : len(pairs)] * settings.strength * settings.shear).tan(), s[:, len(pairs) :]
    sheared = eye.clone()
    for (i, j), value in zip(pairs, shear.unbind(1), strict=True):
        sheared[:, i, j] = value
    matrix = matrix @ sheared * (1 + s[:, None, :n] * settings.strength * settings.scale)
    shift = s[:, n : 2 * n] * settings.strength * settings.translation * sizes
    return torch.cat([matrix, shift[..., None].to(matrix)], -1)


def affine_draws(n: int) -> int:
    """How many uniforms `sample_affine` takes in `n` dimensions."""
    return (1 if n == 2 else 3) + n * (n - 1) + 2 * n


def expected_mask(sizes: Tensor, crop: Sequence[int], settings: ViewSettings) -> float:
    """Mean share of view b that view a shows too, for images of `(N, n)` sizes: what a pretraining can learn from.

    Estimated on a few points of each of N random views.
    """
    n = sizes.shape[1]
    draws = _Draws(0, 0, torch.arange(len(sizes)), affine_draws(n) + n)
    theta = sample_affine(draws.take(affine_draws(n)), sizes, settings)
    room = sizes - torch.tensor(crop)
    origin = (draws.take(n) * (room.abs() + 1)).floor() * room.sign()
    axes = [torch.linspace(0, c - 1, 7, dtype=torch.float64) for c in crop]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    centre, start = ((sizes - 1) / 2)[..., None], origin[..., None]
    seen = theta[:, :, :n] @ (points + start - centre) + theta[:, :, n:] + centre - start
    inside = (seen >= 0) & (seen <= torch.tensor(crop)[:, None] - 1)
    return float(inside.all(1).double().mean())


def make_views(
    images: Tensor,
    crop: Size,
    *,
    seed: int,
    iteration: int,
    samples: Tensor | None = None,
    sizes: Tensor | None = None,
    settings: ViewSettings | None = None,
    pad: bool = False,
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
        settings: ranges of the transforms.
        pad: allow crops larger than an image: it is placed at random inside a zero crop, and the mask is off where
            either end of a displacement lies in the padding.

    Returns:
        `Views`; the same whatever the split of the batch, and on every device to rounding.
    """
    n = check_map("images", images)
    with torch.autocast(images.device.type, enabled=False):
        return _make_views(images, n, crop, seed, iteration, samples, sizes, settings or ViewSettings(), pad)


def _make_views(
    images: Tensor,
    n: int,
    crop: Size,
    seed: int,
    iteration: int,
    samples: Tensor | None,
    sizes: Tensor | None,
    settings: ViewSettings,
    pad: bool,
) -> Views:
    crop = per_axis("crop", crop, n)
    if not 0 <= seed < 2**64:
        raise InputError(f"seed must be in [0, 2^64), got {seed}")
    batch = images.shape[0]
    samples = torch.arange(batch) if samples is None else samples
    sizes = torch.tensor(images.shape[2:]).expand(batch, n) if sizes is None else sizes
    if samples.shape != (batch,) or sizes.shape != (batch, n):
        raise InputError(
            f"samples must be (B,) and sizes (B, n) for B = {batch}, got {shape_of(samples)} and {shape_of(sizes)}"
        )
    room = sizes - torch.tensor(crop)
    padded = bool((room < 0).any())
    if padded and not pad:
        small = sizes[(room < 0).any(1)][0].tolist()
        raise InputError(f"crop must fit into every image, {tuple(small)} at the smallest, got {crop}")
    images = images.float()

    draws = _Draws(seed, iteration, samples, affine_draws(n) + n + _APPEARANCE_DRAWS + (2 * n + 1) * settings.boxes)
    theta = sample_affine(draws.take(affine_draws(n)), sizes, settings)
    # An image larger than the crop is cut at random, a smaller one placed at random: the origin is then negative.
    origin = (draws.take(n) * (room.abs() + 1)).floor().long() * room.sign()
    device = images.device
    target: AffineDVF | Tensor = AffineDVF(
        theta.float().to(device), crop, full_size=sizes.to(device), origin=origin.to(device)
    )
    if settings.elastic * settings.strength > 0:
        target = as_dvf(target) + _elastic(seed, iteration, samples, sizes, origin, crop, settings).to(device)

    dvf = as_dvf(target)
    shift = origin.to(dvf).reshape(batch, n, *[1] * n)
    mask = inside_mask(dvf)
    if padded:
        mask = mask & _in_image(torch.zeros_like(dvf) + shift, sizes) & _in_image(dvf + shift, sizes)
    x_a = _appearance(_cut(images, origin, crop), seed, iteration, samples, draws, settings)
    return Views(x_a, resample(images, dvf + shift), target, mask)


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


# apply? and amount of noise, blur, contrast; apply? and two and a normal's pair for brightness; apply? for boxes
_APPEARANCE_DRAWS = 2 + 2 + 2 + 4 + 1


def _appearance(x: Tensor, seed: int, iteration: int, samples: Tensor, draws: _Draws, settings: ViewSettings) -> Tensor:
    """Noise, blur, contrast, brightness and in-painting, each with its probability (COVER Sec. B.1)."""
    n, elements = x.ndim - 2, x[0].numel() if len(x) else 0
    on_device = samples.to(x.device)

    def per_sample(values: Tensor) -> Tensor:
        return values.to(x).reshape(-1, *[1] * (n + 1))

    def chance() -> Tensor:
        return draws.take(1)[:, 0] < settings.probability

    sigma = chance() * draws.take(1)[:, 0] * settings.noise
    if settings.noise:
        x = x + per_sample(sigma) * normal(seed, STREAM_NOISE, iteration, on_device, elements).view(x.shape)
    sigma = chance() * draws.take(1)[:, 0] * settings.blur
    if settings.blur >= _NO_BLUR:
        x = _blur(x, sigma, settings.blur)
    change = chance() * (2 * draws.take(1)[:, 0] - 1) * settings.contrast  # gamma - 1
    # Image by image: torch sums a batch in another order than a single image, and the split must not show.
    means = [image.mean(tuple(range(1, 1 + n)), keepdim=True) for image in x]
    x = x + per_sample(change) * (x - (torch.stack(means) if means else x))
    apply, u = chance(), draws.take(3)
    standard = (-2 * (1 - u[:, 1]).log()).sqrt() * (2 * pi * u[:, 2]).cos()
    x = x + per_sample(apply * u[:, 0] * settings.brightness * standard)
    present = chance()
    if not settings.boxes:
        return x
    fill = uniform(seed, STREAM_FILL, iteration, on_device, elements).view(x.shape)
    return torch.where(_boxes(x, draws, present, settings), fill, x)


def _blur(x: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian blur with one width per sample, edges repeated."""
    reach = ceil(4 * largest)
    offsets = torch.arange(-reach, reach + 1).double()
    weights = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).to(x)
    for axis in range(2, x.ndim):
        length = x.shape[axis]
        out = torch.zeros_like(x)
        for tap, offset in enumerate(range(-reach, reach + 1)):
            index = (torch.arange(length, device=x.device) + offset).clamp(0, length - 1)
            out += weights[:, tap].reshape(-1, *[1] * (x.ndim - 1)) * x.index_select(axis, index)
        x = out
    return x


def _boxes(x: Tensor, draws: _Draws, present: Tensor, settings: ViewSettings) -> Tensor:
    """Union of the boxes to in-paint, `(B, 1, *S)` bool; sides from 1/10 to 4/30 of each axis, inside the crop."""
    n = x.ndim - 2
    mask = torch.zeros_like(x[:, :1], dtype=torch.bool)
    axes = axis_coordinates(x.shape[2:], mask.int())
    for box in range(settings.boxes):
        u = draws.take(2 * n + 1)
        if box:
            present = present & (u[:, 0] < 0.95)
        inside = present.to(x.device).reshape(-1, *[1] * n)
        for axis, (size, p) in enumerate(zip(x.shape[2:], axes, strict=True)):
            least = max(1, ceil(size / 10))
            most = max(least, 4 * size // 30)
            side = least + (u[:, 1 + axis] * (most - least + 1)).floor()
            start = (u[:, 1 + n + axis] * (size - side + 1)).floor()
            first = start.to(x.device).reshape(-1, *[1] * n)
            last = (start + side).to(x.device).reshape(-1, *[1] * n)
            inside = inside & (p >= first) & (p < last)
        mask |= inside.unsqueeze(1)
    return mask
