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
        yield Batch(
            found.images,
            found.sizes,
            found.corner,
            found.samples,
            seed,
            found.iteration,
            found.focus,
            found.labels,
            found.targets,
        )


def held_out(
    stream: ImageStream,
    *,
    limit: int,
    device: torch.device,
    on_bad: Callable[[str], None],
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """The first `limit` held-out samples, or pairs, as they never change (iteration 0, crops at random places).

    They are cut into parts of `stream.batch` samples; of `world` processes each gets every `world`-th part, from part
    `rank` on, and the last ones may get none.
    """
    count = min(limit, len(stream.data))
    starts = range(rank * stream.batch, count, world * stream.batch)
    parts = (np.arange(start, min(start + stream.batch, count)) for start in starts)
    return batches((to_device(stream.held_out(p), device) for p in parts), stream.seed, on_bad)


def overlaps(learned: ShardSet, held: ShardSet | None) -> list[str]:
    """What several shards have in common that they should not: images met twice, or both learned from and held out.

    Sentences to warn with. One shard by itself is known to be drawn without; a set of 100,000 samples takes seconds.
    """
    if len({*learned.paths, *(held.paths if held else ())}) == 1:
        return []
    first: dict[str, int] = {}
    groups: set[str] = set()
    twice = 0
    for index in range(len(learned)):
        digest, group = learned.identity(index)
        twice += first.setdefault(digest, index) != index
        groups.add(group)
    notes = [f"warning: {twice} of {len(learned)} samples have the pixels of another one"] if twice else []
    both = [(i, *held.identity(i)) for i in range(len(held))] if held else []
    known = [(i, first[digest]) for i, digest, _ in both if digest in first]
    if held and known:
        i, same = known[0]
        notes.append(
            f"warning: {len(known)} of {len(held)} held-out samples are learned from: {held.source(i)} of "
            f"{held.place(i)[0]} has the pixels of {learned.source(same)} of {learned.place(same)[0]}"
        )
    people = (groups & {group for _, _, group in both}) - {""}
    if people:
        notes.append(
            f"warning: {len(people)} group(s) are both learned from and held out, {min(people)} for one: if they are "
            f"the same people, held-out figures say too much"
        )
    return notes


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
