"""How sure a mean over cases is: percentile bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import require

#: Times that the cases are drawn anew, and the share of these means that an interval holds.
RESAMPLES, LEVEL = 2000, 0.95


class Interval(NamedTuple):
    """A figure over cases and its 95 % interval; NaN where there is none. cases: how many it is of."""

    value: float
    low: float
    high: float
    cases: int

    def plain(self) -> dict[str, float | int | None]:
        """For JSON: what is not finite becomes None."""
        return {name: v if np.isfinite(v) else None for name, v in self._asdict().items()}


def bootstrap_mean(values: NDArray[Any], *, groups: Sequence[str] | None = None, seed: int = 0) -> Interval:
    """Mean of `(N,)` values, one a case, with the percentile interval of its bootstrap.

    Cases are drawn with replacement as often as there are cases, `RESAMPLES` times. Values that are not finite are no
    cases. groups: the patient of each case: cases of one patient are drawn together, since they tell less than as many
    of others; "" is a patient of its own. One patient has no interval. The same seed gives the same interval.
    """
    values = np.asarray(values, np.float64)
    require(values.ndim == 1, f"values must be (N,), got shape {values.shape}")
    kept = np.isfinite(values)
    values, member = values[kept], _members(groups, kept)
    if not len(values):
        return Interval(*(float("nan"),) * 3, 0)
    mean, patients = float(values.mean()), int(member.max()) + 1
    if patients < 2:
        return Interval(mean, float("nan"), float("nan"), len(values))
    sums, counts = np.bincount(member, values), np.bincount(member)
    means = np.concatenate([sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1) for drawn in _draws(patients, seed)])
    return Interval(mean, *_ends(means), len(values))


def bootstrap_difference(
    values: NDArray[Any], others: NDArray[Any], *, groups: Sequence[str] | None = None, seed: int = 0
) -> Interval:
    """Mean of `values - others`, `(N,)` each of the same N cases, with its interval; see `bootstrap_mean`.

    A case counts where both values are finite.
    """
    values, others = np.asarray(values, np.float64), np.asarray(others, np.float64)
    require(
        values.shape == others.shape, f"values must be of the same cases, got shapes {values.shape} and {others.shape}"
    )
    known = np.isfinite(values) & np.isfinite(others)
    difference = np.full(values.shape, np.nan)
    difference[known] = values[known] - others[known]
    return bootstrap_mean(difference, groups=groups, seed=seed)


def bootstrap_statistic(
    statistic: Callable[..., float], *arrays: NDArray[Any], groups: Sequence[str] | None = None, seed: int = 0
) -> Interval:
    """A statistic of all cases, such as an AUC, with the percentile interval of its bootstrap over them.

    arrays: `(N, ...)` each, drawn alike and handed to `statistic`. Draws that it gives no finite value for (an AUC
    without positives) are left out; there is no interval where that leaves less than half of them.
    """
    count = len(arrays[0])
    value = float(statistic(*arrays)) if count else float("nan")
    member = _members(groups, np.ones(count, bool))
    patients = int(member.max(initial=-1)) + 1
    if patients < 2 or not np.isfinite(value):
        return Interval(value, float("nan"), float("nan"), count)
    cases = np.split(np.argsort(member, kind="stable"), np.cumsum(np.bincount(member))[:-1])
    found = []
    for drawn in _draws(patients, seed):
        for patient_numbers in drawn:
            picked = np.concatenate([cases[p] for p in patient_numbers])
            found.append(float(statistic(*(array[picked] for array in arrays))))
    known = np.asarray(found)[np.isfinite(found)]
    ends = _ends(known) if 2 * len(known) >= RESAMPLES else (float("nan"), float("nan"))
    return Interval(value, *ends, count)


def _members(groups: Sequence[str] | None, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The number of each kept case's patient, from 0."""
    if groups is None:
        return np.arange(int(kept.sum()))
    require(len(groups) == len(kept), f"groups must have one entry a case, {len(kept)}, got {len(groups)}")
    names = [(group, -1 if group else place) for place, group in enumerate(groups) if kept[place]]
    numbers: dict[tuple[str, int], int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def _draws(count: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """`RESAMPLES` rows of `count` numbers below `count`, in blocks of moderate memory."""
    rng = np.random.default_rng(seed)
    rows = max(1, 2_000_000 // count)
    for start in range(0, RESAMPLES, rows):
        yield rng.integers(count, size=(min(rows, RESAMPLES - start), count))


def _ends(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
