"""Verify HDF5 shards: every chunk, every hash, and that what a shard says of itself is all there."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable

import h5py

from coverfast.checks import InputError
from coverfast.samples import add_classes_to_content, add_to_content, check_sample, pixel_digest
from coverfast.shard_index import FAULTS, LABELLED
from coverfast.shard_reader import Region, Shard

Progress = Callable[[int, int], None]


def verify(path: str | os.PathLike[str], progress: Progress | None = None) -> list[str]:
    """Read all of a shard and return what is wrong, a sentence each; an empty list means sound.

    Checks every chunk, every sample's SHA-256, size, scaling and spacing, its label map and that its values are in the
    shard's table, and the content hash. progress: called with (samples done, samples in all).
    """
    try:
        shard = Shard(path)
    except InputError as error:
        return [str(error)]
    problems: list[str] = []
    content = hashlib.sha256()
    classes: list[tuple[str, str]] = []
    with shard:
        for i in range(len(shard)):
            try:
                info, sample = shard.info(i), shard.read(i)
                check_sample(sample)
                add_to_content(content, sample, info.sha256)
                classes.append((info.labels_sha256, info.target))
                if pixel_digest(sample.pixels) != info.sha256:
                    problems.append(f"{shard.path}: sample {i} ({info.source}) does not match its sha256")
                if sample.labels is not None:
                    if pixel_digest(sample.labels) != info.labels_sha256:
                        problems.append(
                            f"{shard.path}: label map of sample {i} ({info.source}) does not match its sha256"
                        )
                    shard.check_labels(i, sample.labels)
            except (InputError, ValueError) as error:
                text = str(error)
                text = text if str(shard.path) in text else f"{shard.path}: sample {i}: {text}"
                problems.append(text + _broken_chunks(shard, i))
            if progress is not None:
                progress(i + 1, len(shard))
        if not problems:
            if shard.version == LABELLED:
                add_classes_to_content(content, classes, shard.label_classes, shard.target_classes)
            if content.hexdigest() != shard.content_hash:
                problems.append(f"{shard.path}: what it says of its samples does not match content_sha256")
    return problems


def _broken_chunks(shard: Shard, index: int) -> str:
    """Where the chunks of a sample that cannot be read begin, as the end of a sentence; empty if it is not they."""
    pixels = _broken(shard, index, lambda: shard.dataset(index), lambda region: shard.pixels(index, [region]))
    if pixels or not shard.label_classes:
        return pixels
    return _broken(shard, index, lambda: shard.label_dataset(index), lambda region: shard.labels(index, [region]))


def _broken(shard: Shard, index: int, find: Callable[[], h5py.Dataset], read: Callable[[Region], object]) -> str:
    size = shard.sizes[index].tolist()
    try:
        chunks = find().chunks[-len(size) :]
    except (*FAULTS, InputError):
        return ""
    broken = []
    for start in itertools.product(*(range(0, s, c) for s, c in zip(size, chunks, strict=True))):
        try:
            read([slice(a, min(a + c, s)) for a, c, s in zip(start, chunks, size, strict=True)])
        except InputError:
            broken.append(str(start))
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return f" (chunks at {', '.join(broken[:3])}{more})" if broken else ""
