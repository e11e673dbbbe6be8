"""Methods: a batch of images becomes named losses. A method knows no files, no loop and no process group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Images of one training iteration.

    Attributes:
        images: `(B, C, *S)` float32 in [0, 1], on the training device, zero-filled to a common size.
        sizes: `(B, n)` true sizes in pixels, on the CPU.
        samples: `(B,)` position of each image in the global batch, on the CPU.
        seed: key of everything random, with the iteration and the samples' positions.
        iteration: of the training, from 1; 0 for fixed held-out views.
    """

    images: Tensor
    sizes: Tensor
    samples: Tensor
    seed: int
    iteration: int


class Method(nn.Module, ABC):
    """What the training loop asks of a method."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named scalars of a batch; "loss" is minimised, all are logged. One that has no value is NaN."""

    @abstractmethod
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Named figures over all batches together, whatever their split."""
