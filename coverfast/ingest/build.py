"""Many files to one shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coverfast.checks import InputError
from coverfast.ingest.files import PathLike, scan
from coverfast.ingest.readers import Unreadable, check_extras, check_size, read_source
from coverfast.shards import ShardWriter


@dataclass(frozen=True)
class BuildReport:
    """What `build_shard` did. samples: written. ignored: files below the folders that are no images by their
    suffix. skipped: why each unreadable file was left out. size_bytes: of the shard on disk.
    """

    path: Path
    samples: int
    ignored: int
    size_bytes: int
    skipped: list[str] = field(default_factory=list)


def build_shard(
    paths: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    size: int | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> BuildReport:
    """Read files and folders (`find_sources`, `read_source`) into one shard at `out`.

    size: 2D only, see `read_source`. skip_bad: leave unreadable files out and list them; otherwise the first one
    stops the build. progress: called with ("reading" or "checking", files done, files in all). `InputError`: also
    for 2D and 3D files in one shard, for no readable file at all, and whatever `ShardWriter` refuses; nothing
    is left behind then.
    """
    check_size(size)
    tell = progress or (lambda stage, done, total: None)
    writer = ShardWriter(
        out,
        preprocessing={"preset": "raw", "size": size},
        overwrite=overwrite,
        progress=lambda done, total: tell("checking", done, total),
    )
    sources, ignored = scan(paths)
    check_extras(sources, size)
    skipped: list[str] = []
    with writer:
        for number, source in enumerate(sources):
            tell("reading", number, len(sources))
            try:
                sample = read_source(source, size)
            except Unreadable as error:
                if not skip_bad:
                    raise
                skipped.append(str(error))
                continue
            writer.add(sample)
        tell("reading", len(sources), len(sources))
        if len(skipped) == len(sources):
            raise InputError(f"at least 1 file must be readable, got none of {len(sources)}: {skipped[0]}")
    return BuildReport(writer.path, len(sources) - len(skipped), ignored, writer.path.stat().st_size, skipped)
