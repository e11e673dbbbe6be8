"""What a benchmark measures: where in a pyramid, the inputs, the ways to compute a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from coverfast.geometry import AffineDVF, level_size
from coverfast.layout import channels_last
from coverfast.training.settings import preset_ndim, preset_settings

#: Size of the images that a preset's views are cut from: the paper's, and for small presets those of the demo.
IMAGES = {
    **dict.fromkeys(("paper-2d", "gvsl-2d"), (512, 512)),
    **dict.fromkeys(("paper-3d", "gvsl-3d"), (160, 160, 128)),
    **dict.fromkeys(("small-2d", "small-gvsl-2d"), (192, 192)),
    **dict.fromkeys(("small-3d", "small-gvsl-3d"), (96, 96, 96)),
}

#: Of the local correlation, along every axis (SPEC 9).
NCC_WINDOW = 9


@dataclass(frozen=True)
class Level:
    """A pyramid level.

    Attributes:
        name: where it comes from.
        batch: samples.
        size: pixels along each axis.
        channels: of the maps that are matched.
        groups: J of `mov`.
        window: of `mov`, one int an axis.
        features: channels of the backbone's map, from which those maps are projected.
        image: size of the images that views of this size are cut from.
    """

    name: str
    batch: int
    size: tuple[int, ...]
    channels: int
    groups: int
    window: tuple[int, ...]
    features: int
    image: tuple[int, ...]

    @property
    def taps(self) -> int:
        """Taps of all pixels and groups, those out of the grid included."""
        return self.batch * prod(self.size) * self.groups * prod(self.window)

    @property
    def taps_inside(self) -> int:
        """Those in the grid: along an axis of S pixels there are S - |o| at offset o."""
        reach = [min(w // 2, s - 1) for s, w in zip(self.size, self.window, strict=True)]
        along = [s * (2 * r + 1) - r * (r + 1) for s, r in zip(self.size, reach, strict=True)]
        return self.batch * self.groups * prod(along)

    def at_most(self, limit: int | None, *, whole_x: bool = False) -> Level:
        """The same on a grid of at most `limit` pixels an axis, but maybe x, for two samples at most."""
        if limit is None:
            return self
        size = tuple(min(s, limit) for s in self.size)
        size = (*size[:-1], self.size[-1]) if whole_x else size
        image = tuple(-(-i * s // whole) for i, s, whole in zip(self.image, size, self.size, strict=True))
        return replace(self, batch=min(2, self.batch), size=size, image=image)


def single_level(
    size: Sequence[int],
    window: Sequence[int],
    *,
    batch: int = 1,
    channels: int = 8,
    groups: int = 1,
    named: bool = True,
) -> Level:
    """A level of its own, its name the size and, where that is `named`, the window; images are a third larger."""
    name = " x ".join(map(str, size)) + (f" window {' x '.join(map(str, window))}" if named else "")
    return Level(name, batch, tuple(size), channels, groups, tuple(window), channels, tuple(4 * s // 3 for s in size))


def pyramid_levels(
    name: str,
    batch: int,
    finest: Sequence[int],
    window: tuple[int, ...],
    groups: Sequence[int] = (4, 4, 4, 1, 1),
    head_dim: int = 8,
    features: Sequence[int] = (512, 256, 128, 64, 32),
    image: tuple[int, ...] | None = None,
) -> list[Level]:
    """The levels of a pyramid, coarse to fine; the defaults are the paper's."""
    levels, coarsest = [], level_size(finest, len(groups))
    for level, (j, maps) in enumerate(zip(groups, features, strict=True)):
        size = tuple(s * 2**level for s in coarsest)
        levels.append(Level(f"{name} level {level}", batch, size, j * head_dim, j, window, maps, image or size))
    return levels


def preset_levels(preset: str) -> list[Level]:
    """The levels of one training step of a preset."""
    s, n = preset_settings(preset), preset_ndim(preset)
    crop, window = (v * (n // len(v)) for v in (s.crop, s.window))
    features = s.unet_channels()[len(s.groups) - 1 :]
    return pyramid_levels(preset, s.batch, crop, window, s.groups, s.head_dim, features, IMAGES[preset])


@dataclass(frozen=True)
class Work:
    """Arithmetic without which a result cannot be had: multiply-adds in float32 that no matrix unit can do,
    exponentials, and FLOP of matrix products in the dtype of the inputs.
    """

    multiply_adds: float = 0.0
    exponentials: float = 0.0
    matrix: float = 0.0

    def __add__(self, other: Work) -> Work:
        mine, theirs = astuple(self), astuple(other)
        return Work(*(a + b for a, b in zip(mine, theirs, strict=True)))


def mov_work(level: Level) -> tuple[Work, Work]:
    """Of `mov`, forward and backward: `d + 3` and `4 d + 7` multiply-adds a tap in the grid (a dot product, a weight
    into sum and mean; two gradients of `d` channels, each with its weight recomputed), one exponential in each of three
    passes.
    """
    d, taps = level.channels // level.groups, float(level.taps_inside)
    return Work((d + 3) * taps, taps), Work((4 * d + 7) * taps, 2 * taps)


@dataclass(frozen=True)
class Variant:
    """One way to compute a case, `call(*prepare(*inputs))`, of which only the call is timed.

    Attributes:
        cpu: whether it is measured on a CPU without being asked for. gpu: the same of a GPU.
        margin: pixels along each axis next to the border, where it means something else than the definition: there
            outputs are not compared, nor gradients twice as far in and one pixel more.
        needs: bytes that it cannot do without: where a device has less it is not tried.
    """

    call: Callable[..., Any]
    prepare: Callable[..., Sequence[Tensor]] | None = None
    cpu: bool = True
    gpu: bool = True
    margin: tuple[int, ...] = ()
    needs: float = 0.0

    def ready(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the call takes."""
        return inputs if self.prepare is None else self.prepare(*inputs)


@dataclass(frozen=True)
class Case:
    """One call of an operator and the ways to compute it. It pickles: memory is measured in another process.

    Attributes:
        name: where it comes from.
        op: the operator, as `coverfast.ops.dispatch` calls it, or "head".
        facts: the call in numbers, for tables and files.
        level: where in a pyramid; the finest one for what spans several.
        inputs: names of the inputs.
        make: `(device, dtype, limit, seed)` to inputs, on a grid of at most `limit` pixels an axis. On a GPU x stays
            whole: tiles lie along it, and what is checked should be the kernels that are timed.
        variants: by name; the implementations of coverfast first.
        exact: the definition, to be called in float64.
        outputs: names of the outputs.
        backward: whether there are gradients.
        checked: the dtype of the check, where it is not that of the measurement.
        checked_at: pixels an axis of the grid of the check.
        work: of the forward and of the backward, for the floor; without it memory is the floor.
    """

    name: str
    op: str
    facts: Mapping[str, Any]
    level: Level
    inputs: tuple[str, ...]
    make: Callable[[str, torch.dtype, int | None, int], list[Tensor]]
    variants: Mapping[str, Variant]
    exact: Callable[..., Any]
    outputs: tuple[str, ...] = ("out",)
    backward: bool = True
    checked: torch.dtype | None = None
    checked_at: int = 24
    work: tuple[Work, Work] | None = None


class Draws:
    """Random inputs on a device: maps in a dtype and layout, fields in float32 at least.

    On the device "meta" inputs have a shape and no values.
    """

    def __init__(self, device: str, dtype: torch.dtype, layout: str, seed: int) -> None:
        self.device, self.dtype, self.layout = device, dtype, layout
        self.exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1)."""
        return torch.rand(*shape, generator=self.generator, device=self.device).to(self.exact)

    def features(self, batch: int, channels: int, size: Sequence[int]) -> Tensor:
        """A map of normal numbers."""
        x = torch.randn(batch, channels, *size, generator=self.generator, device=self.device).to(self.dtype)
        return (x.to(memory_format=channels_last(x)) if self.layout == "channels_last" else x).requires_grad_()

    def affine(self, batch: int, size: Sequence[int]) -> AffineDVF:
        """Affine fields not far from the identity."""
        n = len(size)
        u = 2 * self.uniform(batch, n, n + 1) - 1
        eye = torch.eye(n, device=self.device, dtype=self.exact)
        return AffineDVF(torch.cat([eye + 0.1 * u[:, :, :n], 0.05 * max(size) * u[:, :, n:]], -1), tuple(size))

    def field(self, batch: int, size: Sequence[int]) -> Tensor:
        """An affine field with a pixel of noise; no nearer than a tenth to the face of a cell, where slopes jump."""
        psi = self.affine(batch, size).dense() + 2 * self.uniform(batch, len(size), *size) - 1
        return (psi.floor() + 0.1 + 0.8 * (psi - psi.floor())).requires_grad_()

    def coarse_field(self, batch: int, size: Sequence[int]) -> Tensor:
        """The same for a level above: up-sampled, it is a multiple of 1/128 and a half of that, without rounding."""
        psi = self.field(batch, size).detach()
        return ((4 * psi).round() / 4 + 1 / 512).requires_grad_()
