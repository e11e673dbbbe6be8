"""`coverfast export`: trained networks as files for others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from coverfast.checks import printable
from coverfast.cli.options import OwnBackbone, ints


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A run folder, a checkpoint of pretraining, a backbone.safetensors or network.safetensors."
        ),
    ],
    to: Annotated[str, typer.Option(help="safetensors, torchscript, onnx or torch-export.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default beside the one that is read.")] = None,
    size: Annotated[
        Any,
        typer.Option(
            parser=ints,
            metavar="INTS",
            help="Size of the images it is made with; of the only ones it takes where a network cannot follow others.",
        ),
    ] = None,
    backbone: OwnBackbone = None,
) -> None:
    """Write a trained network as a file that needs no coverfast, after comparing what both make of an image.

    A backbone gives features_0, features_1, ... from coarse to fine, a fine-tuned network gives logits. Where the
    network allows it the file takes any batch and any size that the coarsest stride divides.
    """
    from coverfast.export import export as write

    with _progress() as (tell, progress):
        done = write(checkpoint, to, out, size=size, own=backbone, tell=tell, progress=progress)
    print(printable(f"{done.path}: {done.path.stat().st_size / 1e6:.1f} MB, {to}"))
    for line in done.lines:
        print(printable(f"  {line}"))


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Give what prints a line and what says what is being done: beside a spinner on a terminal, elsewhere nowhere."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    def tell(text: str) -> None:
        print(printable(text), flush=True)

    console = Console(stderr=True)
    if not console.is_terminal:
        yield tell, lambda text: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=None)
        yield tell, lambda text: bar.update(task, description=text)
