"""Pretraining from settings to results: put the parts together, train, leave a backbone and a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coverfast.backbones import UNet, load_state, read_backbone
from coverfast.backbones.files import backbone_bytes
from coverfast.checks import InputError, check_choice, per_axis, require
from coverfast.disk import write_atomically
from coverfast.geometry import level_size
from coverfast.loader import ImageStream, load_batches, lost_reader, reading_processes
from coverfast.methods.cover import Cover
from coverfast.ops.dispatch import OPS, choose
from coverfast.pyramid import VectorPyramid
from coverfast.samples import SPLITS
from coverfast.shard_set import ShardSet
from coverfast.training.data import batches, check_fits, held_out, overlaps
from coverfast.training.loop import Record, Schedule, train
from coverfast.training.runs import Run, check_new_folder, provenance
from coverfast.training.settings import (
    PRESETS,
    Settings,
    as_plain,
    changed_settings,
    check_resume,
    check_values,
    preset_ndim,
    read_toml,
    resolve,
)
from coverfast.view_draws import expected_mask

#: Separates the views of validation from those of training.
_VALIDATION_KEY = 0x5A17


@dataclass
class Pretraining:
    """A run that is ready to start or to go on; `plan` or `resume` make one."""

    settings: Settings
    run: Run | None
    shards: ShardSet
    val: ShardSet | None
    method: Cover
    optimizer: torch.optim.Optimizer
    device: torch.device
    first: int
    notes: list[str]
    origin: dict[str, Any] = field(default_factory=dict)
    bad: dict[str, None] = field(default_factory=dict)
    on_note: Callable[[str], None] = print

    def start(self, on_step: Callable[[Record], None] = lambda record: None) -> Run:
        """Train to the end and write `backbone.safetensors` and, with matplotlib, `report.png`; return the run."""
        s = self.settings
        if self.run is None:
            self.run = Run.create(s, data_sha256=self.shards.content_hash)
        else:
            now = provenance(self.shards.content_hash)
            self.run.write_config(s, {"provenance": self.origin, "resumed": now})
        self.run.cut_metrics(self.first - 1)
        workers = reading_processes(self.device) if s.workers < 0 else s.workers
        stream = self._stream(self.shards, s.seed)
        loaded = load_batches(stream, first=self.first, last=s.iterations, workers=workers, device=self.device)
        data = batches(loaded, s.seed, self._skipped)
        schedule = Schedule(s.iterations, s.clip, s.checkpoint_every, s.keep_checkpoints, s.val_every)
        try:
            train(
                self.method,
                self.optimizer,
                data,
                self.run,
                schedule,
                settings=as_plain(s),
                validation=self._held_out if self.val else None,
                on_step=on_step,
            )
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise InputError(
                    f"a batch of {s.batch} crops of {s.crop} does not fit into the memory of {self.device}; "
                    f"use a smaller --batch or --crop"
                ) from None
            if isinstance(error, RuntimeError) and (lost := lost_reader(error)):
                raise lost from error
            raise
        if self.bad:
            self.notes.append(f"{len(self.bad)} sample(s) could not be read and were skipped, named above")
        self._save_backbone()
        self._draw()
        return self.run

    def _stream(self, shards: ShardSet, seed: int) -> ImageStream:
        s = self.settings
        return ImageStream(
            shards,
            batch=s.batch,
            seed=seed,
            regions=self.method.regions,
            crops=s.crops,
            on_bad_sample=s.on_bad_sample,
        )

    def _skipped(self, reason: str) -> None:
        """Tell once of every sample that was replaced."""
        if reason not in self.bad:
            self.bad[reason] = None
            self.on_note(f"skipped: {reason}")

    def _held_out(self) -> Any:
        stream = self._stream(self.val or self.shards, self.settings.seed ^ (_VALIDATION_KEY << 32))
        return held_out(stream, limit=self.settings.val_samples, device=self.device, on_bad=self._skipped)

    def _save_backbone(self) -> None:
        assert self.run is not None
        backbone = self.method.backbone
        assert isinstance(backbone, UNet)
        data = backbone_bytes(backbone, config=as_plain(self.settings), preprocessing=self.shards.preprocessing)
        write_atomically(self.run.backbone, data)

    def _draw(self) -> None:
        """The picture of the run, from fixed views of the first (held-out) sample."""
        from coverfast import report

        assert self.run is not None
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            self.notes.append("no report.png: drawing needs the extra plots (pip install coverfast[plots])")
            return
        self.method.eval()
        seen = self.method.pictures(next(iter(self._held_out())))
        arrays: dict[str, Any] = {
            name: [v.cpu().numpy() for v in value] if isinstance(value, list) else value.cpu().numpy()
            for name, value in seen.items()
        }
        report.write_report(self.run.picture, report.Pictures(**arrays), report.load_metrics(self.run.metrics))


def plan(flags: Mapping[str, Any], config: str | Path | None = None) -> Pretraining:
    """A new run from command-line flags over a TOML file over a preset; everything that can be refused is, first."""
    from_file = read_toml(config)[0] if config else {}
    given = from_file | dict(flags)
    require(bool(given.get("data")), "data must name an HDF5 shard, got none; use --data F.h5")
    places = _absolute(given)
    preset = given.get("preset")
    require(
        preset == from_file.get("preset", preset),
        f"preset must be {from_file.get('preset')!r}, for which the values of {config} are, got {preset!r}",
    )
    check_new_folder(str(given.get("run", "")))
    check_choice("split", given.get("split", "train"), (*SPLITS, "all"))
    shards = ShardSet(places["data"], given.get("split", "train"))
    notes = []
    if not preset:
        size = "paper" if _device(str(given.get("device", "auto"))).type == "cuda" else "small"
        preset = f"{size}-{shards.ndim}d"
        notes.append(f"preset {preset}, for a {shards.ndim}D shard on a {'GPU' if size == 'paper' else 'CPU'}")
    settings = resolve(preset, from_file, flags, places)
    ready = _assemble(settings, shards, notes)
    ready.notes += overlaps(ready.shards, ready.val)
    _warn_of_little_overlap(ready)
    return ready


def resume(flags: Mapping[str, Any]) -> Pretraining:
    """An earlier run, to continue from its newest checkpoint with its own settings."""
    run, old, tables = Run.open(str(flags.get("run", "")))
    origin = tables["provenance"]
    settings = check_resume(old, flags)
    settings = replace(settings, **check_values({k: v for k, v in _absolute(flags).items() if k != "init"}))
    try:
        shards = ShardSet(settings.data, settings.split)
    except InputError as error:
        raise InputError(f"data must be that of the run; give its new place with --data: {error}") from None
    require(
        shards.content_hash == origin.get("data_sha256"),
        f"data must be that of the run (content {origin.get('data_sha256')}), but {', '.join(settings.data)} has "
        f"content {shards.content_hash}",
    )
    ready = _assemble(settings, shards, [], warm=False)
    ready.run, ready.origin = run, origin
    if state := run.load_checkpoint(ready.device):
        iteration = int(state["iteration"])
        if changed := changed_settings(state["settings"], settings):
            raise InputError(f"{run.config} must be as the run wrote it, but {changed} was changed since")
        require(
            settings.iterations > iteration,
            f"iterations must be more than {iteration}, where the run stands, got {settings.iterations}; "
            f"raise the total with --iterations",
        )
        load_state(ready.method, state["method"], str(run.checkpoints()[-1]))
        ready.optimizer.load_state_dict(state["optimizer"])
        ready.first = iteration + 1
    elif settings.init:
        _warm_start(ready)
    ready.notes.append(f"resuming {run.folder} after iteration {ready.first - 1}")
    now = provenance(shards.content_hash)
    for name in ("coverfast", "torch", "triton", "numpy", "python", "commit", "threads"):
        if now[name] != origin.get(name):
            ready.notes.append(f"{name} was {origin.get(name)} and is {now[name]}: equal bits are not assured")
    return ready


def _warn_of_little_overlap(ready: Pretraining) -> None:
    """A crop far smaller than its image shows two views with little in common, and nothing is learned."""
    ndim, sizes = ready.shards.ndim, ready.shards.sizes
    crop = _crop(ready.settings, ndim)
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


def _assemble(settings: Settings, shards: ShardSet, notes: list[str], *, warm: bool = True) -> Pretraining:
    s = settings
    ndim, first = shards.ndim, shards.paths[0]
    require(
        preset_ndim(s.preset) == ndim,
        f"data must be a {preset_ndim(s.preset)}D shard for preset {s.preset}, but {first} is {ndim}D",
    )
    crop = _crop(s, ndim)
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
    device = _device(s.device)
    for op in OPS:
        choose(op, s.impl, torch.empty(0, device=device))
    if s.threads:
        torch.set_num_threads(s.threads)
    torch.manual_seed(s.seed)
    backbone = UNet(ndim, shards.channels, s.unet_channels())
    window = s.window[0] if len(s.window) == 1 else s.window
    pyramid = VectorPyramid(ndim, backbone.feature_channels, s.groups, s.head_dim, window, impl=s.impl)
    method = Cover(backbone, pyramid, crop=crop, settings=s.views(), pad=s.pad, impl=s.impl).to(device)
    optimizer = torch.optim.Adam(method.parameters(), lr=s.lr)
    ready = Pretraining(s, None, shards, val, method, optimizer, device, 1, notes)
    if s.init and warm:
        _warm_start(ready)
    return ready


def _crop(settings: Settings, ndim: int) -> tuple[int, ...]:
    return per_axis("crop", settings.crop[0] if len(settings.crop) == 1 else settings.crop, ndim)


def _warm_start(ready: Pretraining) -> None:
    state, _ = read_backbone(ready.settings.init)
    report = load_state(ready.method.backbone, state, ready.settings.init)
    ready.notes.append(f"backbone from {ready.settings.init}: {report}")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    require(device.type in ("cpu", "cuda"), f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        require((device.index or 0) < count, f"device must be one of the {count} CUDA devices found here, got {name!r}")
    return device


__all__ = ["PRESETS", "Pretraining", "plan", "resume"]
