"""Synthetic anatomy as a shard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from coverfast.phantom import phantom
from coverfast.shards import Sample, ShardWriter


def build_phantoms(
    path: str | Path, ndim: int, size: int | Sequence[int], *, seed: int, indices: Iterable[int]
) -> None:
    """Write the phantoms of a seed with the given indices as a shard of uint8 images, see `coverfast.phantom`."""
    with ShardWriter(path, ndim=ndim, preprocessing={"preset": "phantom", "seed": seed}) as writer:
        for index in indices:
            pixels = (255 * phantom(ndim, size, seed=seed, index=index).image[None]).round().astype(np.uint8)
            writer.add(Sample(pixels, 1.0, 0.0, 0.0, 255.0, (1.0,) * ndim, f"phantom-{seed}-{index}"))
