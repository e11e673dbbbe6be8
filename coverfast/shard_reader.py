"""Read HDF5 shards (formats v2 and v3)."""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, require
from coverfast.class_tables import ClassIndices
from coverfast.samples import DTYPES, LABEL_DTYPES, SPLITS, LabelClass, Original, Sample, SampleInfo, check_metadata
from coverfast.shard_index import FAULTS, naming, open_file, read_index, reason, string

Region = Sequence[slice]
Allocate = Callable[[int, tuple[int, ...], np.dtype[Any]], NDArray[Any]]

_open_shards: weakref.WeakSet[Shard] = weakref.WeakSet()


class Shard:
    """A shard opened for reading.

    len(): samples. path: absolute. ndim: 2 or 3. channels. sizes: `(N, ndim)` int64, every sample's S in pixels.
    scaling: `(N, 4)` float64, slope, intercept, lo and hi. splits: `(N,)` uint8, an index into `SPLITS`.
    content_hash: SHA-256 (hexadecimal) over the pixels of all samples in order and all that is said of them.
    preprocessing: the dict given to the writer. version: of the format, 2 without labels and targets, 3 with either.

    label_classes: what the values of the label maps mean, by value, the first one 0, the background; empty without
    label maps. A class index is a place in it. target_classes: names of the images' classes. targets: `(N,)` int64, the
    place of each sample's class in them, -1 for none.

    Opening reads the index only. Pickles by path; a forked child opens a handle of its own. Both refuse a file
    that was replaced by another content meanwhile. `InputError`: no such file, not a shard, damaged, a newer
    version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._file: h5py.File | None = None
        self._closed = False
        self._connect()

    def _connect(self) -> None:
        file = open_file(self.path)
        try:
            with naming(str(self.path)):
                index = read_index(file, self.path)
                self._samples: h5py.Group = file["samples"]
                self._maps: h5py.Group | None = file["labels"] if index.label_classes else None
        except BaseException:
            file.close()
            raise
        self.version, self.ndim, self.channels = index.version, index.ndim, index.channels
        self.content_hash, self.preprocessing = index.content_hash, index.preprocessing
        self.sizes, self.scaling, self.splits = index.sizes, index.scaling, index.splits
        self.label_classes: tuple[LabelClass, ...] = index.label_classes
        self.target_classes, self.targets = index.target_classes, index.targets
        self._indices = ClassIndices(index.label_classes)
        self._file = file
        _open_shards.add(self)

    def _handle(self) -> h5py.File:
        require(not self._closed, f"{self.path} must be open, it was closed")
        if self._file is None:
            self._reconnect(self.content_hash)
        assert self._file is not None
        return self._file

    def _reconnect(self, content_hash: str) -> None:
        self._connect()
        if self.content_hash != content_hash:
            self.close()
            raise InputError(f"{self.path} must not change while it is in use, got another content")

    def _release(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def close(self) -> None:
        """Close the file; reading afterwards is refused."""
        self._closed = True
        self._release()

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "content_hash": self.content_hash}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self._file, self._closed = state["path"], None, False
        self._reconnect(state["content_hash"])

    def __len__(self) -> int:
        return len(self.sizes)

    def _check_index(self, index: int) -> int:
        i = operator.index(index)
        require(0 <= i < len(self), f"{self.path}: sample index must be 0 to {len(self) - 1}, got {i}")
        self._handle()
        return i

    def dataset(self, index: int) -> h5py.Dataset:
        """The HDF5 dataset of the pixels of sample `index`."""
        i = self._check_index(index)
        return self._node(self._samples, i, f"sample {i}")

    def label_dataset(self, index: int) -> h5py.Dataset | None:
        """The HDF5 dataset of the label map of sample `index`; None in a shard without label maps."""
        i = self._check_index(index)
        return None if self._maps is None else self._node(self._maps, i, f"label map of sample {i}")

    def _node(self, group: h5py.Group, i: int, what: str) -> h5py.Dataset:
        with naming(f"{self.path}: {what}"):
            dataset = group[f"{i:08d}"]
            require(isinstance(dataset, h5py.Dataset), f"{self.path}: {what} must be a dataset")
        return dataset

    def info(self, index: int) -> SampleInfo:
        """What the shard says of sample `index`, without reading pixels; `InputError` if it cannot be read."""
        dataset, labels, i = self.dataset(index), self.label_dataset(index), operator.index(index)
        with naming(f"{self.path}: sample {i}"):
            said = dict(dataset.attrs)
            original = None
            if "to_original" in said:
                original = Original(
                    tuple(int(v) for v in said["original_shape"]),
                    np.asarray(said["to_original"], np.float64),
                    np.asarray(said["original_affine"], np.float64) if "original_affine" in said else None,
                    string(said.get("original_orientation", "")),
                )
            slope, intercept, lo, hi = self.scaling[i].tolist()
            info = SampleInfo(
                shape=tuple(int(s) for s in dataset.shape),
                dtype=dataset.dtype.name,
                slope=slope,
                intercept=intercept,
                lo=lo,
                hi=hi,
                spacing=tuple(float(v) for v in np.atleast_1d(said["spacing"])),
                source=string(said["source"]),
                group=string(said["group"]),
                split=SPLITS[self.splits[i]],
                original=original,
                sha256=string(said["sha256"]),
                target=self.target_classes[self.targets[i]] if self.targets[i] >= 0 else "",
                labels_sha256="" if labels is None else string(labels.attrs["sha256"]),
            )
        expected = (self.channels, *(int(s) for s in self.sizes[i]))
        require(
            info.shape == expected and info.dtype in DTYPES,
            f"{self.path}: sample {i} ({info.source}) must be {expected} as the index says, of an integer type or "
            f"float32, got {info.shape} {info.dtype}",
        )
        shape, dtype = ((), "") if labels is None else (labels.shape, labels.dtype.name)
        require(
            labels is None or (shape == expected[1:] and dtype in LABEL_DTYPES),
            f"{self.path}: label map of sample {i} ({info.source}) must be {expected[1:]} of "
            f"{', '.join(LABEL_DTYPES)}, got {shape} of {dtype}",
        )
        check_metadata(info, self.ndim)
        return info

    def source(self, index: int) -> str:
        """The source name of sample `index`."""
        dataset, i = self.dataset(index), operator.index(index)
        with naming(f"{self.path}: sample {i}"):
            return string(dataset.attrs["source"])

    def identity(self, index: int) -> tuple[str, str]:
        """SHA-256 of the pixels of sample `index`, as the shard says it, and its group."""
        dataset, i = self.dataset(index), operator.index(index)
        with naming(f"{self.path}: sample {i}"):
            return string(dataset.attrs["sha256"]), string(dataset.attrs["group"])

    def read(self, index: int, region: Region | None = None) -> Sample:
        """Sample `index`, or the part of it inside `region`, a slice with start and stop along each axis of S.

        Only the chunks that the region touches are read. `InputError` names file, index and source if a checksum
        fails or it cannot be decoded.
        """
        info = self.info(index)
        (pixels,) = self.pixels(index, [region])
        labels = None if self._maps is None else self._label_values(operator.index(index), [region])[0]
        original = info.original
        if region is not None and original is not None:
            shift = np.eye(self.ndim + 1)
            shift[:-1, -1] = [r.start for r in region]
            original = replace(original, to_original=original.to_original @ shift)
        fields = ("slope", "intercept", "lo", "hi", "spacing", "source", "group", "split", "target")
        return Sample(pixels, original=original, labels=labels, **{name: getattr(info, name) for name in fields})

    def pixels(
        self, index: int, regions: Sequence[Region | None] = (None,), allocate: Allocate | None = None
    ) -> list[NDArray[Any]]:
        """The stored pixels `(C, *S)` of sample `index` inside each region; None is all of it.

        Several regions of one call decode a chunk they share once, up to 64 MiB of chunks. allocate: called with the
        number of the region, its shape and its type, gives the C-contiguous array to read into, whose low corner is
        filled where it is larger. `InputError` as in `read`.
        """
        i = self._check_index(index)
        return self._parts(self._samples, i, (self.channels,), regions, allocate or _empty)

    def labels(
        self, index: int, regions: Sequence[Region | None] = (None,), allocate: Allocate | None = None
    ) -> list[NDArray[np.uint8]]:
        """The class indices `(*S)` of sample `index` inside each region, uint8; see `pixels` for the arguments.

        `InputError` as in `read`, and for a shard without label maps.
        """
        i = self._check_index(index)
        values = self._label_values(i, regions)
        found = [self.check_labels(i, part) for part in values]
        if allocate is None:
            return found
        # Only now, that what cannot be read leaves no trace in memory that another sample may get.
        out: list[NDArray[np.uint8]] = []
        for number, part in enumerate(found):
            out.append(allocate(number, part.shape, part.dtype))
            out[-1][tuple(map(slice, part.shape))] = part
        return out

    def check_labels(self, index: int, values: NDArray[Any]) -> NDArray[np.uint8]:
        """The class indices of label values of sample `index`; `InputError` if one is not in the table."""
        try:
            return self._indices(values)
        except InputError as error:
            raise InputError(f"{self._named(index, 'label map of ')}: {error}") from error

    def _label_values(self, i: int, regions: Sequence[Region | None]) -> list[NDArray[Any]]:
        if self._maps is None:
            raise InputError(f"{self.path} must have label maps to read labels, got a shard without")
        return self._parts(self._maps, i, (), regions, _empty)

    def _parts(
        self, group: h5py.Group, i: int, lead: tuple[int, ...], regions: Sequence[Region | None], allocate: Allocate
    ) -> list[NDArray[Any]]:
        """Parts of the pixels `(C, *S)`, lead (C,), or of the label map `(*S)`, lead (), of sample `i`."""
        whole = tuple(self.sizes[i].tolist())
        try:
            # h5py's own slicing takes as long again as HDF5 does.
            dataset = h5py.h5d.open(group.id, b"%08d" % i)
            space, dtype = dataset.get_space(), dataset.dtype
            if space.shape != (*lead, *whole) or dtype.name not in (DTYPES if lead else LABEL_DTYPES):
                self.info(i)  # says what is wrong
            out: list[NDArray[Any]] = []
            for region in regions:
                start, shape = _extent(region, whole)
                shape = (*lead, *shape)
                space.select_hyperslab((*(0 for _ in lead), *start), shape)
                part = allocate(len(out), shape, dtype.newbyteorder("="))
                place = h5py.h5s.create_simple(part.shape)
                place.select_hyperslab((0,) * len(shape), shape)
                dataset.read(place, space, part)
                out.append(part)
            return out
        except FAULTS as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{self._named(i, '' if lead else 'label map of ')} cannot be read: {reason(error)}"
            ) from error

    def _named(self, i: int, what: str = "") -> str:
        """File, index and, if that can still be read, source."""
        try:
            return f"{self.path}: {what}sample {i} ({self.source(i)})"
        except InputError:
            return f"{self.path}: {what}sample {i}"


def _empty(number: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.empty(shape, dtype)


def _extent(region: Region | None, whole: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First pixel and shape of a region."""
    if region is None:
        return (0,) * len(whole), whole
    try:
        ends = [(operator.index(r.start), operator.index(r.stop)) for r in region]
        fits = len(ends) == len(whole) and all(0 <= a < b <= s for (a, b), s in zip(ends, whole, strict=True))
    except (AttributeError, TypeError):
        fits = False
    if not fits:
        raise InputError(f"region must be a slice within {whole} along each axis, with start and stop, got {region}")
    return tuple(a for a, _ in ends), tuple(b - a for a, b in ends)


def _release_all() -> None:
    # HDF5 would share the parent's descriptor with any file a child opens while an inherited handle lives.
    for shard in list(_open_shards):
        shard._release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_all)
