"""The Z-matching head: from the features of two images the map that brings one over to the other (GVSL Sec. 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from coverfast.affine import ROTATION, SCALING, SHEAR, TRANSLATION, bounded, compose_affine, rotations
from coverfast.backbones.unet import CONV, DoubleConv
from coverfast.geometry import affine_dvf, axis_coordinates, upsample_dvf
from coverfast.ops.fuse import fuse_affine
from coverfast.ops.mov import accumulation_dtype
from coverfast.ops.warp import warp


class Matched(NamedTuple):
    """How image B is brought over to image A.

    theta: `(B, n, n + 1)` affine map in pixels of the image. local: `(B, n, *S)` deformation on A's grid. dvf: both
    fused, `(B, n, *S)`: `x_BA(p) = x_B(p + dvf(p))`. All float32.
    """

    theta: Tensor
    local: Tensor
    dvf: Tensor


class AffineHead(nn.Module):
    """Rotation, scaling, shearing and translation from the coarsest features of two images (GVSL Sec. 3.2.1).

    Four linear layers, as in the paper (Fig. 12 b), on what says where features lie in the image whatever its size:
    their means and the means of their products with each coordinate, which runs from -1 to 1. All starts at the
    identity, and stays within the bounds of `coverfast.affine`.

    Args:
        ndim: 2 or 3 spatial axes.
        channels: of the features of one image.
    """

    def __init__(self, ndim: int, channels: int) -> None:
        super().__init__()
        self.ndim = ndim
        counts = {"rotation": rotations(ndim), "scaling": ndim, "shear": ndim * (ndim - 1), "translation": ndim}
        self.layers = nn.ModuleDict({k: nn.Linear(2 * (1 + ndim) * channels, count) for k, count in counts.items()})
        for layer in self.layers.values():
            for weight in layer.parameters():
                nn.init.zeros_(weight)

    def forward(self, a: Tensor, b: Tensor, size: torch.Size) -> Tensor:
        """`theta` of a map on images of `size` from features `(B, C, *S_0)` of A and B, see `Matched`."""
        with torch.autocast(a.device.type, enabled=False):
            of_a, of_b = (_moments(x.to(accumulation_dtype(x))) for x in (a, b))
            # Difference and sum say what both say side by side. What the images share is large and tells little of how
            # they differ: unscaled, every step of Adam along it would shake the map.
            seen = torch.cat([of_a - of_b, 0.1 * (of_a + of_b)], 1)
            raw = {name: layer(seen) for name, layer in self.layers.items()}
            # Multiplied on the device one by one: a copy of the sizes would have to be waited for.
            shift = bounded(raw["translation"], TRANSLATION)
            shift = torch.stack([shift[:, i] * float(s) for i, s in enumerate(size)], 1)
            return compose_affine(
                bounded(raw["rotation"], ROTATION),
                1 + bounded(raw["scaling"], SCALING),
                bounded(raw["shear"], SHEAR),
                shift,
            )


def _moments(x: Tensor) -> Tensor:
    """Means over the grid of the channels and of their products with each coordinate, `(B, (1 + n) C)`."""
    size = x.shape[2:]
    found = [x.flatten(2).mean(2)]
    for axis, (p, s) in enumerate(zip(axis_coordinates(size, x), size, strict=True)):
        along = x.mean([2 + i for i in range(len(size)) if i != axis])
        found.append((along * ((2 * p.flatten() + 1) / s - 1)).mean(2))
    return torch.cat(found, 1)


class DeformableHead(nn.Module):
    """A displacement field from the finest features of A and the aligned ones of B (GVSL Sec. 3.2.2).

    Two convolution groups and a convolution, which starts at zero.

    Args:
        ndim: 2 or 3 spatial axes.
        channels: of the features of one image.
    """

    def __init__(self, ndim: int, channels: int) -> None:
        super().__init__()
        width = -(-channels // 8) * 8
        self.groups = DoubleConv(ndim, 2 * channels, width)
        self.field = CONV[ndim](width, ndim, 3, padding=1)
        for weight in self.field.parameters():
            nn.init.zeros_(weight)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """`(B, n, *S)` float32 in pixels of the features' grid."""
        field: Tensor = self.field(self.groups(torch.cat([a, b], 1)))
        return field.to(accumulation_dtype(field))


class ZMatching(nn.Module):
    """Affine and deformable matching, one after the other, fused into one field.

    Args:
        ndim: 2 or 3 spatial axes.
        coarse: channels of the coarsest features, seen by the affine head.
        fine: channels of the finest features, seen by the deformable head.
        doublings: from the grid of the finest features to the image.
        impl: implementation of the ops, see `coverfast.mov`.
    """

    def __init__(self, ndim: int, coarse: int, fine: int, *, doublings: int = 0, impl: str = "auto") -> None:
        super().__init__()
        self.affine, self.deformable = AffineHead(ndim, coarse), DeformableHead(ndim, fine)
        self.doublings, self.impl = doublings, impl

    def forward(self, coarse_a: Tensor, coarse_b: Tensor, fine_a: Tensor, fine_b: Tensor) -> Matched:
        """Match images by their features, coarsest `(B, C_0, *S_0)` and finest `(B, C, *S)`.

        B's finest features pass through the affine map before the deformable head sees them (SPEC 9).
        """
        stride, grid = 2**self.doublings, fine_a.shape[2:]
        theta = self.affine(coarse_a, coarse_b, torch.Size([s * stride for s in grid]))
        # The centre of a coarser grid is that of the image, a displacement fewer of its pixels.
        on_grid = theta if stride == 1 else torch.cat([theta[..., :-1], theta[..., -1:] / stride], 2)
        aligned = warp(fine_b, affine_dvf(on_grid, grid), padding="border", impl=self.impl)
        local = self.deformable(fine_a, aligned)
        for _ in range(self.doublings):
            local = upsample_dvf(local, [2 * s for s in local.shape[2:]])
        return Matched(theta, local, fuse_affine(local, theta, impl=self.impl))
