"""NIfTI, one file or a pair, by nibabel."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from coverfast.checks import require
from coverfast.ingest.readers.decoded import Decoded, float32, one_of, to_ras

_MILLIMETRES = {"meter": 1e3, "mm": 1.0, "micron": 1e-3, "unknown": 1.0}


def read_nifti(path: Path, volume: int | None) -> Decoded:
    """`(1, z, y, x)`, see `to_ras`; stored integers keep their slope and intercept, floats are scaled."""
    import nibabel

    image: Any = nibabel.load(path)
    require(isinstance(image, nibabel.Nifti1Pair), f"it is no NIfTI volume but {type(image).__name__}")
    shape = tuple(int(s) for s in image.shape)
    require(len(shape) >= 3 and math.prod(shape[4:]) == 1, f"it must be a volume (x, y, z), got shape {shape}")
    dtype = image.get_data_dtype()
    require(dtype.kind in "iuf", f"it must hold real numbers, got {dtype}")
    require(math.prod(shape) > 0, f"it has no pixels, shape {shape}")
    index = one_of(math.prod(shape[3:]), volume, f"shape {shape}")

    # A proxy without scaling: of many volumes it reads the one, and integers as they are stored.
    data: Any = image.dataobj
    layout = ((*shape[:3], math.prod(shape[3:])), data.dtype, data.offset)
    stored = np.asarray(nibabel.arrayproxy.ArrayProxy(data.file_like, layout)[..., index])
    slope, intercept = float(data.slope), float(data.inter)
    if stored.dtype.kind == "f":
        unscaled = (slope, intercept) == (1.0, 0.0)
        stored = float32(stored if unscaled else stored.astype(np.float64) * slope + intercept)
        slope, intercept = 1.0, 0.0
    unit = _MILLIMETRES[image.header.get_xyzt_units()[0]]
    affine = np.diag([unit, unit, unit, 1.0]) @ image.affine
    return to_ras(stored, affine)._replace(slope=slope, intercept=intercept)
