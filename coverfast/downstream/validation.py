"""Figures on held-out cases during training: whole images, the processes sharing the cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from coverfast.checks import InputError
from coverfast.downstream.metrics import auc, auc_one_vs_rest, dice_per_class
from coverfast.downstream.network import Network
from coverfast.downstream.windows import predict_windows
from coverfast.image_stream import to_unit_range
from coverfast.shard_set import ShardSet


@dataclass(frozen=True)
class Validation:
    """What a validation found.

    figures: by name. score: the one that decides which network is best. bad: why cases were left out, a sentence each.
    """

    figures: dict[str, float]
    score: float
    bad: list[str] = field(default_factory=list)

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
        skip: bool = False,
    ) -> Validation:
        """Of at most `limit` cases, evenly spread: shards are often sorted by patient.

        Of `size` processes each takes every `size`-th case, and `total` adds up their parts. skip: leave out what
        cannot be read.

        Segmentation: `dsc`, the mean over cases and foreground classes (SPEC 8). Classification: `auc` (one against the
        rest where there are more than two classes), `accuracy` and `cross_entropy`; the score is the AUC, or minus the
        cross-entropy where the cases are of one class.
        """
        dense, classes = network.task == "segmentation", len(network.names)
        cases = spread(len(shards), limit)
        rows = np.zeros((len(cases), 1 + (1 if dense else classes)))  # the first column: whether the case counts
        bad: list[str] = []
        for row, case in list(enumerate(cases))[rank::size]:
            try:
                image = case_image(shards, case)
                truth = shards.labels(case)[0] if dense else None
            except InputError as error:
                if not skip:
                    raise
                bad.append(str(error))
                continue
            probabilities = predict_windows(network, image, device=device).numpy()
            rows[row, 0] = 1
            if truth is None:
                rows[row, 1:] = probabilities
            else:
                rows[row, 1] = dice_per_class(probabilities.argmax(0).astype(np.uint8), truth, classes).mean()
        rows = total(torch.from_numpy(rows).to(device)).cpu().numpy() if size > 1 else rows
        there = rows[:, 0] > 0
        found = rows[there, 1:]
        if not len(found) or not np.isfinite(found).all():
            return cls({}, math.nan, bad)
        if dense:
            score = float(found.mean())
            return cls({"dsc": score}, score, bad)
        targets = shards.targets[cases][there]
        entropy = float(-np.log(np.maximum(found[np.arange(len(found)), targets], 1e-12)).mean())
        area = auc(found[:, 1], targets == 1) if classes == 2 else auc_one_vs_rest(found, targets)
        right = float((found.argmax(1) == targets).mean())
        figures = {"auc": area, "accuracy": right, "cross_entropy": entropy}
        return cls(figures, area if math.isfinite(area) else -entropy, bad)


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` places, evenly spread."""
    number = min(count, limit)
    return [i * count // number for i in range(number)]


def case_image(shards: ShardSet, index: int) -> Tensor:
    """Sample `index` as training sees it, `(C, *S)` float32 in [0, 1]."""
    stored = torch.from_numpy(shards.pixels(index)[0])[None]
    return to_unit_range(stored, shards.scaling[index : index + 1])[0]
