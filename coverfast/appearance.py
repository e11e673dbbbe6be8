"""The appearance of a view: noise, blur, contrast, brightness, in-painting."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coverfast.geometry import axis_coordinates
from coverfast.philox import STREAM_FILL, STREAM_NOISE, normal, uniform
from coverfast.view_plan import Plan
from coverfast.view_settings import ViewSettings


def appearance(x: Tensor, plan: Plan, settings: ViewSettings) -> Tensor:
    """Noise, blur, contrast, brightness and in-painting, each with its probability (COVER Sec. B.1).

    x: `(B, C, *crop)` float32. Where `settings` set a range to 0, nothing is done.
    """
    seed, iteration, samples, draws, weights = plan.seed, plan.iteration, plan.samples, plan.draws, plan.weights
    n, elements = x.ndim - 2, x[0].numel() if len(x) else 0
    on_device = samples.to(x.device)

    def per_sample(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(x).reshape(-1, *[1] * (n + 1))

    if settings.noise:
        noise = normal(seed, STREAM_NOISE, iteration, on_device, elements).view(x.shape)
        x = x + per_sample(draws.noise) * noise
    if weights.shape[1]:
        x = blur(x, torch.from_numpy(weights))
    # Image by image: torch sums a batch in another order than a single image, and the split must not show.
    means = [image.mean(tuple(range(1, 1 + n)), keepdim=True) for image in x]
    x = x + per_sample(draws.contrast) * (x - (torch.stack(means) if means else x))
    x = x + per_sample(draws.brightness)
    if not settings.boxes:
        return x
    fill = uniform(seed, STREAM_FILL, iteration, on_device, elements).view(x.shape)
    return torch.where(_boxes(x, torch.from_numpy(draws.boxes)), fill, x)


def blur(x: Tensor, weights: Tensor) -> Tensor:
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
