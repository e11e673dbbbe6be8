"""Networks of MONAI as backbones, 2D and 3D: what their decoders make of an image, level by level."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coverfast.backbones.adapted import Adapted, Run, stripped
from coverfast.backbones.choosing import need
from coverfast.checks import check_choice, require
from coverfast.own_code import refusing

#: Arguments that are set here, or about heads.
_RESERVED = {"spatial_dims", "in_channels", "out_channels", "deep_supervision", "deep_supr_num", "use_conv_final"}


def build(name: str, ndim: int, in_channels: int, args: Mapping[str, Any]) -> Adapted:
    """The network that MONAI's class `name` makes of `args`, without its head, its weights drawn anew.

    Raises:
        InputError: when MONAI is not installed, or for a class or argument that is not among those that work here.
    """
    nets = need("monai.networks.nets", "MONAI")
    check_choice("a network of MONAI", name, [n for n in _NETWORKS if hasattr(nets, n)])
    (run, defaults), make = _NETWORKS[name], getattr(nets, name)
    known = [p for p in inspect.signature(make).parameters if p not in _RESERVED]
    unknown = [key for key in args if key not in known]
    require(
        not unknown,
        f"arguments of monai:{name} must be those of MONAI's class, less what is set here (axes, channels) or is about "
        f"heads, got {', '.join(unknown)}",
    )
    given = {**defaults, **args}
    require(
        "img_size" in given or "img_size" not in known, f"monai:{name} must be told img_size, the size of its images"
    )
    with refusing(f"monai:{name} must be what MONAI can make with {dict(args)}"):
        # The output of the UNet is its finest map, here of as many channels as its finest stage has.
        out = given["channels"][0] if "channels" in given else 1
        model = make(spatial_dims=ndim, in_channels=in_channels, out_channels=out, **given)
    description = {"kind": "monai", "name": name, "args": dict(args), "ndim": ndim, "in_channels": in_channels}
    return stripped(Adapted(model, run, description, size=given.get("img_size")))


def _swin_unetr(model: Any, x: Tensor) -> list[Tensor]:
    hidden = model.swinViT(x, model.normalize)
    skips = [hidden[3], model.encoder4(hidden[2]), model.encoder3(hidden[1]), model.encoder2(hidden[0])]
    skips.append(model.encoder1(x))
    decoders = (model.decoder5, model.decoder4, model.decoder3, model.decoder2, model.decoder1)
    return _up(model.encoder10(hidden[4]), decoders, skips)


def _unetr(model: Any, x: Tensor) -> list[Tensor]:
    coarsest, hidden = model.vit(x)
    encoders = ((model.encoder4, 9), (model.encoder3, 6), (model.encoder2, 3))
    skips = [encoder(model.proj_feat(hidden[layer])) for encoder, layer in encoders] + [model.encoder1(x)]
    decoders = (model.decoder5, model.decoder4, model.decoder3, model.decoder2)
    return _up(model.proj_feat(coarsest), decoders, skips)


def _basic_unet(model: Any, x: Tensor) -> list[Tensor]:
    skips = [model.conv_0(x)]
    for down in (model.down_1, model.down_2, model.down_3, model.down_4):
        skips.append(down(skips[-1]))
    coarsest = skips.pop()
    return _up(coarsest, (model.upcat_4, model.upcat_3, model.upcat_2, model.upcat_1), skips[::-1])


def _dynunet(model: Any, x: Tensor) -> list[Tensor]:
    skips = [model.input_block(x)]
    for down in model.downsamples:
        skips.append(down(skips[-1]))
    return _up(model.bottleneck(skips[-1]), model.upsamples, skips[::-1])


def _up(coarsest: Tensor, decoders: Any, skips: list[Tensor]) -> list[Tensor]:
    maps = [coarsest]
    for decoder, skip in zip(decoders, skips, strict=True):
        maps.append(decoder(maps[-1], skip))
    return maps


def _segresnet(model: Any, x: Tensor) -> list[Tensor]:
    coarsest, skips = model.encode(x)
    maps = [coarsest]
    for up, layer, skip in zip(model.up_samples, model.up_layers, skips[-2::-1], strict=True):
        maps.append(layer(up(maps[-1]) + skip))
    norm, activation, _ = model.conv_final
    return [*maps[:-1], activation(norm(maps[-1]))]


def _mednext(model: Any, x: Tensor) -> list[Tensor]:
    x, skips = model.stem(x), []
    for stage, down in zip(model.enc_stages, model.down_blocks, strict=True):
        skips.append(stage(x))
        x = down(skips[-1])
    maps = [model.bottleneck(x)]
    for up, stage, skip in zip(model.up_blocks, model.dec_stages, skips[::-1], strict=True):
        maps.append(stage(up(maps[-1]) + skip))
    return maps


def _unet(model: Any, x: Tensor) -> list[Tensor]:
    return _unet_block(model.model, x)


def _unet_block(block: Any, x: Tensor) -> list[Tensor]:
    """Maps of a block of MONAI's nested U-Net: the way down, a skip around the block below, the way up."""
    down, around, up = block
    x, below = down(x), around.submodule
    maps = _unet_block(below, x) if type(below) is nn.Sequential else [below(x)]
    return [*maps, up(torch.cat([x, maps[-1]], 1))]


def _attention_unet(model: Any, x: Tensor) -> list[Tensor]:
    return _attention_layer(model.model[1], model.model[0](x))


def _attention_layer(layer: Any, x: Tensor) -> list[Tensor]:
    below = layer.submodule
    maps = _attention_layer(below[1], below[0](x)) if type(below) is nn.Sequential else [below(x)]
    up = layer.upconv(maps[-1])
    return [*maps, layer.merge(torch.cat([layer.attention(g=up, x=x), up], 1))]


_FIVE_LEVELS = {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2)}
_FIVE_STAGES = {"kernel_size": (3,) * 5, "strides": (1, 2, 2, 2, 2), "upsample_kernel_size": (2,) * 4}

#: Maps of a class's networks, and defaults of arguments that MONAI leaves open.
_NETWORKS: dict[str, tuple[Run, dict[str, Any]]] = {
    "AttentionUnet": (_attention_unet, _FIVE_LEVELS),
    "BasicUNet": (_basic_unet, {}),
    "DynUNet": (_dynunet, _FIVE_STAGES),
    "MedNeXt": (_mednext, {}),
    "SegResNet": (_segresnet, {}),
    "SwinUNETR": (_swin_unetr, {}),
    "UNet": (_unet, {**_FIVE_LEVELS, "num_res_units": 2}),
    "UNETR": (_unetr, {}),
}
