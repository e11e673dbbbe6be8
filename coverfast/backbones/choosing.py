"""A backbone by its name: our U-Net, a network of another library, or one of the user's."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from coverfast.backbone_names import LIBRARIES, kind_of
from coverfast.backbones.adapted import Adapted
from coverfast.backbones.base import Backbone
from coverfast.backbones.unet import PAPER_CHANNELS, UNet
from coverfast.checks import InputError, require
from coverfast.own_code import imported, parsed, plain, refusing

_KINDS = f"unet, {', '.join(f'{library}:NAME' for library in LIBRARIES)}, or your own package.module:factory or "
_KINDS += "file.py:factory"


class Unavailable(InputError):
    """What makes a network is not here: a library that is not installed, code that nobody has named."""


def choose(
    name: str,
    args: Sequence[str] = (),
    *,
    ndim: int,
    in_channels: int,
    channels: Sequence[int] = PAPER_CHANNELS,
) -> Backbone:
    """The backbone of a name, its weights drawn anew.

    Args:
        name: "unet"; "timm:convnext_tiny", "monai:SwinUNETR", "smp:Unet"; or "package.module:factory" or
            "file.py:factory" for code of your own, which is imported: `factory(ndim=, in_channels=, **args)` must give
            a module that maps an image to feature maps, coarse to fine.
        args: arguments of the network, "KEY=VALUE" with values as Python writes them.
        ndim: 2 or 3 spatial axes.
        in_channels: channels of the image.
        channels: those of the U-Net's stages.

    Raises:
        InputError: for a name or an argument that is none, or a library that is not installed.
    """
    if name == "unet":
        require(not args, f"backbone_args must be empty for the U-Net, which has channels, got {', '.join(args)}")
        return UNet(ndim, in_channels, channels)
    kind, rest = kind_of(name), name.partition(":")[2]
    require(bool(rest), f"backbone must be {_KINDS}, got {name!r}")
    network = name if kind == "own" else rest
    return build(
        {
            "kind": kind,
            "name": network,
            "args": parsed(args, "backbone_args"),
            "ndim": ndim,
            "in_channels": in_channels,
        },
        own=name if kind == "own" else None,
    )


def build(description: Mapping[str, Any], *, own: str | None = None) -> Backbone:
    """A backbone as its `description` says, its weights drawn anew.

    Args:
        description: see `Backbone`.
        own: the user's code that makes it, see `choose`. A description never decides what code is imported: one of
            a user's network is refused without this.

    Raises:
        InputError: see `choose`.
        ValueError, TypeError, KeyError: for what is no description.
    """
    values = dict(description)
    kind = values.pop("kind")
    if kind == "unet":
        return UNet(**values)
    network, args, ndim, in_channels = (values.pop(key) for key in ("name", "args", "ndim", "in_channels"))
    require(not values, f"a description of a backbone must not have {', '.join(values)}")
    require(isinstance(network, str) and isinstance(args, dict), "name must be a string and args a table")
    args = plain(args, "backbone_args")
    require(ndim in (2, 3), f"ndim must be 2 or 3, got {ndim!r}")
    require(isinstance(in_channels, int) and in_channels >= 1, f"in_channels must be at least 1, got {in_channels!r}")
    if kind == "own":
        if own is None:
            raise Unavailable(
                f"the network is one of your own: say which code makes it, own={network!r} or --backbone {network}"
            )
        return _own(own, ndim, in_channels, args)
    require(kind in LIBRARIES, f"kind must be one of unet, {', '.join(LIBRARIES)} or own, got {kind!r}")
    library = importlib.import_module(f"coverfast.backbones.{LIBRARIES[kind]}")
    found = library.build(network, ndim, in_channels, args)
    assert isinstance(found, Backbone)
    return found


def spelled(args: Mapping[str, Any]) -> tuple[str, ...]:
    """Arguments as `coverfast.own_code.parsed` reads them."""
    return tuple(f"{key}={value!r}" for key, value in args.items())


def need(module: str, package: str) -> Any:
    """A library that adapts networks, imported.

    Raises:
        Unavailable: when it is not installed or does not import.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if (error.name or "").partition(".")[0] == module.partition(".")[0]:
            raise Unavailable(f"this backbone needs {package}: pip install coverfast[backbones]") from error
        raise Unavailable(f"{package} must be importable for this backbone, but {error}") from error
    except RuntimeError as error:
        hint = f"; torchvision must be one that was made for torch {torch.__version__}" * ("torchvision" in str(error))
        raise Unavailable(f"{package} must be importable for this backbone, but {error}{hint}") from error


def among(what: str, name: str, names: Sequence[str]) -> None:
    """Refuse a name that is none of a library's, with the nearest ones."""
    if name not in names:
        close = difflib.get_close_matches(name, names, 3)
        raise InputError(
            f"{what} must be one of its names, got {name!r}" + (f"; near: {', '.join(close)}" if close else "")
        )


def _own(place: str, ndim: int, in_channels: int, args: Mapping[str, Any]) -> Backbone:
    """A network by the user's code."""
    factory = imported("backbone", place, _KINDS)
    with refusing(f"{place} must be called as {place.rpartition(':')[2]}(ndim={ndim}, in_channels={in_channels}, ...)"):
        model = factory(ndim=ndim, in_channels=in_channels, **args)
    require(isinstance(model, nn.Module), f"{place} must give a torch.nn.Module, got {type(model).__name__}")
    description = {"kind": "own", "name": place, "args": dict(args), "ndim": ndim, "in_channels": in_channels}
    return Adapted(model, _call, description, size=getattr(model, "image_size", None))


def _call(model: nn.Module, x: Any) -> Any:
    return model(x)
