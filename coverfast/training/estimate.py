"""Floating point operations of a training step, and how many a second a device can do."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from coverfast.methods import Pretext

#: Rows of the matrices whose product is timed, large enough to fill a device.
_ROWS = {"cpu": 1024, "cuda": 8192}
#: Seconds for which matrix products are timed.
_TIMED = 0.2


def step_flops(method: Pretext, batch: int) -> float:
    """Floating point operations of a training step on `batch` images or pairs: three times the forward's `work`.

    Counted on tensors without values: no memory, no random numbers, weights untouched. Not of a method that is sharded,
    which cannot be copied.
    """
    network = _without_values(method)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.work(batch)
    return 3.0 * counter.get_total_flops()


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype, *, exact: bool = False) -> float:
    """FLOP/s that products of large matrices reach on the device, measured in about 0.2 s: what MFU is relative to.

    Below what makers print, for a device keeps its highest clock only for a moment; a convolution may come close. On a
    GPU float32 is what convolutions make of it: TF32 unless that is turned off, or `exact` asks for all digits.
    """
    rows = _ROWS[device.type]
    generator = torch.Generator(device).manual_seed(0)  # of its own: the training's random numbers are not touched
    a, b = (torch.randn(rows, rows, generator=generator, device=device).to(dtype) for _ in range(2))
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, torch.backends.cudnn.allow_tf32 and not exact
    try:
        once = _seconds(lambda: a @ b, device, 1)  # the first one also sets up
        once = min(once, _seconds(lambda: a @ b, device, 1))
        runs = [_seconds(lambda: a @ b, device, max(1, int(_TIMED / 4 / once))) for _ in range(4)]
    finally:
        matmul.allow_tf32 = before
    return 2.0 * rows**3 / min(once, *runs)


def duration(seconds: float) -> str:
    """For people: `35 ms`, `2.5 s`, `3 min 20 s`, `5 days 4 h`."""
    if seconds < 0.0995:
        return f"{1e3 * seconds:.2g} ms"
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    for (name, length), (smaller, step) in pairwise((("day", 86400), ("h", 3600), ("min", 60), ("s", 1))):
        whole, rest = divmod(step * round(seconds / step), length)
        if whole:
            name += "s" if name == "day" and whole > 1 else ""
            return f"{whole} {name}" + (f" {rest // step} {smaller}" if rest else "")
    return f"{seconds:.0f} s"


def _without_values(method: Pretext) -> Pretext:
    """A copy that takes no memory."""
    blank: dict[int, Any] = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in method.parameters()}
    blank |= {id(b): torch.empty_like(b, device="meta") for b in method.buffers()}
    return copy.deepcopy(method, blank)


def _seconds(run: Callable[[], Any], device: torch.device, count: int) -> float:
    """Of one run among `count`, without what is still to be done before."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(count):
                run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / count
    begun = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - begun) / count
