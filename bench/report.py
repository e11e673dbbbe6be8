"""The pages that are made from saved results: bench/RESULTS.md, a table in the README, and the pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from coverfast.bench.columns import Column, cell, columns_of, markdown, words
from coverfast.bench.compare import Results, Row, is_ours, read_results
from coverfast.bench.figures import amount, firsts, headlines, ratio, same_case, short, time_of
from coverfast.bench.plots import DRAWN, digest, digest_of, draw
from coverfast.checks import InputError, require
from coverfast.disk import write_atomically
from coverfast.report.sheet import need_matplotlib

#: What stands around the README's table.
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

_ORDER = (
    *("mov", "vpa", "head", "step", "data", "warp", "compose", "fuse"),
    *("norm", "losses", "ncc", "views", "launches", "static"),
)
_VERSIONS = ("torch", "python", "triton", "cuda", "driver")
_HEAD = """\
# Results

Written by `coverfast bench report` from the files under `results/`, not by hand; [what each measures](README.md).

ms: medians. spread: between the quartiles. error: largest difference from the definition in float64, over the largest
value. x ours: time over that of the first coverfast variant of the same case; below 1 it beats ours. x floor:
time over the least that the rates of the device allow. extra MB: at the peak, beyond inputs and the output's gradient.
What was wrong, did not run or did not fit has no time and a note. Errors of vpa and step are those of a check in
float64, of head of one in float32; the others' are in the dtype that is timed. counted (vpa): FLOP of eager B by
torch's counter, which also scales every score; exponentials: of the softmax, which are no FLOP here.
"""


#: The paper's figure and ours (COVER 4.3.5).
_VPA = """\
**The paper's figure and ours.** COVER 4.3.5 says of the pyramid that its cost stays at 0.2, and of the direct template
that it is "more than 52 times" that at 121 x 121; the text names neither the unit nor the grid nor what is counted.
Counted from the definitions, two FLOP for each product of a tap with its key's 8 channels and its offset's components,
and the projections of both views, the four finest levels at N = 9, which see 121 pixels, take 2,802 multiply-adds a
pixel and the direct template 146,922: 52.4 times, the paper's figure. (Against the same template all five levels,
which see 249, leave 49.9 times, and all five at N = 7, which see 187, 60.3.) On 256 x 256 pixels, our guess, the
pyramid's are 0.09, 0.12, 0.16 and 0.18 G multiply-adds for one to four levels: 0.2 to one digit in the end, but not
constant, it doubles. (On the paper's crop of 384 x 384 it would be 0.19 to 0.41.) At four levels more than half are
projections; without these it is 115.7 times, and the pyramid grows by 1.56, as a level has a quarter of the pixels of
the one below. The direct template grows with the square of its width, in 3D with the cube. Times and bytes need not
follow: where windows are narrow the calls and the memory around the products take longer than those, and taps outside
of the grid count as FLOP though ours skips their products.
"""


# --- sections ----------------------------------------------------------------------------------------------------


def _shown(found: Results) -> Sequence[Row]:
    """All rows, but only the ten fastest launches of every case that was tuned."""
    if found.bench != "tune":
        return found.rows
    timed = sorted((row for row in found.rows if time_of(row)), key=lambda row: row["both_ms"])
    cases = dict.fromkeys(row["case"] for row in found.rows)
    return [row for case in cases for row in [row for row in timed if row["case"] == case][:10]]


def _file(found: Results, folder: Path, versions: str) -> Iterator[str]:
    """What the page says of one file, in blocks."""
    where = found.path.relative_to(folder.parent).as_posix()
    yield f"### {found.path.stem}\n"
    if found.bench in DRAWN and found.rows:
        yield f"![{found.path.stem}]({where.removesuffix('.json')}.png)\n"
    rows = _shown(found)
    yield markdown(columns_of(found.bench, rows), rows) if rows else "Nothing was measured.\n"
    if found.bench in DRAWN and (compared := _faster(rows)):
        beaten = [f"{case} ({', '.join(names)})" for case, names in compared.items() if names]
        which = f": {'; '.join(beaten)}" if beaten else ""
        count = f"{len(beaten)} of {len(compared)}"
        yield f"Cases with a baseline that is faster than ours, beyond spreads: {count}{which}.\n"
    if found.bench == "vpa":
        yield _VPA
    if parts := [row for row in rows if row.get("parts_ms")]:
        names = list(dict.fromkeys(name for row in parts for name in row["parts_ms"]))
        flat = [{**dict.fromkeys(names), **row, **row["parts_ms"]} for row in parts]
        columns = [words("preset"), words("variant"), *(Column(name, itemgetter(name)) for name in names)]
        yield "Its parts in ms, without compilation:\n"
        yield markdown(columns, flat)
    facts = found.provenance
    own = "" if _versions(facts) == versions else f", {_versions(facts)}"
    yield f"`{facts.get('command')}`, commit {facts.get('commit')}{own}: [{found.path.name}]({where})\n"
    if found.rates:
        yield f"Measured at the start: {_rates(found.rates)}.\n"


def _faster(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Of every case with a time of ours and one of a baseline: the baselines that are faster, beyond both spreads."""
    ours, found = firsts(rows), dict[str, list[str]]()
    for row in rows:
        mine = ours.get(same_case(row))
        relative = None if is_ours(row) else ratio(row, mine)
        if relative is not None and mine is not None:
            name = row["preset"] if "preset" in row else f"{row['case']} {row['dtype']}"
            spread = max(row.get("spread_ms") or 0.0, mine.get("spread_ms") or 0.0)
            clear = (1 - relative) * (time_of(mine) or ("", 0.0))[1] > spread
            found.setdefault(name, []).extend([f"{row['variant']} {short(relative)}"] if clear else [])
    return found


def _rates(rates: Any) -> str:
    units = {"copy": "B/s", "matrix": "FLOP/s", "multiply_add": "FLOP/s", "exponential": "/s"}
    texts = []
    for name, value in rates.items():
        named = value.items() if isinstance(value, dict) else [("", value)]
        texts += [" ".join(f"{name.replace('_', '-')} {k} {amount(v, units.get(name, ''))}".split()) for k, v in named]
    return ", ".join(texts)


def _versions(facts: Any) -> str:
    return ", ".join(f"{name} {facts[name]}" for name in _VERSIONS if facts.get(name))


def _device(files: Sequence[Results]) -> tuple[str, str]:
    """Its name and what must be said of it."""
    facts = next((found.provenance for found in files if "device" in found.provenance), None)
    if facts is None:
        return "No device", "Counts, not timings: the same on every machine.\n"
    if "threads" in facts:
        name = f"{facts['device']}, {facts['threads']} threads"
        return name, "A CPU; nothing here says anything about a GPU.\n"
    return str(facts["device"]), ""


def results_page(folder: Path, files: Sequence[Results]) -> str:
    """All that was measured, by device and benchmark."""
    blocks = [_HEAD]
    for place in dict.fromkeys(found.path.parent for found in files):
        here = [found for found in files if found.path.parent == place]
        name, remark = _device(here)
        versions = _versions(here[0].provenance)
        blocks += [f"## {name}\n", *([remark] if remark else []), f"{versions}\n"]
        blocks += [block for found in here for block in _file(found, folder, versions)]
    return "\n".join(blocks)


def front_table(root: Path, files: Sequence[Results]) -> str:
    """The few figures of the front page, each with its file and device. Links are from `root`."""
    lines = ["| measured | result | file, device |", "|---|---|---|"]
    for found in files:
        if found.path.stem not in (found.bench, f"{found.bench}-2d", f"{found.bench}-3d"):
            continue  # a special case of what another file shows
        name = _device([found])[0]
        where = f"[{found.path.name}]({found.path.relative_to(root).as_posix()}), {name}"
        lines += [f"| {cell(what)} | {cell(text)} | {where} |" for what, text in headlines(found.bench, found.rows)]
    return "\n".join(lines) + "\n"


# --- files -------------------------------------------------------------------------------------------------------


def saved(folder: Path) -> list[Results]:
    """The files of results in the folders of devices, by device and benchmark."""
    files = [read_results(path) for path in sorted(folder.glob("*/*.json"))]
    require(bool(files), f"{folder} must have results as DEVICE/NAME.json, but it has none")
    order = {bench: number for number, bench in enumerate(_ORDER)}
    # What no device has measured comes last.
    return sorted(
        files,
        key=lambda f: ("device" not in f.provenance, f.path.parent.name, order.get(f.bench, len(order)), f.path.stem),
    )


def pages(folder: Path, files: Sequence[Results]) -> dict[Path, str]:
    """Of every page its whole text: `RESULTS.md` beside the folder, and above that the README if it has a place."""
    made = {folder.parent / "RESULTS.md": results_page(folder, files)}
    readme = folder.parent.parent / "README.md"
    text = readme.read_text("utf-8") if readme.exists() else ""
    if BEGIN in text or END in text:
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        once = bool(begin and end) and BEGIN not in after and END not in before + after
        require(once, f"{readme} must have {BEGIN} and then {END}, once each, but it has not")
        made[readme] = f"{before}{BEGIN}\n{front_table(readme.parent, files)}{END}{after}"
    return made


def pictures(files: Sequence[Results]) -> dict[Path, Results]:
    """Where a picture of which results belongs."""
    return {found.path.with_suffix(".png"): found for found in files if found.bench in DRAWN and found.rows}


class Made(NamedTuple):
    """Files that were out of date and are written, and why pictures are not, if so."""

    written: list[Path]
    without: str = ""


def out_of_date(folder: Path) -> list[Path]:
    """Pages and pictures that are not what the results give."""
    folder = folder.resolve()
    files = saved(folder)
    texts = [
        path for path, text in pages(folder, files).items() if not path.exists() or path.read_text("utf-8") != text
    ]
    return texts + [path for path, found in pictures(files).items() if digest_of(path) != digest(found)]


def write_report(folder: Path) -> Made:
    """Write what is out of date; without matplotlib the pages alone."""
    folder = folder.resolve()
    files = saved(folder)
    texts, drawn = pages(folder, files), pictures(files)
    written = out_of_date(folder)
    for path in [path for path in written if path in texts]:
        write_atomically(path, texts[path])
    if missing := [path for path in written if path in drawn]:
        try:
            need_matplotlib()
        except InputError as error:
            return Made([path for path in written if path in texts], str(error))
        for path in missing:
            write_atomically(path, draw(drawn[path]))
    return Made(written)
