"""One file to the label map of an image: what it must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, require
from coverfast.class_tables import values_of
from coverfast.ingest.files import Source
from coverfast.ingest.readers import Unreadable, read_source
from coverfast.samples import LabelClass, Sample

# Of its smallest voxel side, how far the corners of a map may lie from the image's: headers keep turns in float32,
# which moves them by up to 0.02 mm.
_ASTRAY = 0.05
# How far a whole number may be off in a file that keeps it scaled, and from where on float32 has no odd ones.
_WHOLE, _EXACT = 1e-3, 2.0**24


def read_map(
    source: Source,
    image: Sample,
    image_source: Source,
    *,
    volume: int | None = None,
    classes: Sequence[LabelClass] | None = None,
) -> NDArray[Any]:
    """The label map of an image as read, `(*S)` on the image's grid, the smallest of uint8, uint16 and uint32.

    image_source: what the image was read from. volume: see `read_source`. classes: those that there are, if a table
    names them. `Unreadable`: several channels, values that are no whole numbers from 0 on, more than a shard holds,
    another grid. `InputError`: values that are not in `classes`.
    """
    read = read_source(source, volume=volume, labels=True)
    _check_grid(source, read, image, image_source)
    values = read.pixels[0]
    if values.dtype.kind == "f" or (read.slope, read.intercept) != (1.0, 0.0):
        scaled = values.astype(np.float64) * read.slope + read.intercept
        values = np.rint(scaled)
        wrong = np.abs(scaled - values) > _WHOLE
        if wrong.any():
            raise Unreadable(
                f"{source.path} must be a label map of whole numbers, got {scaled[wrong].flat[0]:g} and others, "
                f"{int(wrong.sum())} in all"
            )
        if float(np.abs(values).max()) > _EXACT:
            raise Unreadable(f"{source.path} must hold label values above {_EXACT:.0f} as integers, not as fractions")
    low, high = values.min(), values.max()
    if low < 0 or high >= 2**32:
        raise Unreadable(f"{source.path} must have label values from 0 to {2**32 - 1}, got {low:.0f} to {high:.0f}")
    labels = values.astype(np.min_scalar_type(int(high)))
    try:
        found = values_of(labels, str(source.path))
    except InputError as error:
        raise Unreadable(str(error)) from error
    if classes is not None:
        strange = sorted(set(found) - {c.value for c in classes})
        known = ", ".join(str(c.value) for c in classes[:20]) + ", ..." * (len(classes) > 20)
        require(
            not strange,
            f"{source.path} must have label values of the table, {known}, got {', '.join(map(str, strange))}",
        )
    return labels


def _check_grid(source: Source, read: Sample, image: Sample, image_source: Source) -> None:
    shape, expected = read.pixels.shape, (1, *image.pixels.shape[1:])
    if len(shape) == len(expected) and shape[0] != 1:
        raise Unreadable(f"{source.path} must be a label map of 1 channel, got {shape[0]}")
    another = f"{source.path} must have labels on the grid of {image.source}, got labels on another grid"
    if shape != expected:
        raise Unreadable(f"{another}: size {_size(shape)}, the image's is {_size(expected)}")
    ndim = len(shape) - 1
    places = [_to_mm(sample, file) for sample, file in ((read, source), (image, image_source))]
    if ndim == 3 and (places[0] is None) != (places[1] is None):  # a picture of a 2D image has nowhere to say it
        has, lacks = (source.path, image.source) if places[1] is None else (image.source, source.path)
        raise Unreadable(f"{another}: {has} says where it lies in mm and {lacks} does not")
    if places[0] is not None and places[1] is not None:
        corners = np.array(np.meshgrid(*((0, count - 1) for count in shape[1:]), [1])).reshape(ndim + 1, -1)
        astray = float(np.linalg.norm(((places[0] - places[1]) @ corners)[:ndim], axis=0).max())
        if astray > _ASTRAY * min(image.spacing):
            raise Unreadable(f"{another}: the corners are up to {astray:.3g} mm from the image's")


def _to_mm(sample: Sample, source: Source) -> NDArray[np.float64] | None:
    """From an index of S to mm, homogeneous; None where the file does not say it."""
    if sample.pixels.ndim == 3:
        return _flat_to_mm(source)
    original = sample.original
    if original is None or original.affine is None or original.to_original.shape != (4, 4):
        return None
    return np.asarray(original.affine @ original.to_original)


def _flat_to_mm(source: Source) -> NDArray[np.float64] | None:
    """The same of a 2D file: what NRRD and MetaImage say of spacing, origin and direction; a sample keeps less."""
    if source.kind not in ("NRRD", "MetaImage"):
        return None
    import SimpleITK as sitk

    reader: Any = sitk.ImageFileReader()
    reader.SetImageIO({"NRRD": "NrrdImageIO", "MetaImage": "MetaImageIO"}[source.kind])
    reader.SetFileName(str(source.path))
    reader.ReadImageInformation()
    to_mm = np.eye(3)
    to_mm[:2, :2] = np.reshape(reader.GetDirection(), (2, 2)) * reader.GetSpacing()
    to_mm[:2, 2] = reader.GetOrigin()
    return to_mm[:, [1, 0, 2]]  # ITK says (x, y), S is (rows, columns)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[1:]))
