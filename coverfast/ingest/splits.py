"""Train, val and test, drawn by group."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import require
from coverfast.samples import SPLITS, encoded

_TRAIN, _VAL, _TEST = range(len(SPLITS))


def check_fractions(val_fraction: float, test_fraction: float, seed: int) -> None:
    """Raise `InputError` unless the fractions and the seed can draw splits."""
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        require(ok and 0 <= value <= 1, f"{name} must be a number from 0 to 1, got {value!r}")
    total = val_fraction + test_fraction
    require(total <= 1 + 1e-9, f"val_fraction and test_fraction must be at most 1 together, got {total:g}")
    ok = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63
    require(ok, f"split_seed must be an int from 0 to 2**63 - 1, got {seed!r}")


def join_groups(groups: Sequence[str], hashes: Sequence[bytes]) -> tuple[NDArray[np.int64], list[bytes]]:
    """Sets of samples that share a group or the very pixels, directly or through others.

    groups: patient of every sample, "" for one of its own. hashes: of the pixels. Returns the number of the set of
    every sample, `(N,)` int64 in order of appearance, and a label of every set that depends on its members only, not
    on their order.
    """
    parent: dict[bytes, bytes] = {}

    def root(label: bytes) -> bytes:
        top = label
        while (above := parent.setdefault(top, top)) != top:
            top = above
        while label != top:
            parent[label], label = top, parent[label]
        return top

    own = [b"p" + h for h in hashes]
    for label, group in zip(own, groups, strict=True):
        ends = sorted((root(label), root(b"g" + encoded(group) if group else label)))
        parent[ends[1]] = ends[0]  # the root is the least member
    numbers: dict[bytes, int] = {}
    found = [numbers.setdefault(root(label), len(numbers)) for label in own]
    return np.array(found, np.int64), list(numbers)


def draw_splits(
    groups: Sequence[str], hashes: Sequence[bytes], *, val_fraction: float, test_fraction: float, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw the split of every sample so that no group and no image is in two of them.

    groups, hashes: see `join_groups`. The sets are ranked by SHA-256 of seed and label: test takes from the front, val
    from the back, each a set whenever that brings it nearer to its fraction of the samples, and at least one; so other
    data and another val_fraction move few. Returns (index into `SPLITS` of every sample, uint8; number of the set of
    every sample, int64). `InputError`: fewer sets than splits that must not be empty.
    """
    check_fractions(val_fraction, test_fraction, seed)
    sets, labels = join_groups(groups, hashes)
    sizes = np.bincount(sets, minlength=len(labels))
    wanted = {_TEST: float(test_fraction), _VAL: float(val_fraction), _TRAIN: 1.0 - test_fraction - val_fraction}
    parts = [split for split, fraction in wanted.items() if fraction > 1e-9]
    require(
        len(labels) >= len(parts),
        f"{' and '.join(SPLITS[p] for p in sorted(parts))} must have at least 1 group each, got {len(labels)} group(s) "
        f"of different images among {len(sets)} sample(s)",
    )
    ranked = sorted(range(len(labels)), key=lambda i: hashlib.sha256(b"%d %s" % (seed, labels[i])).digest())
    of_set = np.full(len(labels), parts[-1], np.uint8)
    for left, split in zip(range(len(parts) - 1, 0, -1), parts[:-1], strict=True):
        order = ranked if split == _TEST else ranked[::-1]
        taken = _nearest([i for i in order if of_set[i] == parts[-1]], sizes, wanted[split] * len(sets), left)
        of_set[taken] = split
    return of_set[sets], sets


def _nearest(order: list[int], sizes: NDArray[np.int64], target: float, leave: int) -> list[int]:
    """The sets whose samples come nearest to `target`, front first; at least one, and `leave` are left."""
    taken: list[int] = []
    count = 0
    for i in order:
        if len(order) - len(taken) > leave and abs(count + sizes[i] - target) < abs(count - target):
            taken.append(i)
            count += int(sizes[i])
    return taken or [min(order, key=lambda i: sizes[i])]


def split_counts(splits: NDArray[np.uint8], sets: NDArray[np.int64]) -> dict[str, tuple[int, int]]:
    """(samples, groups) of every split that has any."""
    return {
        name: (int((splits == number).sum()), len(np.unique(sets[splits == number])))
        for number, name in enumerate(SPLITS)
        if (splits == number).any()
    }


def duplicates(hashes: Iterable[bytes], most: int = 5) -> tuple[int, list[tuple[int, int]]]:
    """How many samples have the pixels of an earlier one, and the first such pairs (earlier, later)."""
    first: dict[bytes, int] = {}
    pairs: list[tuple[int, int]] = []
    count = 0
    for index, digest in enumerate(hashes):
        earlier = first.setdefault(digest, index)
        if earlier != index:
            count += 1
            if len(pairs) < most:
                pairs.append((earlier, index))
    return count, pairs
