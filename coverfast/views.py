"""Self-vector regression (SeVR): from one image two views, and the displacement field that relates them.

View a is a crop of the image with a new appearance; view b is the same crop of the image after a random affine map.
Scalar parameters are drawn on the CPU (`coverfast.view_draws`), dense noise on the images' device; both are functions
of (seed, iteration, position in the global batch), see `coverfast.philox`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coverfast.appearance import appearance
from coverfast.checks import check_map
from coverfast.crops import cut
from coverfast.geometry import AffineDVF, Size, as_dvf, inside_mask, positions
from coverfast.ops.dispatch import choose
from coverfast.ops.losses import Mask
from coverfast.ops.warp import resample
from coverfast.view_plan import Plan, plan_views, shift
from coverfast.view_settings import ViewSettings


@dataclass(frozen=True, eq=False)
class Views:
    """Two views of each image of a batch and their ground truth.

    Attributes:
        pair: `(2 B, C, *S)` float32, all views a, then all views b: one batch for a backbone.
        target: the field from b into a, `x_b(p) = x(p + psi(p))`; its numbers, or a tensor with an elastic part.
        shown: pixels of b that view a shows too: "inside" where the field alone says so, otherwise bool `(B, 1, *S)`.
    """

    pair: Tensor
    target: Tensor | AffineDVF
    shown: Mask

    @property
    def x_a(self) -> Tensor:
        """`(B, C, *S)`, the crop with a new appearance."""
        return self.pair[: len(self.pair) // 2]

    @property
    def x_b(self) -> Tensor:
        """`(B, C, *S)`, the same crop of the spatially transformed image."""
        return self.pair[len(self.pair) // 2 :]

    @property
    def dvf(self) -> Tensor:
        """The ground-truth field, `(B, n, *S)`."""
        return as_dvf(self.target)

    @property
    def mask(self) -> Tensor:
        """`shown` as a tensor, `(B, 1, *S)` bool."""
        return self.shown if isinstance(self.shown, Tensor) else inside_mask(self.target)


def make_views(
    images: Tensor,
    crop: Size,
    *,
    seed: int,
    iteration: int,
    samples: Tensor | None = None,
    sizes: Tensor | None = None,
    corner: Tensor | None = None,
    focus: Tensor | None = None,
    settings: ViewSettings | None = None,
    pad: bool = False,
    impl: str = "auto",
) -> Views:
    """Draw two views of each image.

    Args:
        images: `(B, C, *S)` floating in [0, 1], on the device the views are made on. Images smaller than the batch
            are zero-filled at the high end of each axis.
        crop: size of the views, an int or one per axis.
        seed: 64-bit key of the random numbers.
        iteration: training iteration, the counter's first coordinate.
        samples: `(B,)` position of each image in the global batch, on the CPU; default `0 .. B-1`.
        sizes: `(B, n)` true size of each image, on the CPU; default the size of `images`.
        corner: `(B, n)` first pixel of what `images` holds of each image, on the CPU; default 0. The part must be what
            `ViewRegions` asks for; the views are those of the whole image.
        focus: `(B, n)` pixel of each whole image that its crop is centred on, as far as it fits, on the CPU; -1, the
            default, for a random crop.
        settings: ranges of the transforms.
        pad: allow crops larger than an image: it is placed at random inside a zero crop, and the mask is off where
            either end of a displacement lies in the padding.
        impl: "auto", "triton" or "torch"; "reference" warps by the definition.

    Returns:
        `Views`; the same whatever the split of the batch, and on every device and in every `impl` to rounding.
    """
    check_map("images", images)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        given = settings or ViewSettings()
        plan = plan_views(
            images,
            crop,
            seed=seed,
            iteration=iteration,
            samples=samples,
            sizes=sizes,
            corner=corner,
            focus=focus,
            settings=given,
            pad=pad,
        )
        return _make_views(images, plan, given, impl)


def _make_views(images: Tensor, plan: Plan, settings: ViewSettings, impl: str) -> Views:
    chosen = choose("views", impl, images)
    images = images.float()
    shown: Mask = "inside"
    if plan.padded:
        dvf = as_dvf(plan.target)
        moved = shift(torch.from_numpy(plan.draws.origin), dvf)
        inside = _in_image(torch.zeros_like(dvf) + moved, plan.sizes) & _in_image(dvf + moved, plan.sizes)
        shown = inside_mask(dvf) & inside
    pair = images.new_empty(2 * len(images), images.shape[1], *plan.crop)
    views = Views(pair, plan.target, shown)
    if chosen == "triton":
        from coverfast.ops.views import fill_pair

        fill_pair(pair, images, *plan.for_kernels, boxes=settings.boxes, taps=plan.taps)
    else:
        views.x_a.copy_(appearance(cut(images, plan.cut, plan.crop), plan, settings))
        views.x_b.copy_(resample(images, plan.into, impl=chosen))
    return views


def _in_image(dvf: Tensor, sizes: Tensor) -> Tensor:
    """Where positions lie inside each sample's true image, `(B, 1, *S)` bool."""
    inside = torch.ones_like(dvf[:, 0], dtype=torch.bool)
    for axis, position in enumerate(positions(dvf)):
        last = (sizes[:, axis] - 1).to(dvf).reshape(-1, *[1] * (dvf.ndim - 2))
        inside = inside & (position >= 0) & (position <= last)
    return inside.unsqueeze(1)
