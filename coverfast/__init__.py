"""Pixel-wise self-supervised pretraining of medical images: COVER (ICCV 2025) and GVSL (CVPR 2023).

The public names. They are loaded on first use, so that importing the package, or asking the command line for help,
does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coverfast.backbones import UNet as UNet
    from coverfast.backbones import load_backbone as load_backbone
    from coverfast.backbones import load_pyramid as load_pyramid
    from coverfast.checks import InputError as InputError
    from coverfast.geometry import AffineDVF as AffineDVF
    from coverfast.geometry import affine_dvf as affine_dvf
    from coverfast.geometry import inside_mask as inside_mask
    from coverfast.geometry import upsample_dvf as upsample_dvf
    from coverfast.loader import crop_loader as crop_loader
    from coverfast.methods.cover import Cover as Cover
    from coverfast.methods.gvsl import GVSL as GVSL
    from coverfast.ops.compose import compose as compose
    from coverfast.ops.fuse import fuse_affine as fuse_affine
    from coverfast.ops.losses import consistency_loss as consistency_loss
    from coverfast.ops.losses import end_point_error as end_point_error
    from coverfast.ops.losses import vector_loss as vector_loss
    from coverfast.ops.mov import mov as mov
    from coverfast.ops.ncc import ncc_loss as ncc_loss
    from coverfast.ops.warp import warp as warp
    from coverfast.pyramid import VectorPyramid as VectorPyramid
    from coverfast.shard_set import ShardSet as ShardSet
    from coverfast.shards import Shard as Shard
    from coverfast.view_draws import ViewRegions as ViewRegions
    from coverfast.view_settings import ViewSettings as ViewSettings
    from coverfast.views import make_views as make_views

__version__ = "0.1.0"

_HOME = {
    "AffineDVF": "geometry",
    "Cover": "methods.cover",
    "GVSL": "methods.gvsl",
    "ShardSet": "shard_set",
    "ViewRegions": "view_draws",
    "InputError": "checks",
    "Shard": "shards",
    "UNet": "backbones",
    "VectorPyramid": "pyramid",
    "ViewSettings": "view_settings",
    "affine_dvf": "geometry",
    "compose": "ops.compose",
    "consistency_loss": "ops.losses",
    "crop_loader": "loader",
    "end_point_error": "ops.losses",
    "fuse_affine": "ops.fuse",
    "inside_mask": "geometry",
    "load_backbone": "backbones",
    "load_pyramid": "backbones",
    "make_views": "views",
    "mov": "ops.mov",
    "ncc_loss": "ops.ncc",
    "upsample_dvf": "geometry",
    "vector_loss": "ops.losses",
    "warp": "ops.warp",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'coverfast' has no attribute {name!r}")
    value = getattr(import_module(f"coverfast.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
