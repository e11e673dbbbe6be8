"""What every reader hands over, and what several of them need."""

from __future__ import annotations

import errno
import importlib
import math
import os
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, require
from coverfast.samples import Original

_MODULES = {
    **dict.fromkeys(("PNG", "JPEG", "TIFF"), ("PIL.Image",)),
    **dict.fromkeys(("NRRD", "MetaImage"), ("SimpleITK", "nibabel")),
    "NIfTI": ("nibabel",),
    "DICOM": ("pydicom", "nibabel"),
}

_MACHINE = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM)


def need(kind: str) -> None:
    """Raise `InputError` unless what reads this kind is installed."""
    for module in _MODULES.get(kind, ()):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise InputError(f"reading {kind} needs the extra: pip install coverfast[io]") from error


class Unreadable(InputError):
    """A file that is no sound image, in contrast to a setting or a set-up that is wrong."""


def blame(error: BaseException | None, what: str) -> None:
    """Raise anew, and not as `Unreadable`, what the machine is to blame for and not the file: a skipped file is lost.

    `MemoryError` stays one; too many open files, or a disk that fails, become an `InputError`. Both are also looked
    for in what a decoder's own error came from.
    """
    while error is not None:
        if isinstance(error, MemoryError):
            raise MemoryError from error
        if isinstance(error, OSError) and error.errno in _MACHINE:
            raise InputError(f"{what} must be read by a sound machine, found: {os.strerror(error.errno)}") from error
        error = error.__cause__ or error.__context__


class Decoded(NamedTuple):
    """An image out of its file, in the order that shards keep.

    pixels: `(C, *S)`. spacing: mm along S. original: see `Sample`. slope, intercept: of the stored numbers. span:
    (lo, hi) if the file's kind or type says them.
    """

    pixels: NDArray[Any]
    spacing: tuple[float, ...]
    original: Original
    slope: float = 1.0
    intercept: float = 0.0
    span: tuple[float, float] | None = None


def as_stored(pixels: NDArray[Any], spacing: tuple[float, ...] | None = None) -> Decoded:
    """`(C, *S)` whose axes and order are the file's own."""
    shape = pixels.shape[1:]
    return Decoded(pixels, spacing or (1.0,) * len(shape), Original(shape, np.eye(len(shape) + 1)))


def to_ras(volume: NDArray[Any], affine: NDArray[np.float64]) -> Decoded:
    """A volume (i, j, k) as `(1, z, y, x)`, rising towards superior, anterior, right: flips and transposes only.

    affine: `(4, 4)`, index to mm in RAS+. Oblique and sheared axes go to the closest ones, by the closest rotation.
    """
    from nibabel import affines, orientations

    require(volume.size > 0, f"it has no pixels, shape {volume.shape}")
    require(bool(np.isfinite(affine).all()), "its affine must be finite")
    sizes = affines.voxel_sizes(affine)
    independent = (sizes > 0).all() and np.linalg.matrix_rank(affine[:3, :3] / sizes, tol=1e-3) == 3
    require(bool(independent), "its affine must have three independent axes")
    turn = orientations.io_orientation(affine)
    turned = orientations.apply_orientation(volume, turn).transpose(2, 1, 0)
    reverse = np.eye(4)[[2, 1, 0, 3]]
    to_original = orientations.inv_ornt_aff(turn, volume.shape) @ reverse
    spacing = affines.voxel_sizes(affine @ to_original)
    original = Original(volume.shape, to_original, affine, "".join(orientations.aff2axcodes(affine)))
    return Decoded(turned[None], tuple(float(s) for s in spacing), original)


def one_of(count: int, volume: int | None, what: str) -> int:
    """Which of `count` volumes to read: `volume`, or the only one."""
    if count == 1:
        return 0
    require(volume is not None, f"it holds {count} volumes, {what}; choose one with --volume 0 to {count - 1}")
    require(0 <= (volume or 0) < count, f"it holds {count} volumes, {what}; --volume must be below, got {volume}")
    return volume or 0


def luma(rgb: NDArray[Any]) -> NDArray[Any]:
    """Unsigned integers `(..., 3)` as ITU-R 601 luma `(...)`, rounded as Pillow rounds, in the same type."""
    weights = np.array([19595, 38470, 7471], np.uint64)
    return ((rgb.astype(np.uint64) @ weights + 0x8000) >> np.uint64(16)).astype(rgb.dtype)


def float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Floats as float32; refused where that would lose the image."""
    if values.dtype.itemsize > 4 and values.size:
        check_range(float(values.min()), float(values.max()))
    return narrow(values)


def check_range(low: float, high: float) -> None:
    """Refuse values between these if the rounding of float32 is more than a thousandth of their range."""
    known = math.isfinite(low) and math.isfinite(high) and high > low
    require(
        not known or max(-low, high) * 2.0**-24 <= 1e-3 * (high - low),
        f"its values must be apart enough for float32, got {low!r} to {high!r}; subtract their mean",
    )


def narrow(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):  # what leaves the range is infinite, and refused as such
        return values.astype(np.float32)


def extent(pixels: NDArray[Any], slope: float, intercept: float) -> tuple[float, float]:
    """Smallest and largest scaled value; (0, 0) if not finite, which `check_sample` reports by count."""
    ends = [float(v) * slope + intercept for v in (pixels.min(), pixels.max())]
    return (min(ends), max(ends)) if all(map(math.isfinite, ends)) else (0.0, 0.0)
