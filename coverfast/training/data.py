"""What training asks of the data: batches of a method, held-out ones too, and refusals before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from coverfast.checks import require
from coverfast.loader import Images, ImageStream, to_device
from coverfast.methods import Batch
from coverfast.shard_set import ShardSet


def batches(loaded: Iterable[Images], seed: int, on_bad: Callable[[str], None]) -> Iterator[Batch]:
    """Loaded images as batches of a method; `on_bad` is told why a sample was replaced."""
    for found in loaded:
        for reason in found.bad:
            on_bad(reason)
        yield Batch(found.images, found.sizes, found.corner, found.samples, seed, found.iteration)


def held_out(
    stream: ImageStream, *, limit: int, device: torch.device, on_bad: Callable[[str], None]
) -> Iterator[Batch]:
    """The first `limit` held-out samples with views that never change (iteration 0)."""
    count = min(limit, len(stream.data))
    parts = (np.arange(start, min(start + stream.batch, count)) for start in range(0, count, stream.batch))
    return batches((to_device(stream.gather(0, p, p), device) for p in parts), stream.seed, on_bad)


def check_fits(shards: ShardSet, crop: tuple[int, ...], *, pad: bool) -> None:
    """Refuse a crop larger than a sample, by name, unless it is to be padded."""
    if pad:
        return
    small = np.flatnonzero((shards.sizes < np.array(crop)).any(axis=1))
    if small.size:
        worst = int(small[np.argmin(shards.sizes[small].prod(axis=1))])
        size = tuple(int(s) for s in shards.sizes[worst])
        require(
            False,
            f"crop must fit into every sample, got {crop}, but {shards.source(worst)!r} of {shards.place(worst)[0]} is "
            f"{size}; use a smaller --crop, or --pad to zero-pad",
        )
