"""`coverfast visualize`: what a trained network makes of any image."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coverfast.checks import InputError, per_axis, printable, require
from coverfast.cli.options import OwnBackbone

if TYPE_CHECKING:
    from coverfast.ingest import Source
    from coverfast.methods import Batch
    from coverfast.training.restore import Restored


def visualize(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder for its newest one.")],
    images: Annotated[
        list[Path],
        typer.Argument(help="Files or folders: NIfTI, DICOM, NRRD, MetaImage, PNG, JPEG, TIFF, npy, npz."),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default runs/<date>-<time>-visualize.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other views.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    volume: Annotated[int | None, typer.Option(min=0, help="Which volume of a 4D image.")] = None,
    backbone: OwnBackbone = None,
) -> None:
    """Show what a pretrained network makes of images: views, fields, features, matches.

    Every image passes through the preprocessing of the shard that the network learned from and gets a folder with an
    HTML page; several get a page over them.
    """
    from coverfast.cli.images import learned_preprocessing, result_names
    from coverfast.ingest import scan
    from coverfast.report import Entry, Pictures, load_metrics, write_index, write_report
    from coverfast.report.sheet import need_matplotlib
    from coverfast.training.assembly import choose_device
    from coverfast.training.restore import restore_method

    need_matplotlib()
    found = scan(images)
    restored = restore_method(checkpoint, choose_device(device), own=backbone, tell=print)
    preprocessing, notes = learned_preprocessing(restored.preprocessing)
    metrics = load_metrics(restored.metrics) if restored.metrics else {}
    folder = out or Path(f"runs/{datetime.now():%Y%m%d-%H%M%S}-visualize")
    entries: list[Entry] = []
    refused = list(found.refused)
    with _progress(len(found.sources)) as (tell, step):
        for note in (*restored.notes, *(f"note: {text}" for text in notes)):
            tell(note)
        for source, name in zip(found.sources, result_names(found.sources), strict=True):
            try:
                batch = _batch(source, restored, preprocessing, seed, volume)
            except InputError as error:
                refused.append(str(error))
                step()
                continue
            pictures = Pictures.of(restored.method.pictures(batch))
            about = {
                "image": source.path,
                "pixels": "x".join(map(str, batch.sizes[0].tolist())),
                "preprocessing": ", ".join(f"{key} {value}" for key, value in preprocessing.items()),
                "checkpoint": f"{checkpoint}, iteration {restored.iteration}",
                "views": f"{'x'.join(map(str, pictures.size))}, seed {seed}",
            }
            page = write_report(folder / name, pictures, metrics, title=name, about=about)
            apart = "" if pictures.mask.any() else "; the views are small for the image, another --seed draws others"
            tell(f"{page}: {pictures.summary()}{apart}")
            entries.append(Entry(name, name, pictures.summary()))
            step()
    if len(entries) > 1:
        print(write_index(folder, entries, title=f"{len(entries)} images, iteration {restored.iteration}"))
    for text in refused:
        print(f"error: {printable(text)}", file=sys.stderr)
    if refused:
        raise typer.Exit(2)


def _batch(source: Source, restored: Restored, preprocessing: dict[str, Any], seed: int, volume: int | None) -> Batch:
    """An image as a batch of one, as training saw those of the shard."""
    import torch

    from coverfast.backbones import Backbone
    from coverfast.ingest import preprocess, read_source
    from coverfast.methods import Batch

    method, path = restored.method, source.path
    assert isinstance(method.backbone, Backbone)
    sample = read_source(source, volume=volume)
    ndim, channels = method.pyramid.ndim, method.backbone.in_channels
    require(
        sample.pixels.ndim - 1 == ndim,
        f"{path} must be {ndim}D like the images the network learned from, got {sample.pixels.ndim - 1}D",
    )
    require(
        len(sample.pixels) == channels,
        f"{path} must have {channels} channel(s) like the images the network learned from, got {len(sample.pixels)}",
    )
    sample = preprocess(sample, preprocessing)
    size, crop = sample.pixels.shape[1:], per_axis("crop", method.crop, ndim)
    if not method.pad and any(s < c for s, c in zip(size, crop, strict=True)):
        raise InputError(
            f"{path} must be at least {'x'.join(map(str, crop))} pixels, the size of the views, got "
            f"{'x'.join(map(str, size))} after the preprocessing {preprocessing['preset']!r}; enlarge it, or take a "
            "network that was pretrained with --pad or a smaller --crop"
        )
    image = torch.from_numpy(sample.normalised())[None].to(next(method.parameters()).device)
    corner = torch.zeros(1, ndim, dtype=torch.int64)
    return Batch(image, torch.tensor([size]), corner, torch.zeros(1, dtype=torch.int64), seed, 0)


@contextmanager
def _progress(count: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Give what prints a line and what counts an image; a bar for several of them, on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if count < 2 or not console.is_terminal:
        yield (lambda text: print(printable(text), flush=True)), (lambda: None)
        return
    with Progress(console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task("images", total=count)
        yield (lambda text: print(printable(text), flush=True)), (lambda: bar.advance(task))
