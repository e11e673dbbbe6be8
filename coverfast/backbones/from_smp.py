"""Networks of segmentation_models_pytorch as backbones, 2D: what their decoders make of an image, level by level."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from coverfast.backbones.adapted import Adapted, stripped
from coverfast.backbones.choosing import among, need
from coverfast.backbones.from_timm import sized
from coverfast.checks import check_choice, require
from coverfast.own_code import refusing

#: Arguments of the classes that are about the head, or set here.
_RESERVED = {"self", "kwargs", "encoder_weights", "in_channels", "classes", "activation", "aux_params", "upsampling"}
_RESERVED |= {"decoder_segmentation_channels", "decoder_merge_policy", "decoder_dropout"}


def build(name: str, ndim: int, in_channels: int, args: Mapping[str, Any]) -> Adapted:
    """The network that the class `name` makes of `args`, without its head, its weights drawn anew.

    Raises:
        InputError: when the library is not installed, or for a class, an encoder or an argument that is not among those
            that work here.
    """
    smp = need("segmentation_models_pytorch", "segmentation-models-pytorch")
    require(ndim == 2, f"a network of smp must be for 2 axes, got {ndim}: smp has none for volumes")
    check_choice("a network of smp", name, list(_NETWORKS))
    make, run = getattr(smp, name), _NETWORKS[name]
    encoder = str(args.get("encoder_name", "resnet34"))
    timms = ["tu-" + n for n in need("timm", "timm").list_models()]
    among("an encoder of smp", encoder, [*smp.encoders.get_encoder_names(), *timms])
    known = [p for p in inspect.signature(make.__init__).parameters if p not in _RESERVED]
    known += ["img_size"] if encoder in timms else []
    unknown = [key for key in args if key not in known]
    require(
        not unknown,
        f"arguments of smp:{name} must be those of smp's class, less what is set here (channels, no weights) or is "
        f"about heads, got {', '.join(unknown)}",
    )
    with refusing(f"smp:{name} must be what smp can make with {dict(args)}"):
        model = make(**{"encoder_name": encoder, **args}, encoder_weights=None, in_channels=in_channels, classes=1)
    description = {"kind": "smp", "name": name, "args": dict(args), "ndim": ndim, "in_channels": in_channels}
    found = sized(model, run, description, encoder[3:], args) if encoder in timms else Adapted(model, run, description)
    return stripped(found)


def _unet(model: Any, x: Tensor) -> list[Tensor]:
    features = model.encoder(x)[::-1]
    maps = [model.decoder.center(features[0])]
    for block, target, skip in zip(model.decoder.blocks, features[1:], [*features[1:-1], None], strict=True):
        maps.append(block(maps[-1], *target.shape[2:], skip_connection=skip))
    return maps


def _unet_plus_plus(model: Any, x: Tensor) -> list[Tensor]:
    features, blocks = model.encoder(x)[:0:-1], model.decoder.blocks
    maps: list[Tensor] = [features[0]]
    row: list[Tensor] = []
    for level, skip in enumerate(features[1:]):  # block x_s_l takes stage s of the encoder up to this level
        starts, row = [*row, features[level]], [skip]
        for start in reversed(range(level + 1)):
            row.insert(0, blocks[f"x_{start}_{level}"](starts[start], torch.cat(row, 1)))
        maps.append(row[0])
        row = row[:-1]
    return [*maps, blocks[f"x_0_{len(features) - 1}"](maps[-1])]


def _manet(model: Any, x: Tensor) -> list[Tensor]:
    features = model.encoder(x)[:0:-1]
    return _up(model.decoder.center(features[0]), model.decoder.blocks, features)


def _linknet(model: Any, x: Tensor) -> list[Tensor]:
    features = model.encoder(x)[:0:-1]
    return _up(features[0], model.decoder.blocks, features)


def _up(coarsest: Tensor, blocks: Any, features: list[Tensor]) -> list[Tensor]:
    maps = [coarsest]
    for block, skip in zip(blocks, [*features[1:], None], strict=True):
        maps.append(block(maps[-1], skip))
    return maps


def _fpn(model: Any, x: Tensor) -> list[Tensor]:
    features, decoder = model.encoder(x)[:-5:-1], model.decoder
    maps = [decoder.p5(features[0])]
    for block, skip in zip((decoder.p4, decoder.p3, decoder.p2), features[1:], strict=True):
        maps.append(block(maps[-1], skip))
    return maps


_NETWORKS = {
    "FPN": _fpn,
    "Linknet": _linknet,
    "MAnet": _manet,
    "Unet": _unet,
    "UnetPlusPlus": _unet_plus_plus,
}
