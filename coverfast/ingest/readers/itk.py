"""NRRD and MetaImage, by SimpleITK."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from coverfast.checks import require
from coverfast.ingest.readers.decoded import Decoded, as_stored, float32, luma, one_of, to_ras

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_itk(path: Path, kind: str, volume: int | None, labels: bool = False) -> Decoded:
    """`(1, H, W)` as stored or `(1, z, y, x)`, see `to_ras`; RGB in uint8 as luma, refused as labels.

    A file that states no space counts as LPS, as ITK takes it.
    """
    import SimpleITK as sitk

    sitk.ProcessObject.GlobalWarningDisplayOff()
    reader = sitk.ImageFileReader()
    reader.SetImageIO({"NRRD": "NrrdImageIO", "MetaImage": "MetaImageIO"}[kind])
    reader.SetFileName(str(path))
    try:
        image: Any = reader.Execute()
    except RuntimeError as error:  # what went wrong comes last, after places in the sources and addresses
        said = str(error).strip().splitlines()[-1]
        raise ValueError(re.sub(r".*ERROR: |\w+\(0x\w+\): |\[nrrd\] ", "", said)) from error
    ndim, components = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    array = sitk.GetArrayFromImage(image)  # (..., y, x[, components])
    require(ndim in (2, 3, 4), f"it must be 2D, 3D or a row of volumes, got {ndim} axes")
    require(array.dtype.kind in "iuf", f"it must hold real numbers, got {array.dtype}")
    if components > 1:
        require(not labels, f"a label map has one number a pixel, and this has {components}; save the classes as one")
        colour = components in (3, 4) and array.dtype == np.uint8
        require(colour, f"it must have one value a pixel or RGB of uint8, got {components} of {array.dtype}")
        array = luma(array[..., :3])
    if array.dtype.kind == "f":
        array = float32(array)
    if ndim == 2:
        return as_stored(array[None], tuple(float(s) for s in image.GetSpacing()[::-1]))
    if ndim == 4:
        array = array[one_of(len(array), volume, f"size {image.GetSize()}")]
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (ndim, ndim))[:3, :3] * image.GetSpacing()[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    return to_ras(array.transpose(2, 1, 0), LPS_TO_RAS @ affine)
