"""What there is to see of COVER: one sample's views, fields and features, and what is matched at a few pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coverfast.geometry import upsample_dvf
from coverfast.methods import Batch, evaluating
from coverfast.ops.warp import resample, warp

if TYPE_CHECKING:
    from coverfast.methods.cover import Cover

#: Pixels to mark in an image; in a volume one on each of its three planes.
_POINTS = 4
#: A corner with less than this part of the best one's score, a sixth of its contrast, is not worth a mark.
_FAINT = 1 / 36


def pictures(method: Cover, batch: Batch) -> dict[str, Any]:
    """What there is to see of the first sample of a batch, without the batch axis: the fields of `report.Pictures`.

    Tensors, or lists of one a level coarse to fine, float32 on the device of the images but for the integers.
    Only that sample passes through the network, in evaluation mode.
    """
    batch = batch.first(1)
    with evaluating(method):
        views, levels, features = method.match(method.prepare(batch))
        centre, points = marked(views.x_b[0], views.mask[0, 0])
        weights = [w[0] for w in method.pyramid.weights(features, None, levels, points // 2**method.doublings)]
    with torch.autocast(batch.images.device.type, enabled=False):  # what is computed here is of no network
        strides = [2 ** (len(levels) - 1 - i + method.doublings) for i in range(len(levels))]
        sought = (_sought(views.dvf, levels, i, stride, points) for i, stride in enumerate(strides))
        truth, windows = zip(*sought, strict=True)
        full = [_to_size(field, stride.bit_length() - 1) for field, stride in zip(levels, strides, strict=True)]
        return {
            "x_a": views.x_a[0],
            "x_b": views.x_b[0],
            "dvf_true": views.dvf[0],
            "mask": views.mask[0],
            "dvf_levels": [field[0] for field in levels],
            "warped": [warp(views.x_a, field, impl=method.impl)[0] for field in full],
            "features_a": [f[0].float() for f in features],
            "features_b": [f[1].float() for f in features],
            "centre": centre,
            "points": points,
            "similarity": weights,
            "vectors": [_mean_offset(w) for w in weights],
            "vectors_true": list(truth),
            "windows": list(windows),
            "dvf_found": full[-1][0],
        }


def _to_size(field: Tensor, doublings: int) -> Tensor:
    for _ in range(doublings):
        field = upsample_dvf(field, [2 * s for s in field.shape[2:]])
    return field


def _mean_offset(weights: Tensor) -> Tensor:
    """`(K, n)`, the vectors of weights `(K, *window)`."""
    n = weights.ndim - 1
    steps = [torch.arange(w, device=weights.device) - w // 2 for w in weights.shape[1:]]
    offsets = torch.cartesian_prod(*steps).reshape(-1, n)
    return weights.flatten(1) @ offsets.to(weights)


def _sought(dvf: Tensor, levels: list[Tensor], level: int, stride: int, points: Tensor) -> tuple[Tensor, Tensor]:
    """What a level has to find at the points, and where in view a its window lies.

    The first `(K, n)`, px of the level: the vector `w` that makes `w + up(c + w)` the truth, `up` being the field of
    the level above on this grid (COVER Eq. 28); NaN where there is none to be found. The second `(K, n)`, px of the
    image: `c + up(c)`.
    """
    at = (points // stride).to(dvf)
    # Truth in pixels of the level: mean over the pixels that each of its own covers.
    pool = F.avg_pool2d if points.shape[1] == 2 else F.avg_pool3d
    goal = _sample(pool(dvf, stride) / stride, at)
    if level == 0:
        return goal, at * stride + (stride - 1) / 2
    up = _to_size(levels[level - 1], 1)
    vector, moved = goal - _sample(up, at), torch.full_like(goal, torch.inf)
    for _ in range(50):
        step = goal - _sample(up, at + vector) - vector
        vector, moved = vector + 0.5 * step, step.abs()
    vector = torch.where((moved < 0.05).all(1, keepdim=True), vector, torch.nan)
    return vector, (at + _sample(up, at)) * stride + (stride - 1) / 2


def _sample(field: Tensor, at: Tensor) -> Tensor:
    """The field `(1, n, *S)` at places `(K, n)` in its pixels, `(K, n)`; beyond its edge the nearest value."""
    n = at.shape[1]
    if not len(at):
        return at
    # A grid with one pixel a place, each told how far off it looks.
    shape = (len(at), *[1] * (n - 1))
    own = torch.zeros_like(at)
    own[:, 0] = torch.arange(len(at))
    look_at = (at - own).T.reshape(1, n, *shape)
    return resample(field, look_at, padding="border").reshape(n, -1).T


def marked(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where to look in an image `(C, *S)`: a centre `(n,)`, and pixels `(K, n)` to mark, int64 on its device.

    The centre is that of the edges inside `mask` `(*S)`; planes through it show a volume. The pixels lie inside the
    mask, well apart, where the image has corners: at most four in an image; in a volume one on each of the planes.
    Where the mask is empty there are none.
    """
    # A plane or three, on the host: ties and sums come out the same on every device.
    grey = image.float().mean(0)
    n = grey.ndim
    centre = _centre(grey, mask)
    chosen: list[Tensor] = []
    room = min(grey.shape) / 6
    for axis in range(n) if n == 3 else (None,):
        plane, inside, place = grey, mask, [torch.arange(s) for s in grey.shape]
        if axis is not None:
            plane, inside = (x.select(axis, int(centre[axis])) for x in (grey, mask))
            place[axis] = centre[axis : axis + 1]
        score = _corners(plane.cpu())
        score = torch.where(inside.cpu() & _away_from_edges(score), score, -1.0)
        least = max(0.0, _FAINT * float(score.max())) if axis is None else 0.0
        where = torch.cartesian_prod(*place).reshape(*score.shape, n)
        for _ in range(1 if axis is not None else _POINTS):
            for point in chosen:
                near = (where - point).double().norm(dim=-1) < room
                score = score.masked_fill(near, -1.0)
            if float(score.max()) < least:
                break
            chosen.append(where.reshape(-1, n)[int(score.flatten().argmax())])
    points = torch.stack(chosen) if chosen else torch.zeros(0, n, dtype=torch.int64)
    return centre.to(image.device), points.to(image.device)


def _centre(grey: Tensor, mask: Tensor) -> Tensor:
    """Mean place of the edges inside the mask; without edges that of the mask, without a mask the middle."""
    slopes = [s.square() for s, size in zip(_slopes(grey), grey.shape, strict=True) if size > 1]
    edges = torch.stack(slopes).sum(0).sqrt() if slopes else torch.zeros_like(grey)
    weight = (edges + edges.max() * 1e-3 + 1e-6) * mask
    weight = weight.double() if float(weight.sum()) > 0 else torch.ones_like(weight, dtype=torch.float64)
    means = []
    for axis, size in enumerate(grey.shape):
        profile = weight.sum(tuple(i for i in range(grey.ndim) if i != axis)).cpu()
        means.append(int((profile @ torch.arange(size, dtype=torch.float64) / profile.sum()).round()))
    return torch.tensor(means)


def _slopes(x: Tensor) -> list[Tensor]:
    """Central differences along every axis, 0 at the edges."""
    found = []
    for axis, size in enumerate(x.shape):
        slope = torch.zeros_like(x)
        if size > 2:
            slope.narrow(axis, 1, size - 2).copy_((x.narrow(axis, 2, size - 2) - x.narrow(axis, 0, size - 2)) / 2)
        found.append(slope)
    return found


def _corners(plane: Tensor) -> Tensor:
    """How much of a corner there is at each pixel, not negative: the smaller eigenvalue of the structure tensor.

    Next to nothing beside a peak: what a mark stands on should be a corner and not the slope of one that is taken.
    """
    y, x = _slopes(plane)
    sums = torch.stack([y * y, x * x, x * y])[None]
    for _ in range(2):
        sums = F.avg_pool2d(sums, 5, 1, 2)
    yy, xx, xy = sums[0]
    score = ((yy + xx) / 2 - (((yy - xx) / 2).square() + xy.square()).sqrt()).clamp(min=0)
    peak = score == F.max_pool2d(score[None, None], 5, 1, 2)[0, 0]
    return torch.where(peak, score, 1e-3 * score)


def _away_from_edges(plane: Tensor) -> Tensor:
    """Pixels with room for a window around them."""
    inside = torch.zeros_like(plane, dtype=torch.bool)
    margins = [size // 12 for size in plane.shape]
    inside[tuple(slice(m, size - m) for m, size in zip(margins, plane.shape, strict=True))] = True
    return inside
