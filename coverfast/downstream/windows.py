"""Predictions of images of any size: overlapping windows of the network's crop, their results averaged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coverfast.checks import InputError, require

if TYPE_CHECKING:
    from coverfast.downstream.network import Network

# Standard deviation of the weights in crops: at the middle of a side they are exp(-8) of those in the centre.
_SIGMA = 1 / 8


def sliding_windows(size: Sequence[int], crop: Sequence[int], overlap: float = 0.5) -> list[tuple[int, ...]]:
    """First pixels of windows of `crop` that cover an image of `size`, each inside it, row by row.

    They are spread evenly, neighbours sharing at least the part `overlap` (in [0, 1)) of a side, rounded to pixels. An
    axis shorter than the crop has one window, from 0.
    """
    require(0 <= overlap < 1, f"overlap must be at least 0 and below 1, got {overlap!r}")
    require(len(size) == len(crop), f"size and crop must have as many axes, got {tuple(size)} and {tuple(crop)}")
    starts = []
    for pixels, side in zip(size, crop, strict=True):
        stride = max(1, math.floor(side * (1 - overlap) + 1e-9))
        room = max(0, pixels - side)
        steps = -(-room // stride)
        starts.append([round(step * room / steps) for step in range(steps + 1)] if steps else [0])
    return list(itertools.product(*starts))


def window_weights(crop: Sequence[int]) -> Tensor:
    """How much each pixel of a window counts, `(*crop)` float32: a Gaussian about the centre, above 0 everywhere."""
    weights = torch.ones(())
    for side in crop:
        along = (torch.arange(side) - (side - 1) / 2) / (side * _SIGMA)
        weights = weights[..., None] * torch.exp(-0.5 * along**2)
    return weights


def predict_windows(
    network: Network,
    image: Tensor,
    *,
    overlap: float = 0.5,
    batch: int = 4,
    device: torch.device | str | None = None,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Class probabilities of an image `(C, *S)`, float32 in [0, 1], of any size, as float32 on the CPU.

    Segmentation: `(K, *S)`, at every pixel the mean of the softmax of all windows that hold it, by `window_weights`.
    Classification: `(K,)`, the mean over the windows. Axes shorter than the crop are filled with zeros at their end, as
    in training, and cut back. overlap: see `sliding_windows`. batch: windows at a time, which changes speed alone.
    device: where the network is, by default that of its first parameter. progress: called with the share of the
    windows that is done. Computed in float32.
    """
    size, crop = tuple(image.shape[1:]), tuple(network.crop)
    require(
        image.ndim == network.ndim + 1 and len(image) == network.in_channels,
        f"image must be (C, *S) with {network.in_channels} channel(s) and {network.ndim} spatial axes, got shape "
        f"{tuple(image.shape)}",
    )
    require(batch >= 1, f"batch must be at least 1, got {batch}")
    if device is None:
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
    device = torch.device(device)
    fill = [room for side, pixels in zip(crop[::-1], size[::-1], strict=True) for room in (0, max(0, side - pixels))]
    image = F.pad(image.to(torch.float32), fill)
    dense = network.task == "segmentation"
    weights = window_weights(crop) if dense else torch.ones(())
    starts = sliding_windows(tuple(image.shape[1:]), crop, overlap)
    mean: Tensor | None = None
    total = torch.zeros(image.shape[1:] if dense else ())
    with evaluating(network), torch.inference_mode(), torch.autocast(device.type, enabled=False):
        for first in range(0, len(starts), batch):
            regions = [_region(start, crop) for start in starts[first : first + batch]]
            windows = torch.stack([image[(slice(None), *region)] for region in regions]).to(device)
            found = network(windows).float().softmax(1).cpu()
            if mean is None:
                mean = found.new_zeros(found.shape[1], *total.shape)
            for region, probabilities in zip(regions, found, strict=True):
                here = region if dense else ()
                total[here] += weights
                # A running mean: what all windows agree on is kept to the bit.
                part = mean[(slice(None), *here)]
                part += (probabilities - part) * (weights / total[here])
            if progress:
                progress(min(1.0, (first + batch) / len(starts)))
    assert mean is not None
    return mean[(slice(None), *(slice(0, pixels) for pixels in size))] if dense else mean


@contextmanager
def fitting_memory(network: Network, batch: int, what: object) -> Iterator[None]:
    """While entered, too little memory to predict `what`, `batch` windows at a time, is an `InputError`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            device = next((p.device for p in network.parameters()), torch.device("cpu"))
            raise InputError(
                f"{what} does not fit into the memory of {device}, {batch} window(s) of "
                f"{'x'.join(map(str, network.crop))} pixels at a time; use a smaller --batch"
            ) from None
        raise


def _region(start: Sequence[int], crop: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + side) for first, side in zip(start, crop, strict=True))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """While entered, the network is in evaluation mode."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
