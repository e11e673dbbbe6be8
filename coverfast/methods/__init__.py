"""Methods: a batch of images becomes named losses. A method knows no files, no loop and no process group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Images of one training iteration.

    Attributes:
        images: `(B, C, *S)` float32 in [0, 1], on the training device, what the method's `regions` ask for of each
            image, zero-filled to a common size.
        sizes: `(B, n)` true sizes of the whole images in pixels, on the CPU.
        corner: `(B, n)` first pixel of the part in the whole image, on the CPU.
        samples: `(B,)` position of each image in the global batch, on the CPU.
        seed: key of everything random, with the iteration and the samples' positions.
        iteration: of the training, from 1; 0 for fixed held-out views.
    """

    images: Tensor
    sizes: Tensor
    corner: Tensor
    samples: Tensor
    seed: int
    iteration: int


class Method(nn.Module, ABC):
    """What the training loop asks of a method.

    Attributes:
        regions: which part of each image an iteration needs: from (seed, iteration, samples `(B,)`, sizes `(B, n)`) to
            first pixel and one past the last, `(B, n, 2)`. It goes to other processes and touches no device.
    """

    regions: Callable[[int, int, NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named scalars of a batch; "loss" is minimised, all are logged. One that has no value is NaN."""

    @abstractmethod
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Named figures over all batches together, whatever their split."""
