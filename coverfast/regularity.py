"""How regular a displacement field is: smooth, and without folds."""

from __future__ import annotations

import torch
from torch import Tensor

from coverfast.checks import check_dvf


def smoothness(dvf: Tensor, *, denominator: Tensor | float | None = None) -> Tensor:
    """Squared forward differences, summed over axes and components, as a mean over pixels (GVSL Eq. 2).

    Beyond the last pixel along an axis there is no difference: it counts as 0.

    Args:
        dvf: `(B, n, *S)` in pixels, float32 or float64.
        denominator: what to divide the sum by instead of the pixels of this batch: those of the whole global batch.

    Returns:
        Scalar, squared pixels a pixel; 0 for a translation.
    """
    check_dvf("dvf", dvf)
    total = torch.stack([(d * d).sum() for d in _differences(dvf)]).sum()
    over = max(1, dvf[:, 0].numel()) if denominator is None else denominator
    return (total / over).to(dvf.dtype)


def jacobian_determinant(dvf: Tensor) -> Tensor:
    """Determinant of the Jacobian of `p + dvf(p)` by forward differences: local change of volume, folded where <= 0.

    Args:
        dvf: `(B, n, *S)` in pixels, float32 or float64, at least 2 pixels along each axis.

    Returns:
        `(B, *(S - 1))`, 1 for no displacement.
    """
    n = check_dvf("dvf", dvf)
    size = [s - 1 for s in dvf.shape[2:]]
    columns = []
    for axis, difference in enumerate(_differences(dvf)):
        for other, s in enumerate(size):
            difference = difference.narrow(2 + other, 0, s)
        column = list(difference.unbind(1))
        column[axis] = column[axis] + 1
        columns.append(column)
    if n == 2:
        (a, c), (b, d) = columns
        return a * d - b * c
    (a, d, g), (b, e, h), (c, f, i) = columns
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def _differences(dvf: Tensor) -> list[Tensor]:
    """Forward differences along each axis, one pixel shorter there."""
    lengths = dvf.shape[2:]
    return [dvf.narrow(2 + i, 1, s - 1) - dvf.narrow(2 + i, 0, s - 1) for i, s in enumerate(lengths)]
