"""Saved results against earlier ones: ratios alone, worse above 1, since machines and moments drift."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from coverfast.bench.provenance import folder_of
from coverfast.checks import InputError, require

Row = Mapping[str, Any]


# --- files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """A file of results, see `coverfast.bench.provenance.write_results`."""

    path: Path
    bench: str
    provenance: Mapping[str, Any]
    rates: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def device(self) -> str:
        """As a folder name; of counts, which need no device, none."""
        return folder_of(dict(self.provenance)) if "device" in self.provenance else "no device"


def read_results(path: Path) -> Results:
    """A file of results.

    Raises:
        InputError: when there is none, or it is none.
    """
    try:
        found = json.loads(path.read_bytes())
        rows, facts = found["rows"], found["provenance"]
        if isinstance(found["bench"], str) and isinstance(facts, dict) and all(isinstance(row, dict) for row in rows):
            return Results(path, found["bench"], facts, found.get("rates", {}), rows)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path} must be JSON with bench, provenance and rows, as --save writes it, but it is not")


# --- rows --------------------------------------------------------------------------------------------------------


class Figure(NamedTuple):
    """A number to compare. timed: drifts with the machine. higher: is better. unsure: what its kind cannot resolve."""

    label: str
    timed: bool = False
    higher: bool = False
    unsure: float = 0.0


#: By key. High-water marks grow by whole pages and arenas: MB that differ by less than one are the same.
FIGURES = {
    "forward_ms": Figure("forward ms", timed=True),
    "both_ms": Figure("fwd + bwd ms", timed=True),
    "step_ms": Figure("ms a step", timed=True),
    "images_per_s": Figure("images/s", timed=True, higher=True),
    "warm": Figure("crops/s warm", timed=True, higher=True),
    "cold": Figure("crops/s cold", timed=True, higher=True),
    "extra_mb": Figure("extra MB", unsure=1.0),
    "peak_mb": Figure("peak MB", unsure=1.0),
    "stored": Figure("disk/pixels"),
    "read": Figure("MB read a crop"),
    "over": Figure("over chunks"),
    "registers": Figure("registers"),
    "spills": Figure("spilled bytes"),
    "shared": Figure("shared bytes"),
    "body": Figure("instructions"),
    "a_tap": Figure("instructions a tap"),
    "executed": Figure("instructions a tap, edges"),
    "torch": Figure("launches, torch"),
    "auto": Figure("launches, auto"),
    "triton": Figure("launches, triton"),
    "digits": Figure("digits", higher=True),
}
_NAMES = ("op", "case", "preset", "problem", "way", "kernel", "flags", "target", "levels", "stage", "variant", "dtype")
_IDENTITY = (*_NAMES, "batch", "crop", "shape", "layout")
#: What sets a row of `tune` apart, and is a finding in one of `static`.
_LAUNCH = ("rows", "taps", "tile")
#: Facts that follow from the others.
_DERIVED = ("flops", "counted", "exponentials")


def is_ours(row: Row) -> bool:
    """Not a baseline's: neither the usual code nor another revision's ("coverfast torch @ 1a2b3c")."""
    name = str(row.get("variant") or row.get("way") or "coverfast")
    return name.startswith(("coverfast", "shard", "chunks")) and " @ " not in name


def called(row: Row) -> str:
    """A row's name for people."""
    values = [row[field] for field in _NAMES if row.get(field)]
    texts = [", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value) for value in values]
    return ", ".join(dict.fromkeys(texts))


def _keyed(rows: Sequence[Row], others: Sequence[Row]) -> dict[str, Row]:
    """Rows by what identifies them, as far as the other rows say so too; alike ones are told apart by their order."""

    def of(row: Row) -> dict[str, Any]:
        facts = {f"facts {name}": value for name, value in (row.get("facts") or {}).items() if name not in _DERIVED}
        fields = _IDENTITY if "kernel" in row else (*_IDENTITY, *_LAUNCH)
        return {field: row[field] for field in fields if field in row} | facts

    shared = {field for row in others for field in of(row)}
    seen: Counter[str] = Counter()
    keyed = {}
    for row in rows:
        key = json.dumps({field: value for field, value in of(row).items() if field in shared}, sort_keys=True)
        seen[key] += 1
        keyed[f"{key} {seen[key]}"] = row
    return keyed


def _figures(row: Row) -> Iterator[tuple[str, Figure, float, float]]:
    """Label, figure, value and spread of all that was measured in a row."""
    for key, figure in FIGURES.items():
        value = row.get(key)
        for part, number in value.items() if isinstance(value, Mapping) else [("", value)]:
            if isinstance(number, int | float) and math.isfinite(number):
                yield f"{figure.label} {part}".strip(), figure, number, max(_spread(row, key, number), figure.unsure)


def _spread(row: Row, key: str, value: float) -> float:
    """In the unit of the figure; 0 where it is not known."""
    if key == "warm":
        low, high = row.get("warm_spread") or (0.0, 0.0)
        return float(high - low)
    own = "forward_spread_ms" if key == "forward_ms" and "forward_spread_ms" in row else "spread_ms"
    spread = (FIGURES[key].timed and row.get(own)) or 0.0
    if key == "images_per_s":
        return float(spread * value / row["step_ms"]) if row.get("step_ms") else 0.0
    return float(spread)


# --- ratios ------------------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """One figure of a row, before and after.

    Attributes:
        worse: after over before, or before over after where higher is better, drift taken out: above 1 is worse.
            Infinite where the row has become wrong or does not run any more, 0 where it runs now.
        clear: they differ by more than the larger of their spreads.
        timed: drifts with the machine.
    """

    row: str
    figure: str
    before: float | None
    after: float | None
    worse: float
    clear: bool = True
    ours: bool = True
    timed: bool = False
    note: str = ""

    def __str__(self) -> str:
        if self.note:
            return f"{self.row}: {self.note}"
        return (
            f"{self.row}: {self.figure} {self.before:.4g} before, {self.after:.4g} after, {self.worse:.2f} times as bad"
        )


def drift(before: Sequence[Row], after: Sequence[Row]) -> float | None:
    """How much slower the machine was the second time: the baselines' median ratio of times; None without any."""
    found = [r.worse for r in _pairs(before, after, 1.0, timed=True) if not r.ours and not r.note]
    return statistics.median(found) if found else None


def ratios(before: Sequence[Row], after: Sequence[Row], drift: float | None = 1.0) -> list[Ratio]:
    """Every figure that both have of the same row, worst first.

    Args:
        before: rows as dictionaries, what to compare with.
        after: the same of what is judged.
        drift: by how much all times are longer in `after` for reasons of the machine's; None leaves times out. Memory
            and counts do not drift.
    """
    found = [*_pairs(before, after, drift or 1.0, timed=False)]
    if drift is not None:
        found += _pairs(before, after, drift, timed=True)
    return sorted(found + _turned(before, after), key=lambda r: -r.worse)


def against_base(rows: Sequence[Row]) -> list[Ratio]:
    """Ours against another revision in the same run, whose variants are called "... @ REV"."""
    base = [{**row, "variant": row["variant"].partition(" @ ")[0]} for row in rows if " @ " in row["variant"]]
    return ratios(base, [row for row in rows if is_ours(row)])


def regressions(found: Sequence[Ratio], threshold: float) -> list[Ratio]:
    """Those of ours that are worse by more than `threshold` and by more than their spread, worst first."""
    return sorted((r for r in found if r.ours and r.clear and r.worse > threshold), key=lambda r: -r.worse)


def _pairs(before: Sequence[Row], after: Sequence[Row], drift: float, *, timed: bool) -> Iterator[Ratio]:
    earlier = _keyed(before, after)
    for key, row in _keyed(after, before).items():
        old = {label: (was, spread) for label, _, was, spread in _figures(earlier.get(key, {}))}
        for label, figure, value, spread in _figures(row):
            if label not in old or figure.timed != timed or earlier[key].get("note") or row.get("note"):
                continue
            was, was_spread = old[label]
            scale = 1.0 if not timed else drift if figure.higher else 1 / drift
            clear = abs(scale * value - was) > max(was_spread, scale * spread)
            low, high = (scale * value, was) if figure.higher else (was, scale * value)
            low, high = max(low, figure.unsure), max(high, figure.unsure)
            worse = high / low if low > 0 else math.inf if high > 0 else 1.0
            yield Ratio(called(row), label, was, value, worse, clear, is_ours(row), timed)


def _turned(before: Sequence[Row], after: Sequence[Row]) -> list[Ratio]:
    """Rows that are wrong or do not run on one side alone."""
    earlier, found = _keyed(before, after), []
    for key, row in _keyed(after, before).items():
        if key in earlier and bool(earlier[key].get("note")) != bool(row.get("note")):
            worse, note = (math.inf, row["note"]) if row.get("note") else (0.0, "measured now, not before")
            found.append(Ratio(called(row), "-", None, None, worse, ours=is_ours(row), note=note))
    return found


# --- two files ---------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Of two files: ratios, worst first; drift, None without baselines; names of the rows that only one file has, and
    of those of ours that only the first one has.
    """

    ratios: list[Ratio]
    drift: float | None
    only_before: list[str]
    lost: list[str]
    only_after: list[str]


def compare(before: Results, after: Results, *, anyway: bool = False) -> Comparison:
    """What changed from one file to the other, times relative to those of the baselines where there are any.

    Args:
        anyway: also if they are of different devices, whose times are compared only relative to baselines.

    Raises:
        InputError: when the files are of different benchmarks or devices, or have no row in common.
    """
    same = before.device == after.device
    require(
        before.bench == after.bench,
        f"{after.path} must be of the benchmark {before.bench} as {before.path} is, got {after.bench}",
    )
    require(
        same or anyway,
        f"{after.path} must be of the device of {before.path}, {before.device}, got {after.device}; --anyway compares",
    )
    found = drift(before.rows, after.rows)
    keys, others = _keyed(before.rows, after.rows), _keyed(after.rows, before.rows)
    require(bool(keys.keys() & others.keys()), f"{before.path} and {after.path} must have rows in common, got none")
    only = [
        [called(row) for key, row in one.items() if key not in two] for one, two in ((keys, others), (others, keys))
    ]
    lost = [called(row) for key, row in keys.items() if key not in others and is_ours(row)]
    return Comparison(ratios(before.rows, after.rows, found or (1.0 if same else None)), found, only[0], lost, only[1])
