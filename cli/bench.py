"""`coverfast bench`: measurements that anyone can rerun. Here those of operators, by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coverfast.cli import bench_all, bench_kernels, bench_results, bench_runs, bench_vpa
from coverfast.cli.bench_shown import judge, print_results
from coverfast.cli.tables import (
    DTYPES,
    Against,
    Base,
    Count,
    Device,
    Presets,
    Repeats,
    Save,
    Seconds,
    Sizes,
    Threshold,
    Windows,
    check_axes,
    device_named,
)

if TYPE_CHECKING:
    from coverfast.bench.problems import Level

app = typer.Typer(help="Measure: time, memory and correctness against the usual formulations.", no_args_is_help=True)

#: The dtypes of operators that do not come in all of them, the first the default, and why.
_EXACT = {
    "compose": (("float32", "float64"), "as fields are never in half precision"),
    "fuse": (("float32", "float64"), "as fields are never in half precision"),
    "ncc": (("float32", "float64"), "as images are never in half precision here"),
    "views": (("float32",), "in which they are made"),
}
#: What is measured where neither sizes nor presets are given.
_SIZE = (64, 64, 64)

Dtype = Annotated[
    str | None, typer.Option(help=f"{', '.join(DTYPES)}; default bfloat16 on a GPU, else, and for fields, float32")
]
Layout = Annotated[str | None, typer.Option(help="channels_last (default on a GPU) or contiguous")]


@app.callback()
def _group() -> None:
    pass


def _compare(
    op: str,
    *,
    sizes: Sizes = [],  # noqa: B006
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
    seconds: Seconds = 60,
    base: Base = None,
    threshold: Threshold = 1.1,
    save: Save = None,
) -> None:
    """Measure an operator. What it compares with, and the floor, are in `coverfast.bench.operators` and `harness`."""
    from contextlib import nullcontext

    import torch
    from rich.console import Console
    from rich.progress import track

    from coverfast.bench.base import versions
    from coverfast.bench.harness import measure
    from coverfast.bench.operators import CASES
    from coverfast.bench.problems import preset_levels
    from coverfast.bench.provenance import write_results
    from coverfast.bench.rates import rates
    from coverfast.checks import check_choice, require
    from coverfast.kernels import INTERPRETED

    require(not INTERPRETED, "bench times kernels and cannot with TRITON_INTERPRET set; unset it")

    device = device_named(device)
    dtype = _dtype(op, dtype, device)
    layout = layout or ("channels_last" if device == "cuda" else "contiguous")
    check_choice("layout", layout, ("channels_last", "contiguous"))
    places = [preset_levels(name) for name in preset]
    places += _grids(op, sizes or ([] if preset else [_SIZE]), window, batch, channels, groups)
    cases = [case for levels in places for case in CASES[op](levels, layout)]
    known = dict.fromkeys(name for case in cases for name in case.variants)
    for name in against:
        is_natten, is_known = name.startswith("NATTEN"), name in known
        require(is_known or not is_natten, "NATTEN must be installed, 0.20 or newer, and windows half the grid at most")
        check_choice("against", name, tuple(known))
        require(device == "cuda" or name != "coverfast triton", "coverfast triton needs a GPU, got the device cpu")
    console, results, can = Console(), list[Any](), rates(device, getattr(torch, dtype))
    with versions(base) if base else nullcontext(()) as there:
        for case in track(cases, "measuring", console=console, transient=True):
            names = [name for name in against if name in case.variants]
            if against and not names:
                continue
            results += measure(case, device, getattr(torch, dtype), repeats, names, seconds=seconds, versions=there)
            if save is not None:  # as they come: a long comparison may be cut off
                write_results(save, op, [asdict(r) for r in results], device, rates=asdict(can))
    print_results(f"{op}, {layout}", results, device, can)
    if base:
        judge([asdict(r) for r in results], base, threshold)


def _dtype(op: str, dtype: str | None, device: str) -> str:
    """The dtype to measure an operator in."""
    from coverfast.checks import check_choice, require

    if op not in _EXACT:
        dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
        check_choice("dtype", dtype, DTYPES)
        return dtype
    exact, why = _EXACT[op]
    dtype = dtype or exact[0]
    require(dtype in exact, f"dtype of {op} must be {' or '.join(exact)}, {why}, got {dtype!r}")
    return dtype


def _grids(
    op: str, sizes: Sequence[Sequence[int]], windows: Sequence[int], batch: int, channels: int, groups: int
) -> list[list[Level]]:
    """Every size with every window."""
    from coverfast.bench.problems import pyramid_levels, single_level
    from coverfast.checks import check_window, require

    check_axes(sizes)
    require(channels % groups == 0, f"groups must divide the {channels} channels, got {groups}")
    of: dict[str, Any] = {"batch": batch, "channels": channels, "groups": groups, "named": op == "mov"}
    found = []
    for size in sizes:
        even = all(s % 2 == 0 for s in size) or op != "compose"
        require(even, f"sizes of compose must be even, as its coarse field has half the pixels an axis, got {size}")
        for width in windows:
            window, name = check_window(width, len(size)), " x ".join(map(str, size))
            if op == "head":
                found.append(pyramid_levels(f"{name} window {width}", batch, size, window))
            else:
                found.append([single_level(size, window, **of)])
    return found


def _operator(op: str, text: str, *options: str) -> None:
    """A command that measures an operator, with those options of `_compare` that it takes."""
    known = inspect.signature(_compare, eval_str=True).parameters
    parameters = [known[name] for name in ("sizes", *options, "preset", "against", "device", "dtype")]
    parameters += [known[name] for name in ("repeats", "seconds", "base", "threshold", "save")]
    # typer parses defaults too.
    texts = {p.name: ",".join(map(str, p.default)) for p in parameters if isinstance(p.default, tuple)}
    parameters = [p.replace(default=texts.get(p.name, p.default)) for p in parameters]

    def command(**values: Any) -> None:
        _compare(op, **values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__name__, command.__doc__ = op, text
    app.command(op)(command)


_MAPS = ("batch", "channels", "layout")
_operator(
    "mov",
    "`mov` against the formulations of today: A (loop over taps), B (unfolded keys), compiled A, FlexAttention.",
    *("window", "groups", *_MAPS),
)
_operator("warp", "`warp` against `grid_sample`, with and without making its grid.", *_MAPS)
_operator("compose", "`compose` against interpolation, `grid_sample` and addition.", "batch")
_operator("fuse", "`fuse_affine` against a matrix product of homogeneous coordinates.", "batch")
_operator("norm", "The norm of the pyramid's projections, in Triton and in torch.", *_MAPS)
_operator("losses", "The losses with an affine truth against those of a dense field.", *_MAPS)
_operator("ncc", "The local correlation of two images against convolutions with a box of ones.", "batch")
_operator("views", "The generation of views; sizes are those of the crop.", "batch")
_operator(
    "head",
    "The head of a training step: pyramid and losses, forward and backward, on features of the paper's widths.",
    *("window", "batch", "layout"),
)
app.command()(bench_vpa.vpa)
app.command()(bench_runs.step)
app.command()(bench_runs.data)
app.command()(bench_kernels.static)
app.command()(bench_kernels.launches)
app.command()(bench_kernels.agree)
app.command()(bench_kernels.tune)
app.command("all")(bench_all.all_)
app.command()(bench_results.compare)
app.command()(bench_results.report)
