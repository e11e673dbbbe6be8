"""To how many digits `impl="triton"` and `impl="torch"` agree, in value and gradients.

On a GPU at the sizes of training; without one in Triton's interpreter (`TRITON_INTERPRET=1`), at sizes it can bear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, log10

import torch

from coverfast.bench.correctness import difference, outcome
from coverfast.bench.operators import CASES
from coverfast.bench.problems import Case, preset_levels, single_level
from coverfast.ops.dispatch import KERNELS

_WINDOWS = (
    single_level((12, 33), (7, 7)),
    single_level((6, 10), (3, 9), batch=2, channels=20, groups=4),
    single_level((4, 6, 11), (3, 3, 5)),
    single_level((3, 5, 6), (3, 5, 3), channels=12, groups=3),
    single_level((5, 7), (21, 25), channels=16, groups=2),
)
_GRIDS = (single_level((6, 14), (), named=False), single_level((2, 4, 6), (), batch=2, channels=12, named=False))


@dataclass(frozen=True)
class Agreement:
    """Largest difference of the two implementations over the largest value, as decimal digits in common."""

    case: str
    op: str
    layout: str
    dtype: str
    digits: Mapping[str, float]  # of the outputs, and of the gradients of inputs, by name


def agreements(device: str) -> Iterator[Agreement]:
    """Every operator that has kernels, case by case and dtype by dtype."""
    for op in [op for op in CASES if op in KERNELS]:
        if device == "cuda":
            places = [(preset_levels(preset), "channels_last") for preset in ("paper-3d", "paper-2d")]
        else:
            small = _WINDOWS if op == "mov" else _GRIDS
            places = [([at], ("contiguous", "channels_last")[index % 2]) for index, at in enumerate(small)]
        for levels, layout in places:
            for case in CASES[op](levels, layout):
                yield from _agreements(case, device)


def _agreements(case: Case, device: str) -> Iterator[Agreement]:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        inputs = case.make(device, dtype, None, 0)
        if inputs[0].dtype == dtype:  # what is always in float32 at least has no half precision
            ours, theirs = (outcome(case, case.variants[f"coverfast {impl}"], inputs) for impl in ("triton", "torch"))
            digits = {name: _digits(difference(value, theirs[name])) for name, value in ours.items()}
            yield Agreement(case.name, case.op, case.facts.get("layout", "-"), str(dtype)[6:], digits)


def _digits(difference: float) -> float:
    return -log10(difference) if difference else inf
