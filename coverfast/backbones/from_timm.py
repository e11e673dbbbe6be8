"""Feature extractors of timm as backbones, 2D."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from coverfast.backbones.adapted import Adapted, Run
from coverfast.backbones.choosing import among, need
from coverfast.checks import InputError, require
from coverfast.own_code import refusing

#: What makes the extractor rather than the network, beside the arguments of timm's functions that do so.
_RESERVED = {"features_only", "feature_cls", "in_chans", "pruned"}


def build(name: str, ndim: int, in_channels: int, args: Mapping[str, Any]) -> Adapted:
    """What `timm.create_model(name, features_only=True, in_chans=in_channels, **args)` makes, its weights drawn anew.

    Raises:
        InputError: when timm is not installed, has no such network, does not take an argument, or when the network
            gives no pyramid; for arguments that load weights.
    """
    timm = need("timm", "timm")
    require(ndim == 2, f"a network of timm must be for 2 axes, got {ndim}: timm has none for volumes")
    among("a network of timm", name, timm.list_models())
    makers = (timm.create_model, timm.models.build_model_with_cfg)
    own = {p.name for f in makers for p in inspect.signature(f).parameters.values() if p.kind is not p.VAR_KEYWORD}
    taken = [key for key in args if key in own | _RESERVED or key.startswith("pretrained")]
    require(
        not taken,
        f"arguments of timm:{name} must be those of the network, got {', '.join(taken)}: which weights it has and what "
        "it returns is not for them to say",
    )
    with refusing(f"timm:{name} must be what timm can make with {dict(args)}"):
        model = timm.create_model(name, pretrained=False, features_only=True, in_chans=in_channels, **args)
    description = {"kind": "timm", "name": name, "args": dict(args), "ndim": ndim, "in_channels": in_channels}
    return sized(model, _maps, description, name, args)


def sized(model: nn.Module, run: Run, description: Mapping[str, Any], name: str, args: Mapping[str, Any]) -> Adapted:
    """A network that is, or has in it, timm's network of that name; made for one size of image, it takes no other."""
    size = args.get("img_size")
    if size is not None and args.get("strict_img_size", True):
        return Adapted(model, run, description, size=size)
    try:
        return Adapted(model, run, description)
    except InputError:
        config = need("timm", "timm").get_pretrained_cfg(name)
        if config is None or not config.input_size:
            raise
        size = config.input_size[1:]
    return Adapted(model, run, description, size=size)


def _maps(model: Any, x: Tensor) -> list[Tensor]:
    maps = model(x)[::-1]
    return [f.permute(0, 3, 1, 2) for f in maps] if getattr(model, "output_fmt", None) == "NHWC" else maps
