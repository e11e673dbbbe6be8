"""What a backbone is: any network that maps an image to a pyramid of feature maps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from coverfast.checks import InputError, check_map, require, shape_of
from coverfast.geometry import check_stride


class Backbone(nn.Module, ABC):
    """Maps images `(B, in_channels, *S)` to feature maps, coarse to fine.

    Any number of levels from 2 on; every map has twice the size of the one before. `S` must be divisible by the
    coarsest stride.

    Attributes:
        ndim: 2 or 3 spatial axes.
        in_channels: channels of the image.
        feature_channels: channels of the L maps, coarse to fine.
        strides: pixels of the image per pixel of each map, coarse to fine, the same on every axis; the finest may be
            larger than 1.
    """

    ndim: int
    in_channels: int
    feature_channels: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def levels(self) -> int:
        """Number of feature maps."""
        return len(self.strides)

    @property
    def core(self) -> nn.Module:
        """The network whose weights travel, under its own names: this one, or the one that it adapts."""
        return self

    @property
    def modules_in_order(self) -> list[nn.Module]:
        """The stages from the image to the finest features; a network whose order is not known is one of them."""
        return [self]

    @property
    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What `coverfast.backbones.build` needs to make the network again, JSON-able."""

    def check_size(self, name: str, size: Sequence[int]) -> None:
        """Refuse a size of images, called `name`, that the network does not take."""
        check_stride(name, size, self.strides[0])

    def check_maps(self, size: Sequence[int]) -> None:
        """Refuse a network whose maps of an image of such a size are not of its strides."""

    def encode(self, x: Tensor) -> list[Tensor]:
        """Features whose last ones are the coarsest of `forward`, computed without a decoder where that can be."""
        return self(x)[:1]

    @abstractmethod
    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of an image, coarse to fine."""

    def check_image(self, x: Tensor) -> None:
        """Refuse what is no batch of images for this network, whatever their size."""
        ndim = check_map("image", x)
        if ndim != self.ndim or x.shape[1] != self.in_channels:
            raise InputError(
                f"image must be (B, {self.in_channels}, *S) with {self.ndim} spatial axes, got {shape_of(x)}"
            )


def title(description: Mapping[str, Any]) -> str:
    """What a description is called by, for people: `unet`, `timm:convnext_tiny`."""
    kind = str(description["kind"])
    return kind if kind == "unet" else f"{kind}:{description['name']}"


def check_levels(name: str, channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Refuse what is no pyramid of at least two levels, each twice the size of the one before."""
    doubling = len(strides) >= 2 and strides[-1] >= 1 and all(a == 2 * b for a, b in pairwise(strides))
    doubling = doubling and strides[-1] & (strides[-1] - 1) == 0
    require(
        doubling and len(channels) == len(strides),
        f"{name} must have at least 2 feature maps, coarse to fine, with a stride each that halves from map to map "
        f"down to a power of 2, and one number of channels for each, got strides {strides} and channels {channels}",
    )
