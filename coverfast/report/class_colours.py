"""Colours of classes, and label maps as pictures to lay over an image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from coverfast.report.colours import CONE_TO_RGB, LAB_TO_CONE

# A turn of hue that comes near none of the earlier ones for long.
_TURN = np.pi * (3 - np.sqrt(5))


def class_colours(count: int) -> NDArray[np.float64]:
    """Colours of class indices, `(count, 3)` sRGB in [0, 1]: index 0, the background, black, the others strong.

    The colour of an index does not depend on the count; neighbours differ in hue, and every third in lightness too.
    """
    k = np.arange(count)
    hue, light = 0.5 + k * _TURN, np.array([0.80, 0.62, 0.72])[k % 3]
    lab = np.stack([light, 0.17 * np.cos(hue), 0.17 * np.sin(hue)], axis=-1)
    linear = np.clip((lab @ LAB_TO_CONE.T) ** 3 @ CONE_TO_RGB.T, 0.0, 1.0)
    rgb = np.clip(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055), 0.0, 1.0)
    rgb[:1] = 0.0
    return np.asarray(rgb)


def label_overlay(labels: NDArray[Any], colours: NDArray[np.float64], opacity: float = 0.3) -> NDArray[np.float64]:
    """Class indices `(H, W)` as RGBA `(H, W, 4)` in [0, 1]: outlines opaque, insides thin, background not at all.

    An outline is where a lower index lies beside, along rows or columns: of the class that the higher index is, one
    pixel wide, or a 400th of the longer side if that is more.
    """
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        for far in range(1, max(1, max(labels.shape) // 400) + 1):
            first, last = [slice(None)] * 2, [slice(None)] * 2
            first[axis], last[axis] = slice(None, -far), slice(far, None)
            one, other = labels[tuple(first)], labels[tuple(last)]
            edge[tuple(first)] |= one > other
            edge[tuple(last)] |= other > one
    alpha = np.where(labels > 0, np.where(edge, 1.0, opacity), 0.0)
    return np.concatenate([colours[labels], alpha[..., None]], axis=-1)
