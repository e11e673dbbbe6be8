"""Read HDF5 shards (format v2) and verify them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import operator
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, require
from coverfast.samples import (
    DTYPES,
    SPLITS,
    Original,
    Sample,
    SampleInfo,
    add_to_content,
    check_metadata,
    check_sample,
    pixel_digest,
)

FORMAT = "coverfast-shard"
VERSION = 2
Region = Sequence[slice]
Allocate = Callable[[int, tuple[int, ...], np.dtype[Any]], NDArray[Any]]
Progress = Callable[[int, int], None]

# What h5py raises on damaged files, one or the other by the place of the damage.
_FAULTS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError)
_open_shards: weakref.WeakSet[Shard] = weakref.WeakSet()


def reason(error: BaseException) -> str:
    """What an exception says, as part of a sentence."""
    number = getattr(error, "errno", None)
    text = os.strerror(number) if number else str(error.args[0] if error.args else type(error).__name__)
    text = text.replace("filter returned failure", "a checksum or filter failed")
    return " ".join(text.split())[:200]


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except _FAULTS as error:
        raise InputError(f"{what} cannot be read: {reason(error)}") from error


def _string(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _open(path: Path) -> h5py.File:
    with _naming(str(path)):
        require(path.exists(), f"{path} must be a shard, found no such file")
        require(path.is_file(), f"{path} must be a shard, got a folder or a special file")
        path.open("rb").close()
        require(path.stat().st_size > 0, f"{path} must be a shard, got an empty file")
        require(h5py.is_hdf5(path), f"{path} must be a shard, got a file that is not HDF5 or has a damaged start")
    try:
        # Shards never change under their name, so a lock would only fail where file systems have none. The cache is
        # that of one open sample: several crops of it decode a chunk once.
        return h5py.File(path, "r", locking=False, rdcc_nbytes=64 << 20, rdcc_nslots=4001)
    except _FAULTS as error:
        state = "truncated" if "truncated" in str(error) else "damaged"
        raise InputError(f"{path} is a {state} HDF5 file: {reason(error)}") from error


class Shard:
    """A shard opened for reading.

    len(): samples. path: absolute. ndim: 2 or 3. channels. sizes: `(N, ndim)` int64, every sample's S in pixels.
    scaling: `(N, 4)` float64, slope, intercept, lo and hi. splits: `(N,)` uint8, an index into `SPLITS`.
    content_hash: SHA-256 (hexadecimal) over the pixels of all samples in order and all that is said of them.
    preprocessing: the dict given to the writer.

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
        file = _open(self.path)
        try:
            with _naming(str(self.path)):
                self._read_root(file)
        except BaseException:
            file.close()
            raise
        self._file = file
        _open_shards.add(self)

    def _read_root(self, file: h5py.File) -> None:
        path, root = self.path, file.attrs
        require(
            "format" in root and _string(root["format"]) == FORMAT,
            f"{path} must be a shard, got an HDF5 file without the attribute format = {FORMAT!r}",
        )
        version = int(root["version"])
        require(version == VERSION, f"{path} must be of shard format version {VERSION}, got version {version}")
        self.ndim, self.channels = int(root["ndim"]), int(root["channels"])
        self.content_hash = _string(root["content_sha256"])
        self.preprocessing: dict[str, Any] = json.loads(_string(root["preprocessing"]))
        samples = file["samples"]
        count, found = int(root["count"]), len(samples)
        self.sizes: NDArray[np.int64] = file["sizes"][()].astype(np.int64)
        self.scaling: NDArray[np.float64] = file["scaling"][()].astype(np.float64)
        self.splits: NDArray[np.uint8] = file["splits"][()].astype(np.uint8)
        for table in (self.sizes, self.scaling, self.splits):
            table.flags.writeable = False
        require(
            self.ndim in (2, 3) and self.channels >= 1 and count >= 1,
            f"{path} must hold at least 1 sample of 2 or 3 axes and 1 channel, got {count} of {self.ndim} axes and "
            f"{self.channels} channels",
        )
        require(
            isinstance(self.preprocessing, dict),
            f"{path} must have a JSON object as preprocessing, got {self.preprocessing!r:.80}",
        )
        require(
            self.sizes.shape == (count, self.ndim) and found == count and bool((self.sizes >= 1).all()),
            f"{path} must have {count} samples of {self.ndim} axes, got {found} and sizes {self.sizes.shape}",
        )
        require(
            self.scaling.shape == (count, 4) and bool(np.isfinite(self.scaling).all()),
            f"{path} must have {count} rows of 4 finite numbers as scaling, got {self.scaling.shape}",
        )
        require(
            self.splits.shape == (count,) and bool((self.splits < len(SPLITS)).all()),
            f"{path} must have {count} splits below {len(SPLITS)}, got {self.splits.shape}",
        )
        self._samples: h5py.Group = samples

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
        """The HDF5 dataset of sample `index`."""
        i = self._check_index(index)
        with _naming(f"{self.path}: sample {i}"):
            dataset = self._samples[f"{i:08d}"]
            require(isinstance(dataset, h5py.Dataset), f"{self.path}: sample {i} must be a dataset")
        return dataset

    def info(self, index: int) -> SampleInfo:
        """What the shard says of sample `index`, without reading pixels; `InputError` if it cannot be read."""
        dataset, i = self.dataset(index), operator.index(index)
        with _naming(f"{self.path}: sample {i}"):
            said = dict(dataset.attrs)
            original = None
            if "to_original" in said:
                original = Original(
                    tuple(int(v) for v in said["original_shape"]),
                    np.asarray(said["to_original"], np.float64),
                    np.asarray(said["original_affine"], np.float64) if "original_affine" in said else None,
                    _string(said.get("original_orientation", "")),
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
                source=_string(said["source"]),
                group=_string(said["group"]),
                split=SPLITS[self.splits[i]],
                original=original,
                sha256=_string(said["sha256"]),
            )
        expected = (self.channels, *(int(s) for s in self.sizes[i]))
        require(
            info.shape == expected and info.dtype in DTYPES,
            f"{self.path}: sample {i} ({info.source}) must be {expected} as the index says, of an integer type or "
            f"float32, got {info.shape} {info.dtype}",
        )
        check_metadata(info, self.ndim)
        return info

    def source(self, index: int) -> str:
        """The source name of sample `index`."""
        dataset, i = self.dataset(index), operator.index(index)
        with _naming(f"{self.path}: sample {i}"):
            return _string(dataset.attrs["source"])

    def identity(self, index: int) -> tuple[str, str]:
        """SHA-256 of the pixels of sample `index`, as the shard says it, and its group."""
        dataset, i = self.dataset(index), operator.index(index)
        with _naming(f"{self.path}: sample {i}"):
            return _string(dataset.attrs["sha256"]), _string(dataset.attrs["group"])

    def read(self, index: int, region: Region | None = None) -> Sample:
        """Sample `index`, or the part of it inside `region`, a slice with start and stop along each axis of S.

        Only the chunks that the region touches are read. `InputError` names file, index and source if a checksum
        fails or it cannot be decoded.
        """
        info = self.info(index)
        (pixels,) = self.pixels(index, [region])
        original = info.original
        if region is not None and original is not None:
            shift = np.eye(self.ndim + 1)
            shift[:-1, -1] = [r.start for r in region]
            original = replace(original, to_original=original.to_original @ shift)
        fields = ("slope", "intercept", "lo", "hi", "spacing", "source", "group", "split")
        return Sample(pixels, original=original, **{name: getattr(info, name) for name in fields})

    def pixels(
        self, index: int, regions: Sequence[Region | None] = (None,), allocate: Allocate | None = None
    ) -> list[NDArray[Any]]:
        """The stored pixels `(C, *S)` of sample `index` inside each region; None is all of it.

        Several regions of one call decode a chunk they share once, up to 64 MiB of chunks. allocate: called with the
        number of the region, its shape and its type, gives the C-contiguous array to read into, whose low corner is
        filled where it is larger. `InputError` as in `read`.
        """
        i = self._check_index(index)
        whole = tuple(self.sizes[i].tolist())
        try:
            # h5py's own slicing takes as long again as HDF5 does.
            dataset = h5py.h5d.open(self._samples.id, b"%08d" % i)
            space, dtype = dataset.get_space(), dataset.dtype
            if space.shape != (self.channels, *whole) or dtype.name not in DTYPES:
                self.info(i)  # says what is wrong
            out: list[NDArray[Any]] = []
            for region in regions:
                start, shape = _extent(region, whole)
                shape = (self.channels, *shape)
                space.select_hyperslab((0, *start), shape)
                part = (allocate or _empty)(len(out), shape, dtype.newbyteorder("="))
                place = h5py.h5s.create_simple(part.shape)
                place.select_hyperslab((0,) * len(shape), shape)
                dataset.read(place, space, part)
                out.append(part)
            return out
        except _FAULTS as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self._named(i)} cannot be read: {reason(error)}") from error

    def _named(self, i: int) -> str:
        """File, index and, if that can still be read, source."""
        try:
            return f"{self.path}: sample {i} ({self.source(i)})"
        except InputError:
            return f"{self.path}: sample {i}"


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


def verify(path: str | os.PathLike[str], progress: Progress | None = None) -> list[str]:
    """Read all of a shard and return what is wrong, a sentence each; an empty list means sound.

    Checks every chunk, every sample's SHA-256, size, scaling and spacing, and the content hash. progress: called
    with (samples done, samples in all).
    """
    try:
        shard = Shard(path)
    except InputError as error:
        return [str(error)]
    problems: list[str] = []
    content = hashlib.sha256()
    with shard:
        for i in range(len(shard)):
            try:
                info, sample = shard.info(i), shard.read(i)
                check_sample(sample)
                add_to_content(content, sample, info.sha256)
                if pixel_digest(sample.pixels) != info.sha256:
                    problems.append(f"{shard.path}: sample {i} ({info.source}) does not match its sha256")
            except (InputError, ValueError) as error:
                text = str(error)
                text = text if str(shard.path) in text else f"{shard.path}: sample {i}: {text}"
                problems.append(text + _broken_chunks(shard, i))
            if progress is not None:
                progress(i + 1, len(shard))
        if not problems and content.hexdigest() != shard.content_hash:
            problems.append(f"{shard.path}: what it says of its samples does not match content_sha256")
    return problems


def _broken_chunks(shard: Shard, index: int) -> str:
    """Where the chunks of a sample that cannot be read begin, as the end of a sentence; empty if it is not they."""
    try:
        chunks = shard.dataset(index).chunks[1:]
    except (*_FAULTS, InputError):
        return ""
    broken = []
    size = shard.sizes[index].tolist()
    for start in itertools.product(*(range(0, s, c) for s, c in zip(size, chunks, strict=True))):
        region = [slice(a, min(a + c, s)) for a, c, s in zip(start, chunks, size, strict=True)]
        try:
            shard.pixels(index, [region])
        except InputError:
            broken.append(str(start))
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return f" (chunks at {', '.join(broken[:3])}{more})" if broken else ""
