"""`coverfast bench`: measurements that anyone can rerun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coverfast.cli.options import ints

if TYPE_CHECKING:
    from coverfast.bench.problems import Problem

app = typer.Typer(help="Measure: time, memory and correctness against the usual formulations.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


_VARIANTS = ("coverfast triton", "coverfast torch", "eager A", "eager B", "compiled A", "FlexAttention")
_DTYPES = ("bfloat16", "float16", "float32", "float64")


@app.command()
def mov(
    size: Annotated[Any, typer.Option(parser=ints, metavar="INTS", help="grid, two or three axes")] = "64,64,64",
    window: Annotated[Any, typer.Option(parser=ints, metavar="INTS", help="odd windows, measured one by one")] = "5",
    batch: Annotated[int, typer.Option(min=1)] = 1,
    channels: Annotated[int, typer.Option(min=1)] = 8,
    groups: Annotated[int, typer.Option(min=1)] = 1,
    preset: Annotated[list[str], typer.Option(help="its levels instead of --size ... --groups; repeats")] = [],  # noqa: B006
    against: Annotated[list[str], typer.Option(help=f"on a GPU, of: {', '.join(_VARIANTS)}; repeats")] = [],  # noqa: B006
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "auto",
    dtype: Annotated[str, typer.Option(help="on a GPU: bfloat16, float16, float32 or float64")] = "bfloat16",
    layout: Annotated[str, typer.Option(help="on a GPU: channels_last or contiguous")] = "channels_last",
    repeats: Annotated[int, typer.Option(min=1, help="runs of each variant; the median is shown")] = 5,
    save: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """`mov` against the formulations of today: A (loop over taps), B (unfolded keys), compiled A, FlexAttention.

    On a CPU `impl="torch"` in float32 against A and B, batch 1; on a GPU the Triton kernels, beside their floor.
    """
    import torch

    from coverfast.bench.measure import write_results
    from coverfast.bench.problems import preset_problems, single_problem
    from coverfast.checks import check_choice, check_window, require

    check_choice("device", device, ("cpu", "cuda", "auto"))
    check_choice("dtype", dtype, _DTYPES)
    check_choice("layout", layout, ("channels_last", "contiguous"))
    for name in against:
        check_choice("against", name, _VARIANTS)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    require(device == "cpu" or torch.cuda.is_available(), "device must be one that is there, but torch finds no GPU")
    require(len(size) in (2, 3), f"size must have two or three axes, got {size}")
    require(channels % groups == 0, f"groups must divide the {channels} channels, got {groups}")
    problems = [p for name in preset for p in preset_problems(name)]
    if not preset:
        windows = [check_window(w, len(size)) for w in window]
        problems = [single_problem(size, w, channels, groups, batch) for w in windows]
    if device == "cpu":
        rows = [row for p in problems for row in _mov_on_cpu(p, repeats)]
        if save is not None:
            write_results(save, rows, device)
    else:
        _mov_on_gpu(problems, getattr(torch, dtype), against or _VARIANTS, layout, max(2, repeats), save)


def _mov_on_cpu(problem: Problem, repeats: int) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.table import Table

    from coverfast.bench.measure import where
    from coverfast.bench.mov import compare

    _, channels, *size = problem.shape
    rows = compare(size, problem.window, channels=channels, groups=problem.groups, repeats=repeats)
    title = f"mov (1, {channels}, {', '.join(map(str, size))}), window {problem.window[0]}"
    table = Table(title=f"{title}, groups {problem.groups}, float32")
    for heading in ("variant", "error", "forward s", "fwd + bwd s", "spread s", "extra MB"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name, error, forward, both, spread, peak in rows:
        table.add_row(name, f"{error:.1e}", f"{forward:.3f}", f"{both:.3f}", f"{spread:.3f}", f"{peak:.0f}")
    console = Console()
    console.print(table)
    console.print("error: largest difference from the definition in float64, output and gradients", highlight=False)
    console.print(where(), highlight=False)
    names = ("variant", "error", "forward_s", "both_s", "spread_s", "extra_mb")
    return [{"problem": problem.name, **dict(zip(names, row, strict=True))} for row in rows]


def _mov_on_gpu(
    problems: list[Problem], dtype: Any, names: Sequence[str], layout: str, repeats: int, save: Path | None
) -> None:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from coverfast.bench.gpu import Result, compare, quiet_compiler
    from coverfast.bench.measure import provenance, write_results

    console = Console()
    results: list[Result] = []
    with quiet_compiler():
        for problem in track(problems, "measuring", console=console):
            results += compare(problem, dtype, names, layout, repeats)
            if save is not None:  # as they come: a long comparison may be cut off
                write_results(save, [asdict(r) for r in results], "cuda")
    table = Table(title=f"mov, {str(dtype)[6:]}, {layout}")
    for heading in ("problem", "variant", "error", "forward ms", "fwd + bwd ms", "spread", "of floor", "extra MB"):
        table.add_column(heading, justify="left" if heading in ("problem", "variant") else "right")

    def shown(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    for r in results:
        error = "-" if r.error is None else f"{r.error:.1e}"
        times = (shown(r.forward_ms), shown(r.both_ms) if r.both_ms is not None else r.note, shown(r.spread_ms))
        ratio = None if r.both_ms is None else r.both_ms / r.both_floor_ms
        table.add_row(r.problem, r.variant, error, *times, shown(ratio, 1), shown(r.extra_mb, 0))
    console.print(table)
    console.print(provenance("cuda"), highlight=False)
    failed = [r for r in results if r.variant.startswith("coverfast") and r.note]
    if failed:
        console.print("\n".join(f"{r.problem}: {r.variant}: {r.note}" for r in failed), highlight=False)
        raise typer.Exit(1)


@app.command()
def agree(save: Annotated[Path | None, typer.Option(help="JSON file to write")] = None) -> None:
    """Digits that Triton kernels and `impl="torch"` have in common; needs a GPU or TRITON_INTERPRET=1."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from coverfast.bench.agreement import agreements
    from coverfast.bench.measure import write_results
    from coverfast.checks import require
    from coverfast.kernels import INTERPRETED

    device = "cuda" if torch.cuda.is_available() else "cpu"
    require(device == "cuda" or INTERPRETED, "agree needs a GPU, or TRITON_INTERPRET=1 to interpret the kernels")
    console = Console()
    with console.status("comparing"):
        rows = list(agreements(device))
    table = Table(title="Decimal digits that impl='triton' and impl='torch' have in common")
    for heading in ("problem", "dtype", "out", "dq", "dk"):
        table.add_column(heading, justify="left" if heading in ("problem", "dtype") else "right")
    for r in rows:
        table.add_row(r.problem, r.dtype, *(f"{d:.1f}" for d in (r.out, r.dq, r.dk)))
    console.print(table)
    if save is not None:
        write_results(save, [asdict(r) for r in rows], device)


@app.command()
def tune(
    preset: Annotated[list[str], typer.Option(help="whose finest level; repeats")] = ["paper-2d", "paper-3d"],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or float64")] = "bfloat16",
    level: Annotated[int, typer.Option(min=0, max=4, help="coarse 0 to fine 4")] = 4,
    repeats: Annotated[int, typer.Option(min=1)] = 10,
    save: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Time the launch configurations of `mov` on this GPU: rows a lane serves, taps held at once, tile along x."""
    from itertools import product

    import torch
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from coverfast.bench.gpu import sweep
    from coverfast.bench.measure import write_results
    from coverfast.bench.problems import preset_problems
    from coverfast.checks import check_choice, require

    check_choice("dtype", dtype, _DTYPES)
    require(torch.cuda.is_available(), "tune times kernels on a GPU, but torch finds none")
    console = Console()
    problems = [preset_problems(name)[level] for name in preset]
    jobs = [
        (problem, {"rows": rows, "taps": taps, "tile": max(1, lanes // problem.groups)})
        for problem in problems
        for rows, taps, lanes in product((1, 2, 3, 4), (2, 3, 4, 5, 7), (64, 128))
        if taps <= problem.window[-1]
    ]
    rows: list[dict[str, Any]] = []
    for problem, values in track(jobs, "timing", console=console):
        rows += sweep(problem, getattr(torch, dtype), [values], repeats)
        if save is not None:
            write_results(save, rows, "cuda")
    table = Table(title=f"mov, {dtype}, channels-last: the ten fastest of each")
    for heading in ("problem", "rows", "taps", "tile", "forward ms", "fwd + bwd ms"):
        table.add_column(heading, justify="left" if heading == "problem" else "right")
    for problem in problems:
        of_it = sorted((r for r in rows if r["problem"] == problem.name), key=lambda r: r["both_ms"])
        for r in of_it[:10]:
            numbers = (str(r[n]) for n in ("rows", "taps", "tile"))
            table.add_row(problem.name, *numbers, f"{r['forward_ms']:.3f}", f"{r['both_ms']:.3f}")
    console.print(table)


def _merged(levels: Sequence[str]) -> str:
    """2d 0; 2d 1; 3d 4 as 2d 0, 1; 3d 4."""
    names: dict[str, list[str]] = {}
    for part in "; ".join(levels).split("; "):
        preset, level = part.split(" ", 1)
        names.setdefault(preset, []).append(level)
    return "; ".join(f"{preset} {', '.join(numbers)}" for preset, numbers in names.items())


@app.command()
def static(
    preset: Annotated[list[str], typer.Option(help="whose levels; repeats")] = ["paper-2d", "paper-3d"],  # noqa: B006
    target: Annotated[list[str], typer.Option(help="sm_80, sm_90, sm_100 or gfx942; repeats; default all")] = [],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or float64")] = "bfloat16",
    save: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """What the compiler makes of the kernels that presets use; needs no GPU. Counts, not timings."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from coverfast.bench.measure import write_results
    from coverfast.bench.static import table
    from coverfast.checks import check_choice
    from coverfast.kernels.launch import ARCHITECTURES

    check_choice("dtype", dtype, _DTYPES)
    console = Console()
    with console.status("compiling"):
        rows = table(preset, target or tuple(ARCHITECTURES), getattr(torch, dtype))
    for name in target or tuple(ARCHITECTURES):
        shown = Table(title=f"{name}, channels-last {dtype}")
        for heading in ("kernel", "levels"):
            shown.add_column(heading, no_wrap=heading == "kernel")
        for heading in ("rows", "taps", "regs", "spill", "shared", "a tap", "edges", "loads"):
            shown.add_column(heading, justify="right", no_wrap=heading != "loads")
        lines: dict[tuple[str, ...], list[str]] = {}
        for row in rows:
            if row.target == name:
                counts = ("-" if c is None else f"{c:.1f}" for c in (row.a_tap, row.executed))
                launch = row.shape.split()[0].split("x")
                sizes = map(str, (*launch, row.registers, row.spills, row.shared))
                line = (row.kernel.removeprefix("mov_"), *sizes, *counts, row.loads or "-")
                lines.setdefault(line, []).append(row.levels.replace("paper-", ""))
        for (kernel, *numbers), levels in lines.items():
            shown.add_row(kernel, _merged(levels), *numbers)
        console.print(shown)
    console.print(
        "rows a thread serves, taps of a pass; registers and bytes spilled a thread; bytes shared a program;\n"
        "instructions a tap of the innermost loop, with the rows at both ends of a walk; loads of a pass, in bits",
        highlight=False,
    )
    if save is not None:
        write_results(save, [asdict(row) for row in rows])
