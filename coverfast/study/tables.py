"""Tables of studies, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coverfast.downstream.bootstrap import Interval

#: Headings and rows; the first columns are text.
Table = tuple[list[str], list[list[str]]]


def transfer_rows(result: Mapping[str, Any]) -> Table:
    """What transfer.json holds: a row for each mode and number of labelled cases, with several methods for each arm."""
    found = {(a["init"], a["mode"], a["cases"]): Interval(**a["dsc"]) for a in result["arms"]}
    inits = list(dict.fromkeys(init for init, _, _ in found))
    if len(inits) > 2:
        return _rows_by_arm(result["differences"], found, inits)
    headings = ["mode", "labelled cases", "scratch, DSC %", "pretrained, DSC %", "difference, points", "intervals"]
    rows = [
        [
            gain["mode"],
            str(gain["cases"]),
            interval(found["scratch", gain["mode"], gain["cases"]]),
            interval(found["pretrained", gain["mode"], gain["cases"]]),
            interval(Interval(**gain["dsc"]), sign=True),
            "apart" if gain["intervals_apart"] else "overlap",
        ]
        for gain in result["differences"]
    ]
    return headings, rows


def _rows_by_arm(
    differences: Sequence[Mapping[str, Any]], found: Mapping[tuple[str, str, int], Interval], inits: Sequence[str]
) -> Table:
    """A row an arm, with what it differs by from each arm above it."""
    headings = ["mode", "labelled cases", "weights", "DSC %", *(f"minus {minus}, points" for minus in inits[:-1])]
    gains = {(d["init"], d["minus"], d["mode"], d["cases"]): Interval(**d["dsc"]) for d in differences}
    rows = []
    for mode, cases in dict.fromkeys((mode, cases) for _, mode, cases in found):
        for init in inits:
            own = [gains.get((init, minus, mode, cases)) for minus in inits[:-1]]
            cells = [interval(gain, sign=True) if gain else "" for gain in own]
            rows.append([mode, str(cases), init, interval(found[init, mode, cases]), *cells])
    return headings, rows


def features_rows(result: Mapping[str, Any]) -> Table:
    """A row for each network of what features.json holds, see `coverfast.study.features.separation`."""
    headings = ["network", "cosine within", "cosine between", "separation", "silhouette", "rank"]
    names = ("cos_within", "cos_between", "separation", "silhouette", "rank")
    return headings, [[net["name"], *(f"{net[n]:.3f}" for n in names)] for net in result["networks"]]


def interval(found: Interval, *, sign: bool = False) -> str:
    """A share in per cent, or a difference of shares in points, with its interval."""
    mean, low, high = (f"{100 * value:{'+' if sign else ''}.1f}" for value in found[:3])
    return f"{mean} [{low}, {high}]"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown; | in a cell is escaped."""
    lines = [list(headings), ["---"] * len(headings), *map(list, rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
