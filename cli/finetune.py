"""`coverfast finetune` and `coverfast probe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coverfast.checks import require
from coverfast.cli.options import with_settings
from coverfast.cli.training import run_training
from coverfast.downstream.settings import FinetuneSettings
from coverfast.training.config import read_toml

Config = Annotated[Path | None, typer.Option(help="TOML file of settings; flags win over it")]
Resume = Annotated[bool, typer.Option("--resume", help="continue the run in --run DIR exactly")]


@with_settings(FinetuneSettings)
def finetune(flags: dict[str, Any], config: Config = None, resume: Resume = False) -> None:
    """Train a pretrained backbone with a new head on labelled images (segmentation or classification).

    All weights learn, or those of the last --train-modules. The run folder holds network.safetensors, the network that
    was best on validation: `coverfast evaluate` and `coverfast predict` read it. `coverfast config PRESET --finetune`
    shows what a preset sets.
    """
    _run(flags, config, resume, "finetune")


@with_settings(FinetuneSettings)
def probe(flags: dict[str, Any], config: Config = None, resume: Resume = False) -> None:
    """Linear evaluation: train a head on a backbone whose weights stay as they are.

    As `coverfast finetune --train-modules 0`; the small presets have a larger learning rate for it.
    """
    if not resume:
        given = (read_toml(config, FinetuneSettings)[0] if config else {}) | flags
        modules = given.get("train_modules", 0)
        require(
            modules == 0 or (modules == -1 and "train_modules" not in flags),
            f"train_modules must be 0 for a probe, whose backbone is frozen, got {modules}; use coverfast finetune",
        )
        flags = {**flags, "train_modules": 0}
    _run(flags, config, resume, "probe")


def _run(flags: dict[str, Any], config: Path | None, resume: bool, command: str) -> None:
    from coverfast.downstream import plan as library
    from coverfast.training.world import processes

    with processes(float(flags.get("timeout", FinetuneSettings.timeout)), flags.get("device", "auto")) as world:
        if resume:
            require(config is None, "config cannot be given with --resume: the run has its own")
            ready = library.resume(flags, world)
        else:
            ready = library.plan(flags, config, world)
        run_training(ready, command)
