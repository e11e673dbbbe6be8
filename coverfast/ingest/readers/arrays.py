"""Numpy's npy and npz."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import require
from coverfast.ingest.readers.decoded import Decoded, as_stored, float32


def read_array(path: Path) -> Decoded:
    """`(H, W)`, `(D, H, W)` or `(C, D, H, W)` as it is; of an npz, the only array that it holds."""
    # Mapped, so that a header that claims more than the file holds is found out before memory is taken.
    loaded: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        return _decoded(loaded)
    with loaded:
        names = ", ".join(loaded.files)
        require(
            len(loaded.files) == 1, f"it must hold 1 array, got {len(loaded.files)} ({names}); save the image alone"
        )
        return _decoded(loaded[loaded.files[0]])


def _decoded(array: NDArray[Any]) -> Decoded:
    require(isinstance(array, np.ndarray), "it holds no array")
    require(array.dtype.kind in "biuf", f"it must hold real numbers, got {array.dtype}")
    require(array.ndim in (2, 3, 4), f"it must be (H, W), (D, H, W) or (C, D, H, W), got shape {array.shape}")
    require(
        array.ndim != 3 or array.dtype != np.uint8 or array.shape[2] not in (3, 4) or min(array.shape[:2]) <= 4,
        f"a 3D array is a volume (D, H, W), and shape {array.shape} of uint8 looks like colour; save it as PNG",
    )
    pixels = array if array.ndim == 4 else array[None]
    if pixels.dtype.kind == "b":
        return as_stored(pixels.astype(np.uint8))._replace(span=(0.0, 1.0))
    return as_stored(float32(pixels) if pixels.dtype.kind == "f" else pixels)
