"""One image as shards keep it: stored pixels, what their values mean, and the hashes that vouch for them."""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, require

DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32")
# Attributes beyond 64 KiB leave HDF5's checksummed object header.
LONGEST_TEXT = 32768


@dataclass(frozen=True, eq=False)
class Sample:
    """One image as a shard keeps it.

    pixels: `(C, *S)`, S = (H, W) or (D, H, W), one of `DTYPES`. Its values mean `stored * slope + intercept`;
    `lo` and `hi`, in those scaled units, become 0 and 1. spacing: mm per pixel in the order of S, 1.0 where
    unknown. source: the name that messages use.
    """

    pixels: NDArray[Any]
    slope: float
    intercept: float
    lo: float
    hi: float
    spacing: tuple[float, ...]
    source: str

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
    """What a shard says of a sample without its pixels being read; `shape` is `(C, *S)`, sha256 hexadecimal."""

    shape: tuple[int, ...]
    dtype: str
    slope: float
    intercept: float
    lo: float
    hi: float
    spacing: tuple[float, ...]
    source: str
    sha256: str


def check_sample(sample: Sample) -> None:
    """Raise `InputError`, naming the source, unless a shard can hold the sample."""
    pixels, name = sample.pixels, sample.source
    require(isinstance(name, str) and "\0" not in name, f"source must be a string without NUL, got {name!r}")
    require(len(encoded(name)) <= LONGEST_TEXT, f"source must be at most {LONGEST_TEXT} bytes, got {name[:80]}...")
    require(isinstance(pixels, np.ndarray), f"{name}: pixels must be a numpy array, got {type(pixels).__name__}")
    require(pixels.dtype.name in DTYPES, f"{name}: pixels must be one of {', '.join(DTYPES)}, got {pixels.dtype.name}")
    require(
        pixels.ndim in (3, 4) and pixels.size > 0,
        f"{name}: pixels must be (C, H, W) or (C, D, H, W) without empty axes, got shape {pixels.shape}",
    )
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise InputError(f"{name}: pixels must be finite, got {int((~np.isfinite(pixels)).sum())} NaN or infinite")
    scaling = (sample.slope, sample.intercept, sample.lo, sample.hi, sample.hi - sample.lo)
    require(
        all(math.isfinite(v) for v in scaling),
        f"{name}: slope, intercept, lo, hi and hi - lo must be finite, got {', '.join(f'{v:g}' for v in scaling)}",
    )
    require(
        len(sample.spacing) == pixels.ndim - 1 and all(math.isfinite(v) and v > 0 for v in sample.spacing),
        f"{name}: spacing must be {pixels.ndim - 1} positive numbers, got {sample.spacing}",
    )


def encoded(text: str) -> bytes:
    # File names may hold bytes that are no UTF-8; Python shows them as surrogates.
    return text.encode("utf-8", "backslashreplace")


def pixel_digest(pixels: NDArray[Any]) -> str:
    little = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<"))
    sha = hashlib.sha256(f"{little.dtype.kind}{little.dtype.itemsize} {'x'.join(map(str, little.shape))}\n".encode())
    sha.update(little.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def add_to_content(content: Any, sample: Sample | SampleInfo, sha256: str) -> None:
    name = encoded(sample.source)
    content.update(bytes.fromhex(sha256) + struct.pack("<Q", len(name)) + name)
    scaling = (sample.slope, sample.intercept, sample.lo, sample.hi, *sample.spacing)
    content.update(struct.pack(f"<{len(scaling)}d", *scaling))
