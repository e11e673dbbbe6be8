"""What a run of fine-tuning or linear evaluation will be, from flags, files and presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from coverfast.backbones import load_state
from coverfast.checks import require
from coverfast.downstream.assembly import build_task, check_classes, choose_cases, pretrained, standardise
from coverfast.downstream.finetuning import Finetuning
from coverfast.downstream.settings import FinetuneSettings
from coverfast.geometry import level_size
from coverfast.shard_set import ShardSet
from coverfast.training.assembly import check_batch, choose_device, crop_of
from coverfast.training.engine import Engine
from coverfast.training.settings import preset_settings
from coverfast.training.starting import check_shards, new_run, resumed_run, validation_set
from coverfast.training.world import World


def plan(
    flags: Mapping[str, Any],
    config: str | Path | None = None,
    world: World | None = None,
    *,
    rehearsal: bool = False,
) -> Finetuning:
    """A new run from command-line flags over a TOML file over a preset; everything that can be refused is, first.

    rehearsal: only to see what is refused; the run that comes of it is not to be started.
    """
    return new_run(FinetuneSettings, partial(_assemble, rehearsal=rehearsal), flags, config, world)


def resume(flags: Mapping[str, Any], world: World | None = None) -> Finetuning:
    """An earlier run, to continue from its newest sound checkpoint with its own settings."""
    return resumed_run(FinetuneSettings, _assemble, flags, world)


def _assemble(
    s: FinetuneSettings, shards: ShardSet, notes: list[str], world: World, new: bool, rehearsal: bool = False
) -> Finetuning:
    if not s.task:
        s = replace(s, task="segmentation" if shards.label_classes else "classification")
        s.check()
        notes.append(f"task {s.task}, for what the labels of {shards.paths[0]} are")
    state, digest = None, ""
    if s.init and new:
        backbone, about, digest = pretrained(s.init, shards.ndim, shards.channels)
        _check_channels(s, backbone.channels)
        s, state = replace(s, channels=backbone.channels), backbone.state_dict()
        _note_preprocessing(notes, "the backbone learned from images", about, shards)
    check_batch(s, world)
    crop, val = crop_of(s, shards.ndim), validation_set(s, shards)
    level_size(crop, (len(s.unet_channels()) + 1) // 2)
    whole, shards = shards, choose_cases(s, shards)
    check_shards(s, shards, val, crop)
    check_classes(s, shards, val, look=new)
    if val is None:
        notes.append("warning: no held-out samples: the last network is kept; use --val or a val split")
    else:
        _note_preprocessing(notes, "held-out images were made", val.preprocessing, shards)
    if len(shards) < len(whole):
        notes.append(f"{len(shards)} of {len(whole)} labelled samples are used")
    device = choose_device(s.device, s.impl, world)
    if s.threads:
        torch.set_num_threads(s.threads)
    task = build_task(s, shards)
    if state is not None:
        notes.append(f"backbone from {s.init}: {load_state(task.backbone, state, s.init)}")
    if new and not rehearsal:
        standardise(task.to(device), s, shards)
    learning = sum(p.numel() for p in task.parameters() if p.requires_grad)
    notes.append(f"{learning:,} of {sum(p.numel() for p in task.parameters()):,} weights learn")
    engine = Engine(task, s, device, world)
    return Finetuning(s, None, shards, val, engine, 1, notes, world, init_sha256=digest)


def _check_channels(s: FinetuneSettings, channels: tuple[int, ...]) -> None:
    """Refuse channels that were asked for and are not the backbone's."""
    usual = preset_settings(s.preset, FinetuneSettings).channels
    require(
        s.channels in (usual, channels, channels[: (len(channels) + 1) // 2]),
        f"channels must be left to the backbone with --init, which has {channels}, got {s.channels}",
    )


def _note_preprocessing(notes: list[str], what: str, about: Mapping[str, Any], shards: ShardSet) -> None:
    if about and about != shards.preprocessing:
        notes.append(f"warning: {what} by {about}, those to learn from by {shards.preprocessing}")
