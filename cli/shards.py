"""`coverfast shards`: build, inspect, verify, merge and look at HDF5 shards."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coverfast.checks import printable
from coverfast.cli import shards_show, shards_synthetic
from coverfast.cli.shards_progress import progress, samples
from coverfast.disk import byte_count
from coverfast.ingest.presets import PRESETS, Parameter

if TYPE_CHECKING:
    from coverfast.ingest import BuildReport, MergeReport

app = typer.Typer(help="Build, inspect, verify, merge and look at HDF5 shards.", no_args_is_help=True)

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
    labels: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH", help="Label maps: files or folders with the names of the images (FILE_seg, too); repeats."
        ),
    ] = None,
    label_table: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Names of the label values: value,name in each line.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Classes of the images: name,class in each line.")
    ] = None,
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
        with progress() as advance:
            report = build_shard(
                list(sources),
                out,
                preprocessing=settings,
                labels=labels or None,
                label_table=label_table,
                classes=classes,
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

    with progress() as advance:
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
    print(f"{printable(names)}: {', '.join([samples(report.samples), byte_count(report.size_bytes), *notes])}")
    if len(report.splits) > 1:
        parts = [
            f"{name} {samples(count)} of {groups} group" + "s" * (groups != 1)
            for name, (count, groups) in report.splits.items()
        ]
        print(f"splits: {', '.join(parts)}")
    if report.duplicates:
        pairs = [printable(f"{later} = {earlier}") for earlier, later in report.duplicate_pairs]
        more = ", ..." if report.duplicates > len(pairs) else ""
        print(f"duplicates: {samples(report.duplicates)} with the pixels of an earlier one: {', '.join(pairs)}{more}")


app.command()(shards_synthetic.phantom)
app.command()(shards_synthetic.atlas)
app.command()(shards_show.info)
app.command()(shards_show.verify)
app.command()(shards_show.preview)
