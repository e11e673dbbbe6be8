"""A training step as published code of such methods does it: the baseline of `coverfast bench step`.

Written from the paper and the specification. Plain eager float32: affine fields of whole images in NumPy on the host,
sample by sample, then copied; images warped by `grid_sample`; one view through the network after the other; whole
feature maps warped before they are projected; a matching that keeps its products; losses of dense fields, read by the
host at every step; Adam as torch has it by default. It learns what coverfast learns: `coverfast.bench.step` checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.profiler import record_function

from coverfast.bench import baselines as eager
from coverfast.bench.pyramids import EAGER
from coverfast.methods.cover import Cover
from coverfast.training.settings import Settings
from coverfast.view_draws import draw
from coverfast.view_settings import ViewSettings

#: The formulations of the matching, see `coverfast.bench.baselines`.
MATCHING = dict(EAGER)


class Seen(NamedTuple):
    """Two views `(B, C, *S)`, the field from b into a `(B, n, *S)`, where it is inside `(B, 1, *S)`, 0 or 1."""

    x_a: Tensor
    x_b: Tensor
    psi: Tensor
    mask: Tensor


class UNet(nn.Module):
    """The U-Net of SPEC 7; parameters in the order of `coverfast.backbones.UNet`."""

    def __init__(self, ndim: int, in_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        levels = (len(channels) + 1) // 2
        encoder, decoder = channels[:levels], channels[levels:]
        self.pool = nn.MaxPool2d(2) if ndim == 2 else nn.MaxPool3d(2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear" if ndim == 2 else "trilinear")
        widths = [(in_channels, encoder[0]), *pairwise(encoder)]
        self.encoder = nn.ModuleList(_double(ndim, *pair) for pair in widths)
        joined = zip(channels[levels - 1 :], encoder[-2::-1], decoder, strict=False)
        self.decoder = nn.ModuleList(_double(ndim, below + skip, out) for below, skip, out in joined)

    def forward(self, x: Tensor) -> list[Tensor]:
        skips: list[Tensor] = []
        for stage in self.encoder:
            x = stage(self.pool(x) if skips else x)
            skips.append(x)
        maps = [skips.pop()]
        for stage in self.decoder:
            maps.append(stage(torch.cat([skips.pop(), self.up(maps[-1])], dim=1)))
        return maps


def _double(ndim: int, in_channels: int, out_channels: int) -> nn.Sequential:
    conv: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv2d if ndim == 2 else nn.Conv3d
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [conv(channels, out_channels, 3, padding=1), nn.GroupNorm(out_channels // 8, out_channels)]
        layers.append(nn.LeakyReLU(0.2, inplace=True))
    return nn.Sequential(*layers)


class Network(nn.Module):
    """Backbone and projections, with the weights of a method of coverfast."""

    def __init__(self, method: Cover, channels: Sequence[int], mov: Callable[..., Tensor]) -> None:
        super().__init__()
        pyramid = method.pyramid
        conv: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv2d if pyramid.ndim == 2 else nn.Conv3d
        self.backbone = UNet(pyramid.ndim, next(method.parameters()).shape[1], channels)
        widths = [(c, j * pyramid.head_dim) for c, j in zip(pyramid.channels, pyramid.groups, strict=True)]
        self.projections = nn.ModuleList(nn.Sequential(conv(c, d, 1), nn.GroupNorm(1, d)) for c, d in widths)
        self.windows, self.groups, self.mov = pyramid.windows, pyramid.groups, mov
        with torch.no_grad():
            for mine, theirs in zip(self.parameters(), method.parameters(), strict=True):
                mine.copy_(theirs)

    def forward(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Vector loss and consistency loss."""
        with record_function("backbone"):
            maps_a, maps_b = self.backbone(seen.x_a), self.backbone(seen.x_b)
        with record_function("pyramid"):
            psi = self._field(maps_a, maps_b)
        with record_function("losses"):
            vec = eager.vector_eager(psi, seen.psi, seen.mask)
            return vec, eager.consistency_eager(maps_a[-1], maps_b[-1], seen.psi, seen.mask)

    def _field(self, maps_a: list[Tensor], maps_b: list[Tensor]) -> Tensor:
        psi: Tensor | None = None
        for a, b, project, window, groups in zip(
            maps_a, maps_b, self.projections, self.windows, self.groups, strict=True
        ):
            warped = a if psi is None else eager.warp_up_eager(a, psi)
            found = self.mov(project(b), project(warped), window=window, groups=groups)
            psi = found if psi is None else eager.compose_eager(found, psi)
        assert psi is not None
        return psi


def make_views(
    images: Sequence[NDArray[np.generic]],
    ranges: Sequence[tuple[float, float]],
    crop: Sequence[int],
    settings: ViewSettings,
    *,
    seed: int,
    iteration: int,
    device: torch.device,
) -> Seen:
    """Views of whole stored images `(C, *S)` whose `ranges` (lo, hi) become 0 and 1, sample by sample.

    With the draws of `coverfast.make_views`, so that both have the same to do; the noise is another. A blur as narrow
    as that of the presets changes nothing and is left out.
    """
    made = []
    for sample, (image, (lo, hi)) in enumerate(zip(images, ranges, strict=True)):
        size = np.array(image.shape[1:])
        found = draw(seed, iteration, np.array([sample]), size[None], crop, settings)
        grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij")).astype(np.float32)
        centre = ((size - 1) / 2).astype(np.float32).reshape(-1, *[1] * len(size))
        theta = found.theta[0].astype(np.float32)
        turned = (theta[:, :-1] @ (grid - centre).reshape(len(size), -1)).reshape(grid.shape)
        field = torch.from_numpy(turned + theta[:, -1].reshape(centre.shape) + centre - grid)[None].to(device)
        scaled = np.clip((image.astype(np.float32) - lo) / (hi - lo), 0, 1)
        x = torch.from_numpy(scaled)[None].to(device)
        warped = eager.warp_eager(x, field)
        here: Any = (..., *(slice(o, o + c) for o, c in zip(found.origin[0].tolist(), crop, strict=True)))
        x_a, x_b, psi = (v[here].contiguous() for v in (x, warped, field))
        x_a = x_a + float(found.noise[0]) * torch.randn_like(x_a)
        x_a = x_a + float(found.contrast[0]) * (x_a - x_a.mean()) + float(found.brightness[0])
        for box in found.boxes[0].tolist():
            here = (..., *(slice(a, b) for a, b in box))
            filled = x_a[here]
            filled.copy_(torch.rand_like(filled))
        made.append(Seen(x_a, x_b, psi, _inside(psi)))
    return Seen(*(torch.cat(parts) for parts in zip(*made, strict=True)))


def _inside(psi: Tensor) -> Tensor:
    mask = torch.ones_like(psi[:, :1])
    for axis, size in enumerate(psi.shape[2:]):
        shape = [-1 if i == axis else 1 for i in range(psi.shape[1])]
        at = psi[:, axis : axis + 1] + torch.arange(size, device=psi.device, dtype=psi.dtype).reshape(shape)
        mask = mask * ((at >= 0) & (at <= size - 1)).to(psi.dtype)
    return mask


class Published:
    """The loop's body and what it needs."""

    def __init__(self, method: Cover, s: Settings, device: torch.device, matching: str) -> None:
        self.network = Network(method, s.unet_channels(), MATCHING[matching]).to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=s.lr)
        self.clip = s.clip

    def step(self, seen: Seen) -> tuple[float, float, float]:
        """The losses of one training step: both, vector, consistency."""
        self.optimizer.zero_grad()
        vec, con = self.network(seen)
        loss = vec + con
        loss.backward()
        with record_function("optimiser"):
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
            self.optimizer.step()
        return loss.item(), vec.item(), con.item()
