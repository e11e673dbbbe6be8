"""One file to one `Sample`: decode, orient, scale."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, require
from coverfast.ingest.files import KINDS, Source
from coverfast.samples import Sample, check_sample

_MODULES = {"PNG": "PIL.Image", "JPEG": "PIL.Image", "TIFF": "PIL.Image", "NIfTI": "nibabel", "npy": "numpy"}
_MILLIMETRES = {"meter": 1e3, "mm": 1.0, "micron": 1e-3, "unknown": 1.0}


def _module(kind: str) -> ModuleType:
    try:
        return importlib.import_module(_MODULES[kind])
    except ImportError as error:
        raise InputError(f"reading {kind} needs the extra: pip install coverfast[io]") from error


def check_extras(sources: Sequence[Source], size: int | None = None) -> None:
    """Raise `InputError` unless every kind among the sources can be read, and scaled, with what is installed."""
    for kind in sorted({source.kind for source in sources} | ({"PNG"} if size else set())):
        _module(kind)


class Unreadable(InputError):
    """A file that is no sound image, in contrast to a setting or a set-up that is wrong."""


def read_source(source: Source, size: int | None = None) -> Sample:
    """Read a file as one sample.

    2D: `(1, H, W)`, colour as luma (ITU-R 601), alpha dropped. 3D: `(1, D, H, W)`, NIfTI with axes z, y, x running
    to superior, anterior, right; npy as it is, `(H, W)`, `(D, H, W)` or `(C, D, H, W)`. size: 1 to 16384; a 2D
    image is scaled (anti-aliased) until its short side is `size` pixels and cut to the square in its centre.
    Integers stay as stored; floats become float32. lo, hi: 0 and 255 for unscaled uint8, 0 and 1 for bool,
    otherwise the sample's minimum and maximum. `InputError` names the file and why it cannot be used.
    """
    check_size(size)
    path = source.path
    require(bool(source.kind), f"{path} must be one of {', '.join(KINDS)}, got {path.suffix or 'no suffix'}")
    module = _module(source.kind)
    spacing, scaling, span = None, (1.0, 0.0), None
    with _naming(source):
        require(path.is_file() or not path.exists(), "it is no regular file")
        require(path.stat().st_size > 0, "it is empty")
        if source.kind == "NIfTI":
            pixels, spacing, scaling = _read_nifti(module, source)
        elif source.kind == "npy":
            pixels, span = _read_npy(source)
        else:
            pixels = _read_image(source)
        require(pixels.size > 0, f"it has no pixels, shape {pixels.shape}")
    if size is not None:
        require(pixels.ndim == 3, f"size is for 2D images, {path} is 3D, shape {pixels.shape}")
        pixels = _fit(pixels, size)
    with _naming(source):
        return _sample(source, pixels, spacing or (1.0,) * (pixels.ndim - 1), scaling, span)


def check_size(size: int | None) -> None:
    """Raise `InputError` unless `size` is None or a side that images can be scaled to."""
    ok = size is None or (isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= 16384)
    require(ok, f"size must be an int from 1 to 16384, got {size!r}")


@contextlib.contextmanager
def _naming(source: Source) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # decoders raise whatever they like on broken files
        text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        text = text.replace(f"{source.name}: ", "").replace(f"<_io.BufferedReader name={str(source.path)!r}>", "it")
        text = " ".join(text.split()).rstrip(".")[:200] or type(error).__name__
        raise Unreadable(f"{source.path} cannot be read as {source.kind}: {text}") from error


def _sample(
    source: Source,
    pixels: NDArray[Any],
    spacing: tuple[float, ...],
    scaling: tuple[float, float],
    span: tuple[float, float] | None,
) -> Sample:
    slope, intercept = scaling
    if span is None and pixels.dtype == np.uint8 and scaling == (1.0, 0.0):
        span = (0.0, 255.0)
    if span is None:
        ends = [float(v) * slope + intercept for v in (pixels.min(), pixels.max())]
        # NaN is left to check_sample, which counts it.
        span = (min(ends), max(ends)) if all(map(math.isfinite, ends)) else (0.0, 0.0)
    sample = Sample(np.ascontiguousarray(pixels), slope, intercept, *span, spacing, source.name)
    check_sample(sample)
    return sample


def _read_image(source: Source) -> NDArray[Any]:
    """A Pillow image as `(1, H, W)`."""
    from PIL import Image, ImageOps

    with contextlib.ExitStack() as stack:
        # An open file, not a path: of a path, Pillow maps uncompressed TIFF and mixes up the axes of turned ones.
        file = stack.enter_context(source.path.open("rb"))
        # Pillow warns from 89 million pixels on and refuses from twice that; only the refusal counts here.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = stack.enter_context(Image.open(file, formats=("PNG", "JPEG", "TIFF")))
        pages = getattr(image, "n_frames", 1)
        require(pages == 1 or image.format == "MPO", f"it has {pages} pages or frames, expected 1")
        bits, signed, white = _tiff_layout(image)
        if image.format == "PNG":
            bits = _png_bits(source.path)
        mode, channels = image.mode, len(image.getbands())
        require(
            bits <= 8 or channels == 1,
            f"it has {channels} channels of {bits} bits, which Pillow would cut to 8; save it as 16-bit grey",
        )
        require(not white or bits <= 8 or mode == "F", f"it is {bits}-bit with white as 0; save it with black as 0")
        upright = ImageOps.exif_transpose(image)
        if mode == "F" or mode.startswith("I"):
            array = np.asarray(upright)
            if mode == "I" and bits <= 16:
                array = array.astype(np.int16 if signed else np.uint16)
            elif mode == "I" and not signed:
                array = array.view(np.uint32)
        else:
            through = {"P": "RGBA", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB"}.get(mode, mode)
            require(through in ("1", "L", "LA", "RGB", "RGBA", "RGBX"), f"its colour mode {mode} is not supported")
            array = np.asarray(upright.convert(through).convert("L"))
    return array.astype(array.dtype.newbyteorder("="))[None]


def _png_bits(path: Path) -> int:
    with path.open("rb") as file:
        return file.read(25)[24]


def _tiff_layout(image: Any) -> tuple[int, bool, bool]:
    """(bits a channel, whether signed, whether zero is white) of a TIFF; (8, False, False) of anything else."""
    if image.format != "TIFF":
        return 8, False, False
    tags = image.tag_v2
    bits, kinds = tags.get(258, (1,)), tags.get(339, (1,))
    first = [v[0] if isinstance(v, tuple) else v for v in (bits, kinds)]
    return int(first[0]), first[1] == 2, tags.get(262) == 0


def _read_nifti(nibabel: ModuleType, source: Source) -> tuple[NDArray[Any], tuple[float, ...], tuple[float, float]]:
    """A volume as `(1, z, y, x)` towards superior, anterior, right; spacing in mm; (slope, intercept)."""
    image: Any = nibabel.load(source.path)
    require(isinstance(image, nibabel.Nifti1Image), f"it is no NIfTI volume but {type(image).__name__}")
    shape = tuple(int(s) for s in image.shape)
    require(len(shape) >= 3 and math.prod(shape[3:]) == 1, f"it must be one volume (x, y, z), got shape {shape}")
    dtype = image.get_data_dtype()
    require(dtype.kind in "iuf", f"it must hold real numbers, got {dtype}")
    require(math.prod(shape) > 0, f"it has no pixels, shape {shape}")

    require(bool(np.isfinite(image.affine).all()), "its affine must be finite")
    turn = nibabel.io_orientation(image.affine)
    sizes = nibabel.affines.voxel_sizes(image.affine)
    require(bool(np.isfinite(turn).all() and (sizes > 0).all()), "its affine must have three independent axes")
    unit = _MILLIMETRES[image.header.get_xyzt_units()[0]]
    spacing = [0.0] * 3
    for size, (axis, _) in zip(sizes, turn, strict=True):
        spacing[2 - int(axis)] = float(size) * unit

    stored = np.asarray(image.dataobj.get_unscaled()).reshape(shape[:3])
    scaling = (float(image.dataobj.slope), float(image.dataobj.inter))
    if stored.dtype.kind == "f":
        stored = stored if scaling == (1.0, 0.0) else stored.astype(np.float64) * scaling[0] + scaling[1]
        stored, scaling = _float32(stored), (1.0, 0.0)
    oriented = nibabel.apply_orientation(stored, turn).transpose(2, 1, 0)
    return oriented.astype(oriented.dtype.newbyteorder("="))[None], tuple(spacing), scaling


def _read_npy(source: Source) -> tuple[NDArray[Any], tuple[float, float] | None]:
    """An array as `(1, H, W)`, `(1, D, H, W)` or `(C, D, H, W)`, and lo, hi if its type says them."""
    # Mapped, so that a header that claims more than the file holds is found out before memory is taken.
    array = np.load(source.path, mmap_mode="r", allow_pickle=False)
    require(isinstance(array, np.ndarray), "it is no npy array")
    require(array.dtype.kind in "biuf", f"it must hold real numbers, got {array.dtype}")
    require(array.ndim in (2, 3, 4), f"it must be (H, W), (D, H, W) or (C, D, H, W), got shape {array.shape}")
    require(
        array.ndim != 3 or array.dtype != np.uint8 or array.shape[2] not in (3, 4) or min(array.shape[:2]) <= 4,
        f"a 3D array is a volume (D, H, W), and shape {array.shape} of uint8 looks like colour; save it as PNG",
    )
    pixels = array if array.ndim == 4 else array[None]
    if pixels.dtype.kind == "b":
        return pixels.astype(np.uint8), (0.0, 1.0)
    if pixels.dtype.kind == "f":
        return _float32(pixels), None
    return pixels.astype(pixels.dtype.newbyteorder("=")), None


def _float32(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32)


def _fit(pixels: NDArray[Any], size: int) -> NDArray[Any]:
    """The centre square of `(C, H, W)`, scaled to `size` x `size`, in the same dtype."""
    from PIL import Image

    height, width = pixels.shape[1:]
    side = min(height, width)
    if side == size:  # nothing to scale: float32 would cost large integers their last digits
        left, top = (width - side) // 2, (height - side) // 2
        return pixels[:, top : top + side, left : left + side]
    left, top = (width - side) / 2, (height - side) / 2
    planes = []
    for plane in pixels:
        # The triangle filter grows with the reduction (no aliasing) and cannot ring outside the value range.
        square = Image.fromarray(plane.astype(np.float32)).resize(
            (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
        )
        planes.append(np.asarray(square))
    result = np.stack(planes)
    if pixels.dtype.kind == "f":
        return result
    info = np.iinfo(pixels.dtype)
    return np.clip(np.rint(result.astype(np.float64)), info.min, info.max).astype(pixels.dtype)
