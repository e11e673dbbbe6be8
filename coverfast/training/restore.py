"""A method as a checkpoint holds it, without the data it was trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from coverfast.backbones import Backbone, load_state
from coverfast.backbones.files import Tell
from coverfast.checks import require
from coverfast.method_names import is_own
from coverfast.methods import Pretext
from coverfast.training.assembly import build_backbone, build_method
from coverfast.training.checkpoints import read_checkpoint
from coverfast.training.runs import Run
from coverfast.training.settings import Settings, resolve


@dataclass(frozen=True)
class Restored:
    """What a checkpoint holds.

    Attributes:
        backbone: in evaluation mode; the moving average of the weights where the run keeps one.
        method: what trained it; None for code of the user's that was not named.
        settings: of the run.
        preprocessing: how the images it learned from were made, as shards say it.
        iteration: after which it was written.
        metrics: of the run it lies in, if it does.
        notes: sentences on damaged checkpoints that were passed over.
    """

    backbone: Backbone
    method: Pretext | None
    settings: Settings
    preprocessing: dict[str, Any]
    iteration: int
    metrics: Path | None
    notes: list[str]


def restore_method(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    own: str | None = None,
    own_method: str | None = None,
    tell: Tell | None = None,
) -> Restored:
    """The method of a checkpoint, or of the newest sound checkpoint of a run folder.

    own, own_method: the code that makes the backbone, or is the method, where that is the user's. tell: takes one line,
    which tensors were matched.

    Raises:
        InputError: when there is none, or it is damaged.
    """
    path, device, notes = Path(path), torch.device(device), list[str]()
    if path.is_dir():
        found = Run(path).checkpoints.newest(torch.device("cpu"))
        require(found is not None, f"{path} must be a run folder with a checkpoint, but there is none in checkpoints/")
        assert found is not None
        path, state, notes = found
    else:
        require(path.is_file(), f"checkpoint must be a file or a run folder, but there is no {path}")
        state = read_checkpoint(path, torch.device("cpu"))
    kind = state.get("kind", Settings.kind)
    require(kind == Settings.kind, f"{path} must be a checkpoint of a {Settings.kind}, but it is one of a {kind}")
    values = dict(state["settings"])
    settings, data = resolve(str(values.get("preset")), values), state["data"]
    require(
        own_method is None or (is_own(own_method) and settings.own_method is not None),
        f"method must be left out but for a run of a method of your own, got {own_method} for one of {settings.method}",
    )
    if settings.own:
        require(own is not None, f"{path} is of a network of your own ({settings.own}): say --backbone {settings.own}")
        settings = replace(settings, backbone=str(own))
    weights, ndim, channels = weights_of(state), int(data["ndim"]), int(data["channels"])
    method = None
    if settings.own_method and own_method is None:  # nothing is imported that a file names
        with torch.random.fork_rng(devices=[]):
            backbone = build_backbone(settings, ndim, channels)
        prefix = "backbone."
        weights = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        report = load_state(backbone, weights, str(path))
    else:
        settings = replace(settings, method=own_method) if own_method and settings.own_method else settings
        method = build_method(settings, ndim, channels).to(device).eval()
        report = load_state(method, weights, str(path))
        assert isinstance(method.backbone, Backbone)
        backbone = method.backbone
    if tell:
        tell(f"{path}: {report}")
    metrics = path.parent.parent / "metrics.jsonl"
    return Restored(
        backbone.to(device).eval(),
        method,
        settings,
        dict(data["preprocessing"]),
        int(state["iteration"]),
        metrics if metrics.is_file() else None,
        notes,
    )


def weights_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that are the result of a run: the moving average where there is one."""
    return state.get("ema", state["method"])
