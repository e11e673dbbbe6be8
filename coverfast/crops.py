"""Crops of images as they are: what methods see that make no two views of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coverfast.checks import check_map
from coverfast.geometry import Size
from coverfast.view_draws import ViewRegions
from coverfast.view_plan import plan_views
from coverfast.view_settings import ViewSettings

#: No map and no new appearance.
STILL = ViewSettings(strength=0, noise=0, blur=0, contrast=0, brightness=0, boxes=0)


@dataclass(frozen=True)
class CropRegions:
    """Which part of each image `crop_images` looks at.

    crop: one size per axis. pairs: images 2i and 2i + 1 are cut at the same place, relative to their sizes.
    """

    crop: tuple[int, ...]
    pairs: bool = False

    def __call__(
        self,
        seed: int,
        iteration: int,
        samples: NDArray[np.int64],
        sizes: NDArray[np.int64],
        focus: NDArray[np.int64] | None = None,
    ) -> NDArray[np.int64]:
        """See `ViewRegions`."""
        items = samples // 2 if self.pairs else samples
        return ViewRegions(self.crop, STILL)(seed, iteration, items, sizes, focus)


def crop_images(
    images: Tensor,
    crop: Size,
    *,
    seed: int,
    iteration: int,
    samples: Tensor | None = None,
    sizes: Tensor | None = None,
    corner: Tensor | None = None,
    focus: Tensor | None = None,
    pad: bool = False,
    pairs: bool = False,
) -> Tensor:
    """A random crop of each image, as it is; arguments as in `make_views`.

    Args:
        images: `(B, C, *S)` floating; what `CropRegions` asks for of each.
        crop: size of the results.
        pad: allow crops larger than an image, which is then placed at random among zeros.
        pairs: see `CropRegions`.

    Returns:
        `(B, C, *crop)` float32.
    """
    check_map("images", images)
    samples = torch.arange(len(images)) if samples is None else samples.cpu()
    with torch.no_grad():
        plan = plan_views(
            images,
            crop,
            seed=seed,
            iteration=iteration,
            samples=samples // 2 if pairs else samples,
            sizes=sizes,
            corner=corner,
            focus=focus,
            settings=STILL,
            pad=pad,
        )
        return cut(images.float(), plan.cut, plan.crop)


def cut(images: Tensor, origin: Tensor, crop: Sequence[int]) -> Tensor:
    """Crop each image at its origin `(B, n)`; what lies outside the image is zero."""
    out = images.new_zeros(*images.shape[:2], *crop)
    for x, y, start in zip(images, out, origin.tolist(), strict=True):
        low = [max(0, o) for o in start]
        high = [min(s, o + c) for s, o, c in zip(x.shape[1:], start, crop, strict=True)]
        here = (..., *(slice(a - o, b - o) for a, b, o in zip(low, high, start, strict=True)))
        y[here] = x[(..., *(slice(a, b) for a, b in zip(low, high, strict=True)))]
    return out
