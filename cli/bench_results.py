"""`coverfast bench compare` and `bench report`: what was measured, against an earlier time and as pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    before: Annotated[Path, typer.Argument(help="results that --save wrote", metavar="BEFORE.json")],
    after: Annotated[Path, typer.Argument(help="the same benchmark's, to be judged", metavar="AFTER.json")],
    threshold: Annotated[float, typer.Option(min=1.0, help="a ratio above it is a regression")] = 1.1,
    anyway: Annotated[bool, typer.Option("--anyway", help="also those of another device")] = False,
) -> None:
    """Compare saved results by their ratios alone, times relative to the baselines'; exit code 1: ours got worse."""
    from coverfast.bench.compare import compare as compared
    from coverfast.bench.compare import read_results, regressions
    from coverfast.cli.tables import number, print_table

    found = compared(read_results(before), read_results(after), anyway=anyway)
    rows = []
    for r in found.ratios:
        verdict = r.note or ("" if r.clear or r.worse == 1 else "within its spread")
        rows.append((r.row, r.figure, number(r.before), number(r.after), f"{r.worse:.2f}", verdict))
    headings = ("row", "figure", "before", "after", "times as bad", "")
    print_table(f"{after.name} against {before.name}, worst first", headings, rows, text=2)
    for path, only in ((before, found.only_before), (after, found.only_after)):
        if only:
            print(f"{len(only)} rows only in {path.name}: {'; '.join(only)}")
    if found.drift is not None:
        print(f"Times are relative to the baselines, whose median has become {found.drift:.3f} times as long.")
    elif any(r.timed for r in found.ratios):
        print("Times are as measured: the files have no baselines in common to tell how the machine has drifted.")
    else:
        print("No times are compared.")
    worse = regressions(found.ratios, threshold)
    if worse:
        print(f"{len(worse)} figures of ours are worse by more than {threshold:g}; the worst is {worse[0]}")
    if found.lost:
        print(f"{len(found.lost)} rows of ours are no longer there, the first: {found.lost[0]}")
    if worse or found.lost:
        raise typer.Exit(1)


def report(
    folder: Annotated[Path, typer.Argument(help="results as DEVICE/NAME.json")] = Path("bench/results"),
    check: Annotated[
        bool, typer.Option("--check", help="write nothing; exit code 1 if anything is out of date")
    ] = False,
) -> None:
    """Make RESULTS.md beside the folder, its pictures, and the README's table from the results that are saved."""
    from coverfast.bench.report import out_of_date, write_report

    if check:
        if stale := out_of_date(folder):
            print(f"{stale[0]} is not what the results give; run: coverfast bench report")
            raise typer.Exit(1)
        return
    made = write_report(folder)
    for path in made.written:
        print(f"wrote {path}")
    if made.without:
        print(f"no pictures: {made.without}")
