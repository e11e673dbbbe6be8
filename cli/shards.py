"""`coverfast shards`: build, inspect, verify, merge and look at HDF5 shards."""

from __future__ import annotations

import inspect
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coverfast.checks import printable, require
from coverfast.disk import byte_count
from coverfast.ingest.presets import PRESETS, Parameter

if TYPE_CHECKING:
    from coverfast.ingest import BuildReport, MergeReport
    from coverfast.shards import Shard

app = typer.Typer(help="Build, inspect, verify, merge and look at HDF5 shards.", no_args_is_help=True)

# info looks at no more samples than this, evenly spread.
_LOOK = 1000
#: Seconds between lines where there is no terminal to draw a bar on.
_SECONDS = 15.0
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def byte_size(text: str) -> int:
    """`4GB`, `512MiB`, `1000000`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?))?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise typer.BadParameter(f"expected a number of bytes such as 4GB or 512MiB, got {text!r}")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _UNITS[(unit or "").upper()])


def _with_presets(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for every parameter of a preset; it receives those that were given as `chosen`."""
    users: dict[str, dict[str, Parameter]] = {}
    for preset, parameters in PRESETS.items():
        for name, parameter in parameters.items():
            users.setdefault(name, {})[preset] = parameter

    def wrapped(**values: Any) -> None:
        chosen = {name: values.pop(name) for name in users}
        command(chosen={name: value for name, value in chosen.items() if value is not None}, **values)

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "chosen"]
    flags = [_flag(name, found) for name, found in users.items()]
    signature = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *flags)]
    wrapped.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in signature}
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


def _flag(name: str, users: dict[str, Parameter]) -> inspect.Parameter:
    first = next(iter(users.values()))
    lines = [f"{preset}: {p.help}{_default(p)}" for preset, p in users.items()]
    extra: dict[str, Any] = {"help": "\n\n".join(lines), "show_default": False, "rich_help_panel": "Preset parameters"}
    flag = f"--{name.replace('_', '-')}"
    if first.count > 1:
        kind = first.kind
        metavar = ",".join(["INT" if kind is int else "NUMBER"] * first.count)
        annotation: Any = Annotated[Any, typer.Option(flag, parser=_numbers(kind), metavar=metavar, **extra)]
    else:
        annotation = Annotated[first.kind | None, typer.Option(flag, **extra)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _default(parameter: Parameter) -> str:
    value = parameter.default
    if value is None:
        return ""
    return f" (default {','.join(f'{v:g}' for v in value) if isinstance(value, tuple) else value})"


def _numbers(kind: Any) -> Callable[[str], tuple[Any, ...]]:
    def numbers(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise typer.BadParameter(f"expected numbers with commas between, got {text!r}") from None

    return numbers


_OUT = "The shard to write; with --shard-size OUT-00000.h5, OUT-00001.h5, ..."
ShardSize = Annotated[
    Any, typer.Option(parser=byte_size, metavar="SIZE", help="Several shards of at most this size, e.g. 4GB.")
]
Out = Annotated[str, typer.Option(metavar="FILE", help=_OUT)]  # no Path, which forgets the slash of a folder
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing shards.")]
Restart = Annotated[bool, typer.Option("--restart", help="Forget an unfinished run in OUT.partial.")]


@app.command()
@_with_presets
def build(
    chosen: dict[str, Any],
    sources: Annotated[
        list[Path],
        typer.Argument(help="Files or folders: NIfTI, DICOM, NRRD, MetaImage, PNG, JPEG, TIFF, npy, npz."),
    ],
    out: Out,
    preset: Annotated[str, typer.Option(help=f"What is done to the images: {', '.join(PRESETS)}.")] = "raw",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes; default all cores but one, 0 works in this one.")
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="Part of the samples, in whole groups, for validation.")] = 0.0,
    test_fraction: Annotated[float, typer.Option(help="Part of the samples, in whole groups, for testing.")] = 0.0,
    split_seed: Annotated[int, typer.Option(min=0, help="Another seed draws other splits.")] = 0,
    group: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Patient in a file's name: the first group, else the match."),
    ] = None,
    volume: Annotated[int | None, typer.Option(min=0, help="Which volume of a 4D image.")] = None,
    ndim: Annotated[int | None, typer.Option(help="2 or 3: leave images of the other dimension out.")] = None,
    shard_size: ShardSize = None,
    compression: Annotated[str, typer.Option(help="none or gzip (smaller files, read more slowly).")] = "none",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="List unreadable files and go on.")] = False,
    overwrite: Overwrite = False,
    restart: Restart = False,
    no_disk_check: Annotated[
        bool, typer.Option("--no-disk-check", help="Start even if the disk seems too small.")
    ] = False,
) -> None:
    """Build shards from image files, in parallel.

    Stopped or killed, the same command goes on where it was: finished samples wait in OUT.partial.
    """
    from coverfast.ingest import build_shard, preprocessing

    settings = preprocessing(preset, **chosen)
    try:
        with _progress() as advance:
            report = build_shard(
                list(sources),
                out,
                preprocessing=settings,
                workers=workers,
                val_fraction=val_fraction,
                test_fraction=test_fraction,
                split_seed=split_seed,
                group=group,
                volume=volume,
                ndim=ndim,
                shard_size=shard_size,
                compression=compression,
                skip_bad=skip_bad,
                overwrite=overwrite,
                restart=restart,
                disk_check=not no_disk_check,
                progress=advance,
                note=lambda text: print(text, flush=True),
            )
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(130)
    for reason in report.skipped:
        print(f"skipped: {printable(reason)}", file=sys.stderr)
    notes = [f"{report.kept} of an earlier run"] if report.kept else []
    notes += [f"{len(report.skipped)} unreadable files skipped"] if report.skipped else []
    notes += [f"{report.unwanted} images of another dimension left out"] if report.unwanted else []
    notes += [f"{report.ignored} other files ignored"] if report.ignored else []
    _tell(report, notes)


@app.command()
def merge(
    shards: Annotated[list[Path], typer.Argument(help="The shards to merge, in this order; files, folders, globs.")],
    out: Out,
    shard_size: ShardSize = None,
    distinct_groups: Annotated[
        bool,
        typer.Option(
            "--distinct-groups",
            help="Groups of one name in different shards are different people: sub-01 of SITE.h5 becomes SITE/sub-01.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    restart: Restart = False,
) -> None:
    """Merge shards of one kind into one, or cut them to another size, without decoding."""
    from coverfast.ingest import merge_shards
    from coverfast.shard_set import find_shards

    with _progress() as advance:
        report = merge_shards(
            [path for given in shards for path in find_shards(given)],  # what is given twice shows
            out,
            shard_size=shard_size,
            distinct_groups=distinct_groups,
            overwrite=overwrite,
            restart=restart,
            progress=advance,
        )
    _tell(report, [])
    if report.crossing:
        print(f"warning: {report.crossing} of the duplicates lie in another split than the image they repeat")


def _tell(report: BuildReport | MergeReport, notes: list[str]) -> None:
    first, last = report.paths[0], report.paths[-1]
    names = str(first) if len(report.paths) == 1 else f"{first} to {last.name}"
    print(f"{printable(names)}: {', '.join([_samples(report.samples), byte_count(report.size_bytes), *notes])}")
    if len(report.splits) > 1:
        parts = [
            f"{name} {_samples(samples)} of {groups} group" + "s" * (groups != 1)
            for name, (samples, groups) in report.splits.items()
        ]
        print(f"splits: {', '.join(parts)}")
    if report.duplicates:
        pairs = [printable(f"{later} = {earlier}") for earlier, later in report.duplicate_pairs]
        more = ", ..." if report.duplicates > len(pairs) else ""
        print(f"duplicates: {_samples(report.duplicates)} with the pixels of an earlier one: {', '.join(pairs)}{more}")


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
        facts = [(key, printable(value)) for key, value in _facts(opened)]
    if not sys.stdout.isatty():  # one unfolded line a fact, for other programs
        print("\n".join(f"{key:<16}{value}" for key, value in facts))
        return
    for key, value in facts:
        table.add_row(key, Text(value))
    Console(highlight=False).print(table)


def _facts(shard: Shard) -> Iterator[tuple[str, str]]:
    from coverfast.shards import SPLITS, VERSION

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
    yield "splits", ", ".join(f"{name} {(shard.splits == i).sum()}" for i, name in enumerate(SPLITS))
    yield "groups", _groups([i.group for i in looked]) + partly
    stored = [shard.dataset(i * count // len(looked)) for i in range(len(looked))]
    yield "chunks", ", ".join(sorted({"x".join(map(str, d.chunks or d.shape)) for d in stored})) + partly
    yield "compression", ", ".join(sorted({d.compression or "none" for d in stored})) + partly
    yield "on disk", byte_count(shard.path.stat().st_size)
    yield "content", shard.content_hash
    yield "preprocessing", ", ".join(f"{key} = {value}" for key, value in shard.preprocessing.items())
    names = [shard.source(i) for i in range(min(count, 3))]
    yield "sources", ", ".join(names) + (", ..." if count > 3 else "")


@app.command()
def verify(shards: Annotated[list[Path], typer.Argument(help="The shards to check; files, folders, globs.")]) -> None:
    """Read shards from end to end and check every checksum and hash; exit code 2 if anything is wrong."""
    from coverfast.shard_set import find_shards
    from coverfast.shards import Shard
    from coverfast.shards import verify as check

    failed = False
    paths = find_shards(shards)
    for path in paths:
        with _progress() as advance:
            problems = check(path, lambda done, total, advance=advance: advance("checking", done, total))  # type: ignore[misc]
        for problem in problems:
            print(f"error: {printable(problem)}", file=sys.stderr)
        failed = failed or bool(problems)
        if not problems:
            with Shard(path) as opened:
                print(f"sound: {_samples(len(opened))}" + (f", {printable(str(path))}" if len(paths) > 1 else ""))
    if failed:
        raise typer.Exit(2)


@app.command()
def preview(
    shards: Annotated[list[Path], typer.Argument(help="The shards to look at; files, folders, globs.")],
    out: Annotated[Path, typer.Argument(help="The PNG file to write.")],
    count: Annotated[int, typer.Option(min=1, help="Samples to show, evenly spread.")] = 48,
    split: Annotated[str | None, typer.Option(help="Of this split only: train, val or test.")] = None,
) -> None:
    """Draw a contact sheet of samples as the network sees them."""
    from coverfast.contact_sheet import contact_sheet
    from coverfast.shard_set import find_shards

    require(out.suffix.lower() == ".png", f"out must be a PNG file, got {out}")
    contact_sheet(find_shards(shards), out, count=count, split=split)
    print(out)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar a stage on a terminal; elsewhere, a line now and then."""
    if not sys.stderr.isatty():
        printed = time.monotonic()

        def say(stage: str, done: int, total: int) -> None:
            nonlocal printed
            if time.monotonic() - printed >= _SECONDS:
                printed = time.monotonic()
                print(f"{stage} {done}/{total}", file=sys.stderr, flush=True)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        tasks = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield advance


def _groups(groups: list[str]) -> str:
    named, single = len(set(groups) - {""}), groups.count("")
    parts = [f"{named} named"] if named else []
    return ", ".join(parts + ([_samples(single) + " without one"] if single else []))


def _span(ends: Iterator[str]) -> str:
    low, high = ends
    return low if low == high else f"{low} to {high}"


def _samples(count: int) -> str:
    return f"{count} sample" + "s" * (count != 1)
