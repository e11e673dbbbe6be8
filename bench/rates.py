"""What a device can do at best, measured when a benchmark begins: the floors beside its results are made of these."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch

from coverfast.bench.measure import timed
from coverfast.training.estimate import matrix_rate


@dataclass(frozen=True)
class Rates:
    """A second's, of the best of a few runs.

    Attributes:
        copy: bytes read and written by a copy of half a GB or more, which few caches hold.
        matrix: FLOP of products of large matrices, by dtype; on a GPU float32 is what convolutions make of it, TF32.
        multiply_add: the same in plain float32, which no matrix unit does on a GPU: two FLOP a multiply-add. What a
            library of matrix products reaches, some percent below what the units could.
        exponential: of float32 numbers that caches or registers hold.
    """

    copy: float
    matrix: dict[str, float]
    multiply_add: float
    exponential: float


@cache
def rates(device: str, dtype: torch.dtype) -> Rates:
    """Those of a device, in a second or less; of matrices in float32 and in `dtype`."""
    place = torch.device(device)
    # Half precision and double precision are measured where they are asked for: a CPU may take minutes.
    matrix = {str(kind)[6:]: matrix_rate(place, kind) for kind in {torch.float32, dtype}}
    exact = matrix_rate(place, torch.float32, exact=True) if device == "cuda" else matrix["float32"]
    return Rates(copy_rate(device), matrix, exact, exponential_rate(device))


@cache
def copy_rate(device: str) -> float:
    """Bytes a second, read and written, that a copy moves on this device."""
    source = torch.zeros(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / min(timed({"": lambda: target.copy_(source)}, 10, device, {})[""])


@cache
def exponential_rate(device: str) -> float:
    """Exponentials a second of float32 numbers: on a GPU in registers, on a CPU in its caches."""
    if device == "cuda":
        from coverfast.bench.exponentials import COUNT, ELEMENTS, run

        numbers = torch.full((ELEMENTS,), 0.5, device=device)
        return 1e3 * COUNT * ELEMENTS / min(timed({"": partial(run, numbers)}, 20, device, {})[""])
    x = torch.linspace(-8, 0, 2**18)
    out = torch.empty_like(x)
    times = timed({"": lambda: [torch.exp(x, out=out) for _ in range(_TURNS)]}, 20, device, {})[""]
    return 1e3 * _TURNS * x.numel() / min(times)


#: Exponentials of all numbers that are timed as one on a CPU.
_TURNS = 16
