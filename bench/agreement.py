"""To how many digits the implementations of `mov` agree, in value and gradients.

On a GPU at the sizes of training; without one in Triton's interpreter (`TRITON_INTERPRET=1`), at sizes it can bear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, log10

import torch
from torch import Tensor

from coverfast.bench.problems import Problem, preset_problems, single_problem
from coverfast.ops.mov import mov

_SMALL = (
    single_problem((12, 33), (7, 7), 8, 1),
    single_problem((6, 10), (3, 9), 20, 4, batch=2),
    single_problem((4, 6, 11), (3, 3, 5), 8, 1),
    single_problem((3, 5, 6), (3, 5, 3), 12, 3),
    single_problem((5, 7), (21, 25), 16, 2),
)


@dataclass(frozen=True)
class Agreement:
    """Largest difference of two implementations over the largest value, as decimal digits in common."""

    problem: str
    dtype: str
    out: float
    dq: float
    dk: float


def agreements(device: str) -> Iterator[Agreement]:
    """`impl="triton"` against `impl="torch"`, problem by problem and dtype by dtype."""
    problems = [*preset_problems("paper-3d"), *preset_problems("paper-2d")] if device == "cuda" else list(_SMALL)
    for problem in problems:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            ours, theirs = (_outcome(problem, dtype, impl, device) for impl in ("triton", "torch"))
            digits = [_digits(a, b) for a, b in zip(ours, theirs, strict=True)]
            yield Agreement(problem.name, str(dtype)[6:], *digits)


def _outcome(problem: Problem, dtype: torch.dtype, impl: str, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(problem.shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(2))
    out = mov(q, k, window=problem.window, groups=problem.groups, impl=impl)
    g = torch.randn(out.shape, generator=generator).to(out)
    return out.detach(), *torch.autograd.grad(out, (q, k), g)


def _digits(a: Tensor, b: Tensor) -> float:
    difference = float((a.double() - b.double()).abs().max() / b.double().abs().max())
    return -log10(difference) if difference else inf
