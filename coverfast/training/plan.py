"""What a run will be, from flags, files and presets; everything that can be refused is, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coverfast.backbones import load_state, read_backbone
from coverfast.checks import InputError, check_choice, require
from coverfast.geometry import level_size
from coverfast.methods.cover import Cover
from coverfast.samples import SPLITS
from coverfast.shard_set import ShardSet
from coverfast.training.assembly import build_method, check_batch, choose_device, crop_of
from coverfast.training.config import changed_settings, check_resume, read_toml
from coverfast.training.data import check_fits, overlaps
from coverfast.training.engine import Engine
from coverfast.training.pretrain import Pretraining
from coverfast.training.runs import Run, check_new_folder, provenance
from coverfast.training.settings import Settings, preset_ndim, resolve
from coverfast.training.world import World
from coverfast.view_draws import expected_mask


def plan(flags: Mapping[str, Any], config: str | Path | None = None, world: World | None = None) -> Pretraining:
    """A new run from command-line flags over a TOML file over a preset; everything that can be refused is, first."""
    world = world or World()
    from_file = read_toml(config)[0] if config else {}
    given = from_file | dict(flags)
    require(bool(given.get("data")), "data must name an HDF5 shard, got none; use --data F.h5")
    places = _absolute(given)
    preset = given.get("preset")
    require(
        preset == from_file.get("preset", preset),
        f"preset must be {from_file.get('preset')!r}, for which the values of {config} are, got {preset!r}",
    )
    if world.writes:
        check_new_folder(str(given.get("run", "")))
    check_choice("split", given.get("split", "train"), (*SPLITS, "all"))
    shards = ShardSet(places["data"], given.get("split", "train"))
    notes = []
    if not preset:
        size = "paper" if choose_device(str(given.get("device", "auto"))).type == "cuda" else "small"
        preset = f"{size}-{shards.ndim}d"
        notes.append(f"preset {preset}, for a {shards.ndim}D shard on a {'GPU' if size == 'paper' else 'CPU'}")
    settings = resolve(preset, from_file, flags, places)
    if settings.schedule == "cosine" and not settings.schedule_iterations:
        # Pinned: a run that goes on for longer later must not have had another schedule so far.
        settings = replace(settings, schedule_iterations=settings.iterations)
    ready = _assemble(settings, shards, notes, world)
    ready.notes += overlaps(ready.shards, ready.val)
    _warn_of_little_overlap(ready)
    return ready


def resume(flags: Mapping[str, Any], world: World | None = None) -> Pretraining:
    """An earlier run, to continue from its newest sound checkpoint with its own settings.

    A run that stands at its end and has no backbone.safetensors yet gets one.
    """
    world = world or World()
    run, old, tables = Run.open(str(flags.get("run", "")))
    origin = tables["provenance"]
    settings = check_resume(old, {**flags, **_absolute(flags)})
    try:
        shards = ShardSet(settings.data, settings.split)
    except InputError as error:
        raise InputError(f"data must be that of the run; give its new place with --data: {error}") from None
    require(
        shards.content_hash == origin.get("data_sha256"),
        f"data must be that of the run (content {origin.get('data_sha256')}), but {', '.join(settings.data)} has "
        f"content {shards.content_hash}",
    )
    found = run.checkpoints.newest(torch.device("cpu"))
    ready = _assemble(settings, shards, [], world, warm=found is None)
    ready.run, ready.origin = run, origin
    if found:
        path, state, damaged = found
        ready.notes += [f"warning: {sentence}; going on from the one before" for sentence in damaged]
        iteration = int(state["iteration"])
        if changed := changed_settings(state["settings"], settings):
            raise InputError(f"{run.config} must be as the run wrote it, but {changed} was changed since")
        require(
            settings.iterations > iteration or (settings.iterations == iteration and not run.backbone.exists()),
            f"iterations must be more than {iteration}, where the run stands, got {settings.iterations}; "
            f"raise the total with --iterations",
        )
        ready.engine.load_state(state, str(path))
        ready.first = iteration + 1
    ready.notes.append(f"resuming {run.folder} after iteration {ready.first - 1}")
    ready.notes += _differences(old, ready)
    return ready


def _differences(old: Settings, ready: Pretraining) -> list[str]:
    """What may keep a resumed run from giving equal bits."""
    engine, origin = ready.engine, ready.origin
    now = provenance(ready.shards.content_hash) | {"processes": ready.world.size, "device": str(engine.device)}
    now |= {"precision": engine.choices.precision, "layout": engine.choices.layout}
    versions = ("coverfast", "torch", "triton", "numpy", "python", "commit")
    names = (*versions, "threads", "device", "processes", "precision", "layout")
    found = [(name, origin.get(name), now[name]) for name in names if now[name] != origin.get(name)]
    for name in ("compile", "cuda_graphs", "accumulate", "recompute", "deterministic", "fsdp"):
        before, after = getattr(old, name), getattr(ready.settings, name)
        found += [(name, before, after)] if before != after else []
    return [f"{name} was {a} and is {b}: equal bits are not assured" for name, a, b in found]


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


def _absolute(given: Mapping[str, Any]) -> dict[str, Any]:
    """Whole paths, so that a run can be resumed from another folder."""
    places: dict[str, Any] = {}
    for name in ("data", "val"):
        if paths := given.get(name):
            places[name] = [str(Path(p).absolute()) for p in ([paths] if isinstance(paths, str) else paths)]
    if given.get("init"):
        places["init"] = str(Path(given["init"]).absolute())
    return places


def _validation(settings: Settings, shards: ShardSet) -> ShardSet | None:
    """Held-out samples: the val split of --val or else all of it; without --val the val split of the data."""
    if settings.val:
        whole = ShardSet(settings.val, "all")
        return ShardSet(settings.val, "val") if whole.split_counts["val"] else whole
    return ShardSet(settings.data, "val") if settings.split == "train" and shards.split_counts["val"] else None


def _assemble(s: Settings, shards: ShardSet, notes: list[str], world: World, *, warm: bool = True) -> Pretraining:
    ndim, first = shards.ndim, shards.paths[0]
    require(
        preset_ndim(s.preset) == ndim,
        f"data must be a {preset_ndim(s.preset)}D shard for preset {s.preset}, but {first} is {ndim}D",
    )
    check_batch(s, world)
    crop = crop_of(s, ndim)
    level_size(crop, len(s.groups))
    check_fits(shards, crop, pad=s.pad)
    val = _validation(s, shards)
    if val is not None:
        require(
            (val.ndim, val.channels) == (ndim, shards.channels),
            f"val must be a {ndim}D shard of {shards.channels} channel(s) like {first}, but {val.paths[0]} is "
            f"{val.ndim}D of {val.channels} channel(s)",
        )
        check_fits(val, crop, pad=s.pad)
    device = choose_device(s.device, s.impl, world)
    if s.threads:
        torch.set_num_threads(s.threads)
    method = build_method(s, ndim, shards.channels)
    if s.init and warm:
        notes.append(_warm_start(method, s))
    return Pretraining(s, None, shards, val, Engine(method, s, device, world), 1, notes, world)


def _warm_start(method: Cover, s: Settings) -> str:
    state, _ = read_backbone(s.init)
    report = load_state(method.backbone, state, s.init)
    return f"backbone from {s.init}: {report}"
