"""From settings to the network and the method that trains it."""

from __future__ import annotations

import torch

from coverfast.backbones import Adapted, Backbone, choose
from coverfast.checks import InputError, per_axis, require
from coverfast.methods import Pretext
from coverfast.methods.choosing import build
from coverfast.methods.cover import Cover
from coverfast.ops import dispatch
from coverfast.pyramid import VectorPyramid
from coverfast.training.settings import Settings, TrainingSettings
from coverfast.training.world import World


def build_backbone(s: Settings, ndim: int, channels: int) -> Backbone:
    """The backbone of a run on images of `ndim` axes and `channels`, on the CPU, its weights drawn anew."""
    unet = s.unet_channels() if s.backbone == "unet" else ()
    return choose(s.backbone, s.backbone_args, ndim=ndim, in_channels=channels, channels=unet)


def build_method(s: Settings, ndim: int, channels: int) -> Pretext:
    """The method of a run on images of `ndim` axes and `channels`, on the CPU, its weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(s.seed)
        backbone, crop = build_backbone(s, ndim, channels), crop_of(s, ndim)
        if s.method != "cover":
            return build(s.method, s.method_args, backbone, crop=crop, pad=s.pad, impl=s.impl)
        window = s.window[0] if len(s.window) == 1 else s.window
        groups = s.fitted(backbone.levels).groups
        pyramid = VectorPyramid(ndim, backbone.feature_channels, groups, s.head_dim, window, impl=s.impl)
    return Cover(backbone, pyramid, crop=crop, settings=s.views(), pad=s.pad, impl=s.impl)


def crop_of(s: TrainingSettings, ndim: int) -> tuple[int, ...]:
    """Size of the views, one int an axis."""
    return per_axis("crop", s.crop[0] if len(s.crop) == 1 else s.crop, ndim)


def backbone_notes(backbone: Backbone, s: TrainingSettings, world: World) -> list[str]:
    """What a run must be told of a backbone that is not ours."""
    if not isinstance(backbone, Adapted):
        return []
    notes = [
        f"backbone {s.backbone}: {backbone.levels} levels, strides {'-'.join(map(str, backbone.strides))}, channels "
        f"{'-'.join(map(str, backbone.feature_channels))}"
    ]
    if backbone.mixes_samples:
        split = world.size * s.accumulate
        notes.append(
            "warning: the backbone has batch norms: what it makes of an image depends on the others of its batch"
            + (f", here on {s.batch // split} of {s.batch}" if split > 1 else "")
            + ", so that other --accumulate or numbers of processes are other runs"
        )
    return notes


def choose_device(name: str, impl: str = "auto", world: World | None = None) -> torch.device:
    """The device of a run; among several processes each has its own GPU."""
    device = _device(name)
    if device.type == "cuda" and world and world.size > 1:
        require(device.index is None, f"device must be auto, cpu or cuda with several processes, got {name!r}")
        device = torch.device("cuda", world.local_rank)
    for op in dispatch.OPS:
        dispatch.choose(op, impl, torch.empty(0, device=device))
    return device


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


def check_batch(s: TrainingSettings, world: World) -> None:
    """Refuse a batch that cannot be shared evenly, with the nearest ones that can."""
    shares = world.size * s.accumulate
    below = s.batch // shares * shares
    nearest = [b for b in (below, below + shares) if b > 0]
    among = f"{world.size} processes" if s.accumulate == 1 else f"{world.size} process(es) of {s.accumulate} parts each"
    require(
        s.batch % shares == 0,
        f"batch must be divisible by {shares} for {among}, got {s.batch}; the nearest are "
        f"{' and '.join(map(str, nearest))}",
    )
