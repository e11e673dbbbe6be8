"""Backbones on disk: safetensors, with what is needed to build the network again in the metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from coverfast.backbones.unet import UNet
from coverfast.checks import InputError, require

_FORMAT = "coverfast-backbone"


def backbone_bytes(backbone: UNet, *, config: dict[str, Any], preprocessing: dict[str, Any]) -> bytes:
    """The backbone as the bytes of a safetensors file that `load_backbone` reads.

    `config` (the run's settings) and `preprocessing` (how the shard was made) travel in the metadata.
    """
    about = {"backbone": describe(backbone), "config": config, "preprocessing": preprocessing}
    return to_bytes(backbone, _FORMAT, about)


def to_bytes(module: nn.Module, kind: str, about: Mapping[str, Any]) -> bytes:
    """The weights of a module as the bytes of a safetensors file of a `kind`, with JSON-able facts as its metadata."""
    metadata = {"format": kind, "version": "1"} | {name: json.dumps(value) for name, value in about.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    return save(tensors, metadata)


def describe(backbone: UNet) -> dict[str, Any]:
    """What `build` needs to make the network again, JSON-able."""
    return {
        "kind": "unet",
        "ndim": backbone.ndim,
        "in_channels": backbone.in_channels,
        "channels": list(backbone.channels),
    }


def build(description: Mapping[str, Any]) -> UNet:
    """A network as `describe` said it, its weights drawn anew; ValueError or TypeError for what is none."""
    values = dict(description)
    require(values.pop("kind") == "unet", "its kind is unknown")
    return UNet(**values)


def load_backbone(path: str | Path) -> UNet:
    """The trained backbone of a `backbone.safetensors`, on the CPU, in evaluation mode.

    Raises:
        InputError: when the file is missing, damaged, no coverfast backbone, or does not hold exactly the tensors
            of the network its metadata describes.
    """
    state, metadata = read_backbone(path)
    with described(path):
        backbone = build(json.loads(metadata["backbone"]))
    load_state(backbone, state, str(path))
    return backbone.eval()


@contextmanager
def described(path: str | Path) -> Iterator[None]:
    """Say of a file that its metadata are at fault when what is built from them fails."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, MemoryError) as error:
        raise InputError(f"{path} must describe its network, but its metadata do not: {error}") from None


def read_backbone(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a backbone file, checked to be one of ours."""
    return read_tensors(path, _FORMAT, "backbone")


def read_tensors(path: str | Path, kind: str, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file that `to_bytes` made; nothing in it is executed.

    Raises:
        InputError: when it is missing, damaged, or of another kind.
    """
    path = Path(path)
    require(path.is_file(), f"{path} must be a {what}.safetensors file, but there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} must be a safetensors file, but it cannot be read: {error}") from None
    found = metadata.get("format", "")
    require(
        found == kind and "backbone" in metadata,
        f"{path} must be a {what} saved by coverfast, but its metadata does not say so"
        + (f" (it says {found})" if found else ""),
    )
    version = metadata.get("version")
    require(version == "1", f"{path} must be a {what} file of version 1, got version {version}")
    return state, metadata


@dataclass(frozen=True)
class LoadReport:
    """What a set of tensors did to a network: names by outcome."""

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]

    def __str__(self) -> str:
        """Counts of every outcome, and the first names of all but the matched."""
        parts = [f"{len(self.matched)} matched"]
        for outcome in ("missing", "unexpected", "reshaped"):
            names = getattr(self, outcome)
            shown = names[:3] + ([f"and {len(names) - 3} more"] if len(names) > 3 else [])
            parts.append(f"{len(names)} {outcome}" + (f" ({', '.join(shown)})" if names else ""))
        return ", ".join(parts)


def load_state(module: nn.Module, state: dict[str, Tensor], source: str) -> LoadReport:
    """Load tensors into a network, all of them or none.

    Raises:
        InputError: with the report, unless every tensor of the network is there with its shape, and no other.
    """
    own = module.state_dict()
    report = LoadReport(
        matched=[n for n in own if n in state and state[n].shape == own[n].shape],
        missing=[n for n in own if n not in state],
        unexpected=[n for n in state if n not in own],
        reshaped=[
            f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}"
            for n in own
            if n in state and state[n].shape != own[n].shape
        ],
    )
    require(len(report.matched) == len(own) == len(state), f"{source} does not fit the network: {report}")
    with torch.no_grad():
        module.load_state_dict(state)
    return report
