"""`coverfast pretrain`, `coverfast config` and `coverfast demo`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from coverfast.checks import InputError, require
from coverfast.cli.options import with_settings
from coverfast.cli.training import run_training
from coverfast.training.config import to_toml
from coverfast.training.settings import Settings, TrainingSettings, preset_settings


@with_settings(Settings)
def pretrain(
    flags: dict[str, Any],
    config: Annotated[Path | None, typer.Option(help="TOML file of settings; flags win over it")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --run DIR exactly")] = False,
) -> None:
    """Pretrain a backbone on a shard: by COVER, GVSL or a method of your own (--method).

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
        run_training(ready, "pretrain")


def config(
    preset: Annotated[str | None, typer.Argument(help=", ".join(Settings.presets))] = None,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="settings of finetune and probe, not of pretrain")
    ] = False,
) -> None:
    """Print the settings of a preset as TOML, for --config; without a preset their names."""
    from coverfast.downstream.settings import FinetuneSettings

    kind = FinetuneSettings if finetune else Settings
    if preset is None:
        print("\n".join(kind.presets))
        return
    if preset not in kind.presets and f"{preset}-2d" in kind.presets:
        raise InputError(f"preset must name the axes of the images, {preset}-2d or {preset}-3d, got {preset!r}")
    settings: TrainingSettings = preset_settings(preset, FinetuneSettings) if finetune else preset_settings(preset)
    print(to_toml(settings, comments=True), end="")


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
    run_training(ready, "pretrain")
