"""Tables of studies, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coverfast.downstream.bootstrap import Interval

#: Headings and rows; the first columns are text.
Table = tuple[list[str], list[list[str]]]


def transfer_rows(result: Mapping[str, Any]) -> Table:
    """A row for each mode and number of labelled cases of what transfer.json holds."""
    found = {(a["init"], a["mode"], a["cases"]): Interval(**a["dsc"]) for a in result["arms"]}
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
