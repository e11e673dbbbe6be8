"""Networks that map an image to feature maps, coarse to fine."""

from coverfast.backbones.files import LoadReport, load_backbone, load_state, read_backbone
from coverfast.backbones.unet import PAPER_CHANNELS, UNet

__all__ = ["PAPER_CHANNELS", "LoadReport", "UNet", "load_backbone", "load_state", "read_backbone"]
