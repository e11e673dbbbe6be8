"""HDF5 shards, format v1: images as they were stored, with their scaling, checked from end to end.

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
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from coverfast import __version__
from coverfast.checks import InputError, require
from coverfast.disk import full_disk, sync_folder
from coverfast.samples import LONGEST_TEXT, Sample, SampleInfo, add_to_content, check_sample, encoded, pixel_digest
from coverfast.shard_reader import FORMAT, VERSION, Progress, Shard, reason, verify

__all__ = [
    "FORMAT",
    "VERSION",
    "Progress",
    "Sample",
    "SampleInfo",
    "Shard",
    "ShardWriter",
    "check_sample",
    "verify",
]

# More than the HDF5 metadata of one sample, its links and the index can take.
_SLACK = 1 << 20


class ShardWriter:
    """Write a shard: `with ShardWriter("a.h5", ndim=2, preprocessing={}) as writer: writer.add(sample)`.

    ndim: 2 or 3. channels: of every sample. None takes them from the first sample. preprocessing: a JSON-able dict
    that downstream can repeat. progress: called with (done, total) while the finished file is checked.

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
    ) -> None:
        require(ndim in (None, 2, 3), f"ndim must be 2 or 3, got {ndim!r}")
        require(channels is None or channels >= 1, f"channels must be at least 1, got {channels!r}")
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
        self._overwrite, self._progress = overwrite, progress
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

    def add(self, sample: Sample) -> None:
        """Append a sample; `InputError` names its source. After a sample is refused, others may follow."""
        require(self._file is not None and not self._broken, f"{self.path} must be open for writing (use `with`)")
        check_sample(sample)
        channels, ndim = sample.pixels.shape[0], sample.pixels.ndim - 1
        like = f" like {self._first}" if self._first else ""
        require(self.ndim in (None, ndim), f"{sample.source} must be {self.ndim}D{like}, got {ndim}D")
        require(
            self.channels in (None, channels),
            f"{sample.source} must have {self.channels} channels{like}, got {channels}",
        )
        self._broken = True
        with self._refusing():
            self._write(sample)
        self._broken = False
        self.ndim, self.channels, self._first = ndim, channels, self._first or sample.source

    def _write(self, sample: Sample) -> None:
        stored = np.ascontiguousarray(sample.pixels, sample.pixels.dtype.newbyteorder("<"))
        sha256 = pixel_digest(stored)
        edge = 128 if stored.ndim == 3 else 32
        chunks = (1, *(min(edge, size) for size in stored.shape[1:]))
        count = stored.shape[0] * math.prod(-(-s // c) for s, c in zip(stored.shape[1:], chunks[1:], strict=True))
        # Deflate may add a few bytes to a chunk that does not compress; the index takes some more.
        self._reserve(count * (math.prod(chunks) * stored.itemsize * 1001 // 1000 + 256))
        dataset = self._samples.create_dataset(
            f"{len(self._sizes):08d}",
            data=stored,
            chunks=chunks,
            compression="gzip",
            compression_opts=1,
            shuffle=stored.itemsize > 1,
            fletcher32=True,
        )
        for key in ("slope", "intercept", "lo", "hi"):
            dataset.attrs.create(key, getattr(sample, key), dtype="<f8")
        dataset.attrs.create("spacing", sample.spacing, dtype="<f8")
        self._put_text(dataset, "source", encoded(sample.source))
        self._put_text(dataset, "sha256", sha256.encode())
        add_to_content(self._content, sample, sha256)
        self._sizes.append(stored.shape[1:])

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
        sizes = np.asarray(self._sizes, "<i8")
        self._reserve(2 * sizes.nbytes)
        rows = (min(len(sizes), 65536), sizes.shape[1])
        self._file.create_dataset(
            "sizes", data=sizes, chunks=rows, compression="gzip", compression_opts=1, shuffle=True, fletcher32=True
        )
        attributes = {"version": VERSION, "ndim": self.ndim, "channels": self.channels, "count": len(sizes)}
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
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._file, self._descriptor = None, -1
        problems = verify(self._temporary, self._progress)
        if problems:
            raise InputError(f"{self.path} does not read back as it was written: {problems[0]}")
        self._check_target()
        self._temporary.replace(self.path)
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
