"""Exponentials in registers, as many as the unit for them does: the kernel behind `rates.exponential_rate`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

#: Numbers, each in a register, that fill any GPU; how many times each is replaced by its exponential.
ELEMENTS, COUNT, BLOCK = 2**22, 1024, 1024


@triton.jit
def exponential_kernel(x, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i)
    for _ in range(COUNT):
        value = tl.exp2(-value)  # from [0, 1] to itself: no branch for small or large numbers
    tl.store(x + i, value)


def run(x: Tensor) -> None:
    """Replace `ELEMENTS` numbers on a GPU, `COUNT` times in a row."""
    exponential_kernel[(ELEMENTS // BLOCK,)](x, COUNT, BLOCK, num_warps=8)
