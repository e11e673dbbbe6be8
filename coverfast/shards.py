"""HDF5 shards, formats v2 and v3: images as they were stored, with scaling and labels, checked from end to end.

`docs/shard-format.md` defines the layout. Every byte that matters lies under a checksum, a shard appears under
its name only when it is complete and was read back, and a reader refuses what it cannot vouch for.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from coverfast import __version__
from coverfast.checks import InputError, check_choice, require
from coverfast.class_tables import ClassTables, LabelTable, table_text, values_of
from coverfast.disk import full_disk, sync_folder
from coverfast.samples import (
    LONGEST_TEXT,
    SPLITS,
    LabelClass,
    Original,
    Sample,
    SampleInfo,
    add_classes_to_content,
    add_to_content,
    check_metadata,
    check_sample,
    encoded,
    pixel_digest,
)
from coverfast.shard_check import Progress, verify
from coverfast.shard_encode import (
    allocate,
    chunk_shape,
    create,
    create_table,
    little_endian,
    most_stored,
    put_metadata,
    put_text,
)
from coverfast.shard_index import FORMAT, LABELLED, PLAIN, VERSION, reason
from coverfast.shard_reader import Shard

__all__ = [
    "COMPRESSIONS",
    "FORMAT",
    "SPLITS",
    "VERSION",
    "LabelClass",
    "Original",
    "Progress",
    "Sample",
    "SampleInfo",
    "Shard",
    "ShardWriter",
    "check_sample",
    "chunk_shape",
    "verify",
]

COMPRESSIONS = ("none", "gzip")
# More than the HDF5 metadata of one sample, its links and the index can take.
_SLACK = 1 << 20


class ShardWriter:
    """Write a shard: `with ShardWriter("a.h5", ndim=2, preprocessing={}) as writer: writer.add(sample)`.

    ndim: 2 or 3. channels: of every sample. None takes them from the first sample. preprocessing: a JSON-able dict
    that downstream can repeat. progress: called with (done, total) while the finished file is checked. compression:
    "none", or "gzip" (level 1), which makes smaller files that are read more slowly. draft: neither
    read back nor synced to the disk, for a file that is only on its way into another shard. label_classes: names of the
    label values that may occur, 0 being "background" unless it is named; target_classes: the targets that may occur, in
    their order; None takes what occurs, values named by their numbers and targets sorted.

    The file grows under a temporary name in the target folder (missing folders are made). Leaving the block
    flushes it to disk, reads all of it back and renames it; an exception removes it. `InputError`: an existing
    target without `overwrite`, a folder that cannot be written, a full disk, no samples, or a sample that is
    not sound, unlike the first one in dimension, channels or in having a label map, or of a class that is not known.
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
        label_classes: LabelTable | None = None,
        target_classes: Sequence[str] | None = None,
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
        self._tables_given = label_classes, target_classes
        ClassTables(*self._tables_given)  # refuses what are no tables
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
        self._tables = ClassTables(*self._tables_given)
        self._classes: list[tuple[str, str]] = []  # SHA-256 of the label map and target of every sample
        self._maps: h5py.Group | None = None
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
        self._tables.admit(
            sample.source, None if sample.labels is None else values_of(sample.labels, sample.source), sample.target
        )
        self._append(sample)

    def _append(self, sample: Sample) -> None:
        with self._writing():
            stored = little_endian(sample.pixels)
            labels = None if sample.labels is None else little_endian(sample.labels)
            sha256, chunks, name = pixel_digest(stored), chunk_shape(stored.shape), self._name()
            # For both at once: HDF5 claims the room of an open dataset's chunks when it likes.
            self._reserve(
                most_stored(stored.shape, chunks, stored.itemsize)
                + (0 if labels is None else most_stored(labels.shape, chunks[1:], labels.itemsize))
            )
            dataset = create(self._samples, name, stored, chunks, gzip=self._compression == "gzip")
            put_metadata(dataset, sample, sha256)
            labels_sha256 = ""
            if labels is not None:
                labels_sha256 = pixel_digest(labels)
                # Label maps are nearly constant: compressed they take next to nothing.
                put_text(
                    create(self._label_maps(), name, labels, chunks[1:], gzip=True), "sha256", labels_sha256.encode()
                )
            self._note(sample, stored.shape, sha256, labels_sha256)

    def _name(self) -> str:
        return f"{len(self):08d}"

    def _label_maps(self) -> h5py.Group:
        assert self._file is not None
        if self._maps is None:
            self._maps = self._file.create_group("labels")
        return self._maps

    def copy(self, shard: Shard, index: int, *, split: str | None = None, group: str | None = None) -> None:
        """Append a sample of another shard, its chunks as they are stored, in the same or another `split` and `group`.

        Label and target come along, and unless this writer was given tables of its own, so do the shard's tables;
        `InputError` if they name a value otherwise. Nothing is decoded here, but for a label map whose shard has
        classes that this writer was not given: a damaged chunk shows when the finished file is read back.
        """
        self._check_open()
        info = shard.info(index)
        changed = group is not None and group != info.group
        info = info._replace(split=info.split if split is None else split, group=info.group if group is None else group)
        check_metadata(info, shard.ndim)
        self._check_like_first(info.shape, info.source)
        self._admit_from(shard, index, info)
        datasets = [d for d in (shard.dataset(index), shard.label_dataset(index)) if d is not None]
        if not all(d.chunks and d.fletcher32 and d.dtype.str[0] in "<|" for d in datasets):
            sample = replace(shard.read(index), split=info.split, group=info.group)
            check_sample(sample)
            self._append(sample)
            return
        with self._writing():
            self._reserve(sum(d.id.get_storage_size() for d in datasets))
            name = self._name()
            self._samples.copy(datasets[0], self._samples, name)
            if len(datasets) > 1:
                self._label_maps().copy(datasets[1], self._label_maps(), name)
            if changed:
                copied = self._samples[name]
                # h5py would write over it by way of a random name, which may stay in the file.
                del copied.attrs["group"]
                put_text(copied, "group", encoded(info.group))
            self._note(info, info.shape, info.sha256, info.labels_sha256)

    def _admit_from(self, shard: Shard, index: int, info: SampleInfo) -> None:
        names = dict(shard.label_classes)
        values = list(names) if names else None
        if values is not None and not self._tables.has_all(values):
            labels = shard.read(index).labels
            assert labels is not None
            values, names = values_of(labels, info.source), {}
        targets = () if self._tables.given_targets else shard.target_classes
        self._tables.admit(info.source, values, info.target, names=names, targets=targets)

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

    def _note(self, said: Sample | SampleInfo, shape: tuple[int, ...], sha256: str, labels_sha256: str) -> None:
        add_to_content(self._content, said, sha256)
        self._classes.append((labels_sha256, said.target))
        self._sizes.append(shape[1:])
        self._scaling.append((said.slope, said.intercept, said.lo, said.hi))
        self._splits.append(SPLITS.index(said.split))
        self.ndim, self.channels, self._first = len(shape) - 1, shape[0], self._first or said.source

    def _reserve(self, count: int) -> None:
        """Claim disk space before HDF5 needs it: HDF5 crashes the process when a flush meets a full disk."""
        assert self._file is not None
        end = self._file.id.get_filesize() + count + _SLACK
        if end > self._reserved:
            allocate(self._descriptor, self._reserved, end - self._reserved)
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
            create_table(self._file, name, table)
        labelled = self._tables.labelled or self._tables.targeted
        if labelled:
            self._write_classes()
        version = LABELLED if labelled else PLAIN
        attributes = {"version": version, "ndim": self.ndim, "channels": self.channels, "count": len(self)}
        for key, value in attributes.items():
            self._file.attrs.create(key, value, dtype="<i8")
        texts = {
            "format": FORMAT,
            "creator": f"coverfast {__version__}",
            "content_sha256": self._content.hexdigest(),
        }
        for key, text in texts.items():
            put_text(self._file, key, text.encode())
        put_text(self._file, "preprocessing", self._preprocessing)
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

    def _write_classes(self) -> None:
        assert self._file is not None
        label_classes, target_classes = self._tables.label_classes, self._tables.target_classes
        if label_classes:
            put_text(self._label_maps(), "classes", table_text(label_classes))
        if self._tables.targeted:
            places = {name: place for place, name in enumerate(target_classes)} | {"": -1}
            table = np.asarray([places[target] for _, target in self._classes], "<i2")
            self._reserve(2 * table.nbytes)
            put_text(create_table(self._file, "targets", table), "classes", table_text(target_classes))
        add_classes_to_content(self._content, self._classes, label_classes, target_classes)

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
