"""GVSL: geometric visual similarity learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from coverfast.backbones.base import Backbone
from coverfast.backbones.unet import CONV, UPSAMPLE, conv_group
from coverfast.checks import require
from coverfast.distortions import DistortionSettings, distort
from coverfast.geometry import Size
from coverfast.methods import Batch, Outcome, Pretext, Shown, evaluating
from coverfast.ops.mov import accumulation_dtype
from coverfast.ops.ncc import ncc_loss
from coverfast.ops.warp import warp
from coverfast.regularity import jacobian_determinant, smoothness
from coverfast.z_matching import Matched, ZMatching


class Pair(NamedTuple):
    """Two images and what the network sees of them.

    seen: `(2 B, C, *S)`, all A with another appearance, then all B as they are. fixed: `(B, C, *S)`, A as it is.
    """

    seen: Tensor
    fixed: Tensor

    @property
    def moving(self) -> Tensor:
        """B, `(B, C, *S)`."""
        return self.seen[len(self.fixed) :]


class Matching(NamedTuple):
    """What becomes of a pair: see `Matched`; B brought over, A restored, the finest features of both."""

    matched: Matched
    moved: Tensor
    restored: Tensor
    fine: Tensor


class GVSL(Pretext):
    """Match two different images by an affine and a deformable map (GVSL; A fixed, B brought over, SPEC 9).

    What is minimised: 1 - local NCC of A and B brought over, the smoothness of the fused field (Eq. 1 and 2), and the
    mean squared error of A restored from its distorted form (Sec. 3.3).

    Args:
        backbone: its coarsest features are the global ones of the paper, its finest the local ones.
        crop: see `Pretext`; both images of a pair are cut at the same place, relative to their sizes.
        pad, impl: see `Pretext`.
        window: of the local NCC, odd; pixels.
        smooth: weight of the smoothness.
        restore: weight of the restoration.
        bezier, shuffle, inpaint: probabilities of the changes of A's appearance, see `DistortionSettings`.
    """

    pairs = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        crop: Size,
        pad: bool = False,
        impl: str = "auto",
        window: int = 9,
        smooth: float = 1.0,
        restore: float = 1.0,
        bezier: float = DistortionSettings.bezier,
        shuffle: float = DistortionSettings.shuffle,
        inpaint: float = DistortionSettings.inpaint,
    ) -> None:
        super().__init__(backbone, crop=crop, pad=pad, impl=impl)
        require(
            isinstance(window, int) and window >= 3 and window % 2 == 1,
            f"window must be an odd int of at least 3, got {window!r}",
        )
        for name, weight in (("smooth", smooth), ("restore", restore)):
            number = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight < float("inf")
            require(number, f"{name} must be a weight of at least 0, got {weight!r}")
        self.window, self.smooth, self.restore = window, float(smooth), float(restore)
        self.distortion = DistortionSettings(bezier=bezier, shuffle=shuffle, inpaint=inpaint)
        ndim, coarse, fine = backbone.ndim, backbone.feature_channels[0], backbone.feature_channels[-1]
        #: Doublings from the finest features to the image.
        self.doublings = backbone.strides[-1].bit_length() - 1
        self.matching = ZMatching(ndim, coarse, fine, doublings=self.doublings, impl=impl)
        width = -(-fine // 8) * 8
        self.restoration = nn.Sequential(
            *conv_group(ndim, fine, width), CONV[ndim](width, backbone.in_channels, 3, padding=1)
        )

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Pair:
        """Cut the images and change the appearance of A."""
        crops = self.crops(batch)
        require(len(crops) % 2 == 0, f"a batch must hold pairs of images, got {len(crops)}")
        fixed, moving = crops[::2].contiguous(), crops[1::2]
        drawn: dict[str, Any] = {"seed": batch.seed, "iteration": batch.iteration, "samples": batch.samples[::2]}
        return Pair(torch.cat([distort(fixed, **drawn, settings=self.distortion), moving]), fixed)

    def count(self, pair: Pair) -> Tensor:
        """Pixels of the fixed images."""
        return torch.full((), float(pair.fixed[:, 0].numel()), dtype=torch.float64, device=pair.fixed.device)

    def match(self, pair: Pair) -> Matching:
        """Bring B over to A and restore A."""
        # Nothing in the U-Net mixes samples, so both images pass as one batch; batch norms would see both alike.
        features = self.backbone(pair.seen)
        coarse, fine = features[0].chunk(2), features[-1].chunk(2)
        matched = self.matching(*coarse, *fine)
        restored = self.restoration(fine[0])
        restored = restored.to(accumulation_dtype(restored))
        if self.doublings:
            mode = UPSAMPLE[restored.ndim - 2]
            restored = F.interpolate(restored, size=pair.fixed.shape[2:], mode=mode, align_corners=False)
        # Zeros beyond the border would be an edge in a crop from inside an image, and push the map away from it.
        moved = warp(pair.moving, matched.dvf, padding="border", impl=self.impl)
        return Matching(matched, moved, restored, features[-1])

    def forward(self, pair: Pair, denominator: Tensor | None = None) -> Outcome:
        """The loss, and sums over pixels, see `figures`."""
        found, channels = self.match(pair), pair.fixed.shape[1]
        pixels = pair.fixed[:, 0].numel()
        over = self.count(pair) if denominator is None else denominator

        def dissimilarity(image: Tensor) -> Tensor:
            return ncc_loss(pair.fixed, image, self.window, denominator=over * channels, impl=self.impl)

        ncc = dissimilarity(found.moved)
        smooth = smoothness(found.matched.dvf, denominator=over)
        restore = (found.restored - pair.fixed).square().sum() / (over * channels).float()
        with torch.no_grad():
            means = {"ncc": ncc, "smooth": smooth, "restore": restore, "before": dissimilarity(pair.moving)}
            sums = {name: mean.detach().double() * over for name, mean in means.items()}
            sums["count"] = torch.full_like(over, pixels)
        seen = (found.matched.dvf.detach(), found.fine.detach())
        return Outcome(ncc + self.smooth * smooth + self.restore * restore, sums, seen)

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`loss`; `loss_ncc`, `loss_smooth`, `loss_restore`; `ncc` and `ncc_before`.

        `ncc` is the mean squared local NCC of A and B brought over, `ncc_before` that of both as they are.
        """
        count = max(1.0, sums["count"])
        ncc, smooth, restore, before = (sums[name] / count for name in ("ncc", "smooth", "restore", "before"))
        return {
            "loss": ncc + self.smooth * smooth + self.restore * restore,
            "loss_ncc": ncc,
            "loss_smooth": smooth,
            "loss_restore": restore,
            "ncc": 1 - ncc,
            "ncc_before": 1 - before,
        }

    @torch.no_grad()
    def monitor(self, pair: Pair, seen: Any, iteration: int) -> dict[str, Tensor]:
        """How far the field displaces and how much of it is folded; features at some pixels and beside them."""
        from coverfast.methods.sampling import beside, some_pixels

        dvf, features = seen
        fine = features[: len(features) // 2].movedim(1, -1)
        at = some_pixels(iteration, fine)
        return {
            "displacement": torch.linalg.vector_norm(dvf, dim=1).mean(dtype=torch.float64),
            "folded": (jacobian_determinant(dvf) <= 0).double().mean(),
            "samples": fine[at].float(),
            "neighbours": fine[beside(at, fine.shape[1:-1])].float(),
        }

    def monitored(self, found: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """`displacement`, mean length in pixels; `folded`, share of the pixels; `dispersion` of A's finest features."""
        from coverfast.dispersion import dispersion

        figures = {name: float(found[name]) for name in ("displacement", "folded")}
        return figures | dispersion(found["samples"], found["neighbours"])

    @torch.no_grad()
    def pictures(self, batch: Batch) -> Shown:
        """The first pair of a batch: both images, what becomes of them, the field."""
        pair = self.prepare(batch.first(2))
        with evaluating(self):
            found = self.match(pair)
        with torch.autocast(batch.images.device.type, enabled=False):
            before, after = (
                1 - float(ncc_loss(pair.fixed, x, self.window, impl=self.impl)) for x in (pair.moving, found.moved)
            )
        a, b, moved = pair.fixed[0], pair.moving[0], found.moved[0]
        return Shown(
            images={
                "A": a,
                "A distorted, as the network sees it": pair.seen[0],
                "A restored": found.restored[0].clamp(0, 1),
                "B": b,
                "B brought over to A": moved,
            },
            overlays={"before matching": (a, b), "after matching": (a, moved)},
            fields={"where A's pixels come from in B": found.matched.dvf[0]},
            text=f"Local NCC of this pair: {after:.3f} after matching, {before:.3f} before.",
            help="Two different images, and what brings B over to A: an affine map and a deformation, fused into one "
            "field. The overlay after matching should show fewer coloured fringes than the one before. A restored from "
            "its distorted form should look like A, if smoother.",
        )

    def work(self, batch: int) -> None:
        """See `Pretext`: the backbone on both images, and the convolutions of the heads."""
        fine = self.features_of(2 * batch)[-1][:batch]
        self.matching.deformable(fine, fine)
        self.restoration(fine)
