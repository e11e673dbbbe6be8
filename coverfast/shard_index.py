"""What the root of a shard says (formats v2 and v3), read and found in order when a shard is opened."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, require
from coverfast.class_tables import read_label_table, read_target_table
from coverfast.samples import SPLITS, LabelClass

FORMAT = "coverfast-shard"
#: Version of a shard without and with label maps or targets; a reader knows both.
PLAIN, LABELLED = 2, 3
#: The newest version that is written.
VERSION = LABELLED

# What h5py raises on damaged files, one or the other by the place of the damage.
FAULTS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError)


def reason(error: BaseException) -> str:
    """What an exception says, as part of a sentence."""
    number = getattr(error, "errno", None)
    text = os.strerror(number) if number else str(error.args[0] if error.args else type(error).__name__)
    text = text.replace("filter returned failure", "a checksum or filter failed")
    return " ".join(text.split())[:200]


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Turn what h5py raises on a damaged file into an `InputError` that begins with `what`."""
    try:
        yield
    except InputError:
        raise
    except FAULTS as error:
        raise InputError(f"{what} cannot be read: {reason(error)}") from error


def string(value: Any) -> str:
    """Text of an attribute, however it is stored."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def open_file(path: Path) -> h5py.File:
    """The HDF5 file of a shard; `InputError` if there is none."""
    with naming(str(path)):
        require(path.exists(), f"{path} must be a shard, found no such file")
        require(path.is_file(), f"{path} must be a shard, got a folder or a special file")
        path.open("rb").close()
        require(path.stat().st_size > 0, f"{path} must be a shard, got an empty file")
        require(h5py.is_hdf5(path), f"{path} must be a shard, got a file that is not HDF5 or has a damaged start")
    try:
        # Shards never change under their name, so a lock would only fail where file systems have none. The cache is
        # that of one open sample: several crops of it decode a chunk once.
        return h5py.File(path, "r", locking=False, rdcc_nbytes=64 << 20, rdcc_nslots=4001)
    except FAULTS as error:
        state = "truncated" if "truncated" in str(error) else "damaged"
        raise InputError(f"{path} is a {state} HDF5 file: {reason(error)}") from error


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What `Shard` says without looking at a sample; see there."""

    version: int
    ndim: int
    channels: int
    content_hash: str
    preprocessing: dict[str, Any]
    sizes: NDArray[np.int64]
    scaling: NDArray[np.float64]
    splits: NDArray[np.uint8]
    label_classes: tuple[LabelClass, ...]
    target_classes: tuple[str, ...]
    targets: NDArray[np.int64]


def read_index(file: h5py.File, path: Path) -> ShardIndex:
    """The index of a shard; `InputError` if it is none, of another version, or its parts disagree."""
    root = file.attrs
    require(
        "format" in root and string(root["format"]) == FORMAT,
        f"{path} must be a shard, got an HDF5 file without the attribute format = {FORMAT!r}",
    )
    version = int(root["version"])
    require(
        version in (PLAIN, LABELLED),
        f"{path} must be of shard format version {PLAIN} or {LABELLED}, got version {version}",
    )
    count, found = int(root["count"]), len(file["samples"])
    label_classes, target_classes, targets = _read_classes(file, path, version, count)
    index = ShardIndex(
        version=version,
        ndim=int(root["ndim"]),
        channels=int(root["channels"]),
        content_hash=string(root["content_sha256"]),
        preprocessing=json.loads(string(root["preprocessing"])),
        sizes=file["sizes"][()].astype(np.int64),
        scaling=file["scaling"][()].astype(np.float64),
        splits=file["splits"][()].astype(np.uint8),
        label_classes=label_classes,
        target_classes=target_classes,
        targets=targets,
    )
    for table in (index.sizes, index.scaling, index.splits, index.targets):
        table.flags.writeable = False
    require(
        index.ndim in (2, 3) and index.channels >= 1 and count >= 1,
        f"{path} must hold at least 1 sample of 2 or 3 axes and 1 channel, got {count} of {index.ndim} axes and "
        f"{index.channels} channels",
    )
    require(
        isinstance(index.preprocessing, dict),
        f"{path} must have a JSON object as preprocessing, got {index.preprocessing!r:.80}",
    )
    sizes, scaling, splits = index.sizes, index.scaling, index.splits
    require(
        sizes.shape == (count, index.ndim) and found == count and bool((sizes >= 1).all()),
        f"{path} must have {count} samples of {index.ndim} axes, got {found} and sizes {sizes.shape}",
    )
    require(
        scaling.shape == (count, 4) and bool(np.isfinite(scaling).all()),
        f"{path} must have {count} rows of 4 finite numbers as scaling, got {scaling.shape}",
    )
    require(
        splits.shape == (count,) and bool((splits < len(SPLITS)).all()),
        f"{path} must have {count} splits below {len(SPLITS)}, got {splits.shape}",
    )
    return index


def _read_classes(
    file: h5py.File, path: Path, version: int, count: int
) -> tuple[tuple[LabelClass, ...], tuple[str, ...], NDArray[np.int64]]:
    """Label classes, target classes and targets; version 2 has none."""
    label_classes: tuple[LabelClass, ...] = ()
    target_classes: tuple[str, ...] = ()
    targets = np.full(count, -1, np.int64)
    try:
        if version == LABELLED and "labels" in file:
            label_classes = read_label_table(string(file["labels"].attrs["classes"]))
        if version == LABELLED and "targets" in file:
            target_classes = read_target_table(string(file["targets"].attrs["classes"]))
            targets = file["targets"][()].astype(np.int64)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    maps = len(file["labels"]) if label_classes else count
    require(maps == count, f"{path} must have {count} label maps, got {maps}")
    require(
        targets.shape == (count,) and bool(((targets >= -1) & (targets < len(target_classes))).all()),
        f"{path} must have {count} targets from -1 to {len(target_classes) - 1}, got {targets.shape}",
    )
    return label_classes, target_classes, targets
