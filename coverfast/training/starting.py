"""New runs and resumed ones, of whatever kind; everything that can be refused is, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from coverfast.backbone_names import absolute_code, code_sha256
from coverfast.checks import InputError, check_choice, require
from coverfast.samples import SPLITS
from coverfast.shard_set import ShardSet
from coverfast.training.assembly import choose_device
from coverfast.training.config import changed_settings, check_resume, read_toml
from coverfast.training.data import check_fits, overlaps
from coverfast.training.runs import Run, check_new_folder, provenance
from coverfast.training.settings import S, TrainingSettings, preset_ndim, resolve
from coverfast.training.trainer import Training
from coverfast.training.world import World

T = TypeVar("T", bound=Training)
#: From settings, data, sentences for people (to be added to), processes and whether it is a start and not a resume.
Assemble = Callable[[S, ShardSet, list[str], World, bool], T]


def new_run(
    kind: type[S],
    assemble: Assemble[S, T],
    flags: Mapping[str, Any],
    config: str | Path | None,
    world: World | None,
) -> T:
    """A run with settings of a `kind` from command-line flags over a TOML file over a preset."""
    world = world or World()
    from_file = read_toml(config, kind)[0] if config else {}
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
    small = choose_device(str(given.get("device", "auto"))).type != "cuda"
    found = kind.preset_for(preset or "", shards.ndim, small=small, method=str(given.get("method", "")))
    if found != preset:
        on = "" if preset else f" on a {'CPU' if small else 'GPU'}"
        notes.append(f"preset {found}, for a {shards.ndim}D shard{on}")
    preset = found
    settings = resolve(preset, kind.fitting(preset, given), from_file, flags, places, kind=kind)
    ready = assemble(settings.pinned(), shards, notes, world, True)
    ready.notes += overlaps(ready.shards, ready.val)
    return ready


def resumed_run(kind: type[S], assemble: Assemble[S, T], flags: Mapping[str, Any], world: World | None) -> T:
    """An earlier run, to continue from its newest sound checkpoint with its own settings.

    A run that stands at its end and has no result yet gets one.
    """
    world = world or World()
    run, old, tables = Run.open(str(flags.get("run", "")), kind)
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
    ready = assemble(settings, shards, [], world, found is None)
    ready.run, ready.origin = run, origin
    for name, value in ready.facts().items():
        require(
            origin.get(name, value) == value, f"{name} must be that of the run, {origin.get(name)}, but it is {value}"
        )
    if found:
        path, state, damaged = found
        ready.notes += [f"warning: {sentence}; going on from the one before" for sentence in damaged]
        iteration = int(state["iteration"])
        if changed := changed_settings(state["settings"], settings):
            raise InputError(f"{run.config} must be as the run wrote it, but {changed} was changed since")
        require(
            settings.iterations > iteration or (settings.iterations == iteration and not ready.finished(run)),
            f"iterations must be more than {iteration}, where the run stands, got {settings.iterations}; "
            f"raise the total with --iterations",
        )
        ready.notes.append(f"{path}: {ready.engine.load_state(state, str(path))}")
        ready.first = iteration + 1
    ready.notes.append(f"resuming {run.folder} after iteration {ready.first - 1}")
    ready.notes += _differences(old, ready)
    return ready


def _differences(old: TrainingSettings, ready: Training) -> list[str]:
    """What may keep a resumed run from giving equal bits."""
    engine, origin = ready.engine, ready.origin
    now = provenance(ready.shards.content_hash) | {"processes": ready.world.size, "device": str(engine.device)}
    now |= {"precision": engine.choices.precision, "layout": engine.choices.layout}
    versions = ("coverfast", "torch", "triton", "numpy", "python", "commit")
    names = (*versions, "threads", "device", "processes", "precision", "layout")
    found = [(name, origin.get(name), now[name]) for name in names if now[name] != origin.get(name)]
    for name, fact in (("backbone", "code_sha256"), ("method", "method_code_sha256")):
        before, after = origin.get(fact), code_sha256(getattr(ready.settings, name, ""))
        found += [(f"the code of the {name}", before, after)] if before not in (None, after) else []
    for name in ("compile", "cuda_graphs", "accumulate", "recompute", "deterministic", "fsdp"):
        before, after = getattr(old, name), getattr(ready.settings, name)
        found += [(name, before, after)] if before != after else []
    return [f"{name} was {a} and is {b}: equal bits are not assured" for name, a, b in found]


def _absolute(given: Mapping[str, Any]) -> dict[str, Any]:
    """Whole paths, so that a run can be resumed from another folder."""
    places: dict[str, Any] = {}
    for name in ("data", "val"):
        if paths := given.get(name):
            places[name] = [str(Path(p).absolute()) for p in ([paths] if isinstance(paths, str) else paths)]
    if given.get("init"):
        places["init"] = str(Path(given["init"]).absolute())
    for name in ("backbone", "method"):
        if code := given.get(name):
            places[name] = absolute_code(str(code))
    return places


def validation_set(settings: TrainingSettings, shards: ShardSet) -> ShardSet | None:
    """Held-out samples: the val split of --val or else all of it; without --val the val split of the data."""
    if settings.val:
        whole = ShardSet(settings.val, "all")
        return ShardSet(settings.val, "val") if whole.split_counts["val"] else whole
    return ShardSet(settings.data, "val") if settings.split == "train" and shards.split_counts["val"] else None


def check_shards(s: TrainingSettings, shards: ShardSet, val: ShardSet | None, crop: tuple[int, ...]) -> None:
    """Refuse shards of another dimension than the preset's, held-out ones unlike them, and images below the crop."""
    ndim, first = shards.ndim, shards.paths[0]
    require(
        preset_ndim(s.preset) == ndim,
        f"data must be a {preset_ndim(s.preset)}D shard for preset {s.preset}, but {first} is {ndim}D",
    )
    check_fits(shards, crop, pad=s.pad)
    if val is not None:
        require(
            (val.ndim, val.channels) == (ndim, shards.channels),
            f"val must be a {ndim}D shard of {shards.channels} channel(s) like {first}, but {val.paths[0]} is "
            f"{val.ndim}D of {val.channels} channel(s)",
        )
