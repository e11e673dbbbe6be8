"""What a run of fine-tuning or linear evaluation will be, from flags, files and presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from coverfast.backbones import load_state
from coverfast.downstream.assembly import (
    build_task,
    check_classes,
    choose_cases,
    pretrained,
    standardise,
    with_backbone,
)
from coverfast.downstream.finetuning import Finetuning
from coverfast.downstream.settings import FinetuneSettings
from coverfast.geometry import level_size
from coverfast.shard_set import ShardSet
from coverfast.training.assembly import backbone_notes, check_batch, choose_device, crop_of
from coverfast.training.engine import Engine
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
    found, told = None, ""
    if s.init and new:
        found = pretrained(s.init, shards.ndim, shards.channels, own=s.own, adapt=s.adapt_input)
        s = with_backbone(s, found.description)
        _note_preprocessing(notes, "the backbone learned from images", found.preprocessing, shards)
    check_batch(s, world)
    crop, val = crop_of(s, shards.ndim), validation_set(s, shards)
    if s.backbone == "unet":
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
    task.backbone.check_size("crop", crop)
    task.backbone.check_maps(crop)
    notes += backbone_notes(task.backbone, s, world)
    if found is not None:
        adapt = shards.channels if s.adapt_input else 0
        report = load_state(task.backbone.core, found.tensors, s.init, strict=not s.partial, adapt=adapt)
        told = f"backbone from {s.init}: {report.every if s.partial else report}{found.beside}"
        notes.append(told)
    if new and not rehearsal:
        standardise(task.to(device), s, shards)
    learning = sum(p.numel() for p in task.parameters() if p.requires_grad)
    notes.append(f"{learning:,} of {sum(p.numel() for p in task.parameters()):,} weights learn")
    engine = Engine(task, s, device, world)
    return Finetuning(
        s, None, shards, val, engine, 1, notes, world, init_sha256=found.sha256 if found else "", init_report=told
    )


def _note_preprocessing(notes: list[str], what: str, about: Mapping[str, Any], shards: ShardSet) -> None:
    if about and about != shards.preprocessing:
        notes.append(f"warning: {what} by {about}, those to learn from by {shards.preprocessing}")
