"""COVER: contrast in vector regression."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coverfast.checks import check_choice, per_axis
from coverfast.geometry import Size, upsample_dvf
from coverfast.methods import Batch, Method
from coverfast.ops.dispatch import IMPLEMENTATIONS
from coverfast.ops.losses import consistency_loss, field_errors
from coverfast.ops.warp import warp
from coverfast.pyramid import VectorPyramid
from coverfast.view_draws import ViewRegions
from coverfast.view_settings import ViewSettings
from coverfast.views import Views, make_views


class Matched(NamedTuple):
    """Two views and what the network makes of them: the fields of all levels, coarse to fine."""

    views: Views
    levels: list[Tensor]
    feat_a: Tensor
    feat_b: Tensor


class Cover(Method):
    """Vector contrastive learning: recover the field between two views of each image (COVER Sec. 3).

    Args:
        backbone: maps `(B, C, *S)` to feature maps, coarse to fine.
        pyramid: predicts the field from the maps of both views.
        crop: size of the views.
        settings: ranges of the view transforms.
        pad: see `make_views`.
        impl: implementation of the losses, see `mov`; the pyramid has its own.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pyramid: VectorPyramid,
        *,
        crop: Size,
        settings: ViewSettings | None = None,
        pad: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("impl", impl, IMPLEMENTATIONS)
        self.backbone, self.pyramid = backbone, pyramid
        self.crop, self.settings, self.pad, self.impl = crop, settings or ViewSettings(), pad, impl
        self.regions = ViewRegions(per_axis("crop", crop, pyramid.ndim), self.settings)

    def match(self, batch: Batch) -> Matched:
        """Draw the views and predict the field between them."""
        with torch.no_grad():
            views = make_views(
                batch.images,
                self.crop,
                seed=batch.seed,
                iteration=batch.iteration,
                samples=batch.samples,
                sizes=batch.sizes,
                corner=batch.corner,
                settings=self.settings,
                pad=self.pad,
                impl=self.impl,
            )
        # Nothing in the backbone mixes samples, so both views pass as one batch.
        features = self.backbone(views.pair)
        levels = self.pyramid(features, return_levels=True)
        assert isinstance(levels, list)
        feat_a, feat_b = features[-1].chunk(2)
        return Matched(views, levels, feat_a, feat_b)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses and figures of merit of a batch.

        `loss`, `loss_vec`, `loss_con`; `epe` in pixels; `epe_ratio`, the end-point error over that of no displacement
        (NaN when no pixel of view b is in view a); `mask`, the share of pixels that are.
        """
        views, levels, feat_a, feat_b = self.match(batch)
        found = field_errors(levels[-1], views.target, views.shown, impl=self.impl)
        loss_con = consistency_loss(feat_a, feat_b, views.target, views.shown, impl=self.impl)
        return {
            "loss": found.l1 + loss_con,
            "loss_vec": found.l1,
            "loss_con": loss_con,
            "epe": found.epe,
            "epe_ratio": torch.where(found.mask > 0, found.epe / found.still.clamp(min=1e-6), torch.nan),
            "mask": found.mask.float(),
        }

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """`epe`, `epe_ratio` and `mask` as in `forward`, over the pixels of all batches together."""
        epe = still = inside = pixels = 0.0
        for batch in batches:
            views, levels, _, _ = self.match(batch)
            found = field_errors(levels[-1], views.target, views.shown, impl=self.impl)
            here = levels[-1][:, 0].numel()
            count = round(float(found.mask) * here)
            epe += count * float(found.epe)
            still += count * float(found.still)
            inside, pixels = inside + count, pixels + here
        ratio = epe / max(still, 1e-6 * inside) if inside else float("nan")
        return {"epe": epe / max(1.0, inside), "epe_ratio": ratio, "mask": inside / max(1.0, pixels)}

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor | list[Tensor]]:
        """What there is to see of the first sample, without the batch axis: the fields of `report.Pictures`."""
        views, levels, _, _ = self.match(batch)
        warped = []
        for level, field in enumerate(levels):
            for _ in range(len(levels) - 1 - level):
                field = upsample_dvf(field, [2 * s for s in field.shape[2:]])
            warped.append(warp(views.x_a, field, impl=self.impl)[0])
        return {
            "x_a": views.x_a[0],
            "x_b": views.x_b[0],
            "dvf_true": views.dvf[0],
            "mask": views.mask[0],
            "dvf_levels": [field[0] for field in levels],
            "warped": warped,
        }
