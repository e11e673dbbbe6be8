"""What the commands of `coverfast bench` share: their options, tables of numbers, and where those were measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from coverfast.cli.options import ints

#: Of a device's arithmetic.
DTYPES = ("bfloat16", "float16", "float32", "float64")
#: The presets of the paper.
PAPER = ["paper-2d", "paper-3d"]

Windows = Annotated[Any, typer.Option(parser=ints, metavar="INTS", help="odd windows, measured one by one")]
Sizes = Annotated[list[Any], typer.Option(parser=ints, metavar="INTS", help="grid, such as 64,64 or 32,32,32; repeats")]
Count = Annotated[int, typer.Option(min=1)]
Presets = Annotated[list[str], typer.Option(help="its levels: paper-2d, paper-3d, small-2d, small-3d; repeats")]
Against = Annotated[list[str], typer.Option(help="variants to measure, by name; repeats; default those of the device")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto")]
Repeats = Annotated[int, typer.Option(min=1, help="runs of each variant; the median is shown")]
Seconds = Annotated[float, typer.Option(min=0.1, help="that a run may take on a CPU; longer ones are left out")]
Base = Annotated[
    str | None, typer.Option(help="git revision whose library is measured too, in turn; exit code 1 if ours is worse")
]
Threshold = Annotated[float, typer.Option(min=1.0, help="with --base: a ratio above it is worse")]
Save = Annotated[Path | None, typer.Option(help="JSON file to write; it grows as results come")]


def device_named(name: str) -> str:
    """The device "cpu" or "cuda" of a name that may be "auto"; `InputError` where it is not there."""
    import torch

    from coverfast.checks import check_choice, require

    check_choice("device", name, ("cpu", "cuda", "auto"))
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    require(name == "cpu" or torch.cuda.is_available(), "device must be one that is there, but torch finds no GPU")
    return name


def check_axes(sizes: Sequence[Sequence[int]], least: int = 1) -> None:
    """Refuse sizes that are not of two or three axes with `least` pixels each."""
    from coverfast.checks import require

    for size in sizes:
        fits = len(size) in (2, 3) and min(size) >= least
        require(fits, f"sizes must have two or three axes of at least {least} pixels, got {size}")


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> None:
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


def number(value: float | None, digits: int | None = None) -> str:
    """A number with so many digits behind the point, by default as its size asks; "-" for none."""
    if value is None:
        return "-"
    return f"{value:.{(3 if value < 10 else 1) if digits is None else digits}f}"


def print_provenance(device: str | None = None) -> None:
    """Print where and with what the results were measured."""
    from coverfast.bench.provenance import provenance

    print(", ".join(f"{name} {value}" for name, value in provenance(device).items()))
