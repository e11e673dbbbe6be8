"""How results of the harness look on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from coverfast.cli.tables import number, print_provenance, print_table

if TYPE_CHECKING:
    from coverfast.bench.harness import Result
    from coverfast.bench.rates import Rates

_OURS = ("coverfast triton", "coverfast auto", "coverfast torch")


def print_results(title: str, results: Sequence[Result], device: str, can: Rates) -> None:
    """A table of them, what its columns are, and where and with what it was measured."""
    from coverfast.bench.figures import firsts, ratio, same_case

    saved = [asdict(r) for r in results]
    ours, rows = firsts(saved), []
    for r, row in zip(results, saved, strict=True):
        error = "-" if r.error is None else f"{r.error:.1e}"
        times = (number(r.forward_ms), r.note or number(r.both_ms), number(r.spread_ms))
        ratios = (number(r.floor_ms), number(r.of_floor, 1), number(ratio(row, ours.get(same_case(row))), 2))
        rows.append((r.case, r.variant, r.dtype, error, *times, *ratios, number(r.extra_mb, 0)))
    headings = ("case", "variant", "dtype", "error", "forward ms", "fwd + bwd ms", "spread")
    print_table(title, (*headings, "floor ms", "x floor", "x ours", "extra MB"), rows, text=3)
    print("error: largest difference from the definition in float64, output and gradients, over the largest value")
    print("x ours: time over that of the case's first coverfast variant; x floor: over what the rates below allow")
    print_rates(can)
    print_provenance(device)
    refuse_failures(results)


def print_rates(can: Rates) -> None:
    """What the device did when it was measured."""
    matrices = ", ".join(f"{dtype} {rate / 1e9:.4g}" for dtype, rate in can.matrix.items())
    print(
        f"measured rates: copy {can.copy / 1e9:.4g} GB/s; GFLOP/s of matrices {matrices}, of multiply-adds "
        f"{can.multiply_add / 1e9:.4g}; exponentials {can.exponential / 1e9:.4g} G/s"
    )


def refuse_failures(results: Sequence[Result]) -> None:
    """End with 1 where something of ours was not measured."""
    of_ours = [r for r in results if r.note and r.variant.partition(",")[0] in _OURS]  # also as a CUDA graph
    failed = [r for r in of_ours if not r.note.startswith(("does not fit", "not run"))]
    if failed:
        print("\n".join(f"{r.case}: {r.variant}: {r.note}" for r in failed))
        raise typer.Exit(1)


def judge(rows: Sequence[Mapping[str, object]], revision: str, threshold: float) -> None:
    """Ours against another revision's in the same run; end with 1 where it is clearly worse."""
    from coverfast.bench.compare import against_base, regressions

    found = against_base(rows)
    if not any(r.figure != "-" for r in found):
        print(f"Nothing was measured both here and at {revision}: see the notes above")
        raise typer.Exit(1)
    shown = [
        (r.row, r.figure, number(r.before), number(r.after), f"{r.worse:.2f}", r.note or ("" if r.clear else "spread"))
        for r in found
    ]
    headings = ("row", "figure", revision, "here", "times as bad", "")
    print_table(f"Against {revision}, worst first", headings, shown, text=2)
    if worse := regressions(found, threshold):
        print(f"{len(worse)} figures are worse than at {revision} by more than {threshold:g}; the worst is {worse[0]}")
        raise typer.Exit(1)
