"""What a pretraining run will be, from flags, files and presets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coverfast.backbones import Backbone, backbone_file, load_pyramid, load_state, read_backbone
from coverfast.backbones.base import title
from coverfast.backbones.choosing import spelled
from coverfast.backbones.files import described
from coverfast.checks import require
from coverfast.geometry import level_size
from coverfast.methods.cover import Cover
from coverfast.pyramid import VectorPyramid
from coverfast.shard_set import ShardSet
from coverfast.training.assembly import backbone_notes, build_method, check_batch, choose_device, crop_of
from coverfast.training.data import check_fits
from coverfast.training.engine import Engine
from coverfast.training.pretrain import Pretraining
from coverfast.training.settings import Settings
from coverfast.training.starting import check_shards, new_run, resumed_run, validation_set
from coverfast.training.world import World
from coverfast.view_draws import expected_mask


def plan(flags: Mapping[str, Any], config: str | Path | None = None, world: World | None = None) -> Pretraining:
    """A new run from command-line flags over a TOML file over a preset; everything that can be refused is, first."""
    ready = new_run(Settings, _assemble, flags, config, world)
    if ready.settings.method == "cover":
        _warn_of_little_overlap(ready)
    return ready


def resume(flags: Mapping[str, Any], world: World | None = None) -> Pretraining:
    """An earlier run, to continue from its newest sound checkpoint with its own settings.

    A run that stands at its end and has no backbone.safetensors yet gets one.
    """
    return resumed_run(Settings, _assemble, flags, world)


def _warn_of_little_overlap(ready: Pretraining) -> None:
    """A crop far smaller than its image shows two views with little in common, and nothing is learned."""
    ndim, sizes = ready.shards.ndim, ready.shards.sizes
    crop = crop_of(ready.settings, ndim)
    some = sizes[np.linspace(0, len(sizes) - 1, 256).astype(int)].astype(np.int64)
    share = expected_mask(some, crop, ready.settings.views())
    if share < 0.3:
        ready.notes.append(
            f"warning: only {share:.0%} of a view lies in the other one on average: the images are large for a crop of "
            f"{'x'.join(map(str, crop))}; use shards build --size, a larger --crop or a smaller --strength"
        )


def _assemble(s: Settings, shards: ShardSet, notes: list[str], world: World, new: bool) -> Pretraining:
    check_batch(s, world)
    crop, val = crop_of(s, shards.ndim), validation_set(s, shards)
    if s.backbone == "unet":
        level_size(crop, (len(s.unet_channels()) + 1) // 2)
    check_shards(s, shards, val, crop)
    if val is not None:
        check_fits(val, crop, pad=s.pad)
    device = choose_device(s.device, s.impl, world)
    if s.threads:
        torch.set_num_threads(s.threads)
    method = build_method(s, shards.ndim, shards.channels)
    if method.pairs:
        val = _pairs(s, shards, val, notes)
    backbone, pyramid = method.backbone, method.pyramid if isinstance(method, Cover) else None
    assert isinstance(backbone, Backbone)
    if s.backbone != "unet":
        backbone.check_size("crop", crop)
        backbone.check_maps(crop)
        s = s.fitted(backbone.levels) if pyramid else s
        notes += backbone_notes(backbone, s, world)
    started_from = {}
    if s.init and new:
        loaded = warm_start(backbone, pyramid, s)
        notes += loaded
        digest = hashlib.sha256(backbone_file(s.init).read_bytes()).hexdigest()
        started_from = {"init_sha256": digest, "init_report": "; ".join(loaded)}
    engine = Engine(method, s, device, world)
    return Pretraining(s, None, shards, val, engine, 1, notes, world, started_from=started_from)


def _pairs(s: Settings, shards: ShardSet, val: ShardSet | None, notes: list[str]) -> ShardSet | None:
    """The held-out samples for a method that takes pairs; refuses shards of which there can be none."""
    needs = f"must have at least 2 samples for the pairs of {s.method}"
    require(len(shards) > 1, f"data {needs}, got {len(shards)} (split {s.split})")
    if val is None or len(val) > 1:
        return val
    require(not s.val, f"val {needs}, got {len(val)}")
    notes.append("nothing is held out: the val split has a single sample, of which there are no pairs")
    return None


def _named(description: Mapping[str, Any]) -> str:
    args = spelled(description.get("args") or {})
    return title(description) + (f" with {', '.join(args)}" if args else "")


def warm_start(backbone: Backbone, pyramid: VectorPyramid | None, s: Settings) -> list[str]:
    """Start from the weights of `s.init`, the pyramid's too where there are such; what was loaded, for people."""
    path = backbone_file(s.init)
    state, metadata = read_backbone(path)
    with described(path):
        found, ours = json.loads(metadata["backbone"]), backbone.description
        theirs = title(found)
    # The same tensors may be those of another network: one of other activations, say.
    alike = found["kind"] == ours["kind"] and found.get("args") == ours.get("args")
    require(
        s.partial or (alike and (theirs == title(ours) or ours["kind"] == "own")),
        f"init must be a {_named(ours)} like the run, but {path} is a {_named(found)}; see --backbone and --partial",
    )
    for what, words in (("ndim", "{}D images"), ("in_channels", "{} channel(s)")):
        fits = found[what] == ours[what] or (what == "in_channels" and s.adapt_input and found[what] == 1)
        hint = "; see --adapt-input" * (what == "in_channels" and found[what] == 1)
        require(
            fits or s.partial,
            f"init must be a network for {words.format(ours[what])} like data, but {path} is for "
            f"{words.format(found[what])}{hint}",
        )
    adapt = backbone.in_channels if s.adapt_input else 0
    report = load_state(backbone.core, state, s.init, strict=not s.partial, adapt=adapt)
    notes = [f"backbone from {s.init}: {report.every if s.partial else report}"]
    if "pyramid" in metadata and pyramid is None:
        notes.append(f"the pyramid of {s.init} is left out: the method {s.method} has none")
    elif pyramid is not None and "pyramid" in metadata:
        other = load_pyramid(path, tell=None)
        if (other.groups, other.head_dim, other.channels) == (pyramid.groups, pyramid.head_dim, pyramid.channels):
            notes.append(f"pyramid from {s.init}: {load_state(pyramid, other.state_dict(), s.init)}")
            if other.windows != pyramid.windows:
                notes.append(f"warning: it matched in windows of {other.windows}, this run in {pyramid.windows}")
        else:
            differ = (
                f"it has groups {other.groups} of {other.head_dim}, this run {pyramid.groups} of {pyramid.head_dim}"
            )
            require(s.partial, f"init must have a pyramid like the run, but that of {path}: {differ}; see --partial")
            notes.append(f"warning: the pyramid of {s.init} is left out: {differ}")
    return notes
