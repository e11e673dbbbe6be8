"""One launch of a Triton kernel: what runs, with what, on how many programs; and how its shape is chosen.

The same object runs a kernel and describes it to the ahead-of-time compiler, so that a table of registers and
instructions speaks of the kernels that training runs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Architecture:
    """What a launch depends on: how many multiprocessors there are to fill, and how wide a warp is."""

    processors: int
    warp: int = 32


#: By name of the target, for compiling ahead of time: A100, H100/H200, B200, MI300X.
ARCHITECTURES = {
    "sm_80": Architecture(108),
    "sm_90": Architecture(132),
    "sm_100": Architecture(148),
    "gfx942": Architecture(304, warp=64),
}


def architecture_of(tensor: Tensor) -> Architecture:
    """The device of a tensor; without one (interpreter, meta tensors) an H100."""
    return _architecture(tensor.device) if tensor.is_cuda else ARCHITECTURES["sm_90"]


@cache
def _architecture(device: torch.device) -> Architecture:
    properties = torch.cuda.get_device_properties(device)
    return Architecture(properties.multi_processor_count, getattr(properties, "warp_size", 32))


_overrides: dict[str, int] = {}


@contextmanager
def override(**values: int) -> Iterator[None]:
    """Launch with other numbers than the rules choose: `rows`, `taps`, `tile`, `warps` (see `kernels.mov.choose`).

    For tuning and tests; not for two threads at once.
    """
    before = dict(_overrides)
    _overrides.update(values)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def chosen(name: str, value: int) -> int:
    """`value`, unless an `override` says otherwise."""
    return _overrides.get(name, value)


@dataclass(frozen=True)
class Launch:
    """A kernel, its arguments by name, its compile-time constants, the number of programs and of warps in each."""

    kernel: Any
    programs: int
    warps: int
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    #: Integer arguments that Triton is left to specialise when they are 1.
    unit: tuple[str, ...] = ()

    def run(self) -> None:
        """Launch on the stream of the tensors' device; a grid without programs is no launch."""
        if self.programs == 0:
            return
        tensor = next(a for a in self.arguments.values() if isinstance(a, Tensor))
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            # Fused multiply-adds are asked for by name: Triton 3.10 turns them off by default.
            self.kernel[(self.programs,)](
                **self.arguments, **self.constants, num_warps=self.warps, num_stages=1, enable_fp_fusion=True
            )


def bits(value: float) -> int:
    """A float64 as the 64-bit integer with the same bits."""
    return struct.unpack("<q", struct.pack("<d", value))[0]
