"""Several shards to one, or to several of another size."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coverfast import __version__
from coverfast.checks import InputError, require
from coverfast.class_tables import ClassTables
from coverfast.ingest.assembly import Advance, Item, Report, Target, assemble, file_name, stored_size, stored_tables
from coverfast.ingest.files import PathLike
from coverfast.ingest.partial import Partial
from coverfast.ingest.splits import duplicates, join_groups, split_counts
from coverfast.samples import encoded
from coverfast.shards import SPLITS, VERSION, Shard


@dataclass(frozen=True)
class MergeReport(Report):
    """What `merge_shards` did.

    crossing: duplicates that lie in another split than the image they repeat, so that one split leaks into the other.
    """

    crossing: int


def merge_shards(
    shards: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    shard_size: int | None = None,
    distinct_groups: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    progress: Advance | None = None,
) -> MergeReport:
    """Copy the samples of `shards`, in that order and with their splits, into `out`, chunk by chunk.

    shard_size, overwrite, restart: as in `build_shard`; the new shards get their names when all are complete and read
    back. distinct_groups: groups of one name in different shards are different people (then `shards` must not be parts
    of one data set); the group "sub-01" of SITE.h5 becomes "SITE/sub-01". progress: called with ("scanning", "writing"
    or "checking", samples done, in all). The classes of labels and targets are those of all shards together.
    `InputError`: shards that differ in dimension, channels, preprocessing, in having label maps, or in the name of a
    label value; a group that is in different splits; a shard given twice or as `out`; with distinct_groups, two of one
    file name; and what `Shard` and `ShardWriter` refuse.
    """
    paths = [Path(p) for p in ([shards] if isinstance(shards, str | os.PathLike) else shards)]
    require(len(paths) > 0, "shards must be at least 1 file, got none")
    advance = progress or (lambda stage, done, total: None)
    target = Target(file_name(out), shard_size, overwrite)
    hashes, counts, options, tables = _check_alike(paths, target.out)
    stems: list[str] = [path.stem for path in paths] if distinct_groups else []
    for path in paths if distinct_groups else ():
        require(
            stems.count(path.stem) == 1,
            f"distinct_groups (--distinct-groups) must have shards of different names, got {path.stem} twice",
        )
    settings = {
        "merge": hashes,
        "distinct_groups": stems,
        "shard_size": shard_size,
        "made by": f"coverfast {__version__}, format {VERSION}",
    }
    with Partial(target.out, settings, restart=restart) as partial:
        if (finished := partial.published()) is not None:
            return MergeReport.from_plain(finished)
        target.check()
        known = _Known(sum(counts), distinct_groups, advance)
        for path in paths:
            known.look(path)
        places = ((path, index) for path, count in zip(paths, counts, strict=True) for index in range(count))
        items: Iterator[Item] = (
            (path, index, None, group) for (path, index), group in zip(places, known.groups, strict=True)
        )
        names = assemble(
            partial, target, items, target.parts(known.sizes, stored_tables(**tables)), advance, **options, **tables
        )
        sets, _ = join_groups(known.groups, known.hashes)
        splits = np.array(known.splits, np.uint8)
        count, pairs = duplicates(known.hashes)
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(Shard(path)) for path in paths]
            named = [(_name(opened, counts, a), _name(opened, counts, b)) for a, b in pairs]
        report = MergeReport(
            paths=[target.out.with_name(name) for name in names],
            samples=len(splits),
            size_bytes=sum(partial.draft(number).stat().st_size for number in range(len(names))),
            splits=split_counts(splits, sets),
            duplicates=count,
            duplicate_pairs=named,
            crossing=known.crossing(),
        )
        target.check()
        partial.publish(names, target.stale(names), report.plain())
        return report


def _check_alike(paths: list[Path], out: Path) -> tuple[list[str], list[int], dict[str, Any], dict[str, Any]]:
    """Content hash and number of samples of every shard, what they have in common, and their class tables together."""
    seen: dict[str, Path] = {}
    hashes, counts = [], []
    first: dict[str, Any] = {}
    tables = ClassTables()
    for path in paths:
        real = os.path.realpath(path)
        require(real not in seen, f"{path} must be given once, got it as {seen.get(real)} too")
        require(real != os.path.realpath(out), f"{out} must be another file than the shards to merge, got one of them")
        seen[real] = path
        with Shard(path) as shard:
            said = {"ndim": shard.ndim, "channels": shard.channels, "preprocessing": shard.preprocessing}
            hashes.append(shard.content_hash)
            counts.append(len(shard))
            names, targets = dict(shard.label_classes), shard.target_classes
        first = first or said
        for key, value in said.items():
            require(value == first[key], f"{path} must have {key} = {first[key]} like {paths[0]}, got {value}")
        tables.admit(str(path), list(names) or None, names=names, targets=targets)
    return hashes, counts, first, tables.options()


def _name(shards: list[Shard], counts: list[int], index: int) -> str:
    for shard, count in zip(shards, counts, strict=True):
        if index < count:
            return shard.source(index)
        index -= count
    raise IndexError(index)


class _Known:
    """What is known of the samples of all shards; refuses a group in two splits."""

    def __init__(self, total: int, distinct_groups: bool, advance: Advance) -> None:
        self._total, self._distinct, self._advance = total, distinct_groups, advance
        self._of_group: dict[str, tuple[str, Path]] = {}
        self.hashes: list[bytes] = []
        self.groups: list[str] = []
        self.splits: list[int] = []
        self.sizes: list[int] = []

    def look(self, path: Path) -> None:
        with Shard(path) as shard:
            for index in range(len(shard)):
                info = shard.info(index)
                group = f"{path.stem}/{info.group}" if self._distinct and info.group else info.group
                split, other = self._of_group.setdefault(group, (info.split, path))
                if group and split != info.split:
                    advice = "; distinct_groups=True (--distinct-groups) tells people of one name apart"
                    raise InputError(
                        f"group {info.group} must be in one split, got it in {split} of {other} and in {info.split} "
                        f"of {path}{advice * (other != path)}"
                    )
                self.hashes.append(bytes.fromhex(info.sha256))
                self.groups.append(group)
                self.splits.append(SPLITS.index(info.split))
                self.sizes.append(stored_size(shard, index) + len(encoded(group)) - len(encoded(info.group)))
                self._advance("scanning", len(self.splits), self._total)

    def crossing(self) -> int:
        """Samples with the pixels of an earlier one of another split."""
        first: dict[bytes, int] = {}
        return sum(first.setdefault(key, split) != split for key, split in zip(self.hashes, self.splits, strict=True))
