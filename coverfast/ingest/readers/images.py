"""PNG, JPEG and TIFF, by Pillow."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import require
from coverfast.ingest.readers.decoded import Decoded, as_stored


def read_image(path: Path, labels: bool = False) -> Decoded:
    """`(1, H, W)`: colour as luma (ITU-R 601), alpha dropped, turned as the orientation tag says.

    labels: the numbers that the file holds, an index into a palette included; colour and JPEG are refused.
    """
    return as_stored(_pixels(path, labels))


def _pixels(path: Path, labels: bool) -> NDArray[Any]:
    from PIL import Image, ImageOps

    with contextlib.ExitStack() as stack:
        # An open file, not a path: of a path, Pillow maps uncompressed TIFF and mixes up the axes of turned ones.
        file = stack.enter_context(path.open("rb"))
        # Pillow warns from 89 million pixels on and refuses from twice that; only the refusal counts here.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = stack.enter_context(Image.open(file, formats=("PNG", "JPEG", "TIFF")))
        pages = getattr(image, "n_frames", 1)
        require(pages == 1 or image.format == "MPO", f"it has {pages} pages or frames, expected 1")
        bits, signed, white = _tiff_layout(image)
        if image.format == "PNG":
            bits = _png_bits(path)
        mode, channels = image.mode, len(image.getbands())
        require(
            bits <= 8 or channels == 1,
            f"it has {channels} channels of {bits} bits, which Pillow would cut to 8; save it as 16-bit grey",
        )
        require(not white or bits <= 8 or mode == "F", f"it is {bits}-bit with white as 0; save it with black as 0")
        upright = ImageOps.exif_transpose(image)
        if labels:
            require(image.format in ("PNG", "TIFF"), "JPEG changes values, and label values with them; save it as PNG")
            require(
                channels == 1,
                f"a label map has one number a pixel, and this is colour ({mode}); save it as grey or with a palette",
            )
        if labels and mode in ("1", "L", "P"):
            # Pillow spreads grey of 2 and 4 bits over 0 to 255.
            spread = 255 // (2**bits - 1) if mode == "L" and bits < 8 else 1
            array = np.asarray(upright).astype(np.uint8) // spread
        elif mode == "F" or mode.startswith("I"):
            array = np.asarray(upright)
            if mode == "I" and bits <= 16:
                array = array.astype(np.int16 if signed else np.uint16)
            elif mode == "I" and not signed:
                array = array.view(np.uint32)
        else:
            through = {"P": "RGBA", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB"}.get(mode, mode)
            require(through in ("1", "L", "LA", "RGB", "RGBA", "RGBX"), f"its colour mode {mode} is not supported")
            array = np.asarray(upright.convert(through).convert("L"))
    return array[None]


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
