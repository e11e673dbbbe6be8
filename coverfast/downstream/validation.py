"""Figures on held-out cases during training: whole images, the processes sharing the cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coverfast.downstream.metrics import auc, auc_one_vs_rest, dice_per_class
from coverfast.downstream.network import Network
from coverfast.downstream.windows import predict_windows
from coverfast.image_stream import to_unit_range
from coverfast.shard_set import ShardSet


@dataclass(frozen=True)
class Validation:
    """What a validation found. figures: by name. score: the one that decides which network is best."""

    figures: dict[str, float]
    score: float

    @classmethod
    def of(
        cls,
        network: Network,
        shards: ShardSet,
        *,
        limit: int,
        device: torch.device,
        rank: int = 0,
        size: int = 1,
        total: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> Validation:
        """Of the first `limit` cases; of `size` processes each takes every `size`-th, and `total` adds up their parts.

        Segmentation: `dsc`, the mean over cases and foreground classes (SPEC 8). Classification: `auc` (one against the
        rest where there are more than two classes), `accuracy` and `cross_entropy`; the score is the AUC, or minus the
        cross-entropy where the cases are of one class.
        """
        count = min(limit, len(shards))
        dense, classes = network.task == "segmentation", len(network.names)
        rows = np.zeros((count, 1 if dense else classes))
        for case in range(rank, count, size):
            probabilities = predict_windows(network, case_image(shards, case), device=device).numpy()
            if dense:
                truth = shards.labels(case)[0]
                rows[case] = dice_per_class(probabilities.argmax(0).astype(np.uint8), truth, classes).mean()
            else:
                rows[case] = probabilities
        rows = total(torch.from_numpy(rows).to(device)).cpu().numpy() if size > 1 else rows
        if dense:
            score = float(rows.mean())
            return cls({"dsc": score}, score)
        targets = shards.targets[:count]
        entropy = float(-np.log(np.maximum(rows[np.arange(count), targets], 1e-12)).mean())
        area = auc(rows[:, 1], targets == 1) if classes == 2 else auc_one_vs_rest(rows, targets)
        figures = {"auc": area, "accuracy": float((rows.argmax(1) == targets).mean()), "cross_entropy": entropy}
        return cls(figures, area if math.isfinite(area) else -entropy)


def case_image(shards: ShardSet, index: int) -> Tensor:
    """Sample `index` as training sees it, `(C, *S)` float32 in [0, 1]."""
    stored = torch.from_numpy(shards.pixels(index)[0])[None]
    return to_unit_range(stored, shards.scaling[index : index + 1])[0]
