"""Many files to shards: in parallel, resumable, in an order that depends on nothing but the files."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coverfast import __version__
from coverfast.checks import InputError, check_choice, require
from coverfast.disk import byte_count
from coverfast.ingest.assembly import Advance, Report, Target, assemble, file_name, stored_tables
from coverfast.ingest.files import PathLike, Source, scan
from coverfast.ingest.labels import Annotations
from coverfast.ingest.partial import Partial, hold
from coverfast.ingest.pieces import Pieces, Recipe, Task, bad_file, remove_damaged
from coverfast.ingest.presets import preprocessing as complete
from coverfast.ingest.splits import check_fractions, draw_splits, duplicates, split_counts
from coverfast.ingest.workers import Workers, worker_count
from coverfast.shards import COMPRESSIONS, SPLITS, VERSION

# So many sources, evenly spread, are read first to estimate what the build takes on the disk.
_PROBES = 8
# What a file of its own adds to a finished sample, by measurement up to 6,865 bytes where blocks are of 4 KiB; and how
# far the estimate may be off.
_A_PIECE, _MARGIN = 7168, 1.1


@dataclass(frozen=True)
class BuildReport(Report):
    """What `build_shard` did.

    kept: samples that an earlier run had finished. ignored: files below the folders that are no images. unwanted:
    images of another dimension than asked for. skipped: why each unreadable file was left out.
    """

    kept: int
    ignored: int
    unwanted: int
    skipped: list[str]


def build_shard(
    paths: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    preprocessing: dict[str, Any],
    labels: PathLike | Sequence[PathLike] | None = None,
    label_table: PathLike | None = None,
    classes: PathLike | None = None,
    workers: int | None = None,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    split_seed: int = 0,
    group: str | None = None,
    volume: int | None = None,
    ndim: int | None = None,
    shard_size: int | None = None,
    compression: str = "none",
    skip_bad: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    disk_check: bool = True,
    progress: Advance | None = None,
    note: Callable[[str], None] | None = None,
) -> BuildReport:
    """Read files and folders (`scan`, `read_source`), preprocess them and write the shard `out`, all or nothing.

    preprocessing: from `coverfast.ingest.presets.preprocessing`. labels: files and folders of label maps, matched with
    the images by name (`labels.find_maps`), each on the grid of its image (`label_maps.read_map`), brought to the
    shard's grid by nearest pixel. label_table: a CSV file of value,name, of all values that there may be; without it
    the classes are the values that there are. classes: a CSV file of name,class for the images
    (`labels.find_targets`).

    workers: processes, by default all cores but one; 0 works in this one. val_fraction, test_fraction, split_seed:
    see `draw_splits`; what has no group by itself gets it from the regular expression `group`, see `scan`. volume:
    which of a 4D image. ndim: 2 or 3, leave images of the other dimension out. shard_size: bytes; then the result
    is OUT-00000.h5, OUT-00001.h5, ..., each at most that large unless a single sample is larger. compression: see
    `ShardWriter`. skip_bad: leave unreadable files out and list them; otherwise the first one stops the build.
    progress: called with ("scanning", "reading", "writing" or "checking", done, in all). note: called with
    sentences for the user.

    Finished samples lie in OUT.partial until the end. After a kill at any instant, a full disk or a bad file, the same
    call goes on from there; other settings are refused unless `restart` throws those samples away. The content depends
    on the files and the settings, not on workers, interruptions or the order of a folder. Memory: 2 KB a sample, tables
    of HDF5 of up to 50 MB, and what reading one image takes in every worker.

    `InputError`: an `out` that ends like a folder; an existing target without `overwrite`, before anything is read;
    another builder at work; no readable file; 2D and 3D files in one shard; too little space on the disk (unless
    disk_check=False); a worker process that was killed; and whatever `scan`, `read_source`, `preprocess` and
    `ShardWriter` refuse.
    """
    advance = progress or (lambda stage, done, total: None)
    tell = note or (lambda text: None)
    check_fractions(val_fraction, test_fraction, split_seed)
    check_choice("compression", compression, COMPRESSIONS)
    require(ndim in (None, 2, 3), f"ndim must be 2 or 3, got {ndim!r}")
    count = worker_count(workers)
    target = Target(file_name(out), shard_size, overwrite)
    given = Annotations(labels, label_table, classes)
    recipe = Recipe(complete(**preprocessing), volume, compression, ndim, given.label_classes)
    settings = {
        "preprocessing": recipe.preprocessing,
        "volume": volume,
        "ndim": ndim,
        "compression": compression,
        "group": group,
        "val_fraction": val_fraction,
        "test_fraction": test_fraction,
        "split_seed": split_seed,
        "shard_size": shard_size,
        **given.settings(),
        "made by": f"coverfast {__version__}, shard format {VERSION}",
    }
    with Partial(target.out, settings, restart=restart) as partial:
        if (finished := partial.published()) is not None:
            return BuildReport.from_plain(finished)
        target.check()
        try:
            return _build(
                partial,
                target,
                recipe,
                _Sources.found(paths, group, skip_bad, advance),
                given,
                draw={"val_fraction": val_fraction, "test_fraction": test_fraction, "seed": split_seed},
                workers=count,
                disk_check=disk_check,
                advance=advance,
                tell=tell,
            )
        except InputError as error:
            if not partial.has_pieces():
                raise
            raise InputError(
                f"{error}; finished samples stay in {partial.folder}, the same command resumes, other settings need "
                "restart=True (--restart)"
            ) from error


@dataclass(frozen=True)
class _Sources:
    """What a scan found, and what to do with what cannot be read."""

    sources: list[Source]
    ignored: int
    refused: list[str]
    skip_bad: bool

    @classmethod
    def found(
        cls, paths: PathLike | Sequence[PathLike], group: str | None, skip_bad: bool, advance: Advance
    ) -> _Sources:
        found = scan(paths, group=group, progress=lambda done, total: advance("scanning", done, total))
        if found.refused and not skip_bad:
            raise InputError(bad_file(found.refused[0]))
        return cls(found.sources, found.ignored, found.refused, skip_bad)


def _build(
    partial: Partial,
    target: Target,
    recipe: Recipe,
    found: _Sources,
    given: Annotations,
    *,
    draw: dict[str, Any],
    workers: int,
    disk_check: bool,
    advance: Advance,
    tell: Callable[[str], None],
) -> BuildReport:
    matched = given.match(found.sources, tell)
    sources = matched.images
    # As far as groups alone tell: a fraction that nothing can meet must not show after hours of reading.
    if sources:
        draw_splits([s.group for s in sources], [b"%d" % i for i in range(len(sources))], **draw)
        if (draw["val_fraction"] or draw["test_fraction"]) and not any(s.group for s in sources):
            tell(
                "no groups are known: every image counts as a patient of its own; group=REGEX (--group) finds patients "
                "in file names"
            )
    keys = [recipe.key(source, *matched.of(i)) for i, source in enumerate(sources)]
    pieces = Pieces(len(sources), found.skip_bad, advance)
    spread = sorted({i * len(sources) // _PROBES for i in range(_PROBES)} if sources else set())
    probes = set(spread)
    rest = (i for i in range(len(sources)) if i not in probes)

    def tasks(numbers: Iterable[int]) -> Iterable[Task]:
        return (Task(i, sources[i], partial.piece(keys[i]), *matched.of(i)) for i in numbers)

    advance("reading", 0, len(sources))
    with Workers(min(workers, len(sources)), recipe, functools.partial(hold, partial.held_by_workers)) as pool:
        for task, result in pool.map(tasks(spread)):
            pieces.take(task, result)
        missing = sum(not partial.piece(key).exists() for key in keys)
        _check_disk(target.out, partial, pieces.mean_size(), missing, len(sources), disk_check, tell)
        for task, result in pool.map(tasks(rest)):
            pieces.take(task, result)

    good = pieces.good()
    skipped = [*found.refused, *(pieces.skipped[i] for i in sorted(pieces.skipped))]
    require(
        len(good) > 0,
        f"at least 1 image must be readable, got none of {len(sources) + len(found.refused)}: {''.join(skipped[:1])}",
    )
    hashes = [pieces.hashes[i] for i in good]
    splits, sets = draw_splits([pieces.groups[i] for i in good], hashes, **draw)
    count, pairs = duplicates(hashes)
    at = [partial.piece(keys[i]) for i in good]
    # Of all samples, for the shards of a set must agree.
    tables: dict[str, Any] = {
        "label_classes": (given.label_classes or pieces.classes()) if matched.maps else None,
        "target_classes": given.target_classes,
    }
    try:
        names = assemble(
            partial,
            target,
            ((path, 0, SPLITS[split], None) for path, split in zip(at, splits, strict=True)),
            target.parts((int(pieces.sizes[i]) for i in good), stored_tables(**tables)),
            advance,
            preprocessing=recipe.preprocessing,
            compression=recipe.compression,
            **tables,
        )
    except InputError as error:
        if damaged := remove_damaged(at):
            raise InputError(f"{damaged} finished samples do not read back and were removed ({error})") from error
        raise
    report = BuildReport(
        paths=[target.out.with_name(name) for name in names],
        samples=len(good),
        kept=pieces.kept,
        ignored=found.ignored,
        unwanted=pieces.unwanted,
        size_bytes=sum(partial.draft(number).stat().st_size for number in range(len(names))),
        skipped=skipped,
        splits=split_counts(splits, sets),
        duplicates=count,
        duplicate_pairs=[(sources[good[a]].name, sources[good[b]].name) for a, b in pairs],
    )
    target.check()
    partial.publish(names, target.stale(names), report.plain())
    return report


def _check_disk(
    out: Path, partial: Partial, mean: float, missing: int, total: int, check: bool, tell: Callable[[str], None]
) -> None:
    """Say what the build takes, and refuse it where that is not there."""
    free = shutil.disk_usage(partial.folder).free
    size, more = mean * total, (mean + _A_PIECE) * missing
    need = round((size + more) * _MARGIN)
    tell(
        f"{total:,} sample{'s' * (total != 1)} take about {byte_count(size)}, {byte_count(more)} more while "
        f"they are built; {byte_count(free)} are free"
    )
    require(
        need <= free or not check,
        f"{out} must have about {byte_count(need)} of disk to be built, got {byte_count(free)} free; "
        "disk_check=False (--no-disk-check) starts all the same",
    )
