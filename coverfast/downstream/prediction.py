"""Predictions of image files on the grid of the file: read, preprocess, windows, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from coverfast.checks import InputError, require
from coverfast.downstream.windows import predict_windows
from coverfast.ingest import Source, preprocess, read_source
from coverfast.samples import Sample

if TYPE_CHECKING:
    from coverfast.downstream.network import Network

# Pixels by which rounding may put a position beyond the border.
_SLACK = 1e-6


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a network makes of an image file.

    sample: the file as read, before the preprocessing; `S` is its size, in the order of shards. labels: of a
    segmentation, class indices `(*S)` uint8, 0 (background) where the preprocessing cut the image off. probabilities:
    `(K, *S)` float32, if they were asked for; of a classification `(K,)`.
    """

    sample: Sample
    labels: NDArray[Any] | None
    probabilities: NDArray[np.float32] | None


def predict_source(
    network: Network,
    source: Source,
    preprocessing: dict[str, Any],
    *,
    volume: int | None = None,
    probabilities: bool = False,
    overlap: float = 0.5,
    batch: int = 4,
    progress: Callable[[float], None] | None = None,
) -> Predicted:
    """Predict an image file with a network, where it is, after `preprocessing`, that of its training.

    Where that changed the grid, class probabilities are interpolated linearly at the pixels of the file, and the most
    probable class counts; where it only cut, flipped or turned, pixels keep theirs to the bit. volume: see
    `read_source`. overlap, batch, progress: see `predict_windows`. `InputError`: a file that cannot be read or is not
    of the network's dimension and channels, see also `preprocess`.
    """
    read = read_source(source, volume=volume)
    ndim, channels = read.pixels.ndim - 1, len(read.pixels)
    require(ndim == network.ndim, f"{source.path} must be {network.ndim}D like the network's images, got {ndim}D")
    require(
        channels == network.in_channels,
        f"{source.path} must have {network.in_channels} channel(s) like the network's images, got {channels}",
    )
    made = preprocess(read, preprocessing)
    image = torch.from_numpy(made.normalised())
    found = predict_windows(network, image, overlap=overlap, batch=batch, progress=progress).numpy()
    if network.task == "classification":
        return Predicted(read, None, found)
    size = read.pixels.shape[1:]
    labels = np.empty(size, np.uint8)
    kept = np.empty((len(found), *size), np.float32) if probabilities else None
    for place, plane in enumerate(on_grid(found, size, *_between(read, made))):
        where = place if ndim == 3 else slice(None)
        labels[where] = plane.argmax(0)
        if kept is not None:
            kept[:, where] = plane
    return Predicted(read, labels, kept)


def on_grid(
    probabilities: NDArray[np.float32], size: Sequence[int], scale: Sequence[float], offset: Sequence[float]
) -> Iterator[NDArray[np.float32]]:
    """Class probabilities `(K, *S)` on another grid of `size` along the same axes, a plane of the first axis at a time.

    Pixel p of the new grid lies at `scale * p + offset` of S. A 2D image is one plane. Linear between pixel centres;
    half a pixel around the border repeats it; beyond that it is the first class for certain. An axis along which every
    pixel lies less than one pixel of S from S was covered, and rounded to whole pixels: there the border is repeated to
    the end. Whole positions are exact. Planes are `(K, rows, columns)` float32.
    """
    axes = [
        _neighbours(scale_ * np.arange(count) + offset_, old)
        for count, old, scale_, offset_ in zip(size, probabilities.shape[1:], scale, offset, strict=True)
    ]
    (*first, rows, columns) = axes
    if not first:
        yield _plane(probabilities, rows, columns)
        return
    for low, high, weight, inside in zip(*first[0], strict=True):
        if not inside:
            plane = np.zeros((len(probabilities), *size[1:]), np.float32)
            plane[0] = 1
            yield plane
            continue
        yield _plane(_mix(probabilities[:, low], probabilities[:, high], weight), rows, columns)


_Axis = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]


def _neighbours(position: NDArray[Any], count: int) -> _Axis:
    """For positions along an axis of `count` pixels: the two pixels beside each, the weight of the second, whether it
    counts as within the image.
    """
    covered = position.min() > _SLACK - 1 and position.max() < count - _SLACK
    inside = covered | (position >= -0.5 - _SLACK) & (position <= count - 0.5 + _SLACK)
    position = np.clip(position, 0, count - 1)
    near = np.rint(position)
    position = np.where(abs(position - near) < _SLACK, near, position)
    low = np.floor(position).astype(np.int64)
    return low, np.minimum(low + 1, count - 1), (position - low).astype(np.float32), inside


def _plane(plane: NDArray[np.float32], rows: _Axis, columns: _Axis) -> NDArray[np.float32]:
    low, high, weight, row_inside = rows
    plane = _mix(plane[:, low], plane[:, high], weight[:, None]) if weight.any() else plane[:, low]
    low, high, weight, column_inside = columns
    plane = _mix(plane[:, :, low], plane[:, :, high], weight) if weight.any() else plane[:, :, low]
    beyond = ~(row_inside[:, None] & column_inside)
    plane[:, beyond] = 0
    plane[0, beyond] = 1
    return plane


def _mix(low: NDArray[np.float32], high: NDArray[np.float32], weight: Any) -> NDArray[np.float32]:
    # In this form a weight of 0, and two values that are the same, give the value to the bit.
    return np.asarray(low + (high - low) * weight, np.float32)


def _between(read: Sample, made: Sample) -> tuple[list[float], list[float]]:
    """Scale and offset, along each axis, from pixels of `read` to those of `made`, which comes from it."""
    assert read.original is not None
    assert made.original is not None
    step = np.linalg.inv(read.original.to_original) @ made.original.to_original
    n = len(step) - 1
    if not np.allclose(step[:n, :n], np.diag(step.diagonal()[:n]), atol=1e-9) or not (step.diagonal()[:n] > 0).all():
        raise InputError(f"{read.source}: the preprocessing must keep the axes of the image, it mixed them")
    scale = step.diagonal()[:n]
    return [float(1 / s) for s in scale], [float(-o / s) for o, s in zip(step[:n, n], scale, strict=True)]


def in_file_order(array: NDArray[Any], sample: Sample) -> NDArray[Any]:
    """An array `(*S, ...)` on the grid of a sample as read, in the axes of its file: flips and transposes only."""
    assert sample.original is not None
    turn = sample.original.to_original
    n = len(turn) - 1
    # Axis i of the file runs along axis source[i] of the sample.
    source = abs(turn[:n, :n]).argmax(axis=1)
    rest = range(n, array.ndim)
    turned = array.transpose(*source, *rest)
    flips = [slice(None, None, -1 if turn[i, source[i]] < 0 else 1) for i in range(n)]
    return turned[tuple(flips)]
