"""`mov` against its eager formulations: correctness first, then time and memory, forward and backward."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coverfast.bench.baselines import mov_a, mov_b
from coverfast.bench.measure import high_water_mark, interleaved, peak_growth
from coverfast.ops.mov import mov

Row = tuple[str, float, float, float, float, float]


def _variants(window: Sequence[int], groups: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {
        "coverfast torch": lambda q, k: mov(q, k, window=window, groups=groups, impl="torch"),
        "eager A": lambda q, k: mov_a(q, k, window=window, groups=groups),
        "eager B": lambda q, k: mov_b(q, k, window=window, groups=groups),
    }


def _inputs(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    return q, k


def compare(
    size: Sequence[int], window: Sequence[int], *, channels: int = 8, groups: int = 1, repeats: int = 5
) -> list[Row]:
    """Rows (variant, error, forward s, forward + backward s, spread s, extra peak MB), float32, on the CPU.

    The error is the largest difference from the reference in float64, output and gradients, on a grid of at most 16
    pixels an axis.
    """
    shape = (1, channels, *size)
    small = (1, channels, *(min(s, 16) for s in size))
    exact = _outcome(lambda q, k: mov(q, k, window=window, groups=groups, impl="reference"), small, torch.float64)
    q, k = _inputs(shape)
    variants = _variants(window, groups)

    def both(call: Callable[[Tensor, Tensor], Tensor]) -> None:
        q.grad = k.grad = None
        call(q, k).sum().backward()

    def forward(call: Callable[[Tensor, Tensor], Tensor]) -> None:
        with torch.no_grad():
            call(q, k)

    one_way = interleaved({n: lambda c=c: forward(c) for n, c in variants.items()}, repeats)  # type: ignore[misc]
    two_way = interleaved({n: lambda c=c: both(c) for n, c in variants.items()}, repeats)  # type: ignore[misc]
    rows = []
    for name, call in variants.items():
        found = _outcome(call, small, torch.float32)
        error = max(float((a.double() - b).abs().max()) for a, b in zip(found, exact, strict=True))
        text = [name, ",".join(map(str, size)), ",".join(map(str, window)), str(channels), str(groups)]
        peak = peak_growth("coverfast.bench.mov", text, min(3, repeats))
        seconds = two_way[name]
        spread = max(seconds) - min(seconds)
        rows.append((name, error, statistics.median(one_way[name]), statistics.median(seconds), spread, peak))
    return rows


def _outcome(
    call: Callable[[Tensor, Tensor], Tensor], shape: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    q, k = _inputs(shape, dtype)
    out = call(q, k)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    dq, dk = torch.autograd.grad((out * weights).sum(), (q, k))
    return out.detach(), dq, dk


def _print_peak(name: str, size: str, window: str, channels: str, groups: str) -> None:
    """In a process of its own: how far one forward and backward lifts the high-water mark."""
    call = _variants([int(w) for w in window.split(",")], int(groups))[name]
    n = len(size.split(","))
    warm_q, warm_k = _inputs((1, int(channels), *[8] * n))
    call(warm_q, warm_k).sum().backward()
    q, k = _inputs((1, int(channels), *(int(s) for s in size.split(","))))
    before = high_water_mark()
    call(q, k).sum().backward()
    print(high_water_mark() - before)


if __name__ == "__main__":
    _print_peak(*sys.argv[1:])
