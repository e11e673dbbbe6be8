"""`coverfast bench step | data`: a whole training step, and the crops that feed it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coverfast.cli.options import ints
from coverfast.cli.tables import Device, Repeats, Save, check_axes, device_named, number, print_provenance, print_table

if TYPE_CHECKING:
    from coverfast.bench.data import Row
    from coverfast.bench.step import Result


# --- a training step -------------------------------------------------------------------------------------------------


def step(
    preset: Annotated[list[str], typer.Option(help="repeats; default the paper's on a GPU, the small on a CPU")] = [],  # noqa: B006
    sizes: Annotated[
        list[Any],
        typer.Option(parser=ints, metavar="INTS", help="crops, each with every preset; repeats; default the preset's"),
    ] = [],  # noqa: B006
    against: Annotated[
        list[str], typer.Option(help='variants, repeats: "published A", "coverfast eager bfloat16"; see above')
    ] = [],  # noqa: B006
    batch: Annotated[int | None, typer.Option(min=1, help="images or pairs a step; default the preset's")] = None,
    device: Device = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16, of ours where its name has none; default the preset's")
    ] = None,
    repeats: Repeats = 5,
    profile: Annotated[bool, typer.Option("--profile", help="also the time of a step's parts")] = False,
    save: Save = None,
) -> None:
    """A training step as `pretrain` does it, in plain float32, and as published code does it (matching A or B).

    Any of the words after `coverfast` change how ours is done: eager, compiled, graphs, float32, bfloat16, contiguous,
    channels_last, recompute. Published code is in float32 and may have its views `ready`: "published A, views ready".
    The first variant is what the others are compared with. A crop of two axes is for the 2D presets, one of three for
    those in 3D, a single int for both. Published code is that of COVER: a preset of another method is measured in ours
    alone, and pairs count as images.
    """
    import torch

    from coverfast.bench.provenance import write_results
    from coverfast.bench.step import measure
    from coverfast.bench.step_variants import OURS, check_variant, default_variants, problems
    from coverfast.cli.progress import working

    device = device_named(device)
    small = "paper" if device == "cuda" else "small"
    presets = preset or [f"{small}-2d", f"{small}-3d"]
    settings = problems(presets, sizes, batch=batch, precision=dtype, only_fitting=not preset)
    for name in against:
        check_variant(name, settings)
    results: list[Result] = []
    groups: list[list[Result]] = []
    with working("preparing") as tell:
        for s in settings:
            of: dict[str, Any] = {"profile": profile, "tell": tell}
            groups.append(measure(s, against or default_variants(s), torch.device(device), repeats, **of))
            results += groups[-1]
            if save is not None:  # as they come: a long comparison may be cut off
                write_results(save, "step", [asdict(r) for r in results], device)
    for group in groups:
        _show_steps(group)
    print_provenance(device)
    if any(r.note for r in results if r.variant.startswith(OURS)):
        raise typer.Exit(1)


def _show_steps(results: Sequence[Result]) -> None:
    first, rows, shares = results[0], [], []
    for r in results:
        error = f"{max(r.errors.values()):.1e}" if r.errors else "-"
        how = " ".join([r.precision, r.layout, "compiled" if r.compiled else ""])
        times = r.step_ms / first.step_ms if r.step_ms and first.step_ms else None
        more = r.peak_mb / first.peak_mb if r.step_ms and r.peak_mb and first.step_ms and first.peak_mb else None
        rows.append(
            (
                r.variant,
                how.strip(),
                error,
                r.note if r.step_ms is None else number(r.step_ms, 1),
                number(r.spread_ms, 1),
                number(r.images_per_s, 2),
                number(r.peak_mb, 0),
                "-" if r.mfu is None else f"{r.mfu:.1%}",
                number(times, 2),
                number(more, 2),
            )
        )
        if r.parts_ms:
            total = sum(r.parts_ms.values())
            shares.append((r.variant, f"{total:.1f}", *(f"{ms / total:.1%}" for ms in r.parts_ms.values())))
    what = f"{first.preset}, batch {first.batch}, crop {' x '.join(map(str, first.crop))}"
    headings = ("variant", "how", "error", "ms a step", "spread", "images/s", "peak MB", "MFU", "time x", "memory x")
    print_table(f"A training step: {what}", headings, rows, text=2)
    for r in results:
        if r.parts_ms:
            print_table("Its parts, without compilation", ("variant", "ms", *r.parts_ms), shares)
            return


# --- crops -----------------------------------------------------------------------------------------------------------


def data(
    sizes: Annotated[
        list[Any],
        typer.Option(parser=ints, metavar="INTS", help="of images, cropped as in the paper; repeats; default its own"),
    ] = [],  # noqa: B006
    dtype: Annotated[str | None, typer.Option(help="of the stored images; default uint8 in 2D, int16 in 3D")] = None,
    against: Annotated[
        list[str], typer.Option(help='ways to read, by name: "shard, crops", "npy, mapped"; repeats; default all')
    ] = [],  # noqa: B006
    device: Annotated[
        str, typer.Option(help="where crops are delivered: cpu, as stored; cuda, pinned and scaled there; auto")
    ] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="reading processes")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="passes of each way; the median is shown")] = 3,
    formats: Annotated[bool, typer.Option("--formats", help="also other chunk shapes and filters")] = False,
    large: Annotated[bool, typer.Option("--large", help="also crops of 4096^2 and 512^3 images")] = False,
    crops: Annotated[int | None, typer.Option(min=1, help="crops a pass; default 2000 in 2D, 60 in 3D")] = None,
    folder: Annotated[Path | None, typer.Option(help="where to write the images; default a temporary folder")] = None,
    save: Save = None,
) -> None:
    """Random crops a second from shards and from the usual files, and what is read for them; warm and cold cache."""
    import tempfile

    from coverfast.bench.data import measure, measure_large
    from coverfast.bench.data_ways import check_ways, problems
    from coverfast.bench.provenance import write_results
    from coverfast.cli.progress import working

    device = device_named(device)
    check_axes(sizes, least=16)
    chosen = problems(sizes, dtype)
    check_ways(against, chosen, formats)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=folder) as place, working("reading") as tell:

        def found() -> Iterator[Row]:
            of: dict[str, Any] = {"workers": workers, "repeats": repeats, "formats": formats, "crops": crops}
            yield from measure(Path(place), chosen, names=against, device=device, **of)
            if large:
                yield from measure_large(Path(place), dtype, device=device)

        for row in found():
            rows.append(row)
            tell(f"{row.problem}: {row.way}")
            if save is not None:  # as they come: a long comparison may be cut off
                write_results(save, "data", [asdict(r) for r in rows], device)
    for problem in dict.fromkeys(row.problem for row in rows):
        _show_rates([row for row in rows if row.problem == problem])
    print_provenance(device)


def _show_rates(rows: Sequence[Row]) -> None:
    shown = [
        (
            row.way,
            number(row.warm, 0),
            "-" if row.warm_spread is None else f"{row.warm_spread[0]:.0f}-{row.warm_spread[1]:.0f}",
            number(row.cold, 0),
            number(row.stored, 2),
            number(row.read, 2),
            number(row.over, 3),
        )
        for row in rows
    ]
    headings = ("way", "crops/s warm", "range", "cold", "disk/pixels", "MB read a crop", "over chunks")
    of = rows[0]
    crop, size = ("x".join(map(str, v)) for v in (of.crop, of.size))
    to = "scaled on the GPU" if of.device == "cuda" else "as stored"
    print_table(f"{crop} of {size} {of.dtype}, {of.workers} processes, {to}", headings, shown)
