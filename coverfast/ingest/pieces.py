"""Finished samples of a build that is under way: a shard of one each, named by all that shapes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from coverfast.checks import InputError
from coverfast.ingest.assembly import stored_size
from coverfast.ingest.files import Source
from coverfast.ingest.presets import preprocess
from coverfast.ingest.readers import Unreadable, read_source
from coverfast.shards import Shard, ShardWriter, verify


class Task(NamedTuple):
    """A source to turn into the piece at `path`; number: its place among all sources."""

    number: int
    source: Source
    path: Path

    def __str__(self) -> str:
        return str(self.source.path)


class Piece(NamedTuple):
    """What the shard of a finished sample says of it. size: bytes it takes in a shard. kept: it was there already."""

    ndim: int
    channels: int
    sha256: bytes
    group: str
    size: int
    kept: bool


class Refusal(NamedTuple):
    """Why there is no piece. unreadable: the file is no sound image, and others may well be. unwanted: it is one, of
    another dimension than was asked for.
    """

    text: str
    unreadable: bool = False
    unwanted: bool = False


@dataclass(frozen=True)
class Recipe:
    """How sources become pieces; pickles, for worker processes. What is not sound is made again."""

    preprocessing: dict[str, Any]
    volume: int | None
    compression: str
    ndim: int | None = None

    def key(self, source: Source) -> bytes:
        """128 bits of SHA-256 over the source, size and time of its files, and the recipe."""
        said = [source.name, source.group, vars(self), [_state(path) for path in source.files]]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode("utf-8", "surrogatepass")).digest()[:16]

    def __call__(self, task: Task) -> Piece | Refusal:
        """Make the piece, or look at the one that is there."""
        if task.path.exists() and (piece := _look(task, kept=True)):
            return piece
        try:
            read = read_source(task.source, volume=self.volume)
            if self.ndim not in (None, read.pixels.ndim - 1):
                return Refusal(f"{task} is {read.pixels.ndim - 1}D", unwanted=True)
            sample = preprocess(read, self.preprocessing)
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
            return Piece(shard.ndim, shard.channels, digest, info.group, stored_size(shard, 0), kept)
    except (InputError, ValueError):
        return None


def remove_damaged(paths: Sequence[Path]) -> int:
    """Remove pieces that do not read back, as after a power failure, and return their number."""
    damaged = [path for path in paths if verify(path)]
    for path in damaged:
        path.unlink(missing_ok=True)
    return len(damaged)
