"""What training shows now and then about what it learns: errors of every level, what cannot be matched, dispersion.

`look` runs on the training device and never waits for it: sums and a few hundred feature vectors are what it leaves.
`figures` makes named numbers of them on the host, later. docs/monitoring.md tells how to read these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from coverfast.dispersion import dispersion, effective_rank
from coverfast.geometry import downsample_dvf, inside_mask
from coverfast.methods.sampling import beside, some_pixels
from coverfast.ops.losses import Mask, field_errors
from coverfast.ops.warp import Field

if TYPE_CHECKING:
    from coverfast.methods.cover import Cover, Matched

#: Pixels looked at in the coarsest features.
COARSE_POINTS = 512

#: An image that varies less than this around a pixel is featureless there: the largest standard deviation of the noise
#: that the paper adds to view a, in which such variation drowns, and five grey levels of an 8-bit image.
FLAT = 0.02


def look(method: Cover, matched: Matched, iteration: int) -> dict[str, Tensor]:
    """What `figures` needs of a batch, or of a part of it, without gradient and without waiting for the device.

    Args:
        method: whose pyramid it is.
        matched: views of B images, fields of L levels and features, of any floating dtype.
        iteration: selects the pixels whose features are looked at; the same ones on every device.

    Returns:
        On the device: `errors` `(L, 3)` float64, of each level the sums of the end-point error and of that of no
        displacement over the pixels that count, and their number; `beyond`, `flat` and `pixels`, scalars, float64,
        numbers of counting pixels of the image, the last of all of them; `samples` and `neighbours` `(POINTS, C)`
        float32, finest features of view b at a pixel and beside it; `counts` `(POINTS,)` bool, whether both pixels
        count; `coarse` `(COARSE_POINTS, C_0)` float32, coarsest features of view b.
    """
    views, levels, features = matched
    truth = views.dvf
    mask = views.shown if isinstance(views.shown, Tensor) else inside_mask(truth)
    far = torch.zeros_like(mask[:, 0])
    for axis, reach in enumerate(method.pyramid.reach):
        far |= truth[:, axis].abs() > reach * 2**method.doublings
    flat = _featureless(views.x_b, mask, _in_image(method.pyramid.windows[-1], method.doublings))
    beyond = {
        "beyond": (far & mask[:, 0]).sum(dtype=torch.float64),
        "flat": (flat & mask).sum(dtype=torch.float64),
        "pixels": mask.sum(dtype=torch.float64),
    }
    target, shown = views.target, views.shown
    if method.doublings:
        truth, mask = method.truth(views)
        target, shown = truth, mask
    fine, coarse = (x[len(x) // 2 :].movedim(1, -1) for x in (features[-1], features[0]))
    at = some_pixels(iteration, fine)
    next_to = beside(at, fine.shape[1:-1])
    found = {
        **beyond,
        "samples": fine[at].float(),
        "neighbours": fine[next_to].float(),
        "counts": mask[:, 0][at] & mask[:, 0][next_to],
        "coarse": coarse[some_pixels(iteration, coarse, COARSE_POINTS)].float(),
    }
    errors = [_error_sums(levels[-1], target, shown, method.impl)]
    for field in reversed(levels[:-1]):
        truth, mask = downsample_dvf(truth, mask)
        errors.append(_error_sums(field, truth, mask, method.impl))
    return {"errors": torch.stack(errors[::-1]), **found}


def figures(found: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Named figures from what `look` gave, as arrays.

    A pixel of the finest level counts when both views show it (COVER Eq. 27), a coarser one when all the fine pixels
    it covers do.

    Returns:
        `epe_0` .. `epe_{L-1}`, end-point errors coarse to fine, each in pixels of its level, and `ratio_0` ..
        `ratio_{L-1}`, over those of no displacement (SPEC 6); those of the last level are `epe` and `epe_ratio` of
        `Cover.figures`.
        `beyond_reach`: share of the counting pixels whose true displacement exceeds the reach of the pyramid on any
        axis (SPEC 4).
        `background`: share of the counting pixels of view b around which nothing differs by `FLAT` or more, within
        the window of the finest level: where keys do not differ, no matching can tell positions apart. What does not
        count is not looked at; so the zeros beyond the image are neither background nor, beside it, an edge.
        `cos_random`, `cos_random_std`, `cos_near`, `cos_near_std`, `rank`: `dispersion` of the finest features of
        view b, which are the ones to transfer, at pixels that count.
        `rank_coarse`: `effective_rank` of the coarsest features of view b, at any pixels: a coarse one sees far
        beyond itself, and the rank depends on the number of samples, which is thus always the same.
        NaN for what has no value: where nothing counts, all but the errors, which are 0, and `rank_coarse`.
    """
    rows = found["errors"].tolist()
    out = {f"epe_{level}": l2 / max(1.0, count) for level, (l2, _, count) in enumerate(rows)}
    for level, (l2, still, count) in enumerate(rows):
        out[f"ratio_{level}"] = l2 / max(still, 1e-6 * count) if count else float("nan")
    count = float(found["pixels"]) or float("nan")
    out |= {"beyond_reach": float(found["beyond"]) / count, "background": float(found["flat"]) / count}
    counts = found["counts"]
    out |= dispersion(found["samples"][counts], found["neighbours"][counts])
    return out | {"rank_coarse": effective_rank(found["coarse"])}


def _error_sums(field: Tensor, truth: Field, mask: Mask, impl: str) -> Tensor:
    """Sums of the end-point error, of that of no displacement, and of 1, `(3,)` float64."""
    found = field_errors(field, truth, mask, impl=impl)
    count = (found.mask * field[:, 0].numel()).round()
    return torch.stack([found.epe.double() * count, found.still.double() * count, count])


def _featureless(image: Tensor, mask: Tensor, window: Sequence[int]) -> Tensor:
    """Where no channel varies by `FLAT` or more over the counting pixels of the window, `(B, 1, *S)` bool."""
    # What does not count is lowered out of the way of the largest value, and of the largest negative.
    spread = _largest(image.masked_fill(~mask, -torch.inf), window)
    spread += _largest((-image).masked_fill_(~mask, -torch.inf), window)
    return (spread < FLAT).all(1, keepdim=True)


def _in_image(window: Sequence[int], doublings: int) -> list[int]:
    """The odd window that covers, in pixels of the image, what one of the finest level does."""
    return [(w - 1) * 2**doublings + 1 for w in window]


def _largest(x: Tensor, window: Sequence[int]) -> Tensor:
    """The largest value in the window around each pixel, within the grid: one axis after the other."""
    pool = F.max_pool2d if x.ndim == 4 else F.max_pool3d
    for axis, w in enumerate(window):
        line = [w if i == axis else 1 for i in range(len(window))]
        x = pool(x, line, 1, [i // 2 for i in line])
    return x
