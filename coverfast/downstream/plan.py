"""What a run of fine-tuning or linear evaluation will be, from flags, files and presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
from coverfast.training.planning import check_shards, new_run, resumed_run, validation_set
from coverfast.training.world import World


def plan(flags: Mapping[str, Any], config: str | Path | None = None, world: World | None = None) -> Finetuning:
    """A new run from command-line flags over a TOML file over a preset; everything that can be refused is, first."""
    return new_run(FinetuneSettings, _assemble, flags, config, world)


def resume(flags: Mapping[str, Any], world: World | None = None) -> Finetuning:
    """An earlier run, to continue from its newest sound checkpoint with its own settings."""
    return resumed_run(FinetuneSettings, _assemble, flags, world)


def _assemble(s: FinetuneSettings, shards: ShardSet, notes: list[str], world: World, new: bool) -> Finetuning:
    if not s.task:
        s = replace(s, task="segmentation" if shards.label_classes else "classification")
        s.check()
        notes.append(f"task {s.task}, for what the labels of {shards.paths[0]} are")
    state = None
    if s.init and new:
        backbone, about = pretrained(s.init, shards.ndim, shards.channels)
        s, state = replace(s, channels=backbone.channels), backbone.state_dict()
        if about and about != shards.preprocessing:
            notes.append(f"warning: the backbone learned from images made by {about}, these are {shards.preprocessing}")
    check_batch(s, world)
    crop, val = crop_of(s, shards.ndim), validation_set(s, shards)
    level_size(crop, (len(s.unet_channels()) + 1) // 2)
    whole, shards = shards, choose_cases(s, shards)
    check_shards(s, shards, val, crop)
    notes += check_classes(s, shards, val)
    if len(shards) < len(whole):
        notes.append(f"{len(shards)} of {len(whole)} labelled samples are used")
    if val is None:
        notes.append(
            "warning: no held-out samples: the network is that of the last iteration; use --val or a val split"
        )
    device = choose_device(s.device, s.impl, world)
    if s.threads:
        torch.set_num_threads(s.threads)
    task = build_task(s, shards)
    if state is not None:
        notes.append(f"backbone from {s.init}: {load_state(task.backbone, state, s.init)}")
    if new:
        standardise(task.to(device), s, shards)
    learning = sum(p.numel() for p in task.parameters() if p.requires_grad)
    notes.append(f"{learning:,} of {sum(p.numel() for p in task.parameters()):,} weights learn")
    require(learning > 0, "at least the head must learn")
    return Finetuning(s, None, shards, val, Engine(task, s, device, world), 1, notes, world)
