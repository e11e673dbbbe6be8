"""A network as exporters take it, and the images on which what they make is held against it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coverfast.checks import InputError, per_axis, require, shape_of
from coverfast.export.sources import Source
from coverfast.geometry import Size, check_stride

#: Largest difference that counts as rounding, as a part of the largest value of its map.
BOUND = 1e-4

#: Name of the extra file in which a torch file keeps what it says of itself, a JSON object of strings.
FACTS = "coverfast.json"

#: From an image to what a network returns, in order.
Run = Callable[[Tensor], Sequence[Tensor]]

# Sizes of images in coarsest pixels; those of two axes are the first two.
_USUAL, _OTHER = (3, 4, 2), (2, 3, 3)


class Graph(nn.Module):
    """A backbone, whose features come as a tuple, or a network with its head, whose logits come as they are.

    Attributes:
        ndim, in_channels: of its images.
        multiple: of which the size of an image must be one on every axis, the coarsest stride.
        outputs: names of what it returns.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.network: nn.Module = source.network
        self.ndim, self.in_channels = source.backbone.ndim, source.backbone.in_channels
        self.multiple, self.outputs = source.backbone.strides[0], source.outputs
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> Any:
        """Of images `(B, in_channels, *S)`, float32 in [0, 1]."""
        return plain(self.network(image))

    def run(self, image: Tensor) -> Sequence[Tensor]:
        """What it returns, always several."""
        return several(self(image))

    def trial(self, batch: int, size: Sequence[int]) -> Trial:
        """A batch of noise and what the network makes of it."""
        shape = (batch, self.in_channels, *size)
        image = torch.rand(shape, generator=torch.Generator().manual_seed(batch))
        expected = tuple(self.run(image))
        finite = all(bool(map_.isfinite().all()) for map_ in expected)
        require(finite, "what the network returns must be finite, but for an image of noise in [0, 1] it is not")
        return Trial(image, expected)


@dataclass(frozen=True)
class Trial:
    """Images and what a network makes of them."""

    image: Tensor
    expected: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        """`64x48 (batch 2)`."""
        return f"{shown(self.image.shape[2:])} (batch {len(self.image)})"


class Differs(Exception):
    """Something else returns other numbers than the network; the message says where and by how much."""


def difference(graph: Graph, run: Run, trials: Sequence[Trial]) -> float:
    """Largest difference between a network and what was made of it, as a part of the largest value of its map.

    Raises:
        Differs: when it is more than `BOUND`.
    """
    worst = 0.0
    for trial in trials:
        found = run(trial.image)
        for name, a, b in zip(graph.outputs, found, trial.expected, strict=True):
            if a.shape != b.shape:
                raise Differs(f"{name} of {trial.name} is {shape_of(a)}, not {shape_of(b)}")
            part = float((a - b).abs().max() / b.abs().max().clamp(min=1e-20))
            if not part <= BOUND:
                raise Differs(
                    f"{name} of {trial.name} differs from the network's by {part:.1e} of its largest value, "
                    f"more than {BOUND:.0e}"
                )
            worst = max(worst, part)
    return worst


@dataclass(frozen=True)
class Sizes:
    """Which images a file is to take, and those on which it is tried.

    Attributes:
        multiple: of which every size is one.
        trials: with a batch of 1 first.
        reason: why all have one size; empty for any size from the smallest tried on.
    """

    multiple: int
    trials: tuple[Trial, ...]
    reason: str = ""

    @property
    def free(self) -> bool:
        """Whether the size may change from image to image."""
        return not self.reason

    @property
    def size(self) -> tuple[int, ...]:
        """Of the first images."""
        return shape_of(self.trials[0].image)[2:]

    @property
    def words(self) -> str:
        """For people."""
        if not self.free:
            return f"{shown(self.size)} alone: {self.reason}"
        least = min(min(trial.image.shape[2:]) for trial in self.trials)
        return f"multiples of {self.multiple} from {least} on"


def fixed(graph: Graph, size: Sequence[int] | None, reason: str) -> Sizes:
    """One size alone: this one, or the usual one."""
    size = size or _pixels(graph, _USUAL)
    with _taking(size):
        return Sizes(graph.multiple, (graph.trial(1, size), graph.trial(2, size)), reason)


def free(graph: Graph, size: Sequence[int] | None, least: int) -> Sizes | None:
    """Any size, tried with one of these, a smaller one and the smallest, of `least` coarsest pixels or of two.

    None for a network that does not take them all.
    """
    first = size or _pixels(graph, _USUAL)
    second = _pixels(graph, _OTHER)
    if tuple(first) == second:
        second = _pixels(graph, _USUAL)
    try:
        trials = [graph.trial(1, first), graph.trial(3, second)]
    except Exception:  # whatever a foreign network may raise
        return None
    for pixels in range(least, 3):
        try:
            trials.append(graph.trial(2, _pixels(graph, (pixels,) * 3)))
        except Exception:
            continue
        return Sizes(graph.multiple, tuple(trials))
    return None


def check_size(graph: Graph, size: Size) -> tuple[int, ...]:
    """A size of images, one an axis, that the network's strides divide."""
    found = per_axis("size", size[0] if not isinstance(size, int) and len(size) == 1 else size, graph.ndim)
    check_stride("size", found, graph.multiple)
    return found


def plain(found: Any) -> Any:
    """A tensor, or a tuple of them."""
    return found if isinstance(found, Tensor) else tuple(found)


def several(found: Any) -> Sequence[Tensor]:
    """One tensor or several, as several."""
    return (found,) if isinstance(found, Tensor) else found


def shown(size: Sequence[int]) -> str:
    """`64x48`."""
    return "x".join(map(str, size))


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters tell of what they do, of their age and of every failure beside raising it."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def first_line(error: Exception) -> str:
    """What a foreign library says of a failure, without its pages of detail."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]


@contextmanager
def _taking(size: Sequence[int]) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"size must be one that the network takes, got {shown(size)}: {first_line(error)}; see --size"
        ) from error


def _pixels(graph: Graph, coarsest: Sequence[int]) -> tuple[int, ...]:
    return tuple(graph.multiple * count for count in coarsest[: graph.ndim])
