"""`coverfast shards phantom` and `atlas`: labelled subjects from a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coverfast.cli.options import ints
from coverfast.cli.shards_progress import progress, samples
from coverfast.disk import byte_count

Count = Annotated[int, typer.Option(min=1, help="Subjects.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the subjects and of the splits.")]
Out = Annotated[str, typer.Option(metavar="FILE", help="The shard to write.")]
Size = Annotated[Any, typer.Option(parser=ints, metavar="INTS", help="Pixels: one number or one an axis.")]
First = Annotated[int, typer.Option(min=0, help="Number of the first subject: other numbers, other subjects.")]
Val = Annotated[float, typer.Option(help="Part of the samples for validation.")]
Test = Annotated[float, typer.Option(help="Part of the samples for testing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing shard.")]


def phantom(
    ndim: Annotated[int, typer.Option(help="2: chest slices with a lesion left or right; 3: heads.")],
    count: Count,
    seed: Seed,
    out: Out,
    size: Size = "128",
    first: First = 0,
    val_fraction: Val = 0.0,
    test_fraction: Test = 0.0,
    overwrite: Overwrite = False,
) -> None:
    """Draw labelled synthetic anatomy as a shard: label maps, and a class for each image."""
    from coverfast.ingest.assembly import file_name
    from coverfast.ingest.phantoms import build_phantoms

    path = file_name(out)
    with progress() as advance:
        build_phantoms(
            path,
            ndim,
            size[0] if len(size) == 1 else size,
            seed=seed,
            indices=range(first, first + count),
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            overwrite=overwrite,
            progress=advance,
        )
    _tell(path, count)


def atlas(
    count: Count,
    seed: Seed,
    out: Out,
    size: Size = "128",
    first: First = 0,
    val_fraction: Val = 0.0,
    test_fraction: Test = 0.0,
    overwrite: Overwrite = False,
) -> None:
    """Draw brain slices with their tissues as a shard, bent and toned from the MNI152 template in nilearn."""
    from coverfast.ingest.assembly import file_name
    from coverfast.ingest.atlas import build_atlas_subjects

    path = file_name(out)
    with progress() as advance:
        build_atlas_subjects(
            path,
            count=count,
            seed=seed,
            size=size[0] if len(size) == 1 else size,
            first=first,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            overwrite=overwrite,
            progress=advance,
        )
    _tell(path, count)


def _tell(path: Path, count: int) -> None:
    print(f"{path}: {samples(count)}, {byte_count(path.stat().st_size)}")
