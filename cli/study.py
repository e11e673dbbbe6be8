"""`coverfast study`: whether pretraining helped, whether it helps again, and what features look like."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coverfast.cli.options import OwnBackbone, with_settings
from coverfast.study.settings import RetestSettings, TransferSettings

if TYPE_CHECKING:
    from coverfast.study.folder import Study
    from coverfast.study.progress import Moment, Watch, Work
    from coverfast.study.settings import StudySettings

app = typer.Typer(
    help="Whether pretraining helped, whether it helps again, and features by class.", no_args_is_help=True
)

#: Seconds between lines where there is no terminal to draw a bar on.
_SECONDS = 15.0

Out = Annotated[
    Path | None, typer.Option(help="new folder, or that of a study to go on with; default runs/<date>-<time>-<study>")
]
Config = Annotated[
    Path | None,
    typer.Option(help="TOML file of settings, with tables pretrain, finetune and probe of those of the runs"),
]


@app.command()
@with_settings(TransferSettings)
def transfer(flags: dict[str, Any], out: Out = None, config: Config = None) -> None:
    """Pretrain, with one method or several alike, then train with few labels from scratch and from each backbone.

    All are fine-tuned and linearly evaluated, on test images that nothing else has seen; writes a table, plots and an
    example. A study that was stopped goes on with the same --out.
    """
    from coverfast.cli.tables import print_table
    from coverfast.study.statistics import METHOD
    from coverfast.study.tables import transfer_rows
    from coverfast.study.transfer import transfer as library
    from coverfast.study.transfer import works

    study, result = _run(TransferSettings, library, works, "transfer", flags, out, config)
    print_table("Transfer", *transfer_rows(result))
    print(METHOD)
    _point(study, "transfer.json", "transfer.md", "transfer.png", "convergence.png", "example.png")


@app.command()
@with_settings(RetestSettings)
def retest(flags: dict[str, Any], out: Out = None, config: Config = None) -> None:
    """Pretrain and fine-tune twice from different seeds: do the same test cases score high? (COVER Table 4)

    A study that was stopped goes on with the same --out.
    """
    from coverfast.study.retest import retest as library
    from coverfast.study.retest import sentence, works

    study, result = _run(RetestSettings, library, works, "retest", flags, out, config)
    print(sentence(result))
    _point(study, "retest.json", "retest.md", "retest.png")


@app.command()
def features(
    backbones: Annotated[list[Path], typer.Argument(help="backbone.safetensors files, or runs that have one")],
    data: Annotated[list[str], typer.Option(help="labelled shard, folder or glob of shards; may be repeated")],
    split: Annotated[str, typer.Option(help="train, val, test or all")] = "test",
    samples: Annotated[int, typer.Option(min=10, help="pixels, as many of every class")] = 2000,
    level: Annotated[int, typer.Option(help="of the features: 0 is the coarsest, -1 the finest")] = -1,
    seed: Annotated[int, typer.Option(min=0, help="key of the pixels, the random weights and t-SNE")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    out: Annotated[Path | None, typer.Option(help="folder; default runs/<date>-<time>-features")] = None,
    backbone: OwnBackbone = None,
) -> None:
    """Show features of pixels by class (PCA, t-SNE) beside those of random weights, and how far classes lie apart."""
    from coverfast.cli.progress import working
    from coverfast.cli.tables import print_table
    from coverfast.study.features import study_features
    from coverfast.study.tables import features_rows

    folder = out or _folder("features")
    with working("features") as tell:
        how: dict[str, Any] = {"split": split, "samples": samples, "level": level, "seed": seed, "device": device}
        result = study_features(backbones, data, folder, **how, own=backbone, tell=tell)
    print_table("Features by class", *features_rows(result))
    for name in ("features.json", "features.md", "features.png"):
        print(f"  {folder / name}")


def _run(
    kind: type[StudySettings],
    library: Callable[[Study, Watch], dict[str, Any]],
    works: Callable[[Study], list[Work]],
    name: str,
    flags: dict[str, Any],
    out: Path | None,
    config: Path | None,
) -> tuple[Study, dict[str, Any]]:
    from coverfast.study.folder import Study
    from coverfast.study.progress import Watch

    study = Study.open(kind, out or _folder(name), flags, config)
    s, todo = study.settings, works(study)
    print(f"{study.folder}: {len(todo)} runs, {s.preset}, {', '.join(s.data)}", flush=True)
    started = time.monotonic()
    try:
        with _progress(todo) as (tell, note):
            result = library(study, Watch(todo, tell, note))
    except (KeyboardInterrupt, SystemExit):
        print(f"stopped; go on with: coverfast study {name} --out {shlex.quote(str(study.folder))}")
        raise
    print(f"done in {time.monotonic() - started:.0f} s")
    return study, result


def _folder(name: str) -> Path:
    return Path(f"runs/{datetime.now():%Y%m%d-%H%M%S}-{name}")


def _point(study: Study, *names: str) -> None:
    for name in names:
        if (study.folder / name).exists():
            print(f"  {study.folder / name}")


@contextmanager
def _progress(todo: Sequence[Work]) -> Iterator[tuple[Callable[[Moment], None], Callable[[str], None]]]:
    """Give what shows where a study stands, in a bar on a terminal or a line now and then, and what prints a note."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console()
    if not console.is_terminal:
        printed = -math.inf

        def line(moment: Moment) -> None:
            nonlocal printed
            now = time.monotonic()
            if now - printed >= _SECONDS or moment.iteration == moment.iterations:
                printed = now
                print(_text(moment), flush=True)

        yield line, lambda text: print(text, flush=True)
        return
    columns = [BarColumn(bar_width=20), TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.description}")]
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=1.0)

        def draw(moment: Moment) -> None:
            bar.update(task, completed=moment.share, description=_text(moment))

        yield draw, lambda text: bar.console.print(text, highlight=False, markup=False)


def _text(moment: Moment) -> str:
    """Run, iteration, loss and time left, for a line."""
    parts = [f"run {moment.number}/{moment.total} {moment.name} {moment.iteration}/{moment.iterations}"]
    if math.isfinite(loss := moment.figures.get("loss", math.nan)):
        parts.append(f"loss {loss:.3f}")
    if moment.left is not None:
        minutes, seconds = divmod(round(moment.left), 60)
        parts.append(f"{minutes} min {seconds:02d} s left")
    return "  ".join(parts)
