"""Segmentation and classification as methods of the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coverfast.augment import augment
from coverfast.backbones import Backbone
from coverfast.checks import require
from coverfast.downstream.losses import class_sums, cross_entropy_sum, soft_dice_loss, weight_sum
from coverfast.downstream.network import Network
from coverfast.methods import Batch, Method, Outcome
from coverfast.view_draws import ViewRegions
from coverfast.view_settings import ViewSettings


class Labelled(NamedTuple):
    """Augmented images `(B, C, *crop)` and their classes, `(B, *crop)` uint8 or `(B,)` int64."""

    images: Tensor
    labels: Tensor


class Task(Method):
    """Supervised training of a network.

    Args:
        network: backbone and head.
        settings: ranges of the augmentation, see `augment`.
        class_weights: of each class in the cross-entropy; default 1.
        pad: whether images may be smaller than the network's crop, see `make_views`.
        impl: implementation of the ops, see `mov`.
    """

    weights: Tensor

    def __init__(
        self,
        network: Network,
        *,
        settings: ViewSettings | None = None,
        class_weights: Sequence[float] | None = None,
        pad: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.network, self.settings, self.pad, self.impl = network, settings or ViewSettings(), pad, impl
        self.regions = ViewRegions(network.crop, self.settings)
        weights = [1.0] * len(network.names) if class_weights is None else list(class_weights)
        require(
            len(weights) == len(network.names),
            f"class_weights must be one for each of the {len(network.names)} classes ({', '.join(network.names)}), got "
            f"{len(weights)}",
        )
        require(all(w >= 0 for w in weights) and any(weights), f"class_weights must be at least 0, got {weights}")
        self.register_buffer("weights", torch.tensor(weights), persistent=False)

    @property
    def backbone(self) -> Backbone:
        """What the engine knows a method by."""
        return self.network.backbone

    @property
    def segments(self) -> bool:
        """Whether it is the pixels that have classes."""
        return self.network.task == "segmentation"

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Labelled:
        """Augment images and labels alike."""
        images, labels = augment(
            batch.images,
            batch.labels if self.segments else None,
            self.network.crop,
            **batch.keys,
            settings=self.settings,
            pad=self.pad,
            impl=self.impl,
        )
        found = labels if self.segments else batch.targets
        assert found is not None
        return Labelled(images, found)

    def count(self, prepared: Labelled) -> Tensor:
        """Sum of the class weights of all labels."""
        return weight_sum(prepared.labels, self.weights)

    def forward(self, prepared: Labelled, denominator: Tensor | None = None) -> Outcome:
        """Cross-entropy and, of a segmentation, soft Dice whose sums run over the whole global batch (SPEC 8)."""
        images, labels = prepared
        logits = self.network(images)
        entropy = cross_entropy_sum(logits, labels, self.weights)
        count = self.count(prepared)
        over = (count if denominator is None else denominator).clamp(min=1e-12)
        loss = entropy / over.float()
        with torch.no_grad():
            right = (logits.argmax(1) == labels).sum(dtype=torch.float64)
            sums = {"entropy": entropy.double(), "count": count, "right": right}
            sums["labels"] = torch.full_like(count, labels.numel())
        if self.segments:
            local = class_sums(logits, labels)
            # Dice is no sum over pixels: its value is that of all processes, its gradient that of this one's pixels.
            whole = local + (self.total(local.detach().clone()) - local.detach())
            loss = loss + soft_dice_loss(whole)
            for name, values in zip(("both", "p", "g"), local.detach().double(), strict=True):
                sums |= {f"{name}_{i}": value for i, value in enumerate(values)}
        return Outcome(loss, {name: value.detach() for name, value in sums.items()}, logits.detach())

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`loss`; its parts `loss_ce` and, of a segmentation, `loss_dice`; `accuracy`, the share of right labels."""
        entropy = sums["entropy"] / max(sums["count"], 1e-12)
        found = {"loss": entropy, "loss_ce": entropy}
        if self.segments:
            rows = [[sums[f"{name}_{i}"] for i in range(len(self.network.names))] for name in ("both", "p", "g")]
            dice = float(soft_dice_loss(torch.tensor(rows, dtype=torch.float64)))
            found |= {"loss": entropy + dice, "loss_dice": dice}
        return found | {"accuracy": sums["right"] / max(1.0, sums["labels"])}
