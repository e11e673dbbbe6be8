"""Labelled 2D subjects made from the MNI152 template and its tissue maps, which the package `nilearn` holds.

Each is one oblique cut through the template at a height of its own, bent by a smooth field that carries the T1 image
and the maps of grey and white matter alike, in a contrast of its own. All subjects are one brain: folds of the cortex
that others lack or have besides do not occur.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, per_axis, require
from coverfast.ingest.assembly import Advance
from coverfast.ingest.phantoms import write_subjects
from coverfast.samples import Sample

F32 = NDArray[np.float32]
Rng = np.random.Generator

#: Names of label values 0 to 3.
CLASSES = ("background", "csf", "grey matter", "white matter")
#: Height of the cut's middle, mm above the commissures: basal ganglia to the top of the ventricles.
HEIGHTS = (0.0, 45.0)
#: Mm that the shorter side of a picture spans; a brain is up to 180 long.
FIELD = 208.0
# Index in the arrays of _template of what the middle of a picture shows, but for the height; and the index at 0 mm.
_MIDDLE, _ZERO = (115.0, 98.0), 72.0
# Deviation and wavelength, mm, of the parts of the bending: an area shrinks to 0.4 and grows to 1.9 times, no folds.
_BENDS = ((4.0, 50.0), (1.2, 18.0))
# The highest word of the counter, which is 2 or 3 for phantoms: no two kinds of subject share random numbers.
_STREAM = 152


class AtlasSubject(NamedTuple):
    """One subject: `image (H, W)`, float32 in [0, 1], and `labels (H, W)`, uint8 indices into `CLASSES`."""

    image: F32
    labels: NDArray[np.uint8]


def atlas_subject(size: int | Sequence[int], *, seed: int, index: int = 0) -> AtlasSubject:
    """Draw subject `index` of the population `seed`: an axial slice of a brain without skull, with its tissues.

    size: pixels, one int or (H, W), at least 16. Rows run from anterior to posterior, columns from right to left, as
    radiologists look at it. A pixel is background outside the template's brain; inside, it is of the class that is
    likeliest by the bent maps, csf being what they leave of 1. At two sizes a subject is the same anatomy with other
    noise. The same arguments give the same arrays. `InputError`: a size that is too small, a seed or index that is not
    in [0, 2^64), nilearn or scipy not installed.
    """
    for name, value in (("seed", seed), ("index", index)):
        ok = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64
        require(ok, f"{name} must be an int in [0, 2^64), got {value!r}")
    shape = per_axis("size", size, 2, least=16)
    template = _template()
    from scipy.ndimage import map_coordinates

    key = np.array([seed, index], dtype=np.uint64)
    rng, grain = (Rng(np.random.Philox(key=key, counter=[0, 0, use, _STREAM])) for use in (0, 1))
    pixel = FIELD / min(shape)
    places = [(np.arange(s, dtype=np.float32) - (s - 1) / 2) * np.float32(pixel) for s in shape]
    where = _places(rng, places)
    # A pixel is wider than a voxel: four samples of each, or thin sulci would flicker.
    finer = [[w + p for w, p in zip(where, shift, strict=True)] for shift in _quarters(where)]
    t1, grey, white, brain = (
        sum(map_coordinates(part, at, order=1, output=np.float32) for at in finer) / np.float32(len(finer))
        for part in template
    )
    tissues = np.stack([brain - grey - white, grey, white])
    labels = np.where(brain >= 0.5, 1 + tissues.argmax(axis=0), 0).astype(np.uint8)
    bias = 1 + np.float32(rng.uniform(0.03, 0.12)) * np.clip(_smooth(rng, places, 90.0), -2, 2)
    image = _contrast(rng, t1) * np.float32(rng.uniform(0.65, 0.9)) * bias
    noise = np.float32(rng.uniform(0.01, 0.035)) * grain.standard_normal((2, *shape), dtype=np.float32)
    magnitude = np.hypot(image + noise[0], noise[1])  # of a complex signal, as in MR
    return AtlasSubject(np.clip(magnitude, 0, 1).astype(np.float32), labels)


def build_atlas_subjects(
    path: str | Path,
    *,
    count: int,
    seed: int,
    size: int | Sequence[int] = 128,
    first: int = 0,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    overwrite: bool = False,
    progress: Advance | None = None,
) -> None:
    """Write the atlas subjects `first` to `first + count - 1` of a seed as a shard of uint8 images with label maps.

    Label values are indices into `CLASSES`. The other arguments and refusals see `write_subjects` and `atlas_subject`.
    """
    shape = per_axis("size", size, 2, least=16)
    _template()

    def draw(index: int) -> Sample:
        subject = atlas_subject(shape, seed=seed, index=index)
        pixels = (255 * subject.image[None]).round().astype(np.uint8)
        spacing = (FIELD / min(shape),) * 2
        return Sample(pixels, 1.0, 0.0, 0.0, 255.0, spacing, f"mni152-{seed}-{index}", labels=subject.labels)

    write_subjects(
        path,
        draw,
        range(first, first + count),
        seed=seed,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        progress=progress,
        ndim=2,
        preprocessing={"preset": "atlas"},
        overwrite=overwrite,
        label_classes=dict(enumerate(CLASSES)),
    )


@functools.lru_cache(maxsize=1)
def _template() -> tuple[F32, F32, F32, F32]:
    """T1, grey matter, white matter and brain, each in [0, 1] at 1 mm, along (superior, posterior, left)."""
    try:
        import scipy.ndimage  # noqa: F401 - refused here, not in the middle
        from nilearn import datasets
    except ImportError as error:
        raise InputError(f"atlas subjects need the packages nilearn and scipy, found no {error.name}") from error
    names: Iterable[Any] = (
        datasets.load_mni152_template,
        datasets.load_mni152_gm_template,
        datasets.load_mni152_wm_template,
    )
    t1, grey, white = (
        np.ascontiguousarray(np.asarray(load(resolution=1).dataobj, np.float32).transpose(2, 1, 0)[:, ::-1, ::-1])
        for load in names
    )
    return t1, grey, white, (t1 > 0).astype(np.float32)


def _places(rng: Rng, places: Sequence[F32]) -> list[F32]:
    """Where in the template each pixel looks: three arrays `(H, W)`, indices along its axes."""
    down, across = np.meshgrid(*places, indexing="ij")
    turn, grow = rng.uniform(-0.15, 0.15), rng.uniform(0.92, 1.08, 2)
    tilt, shift = rng.uniform(-0.12, 0.12, 2), rng.uniform(-6.0, 6.0, 2)
    height = rng.uniform(*HEIGHTS)
    cos, sin = np.cos(turn), np.sin(turn)
    y = (cos * down - sin * across) / grow[0] + shift[0]
    x = (sin * down + cos * across) / grow[1] + shift[1]
    z = height + tilt[0] * y + tilt[1] * x
    bent = [part + sum(a * np.clip(_smooth(rng, places, w), -2, 2) for a, w in _BENDS) for part in (z, y, x)]
    return [part + start for part, start in zip(bent, (_ZERO, *_MIDDLE), strict=True)]


def _quarters(where: Sequence[F32]) -> list[list[F32]]:
    """The ways from the middle of a pixel to those of its quarters, as `where` changes across it."""
    down, across = ([np.gradient(w, axis=axis) for w in where] for axis in (0, 1))
    return [
        [np.asarray(s * d + t * a) for d, a in zip(down, across, strict=True)]
        for s in (-0.25, 0.25)
        for t in (-0.25, 0.25)
    ]


def _smooth(rng: Rng, places: Sequence[F32], wavelength: float) -> F32:
    """Noise of deviation 1 at `places`, mm, that changes over `wavelength` mm; the same at every size of picture."""
    from scipy.ndimage import map_coordinates

    reach = FIELD  # of a picture twice as long as it is wide
    lattice = rng.standard_normal([int(2 * reach / wavelength) + 5] * len(places), dtype=np.float32)
    at = np.meshgrid(*((np.clip(p, -reach, reach) + reach) / wavelength + 1 for p in places), indexing="ij")
    # The deviation of a cubic spline of unit white noise is between 0.68 and 0.71 an axis.
    return np.asarray(map_coordinates(lattice, at, order=3, prefilter=False, output=np.float32) / 0.69 ** len(places))


def _contrast(rng: Rng, t1: F32) -> F32:
    """The image by a smooth rising curve from 0 to 1 of its own."""
    from scipy.interpolate import PchipInterpolator

    steps = np.exp(rng.normal(0.0, 0.6, 8))
    curve = PchipInterpolator(np.linspace(0, 1, 9), np.concatenate([[0.0], np.cumsum(steps) / steps.sum()]))
    return np.asarray(curve(np.clip(t1, 0, 1)), np.float32)
