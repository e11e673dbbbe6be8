"""The calls of `mov` that benchmarks measure: those of the paper presets, level by level, and single ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from coverfast.training.settings import preset_ndim, preset_settings


@dataclass(frozen=True)
class Problem:
    """One call of `mov`: the shape of its maps, its window and groups; where in a preset it comes from."""

    name: str
    shape: tuple[int, ...]
    window: tuple[int, ...]
    groups: int

    @property
    def taps(self) -> int:
        """Taps of all pixels and groups, those out of the grid included."""
        return self.shape[0] * prod(self.shape[2:]) * self.groups * prod(self.window)

    @property
    def width(self) -> int:
        """Channels of a group."""
        return self.shape[1] // self.groups


def preset_problems(preset: str) -> list[Problem]:
    """The calls of `mov` in one training step of a preset, coarse to fine."""
    settings, n = preset_settings(preset), preset_ndim(preset)
    crop, window = settings.crop * (n // len(settings.crop)), settings.window * (n // len(settings.window))
    problems = []
    for level, groups in enumerate(settings.groups):
        size = [c // 2 ** (len(settings.groups) - 1 - level) for c in crop]
        shape = (settings.batch, groups * settings.head_dim, *size)
        problems.append(Problem(f"{preset} level {level}", shape, window, groups))
    return problems


def single_problem(size: Sequence[int], window: Sequence[int], channels: int, groups: int, batch: int = 1) -> Problem:
    """One call, named after its numbers."""
    shape = (batch, channels, *size)
    return Problem(f"{shape} window {tuple(window)} groups {groups}", shape, tuple(window), groups)
