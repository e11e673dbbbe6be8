"""COVER: contrast in vector regression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from coverfast.checks import per_axis
from coverfast.geometry import Size, downsample_dvf, inside_mask, upsample_dvf
from coverfast.methods import Batch, Outcome, Pretext
from coverfast.ops.losses import consistency_loss, field_errors
from coverfast.pyramid import VectorPyramid
from coverfast.view_draws import ViewRegions
from coverfast.view_settings import ViewSettings
from coverfast.views import Views, make_views


class Matched(NamedTuple):
    """Two views and what the network makes of them.

    levels: the fields of all levels, coarse to fine. features: the backbone's maps, coarse to fine, `(2 B, C_l, *S_l)`,
    all of view a before all of view b.
    """

    views: Views
    levels: list[Tensor]
    features: list[Tensor]


class Cover(Pretext):
    """Vector contrastive learning: recover the field between two views of each image (COVER Sec. 3).

    Args:
        backbone: maps `(B, C, *S)` to feature maps, coarse to fine. Where the finest is not of the image's size it
            says so by `strides`, as a `coverfast.backbones.Backbone` does: its field is then up-sampled to the image
            (`upsample_dvf`), and the consistency of the features is that of their own grid, on which the true field is
            the mean over the pixels that each covers (SPEC 6).
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
        super().__init__(backbone, crop=per_axis("crop", crop, pyramid.ndim), pad=pad, impl=impl)
        self.pyramid, self.settings = pyramid, settings or ViewSettings()
        #: Doublings from the finest features to the image.
        self.doublings = int(getattr(backbone, "strides", (1,))[-1]).bit_length() - 1
        self.regions = ViewRegions(self.crop, self.settings)

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Views:
        """Draw the views."""
        return make_views(
            batch.images,
            self.crop,
            **batch.keys,
            settings=self.settings,
            pad=self.pad,
            impl=self.impl,
        )

    def count(self, views: Views) -> Tensor:
        """Pixels that both views show, `sum_p eps(p)`; `(2,)` with those of the finest features if fewer."""
        shown = views.shown if isinstance(views.shown, Tensor) else inside_mask(views.target)
        count = shown.sum(dtype=torch.float64)
        if not self.doublings:
            return count
        return torch.stack([count, self.truth(views)[1].sum(dtype=torch.float64)])

    def truth(self, views: Views) -> tuple[Tensor, Tensor]:
        """The true field on the grid of the finest features, in its pixels, and which of these count."""
        field = views.dvf
        shown = views.shown if isinstance(views.shown, Tensor) else inside_mask(field)
        for _ in range(self.doublings):
            field, shown = downsample_dvf(field, shown)
        return field, shown

    def at_image_size(self, field: Tensor) -> Tensor:
        """The field of the finest level in pixels of the image."""
        for _ in range(self.doublings):
            field = upsample_dvf(field, [2 * s for s in field.shape[2:]])
        return field

    def match(self, views: Views) -> Matched:
        """Predict the field between the views."""
        # Nothing in the backbone mixes samples, so both views pass as one batch.
        features = self.backbone(views.pair)
        levels = self.pyramid(features, return_levels=True)
        assert isinstance(levels, list)
        return Matched(views, levels, list(features))

    def forward(self, views: Views, denominator: Tensor | None = None) -> Outcome:
        """The loss, and sums over the pixels that both views show, see `figures`."""
        matched = self.match(views)
        compared: Tensor | None = None
        if denominator is not None:
            denominator = denominator.clamp(min=1)
            if self.doublings:
                denominator, compared = denominator.unbind()
        field, (feat_a, feat_b) = self.at_image_size(matched.levels[-1]), matched.features[-1].chunk(2)
        found = field_errors(field, views.target, views.shown, denominator=denominator, impl=self.impl)
        truth, shown = self.truth(views) if self.doublings else (views.target, views.shown)
        over_con = compared if self.doublings else denominator
        con = consistency_loss(feat_a, feat_b, truth, shown, denominator=over_con, impl=self.impl)
        with torch.no_grad():
            pixels = field[:, 0].numel()
            count = (found.mask * pixels).round()
            over = count.clamp(min=1) if denominator is None else denominator
            of_features = shown.sum(dtype=torch.float64) if isinstance(shown, Tensor) and self.doublings else count
            over_con = of_features.clamp(min=1) if over_con is None else over_con
            sums = {
                "l1": found.l1.double() * over,
                "l2": found.epe.double() * count,
                "still": found.still.double() * count,
                "cosine": (1 - con.double()) * over_con,
                "count": count,
                "compared": of_features,
                "pixels": torch.full_like(count, pixels),
            }
        seen = ([x.detach() for x in matched.levels], [x.detach() for x in matched.features])
        return Outcome(found.l1 + con, {name: value.detach() for name, value in sums.items()}, seen)

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`loss`, `loss_vec`, `loss_con`; `epe` in pixels; `epe_ratio`; `mask`.

        `epe_ratio` is the end-point error over that of no displacement, NaN when no pixel of view b is in view a;
        `mask` the share of pixels that are (SPEC 6).
        """
        count = max(1.0, sums["count"])
        vec, con = sums["l1"] / count, 1 - sums["cosine"] / max(1.0, sums["compared"])
        ratio = sums["l2"] / max(sums["still"], 1e-6 * count) if sums["count"] else float("nan")
        return {
            "loss": vec + con,
            "loss_vec": vec,
            "loss_con": con,
            "epe": sums["l2"] / count,
            "epe_ratio": ratio,
            "mask": sums["count"] / max(1.0, sums["pixels"]),
        }

    def work(self, batch: int) -> None:
        """See `Pretext`: the backbone on both views of each image, and the pyramid's projections."""
        for project, level in zip(self.pyramid.projections, self.features_of(2 * batch), strict=True):
            project.linear(level)  # type: ignore[operator]

    @torch.no_grad()
    def monitor(self, views: Views, seen: Any, iteration: int) -> dict[str, Tensor]:
        """See `coverfast.methods.cover_monitor`."""
        from coverfast.methods import cover_monitor

        return cover_monitor.look(self, Matched(views, *seen), iteration)

    def monitored(self, found: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """See `coverfast.methods.cover_monitor`."""
        from coverfast.methods import cover_monitor

        return cover_monitor.figures(found)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Any]:
        """See `coverfast.methods.cover_pictures`."""
        from coverfast.methods import cover_pictures

        return cover_pictures.pictures(self, batch)
