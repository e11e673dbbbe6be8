"""Methods: a batch of images becomes a loss and figures. A method knows no files, no loop and no process group.

docs/methods.md tells how to write one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from coverfast.checks import check_choice, per_axis
from coverfast.crops import CropRegions, crop_images
from coverfast.geometry import Size
from coverfast.ops.dispatch import IMPLEMENTATIONS


@dataclass(frozen=True)
class Batch:
    """Images of one training iteration, or a part of them.

    Attributes:
        images: `(B, C, *S)` float32 in [0, 1], on the training device, what the method's `regions` ask for of each
            image, zero-filled to a common size. Where the method takes pairs, images 2i and 2i + 1 are the i-th one.
        sizes: `(B, n)` true sizes of the whole images in pixels, on the CPU.
        corner: `(B, n)` first pixel of the part in the whole image, on the CPU.
        samples: `(B,)` position of each image in the global batch, on the CPU; those of the i-th pair of all are 2i
            and 2i + 1.
        seed: key of everything random, with the iteration and the samples' positions.
        iteration: of the training, from 1; 0 for fixed held-out views.
        focus: `(B, n)` pixel of each whole image that its crop is centred on, as far as it fits, on the CPU; -1, or
            None for all, for a random crop.
        labels: `(B, *S)` uint8 class of every pixel of `images`; None where none were asked for.
        targets: `(B,)` int64 class of each image, -1 for none; None where none were asked for.
    """

    images: Tensor
    sizes: Tensor
    corner: Tensor
    samples: Tensor
    seed: int
    iteration: int
    focus: Tensor | None = None
    labels: Tensor | None = None
    targets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def keys(self) -> dict[str, Any]:
        """What `make_views` and `augment` draw by, and where the images lie: their arguments of these names."""
        names = ("seed", "iteration", "samples", "sizes", "corner", "focus")
        return {name: getattr(self, name) for name in names}

    def first(self, count: int) -> Batch:
        """The first `count` images."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value[:count] for name, value in tensors.items()})  # type: ignore[arg-type]

    def parts(self, count: int) -> list[Batch]:
        """The batch in `count` parts of equal size, in order."""
        share = len(self) // count
        cuts = [slice(i * share, (i + 1) * share) for i in range(count)]
        rows = [(self.images[c], self.sizes[c], self.corner[c], self.samples[c]) for c in cuts]
        optional = [
            [None if values is None else values[c] for values in (self.focus, self.labels, self.targets)] for c in cuts
        ]
        return [Batch(*row, self.seed, self.iteration, *more) for row, more in zip(rows, optional, strict=True)]


class Outcome(NamedTuple):
    """What a method makes of a prepared batch.

    loss: scalar to minimise. sums: named scalars, float64, without gradient, that add up over the parts of a batch,
    from which `Method.figures` tells the batch's figures. seen: what `Method.monitor` looks at, without gradient.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    seen: Any


@dataclass(frozen=True)
class Shown:
    """What a method shows of one sample, for `coverfast.report`; `S` is `(H, W)` or `(D, H, W)`, n its length.

    Attributes:
        images: by their titles, `(C, *S)` in [0, 1].
        overlays: by their titles, two images `(C, *S)` to lay over one another: grey where they agree.
        fields: by their titles, displacement fields `(n, *S)` in pixels.
        text: a sentence on what the pictures say of the sample.
        help: a sentence or two on how to look at them.
    """

    images: Mapping[str, Tensor]
    overlays: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    text: str = ""
    help: str = ""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, and then every part as it was: a look must not move running statistics."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _alone(values: Tensor) -> Tensor:
    return values


class Method(nn.Module, ABC):
    """What the training loop asks of a method.

    Attributes:
        pairs: whether it learns from pairs of different images rather than from single ones.
        regions: which part of each image an iteration needs: from (seed, iteration, samples `(B,)`, sizes `(B, n)`,
            focus `(B, n)`) to first pixel and one past the last, `(B, n, 2)`. It goes to other processes and touches
            no device.
        total: adds a tensor up over the processes, in place; the engine sets it where there are several. For a loss
            that is not a sum over pixels.
    """

    pairs: ClassVar[bool] = False
    regions: Callable[[int, int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]
    total: Callable[[Tensor], Tensor] = staticmethod(_alone)

    @abstractmethod
    def prepare(self, batch: Batch) -> Any:
        """What the network sees of a batch, on its device: views and their truth. Without gradient, never compiled."""

    @abstractmethod
    def count(self, prepared: Any) -> Tensor:
        """What the losses divide by, float64, one number or a vector: it adds up over the parts of a batch."""

    @abstractmethod
    def forward(self, prepared: Any, denominator: Tensor | None = None) -> Outcome:
        """Loss and sums; one graph to torch.compile.

        `denominator` is the `count` of the whole global batch when `prepared` is a part of it: the gradients of the
        parts then add up to that of the whole.
        """

    @abstractmethod
    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Named figures of a batch from its sums: "loss" and what else there is to log. NaN for one without value."""

    def monitor(self, prepared: Any, seen: Any, iteration: int) -> dict[str, Tensor]:
        """What is looked at now and then, tensors of any shape; without gradient and without waiting for the device."""
        return {}

    def monitored(self, found: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """Named figures from what `monitor` gave, on the host."""
        return {}


class Pretext(Method):
    """A method of self-supervised pretraining: a task that makes a backbone learn from images alone.

    Args:
        backbone: the network that is kept when training is done, a `coverfast.backbones.Backbone`.
        crop: size of what the network sees of an image, an int or one per axis.
        pad: allow crops larger than an image, see `crop_images`.
        impl: implementation of the ops, see `coverfast.mov`.
    """

    def __init__(self, backbone: nn.Module, *, crop: Size, pad: bool = False, impl: str = "auto") -> None:
        super().__init__()
        check_choice("impl", impl, IMPLEMENTATIONS)
        self.backbone, self.pad, self.impl = backbone, pad, impl
        self.crop = per_axis("crop", crop, len(crop) if isinstance(crop, Sequence) else int(backbone.ndim))  # type: ignore[arg-type]
        self.regions = CropRegions(self.crop, self.pairs)

    def crops(self, batch: Batch) -> Tensor:
        """A random crop of each image, `(B, C, *crop)` float32, those of a pair at the same place; see `crop_images`.

        What `regions` asks for, unless a method replaces it.
        """
        return crop_images(batch.images, self.crop, **batch.keys, pad=self.pad, pairs=self.pairs)

    def pictures(self, batch: Batch) -> Any:
        """What there is to see of the first sample, or pair, of a batch: `Shown`; None for nothing."""
        return None

    def work(self, batch: int) -> None:
        """Run the convolutions and matrix products of a step on `batch` images or pairs, to have them counted.

        It is called on a copy without values or memory (torch's "meta" device). As it is here, the backbone sees an
        image, or both of a pair.
        """
        self.features_of(batch * (2 if self.pairs else 1))

    def features_of(self, images: int) -> list[Tensor]:
        """What the backbone makes of so many images of any values: for `work`."""
        weight, channels = next(self.backbone.parameters()), getattr(self.backbone, "in_channels", 1)
        features: list[Tensor] = self.backbone(weight.new_empty(images, channels, *self.crop))
        return features
