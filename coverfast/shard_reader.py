"""Read HDF5 shards (format v1) and verify them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, require
from coverfast.samples import DTYPES, Sample, SampleInfo, add_to_content, check_sample, pixel_digest

FORMAT = "coverfast-shard"
VERSION = 1
Progress = Callable[[int, int], None]

# What h5py raises on damaged files, one or the other by the place of the damage.
_FAULTS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError)
_open_shards: weakref.WeakSet[Shard] = weakref.WeakSet()


def reason(error: BaseException) -> str:
    """What an exception says, as part of a sentence."""
    number = getattr(error, "errno", None)
    text = os.strerror(number) if number else str(error.args[0] if error.args else type(error).__name__)
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
        # Shards never change under their name, so a lock would only fail where file systems have none.
        return h5py.File(path, "r", locking=False)
    except _FAULTS as error:
        state = "truncated" if "truncated" in str(error) else "damaged"
        raise InputError(f"{path} is a {state} HDF5 file: {reason(error)}") from error


class Shard:
    """A shard opened for reading.

    len(): samples. path: absolute. ndim: 2 or 3. channels. sizes: `(N, ndim)` int64, every sample's S in pixels.
    content_hash: SHA-256 (hexadecimal) over pixels, scaling, spacing and source names of all samples in order.
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
        count, found = int(root["count"]), len(file["samples"])
        self.sizes: NDArray[np.int64] = file["sizes"][()].astype(np.int64)
        self.sizes.flags.writeable = False
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

    def _dataset(self, index: int) -> tuple[h5py.Dataset, int]:
        i = operator.index(index)
        require(0 <= i < len(self), f"{self.path}: sample index must be 0 to {len(self) - 1}, got {i}")
        file = self._handle()
        with _naming(f"{self.path}: sample {i}"):
            dataset = file["samples"][f"{i:08d}"]
            require(isinstance(dataset, h5py.Dataset), f"{self.path}: sample {i} must be a dataset")
        return dataset, i

    def info(self, index: int) -> SampleInfo:
        """What the shard says of sample `index`, without reading pixels; `InputError` if it cannot be read."""
        return self._info(*self._dataset(index))

    def _info(self, dataset: h5py.Dataset, i: int) -> SampleInfo:
        with _naming(f"{self.path}: sample {i}"):
            said = dataset.attrs
            info = SampleInfo(
                shape=tuple(int(s) for s in dataset.shape),
                dtype=dataset.dtype.name,
                slope=float(said["slope"]),
                intercept=float(said["intercept"]),
                lo=float(said["lo"]),
                hi=float(said["hi"]),
                spacing=tuple(float(v) for v in np.atleast_1d(said["spacing"])),
                source=_string(said["source"]),
                sha256=_string(said["sha256"]),
            )
        expected = (self.channels, *(int(s) for s in self.sizes[i]))
        require(
            info.shape == expected and info.dtype in DTYPES,
            f"{self.path}: sample {i} ({info.source}) must be {expected} as the index says, of an integer type or "
            f"float32, got {info.shape} {info.dtype}",
        )
        return info

    def source(self, index: int) -> str:
        """The source name of sample `index`."""
        return self.info(index).source

    def read(self, index: int) -> Sample:
        """Sample `index`; `InputError` names file, index and source if a checksum fails or it cannot be decoded."""
        return self._read(*self._dataset(index))[0]

    def _read(self, dataset: h5py.Dataset, i: int) -> tuple[Sample, SampleInfo]:
        info = self._info(dataset, i)
        with _naming(f"{self.path}: sample {i} ({info.source})"):
            pixels = np.asarray(dataset[()])
        pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
        return Sample(pixels, info.slope, info.intercept, info.lo, info.hi, info.spacing, info.source), info


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
                sample, info = shard._read(*shard._dataset(i))
                check_sample(sample)
                add_to_content(content, sample, info.sha256)
                if pixel_digest(sample.pixels) != info.sha256:
                    problems.append(f"{shard.path}: sample {i} ({info.source}) does not match its sha256")
            except (InputError, ValueError) as error:
                text = str(error)
                problems.append(text if str(shard.path) in text else f"{shard.path}: sample {i}: {text}")
            if progress is not None:
                progress(i + 1, len(shard))
        if not problems and content.hexdigest() != shard.content_hash:
            problems.append(f"{shard.path}: names, scaling or spacing do not match content_sha256")
    return problems
