"""How good a prediction is: overlap and surface distances of label maps, AUC of scores.

`docs/evaluation.md` has the definitions with their degenerate cases; the tests hold them to MONAI and scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, require

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]

#: What is measured of a label map, class by class, and what it means.
SEGMENTATION_METRICS = {
    "dsc": "Dice similarity coefficient, 2 |P and T| / (|P| + |T|); 1 where both are empty",
    "iou": "intersection over union, |P and T| / |P or T|; 1 where both are empty",
    "hd95": "95th percentile of the distances from each surface to the other, the larger of the two directions, mm; "
    "none where both are empty, infinite where one is",
    "surface_dice": "share of both surfaces that lies within the tolerance of the other; 1 where both are empty",
}

# Rounding may put a distance of exactly the tolerance beyond it.
_SLACK = 1e-6


class Distances(NamedTuple):
    """From every pixel of one surface to the nearest of the other, mm: `(n,)` and `(m,)`, infinite if there is none."""

    from_prediction: Floats
    from_truth: Floats


def dice(prediction: Mask, truth: Mask) -> float:
    """Dice similarity coefficient of two boolean masks of one shape, `2 |P and T| / (|P| + |T|)`.

    1 where both are empty (SPEC 8), 0 where one is.
    """
    _check_masks(prediction, truth)
    total = int(prediction.sum()) + int(truth.sum())
    return 2 * int((prediction & truth).sum()) / total if total else 1.0


def iou(prediction: Mask, truth: Mask) -> float:
    """Intersection over union of two boolean masks of one shape; 1 where both are empty, 0 where one is."""
    _check_masks(prediction, truth)
    union = int((prediction | truth).sum())
    return int((prediction & truth).sum()) / union if union else 1.0


def hausdorff95(prediction: Mask, truth: Mask, spacing: Sequence[float]) -> float:
    """95 % Hausdorff distance of two boolean masks of one shape, mm.

    From every surface pixel of one mask the distance to the nearest surface pixel of the other; of these the 95th
    percentile (linear between ranks), in each direction; the larger of the two. Surface pixels are those of the
    mask with a neighbour, across a side, that is not in the mask; beyond the image nothing is. NaN where both masks
    are empty, infinite where one is. spacing: mm from pixel to pixel along each axis.
    """
    return _hausdorff95(surface_distances(prediction, truth, spacing))


def surface_dice(prediction: Mask, truth: Mask, spacing: Sequence[float], tolerance: float) -> float:
    """Share of the surface pixels of two boolean masks that lie within `tolerance` mm of the other's surface.

    Both surfaces count together, by pixels; what a surface is: see `hausdorff95`. 1 where both masks are empty, 0 where
    one is.
    """
    require(tolerance >= 0, f"tolerance must be at least 0 mm, got {tolerance!r}")
    return _surface_dice(surface_distances(prediction, truth, spacing), tolerance)


def surface_distances(prediction: Mask, truth: Mask, spacing: Sequence[float]) -> Distances:
    """Distances between the surfaces of two boolean masks of one shape; `InputError` without scipy."""
    _check_masks(prediction, truth)
    _check_spacing(spacing, truth.ndim)
    return _distances(*(_surface(mask, [slice(None)] * mask.ndim, spacing) for mask in (prediction, truth)))


def score_case(
    prediction: NDArray[Any], truth: NDArray[Any], classes: int, spacing: Sequence[float], tolerance: float
) -> dict[str, Floats]:
    """Every one of `SEGMENTATION_METRICS` for the foreground classes 1 .. classes - 1 of two maps of class indices.

    prediction, truth: `(*S)`, unsigned. spacing: mm along S. tolerance: of the surface Dice, mm. Each value is
    `(classes - 1,)` float64, what the function of that name gives for the masks of the class. `InputError`: see there.
    """
    require(tolerance >= 0, f"tolerance must be at least 0 mm, got {tolerance!r}")
    _check_spacing(spacing, truth.ndim)
    overlap = dice_per_class(prediction, truth, classes)
    # IoU and DSC say the same: D = 2 I / (1 + I).
    scores = {"dsc": overlap, "iou": overlap / (2 - overlap)}
    boxes = [_boxes(array, classes) for array in (prediction, truth)]
    hd95, within = np.empty(classes - 1), np.empty(classes - 1)
    for label in range(1, classes):
        surfaces = [
            np.empty((0, truth.ndim)) if box is None else _surface(array[box] == label, box, spacing)
            for array, box in zip((prediction, truth), (b[label - 1] for b in boxes), strict=True)
        ]
        distances = _distances(*surfaces)
        hd95[label - 1], within[label - 1] = _hausdorff95(distances), _surface_dice(distances, tolerance)
    return scores | {"hd95": hd95, "surface_dice": within}


def dice_per_class(prediction: NDArray[Any], truth: NDArray[Any], classes: int) -> Floats:
    """`dice` of the foreground classes 1 .. classes - 1 of two maps of class indices `(*S)`, as `(classes - 1,)`."""
    require(
        prediction.shape == truth.shape,
        f"prediction must have the shape of the truth, {truth.shape}, got {prediction.shape}",
    )
    largest = max(int(array.max(initial=0)) for array in (prediction, truth))
    require(largest < classes, f"class indices must be below {classes}, got {largest}")
    counts = np.zeros(classes * classes, np.int64)
    for plane, true in zip(prediction, truth, strict=True):  # a plane at a time: 8 bytes a pixel of it
        counts += np.bincount((plane.astype(np.int64) * classes + true).ravel(), minlength=len(counts))
    matrix = counts.reshape(classes, classes)
    both, total = matrix.diagonal()[1:], (matrix.sum(axis=0) + matrix.sum(axis=1))[1:]
    return np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0)


def auc(scores: NDArray[Any], labels: NDArray[Any]) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting a half.

    scores: `(N,)` finite. labels: `(N,)`, true for positives. NaN unless there are both positives and negatives.
    """
    scores, positive = np.asarray(scores, np.float64), np.asarray(labels).astype(bool)
    require(
        scores.ndim == 1 and scores.shape == positive.shape,
        f"scores and labels must be (N,), got {scores.shape} and {positive.shape}",
    )
    require(
        bool(np.isfinite(scores).all()), f"scores must be finite, got {int((~np.isfinite(scores)).sum())} that are not"
    )
    count = int(positive.sum())
    pairs = count * (len(scores) - count)
    if pairs == 0:
        return float("nan")
    _, place, ties = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(ties) - (ties - 1) / 2
    return float((ranks[place][positive].sum() - count * (count + 1) / 2) / pairs)


def auc_one_vs_rest(probabilities: NDArray[Any], labels: NDArray[Any]) -> float:
    """Mean over the classes of the `auc` of each against the rest (macro).

    probabilities: `(N, K)`. labels: `(N,)` class indices. Classes that no case has, or all have, are left out; NaN
    where none is left.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    require(
        probabilities.ndim == 2 and labels.shape == probabilities.shape[:1],
        f"probabilities must be (N, K) and labels (N,), got {probabilities.shape} and {labels.shape}",
    )
    found = [auc(column, labels == label) for label, column in enumerate(probabilities.T)]
    known = [value for value in found if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def _check_masks(prediction: Mask, truth: Mask) -> None:
    for name, mask in (("prediction", prediction), ("truth", truth)):
        require(mask.dtype == bool, f"{name} must be a boolean mask, got {mask.dtype}")
    require(
        prediction.shape == truth.shape,
        f"prediction must have the shape of the truth, {truth.shape}, got {prediction.shape}",
    )


def _check_spacing(spacing: Sequence[float], ndim: int) -> None:
    ok = len(spacing) == ndim and all(np.isfinite(s) and s > 0 for s in spacing)
    require(ok, f"spacing must be {ndim} positive numbers, one an axis, got {tuple(spacing)}")


def _boxes(array: NDArray[Any], classes: int) -> list[tuple[slice, ...] | None]:
    """The part of a map that holds each class, None for one that is not there."""
    ndimage, _ = _scipy()
    return list(ndimage.find_objects(array.astype(np.intp, copy=False), classes - 1))


def _surface(mask: Mask, box: Sequence[slice], spacing: Sequence[float]) -> Floats:
    """Where the surface pixels of a mask lie, `(n, ndim)` in mm; the mask is the part `box` of an image."""
    ndimage, _ = _scipy()
    found = np.argwhere(mask & ~ndimage.binary_erosion(mask))
    return (found + [b.start or 0 for b in box]) * np.asarray(spacing, np.float64)


def _distances(prediction: Floats, truth: Floats) -> Distances:
    return Distances(_nearest(prediction, truth), _nearest(truth, prediction))


def _nearest(points: Floats, others: Floats) -> Floats:
    if not len(others):
        return np.full(len(points), np.inf)
    _, spatial = _scipy()
    return np.asarray(spatial.KDTree(others, leafsize=32).query(points)[0]) if len(points) else np.empty(0)


def _hausdorff95(distances: Distances) -> float:
    if not (len(distances.from_prediction) or len(distances.from_truth)):
        return float("nan")
    if not (len(distances.from_prediction) and len(distances.from_truth)):
        return float("inf")
    return float(max(np.quantile(d, 0.95) for d in distances))


def _surface_dice(distances: Distances, tolerance: float) -> float:
    together = np.concatenate(distances)
    return float((together <= tolerance * (1 + _SLACK)).mean()) if len(together) else 1.0


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import ndimage, spatial
    except ImportError as error:
        raise InputError("distances between surfaces need the extra: pip install coverfast[io]") from error
    return ndimage, spatial
