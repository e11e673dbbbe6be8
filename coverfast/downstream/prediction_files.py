"""Label maps and probabilities to files: in the format of the image they belong to, with its geometry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, require
from coverfast.disk import atomic_path
from coverfast.downstream.prediction import in_file_order
from coverfast.samples import Sample

if TYPE_CHECKING:
    from coverfast.ingest import Source

# What the label map of a file of this suffix is; others keep theirs. Lossy files would spoil it, and a header with its
# data elsewhere becomes one file.
_LABELS = {".jpg": ".png", ".jpeg": ".png", ".hdr": ".nii.gz", ".nhdr": ".nrrd", ".mhd": ".mha"}
# Of probabilities: what a picture cannot hold is an array.
_PROBABILITIES = {".png": ".npy", ".tif": ".npy", ".tiff": ".npy"}
# Pillow writes no integers above.
_LARGEST = {".png": 65535, ".tif": 65535, ".tiff": 65535}


def suffixes(source: Source) -> tuple[str, str]:
    """The suffixes of a source's label map and of its probabilities."""
    if source.kind == "DICOM":
        labels = ".nii.gz" if len(source.parts) > 1 else ".png"
    else:
        name = source.path.name.lower()
        own = ".nii.gz" if name.endswith(".nii.gz") else source.path.suffix.lower()
        labels = _LABELS.get(own, own)
    return labels, _PROBABILITIES.get(labels, labels)


def write_labels(path: Path, labels: NDArray[np.uint8], values: Sequence[int], source: Source, sample: Sample) -> None:
    """Write class indices `(*S)`, on the grid of the sample as read from `source`, with the geometry of that file.

    values: what stands in the file for each class, in the smallest unsigned type that holds them all. path: with the
    suffix that `suffixes` says. The file is written whole or not at all. `InputError`: values that the format cannot
    hold, a disk that is full.
    """
    suffix, _ = suffixes(source)
    largest = _LARGEST.get(suffix)
    require(
        largest is None or max(values) <= largest,
        f"{path} must have label values up to {largest}, all that {suffix} holds, got {max(values)}",
    )
    table = np.asarray(values, np.min_scalar_type(max(values)))
    with _whole(path, suffix) as temporary:
        _writer(suffix)(temporary, table[in_file_order(labels, sample)], source, sample)


def write_probabilities(path: Path, probabilities: NDArray[np.float32], source: Source, sample: Sample) -> None:
    """Write class probabilities `(K, *S)` as float32 with the classes as last axis; see `write_labels`."""
    _, suffix = suffixes(source)
    last = np.moveaxis(probabilities, 0, -1)
    with _whole(path, suffix) as temporary:
        _writer(suffix)(temporary, in_file_order(last, sample), source, sample)


_Write = Callable[[Path, NDArray[Any], "Source", Sample], None]


def _writer(suffix: str) -> _Write:
    return {
        ".nii": _write_nifti,
        ".nii.gz": _write_nifti,
        ".nrrd": _write_itk,
        ".mha": _write_itk,
        ".npy": _write_npy,
        ".npz": _write_npz,
    }.get(suffix, _write_image)


@contextmanager
def _whole(path: Path, suffix: str) -> Iterator[Path]:
    """See `atomic_path`; the temporary has the suffix by which writers choose the format."""
    with atomic_path(path) as temporary:
        named = temporary.with_name(temporary.name + suffix)
        try:
            yield named
            named.replace(temporary)
        finally:
            named.unlink(missing_ok=True)


def _write_nifti(path: Path, array: NDArray[Any], source: Source, sample: Sample) -> None:
    import nibabel

    array = np.asarray(array)
    if source.kind != "NIfTI":
        assert sample.original is not None
        assert sample.original.affine is not None
        image: Any = nibabel.Nifti1Image(array, sample.original.affine, dtype=array.dtype)
        image.header.set_xyzt_units("mm")
        image.to_filename(path)
        return
    read: Any = nibabel.load(source.path)
    kind = nibabel.Nifti2Image if isinstance(read.header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    # The affine with its codes, units and the rest as they were; values, their scaling and extensions are new.
    header = kind.header_class.from_header(read.header, check=False)
    header.extensions.clear()
    header.set_data_shape(array.shape)
    header.set_data_dtype(array.dtype)
    header["cal_min"], header["cal_max"] = 0, 0
    kind(array, None, header).to_filename(path)


def _write_itk(path: Path, array: NDArray[Any], source: Source, sample: Sample) -> None:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetImageIO({"NRRD": "NrrdImageIO", "MetaImage": "MetaImageIO"}[source.kind])
    reader.SetFileName(str(source.path))
    reader.ReadImageInformation()
    n, axes = sample.pixels.ndim - 1, reader.GetDimension()
    if n == 3:  # the file's (x, y, z) as ITK's arrays have it
        array = array.transpose(2, 1, 0, *range(3, array.ndim))
    image = sitk.GetImageFromArray(np.ascontiguousarray(array), isVector=array.ndim > n)
    image.SetSpacing(reader.GetSpacing()[:n])
    image.SetOrigin(reader.GetOrigin()[:n])
    image.SetDirection(np.reshape(reader.GetDirection(), (axes, axes))[:n, :n].ravel().tolist())
    try:
        sitk.WriteImage(image, str(path), useCompression=True)
    except RuntimeError as error:
        said = str(error).strip().splitlines()[-1]
        raise InputError(f"{path.name} cannot be written: {said}") from error


def _write_npy(path: Path, array: NDArray[Any], source: Source, sample: Sample) -> None:
    np.save(path, array)


def _write_npz(path: Path, array: NDArray[Any], source: Source, sample: Sample) -> None:
    np.savez_compressed(path, array)


def _write_image(path: Path, array: NDArray[Any], source: Source, sample: Sample) -> None:
    from PIL import Image

    Image.fromarray(np.ascontiguousarray(array)).save(path)
