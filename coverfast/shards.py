"""HDF5 shards, format v2: images as they were stored, with their scaling, checked from end to end.

`docs/shard-format.md` defines the layout. Every byte that matters lies under a checksum, a shard appears under
its name only when it is complete and was read back, and a reader refuses what it cannot vouch for.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from coverfast import __version__
from coverfast.checks import InputError, check_choice, require
from coverfast.disk import full_disk, sync_folder
from coverfast.samples import (
    LONGEST_TEXT,
    SPLITS,
    Original,
    Sample,
    SampleInfo,
    add_to_content,
    check_metadata,
    check_sample,
    encoded,
    pixel_digest,
)
from coverfast.shard_reader import FORMAT, VERSION, Progress, Shard, reason, verify

__all__ = [
    "COMPRESSIONS",
    "FORMAT",
    "SPLITS",
    "VERSION",
    "Original",
    "Progress",
    "Sample",
    "SampleInfo",
    "Shard",
    "ShardWriter",
    "check_sample",
    "verify",
]

COMPRESSIONS = ("none", "gzip")
# More than the HDF5 metadata of one sample, its links and the index can take.
_SLACK = 1 << 20
# By measurement, bench/results/data-*.json: large enough to spare HDF5 its time a chunk, small enough for a crop.
_EDGE = {2: 256, 3: 32}


class ShardWriter:
    """Write a shard: `with ShardWriter("a.h5", ndim=2, preprocessing={}) as writer: writer.add(sample)`.

    ndim: 2 or 3. channels: of every sample. None takes them from the first sample. preprocessing: a JSON-able dict
    that downstream can repeat. progress: called with (done, total) while the finished file is checked. compression:
    "none", or "gzip" (level 1), which makes smaller files that are read more slowly. draft: neither
    read back nor synced to the disk, for a file that is only on its way into another shard.

    The file grows under a temporary name in the target folder (missing folders are made). Leaving the block
    flushes it to disk, reads all of it back and renames it; an exception removes it. `InputError`: an existing
    target without `overwrite`, a folder that cannot be written, a full disk, no samples, or a sample that is
    not sound or unlike the first one in dimension or channels.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        ndim: int | None = None,
        channels: int | None = None,
        preprocessing: dict[str, Any],
        overwrite: bool = False,
        progress: Progress | None = None,
        compression: str = "none",
        draft: bool = False,
    ) -> None:
        require(ndim in (None, 2, 3), f"ndim must be 2 or 3, got {ndim!r}")
        require(channels is None or channels >= 1, f"channels must be at least 1, got {channels!r}")
        check_choice("compression", compression, COMPRESSIONS)
        try:
            self._preprocessing = json.dumps(preprocessing, sort_keys=True, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise InputError(f"preprocessing must be a JSON-able dict: {error}") from error
        require(
            isinstance(preprocessing, dict) and len(self._preprocessing) <= LONGEST_TEXT,
            f"preprocessing must be a dict of at most {LONGEST_TEXT} bytes of JSON, got {preprocessing!r:.80}",
        )
        self.path = Path(path)
        self.ndim, self.channels = ndim, channels
        self._overwrite, self._progress, self._compression, self._draft = overwrite, progress, compression, draft
        self._file: h5py.File | None = None
        self._descriptor = -1
        self._check_target()

    def _check_target(self) -> None:
        with self._refusing():
            folder = self.path.parent
            require(folder.is_dir() or not folder.exists(), f"{folder} must be a folder, got a file")
            require(not self.path.is_dir(), f"{self.path} must be a file name, got a folder")
            require(
                self._overwrite or not (self.path.exists() or self.path.is_symlink()),
                f"{self.path} must be a new file, it exists already (overwrite replaces it)",
            )

    def __enter__(self) -> ShardWriter:
        self._first = ""
        self._broken = False
        self._reserved = 0
        self._sizes: list[tuple[int, ...]] = []
        self._scaling: list[tuple[float, ...]] = []
        self._splits: list[int] = []
        self._content = hashlib.sha256()
        self._temporary = self.path.parent / f".{self.path.name[:64]}.{uuid.uuid4().hex[:12]}.part"
        try:
            with self._refusing():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
                self._descriptor = os.open(self._temporary, flags, 0o666)
                # The oldest layout with checksums on all metadata; "latest" of HDF5 2.0 shuts out HDF5 1.14.
                # No lock: nobody else knows the name, and some network file systems have none.
                self._file = h5py.File(self._temporary, "w", libver=("v110", "v110"), locking=False)
                self._reserve(0)
                self._samples = self._file.create_group("samples")
        except BaseException:
            self._abort()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abort()
            return
        try:
            with self._refusing():
                self._finish()
        except BaseException:
            self._abort()
            raise

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, sample: Sample) -> None:
        """Append a sample; `InputError` names its source. After a sample is refused, others may follow."""
        self._check_open()
        check_sample(sample)
        self._check_like_first(sample.pixels.shape, sample.source)
        with self._writing():
            stored = np.ascontiguousarray(sample.pixels, sample.pixels.dtype.newbyteorder("<"))
            sha256 = pixel_digest(stored)
            self._encode(stored, sample, sha256)
            self._note(sample, stored.shape, sha256)

    def copy(self, shard: Shard, index: int, *, split: str | None = None, group: str | None = None) -> None:
        """Append a sample of another shard, its chunks as they are stored, in the same or another `split` and `group`.

        Nothing is decoded here: a damaged chunk shows when the finished file is read back.
        """
        self._check_open()
        info = shard.info(index)
        changed = group is not None and group != info.group
        info = info._replace(split=info.split if split is None else split, group=info.group if group is None else group)
        check_metadata(info, shard.ndim)
        self._check_like_first(info.shape, info.source)
        dataset = shard.dataset(index)
        if not (dataset.chunks and dataset.fletcher32 and dataset.dtype.str[0] in "<|"):
            self.add(replace(shard.read(index), split=info.split, group=info.group))
            return
        with self._writing():
            self._reserve(dataset.id.get_storage_size())
            self._samples.copy(dataset, self._samples, f"{len(self):08d}")
            if changed:
                copied = self._samples[f"{len(self):08d}"]
                del copied.attrs[
                    "group"
                ]  # h5py would write over it by way of a random name, which may stay in the file
                self._put_text(copied, "group", encoded(info.group))
            self._note(info, info.shape, info.sha256)

    def _check_open(self) -> None:
        require(self._file is not None and not self._broken, f"{self.path} must be open for writing (use `with`)")

    def _check_like_first(self, shape: tuple[int, ...], source: str) -> None:
        channels, ndim = shape[0], len(shape) - 1
        like = f" like {self._first}" if self._first else ""
        require(self.ndim in (None, ndim), f"{source} must be {self.ndim}D{like}, got {ndim}D")
        require(self.channels in (None, channels), f"{source} must have {self.channels} channels{like}, got {channels}")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        self._broken = True
        with self._refusing():
            yield
        self._broken = False

    def _note(self, said: Sample | SampleInfo, shape: tuple[int, ...], sha256: str) -> None:
        add_to_content(self._content, said, sha256)
        self._sizes.append(shape[1:])
        self._scaling.append((said.slope, said.intercept, said.lo, said.hi))
        self._splits.append(SPLITS.index(said.split))
        self.ndim, self.channels, self._first = len(shape) - 1, shape[0], self._first or said.source

    def _encode(self, stored: NDArray[Any], sample: Sample, sha256: str) -> None:
        chunks = chunk_shape(stored.shape)
        count = stored.shape[0] * math.prod(-(-s // c) for s, c in zip(stored.shape[1:], chunks[1:], strict=True))
        # Deflate may add a few bytes to a chunk that does not compress; the index takes some more.
        self._reserve(count * (math.prod(chunks) * stored.itemsize * 1001 // 1000 + 256))
        packed = {"compression": "gzip", "compression_opts": 1, "shuffle": stored.itemsize > 1}
        squeeze = packed if self._compression == "gzip" else {}
        # All attributes in the object header: eight is where HDF5 would move them to a heap.
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_attr_phase_change(16, 12)
        dataset = self._samples.create_dataset(
            f"{len(self):08d}", data=stored, chunks=chunks, fletcher32=True, dcpl=properties, **squeeze
        )
        dataset.attrs.create("spacing", sample.spacing, dtype="<f8")
        for key in ("source", "group"):
            self._put_text(dataset, key, encoded(getattr(sample, key)))
        self._put_text(dataset, "sha256", sha256.encode())
        if (original := sample.original) is not None:
            dataset.attrs.create("to_original", original.to_original, dtype="<f8")
            dataset.attrs.create("original_shape", original.shape, dtype="<i8")
            if original.affine is not None:
                dataset.attrs.create("original_affine", original.affine, dtype="<f8")
                dataset.attrs.create("original_spacing", original.spacing, dtype="<f8")
                self._put_text(dataset, "original_orientation", original.orientation.encode())

    @staticmethod
    def _put_text(node: h5py.HLObject, key: str, text: bytes) -> None:
        # Variable-length strings live in a heap without checksums.
        node.attrs.create(key, text, dtype=h5py.string_dtype("utf-8", max(1, len(text))))

    def _reserve(self, count: int) -> None:
        """Claim disk space before HDF5 needs it: HDF5 crashes the process when a flush meets a full disk."""
        assert self._file is not None
        end = self._file.id.get_filesize() + count + _SLACK
        if end > self._reserved:
            _allocate(self._descriptor, self._reserved, end - self._reserved)
            self._reserved = end

    def _finish(self) -> None:
        assert self._file is not None
        require(not self._broken, f"{self.path} cannot be finished: a sample was written in part")
        require(len(self._sizes) > 0, f"{self.path} must have at least 1 sample, got 0")
        tables = {
            "sizes": np.asarray(self._sizes, "<i8"),
            "scaling": np.asarray(self._scaling, "<f8"),
            "splits": np.asarray(self._splits, "u1"),
        }
        self._reserve(2 * sum(table.nbytes for table in tables.values()))
        for name, table in tables.items():
            rows = (min(len(self), 65536), *table.shape[1:])
            self._file.create_dataset(
                name, data=table, chunks=rows, compression="gzip", compression_opts=1, shuffle=True, fletcher32=True
            )
        attributes = {"version": VERSION, "ndim": self.ndim, "channels": self.channels, "count": len(self)}
        for key, value in attributes.items():
            self._file.attrs.create(key, value, dtype="<i8")
        texts = {
            "format": FORMAT,
            "creator": f"coverfast {__version__}",
            "content_sha256": self._content.hexdigest(),
        }
        for key, text in texts.items():
            self._put_text(self._file, key, text.encode())
        self._put_text(self._file, "preprocessing", self._preprocessing)
        self._file.flush()
        os.ftruncate(self._descriptor, self._file.id.get_filesize())
        self._file.close()
        if not self._draft:
            os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._file, self._descriptor = None, -1
        problems = [] if self._draft else verify(self._temporary, self._progress)
        if problems:
            raise InputError(f"{self.path} does not read back as it was written: {problems[0]}")
        self._check_target()
        self._temporary.replace(self.path)
        if self._draft:
            return
        with contextlib.suppress(OSError):  # some systems cannot sync a folder; the shard is complete all the same
            sync_folder(self.path.parent)

    def _abort(self) -> None:
        with contextlib.suppress(OSError):  # first of all, where the system lets go of an open file
            self._temporary.unlink()
        if self._file is not None:
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                self._file.close()
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
        self._file, self._descriptor = None, -1
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
                raise full_disk(self.path) from error
            raise InputError(f"{self.path} cannot be written: {reason(error)}") from error


def chunk_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Chunks of an image `(C, *S)`: one channel, as even along each axis as sides of at most `_EDGE` allow."""
    edge = _EDGE[len(shape) - 1]
    return (1, *(-(-s // -(-s // edge)) for s in shape[1:]))


def _allocate(descriptor: int, start: int, count: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, start, count)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.lseek(descriptor, start, os.SEEK_SET)
    while count > 0:
        count -= os.write(descriptor, bytes(min(count, 1 << 20)))
