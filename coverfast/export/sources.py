"""What there is to export: the network of a checkpoint, a run folder or a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from coverfast.backbones import Backbone, load_backbone, load_pyramid
from coverfast.backbones.files import Tell, backbone_bytes, described
from coverfast.checks import per_axis, require
from coverfast.downstream.network import Network, load_network, network_bytes
from coverfast.export.facts import Facts, shareable
from coverfast.pyramid import VectorPyramid
from coverfast.training.config import as_plain
from coverfast.training.restore import restore_method
from coverfast.training.runs import Run

#: What is said of a network with its head, beside its settings.
_KEPT = ("iteration", "figures", "score")


@dataclass(frozen=True)
class Source:
    """A trained network with what is known about it.

    Attributes:
        file: it was read from.
        network: a backbone, or one with its head, on the CPU, evaluating.
        config: settings of the run it comes from, of which nothing names a place or a person.
        preprocessing: how the images it learned from were made, as shards say it.
        pyramid: where a backbone's file has one.
        about: what is known of a network with its head beside that.
    """

    file: Path
    network: Backbone | Network
    config: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    pyramid: VectorPyramid | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def backbone(self) -> Backbone:
        """The network without a head."""
        return self.network.backbone if isinstance(self.network, Network) else self.network

    @property
    def outputs(self) -> list[str]:
        """Names of what it returns, in order."""
        if isinstance(self.network, Network):
            return ["logits"]
        return [f"features_{level}" for level in range(self.network.levels)]

    @property
    def image_size(self) -> tuple[int, ...] | None:
        """The size that it takes alone, else that of the crops it learned from, one an axis; None if not known."""
        if isinstance(self.network, Network):
            return self.network.crop
        crop, ndim = self.config.get("crop"), self.backbone.ndim
        only = getattr(self.backbone, "image_size", None)
        if only or not isinstance(crop, (list, tuple)):
            return only
        return per_axis("crop", crop[0] if len(crop) == 1 else crop, ndim)

    @property
    def facts(self) -> dict[str, Any]:
        """What a file says of itself, JSON-able by name."""
        backbone, network = self.backbone, self.network
        found: dict[str, Any] = {
            "backbone": backbone.description,
            "config": dict(self.config),
            "preprocessing": dict(self.preprocessing),
            "strides": list(backbone.strides),
            "outputs": self.outputs,
        }
        if not isinstance(network, Network):
            return found | {"feature_channels": list(network.feature_channels)}
        names = {"task": network.task, "names": list(network.names), "values": list(network.values)}
        return found | names | {"crop": list(network.crop)}

    def tensors(self) -> bytes:
        """The safetensors file of it."""
        if isinstance(self.network, Network):
            return network_bytes(self.network, {**self.about, "settings": self.config})
        config, preprocessing = self.config, self.preprocessing
        return backbone_bytes(self.network, config=config, preprocessing=preprocessing, pyramid=self.pyramid)


def open_source(path: str | Path, *, own: str | None = None, tell: Tell | None = None) -> Source:
    """The network of a pretraining checkpoint (.pt), a backbone.safetensors, a network.safetensors or a run folder.

    A run folder stands for its network.safetensors, else its backbone.safetensors, else its newest sound checkpoint.

    Args:
        path: file or folder.
        own: the code that makes the network where that is one of the user's, see `coverfast.load_backbone`.
        tell: takes lines: which tensors were matched, and which damaged checkpoints were passed over.

    Raises:
        InputError: when there is none, or it is damaged or of another kind.
    """
    path = Path(path)
    require(path.exists(), f"checkpoint must be a .pt or .safetensors file or a run folder, but there is no {path}")
    if path.is_dir():
        run = Run(path)
        path = next((file for file in (run.network, run.backbone) if file.is_file()), path)
    if path.is_dir() or path.suffix == ".pt":
        return _checkpoint(path, own, tell)
    metadata = _metadata(path)
    if metadata.get("format") == "coverfast-network":
        network = load_network(path, own=own, tell=tell)
        network.backbone = shareable(network.backbone)
        with described(path):
            about = json.loads(metadata["about"])
            config = _travelling(about.get("settings", {}), path)
        kept = {name: about[name] for name in _KEPT if name in about}
        return Source(path, network, config, network.preprocessing, about=kept)
    backbone = shareable(load_backbone(path, own=own, tell=tell))
    with described(path):
        config, preprocessing = (json.loads(metadata[name]) for name in ("config", "preprocessing"))
    pyramid = load_pyramid(path, tell=tell) if "pyramid" in metadata else None
    return Source(path, backbone, _travelling(config, path), preprocessing, pyramid)


def _travelling(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Those settings that may leave the machine with the weights."""
    return Facts.of({"settings": config}, str(path))[0].settings


def _checkpoint(path: Path, own: str | None, tell: Tell | None) -> Source:
    found = restore_method(path, own=own, tell=tell)
    for note in found.notes if tell else ():
        tell(note)  # type: ignore[misc]
    if path.is_dir():
        path = path / "checkpoints" / f"iteration-{found.iteration:08d}.pt"
    return Source(path, shareable(found.backbone), _travelling(as_plain(found.settings), path), found.preprocessing)


def _metadata(path: Path) -> dict[str, str]:
    """Of a safetensors file; none for what is no such file, of which loading it says what is wrong."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}
