"""Synthetic subjects as a shard: how they are written, and those of `coverfast.phantom`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import require
from coverfast.ingest.assembly import Advance
from coverfast.ingest.splits import check_fractions, draw_splits
from coverfast.phantom import CLASSES_2D, CLASSES_3D, phantom
from coverfast.samples import SPLITS, Sample
from coverfast.shards import ShardWriter

#: The images' classes by dimension, see `phantom_target`.
TARGETS = {2: ("lesion left", "lesion right"), 3: ("small ventricles", "large ventricles")}
#: Ventricles are large from this part of what the skull holds on: the median of 40 phantoms is 0.0164 at 96 and 128
#: voxels a side, 0.0174 at 64, 0.0185 at 48, where thin sulci leave less of the rest.
LARGE_VENTRICLES = 0.017


def build_phantoms(
    path: str | Path,
    ndim: int,
    size: int | Sequence[int],
    *,
    seed: int,
    indices: Iterable[int],
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    overwrite: bool = False,
    progress: Advance | None = None,
) -> None:
    """Write the phantoms of a seed with the given indices as a shard of uint8 images with label maps and classes.

    Label values are indices into `CLASSES_2D` or `CLASSES_3D` of `coverfast.phantom`; classes see `phantom_target`;
    the other arguments and refusals see `write_subjects` and `phantom`.
    """

    def draw(index: int) -> Sample:
        subject = phantom(ndim, size, seed=seed, index=index)
        pixels = (255 * subject.image[None]).round().astype(np.uint8)
        return Sample(
            *(pixels, 1.0, 0.0, 0.0, 255.0, (1.0,) * ndim, f"phantom-{seed}-{index}"),
            labels=subject.labels,
            target=phantom_target(subject.labels),
        )

    write_subjects(
        path,
        draw,
        indices,
        seed=seed,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        progress=progress,
        ndim=ndim,
        preprocessing={"preset": "phantom"},
        overwrite=overwrite,
        label_classes=dict(enumerate(CLASSES_2D if ndim == 2 else CLASSES_3D)),
        target_classes=TARGETS.get(ndim),
    )


def phantom_target(labels: NDArray[np.uint8]) -> str:
    """The class of a phantom by its label map `(*S)`, one of `TARGETS`; "" where the map is too coarse to tell.

    2D: the subject's side on which the middle of the lesion lies; columns run from right to left, so that the left
    half of the picture is the right side. 3D: whether the ventricles are `LARGE_VENTRICLES` of what the skull holds.
    """
    if labels.ndim == 2:
        columns = np.nonzero(labels == CLASSES_2D.index("lesion"))[1]
        if not columns.size:
            return ""
        return TARGETS[2][int(columns.mean() < (labels.shape[1] - 1) / 2)]
    inside = np.count_nonzero(labels >= CLASSES_3D.index("csf"))
    ventricles = np.count_nonzero(labels == CLASSES_3D.index("ventricle"))
    return TARGETS[3][int(ventricles >= LARGE_VENTRICLES * inside)] if inside else ""


def write_subjects(
    path: str | Path,
    draw: Callable[[int], Sample],
    indices: Iterable[int],
    *,
    seed: int,
    val_fraction: float,
    test_fraction: float,
    progress: Advance | None,
    **options: Any,
) -> None:
    """Write `draw(index)` for every index as a shard whose splits are drawn by `seed` as `draw_splits` does.

    progress: called with ("writing" or "checking", done, in all). options: those of `ShardWriter`. `InputError`: no
    index, and what `draw`, `draw_splits` and `ShardWriter` refuse.
    """
    advance = progress or (lambda stage, done, total: None)
    which = list(indices)
    require(len(which) > 0, "indices must be at least 1, got none")
    check_fractions(val_fraction, test_fraction, seed)
    names = [hashlib.sha256(b"%d" % index).digest() for index in which]
    splits, _ = draw_splits([""] * len(which), names, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
    checking = lambda done, total: advance("checking", done, total)  # noqa: E731
    with ShardWriter(path, progress=checking, **options) as writer:
        for done, (index, split) in enumerate(zip(which, splits, strict=True)):
            advance("writing", done, len(which))
            writer.add(replace(draw(index), split=SPLITS[split]))
        advance("writing", len(which), len(which))
