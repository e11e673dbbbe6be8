"""How far the features of pixels are spread: cosines between pixels, and the number of directions in use.

Collapse and over-dispersion, the two ways in which contrastive learning of pixels fails, both show in these numbers
(docs/monitoring.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: A spread below a thousandth of the features' length, in which bfloat16 keeps no more than its own rounding, is none.
NO_SPREAD = 1e-3


def dispersion(samples: NDArray[Any], neighbours: NDArray[Any]) -> dict[str, float]:
    """Cosines between random and between neighbouring pixels, and the effective rank.

    Args:
        samples: `(K, C)`, features of K pixels drawn at random.
        neighbours: `(K, C)`, those of a pixel next to each.

    Returns:
        `cos_random`, `cos_random_std`: mean and standard deviation of the cosine over all pairs of `samples`.
        `cos_near`, `cos_near_std`: over the pairs of a sample and its neighbour. `rank`: see `effective_rank`.
        A pair with a vector of length 0 does not count; NaN where no pair is left, where there are fewer than two
        samples, or where a value is not finite.
    """
    names = ("cos_random", "cos_random_std", "cos_near", "cos_near_std", "rank")
    both = np.stack([samples, neighbours]).astype(np.float64)
    if both.shape[1] < 2 or not np.isfinite(both).all():
        return dict.fromkeys(names, float("nan"))
    a, b = _scaled(both)
    lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    there = lengths[0] > 0, lengths[1] > 0
    kept = there[0] & there[1]
    near = (a * b).sum(1)[kept] / (lengths[0] * lengths[1])[kept]
    beside = (float(near.mean()), float(near.std())) if near.size else (float("nan"),) * 2
    random = _over_pairs(a[there[0]] / lengths[0][there[0], None])
    return dict(zip(names, (*random, *beside, effective_rank(samples)), strict=True))


def effective_rank(samples: NDArray[Any]) -> float:
    """Exponential of the entropy of the normalised eigenvalues of the centred covariance (Roy & Vetterli, 2007).

    Args:
        samples: `(K, C)` features.

    Returns:
        From 1 to `min(C, K - 1)`: how many directions the features use, were each used equally. 1 for features that
        are equal but for `NO_SPREAD`; NaN for fewer than two samples, for zeros and for values that are not finite.
        Few samples understate it: K = C independent normal directions give about 0.6 C.
    """
    samples = np.asarray(samples, np.float64)
    if len(samples) < 2 or not np.isfinite(samples).all() or not samples.any():
        return float("nan")
    samples = _scaled(samples)
    away = samples - samples.mean(0)
    if (away**2).sum() <= NO_SPREAD**2 * (samples**2).sum():
        return 1.0
    # The smaller of the two products has all the eigenvalues that are not 0.
    small = away.T @ away if away.shape[0] > away.shape[1] else away @ away.T
    values = np.linalg.eigvalsh(small).clip(min=0)
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def _scaled(x: Array) -> Array:
    """The values over the largest one, which changes no figure here, and no square leaves the range of float64."""
    largest = np.abs(x).max(initial=0)
    return x / largest if largest else x


def _over_pairs(units: Array) -> tuple[float, float]:
    """Mean and standard deviation of the cosine over all pairs of unit vectors `(K, C)`, without the K^2 of them."""
    count = len(units)
    if count < 2:
        return float("nan"), float("nan")
    pairs, total, moment = count * (count - 1), units.sum(0), units.T @ units
    mean = (total @ total - count) / pairs
    square = ((moment**2).sum() - count) / pairs
    return float(mean), float(np.sqrt(max(0.0, square - mean**2)))
