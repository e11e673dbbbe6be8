"""Backbones on disk: safetensors, with what is needed to build the network again in the metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from coverfast.backbones.base import Backbone
from coverfast.backbones.choosing import Unavailable, build
from coverfast.backbones.reports import load_state
from coverfast.checks import InputError, require
from coverfast.pyramid import VectorPyramid

_FORMAT = "coverfast-backbone"
_PYRAMID = "pyramid."

#: Takes a line for people.
Tell = Callable[[str], object]


def backbone_bytes(
    backbone: Backbone,
    *,
    config: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    pyramid: VectorPyramid | None = None,
) -> bytes:
    """The backbone as the bytes of a safetensors file that `load_backbone` reads, weights under its own names.

    `config` (the run's settings) and `preprocessing` (how the shard was made) travel in the metadata. With a
    `pyramid` the file holds that too, for `load_pyramid`.
    """
    about = {"backbone": backbone.description, "config": config, "preprocessing": preprocessing}
    tensors = dict(backbone.core.state_dict())
    if pyramid is not None:
        tensors |= {_PYRAMID + name: value for name, value in pyramid.state_dict().items()}
        about["pyramid"] = {
            "ndim": pyramid.ndim,
            "channels": pyramid.channels,
            "groups": pyramid.groups,
            "head_dim": pyramid.head_dim,
            "window": pyramid.windows,
        }
    return to_bytes(tensors, _FORMAT, about)


def to_bytes(tensors: Mapping[str, Tensor], kind: str, about: Mapping[str, Any]) -> bytes:
    """Tensors as the bytes of a safetensors file of a `kind`, with JSON-able facts as its metadata."""
    metadata = {"format": kind, "version": "1"} | {name: json.dumps(value) for name, value in about.items()}
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        # Memory under two names is written twice: whoever reads the file need not know that the two are one.
        storage = value.untyped_storage().data_ptr()
        whole[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return save(whole, metadata)


def load_backbone(
    path: str | Path,
    *,
    strict: bool = True,
    in_channels: int | None = None,
    own: str | None = None,
    tell: Tell | None = print,
) -> Backbone:
    """The trained backbone of a `backbone.safetensors` or of the run folder that holds one, on the CPU, evaluating.

    Nothing in the file is executed, and its metadata never decide what code is imported.

    Args:
        path: file or folder.
        strict: whether the file must hold exactly the tensors of the network that it describes. False loads what fits.
        in_channels: N for images of N channels where the backbone is one for a single channel: its first convolution is
            adapted, so that an image repeated in all channels gives the same features.
        own: the code that makes the network where that is one of the user's, "package.module:factory" or
            "file.py:factory".
        tell: takes one line, which tensors were matched, missing, unexpected, reshaped; None for silence.

    Raises:
        InputError: when the file is missing, damaged, no coverfast backbone, or does not hold the tensors of the
            network its metadata describe.
    """
    require(in_channels is None or in_channels >= 1, f"in_channels must be at least 1, got {in_channels}")
    path = backbone_file(path)
    state, metadata = read_backbone(path)
    with described(path):
        description = json.loads(metadata["backbone"])
        channels = description["in_channels"]
    require(
        in_channels in (None, channels) or channels == 1,
        f"in_channels must be {channels}, those of {path}, for a backbone of one channel alone is adapted, got "
        f"{in_channels}",
    )
    with described(path), torch.random.fork_rng(devices=[]):
        backbone = build({**description, "in_channels": in_channels or channels}, own=own)
    report = load_state(backbone.core, state, str(path), strict=strict, adapt=in_channels or 0)
    if tell:
        tell(f"{path}: {report.every if not strict else report}{beside(path, metadata)}")
    return backbone.eval()


def beside(path: str | Path, metadata: Mapping[str, str]) -> str:
    """What a file holds beside its backbone, for people."""
    if "pyramid" not in metadata:
        return ""
    with safe_open(path, framework="pt") as file:  # which has been read already
        count = sum(name.startswith(_PYRAMID) for name in file.keys())  # noqa: SIM118
    return f"; its pyramid of {count} tensors is left to load_pyramid"


def load_pyramid(path: str | Path, *, tell: Tell | None = print) -> VectorPyramid:
    """The vector pyramid of a `backbone.safetensors` that holds one, on the CPU, evaluating. Arguments as above.

    Raises:
        InputError: as above, and when the file holds none.
    """
    path = backbone_file(path)
    tensors, metadata = _read(path)
    require("pyramid" in metadata, f"{path} must hold a pyramid beside the backbone, but it has the backbone alone")
    with described(path), torch.random.fork_rng(devices=[]):
        pyramid = VectorPyramid(**json.loads(metadata["pyramid"]))
    own = {n.removeprefix(_PYRAMID): value for n, value in tensors.items() if n.startswith(_PYRAMID)}
    report = load_state(pyramid, own, f"the pyramid of {path}")
    if tell:
        tell(f"{path}: pyramid: {report}")
    return pyramid.eval()


def backbone_file(path: str | Path) -> Path:
    """The `backbone.safetensors` itself, also of a run folder."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = path / "backbone.safetensors"
    require(
        found.is_file() or not (path / "network.safetensors").is_file(),
        f"{path} must be a run that has a backbone.safetensors, but is one of fine-tuning, whose network.safetensors "
        "coverfast.downstream.load_network reads",
    )
    return found


@contextmanager
def described(path: str | Path) -> Iterator[None]:
    """Say of a file that its metadata are at fault when what is built from them fails."""
    try:
        yield
    except Unavailable as error:
        raise InputError(f"{path} cannot be built here: {error}") from None
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, MemoryError) as error:
        raise InputError(f"{path} must describe its network, but its metadata do not: {error}") from None


def read_backbone(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a backbone file, checked to be one of ours; those of a pyramid are left out."""
    tensors, metadata = _read(path)
    if "pyramid" in metadata:
        tensors = {name: value for name, value in tensors.items() if not name.startswith(_PYRAMID)}
    return tensors, metadata


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    return read_tensors(path, _FORMAT, "backbone")


def read_tensors(path: str | Path, kind: str, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file that `to_bytes` made; nothing in it is executed.

    Raises:
        InputError: when it is missing, damaged, or of another kind.
    """
    path = Path(path)
    require(path.is_file(), f"{path} must be a {what}.safetensors file, but there is no such file")
    require(
        path.suffix not in (".pt", ".pth", ".ckpt"),
        f"{path} must be a {what}.safetensors file, got a checkpoint; coverfast export --to safetensors makes one",
    )
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
