"""From settings and data to a network with a head, and the task that trains it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coverfast.backbones import backbone_file, build, choose, read_backbone
from coverfast.backbones.base import title
from coverfast.backbones.choosing import spelled
from coverfast.backbones.files import beside, described
from coverfast.checks import InputError, require
from coverfast.downstream.network import Network
from coverfast.downstream.settings import FinetuneSettings
from coverfast.downstream.tasks import Task
from coverfast.downstream.validation import spread
from coverfast.loader import ImageStream, to_device
from coverfast.own_code import parsed
from coverfast.philox import permutation
from coverfast.shard_set import ShardSet
from coverfast.training.assembly import crop_of
from coverfast.training.data import batches
from coverfast.training.restore import restore_method
from coverfast.training.settings import preset_settings


def build_task(s: FinetuneSettings, shards: ShardSet) -> Task:
    """The task of a run, on the CPU, its weights drawn from the seed; equal heads for equal seeds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(s.seed)
        unet = s.unet_channels() if s.backbone == "unet" else ()
        named = {"ndim": shards.ndim, "in_channels": shards.channels}
        backbone = choose(s.backbone, s.backbone_args, channels=unet, **named)
        torch.manual_seed(s.seed)
        names, values = classes_of(s.task, shards)
        crop = crop_of(s, shards.ndim)
        network = Network(backbone, s.task, names, values, crop=crop, preprocessing=shards.preprocessing)
    network.train_last(s.train_modules)
    weights = s.class_weights if any(s.class_weights) else None
    return Task(network, settings=s.views(), class_weights=weights, pad=s.pad, impl=s.impl)


def standardise(task: Task, s: FinetuneSettings, shards: ShardSet) -> None:
    """Fit the head's standardisation to the features of some training crops, before anything is learned."""
    device = next(task.parameters()).device
    batch = min(s.batch, _FITTED)
    stream = ImageStream(shards, batch=batch, seed=s.seed, regions=task.regions, labels=task.segments)
    stream.on_bad_sample = s.on_bad_sample
    loaded = (to_device(stream.load(1 + i), device) for i in range(-(-_FITTED // batch)))
    task.eval()  # a look at features moves no running statistics
    with torch.no_grad():
        seen = (task.prepare(found).images for found in batches(loaded, s.seed, lambda reason: None))
        task.network.standard.fit(task.network.features(images) for images in seen)
    task.train()


def classes_of(task: str, shards: ShardSet, name: str = "data") -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names of the classes of a task, and what stands for each in a file. name: of the setting, for messages.

    Raises:
        InputError: when the shards have no labels for the task, or fewer than two classes.
    """
    first = shards.paths[0]
    if task == "segmentation":
        table = shards.label_classes
        require(len(table) > 0, f"{name} must hold label maps for a segmentation, but {first} has none; {_HOW['maps']}")
        require(len(table) >= 2, f"label maps must have a class beside the background, but those of {first} have none")
        return tuple(c.name for c in table), tuple(c.value for c in table)
    names = shards.target_classes
    require(
        len(names) > 0,
        f"{name} must hold a class of each image for a classification, but {first} has none; {_HOW['rows']}",
    )
    require(len(names) >= 2, f"images must be of at least 2 classes, but those of {first} are all {names[0]!r}")
    return tuple(names), tuple(range(len(names)))


#: Crops that the standardisation is fitted to.
_FITTED = 16
_HOW = {
    "maps": "build it with `shards build IMAGES --labels LABELS`",
    "rows": "build it with `shards build IMAGES --classes TABLE.csv`",
}


class Pretrained(NamedTuple):
    """Weights to start from.

    preprocessing: how the images they were learned from were made. sha256: of the file. beside: what else is in it, for
    people.
    """

    description: dict[str, Any]
    tensors: dict[str, Tensor]
    preprocessing: dict[str, Any]
    sha256: str
    beside: str


def pretrained(path: str, ndim: int, channels: int, *, own: str | None = None, adapt: bool = False) -> Pretrained:
    """The backbone of a file, a run folder or a checkpoint, checked to be for images of `ndim` axes and `channels`.

    own: see `coverfast.load_backbone`. adapt: whether one for a single channel will do.

    Raises:
        InputError: when there is none, it is damaged, or for other images. Nothing in a file is executed.
    """
    place = backbone_file(path)
    require(place.is_file(), f"init must be a backbone or a finished run, but {place} does not exist")
    if place.suffix == ".pt":
        restored = restore_method(place, own=own)  # checks its kind
        found, about = restored.backbone, restored.preprocessing
        tensors, left = found.core.state_dict(), ""
    else:
        tensors, metadata = read_backbone(place)
        left = beside(place, metadata)
        with described(place), torch.random.fork_rng(devices=[]):
            found = build(json.loads(metadata["backbone"]), own=own)
            about = json.loads(metadata["preprocessing"])
    require(
        found.ndim == ndim,
        f"init must be a backbone for {ndim}D images like data, but {place} is for {found.ndim}D ones",
    )
    if found.in_channels != channels:
        require(
            adapt and found.in_channels == 1,
            f"init must be a backbone for {channels} channel(s) like data, but {place} is for {found.in_channels}"
            + ("; --adapt-input adapts its first convolution" if found.in_channels == 1 else ""),
        )
    digest = hashlib.sha256(place.read_bytes()).hexdigest()
    return Pretrained(found.description, tensors, about, digest, left)


def with_backbone(s: FinetuneSettings, description: Mapping[str, Any]) -> FinetuneSettings:
    """The settings of a run whose backbone is one that was pretrained.

    Raises:
        InputError: when another one was asked for.
    """
    if description["kind"] == "unet":
        require(s.backbone == "unet", f"backbone must be left to --init, which has a U-Net, got {s.backbone}")
        channels = tuple(description["channels"])
        usual = preset_settings(s.preset, FinetuneSettings).channels
        require(
            s.channels in (usual, channels, channels[: (len(channels) + 1) // 2]),
            f"channels must be left to the backbone with --init, which has {channels}, got {s.channels}",
        )
        return replace(s, channels=channels)
    name = s.backbone if description["kind"] == "own" else title(description)
    args = spelled(description["args"])
    require(s.backbone in ("unet", name), f"backbone must be left to --init, which has {name}, got {s.backbone}")
    require(
        not s.backbone_args or parsed(s.backbone_args, "backbone_args") == description["args"],
        f"backbone_args must be left to --init, which has {list(args)}, got {list(s.backbone_args)}",
    )
    found = replace(s, backbone=name, backbone_args=args)
    found.check()
    return found


def choose_cases(s: FinetuneSettings, shards: ShardSet) -> ShardSet:
    """The samples of the training cases that a run uses, a patient with all samples; nested for one `case_seed`.

    Raises:
        InputError: when there are fewer cases than asked for.
    """
    groups = [shards.identity(i)[1] for i in range(len(shards))] if s.cases or s.fraction < 1 else []
    if not groups:
        return shards
    numbers: dict[str, int] = {}
    case_of = np.array([numbers.setdefault(group or f"\0{i}", len(numbers)) for i, group in enumerate(groups)])
    count = s.cases or max(1, math.ceil(s.fraction * len(numbers) - 1e-9))
    require(
        count <= len(numbers), f"cases must be at most {len(numbers)}, the cases in the {s.split} split, got {count}"
    )
    chosen = permutation(s.case_seed, 0, len(numbers))[:count].numpy()
    return shards.subset(np.flatnonzero(np.isin(case_of, chosen)).tolist())


def check_classes(s: FinetuneSettings, shards: ShardSet, val: ShardSet | None, *, look: bool) -> None:
    """Refuse held-out data of other classes and, when asked to `look`, to learn or to judge what is not there."""
    names, values = classes_of(s.task, shards)
    if val is not None:
        other = classes_of(s.task, val, "val")
        require(
            other == (names, values),
            f"val must have the classes of data ({_listed(names)}), but {val.paths[0]} has {_listed(other[0])}",
        )
    if not look:
        return
    seen = val and val.subset(spread(len(val), s.val_samples))
    for which, data in (("training", shards), ("held-out", seen)):
        if data is None:
            continue
        if s.task == "classification":
            unknown = np.flatnonzero(data.targets < 0)
            if unknown.size:
                raise InputError(
                    f"every image must have a class, but {unknown.size} of {len(data)} have none, "
                    f"{data.source(int(unknown[0]))} for one"
                )
        there = _present(s, data, len(values))
        missing = [name for name, found in zip(names, there, strict=True) if not found]
        more = "--cases, --fraction, --case-seed" if which == "training" else "--val, --val-samples"
        require(
            not missing,
            f"the {which} cases must hold every class, but {_listed(missing)} is in none of {len(data)} sample(s); use "
            f"others or more of them ({more}), or other splits",
        )


def _present(s: FinetuneSettings, shards: ShardSet, count: int) -> NDArray[np.bool_]:
    """Which classes there are."""
    if s.task == "classification":
        return np.bincount(shards.targets, minlength=count) > 0
    there = np.zeros(count, bool)
    there[0] = True  # the background, which a map may leave out
    for index in range(len(shards)):
        if there.all():  # after a few maps, as a rule
            break
        try:
            there |= np.bincount(shards.labels(index)[0].ravel(), minlength=count) > 0
        except InputError:
            if s.on_bad_sample == "stop":
                raise
    return there


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
