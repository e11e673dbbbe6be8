"""`coverfast shards info`, `verify` and `preview`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coverfast.checks import printable, require
from coverfast.cli.shards_progress import progress, samples
from coverfast.disk import byte_count

if TYPE_CHECKING:
    from coverfast.shards import Shard

# info looks at no more samples than this, evenly spread, and at the label maps of no more than that.
_LOOK, _LOOK_AT_LABELS = 1000, 100


def info(shard: Annotated[Path, typer.Argument(help="The shard to describe.")]) -> None:
    """Show what a shard holds."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from coverfast.shards import Shard

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    with Shard(shard) as opened:
        facts = [(key, printable(value)) for key, value in _facts(opened)]
    if not sys.stdout.isatty():  # one unfolded line a fact, for other programs
        print("\n".join(f"{key:<16}{value}" for key, value in facts))
        return
    for key, value in facts:
        table.add_row(key, Text(value))
    Console(highlight=False).print(table)


def _facts(shard: Shard) -> Iterator[tuple[str, str]]:
    from coverfast.shards import SPLITS

    count = len(shard)
    looked = [shard.info(i * count // min(count, _LOOK)) for i in range(min(count, _LOOK))]
    partly = f" ({_LOOK} of {count} samples looked at)" if count > _LOOK else ""
    yield "path", str(shard.path)
    yield "format version", str(shard.version)
    yield "dimension", f"{shard.ndim}D"
    yield "samples", str(count)
    yield "channels", str(shard.channels)
    yield "dtype", ", ".join(sorted({i.dtype for i in looked})) + partly
    yield (
        "size",
        f"{_span('x'.join(map(str, s)) for s in (shard.sizes.min(axis=0), shard.sizes.max(axis=0)))} pixels",
    )
    spacings = [[i.spacing[axis] for i in looked] for axis in range(shard.ndim)]
    yield (
        "spacing",
        _span("x".join(f"{pick(axis):g}" for axis in spacings) for pick in (min, max)) + partly,
    )
    yield "intensity", f"{min(i.lo for i in looked):g} to {max(i.hi for i in looked):g}{partly}"
    yield "splits", ", ".join(f"{name} {(shard.splits == i).sum()}" for i, name in enumerate(SPLITS))
    yield "groups", _groups([i.group for i in looked]) + partly
    if shard.label_classes:
        yield "label classes", _label_classes(shard)
    if shard.target_classes:
        numbers = [*range(len(shard.target_classes)), -1]
        counts = [int((shard.targets == number).sum()) for number in numbers]
        named = list(zip([*shard.target_classes, "none"], counts, strict=True))
        yield "targets", ", ".join(f"{name}: {n}" for name, n in named if n or name != "none")
    stored = [shard.dataset(i * count // len(looked)) for i in range(len(looked))]
    yield "chunks", ", ".join(sorted({"x".join(map(str, d.chunks or d.shape)) for d in stored})) + partly
    yield "compression", ", ".join(sorted({d.compression or "none" for d in stored})) + partly
    yield "on disk", byte_count(shard.path.stat().st_size)
    yield "content", shard.content_hash
    yield "preprocessing", ", ".join(f"{key} = {value}" for key, value in shard.preprocessing.items())
    names = [shard.source(i) for i in range(min(count, 3))]
    yield "sources", ", ".join(names) + (", ..." if count > 3 else "")


def verify(shards: Annotated[list[Path], typer.Argument(help="The shards to check; files, folders, globs.")]) -> None:
    """Read shards from end to end and check every checksum and hash; exit code 2 if anything is wrong."""
    from coverfast.shard_set import find_shards
    from coverfast.shards import Shard
    from coverfast.shards import verify as check

    failed = False
    paths = find_shards(shards)
    for path in paths:
        with progress() as advance:
            problems = check(path, lambda done, total, advance=advance: advance("checking", done, total))  # type: ignore[misc]
        for problem in problems:
            print(f"error: {printable(problem)}", file=sys.stderr)
        failed = failed or bool(problems)
        if not problems:
            with Shard(path) as opened:
                print(f"sound: {samples(len(opened))}" + (f", {printable(str(path))}" if len(paths) > 1 else ""))
    if failed:
        raise typer.Exit(2)


def preview(
    shards: Annotated[list[Path], typer.Argument(help="The shards to look at; files, folders, globs.")],
    out: Annotated[Path, typer.Argument(help="The PNG file to write.")],
    count: Annotated[int, typer.Option(min=1, help="Samples to show, evenly spread.")] = 48,
    split: Annotated[str | None, typer.Option(help="Of this split only: train, val or test.")] = None,
) -> None:
    """Draw a contact sheet of samples as the network sees them."""
    from coverfast.report.contact_sheet import contact_sheet
    from coverfast.shard_set import find_shards

    require(out.suffix.lower() == ".png", f"out must be a PNG file, got {out}")
    contact_sheet(find_shards(shards), out, count=count, split=split)
    print(out)


def _label_classes(shard: Shard) -> str:
    """Every class by value and name, with the part of the samples that have it."""
    import numpy as np

    count = len(shard)
    looked = min(count, _LOOK_AT_LABELS)
    times = np.zeros(len(shard.label_classes), np.int64)
    for i in range(looked):
        times[np.unique(shard.labels(i * count // looked)[0])] += 1
    parts = [f"{c.value} {c.name}: {n / looked:.0%}" for c, n in zip(shard.label_classes, times, strict=True)]
    return ", ".join(parts) + " of samples" + f" ({looked} of {count} looked at)" * (looked < count)


def _groups(groups: list[str]) -> str:
    named, single = len(set(groups) - {""}), groups.count("")
    parts = [f"{named} named"] if named else []
    return ", ".join(parts + ([samples(single) + " without one"] if single else []))


def _span(ends: Iterator[str]) -> str:
    low, high = ends
    return low if low == high else f"{low} to {high}"
