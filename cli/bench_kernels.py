"""`coverfast bench agree | tune | static | launches`: what is known of kernels beside the time of an operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coverfast.cli.options import ints
from coverfast.cli.tables import (
    DTYPES,
    PAPER,
    Device,
    Presets,
    Repeats,
    Save,
    check_axes,
    device_named,
    number,
    print_provenance,
    print_table,
)

if TYPE_CHECKING:
    from coverfast.bench.static import Row


def agree(save: Save = None) -> None:
    """Digits that Triton kernels and `impl="torch"` have in common; needs a GPU or TRITON_INTERPRET=1."""
    import torch
    from rich.console import Console

    from coverfast.bench.agreement import agreements
    from coverfast.bench.provenance import write_results
    from coverfast.checks import require
    from coverfast.kernels import INTERPRETED

    device = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
    require(device == "cuda" or INTERPRETED, "agree needs a GPU, or TRITON_INTERPRET=1 to interpret the kernels")
    with Console().status("comparing"):
        rows = list(agreements(device))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for r in rows:
        digits = " ".join(f"{d:.1f}" for d in r.digits.values())
        lines.setdefault((r.op, r.case, r.layout, ", ".join(r.digits)), {})[r.dtype] = digits
    cells = [(*line, *(by_dtype.get(dtype, "-") for dtype in DTYPES)) for line, by_dtype in lines.items()]
    title = "Decimal digits that impl='triton' and impl='torch' have in common"
    print_table(title, ("op", "case", "layout", "of", *DTYPES), cells, text=4)
    if save is not None:
        write_results(save, "agree", [asdict(r) for r in rows], device)


def tune(
    preset: Presets = PAPER,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bfloat16",
    level: Annotated[int, typer.Option(min=0, max=4, help="coarse 0 to fine 4")] = 4,
    repeats: Repeats = 10,
    save: Save = None,
) -> None:
    """Time the launch configurations of `mov` on this GPU: rows a lane serves, taps held at once, tile along x."""
    from itertools import product

    import torch
    from rich.progress import track

    from coverfast.bench.harness import sweep
    from coverfast.bench.operators import mov_cases
    from coverfast.bench.problems import preset_levels
    from coverfast.bench.provenance import write_results
    from coverfast.checks import check_choice, require

    check_choice("dtype", dtype, DTYPES)
    require(torch.cuda.is_available(), "tune times kernels on a GPU, but torch finds none")
    cases = mov_cases([preset_levels(name)[level] for name in preset], "channels_last")
    jobs = [
        (case, {"rows": rows, "taps": taps, "tile": max(1, lanes // case.level.groups)})
        for case in cases
        for rows, taps, lanes in product((1, 2, 3, 4), (2, 3, 4, 5, 7), (64, 128))
        if taps <= case.level.window[-1]
    ]
    rows: list[dict[str, Any]] = []
    for case, numbers in track(jobs, "timing", transient=True):
        rows.append(sweep(case, getattr(torch, dtype), numbers, repeats))
        if save is not None:
            write_results(save, "tune", rows, "cuda")
    lines = []
    for case in cases:
        timed = [r for r in rows if r["case"] == case.name and not r["note"]]
        for r in sorted(timed, key=lambda r: r["both_ms"])[:10]:
            times = (number(r["forward_ms"]), number(r["both_ms"]))
            lines.append((case.name, *(str(r[name]) for name in ("rows", "taps", "tile")), *times))
    headings = ("case", "rows", "taps", "tile", "forward ms", "fwd + bwd ms")
    print_table(f"mov, {dtype}, channels-last: the ten fastest of each", headings, lines)
    if notes := [r["note"] for r in rows if r["note"]]:
        print(f"{len(notes)} of {len(rows)} launches have no time, the first: {notes[0]}")
        raise typer.Exit(1 if len(notes) == len(rows) else 0)


def static(
    preset: Presets = [],  # noqa: B006
    sizes: Annotated[
        list[Any],
        typer.Option(parser=ints, metavar="INTS", help="finest grid of a pyramid of the paper's widths; repeats"),
    ] = [],  # noqa: B006
    device: Annotated[
        list[str],
        typer.Option("--device", "--target", help="sm_80, sm_90, sm_100 or gfx942; repeats; default all"),
    ] = [],  # noqa: B006
    op: Annotated[list[str], typer.Option(help="operators; repeats; default all that have kernels")] = [],  # noqa: B006
    against: Annotated[
        list[str],
        typer.Option(help="launch numbers to compile beside those of the rules, as rows=1,taps=5; repeats"),
    ] = [],  # noqa: B006
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bfloat16",
    save: Save = None,
) -> None:
    """What the compiler makes of the kernels that presets or sizes use; needs no GPU. Counts, not timings.

    The presets of the paper where neither is given. Launch numbers are rows, taps, tile, tile_y and warps; what they
    leave as it is is not compiled again.
    """
    import torch

    from coverfast.bench.provenance import write_results
    from coverfast.bench.static import compiled
    from coverfast.checks import check_choice
    from coverfast.cli.progress import working
    from coverfast.kernels.launch import ARCHITECTURES

    check_choice("dtype", dtype, DTYPES)
    check_axes(sizes)
    places, targets = [*(preset or ([] if sizes else PAPER)), *sizes], device or tuple(ARCHITECTURES)
    rows: list[Row] = []
    with working("compiling") as tell:
        for row in compiled(places, targets, getattr(torch, dtype), op, against):
            rows.append(row)
            tell(f"{row.target}: {row.kernel}")
            if save is not None:
                write_results(save, "static", [asdict(r) for r in rows])
    for name in targets:
        _show_compiled(f"{name}, channels-last {dtype}", [r for r in rows if r.target == name])
    print(
        "rows a thread serves, taps of a pass; registers and bytes spilled a thread; bytes shared a program;\n"
        "instructions of the kernel, and a tap of the innermost loop over taps, the second time with the rows at both\n"
        "ends of a walk; loads of a pass, or of the kernel, in bits"
    )
    print_provenance()


def _show_compiled(title: str, rows: Sequence[Row]) -> None:
    from coverfast.bench.static import merged

    lines: dict[tuple[str, ...], list[str]] = {}
    for r in rows:
        counts = [r.rows, r.taps, r.registers, r.spills, r.shared, r.body]
        shown = [number(c, 0) for c in counts] + [number(c, 1) for c in (r.a_tap, r.executed)]
        lines.setdefault((" ".join([r.kernel, *r.flags]), r.launch, *shown, r.loads or "-"), []).extend(r.levels)
    headings = ("kernel", "launch", "levels", "rows", "taps", "regs", "spill", "shared", "body", "a tap", "edges")
    cells = [(*line[:2], merged(levels), *line[2:]) for line, levels in lines.items()]
    print_table(title, (*headings, "loads"), cells, text=3)


def launches(
    preset: Presets = PAPER,
    device: Device = "auto",
    limit: Annotated[int | None, typer.Option(min=16, help="pixels an axis at most; default on a CPU 32")] = None,
    save: Save = None,
) -> None:
    """Count the launches of a training step's head, by stage: on a GPU those that ran, on a CPU what they would be.

    On a CPU the Triton kernels are counted with TRITON_INTERPRET=1.
    """
    import torch

    from coverfast.bench.launches import STAGES, head_launches
    from coverfast.bench.problems import preset_levels
    from coverfast.bench.provenance import write_results
    from coverfast.kernels import INTERPRETED

    device = device_named(device)
    gpu = device == "cuda"
    impls = ("torch", "auto") if gpu else ("torch", "triton") if INTERPRETED else ("torch",)
    dtype, limit = torch.bfloat16 if gpu else torch.float32, limit if gpu else limit or 32
    rows = []
    for name in preset:
        counts = [head_launches(preset_levels(name), impl, device, dtype, limit) for impl in impls]
        stages = [*zip(STAGES, *counts, strict=True), ("all", *map(sum, counts))]
        rows += [{"preset": name, "stage": stage, **dict(zip(impls, found, strict=True))} for stage, *found in stages]
    title = f"Launches, {device}" + (f", {limit} px" if limit else "")
    print_table(title, ("preset", "stage", *impls), [tuple(map(str, row.values())) for row in rows], text=2)
    if save is not None:
        write_results(save, "launches", rows, device)
