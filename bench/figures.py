"""Figures out of rows of results: their times, how numbers are written, and the few that the front page shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from coverfast.bench.compare import Row, is_ours

#: A pyramid's or direct template's series: axes, and window of a level.
Series = tuple[int, int]


# --- numbers -----------------------------------------------------------------------------------------------------


def short(value: float | None) -> str:
    """Three digits; nothing for None."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    text = f"{value:.2e}"
    power = int(text.partition("e")[2])
    return f"{value:.{max(0, 2 - power)}f}" if -3 <= power < 6 else text


def amount(value: float, unit: str) -> str:
    """With a prefix: "1.23 GFLOP"."""
    power = min(5, max(0, int(math.log10(value) // 3))) if value > 0 else 0
    return f"{short(value / 1000**power)} {' kMGTP'[power].strip()}{unit}"


def duration(ms: float) -> str:
    return f"{short(ms)} ms" if ms < 1000 else f"{short(ms / 1000)} s"


# --- rows --------------------------------------------------------------------------------------------------------


def time_of(row: Row) -> tuple[str, float] | None:
    """Its longest way and milliseconds: a step, or forward and backward, or forward; None if unmeasured or wrong."""
    if row.get("note") and row.get("step_ms") is None:
        return None
    return next(((key, row[key]) for key in ("step_ms", "both_ms", "forward_ms") if row.get(key) is not None), None)


def facts_of(row: Row) -> Mapping[str, Any]:
    return row.get("facts") or {}


def same_case(row: Row) -> str:
    """Alike for all variants of what was measured."""
    facts = {name: value for name, value in facts_of(row).items() if name not in ("flops", "counted", "exponentials")}
    names = ("op", "case", "dtype", "preset", "batch", "crop")
    return json.dumps([facts, *(row.get(name) for name in names)], sort_keys=True)


def firsts(rows: Sequence[Row]) -> dict[str, Row]:
    """The first variant of ours of every case: what others are compared with."""
    found: dict[str, Row] = {}
    for row in filter(is_ours, rows):
        found.setdefault(same_case(row), row)
    return found


def ratio(row: Row, ours: Row | None) -> float | None:
    """Time of a row over that of ours; None where either is unmeasured or wrong."""
    one, two = time_of(row), time_of(ours) if ours else None
    return one[1] / two[1] if one and two and one[0] == two[0] and two[1] > 0 else None


def width_of(row: Row) -> int:
    """Of the receptive field, in pixels."""
    return int(facts_of(row)["width"])


def series_of(row: Row) -> Series:
    window = facts_of(row)["window"]
    return int(facts_of(row)["ndim"]), int(window[0] if isinstance(window, list | tuple) else window)


def with_projections(rows: Sequence[Row]) -> bool:
    """Whether the times to show are those with projections: where any were measured."""
    return any(facts_of(row).get("projections") and time_of(row) for row in rows)


# --- headlines ---------------------------------------------------------------------------------------------------

#: What was measured, and what came of it.
Line = tuple[str, str]


def headlines(bench: str, rows: Sequence[Row]) -> list[Line]:
    """What the front page says of a file; nothing of most."""
    return list(_HEADLINES[bench](rows)) if bench in _HEADLINES else []


def _cost(row: Row, memory: str = "extra_mb") -> str:
    found = time_of(row)
    if not found:
        return str(row.get("note") or "not measured")
    return duration(found[1]) + ("" if row.get(memory) is None else f", {short(row[memory])} MB")


def _finest(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """The cases of the finest level of every preset, and those that are no level of one."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for _, names in groupby(cases, lambda name: name.partition(" level ")[0]):
        name = max(names, key=lambda name: (name.partition(" level ")[2], name))
        yield name, [row for row in rows if row["case"] == name]


def _mov(rows: Sequence[Row]) -> Iterator[Line]:
    for name, group in _finest(rows):
        ours = next((row for row in group if is_ours(row)), None)
        others = [row for row in group if row["variant"] in ("eager A", "eager B")]
        shown = ([("ours", ours)] if ours else []) + [(row["variant"], row) for row in others]
        if shown:
            what = f"`mov`, {name}, {shown[0][1]['dtype']}, forward + backward"
            yield what, "; ".join(f"{who} {_cost(row)}" for who, row in shown)


def _vpa(rows: Sequence[Row]) -> Iterator[Line]:
    """The widest field of each series that ours was measured at in both forms."""
    ours = [row for row in firsts(rows).values() if bool(facts_of(row).get("projections")) == with_projections(rows)]
    for ndim, window in sorted({series_of(row) for row in ours}):
        by_form: dict[str, dict[int, Row]] = {"pyramid": {}, "direct": {}}
        for row in ours:
            if series_of(row) == (ndim, window) and time_of(row):
                by_form[facts_of(row)["form"]][width_of(row)] = row
        if widths := by_form["pyramid"].keys() & by_form["direct"].keys():
            both = [by_form[form][max(widths)] for form in ("pyramid", "direct")]
            texts = [f"{amount(facts_of(row)['flops'], 'FLOP')}, {_cost(row)}" for row in both]
            pairs = [(facts_of(row)["flops"], (time_of(row) or ("", 0))[1], row.get("extra_mb")) for row in both]
            times = [short(two / one) for one, two in zip(*pairs, strict=True) if one and two]
            what = f"receptive field of {max(widths)} pixels, {ndim}D: windows of {window}, or one template"
            more = f"{', '.join(times[:-1])} and {times[-1]} times"
            yield what, f"pyramid {texts[0]}; direct {texts[1]}: {more}"


def _step(rows: Sequence[Row]) -> Iterator[Line]:
    for preset in dict.fromkeys(row["preset"] for row in rows):
        group = [row for row in rows if row["preset"] == preset]
        ours = next((row for row in group if is_ours(row)), None)
        published = next((row for row in group if row["variant"] == "published A"), None)
        shown = [(who, row) for who, row in (("ours", ours), ("published A", published)) if row]
        if shown:
            yield f"training step, {preset}", "; ".join(f"{who} {_cost(row, 'peak_mb')}" for who, row in shown)


def _data(rows: Sequence[Row]) -> Iterator[Line]:
    for problem in dict.fromkeys(row["problem"] for row in rows):
        ways = {"shard": "shard, crops", "PNG": "PNG a sample", "NIfTI": "NIfTI a sample", "npy": "npy, mapped"}
        group = {row["way"]: row for row in rows if row["problem"] == problem and row.get("warm") is not None}
        shown = [f"{name} {short(group[way]['warm'])}" for name, way in ways.items() if way in group]
        if len(shown) > 1:
            yield f"random crops/s, {problem}, cached files", ", ".join(shown)


def _static(rows: Sequence[Row]) -> Iterator[Line]:
    """Of the finest levels, for the target that GPUs of 2026 share most."""
    counted = [row for row in rows if row["op"] == "mov" and row["target"] == "sm_90" and row.get("a_tap") is not None]
    levels = sorted({level for row in counted for level in row["levels"]})
    for preset, names in groupby(levels, lambda name: name.partition(" level ")[0]):
        finest = max(names)
        shown = [f"{row['kernel']} {row['a_tap']:.1f}" for row in counted if finest in row["levels"]]
        yield f"instructions a tap, sm_90, {preset}, finest level (counted, not timed)", ", ".join(shown)


_HEADLINES: dict[str, Callable[[Sequence[Row]], Iterator[Line]]] = {
    "mov": _mov,
    "vpa": _vpa,
    "step": _step,
    "data": _data,
    "static": _static,
}
