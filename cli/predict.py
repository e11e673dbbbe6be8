"""`coverfast predict`: a trained network on image files."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from coverfast.checks import InputError, printable, require
from coverfast.cli.options import OwnBackbone

if TYPE_CHECKING:
    from coverfast.downstream.network import Network
    from coverfast.downstream.prediction import Predicted
    from coverfast.ingest import Source


class _Files(NamedTuple):
    """Where the results of an image go."""

    labels: Path
    probabilities: Path | None
    overlay: Path | None


def predict(
    network: Annotated[Path, typer.Argument(help="A network.safetensors, or the run folder that holds one.")],
    images: Annotated[
        list[Path],
        typer.Argument(help="Files or folders: NIfTI, DICOM, NRRD, MetaImage, PNG, JPEG, TIFF, npy, npz."),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default runs/<date>-<time>-predict.")] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Write those of every class too.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    volume: Annotated[int | None, typer.Option(min=0, help="Which volume of a 4D image.")] = None,
    overlap: Annotated[float, typer.Option(min=0, max=0.95, help="Of neighbouring windows, a part of a side.")] = 0.5,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 4,
    backbone: OwnBackbone = None,
) -> None:
    """Segment or classify images with a fine-tuned network.

    Every image passes through the preprocessing of the shard that the network learned from. A segmentation comes back
    as NAME-labels in the image's own format and geometry, with NAME-overlay.png to look at; a classification as one
    predictions.csv.
    """
    from coverfast.cli.counting import counting
    from coverfast.cli.images import learned_preprocessing, result_names
    from coverfast.disk import explained
    from coverfast.downstream.network import load_network
    from coverfast.downstream.prediction import predict_source
    from coverfast.downstream.windows import fitting_memory
    from coverfast.ingest import scan
    from coverfast.training.assembly import choose_device

    found = scan(images)
    loaded = load_network(network, own=backbone)
    dense = loaded.task == "segmentation"
    require(dense or not probabilities, "probabilities of a classification are in predictions.csv, without the flag")
    folder = out or Path(f"runs/{datetime.now():%Y%m%d-%H%M%S}-predict")
    preprocessing, notes = learned_preprocessing(loaded.preprocessing)
    drawn = dense and _can_draw(notes)
    files = [
        _files(folder, name, source, probabilities, drawn)
        for source, name in zip(found.sources, result_names(found.sources), strict=True)
    ]
    table = folder / "predictions.csv"
    _check_new([path for f in files for path in f if path] if dense else [table], overwrite)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    loaded.to(choose_device(device))
    refused = list(found.refused)
    rows: list[list[str]] = []
    with counting("images", len(found.sources)) as (tell, done):
        for note in notes:
            tell(f"note: {note}")
        for number, (source, target) in enumerate(zip(found.sources, files, strict=True)):

            def part(share: float, before: int = number) -> None:
                done(before + share)

            try:
                with fitting_memory(loaded, batch, source.path):
                    predicted = predict_source(
                        *(loaded, source, preprocessing),
                        volume=volume,
                        probabilities=probabilities,
                        overlap=overlap,
                        batch=batch,
                        progress=part,
                    )
                if dense:
                    tell(_save(loaded, source, predicted, target))
                else:
                    rows.append(_row(loaded, source, predicted))
            except InputError as error:
                refused.append(str(error))
            done(number + 1)
    if rows:
        _write_table(table, loaded.names, rows)
        print(f"{table}: {len(rows)} image{'s' * (len(rows) != 1)}")
    for text in refused:
        print(f"error: {printable(text)}", file=sys.stderr)
    if refused:
        raise typer.Exit(2)


def _can_draw(notes: list[str]) -> bool:
    from coverfast.report.sheet import need_matplotlib

    try:
        need_matplotlib()
    except InputError as error:
        notes.append(f"no overlays: {error}")
        return False
    return True


def _files(folder: Path, name: str, source: Source, probabilities: bool, drawn: bool) -> _Files:
    from coverfast.downstream.prediction_files import suffixes

    labels, scores = suffixes(source)
    return _Files(
        folder / f"{name}-labels{labels}",
        folder / f"{name}-probabilities{scores}" if probabilities else None,
        folder / f"{name}-overlay.png" if drawn else None,
    )


def _check_new(paths: Sequence[Path], overwrite: bool) -> None:
    there = [] if overwrite else [path for path in paths if path.exists()]
    more = f" and {len(there) - 1} more" if len(there) > 1 else ""
    require(not there, f"{there[0] if there else ''}{more} must be new, it exists already; see --overwrite or --out")


def _save(network: Network, source: Source, predicted: Predicted, files: _Files) -> str:
    """Write what belongs to an image, the label map first, and say what is in it."""
    from coverfast.disk import write_atomically
    from coverfast.downstream.prediction_files import write_labels, write_probabilities

    labels, sample = predicted.labels, predicted.sample
    assert labels is not None
    write_labels(files.labels, labels, network.values, source, sample)
    if files.probabilities:
        assert predicted.probabilities is not None
        write_probabilities(files.probabilities, predicted.probabilities, source, sample)
    shares = _shares(network.names, labels)
    if files.overlay:
        from coverfast.report.cases import CaseView, overlay_sheet

        view = CaseView(source.path.name, sample.normalised(), sample.spacing, labels, note=source.path.name)
        write_atomically(files.overlay, overlay_sheet(view, network.names).png())
    return f"{files.labels}: {shares}"


def _shares(names: Sequence[str], labels: Any) -> str:
    """The foreground classes that are there, with their part of the pixels."""
    import numpy as np

    counts = np.bincount(labels.ravel(), minlength=len(names))
    parts = [f"{name} {count / labels.size:.1%}" for name, count in list(zip(names, counts, strict=True))[1:] if count]
    return ", ".join(parts) or f"nothing but {names[0]}"


def _row(network: Network, source: Source, predicted: Predicted) -> list[str]:
    assert predicted.probabilities is not None
    best = network.names[int(predicted.probabilities.argmax())]
    return [str(source.path), best, *(f"{p:.6f}" for p in predicted.probabilities)]


def _write_table(path: Path, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from coverfast.disk import write_atomically

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["file", "class", *names], *rows])
    write_atomically(path, text.getvalue())
