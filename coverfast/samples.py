"""One image as shards keep it: stored pixels, what their values mean, and the hashes that vouch for them."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, require

SPLITS = ("train", "val", "test")
#: What a reader does about a sample that cannot be read.
ON_BAD_SAMPLE = ("stop", "skip")
LABEL_DTYPES = ("uint8", "uint16", "uint32")
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32")
#: Most classes of a table: their indices are uint8.
MOST_CLASSES = 256
# Attributes of 64 KiB and more leave HDF5's checksummed object header.
LONGEST_TEXT = 32768


@dataclass(frozen=True, eq=False)
class Original:
    """Where a stored image lies in the file it came from.

    shape: of the file's array, in the file's own order of axes. to_original: `(n+1, n+1)` float64, homogeneous, from
    an index into the stored image (order of S) to an index into that array. affine: `(4, 4)` float64, from an index
    (i, j, k) of the file to mm in RAS+, None where the file has none. orientation: directions of the file's axes as
    letters ("LPS"), empty without an affine.
    """

    shape: tuple[int, ...]
    to_original: NDArray[np.float64]
    affine: NDArray[np.float64] | None = None
    orientation: str = ""

    @property
    def spacing(self) -> tuple[float, ...]:
        """Mm from pixel to pixel along each axis of the file; empty without an affine."""
        if self.affine is None:
            return ()
        return tuple(float(v) for v in np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0)))


class LabelClass(NamedTuple):
    """A value of label maps, at least 0 and below 2^32, and the name of what it marks."""

    value: int
    name: str


@dataclass(frozen=True, eq=False)
class Sample:
    """One image as a shard keeps it.

    pixels: `(C, *S)`, S = (H, W) or (D, H, W), one of `DTYPES`. Its values mean `stored * slope + intercept`;
    `lo` and `hi`, in those scaled units, become 0 and 1. spacing: mm per pixel in the order of S, 1.0 where
    unknown. source: the name that messages use. group: patient or subject, "" for a group of its own. split: one of
    `SPLITS`. original: where the image lies in its file, if it came from one. labels: `(*S)`, one of `LABEL_DTYPES`,
    the values of a label map on the image's grid as the file had them. target: name of the image's class, "" for none.
    """

    pixels: NDArray[Any]
    slope: float
    intercept: float
    lo: float
    hi: float
    spacing: tuple[float, ...]
    source: str
    group: str = ""
    split: str = "train"
    original: Original | None = None
    labels: NDArray[Any] | None = None
    target: str = ""

    def normalised(self) -> NDArray[np.float32]:
        """The image in [0, 1], `(stored * slope + intercept - lo) / (hi - lo)` clipped; all 0 where hi <= lo."""
        if self.hi <= self.lo:
            return np.zeros(self.pixels.shape, np.float32)
        values = self.pixels.astype(np.float64)
        values *= self.slope
        values += self.intercept - self.lo
        values /= self.hi - self.lo
        return np.clip(values, 0, 1, out=values).astype(np.float32)


class SampleInfo(NamedTuple):
    """What a shard says of a sample without its pixels being read.

    shape: `(C, *S)`. sha256, labels_sha256: hexadecimal, of the pixels and of the label map, "" where there is none.
    """

    shape: tuple[int, ...]
    dtype: str
    slope: float
    intercept: float
    lo: float
    hi: float
    spacing: tuple[float, ...]
    source: str
    group: str
    split: str
    original: Original | None
    sha256: str
    target: str = ""
    labels_sha256: str = ""


def check_sample(sample: Sample) -> None:
    """Raise `InputError`, naming the source, unless a shard can hold the sample."""
    pixels, name = sample.pixels, sample.source
    require(isinstance(pixels, np.ndarray), f"{name}: pixels must be a numpy array, got {type(pixels).__name__}")
    require(pixels.dtype.name in DTYPES, f"{name}: pixels must be one of {', '.join(DTYPES)}, got {pixels.dtype.name}")
    require(
        pixels.ndim in (3, 4) and pixels.size > 0,
        f"{name}: pixels must be (C, H, W) or (C, D, H, W) without empty axes, got shape {pixels.shape}",
    )
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise InputError(f"{name}: pixels must be finite, got {int((~np.isfinite(pixels)).sum())} NaN or infinite")
    check_metadata(sample, pixels.ndim - 1)
    _check_labels(sample)


def _check_labels(sample: Sample) -> None:
    labels, name = sample.labels, sample.source
    if labels is None:
        return
    require(isinstance(labels, np.ndarray), f"{name}: labels must be a numpy array, got {type(labels).__name__}")
    require(
        labels.dtype.name in LABEL_DTYPES,
        f"{name}: labels must be one of {', '.join(LABEL_DTYPES)}, got {labels.dtype.name}",
    )
    require(
        labels.shape == sample.pixels.shape[1:],
        f"{name}: labels must be on the image's grid, {sample.pixels.shape[1:]}, got shape {labels.shape}",
    )


def check_metadata(sample: Sample | SampleInfo, n: int) -> None:
    """Raise `InputError`, naming the source, unless what is said of an image of `n` dimensions makes sense."""
    name, original = sample.source, sample.original
    for key, text in (("source", name), ("group", sample.group), ("target", sample.target)):
        require(isinstance(text, str) and "\0" not in text, f"{key} must be a string without NUL, got {text!r}")
        require(len(encoded(text)) <= LONGEST_TEXT, f"{key} must be at most {LONGEST_TEXT} bytes, got {text[:80]}...")
    scaling = (sample.slope, sample.intercept, sample.lo, sample.hi, sample.hi - sample.lo)
    require(
        all(math.isfinite(v) for v in scaling),
        f"{name}: slope, intercept, lo, hi and hi - lo must be finite, got {', '.join(f'{v:g}' for v in scaling)}",
    )
    require(
        len(sample.spacing) == n and all(math.isfinite(v) and v > 0 for v in sample.spacing),
        f"{name}: spacing must be {n} positive numbers, got {sample.spacing}",
    )
    require(sample.split in SPLITS, f"{name}: split must be one of {', '.join(SPLITS)}, got {sample.split!r}")
    if original is None:
        return
    require(
        original.to_original.shape == (n + 1, n + 1) and bool(np.isfinite(original.to_original).all()),
        f"{name}: to_original must be {n + 1} x {n + 1} finite numbers, got {original.to_original.tolist()}",
    )
    require(
        len(original.shape) == n and all(s >= 1 for s in original.shape),
        f"{name}: the original shape must be {n} positive integers, got {original.shape}",
    )
    require(
        original.affine is None or (original.affine.shape == (4, 4) and bool(np.isfinite(original.affine).all())),
        f"{name}: affine must be 4 x 4 finite numbers, got {original.affine}",
    )


def encoded(text: str) -> bytes:
    """UTF-8; file names may hold bytes that are none, which Python shows as surrogates."""
    return text.encode("utf-8", "backslashreplace")


def pixel_digest(pixels: NDArray[Any]) -> str:
    """SHA-256 of type, shape and pixels, in hexadecimal; see docs/shard-format.md."""
    little = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<"))
    sha = hashlib.sha256(f"{little.dtype.kind}{little.dtype.itemsize} {'x'.join(map(str, little.shape))}\n".encode())
    sha.update(little.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def add_to_content(content: Any, sample: Sample | SampleInfo, sha256: str) -> None:
    """Add a sample to a running hash of all that a shard says; see docs/shard-format.md."""
    original = sample.original
    texts = (sample.source, sample.group, sample.split, original.orientation if original else "")
    parts = [bytes.fromhex(sha256), *map(encoded, texts)]
    numbers: list[Any] = [(sample.slope, sample.intercept, sample.lo, sample.hi), sample.spacing]
    if original:
        numbers += [original.to_original, original.shape, () if original.affine is None else original.affine]
    parts += [np.asarray(values, "<f8").tobytes() for values in numbers]
    _add_parts(content, parts)


def add_classes_to_content(
    content: Any,
    samples: Iterable[tuple[str, str]],
    label_classes: Sequence[LabelClass],
    target_classes: Sequence[str],
) -> None:
    """Add what version 3 has more than version 2, after all samples; see docs/shard-format.md.

    samples: the SHA-256 of the label map of each, in hexadecimal, "" for none, and its target.
    """
    parts = [b"version 3"]
    for sha256, target in samples:
        parts += [bytes.fromhex(sha256), encoded(target)]
    parts.append(np.asarray([value for value, _ in label_classes], "<u8").tobytes())
    parts += [encoded(name) for _, name in label_classes]
    parts += [encoded(name) for name in target_classes]
    _add_parts(content, parts)


def _add_parts(content: Any, parts: Iterable[bytes]) -> None:
    for part in parts:
        content.update(struct.pack("<Q", len(part)) + part)
