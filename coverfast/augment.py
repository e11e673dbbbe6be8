"""Augmentation for supervised training: an image and its label map through one random map, as views are made."""

from __future__ import annotations

import torch
from torch import Tensor

from coverfast.appearance import appearance
from coverfast.checks import InputError, check_map, shape_of
from coverfast.geometry import Size
from coverfast.ops.dispatch import choose
from coverfast.ops.warp import resample
from coverfast.view_plan import plan_views
from coverfast.view_settings import ViewSettings


def augment(
    images: Tensor,
    labels: Tensor | None,
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
) -> tuple[Tensor, Tensor | None]:
    """A random crop of each image after a random spatial map, with a new appearance, and of its label map.

    The draws, maps and kernels are those of `make_views`, see there for what is not said here: view b, with the
    appearance that view a would get.

    Args:
        images: `(B, C, *S)` floating in [0, 1].
        labels: `(B, *S)` classes of the pixels, any integer dtype; None for none.
        crop: size of the results.

    Returns:
        Images `(B, C, *crop)` float32, interpolated linearly, and labels `(B, *crop)`, each that of the nearest pixel:
        class 0, like intensity 0, beyond the image.
    """
    check_map("images", images)
    settings = settings or ViewSettings()
    if labels is not None and labels.shape != (len(images), *images.shape[2:]):
        raise InputError(f"labels must be {(len(images), *shape_of(images)[2:])} like images, got {shape_of(labels)}")
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        plan = plan_views(
            images,
            crop,
            seed=seed,
            iteration=iteration,
            samples=samples,
            sizes=sizes,
            corner=corner,
            focus=focus,
            settings=settings,
            pad=pad,
        )
        images = images.float()
        if choose("views", impl, images) == "triton":
            from coverfast.ops.views import fill_augmented

            out = images.new_empty(len(images), images.shape[1], *plan.crop)
            fill_augmented(out, images, *plan.for_kernels, boxes=settings.boxes, taps=plan.taps)
        else:
            out = appearance(resample(images, plan.into, impl=impl), plan, settings)
        if labels is None:
            return out, None
        return out, resample(labels.unsqueeze(1), plan.into, mode="nearest", impl=impl)[:, 0]
