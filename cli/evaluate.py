"""`coverfast evaluate`: a trained network against labelled shards."""

from __future__ import annotations

import hashlib
import json
import math
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coverfast.checks import InputError, printable
from coverfast.cli.options import OwnBackbone

if TYPE_CHECKING:
    from coverfast.downstream.bootstrap import Interval
    from coverfast.downstream.evaluation import Evaluation
    from coverfast.downstream.network import Network
    from coverfast.report.sheet import Sheet
    from coverfast.shard_set import ShardSet

Table = tuple[list[str], list[list[str]]]
# Columns of a terminal that a segmentation's table takes.
_WIDE = 112


def evaluate(
    network: Annotated[Path, typer.Argument(help="A network.safetensors, or the run folder that holds one.")],
    data: Annotated[list[Path], typer.Option(help="Labelled shards: files, folders, globs; repeats.")],
    split: Annotated[str, typer.Option(help="train, val, test or all")] = "test",
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default runs/<date>-<time>-evaluate.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    tolerance: Annotated[float, typer.Option(min=0, help="Of the surface Dice, mm.")] = 1.0,
    overlap: Annotated[float, typer.Option(min=0, max=0.95, help="Of neighbouring windows, a part of a side.")] = 0.5,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 4,
    backbone: OwnBackbone = None,
) -> None:
    """Measure a fine-tuned network on labelled images: every case, every class, means with intervals.

    Segmentation: DSC, IoU, HD95 and surface Dice; classification: accuracy and AUC. The folder gets metrics.json, and a
    page with pictures of the best, the median and the worst case.
    """
    from rich.console import Console
    from rich.markup import escape

    from coverfast.cli.counting import counting
    from coverfast.cli.tables import print_table
    from coverfast.downstream.evaluation import check_fits
    from coverfast.downstream.evaluation import evaluate as measure
    from coverfast.downstream.network import load_network
    from coverfast.downstream.windows import fitting_memory
    from coverfast.shard_set import ShardSet
    from coverfast.training.assembly import choose_device

    loaded, shards = load_network(network, own=backbone), ShardSet(data, split)
    check_fits(loaded, shards)
    chosen = choose_device(device)
    with counting("cases", len(shards)) as (tell, done):
        with fitting_memory(loaded, batch, f"a sample of {shards.paths[0]}"):
            found = measure(
                *(loaded, shards),
                device=chosen,
                overlap=overlap,
                batch=batch,
                tolerance=tolerance,
                progress=lambda cases, _: done(cases),
            )
        for note in found.notes:
            tell(f"note: {note}")
    folder = out or Path(f"runs/{datetime.now():%Y%m%d-%H%M%S}-evaluate")
    _write(folder, found, _about(network, loaded, shards, str(chosen)))
    title = f"{network} on {len(found.cases)} cases, split {split}"
    console = Console()
    narrow = console.is_terminal and console.width < _WIDE
    headings, rows = _table(found, narrow)
    print_table(escape(printable(title)), headings, [[escape(printable(cell)) for cell in row] for row in rows])
    print(folder / "metrics.json")
    try:
        pictures = _pictures(found, loaded, shards, batch)
    except InputError as error:
        print(f"note: no pictures: {error}")
        return
    from coverfast.report.cases import write_page

    facts = {
        "network": f"{network}, {found.task}",
        "data": ", ".join(map(str, shards.paths)) + f", split {split}",
        "content": shards.content_hash,
        "surface Dice within": f"{tolerance:g} mm",
        "intervals": found.settings["intervals"],
    }
    if found.notes:
        facts["note"] = "; ".join(found.notes)
    if found.task != "segmentation":
        del facts["surface Dice within"]
    print(write_page(folder, title, facts, _table(found), pictures))


def _table(found: Evaluation, narrow: bool = False) -> Table:
    """Headings and rows; narrow: of a segmentation the intervals of the DSC alone."""
    return _segmented(found, narrow) if found.task == "segmentation" else _classified(found)


def _segmented(found: Evaluation, narrow: bool) -> Table:
    def text(interval: Interval, digits: int = 3) -> str:
        return _text(interval._replace(low=math.nan) if narrow else interval, digits)

    rows = []
    for name, figures in {"mean": found.figures, **found.classes}.items():
        seldom = name in found.classes and figures["hd95"].cases < len(found.cases)
        count = f", {figures['hd95'].cases} of {len(found.cases)}" if seldom else ""
        others = (text(figures["iou"]), text(figures["hd95"], 2) + count, text(figures["surface_dice"]))
        rows.append([name, _text(figures["dsc"]), *others])
    return ["class", "DSC", "IoU", "HD95, mm", "surface Dice"], rows


def _classified(found: Evaluation) -> Table:
    names = {"accuracy": "accuracy", "auc": "AUC"}
    rows = [[names[name], _text(interval), str(interval.cases)] for name, interval in found.figures.items()]
    for name, figures in found.classes.items():
        cases = sum(case.labels is not None and case.labels[0] == name for case in found.cases)
        rows.append([f"AUC of {name}", _text(figures["auc"]), str(cases)])
    return ["figure", "value", "cases"], rows


def _text(interval: Interval, digits: int = 3) -> str:
    if math.isnan(interval.value):
        return "-"
    ends = "" if math.isnan(interval.low) else f" ({interval.low:.{digits}f} to {interval.high:.{digits}f})"
    return f"{interval.value:.{digits}f}{ends}"


def _about(path: Path, network: Network, shards: ShardSet, device: str) -> dict[str, Any]:
    """What the figures come from."""
    from coverfast.downstream.network import network_file
    from coverfast.training.runs import provenance

    with network_file(path).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "network": {
            "path": str(network_file(path).absolute()),
            "sha256": sha256,
            "names": list(network.names),
            "values": list(network.values),
            "preprocessing": network.preprocessing,
        },
        "data": {
            "paths": list(map(str, shards.paths)),
            "split": shards.split,
            "content_sha256": shards.content_hash,
            "preprocessing": shards.preprocessing,
        },
        "provenance": provenance(shards.content_hash) | {"device": device},
    }


def _write(folder: Path, found: Evaluation, about: dict[str, Any]) -> None:
    from coverfast.disk import explained, write_atomically

    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "metrics.json", json.dumps(about | found.plain(), indent=1, allow_nan=False) + "\n")


def _pictures(found: Evaluation, network: Network, shards: ShardSet, batch: int) -> list[tuple[str, str, Sheet]]:
    """Of the best, the median and the worst case: name, caption and sheet."""
    from coverfast.downstream.evaluation import predict_case
    from coverfast.report.cases import CaseView, case_sheet, overlay_sheet
    from coverfast.report.sheet import need_matplotlib

    need_matplotlib()
    ranked = found.ranked()
    chosen = {"best": ranked[-1]}
    if len(ranked) > 2:
        chosen["median"] = ranked[(len(ranked) - 1) // 2]
    if len(ranked) > 1:
        chosen["worst"] = ranked[0]
    pictures = []
    for name, case in chosen.items():
        seen = predict_case(network, shards, case.index, overlap=found.settings["overlap"], batch=batch)
        if case.labels:
            note = f"{case.labels[0]}, predicted {case.labels[1]}, probability of the truth {case.score:.2f}"
            sheet = overlay_sheet(CaseView(case.source, seen.image, seen.spacing, note=note), found.names)
        else:
            note = f"mean DSC {case.score:.3f}"
            view = CaseView(case.source, seen.image, seen.spacing, seen.prediction, seen.truth, note)
            sheet = case_sheet(view, found.names)
        pictures.append((name, f"{case.source}: {note}", sheet))
    return pictures
