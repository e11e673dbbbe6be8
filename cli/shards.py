"""`coverfast shards`: build, inspect and verify HDF5 shards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from coverfast.shards import Shard

app = typer.Typer(help="Build, inspect and verify HDF5 shards.", no_args_is_help=True)

# info looks at no more samples than this, evenly spread.
_LOOK = 1000


@app.command()
def build(
    sources: Annotated[list[Path], typer.Argument(help="Files or folders: PNG, JPEG, TIFF, NIfTI, npy.")],
    out: Annotated[Path, typer.Option(help="The shard to write.")],
    size: Annotated[
        int | None, typer.Option(help="2D: scale the short side to this many pixels and centre-crop.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="List unreadable files and go on.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing shard.")] = False,
) -> None:
    """Build one shard from image files."""
    from coverfast.ingest import build_shard

    with _progress() as advance:
        report = build_shard(list(sources), out, size=size, skip_bad=skip_bad, overwrite=overwrite, progress=advance)
    for reason in report.skipped:
        print(f"skipped: {reason}", file=sys.stderr)
    notes = [_samples(report.samples), _bytes(report.size_bytes)]
    notes += [f"{len(report.skipped)} unreadable files skipped"] if report.skipped else []
    notes += [f"{report.ignored} other files ignored"] if report.ignored else []
    print(f"{report.path}: {', '.join(notes)}")


@app.command()
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
        facts = list(_facts(opened))
    if not sys.stdout.isatty():  # one unfolded line a fact, for other programs
        print("\n".join(f"{key:<16}{value}" for key, value in facts))
        return
    for key, value in facts:
        table.add_row(key, Text(value))
    Console(highlight=False).print(table)


def _facts(shard: Shard) -> Iterator[tuple[str, str]]:
    from coverfast.shards import VERSION

    count = len(shard)
    looked = [shard.info(i * count // min(count, _LOOK)) for i in range(min(count, _LOOK))]
    partly = f" ({_LOOK} of {count} samples looked at)" if count > _LOOK else ""
    yield "path", str(shard.path)
    yield "format version", str(VERSION)
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
    yield "on disk", _bytes(shard.path.stat().st_size)
    yield "content", shard.content_hash
    yield "preprocessing", ", ".join(f"{key} = {value}" for key, value in shard.preprocessing.items())
    names = [shard.source(i) for i in range(min(count, 3))]
    yield "sources", ", ".join(names) + (", ..." if count > 3 else "")


@app.command()
def verify(shard: Annotated[Path, typer.Argument(help="The shard to check.")]) -> None:
    """Read a shard from end to end and check every checksum and hash; exit code 2 if anything is wrong."""
    from coverfast.shards import Shard
    from coverfast.shards import verify as check

    with _progress() as advance:
        problems = check(shard, lambda done, total: advance("checking", done, total))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        raise typer.Exit(2)
    with Shard(shard) as opened:
        print(f"sound: {_samples(len(opened))}")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield advance


def _span(ends: Iterator[str]) -> str:
    low, high = ends
    return low if low == high else f"{low} to {high}"


def _samples(count: int) -> str:
    return f"{count} sample" + "s" * (count != 1)


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
