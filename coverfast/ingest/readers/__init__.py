"""One file, or one DICOM series, to one `Sample`: decode, orient, scale."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from coverfast.checks import require
from coverfast.ingest.files import KINDS, Source
from coverfast.ingest.readers.arrays import read_array
from coverfast.ingest.readers.decoded import Decoded, Unreadable, blame, extent, need
from coverfast.ingest.readers.dicom import read_slices
from coverfast.ingest.readers.images import read_image
from coverfast.ingest.readers.itk import read_itk
from coverfast.ingest.readers.nifti import read_nifti
from coverfast.ingest.readers.series import find_series
from coverfast.samples import Sample, check_sample

__all__ = ["Unreadable", "read_source"]


def read_source(source: Source, *, volume: int | None = None, labels: bool = False) -> Sample:
    """Read a source as one sample, without resampling.

    2D: `(1, H, W)`, colour as luma (ITU-R 601), alpha dropped. 3D: `(1, D, H, W)`, NIfTI, NRRD, MetaImage and DICOM
    with axes z, y, x running to superior, anterior, right (the closest axes of RAS+: flips and transposes only);
    npy and npz as they are, `(H, W)`, `(D, H, W)` or `(C, D, H, W)`. volume: which one, from 0, of the files that
    hold several; others are not concerned. Integers stay as stored, with slope and intercept; floats become
    float32, and are refused where that would lose the image. lo, hi: 0 and 255 for unscaled uint8, 0 and 1 for bool,
    otherwise the sample's minimum and maximum. labels: the file is a label map; indices into a palette are taken as
    they are, JPEG, DICOM and what has several numbers a pixel are refused.
    DICOM see `readers.dicom.read_slices`. `Unreadable` names the file and why it cannot be used.
    `InputError`: a setting, or a machine that fails (too many open files, a disk). `MemoryError`: too little memory.
    """
    ok = volume is None or (isinstance(volume, int) and not isinstance(volume, bool) and volume >= 0)
    require(ok, f"volume must be an int of at least 0, got {volume!r}")
    path = source.path
    require(bool(source.kind), f"{path} must be one of {', '.join(KINDS)}, got {path.suffix or 'no suffix'}")
    need(source.kind)
    with _naming(source):
        image = _decode(source, volume, labels)
        pixels = image.pixels
        require(pixels.size > 0, f"it has no pixels, shape {pixels.shape}")
        pixels = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("="))
        span = image.span
        if pixels.dtype == np.uint8 and (image.slope, image.intercept) == (1.0, 0.0):
            span = span or (0.0, 255.0)
        lo, hi = span or extent(pixels, image.slope, image.intercept)
        sample = Sample(
            pixels,
            *(image.slope, image.intercept, lo, hi, image.spacing),
            source=source.name,
            group=source.group,
            original=image.original,
        )
        check_sample(sample)
        return sample


def _decode(source: Source, volume: int | None, labels: bool) -> Decoded:
    path = source.path
    require(path.is_file() or not path.exists(), "it is no regular file")
    # Opened here first: nibabel and ITK turn what the system says into words of their own.
    with path.open("rb") as file:
        require(file.read(1) != b"", "it is empty")
    match source.kind:
        case "DICOM":
            require(not labels, "label maps in DICOM are not read; save it as NIfTI or NRRD")
            return read_slices(source.parts or _only(path))
        case "NIfTI":
            return read_nifti(path, volume)
        case "NRRD" | "MetaImage":
            return read_itk(path, source.kind, volume, labels)
        case "npy" | "npz":
            return read_array(path)
        case _:
            return read_image(path, labels)


def _only(path: Path) -> tuple[tuple[str, int], ...]:
    """The slices of a file that no scan has seen."""
    found, _, refused = find_series([str(path)])
    if refused:
        raise Unreadable(refused[0])
    require(len(found) == 1, f"it holds {len(found)} images, expected 1")
    return found[0].parts


@contextlib.contextmanager
def _naming(source: Source) -> Iterator[None]:
    try:
        yield
    except Unreadable:
        raise
    except Exception as error:  # decoders raise whatever they like on broken files
        blame(error, str(source.path))
        text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        text = text.replace(f"{source.name}: ", "").replace(f"<_io.BufferedReader name={str(source.path)!r}>", "it")
        text = " ".join(text.split()).rstrip(".")[:200] or type(error).__name__
        more = f" and {len(source.files) - 1} more ({source.name})" if len(source.parts) > 1 else ""
        raise Unreadable(f"{source.path}{more} cannot be read as {source.kind}: {text}") from error
