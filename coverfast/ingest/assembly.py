"""Stored samples, from wherever they lie, into one shard or several."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

from coverfast.checks import require
from coverfast.class_tables import table_text
from coverfast.ingest.partial import Partial, existing_targets, target_names
from coverfast.samples import LabelClass, encoded
from coverfast.shards import Shard, ShardWriter

Advance = Callable[[str, int, int], None]
#: File, index in it, and the split and the group to store; None keeps the one it has.
Item = tuple[Path, int, str | None, str | None]

# What HDF5 adds at most, in bytes: a chunk, a sample or label map (header, attributes, link, rows of the tables), a
# shard, and for label maps or targets.
_A_CHUNK, _A_SAMPLE, _A_SHARD, _A_TABLE = 32, 1280, 8192, 4096


@dataclass(frozen=True)
class Report:
    """What was written.

    paths: the shards, in order. samples: in all of them. size_bytes: of the shards on disk. splits: (samples, groups)
    of every split that is not empty. duplicates: samples with the pixels of an earlier one. duplicate_pairs: the names
    of the first few of them.
    """

    paths: list[Path]
    samples: int
    size_bytes: int
    splits: dict[str, tuple[int, int]]
    duplicates: int
    duplicate_pairs: list[tuple[str, str]]

    def plain(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self) | {"paths": [str(path) for path in self.paths]}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        """The report that `plain` came from."""
        splits = {name: (samples, groups) for name, (samples, groups) in plain["splits"].items()}
        pairs = [(earlier, later) for earlier, later in plain["duplicate_pairs"]]
        paths = [Path(path) for path in plain["paths"]]
        return cls(**plain | {"paths": paths, "splits": splits, "duplicate_pairs": pairs})


@dataclass(frozen=True)
class Target:
    """Where a build or merge writes.

    out: the shard, or the pattern of OUT-00000.h5, OUT-00001.h5, ... if shard_size, the most bytes of a shard, is
    given. overwrite: replace what is there.
    """

    out: Path
    shard_size: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        size = self.shard_size
        ok = size is None or (isinstance(size, int) and not isinstance(size, bool) and size >= 1)
        require(ok, f"shard_size must be a positive number of bytes, got {size!r}")

    def check(self) -> None:
        """Raise `InputError` if there is something that may not be replaced."""
        for path in existing_targets(self.out, self.shard_size is not None):
            require(not path.is_dir(), f"{path} must be a file name, got a folder")
            require(self.overwrite, f"{path} must be a new file, it exists already (overwrite replaces it)")

    def stale(self, names: list[str]) -> list[Path]:
        """Shards of an older build in more parts, which would be read beside the new ones."""
        return [p for p in existing_targets(self.out, self.shard_size is not None) if p.name not in names]

    def parts(self, weights: Iterable[int], tables: int = 0) -> list[int]:
        """How many samples each shard takes, in order, given the bytes of every sample and of the class tables."""
        if self.shard_size is None:
            return [sum(1 for _ in weights)]
        counts, used = [0], _A_SHARD + tables
        for weight in weights:
            if counts[-1] and used + weight > self.shard_size:
                counts.append(0)
                used = _A_SHARD + tables
            counts[-1] += 1
            used += weight
        return counts


def file_name(out: str | os.PathLike[str]) -> Path:
    """`out` as a path; `InputError` if it ends like a folder, which `Path` would forget."""
    text = os.fspath(out)
    require(text[-1:] not in ("", os.sep, os.altsep), f"out must be a file name, got {text!r}")
    return Path(text)


def stored_size(shard: Shard, index: int) -> int:
    """The most bytes that a sample takes in a shard, its label map included."""
    info = shard.info(index)
    size = len(encoded(info.source)) + len(encoded(info.group))
    for dataset in (shard.dataset(index), shard.label_dataset(index)):
        if dataset is not None:
            count = math.prod(-(-s // c) for s, c in zip(dataset.shape, dataset.chunks or dataset.shape, strict=True))
            size += int(dataset.id.get_storage_size()) + count * _A_CHUNK + _A_SAMPLE
    return size


def stored_tables(*, label_classes: Sequence[LabelClass] | None, target_classes: Sequence[str] | None) -> int:
    """The most bytes that the class tables take in a shard; None for no labels or targets."""
    return sum(len(table_text(table)) + _A_TABLE for table in (label_classes, target_classes) if table is not None)


def assemble(
    partial: Partial, target: Target, items: Iterable[Item], counts: list[int], advance: Advance, **options: Any
) -> list[str]:
    """Copy samples chunk by chunk into `len(counts)` finished shards in the partial folder; the names they will have.

    options: those of `ShardWriter`. advance: called with "writing" and "checking".
    """
    total, done, waiting = sum(counts), 0, iter(items)
    with _Opened() as opened:
        for number, count in enumerate(counts):

            def checking(checked: int, _: int, before: int = done) -> None:
                advance("checking", before + checked, total)

            with ShardWriter(partial.draft(number), overwrite=True, progress=checking, **options) as writer:
                for path, index, split, group in islice(waiting, count):
                    writer.copy(opened(path), index, split=split, group=group)
                    advance("writing", done + len(writer), total)
            done += count
    return target_names(target.out, len(counts), target.shard_size is not None)


class _Opened:
    """The shard that was asked for last, open."""

    def __init__(self) -> None:
        self._shard: Shard | None = None
        self._path = Path()

    def __call__(self, path: Path) -> Shard:
        if self._shard is None or path != self._path:
            self._close()
            self._shard, self._path = Shard(path), path
        return self._shard

    def _close(self) -> None:
        if self._shard is not None:
            self._shard.close()

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
