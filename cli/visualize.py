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
from coverfast.cli.options import OwnBackbone, OwnMethod

if TYPE_CHECKING:
    from torch import Tensor

    from coverfast.ingest import Source
    from coverfast.methods import Batch, Pretext


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
    method: OwnMethod = None,
) -> None:
    """Show what a pretrained network makes of images: views, fields, features, matches.

    Every image passes through the preprocessing of the shard that the network learned from and gets a folder with an
    HTML page; several get a page over them. A method that learns from pairs is shown the first image with each of the
    others.
    """
    from coverfast.cli.images import learned_preprocessing, result_names
    from coverfast.ingest import scan
    from coverfast.report import Entry, Pictures, load_metrics, on_host, write_index, write_report
    from coverfast.report.sheet import need_matplotlib
    from coverfast.training.assembly import choose_device
    from coverfast.training.restore import restore_method

    need_matplotlib()
    found = scan(images)
    restored = restore_method(checkpoint, choose_device(device), own=backbone, own_method=method, tell=print)
    trained = restored.method
    if trained is None:
        own = restored.settings.method
        raise InputError(f"{checkpoint} is of a method of your own ({own}): say --method {own}")
    pairs, sources = trained.pairs, list(found.sources)
    require(
        not pairs or len(sources) > 1,
        f"images must be at least 2 for a method that learns from pairs, got {len(sources)}",
    )
    preprocessing, notes = learned_preprocessing(restored.preprocessing)
    metrics = load_metrics(restored.metrics) if restored.metrics else {}
    folder = out or Path(f"runs/{datetime.now():%Y%m%d-%H%M%S}-visualize")
    entries: list[Entry] = []
    refused = list(found.refused)
    fixed: Tensor | None = None
    before = ""
    with _progress(len(sources)) as (tell, step):
        for note in (*restored.notes, *(f"note: {text}" for text in notes)):
            tell(note)
        for source, name in zip(sources, result_names(sources), strict=True):
            try:
                image = _image(source, trained, preprocessing, volume)
            except InputError as error:
                refused.append(str(error))
                step()
                continue
            if pairs and fixed is None:
                fixed, first, before = image, source.path, f"{name}-"
                step()
                continue
            batch = _batch([image] if fixed is None else [fixed, image], seed)
            pictures = on_host(trained.pictures(batch))
            about = {
                **({"image": source.path} if fixed is None else {"A": first, "B": source.path}),
                "pixels": ", ".join("x".join(map(str, size)) for size in batch.sizes.tolist()),
                "preprocessing": ", ".join(f"{key} {value}" for key, value in preprocessing.items()),
                "checkpoint": f"{checkpoint}, iteration {restored.iteration}",
                "views": f"{'x'.join(map(str, trained.crop))}, seed {seed}",
            }
            name = before + name
            page = write_report(folder / name, pictures, metrics, title=name, about=about)
            summary = pictures.summary() if pictures else "no pictures"
            apart = isinstance(pictures, Pictures) and not pictures.mask.any()
            far = "; the views are small for the image, another --seed draws others" if apart else ""
            tell(f"{page}: {summary}{far}")
            entries.append(Entry(name, name, summary, pictured=pictures is not None))
            step()
    if len(entries) > 1:
        print(write_index(folder, entries, title=f"{len(entries)} images, iteration {restored.iteration}"))
    for text in refused:
        print(f"error: {printable(text)}", file=sys.stderr)
    if refused:
        raise typer.Exit(2)


def _image(source: Source, method: Pretext, preprocessing: dict[str, Any], volume: int | None) -> Tensor:
    """An image `(C, *S)` as training saw those of the shard, on the device."""
    import torch

    from coverfast.backbones import Backbone
    from coverfast.ingest import preprocess, read_source

    path, backbone = source.path, method.backbone
    assert isinstance(backbone, Backbone)
    sample = read_source(source, volume=volume)
    ndim, channels = backbone.ndim, backbone.in_channels
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
    return torch.from_numpy(sample.normalised()).to(next(method.parameters()).device)


def _batch(images: list[Tensor], seed: int) -> Batch:
    """Images as a batch, zero-filled to a common size."""
    import torch

    from coverfast.methods import Batch

    sizes = torch.tensor([image.shape[1:] for image in images])
    together = images[0].new_zeros(len(images), len(images[0]), *sizes.amax(0).tolist())
    for slot, image in zip(together, images, strict=True):
        slot[(..., *map(slice, image.shape[1:]))] = image
    return Batch(together, sizes, torch.zeros_like(sizes), torch.arange(len(images)), seed, 0)


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
