"""Affine maps from the numbers that a network predicts: rotations, scalings, shears, translations."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

#: Largest rotation about an axis, radians.
ROTATION = pi / 9
#: Largest deviation of a scaling from 1.
SCALING = 0.25
#: Largest shear: an entry of the matrix.
SHEAR = pi / 18
#: Largest translation along an axis, as a fraction of the size.
TRANSLATION = 0.25


def rotations(ndim: int) -> int:
    """How many angles a rotation has: one about each axis of a volume, one in an image."""
    return 1 if ndim == 2 else 3


def compose_affine(rotation: Tensor, scaling: Tensor, shear: Tensor, translation: Tensor) -> Tensor:
    """The map `R Sc Sh T` about the centre: rotation, scaling, shearing, translation (GVSL Eq. 11).

    The product as Eq. 11 writes it, so a point is translated first; the paper's axes (x, y, z) are those of the library
    from the last to the first. With shears of at most pi / 18 it is invertible.

    Args:
        rotation: `(B, 3)` angles about axes z, y, x, or `(B, 1)` in the image plane, radians, of any floating dtype.
        scaling: `(B, n)` factors along each axis.
        shear: `(B, n (n - 1))`, entries (i, j) of the matrix, i != j, row by row.
        translation: `(B, n)` along each axis, pixels.

    Returns:
        `theta = [A | t]`, `(B, n, n + 1)`, `t` in pixels, see `coverfast.affine_dvf`.
    """
    n = scaling.shape[1]
    matrix = _rotation(rotation) * scaling.unsqueeze(1) @ _shear(shear, n)
    return torch.cat([matrix, matrix @ translation.unsqueeze(2)], 2)


def bounded(raw: Tensor, most: float) -> Tensor:
    """Any number brought smoothly into (-most, most), 0 to 0."""
    return most * torch.tanh(raw)


def _rotation(angles: Tensor) -> Tensor:
    """`R = Rz Ry Rx`, `(B, n, n)`."""
    sines, cosines = angles.sin().unbind(1), angles.cos().unbind(1)
    if len(sines) == 1:
        (s,), (c,) = sines, cosines
        return torch.stack([c, s, -s, c], 1).unflatten(1, (2, 2))
    (s_z, s_y, s_x), (c_z, c_y, c_x) = sines, cosines
    rows = (
        *(c_x * c_y, s_x * c_y, -s_y),
        *(-s_x * c_z + s_z * s_y * c_x, c_x * c_z + s_x * s_y * s_z, c_y * s_z),
        *(s_y * c_x * c_z + s_x * s_z, s_x * s_y * c_z - s_z * c_x, c_y * c_z),
    )
    return torch.stack(rows, 1).unflatten(1, (3, 3))


def _shear(entries: Tensor, n: int) -> Tensor:
    """Ones on the diagonal, `(B, n, n)`."""
    found, one = iter(entries.unbind(1)), torch.ones_like(entries[:, 0])
    rows = [one if i == j else next(found) for i in range(n) for j in range(n)]
    return torch.stack(rows, 1).unflatten(1, (n, n))
