"""`coverfast pretrain`, `coverfast config` and `coverfast demo`."""

from __future__ import annotations

import shlex
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coverfast.checks import require
from coverfast.cli.options import with_settings
from coverfast.cli.progress import training_progress
from coverfast.training.config import to_toml
from coverfast.training.settings import PRESETS, Settings, preset_settings

if TYPE_CHECKING:
    from coverfast.training.pretrain import Pretraining


@with_settings(Settings)
def pretrain(
    flags: dict[str, Any],
    config: Annotated[Path | None, typer.Option(help="TOML file of settings; flags win over it")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --run DIR exactly")] = False,
) -> None:
    """Pretrain a backbone on a shard by vector contrastive learning.

    Settings come from a preset, then from --config, then from flags. The run folder holds the resolved configuration,
    metrics, checkpoints, backbone.safetensors and, with matplotlib, a picture. `coverfast config PRESET` shows what a
    preset sets.
    """
    from coverfast.training import plan as library
    from coverfast.training.world import processes

    with processes(float(flags.get("timeout", Settings.timeout)), flags.get("device", "auto")) as world:
        if resume:
            require(config is None, "config cannot be given with --resume: the run has its own")
            ready = library.resume(flags, world)
        else:
            ready = library.plan(flags, config, world)
        run_pretraining(ready)


def run_pretraining(ready: Pretraining) -> None:
    """Train with progress on the terminal and say where everything lies."""
    s = ready.settings
    if not ready.world.writes:
        ready.start()
        return
    for note in ready.notes:
        print(note)
    told = len(ready.notes)
    where = (
        f"{ready.world.size} processes on {ready.engine.device.type}" if ready.world.size > 1 else ready.engine.device
    )
    print(
        f"{s.preset}: iterations {ready.first} to {s.iterations}, batch {s.batch}, crop {'x'.join(map(str, s.crop))}, "
        f"{len(ready.shards)} sample(s) of {_first_of(ready.shards.paths)} (split {ready.shards.split}), "
        f"{len(ready.val) if ready.val else 0} held out, {ready.engine.choices.precision} on {where}"
    )
    started = time.monotonic()
    try:
        with training_progress(ready.first, s.iterations) as progress:
            ready.on_note = progress.note
            run = ready.start(on_step=progress.show)
    except (KeyboardInterrupt, SystemExit):
        if ready.run and ready.run.checkpoints.paths():
            print(f"stopped; continue with: coverfast pretrain --resume --run {shlex.quote(str(ready.run.folder))}")
        raise
    for note in ready.notes[told:]:
        print(note)
    print(f"done in {time.monotonic() - started:.0f} s: {run.folder}")
    for path, what in (
        (run.backbone, "the trained backbone, coverfast.load_backbone() reads it"),
        (run.report / "index.html", "views, fields, features, similarities and curves, to look at"),
        (run.metrics, "figures of every iteration"),
        (run.config, "settings, versions, commit, data hash"),
    ):
        if path.exists():
            print(f"  {path}  {what}")


def _first_of(paths: list[Path]) -> str:
    return str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def config(preset: Annotated[str, typer.Argument(help=", ".join(PRESETS))]) -> None:
    """Print the settings of a preset as TOML, for --config."""
    print(to_toml(preset_settings(preset), comments=True), end="")


def demo(
    out: Annotated[Path | None, typer.Option(help="new folder; default runs/<date>-<time>-demo")] = None,
    images: Annotated[int, typer.Option(min=2, help="synthetic images to make")] = 64,
    iterations: Annotated[int, typer.Option(min=1, help="iterations to train")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="key of images, weights and views")] = 0,
) -> None:
    """Build a shard of synthetic anatomy, pretrain small-2d on it and show where everything lies."""
    from coverfast.ingest.phantoms import build_phantoms
    from coverfast.training import plan as library

    out = out or Path(f"runs/{datetime.now():%Y%m%d-%H%M%S}-demo")
    require(
        not out.exists() or (out.is_dir() and not any(out.iterdir())),
        f"out must be a new or empty folder, but {out} exists; choose another with --out",
    )
    size, held_out = 192, max(1, images // 8)
    for name, indices in {"train": range(images), "val": range(images, images + held_out)}.items():
        path = out / f"phantom-{name}.h5"
        build_phantoms(path, 2, size, seed=seed, indices=indices)
        print(f"{path}: {len(indices)} synthetic images of {size} x {size}")
    ready = library.plan(
        {
            "data": str(out / "phantom-train.h5"),
            "val": str(out / "phantom-val.h5"),
            "run": str(out / "run"),
            "preset": "small-2d",
            "iterations": iterations,
            "seed": seed,
        }
    )
    run_pretraining(ready)
