"""Finished samples of a build that is under way: a shard of one each, named by all that shapes it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from coverfast.checks import InputError, require
from coverfast.class_tables import ClassTables
from coverfast.ingest.assembly import Advance, stored_size
from coverfast.ingest.files import Source
from coverfast.ingest.label_maps import read_map
from coverfast.ingest.presets import preprocess
from coverfast.ingest.readers import Unreadable, read_source
from coverfast.samples import LabelClass
from coverfast.shards import Shard, ShardWriter, verify


class Task(NamedTuple):
    """A source to turn into the piece at `path`; number: its place among all sources. labels, target: of the image."""

    number: int
    source: Source
    path: Path
    labels: Source | None = None
    target: str = ""

    def __str__(self) -> str:
        return str(self.source.path)


class Piece(NamedTuple):
    """What the shard of a finished sample says of it. size: bytes it takes in a shard. kept: it was there already.
    values: of its label map, and 0.
    """

    ndim: int
    channels: int
    sha256: bytes
    group: str
    size: int
    kept: bool
    values: tuple[int, ...] = ()


class Refusal(NamedTuple):
    """Why there is no piece. unreadable: the file is no sound image, and others may well be. unwanted: it is one, of
    another dimension than was asked for.
    """

    text: str
    unreadable: bool = False
    unwanted: bool = False


@dataclass(frozen=True)
class Recipe:
    """How sources become pieces; pickles, for worker processes. What is not sound is made again.

    classes: those that label maps may have, None for any.
    """

    preprocessing: dict[str, Any]
    volume: int | None
    compression: str
    ndim: int | None = None
    classes: tuple[LabelClass, ...] | None = None

    def key(self, source: Source, labels: Source | None = None, target: str = "") -> bytes:
        """128 bits of SHA-256 over the source, size and time of its files and of its label map's, its class, and the
        recipe.
        """
        states = [_state(path) for path in source.files]
        label_states = [_state(path) for path in labels.files] if labels else None
        said = [source.name, source.group, vars(self), states, label_states, target]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode("utf-8", "surrogatepass")).digest()[:16]

    def __call__(self, task: Task) -> Piece | Refusal:
        """Make the piece, or look at the one that is there."""
        if task.path.exists() and (piece := _look(task, kept=True)):
            return piece
        try:
            read = read_source(task.source, volume=self.volume)
            if self.ndim not in (None, read.pixels.ndim - 1):
                return Refusal(f"{task} is {read.pixels.ndim - 1}D", unwanted=True)
            if task.labels:
                labels = read_map(task.labels, read, task.source, volume=self.volume, classes=self.classes)
                read = replace(read, labels=labels)
            sample = replace(preprocess(read, self.preprocessing), target=task.target)
            options: dict[str, Any] = {"preprocessing": self.preprocessing, "compression": self.compression}
            with ShardWriter(task.path, draft=True, overwrite=True, **options) as writer:
                writer.add(sample)
        except Unreadable as error:
            return Refusal(str(error), unreadable=True)
        except InputError as error:
            return Refusal(str(error))
        except MemoryError:
            return Refusal(f"{task} must fit into memory, found too little of it; fewer workers may do")
        return _look(task, kept=False) or Refusal(f"{task.path} does not read back as it was written")


def _state(path: Path) -> tuple[str, int, int]:
    try:
        stat = path.stat()
    except OSError:  # reading it says what is wrong
        return str(path.absolute()), 0, 0
    return str(path.absolute()), stat.st_size, stat.st_mtime_ns


def _look(task: Task, *, kept: bool) -> Piece | None:
    try:
        with Shard(task.path) as shard:
            info = shard.info(0)
            if len(shard) != 1:
                return None
            digest = bytes.fromhex(info.sha256)
            values = tuple(value for value, _ in shard.label_classes)
            return Piece(shard.ndim, shard.channels, digest, info.group, stored_size(shard, 0), kept, values)
    except (InputError, ValueError):
        return None


def remove_damaged(paths: Sequence[Path]) -> int:
    """Remove pieces that do not read back, as after a power failure, and return their number."""
    damaged = [path for path in paths if verify(path)]
    for path in damaged:
        path.unlink(missing_ok=True)
    return len(damaged)


def bad_file(text: str) -> str:
    """The refusal of a file that may be left out."""
    return f"{text}; skip_bad=True (--skip-bad) leaves such files out"


class Pieces:
    """What is known of every piece, in little memory."""

    def __init__(self, total: int, skip_bad: bool, advance: Advance) -> None:
        self._total, self._skip_bad, self._advance = total, skip_bad, advance
        self._first: tuple[Task, Piece] | None = None
        self.sizes = np.zeros(self._total, np.int64)  # 0: no piece
        self.hashes: list[bytes] = [b""] * self._total
        self.groups: list[str] = [""] * self._total
        self.skipped: dict[int, str] = {}
        self._values: set[int] = set()
        self.kept = self.unwanted = self._done = 0

    def take(self, task: Task, result: Piece | Refusal) -> None:
        """Note what became of a task; `InputError`: a bad file unless such are skipped, or one unlike the first."""
        self._done += 1
        self._advance("reading", self._done, self._total)
        number = task.number
        if isinstance(result, Refusal) and result.unwanted:
            self.unwanted += 1
            return
        if isinstance(result, Refusal):
            if not result.unreadable:
                raise InputError(result.text)
            if not self._skip_bad:
                raise InputError(bad_file(result.text))
            self.skipped[number] = result.text
            return
        first, like = self._first or (task, result)
        name, as_first = task.source.path, f"like {first.source.path}"
        require(
            result.ndim == like.ndim,
            f"{name} must be {like.ndim}D {as_first}, got {result.ndim}D; ndim={like.ndim} (--ndim {like.ndim}) leaves "
            "such images out",
        )
        require(
            result.channels == like.channels,
            f"{name} must have {like.channels} channels {as_first}, got {result.channels}",
        )
        self._first = first, like
        self.sizes[number], self.hashes[number] = result.size, result.sha256
        self.groups[number] = sys.intern(result.group)
        self.kept += result.kept
        self._values.update(result.values)

    def classes(self) -> tuple[LabelClass, ...]:
        """The values of all label maps, named by their numbers."""
        tables = ClassTables()
        tables.admit("all label maps", self._values)
        return tables.label_classes

    def good(self) -> list[int]:
        """The numbers of the sources that have a piece."""
        return [int(i) for i in np.flatnonzero(self.sizes)]

    def mean_size(self) -> float:
        """Bytes that a sample takes in a shard."""
        sizes = self.sizes[self.sizes > 0]
        return float(sizes.mean()) if len(sizes) else 0.0
