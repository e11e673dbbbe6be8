"""Networks that map an image to feature maps, coarse to fine."""

from coverfast.backbones.adapted import Adapted
from coverfast.backbones.base import Backbone
from coverfast.backbones.choosing import build, choose
from coverfast.backbones.files import backbone_file, load_backbone, load_pyramid, read_backbone
from coverfast.backbones.reports import LoadReport, load_state
from coverfast.backbones.unet import PAPER_CHANNELS, UNet

__all__ = [
    "PAPER_CHANNELS",
    "Adapted",
    "Backbone",
    "LoadReport",
    "UNet",
    "backbone_file",
    "build",
    "choose",
    "load_backbone",
    "load_pyramid",
    "load_state",
    "read_backbone",
]
