"""`coverfast bench vpa`: the vector pyramid against direct templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coverfast.cli.bench_shown import print_rates, refuse_failures
from coverfast.cli.options import ints
from coverfast.cli.tables import (
    DTYPES,
    Against,
    Device,
    Repeats,
    Save,
    check_axes,
    device_named,
    number,
    print_provenance,
    print_table,
)

if TYPE_CHECKING:
    from coverfast.bench.harness import Result


def vpa(
    sizes: Annotated[
        list[Any],
        typer.Option(parser=ints, metavar="INTS", help="finest grids, two or three axes; repeats; default one of each"),
    ] = [],  # noqa: B006
    window: Annotated[
        Any, typer.Option(parser=ints, metavar="INTS", help="N of the pyramid; default 9,5 in 2D and 5 in 3D")
    ] = None,
    levels: Annotated[int | None, typer.Option(min=1, max=5, help="levels, from 1 to m; default 4 or 5")] = None,
    against: Against = [],  # noqa: B006
    device: Device = "auto",
    dtype: Annotated[str | None, typer.Option(help="default bfloat16 on a GPU, else float32")] = None,
    repeats: Repeats = 5,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="that a run may take on a CPU; longer ones are left out")
    ] = 60,
    save: Save = None,
) -> None:
    """The m finest levels of the pyramid at window N against one direct template of what they see, 1+(N-1)(2^m-1).

    FLOP by the definitions and by torch's counter, time and memory, with and without the projections, ours and eager
    formulations A and B until they no longer fit (COVER 4.3.5).
    """
    import torch
    from rich.console import Console
    from rich.progress import track

    from coverfast.bench.harness import measure_together
    from coverfast.bench.provenance import write_results
    from coverfast.bench.rates import rates
    from coverfast.bench.vpa import SERIES, SIZES, pairs
    from coverfast.checks import check_choice, check_window, require
    from coverfast.geometry import level_size
    from coverfast.kernels import INTERPRETED

    require(not INTERPRETED, "bench times kernels and cannot with TRITON_INTERPRET set; unset it")
    device = device_named(device)
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    check_choice("dtype", dtype, DTYPES)
    check_axes(sizes)
    jobs: list[Any] = []
    for size in sizes or SIZES[device].values():
        known = dict(SERIES[len(size)])
        chosen = {n: known.get(n, 4) for n in window} if window else known
        series = [(check_window(n, len(size))[0], levels or most) for n, most in chosen.items()]
        level_size(size, max(m for _, m in series))
        jobs += pairs(size, "channels_last" if device == "cuda" else "contiguous", series)
    for name in against:
        check_choice("against", name, tuple(jobs[0][0].variants))
    console, results = Console(), list[Any]()
    can = rates(device, getattr(torch, dtype))
    for pair in track(jobs, "measuring", console=console, transient=True):
        results += measure_together(pair, device, getattr(torch, dtype), repeats, against, seconds=seconds)
        if save is not None:  # as they come: a long comparison may be cut off
            write_results(save, "vpa", [asdict(r) for r in results], device, rates=asdict(can))
    _show(results)
    print_rates(can)
    print_provenance(device)
    refuse_failures(results)


def _show(results: Sequence[Result]) -> None:
    for shape, window, projections in dict.fromkeys(_series(r) for r in results):
        mine = [r for r in results if _series(r) == (shape, window, projections)]
        pyramids = {(r.facts["levels"], r.variant): r for r in mine if r.facts["form"] == "pyramid"}
        rows = []
        for r in mine:
            facts, pyramid = r.facts, pyramids.get((r.facts["levels"], r.variant))
            sees = f"{' x '.join([str(facts['width'])] * facts['ndim'])} ({facts['levels']})"
            counts = (f"{facts['flops'] / 1e9:.3g}", f"{facts['counted'] / 1e9:.3g}")
            error = "-" if r.error is None else f"{r.error:.1e}"
            times = (r.note or number(r.ms), _over(r, pyramid, "ms"), number(r.spread_ms), number(r.of_floor, 1))
            memory = (number(r.extra_mb, 0), _over(r, pyramid, "extra_mb"))
            more = "" if pyramid in (r, None) else number(facts["flops"] / pyramid.facts["flops"], 1)
            rows.append((sees, facts["form"], r.variant, *counts, more, error, *times, *memory))
        title = f"N = {window}, {' x '.join(map(str, shape[2:]))}, {'with' if projections else 'without'} projections"
        headings = ("sees (levels)", "form", "variant", "GFLOP", "counted", "x", "error", "fwd + bwd ms", "x")
        print_table(title, (*headings, "spread", "x floor", "extra MB", "x"), rows, text=3)
    print("x: of the direct template over the pyramid that sees as much, the same variant; GFLOP: of the forward, by")
    print("the definitions, and of eager B as torch counts its products and sums, which scales every score as well")


def _series(r: Result) -> tuple[Any, ...]:
    return r.facts["shape"], r.facts["window"], r.facts["projections"]


def _over(r: Result, pyramid: Result | None, figure: str) -> str:
    """Of the direct template over the pyramid's, where both were measured."""
    one, other = getattr(r, figure), getattr(pyramid, figure, None)
    return "" if r is pyramid else number(one / other, 1) if one and other else "-"
