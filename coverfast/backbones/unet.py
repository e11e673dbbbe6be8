"""The paper's U-Net, 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coverfast.backbones.base import Backbone
from coverfast.checks import require
from coverfast.geometry import level_size

#: Channels of the paper's U-Net, encoder to decoder.
PAPER_CHANNELS = (32, 64, 128, 256, 512, 256, 128, 64, 32)

#: Convolutions and linear up-sampling by the number of spatial axes.
CONV = {2: nn.Conv2d, 3: nn.Conv3d}
UPSAMPLE = {2: "bilinear", 3: "trilinear"}


def conv_group(ndim: int, in_channels: int, out_channels: int) -> list[nn.Module]:
    """3^n convolution with bias, GroupNorm with 8 channels a group, LeakyReLU(0.2)."""
    conv = CONV[ndim](in_channels, out_channels, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight, a=0.2)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return [conv, nn.GroupNorm(out_channels // 8, out_channels), nn.LeakyReLU(0.2, inplace=True)]


class DoubleConv(nn.Sequential):
    """Two convolution groups, see `conv_group`."""

    def __init__(self, ndim: int, in_channels: int, out_channels: int) -> None:
        super().__init__(*conv_group(ndim, in_channels, out_channels), *conv_group(ndim, out_channels, out_channels))


class UNet(Backbone):
    """U-Net that returns the feature maps of its levels, coarse to fine.

    Down: 2^n max-pooling; up: linear up-sampling in half-pixel geometry and concatenation. With one input channel
    and the paper's channels 7,851,936 parameters in 2D and 23,538,144 in 3D.

    Args:
        ndim: 2 or 3 spatial axes.
        in_channels: channels of the image.
        channels: channels of the `2L - 1` stages, encoder then decoder; multiples of 8.

    Attributes:
        feature_channels: channels of the L maps returned, coarse to fine.
        strides: pixels of the image per pixel of each map, coarse to fine.
        recompute: whether the backward pass computes the activations of a stage again instead of keeping them.
    """

    def __init__(self, ndim: int, in_channels: int = 1, channels: Sequence[int] = PAPER_CHANNELS) -> None:
        super().__init__()
        require(ndim in (2, 3), f"ndim must be 2 or 3, got {ndim}")
        require(in_channels >= 1, f"in_channels must be at least 1, got {in_channels}")
        channels = tuple(channels)
        require(
            len(channels) >= 3
            and len(channels) % 2 == 1
            and all(isinstance(c, int) and c > 0 and c % 8 == 0 for c in channels),
            f"channels must be an odd number of at least 3 positive multiples of 8, got {channels}",
        )
        self.ndim, self.in_channels, self.channels = ndim, in_channels, channels
        self.recompute = False
        levels = (len(channels) + 1) // 2
        encoder, decoder = channels[:levels], channels[levels:]
        self.feature_channels = channels[levels - 1 :]
        self.strides = tuple(2**i for i in reversed(range(levels)))
        self.stem = DoubleConv(ndim, in_channels, encoder[0])
        self.down = nn.ModuleList(DoubleConv(ndim, a, b) for a, b in pairwise(encoder))
        self.up = nn.ModuleList(
            DoubleConv(ndim, below + skip, out)
            for below, skip, out in zip(self.feature_channels, reversed(encoder[:-1]), decoder, strict=False)
        )

    @property
    def description(self) -> dict[str, Any]:
        """See `Backbone`."""
        return {
            "kind": "unet",
            "ndim": self.ndim,
            "in_channels": self.in_channels,
            "channels": list(self.channels),
        }

    @property
    def modules_in_order(self) -> list[nn.Module]:
        """The `2L - 1` stages from the image to the finest features."""
        return [self.stem, *self.down, *self.up]

    def encode(self, x: Tensor) -> list[Tensor]:
        """Features of the encoder, fine to coarse; the last ones are the coarsest of `forward`."""
        self.check_image(x)
        level_size(x.shape[2:], self.levels)
        skips = [self._stage(self.stem, x)]
        for stage in self.down:
            skips.append(self._stage(stage, _halve(skips[-1])))
        return skips

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of an image `(B, in_channels, *S)`, coarse to fine; `S` divisible by the coarsest stride."""
        skips = self.encode(x)
        features = [skips.pop()]
        for stage in self.up:
            up = F.interpolate(features[-1], scale_factor=2, mode=UPSAMPLE[self.ndim], align_corners=False)
            features.append(self._stage(stage, torch.cat([skips.pop(), up], 1)))
        return features

    def _stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(stage, x, use_reentrant=False)
        return stage(x)


def _halve(x: Tensor) -> Tensor:
    """2^n max-pooling."""
    if x.ndim == 4:
        return F.max_pool2d(x, 2)
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        # The backward of max_pool3d has no deterministic form there; a tie shares its gradient here.
        for axis in (2, 3, 4):
            x = x.unflatten(axis, (-1, 2)).amax(axis + 1)
        return x
    return F.max_pool3d(x, 2)
