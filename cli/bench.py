"""`coverfast bench`: measurements that anyone can rerun."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from coverfast.cli.options import ints

app = typer.Typer(help="Measure: time, memory and correctness against the usual formulations.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command()
def mov(
    size: Annotated[Any, typer.Option(parser=ints, metavar="INTS", help="grid, two or three axes")] = "64,64,64",
    window: Annotated[int, typer.Option(min=1, help="odd window")] = 5,
    channels: Annotated[int, typer.Option(min=1)] = 8,
    groups: Annotated[int, typer.Option(min=1)] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each variant; the median is shown")] = 5,
) -> None:
    """`mov` (impl="torch") on the CPU against the eager formulations A (loop over taps) and B (unfolded keys)."""
    from rich.console import Console
    from rich.table import Table

    from coverfast.bench.measure import where
    from coverfast.bench.mov import compare
    from coverfast.checks import check_window, require

    require(len(size) in (2, 3), f"size must have two or three axes, got {size}")
    check_window(window, len(size))
    rows = compare(size, (window,) * len(size), channels=channels, groups=groups, repeats=repeats)
    table = Table(title=f"mov (1, {channels}, {', '.join(map(str, size))}), window {window}, groups {groups}, float32")
    for heading in ("variant", "error", "forward s", "fwd + bwd s", "spread s", "extra MB"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name, error, forward, both, spread, peak in rows:
        table.add_row(name, f"{error:.1e}", f"{forward:.3f}", f"{both:.3f}", f"{spread:.3f}", f"{peak:.0f}")
    console = Console()
    console.print(table)
    console.print("error: largest difference from the definition in float64, output and gradients", highlight=False)
    console.print(where(), highlight=False)
