"""`coverfast bench`: measurements that anyone can rerun."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coverfast.cli.options import ints

if TYPE_CHECKING:
    from coverfast.bench.harness import Result
    from coverfast.bench.problems import Level
    from coverfast.bench.step import Result as StepResult

app = typer.Typer(help="Measure: time, memory and correctness against the usual formulations.", no_args_is_help=True)

_DTYPES = ("bfloat16", "float16", "float32", "float64")

Ints = Annotated[Any, typer.Option(parser=ints, metavar="INTS", help="grid, two or three axes")]
Windows = Annotated[Any, typer.Option(parser=ints, metavar="INTS", help="odd windows, measured one by one")]
Count = Annotated[int, typer.Option(min=1)]
Presets = Annotated[list[str], typer.Option(help="its levels, instead of a single grid; repeats")]
Against = Annotated[list[str], typer.Option(help="variants to measure, by name; repeats; default those of the device")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto")]
Dtype = Annotated[str | None, typer.Option(help=f"{', '.join(_DTYPES)}; default bfloat16 on a GPU, else float32")]
Layout = Annotated[str | None, typer.Option(help="channels_last (default on a GPU) or contiguous")]
Repeats = Annotated[int, typer.Option(min=1, help="runs of each variant; the median is shown")]
Save = Annotated[Path | None, typer.Option(help="JSON file to write")]

_BOTH = ["paper-2d", "paper-3d"]


@app.callback()
def _group() -> None:
    pass


# --- operators ---------------------------------------------------------------------------------------------------


def _compare(
    op: str,
    *,
    size: Ints = (64, 64, 64),
    window: Windows = (5,),
    batch: Count = 1,
    channels: Count = 8,
    groups: Count = 1,
    preset: Presets = [],  # noqa: B006
    against: Against = [],  # noqa: B006
    device: Device = "auto",
    dtype: Dtype = None,
    layout: Layout = None,
    repeats: Repeats = 5,
    save: Save = None,
) -> None:
    """Measure an operator. What it compares with, and the floor, are in `coverfast.bench.operators` and `harness`."""
    import torch
    from rich.console import Console
    from rich.progress import track

    from coverfast.bench.harness import measure
    from coverfast.bench.operators import CASES
    from coverfast.bench.problems import preset_levels
    from coverfast.bench.provenance import write_results
    from coverfast.checks import check_choice

    device = _device(device)
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    layout = layout or ("channels_last" if device == "cuda" else "contiguous")
    check_choice("dtype", dtype, _DTYPES)
    check_choice("layout", layout, ("channels_last", "contiguous"))
    places = [preset_levels(name) for name in preset] or _single(op, size, window, batch, channels, groups)
    cases = [case for levels in places for case in CASES[op](levels, layout)]
    for name in against:
        check_choice("against", name, tuple(cases[0].variants))
    console, results = Console(), []
    for case in track(cases, "measuring", console=console, transient=True):
        results += measure(case, device, getattr(torch, dtype), repeats, against)
        if save is not None:  # as they come: a long comparison may be cut off
            write_results(save, op, [asdict(r) for r in results], device)
    _show(f"{op}, {layout}", results, device)


def _single(
    op: str, size: Sequence[int], window: Sequence[int], batch: int, channels: int, groups: int
) -> list[list[Level]]:
    from coverfast.bench.problems import pyramid_levels, single_level
    from coverfast.checks import check_window, require

    n = len(size)
    require(n in (2, 3) and min(size) >= 1, f"size must have two or three axes, got {size}")
    require(channels % groups == 0, f"groups must divide the {channels} channels, got {groups}")
    if op == "head":
        name = " x ".join(map(str, size))
        return [pyramid_levels(f"{name} window {w}", batch, size, check_window(w, n)) for w in window]
    sizes: dict[str, Any] = {"batch": batch, "channels": channels, "groups": groups}
    return [[single_level(size, check_window(w, n), named=op == "mov", **sizes)] for w in window]


def _show(title: str, results: Sequence[Result], device: str) -> None:
    from rich.console import Console

    from coverfast.bench.provenance import provenance

    rows = []
    for r in results:
        error = "-" if r.error is None else f"{r.error:.1e}"
        last = r.note or _number(r.both_ms)
        numbers = (error, _number(r.forward_ms), last, _number(r.spread_ms), _number(r.of_floor, 1))
        rows.append((r.case, r.variant, r.dtype, *numbers, _number(r.extra_mb, 0)))
    headings = ("case", "variant", "dtype", "error", "forward ms", "fwd + bwd ms", "spread", "of floor", "extra MB")
    _table(title, headings, rows, text=3)
    console = Console()
    console.print(
        "error: largest difference from the definition in float64, output and gradients, over the largest value",
        highlight=False,
    )
    console.print(", ".join(f"{name} {value}" for name, value in provenance(device).items()), highlight=False)
    failed = [r for r in results if r.note and r.variant in ("coverfast triton", "coverfast auto", "coverfast torch")]
    if failed:
        console.print("\n".join(f"{r.case}: {r.variant}: {r.note}" for r in failed), highlight=False)
        raise typer.Exit(1)


def _operator(op: str, text: str, *options: str) -> None:
    """A command that measures an operator, with those options of `_compare` that it takes."""
    known = inspect.signature(_compare, eval_str=True).parameters
    parameters = [known[name] for name in (*options, "preset", "against", "device", "repeats", "save")]
    # typer parses defaults too.
    texts = {p.name: ",".join(map(str, p.default)) for p in parameters if isinstance(p.default, tuple)}
    parameters = [p.replace(default=texts.get(p.name, p.default)) for p in parameters]

    def command(**values: Any) -> None:
        _compare(op, **values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__name__, command.__doc__ = op, text
    app.command(op)(command)


_MAPS = ("channels", "dtype", "layout")
_operator(
    "mov",
    "`mov` against the formulations of today: A (loop over taps), B (unfolded keys), compiled A, FlexAttention.",
    *("size", "window", "batch", "groups", *_MAPS),
)
_operator("warp", "`warp` against `grid_sample`, with and without making its grid.", "size", "batch", *_MAPS)
_operator("compose", "`compose` against interpolation, `grid_sample` and addition.", "size", "batch")
_operator("norm", "The norm of the pyramid's projections, in Triton and in torch.", "size", "batch", *_MAPS)
_operator("losses", "The losses with an affine truth against those of a dense field.", "size", "batch", *_MAPS)
_operator("views", "The generation of views; `size` is that of the crop.", "size", "batch")
_operator(
    "head",
    "The head of a training step: pyramid and losses, forward and backward, on features of the paper's widths.",
    *("size", "window", "batch", "dtype", "layout"),
)


# --- agreement, tuning, counts -----------------------------------------------------------------------------------


@app.command()
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
    cells = [(*line, *(by_dtype.get(dtype, "-") for dtype in _DTYPES)) for line, by_dtype in lines.items()]
    title = "Decimal digits that impl='triton' and impl='torch' have in common"
    _table(title, ("op", "case", "layout", "of", *_DTYPES), cells, text=4)
    if save is not None:
        write_results(save, "agree", [asdict(r) for r in rows], device)


@app.command()
def tune(
    preset: Presets = _BOTH,
    dtype: Annotated[str, typer.Option(help=", ".join(_DTYPES))] = "bfloat16",
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

    check_choice("dtype", dtype, _DTYPES)
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
            times = (_number(r["forward_ms"]), _number(r["both_ms"]))
            lines.append((case.name, *(str(r[name]) for name in ("rows", "taps", "tile")), *times))
    headings = ("case", "rows", "taps", "tile", "forward ms", "fwd + bwd ms")
    _table(f"mov, {dtype}, channels-last: the ten fastest of each", headings, lines)
    if notes := [r["note"] for r in rows if r["note"]]:
        print(f"{len(notes)} of {len(rows)} launches have no time, the first: {notes[0]}")
        raise typer.Exit(1 if len(notes) == len(rows) else 0)


@app.command()
def static(
    preset: Presets = _BOTH,
    target: Annotated[list[str], typer.Option(help="sm_80, sm_90, sm_100 or gfx942; repeats; default all")] = [],  # noqa: B006
    op: Annotated[list[str], typer.Option(help="operators; repeats; default all that have kernels")] = [],  # noqa: B006
    dtype: Annotated[str, typer.Option(help=", ".join(_DTYPES))] = "bfloat16",
    save: Save = None,
) -> None:
    """What the compiler makes of the kernels that presets use; needs no GPU. Counts, not timings."""
    import torch
    from rich.console import Console

    from coverfast.bench.provenance import write_results
    from coverfast.bench.static import merged, table
    from coverfast.checks import check_choice
    from coverfast.kernels.launch import ARCHITECTURES

    check_choice("dtype", dtype, _DTYPES)
    targets = target or tuple(ARCHITECTURES)
    with Console().status("compiling"):
        rows = table(preset, targets, getattr(torch, dtype), op)
    for name in targets:
        lines: dict[tuple[str, ...], list[str]] = {}
        for r in (r for r in rows if r.target == name):
            counts = [r.rows, r.taps, r.registers, r.spills, r.shared, r.body]
            shown = [_number(c, 0) for c in counts] + [_number(c, 1) for c in (r.a_tap, r.executed)]
            lines.setdefault((" ".join([r.kernel, *r.flags]), *shown, r.loads or "-"), []).extend(r.levels)
        headings = ("kernel", "levels", "rows", "taps", "regs", "spill", "shared", "body", "a tap", "edges", "loads")
        cells = [(line[0], merged(levels), *line[1:]) for line, levels in lines.items()]
        _table(f"{name}, channels-last {dtype}", headings, cells, text=2)
    Console().print(
        "rows a thread serves, taps of a pass; registers and bytes spilled a thread; bytes shared a program;\n"
        "instructions of the kernel, and a tap of the innermost loop over taps, the second time with the rows at both\n"
        "ends of a walk; loads of a pass, or of the kernel, in bits",
        highlight=False,
    )
    if save is not None:
        write_results(save, "static", [asdict(row) for row in rows])


@app.command()
def launches(
    preset: Presets = _BOTH,
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

    device = _device(device)
    gpu = device == "cuda"
    impls = ("torch", "auto") if gpu else ("torch", "triton") if INTERPRETED else ("torch",)
    dtype, limit = torch.bfloat16 if gpu else torch.float32, limit if gpu else limit or 32
    rows = []
    for name in preset:
        counts = [head_launches(preset_levels(name), impl, device, dtype, limit) for impl in impls]
        stages = [*zip(STAGES, *counts, strict=True), ("all", *map(sum, counts))]
        rows += [{"preset": name, "stage": stage, **dict(zip(impls, found, strict=True))} for stage, *found in stages]
    title = f"Launches, {device}" + (f", {limit} px" if limit else "")
    _table(title, ("preset", "stage", *impls), [tuple(map(str, row.values())) for row in rows], text=2)
    if save is not None:
        write_results(save, "launches", rows, device)


@app.command()
def data(
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

    from coverfast.bench.data import LARGE, PROBLEMS, as_rows, measure, measure_large
    from coverfast.bench.provenance import write_results
    from coverfast.cli.progress import working

    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as place, working("reading") as tell:
        for row in measure(Path(place), workers=workers, repeats=repeats, formats=formats, crops=crops):
            rows.append(row)
            tell(f"{row.problem}: {row.way}")
        for row in measure_large(Path(place)) if large else ():
            rows.append(row)
            tell(f"{row.problem}: {row.way}")
    headings = ("way", "crops/s warm", "range", "cold", "disk/pixels", "MB read a crop", "over chunks")
    for problem in (*PROBLEMS, *LARGE):
        shown = [
            (
                row.way,
                _number(row.warm, 0),
                "-" if row.warm_spread is None else f"{row.warm_spread[0]:.0f}-{row.warm_spread[1]:.0f}",
                _number(row.cold, 0),
                _number(row.stored, 2),
                _number(row.read, 2),
                _number(row.over, 3),
            )
            for row in rows
            if row.problem == problem.name
        ]
        if shown:
            _table(f"{problem.spec}, {workers} processes", headings, shown)
    if save is not None:
        write_results(save, "data", as_rows(rows), "cpu")


@app.command()
def step(
    preset: Annotated[list[str], typer.Option(help="repeats; default the paper's on a GPU, the small on a CPU")] = [],  # noqa: B006
    against: Annotated[
        list[str], typer.Option(help='variants, repeats: "published A", "coverfast eager bfloat16"; see the module')
    ] = [],  # noqa: B006
    batch: Annotated[int | None, typer.Option(min=1, help="images a step; default the preset's")] = None,
    crop: Annotated[Any, typer.Option(parser=ints, metavar="INTS", help="of the views; default the preset's")] = None,
    device: Device = "auto",
    repeats: Repeats = 5,
    profile: Annotated[bool, typer.Option("--profile", help="also the time of a step's parts")] = False,
    save: Save = None,
) -> None:
    """A training step as `pretrain` does it, in plain float32, and as published code does it (matching A or B).

    Any of the words after `coverfast` change how ours is done: eager, compiled, graphs, float32, bfloat16, contiguous,
    channels_last, recompute. Published code may have its views `ready`: "published A, views ready". The first variant
    is what the others are compared with.
    """
    import torch

    from coverfast.bench.provenance import provenance, write_results
    from coverfast.bench.step import measure
    from coverfast.bench.step_variants import DEFAULT, OURS, check_variant
    from coverfast.cli.progress import working
    from coverfast.geometry import level_size
    from coverfast.training.assembly import crop_of
    from coverfast.training.settings import preset_ndim, resolve

    device = _device(device)
    for name in against:
        check_variant(name)
    given = {name: value for name, value in {"batch": batch, "crop": crop}.items() if value is not None}
    size = "paper" if device == "cuda" else "small"
    settings = [resolve(name, given) for name in preset or (f"{size}-2d", f"{size}-3d")]
    for s in settings:
        level_size(crop_of(s, preset_ndim(s.preset)), len(s.groups))
    results: list[StepResult] = []
    with working("preparing") as tell:
        for s in settings:
            of: dict[str, Any] = {"profile": profile, "tell": tell}
            results += measure(s, against or DEFAULT, torch.device(device), repeats, **of)
            if save is not None:  # as they come: a long comparison may be cut off
                write_results(save, "step", [asdict(r) for r in results], device)
    for s in settings:
        _show_steps([r for r in results if r.preset == s.preset])
    print(", ".join(f"{name} {value}" for name, value in provenance(device).items()))
    if any(r.note for r in results if r.variant.startswith(OURS)):
        raise typer.Exit(1)


def _show_steps(results: Sequence[StepResult]) -> None:
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
                r.note if r.step_ms is None else _number(r.step_ms, 1),
                _number(r.spread_ms, 1),
                _number(r.images_per_s, 2),
                _number(r.peak_mb, 0),
                "-" if r.mfu is None else f"{r.mfu:.1%}",
                _number(times, 2),
                _number(more, 2),
            )
        )
        if r.parts_ms:
            total = sum(r.parts_ms.values())
            shares.append((r.variant, f"{total:.1f}", *(f"{ms / total:.1%}" for ms in r.parts_ms.values())))
    what = f"{first.preset}, batch {first.batch}, crop {' x '.join(map(str, first.crop))}"
    headings = ("variant", "how", "error", "ms a step", "spread", "images/s", "peak MB", "MFU", "time x", "memory x")
    _table(f"A training step: {what}", headings, rows, text=2)
    for r in results:
        if r.parts_ms:
            _table("Its parts, without compilation", ("variant", "ms", *r.parts_ms), shares)
            return


# --- helpers -----------------------------------------------------------------------------------------------------


def _device(name: str) -> str:
    import torch

    from coverfast.checks import check_choice, require

    check_choice("device", name, ("cpu", "cuda", "auto"))
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    require(name == "cpu" or torch.cuda.is_available(), "device must be one that is there, but torch finds no GPU")
    return name


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> None:
    """Print a table whose first `text` columns are text and the others numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < text else "right", no_wrap=index < 1)
    for row in rows:
        table.add_row(*row)
    console = Console()
    # A file or a pipe has no width: what goes there is not cut to that of a terminal of old.
    (console if console.is_terminal else Console(width=160)).print(table)


def _number(value: float | None, digits: int | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.{(3 if value < 10 else 1) if digits is None else digits}f}"
