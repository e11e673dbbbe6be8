"""Soft Dice and cross-entropy of a segmentation, from sums that add up over the parts of a batch (SPEC 8)."""

from __future__ import annotations

import torch
from torch import Tensor

#: Keeps the Dice of a class that is nowhere finite, and at 1.
SMOOTH = 1e-5


def class_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """`sum p g`, `sum p` and `sum g` of every class over batch and pixels.

    Args:
        logits: `(B, K, *S)` floating.
        labels: `(B, *S)` class indices, uint8 or int64.

    Returns:
        `(3, K)` float32; p is the softmax of the logits, g 1 where the label is the class.
    """
    truth = _one_hot(logits, labels)
    p = logits.float().softmax(1)
    axes = (0, *range(2, logits.ndim))
    return torch.stack([torch.where(truth, p, 0).sum(axes), p.sum(axes), truth.sum(axes).to(p)])


def soft_dice_loss(sums: Tensor) -> Tensor:
    """`1 - mean over foreground classes of (2 sum p g + 1e-5) / (sum p + sum g + 1e-5)` from `class_sums`."""
    both, p, g = sums[:, 1:]
    return 1 - ((2 * both + SMOOTH) / (p + g + SMOOTH)).mean()


def cross_entropy_sum(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum over all labels of `-w log p`, float32, with the weight `(K,)` of the label's class.

    logits: `(B, K, *S)` or `(B, K)`. labels: `(B, *S)` or `(B,)`.

    Divided by `weight_sum` it is what `torch.nn.functional.cross_entropy` calls the mean.
    """
    # By the mask, not torch's nll_loss, whose sums over maps have no deterministic form on a GPU.
    axes = (0, *range(2, logits.ndim))
    found = torch.where(_one_hot(logits, labels), logits.float().log_softmax(1), 0).sum(axes)
    return -(found * weights).sum()


def _one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    """Where the label is the class, `(B, K, ...)` bool."""
    classes = torch.arange(logits.shape[1], device=logits.device).view(-1, *[1] * (logits.ndim - 2))
    return labels.unsqueeze(1) == classes


def weight_sum(labels: Tensor, weights: Tensor) -> Tensor:
    """Sum of the weights of all labels, float64."""
    return weights.double()[labels.long()].sum()
