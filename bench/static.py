"""What the compiler makes of the kernels, without a GPU: registers, spills, instructions.

Deterministic, and good for comparing variants of a kernel; not a timing. Compiled are the launches that training would
run, planned on tensors without memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from coverfast.bench.operators import CASES
from coverfast.bench.plans import LAUNCHES
from coverfast.bench.problems import preset_levels
from coverfast.bench.sass import compile_launch, global_loads, innermost, instructions, resources
from coverfast.checks import check_choice, require
from coverfast.kernels import INTERPRETED
from coverfast.kernels.launch import ARCHITECTURES, Architecture, Launch
from coverfast.ops.dispatch import KERNELS

PRESETS = ("paper-2d", "paper-3d")


def planned(op: str, preset: str, dtype: torch.dtype, on: Architecture) -> Iterator[tuple[str, Launch]]:
    """The launches of an operator in one training step of a preset, with the names of their levels."""
    for case in CASES[op](preset_levels(preset), "channels_last"):
        for launch in LAUNCHES[op](case, case.make("meta", dtype, None, 0), on):
            yield case.name, launch


# --- table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What one kernel specialisation compiled to. None: has no such thing, or not counted for this target."""

    op: str
    kernel: str
    flags: tuple[str, ...]  # what sets it apart from others of its name
    target: str
    levels: tuple[str, ...]  # that run it
    dtype: str
    rows: int | None  # that a lane serves together
    taps: int | None  # of a pass
    tile: int | None  # pixels along x
    lanes: int | None  # that share a pixel
    warps: int
    registers: int
    spills: int  # bytes a lane
    shared: int  # bytes a program
    body: int | None  # instructions of the whole kernel
    a_tap: float | None  # instructions of the innermost loop over the taps of one pass
    executed: float | None  # the same with the rows at both ends of a lane's walk, which serve fewer queries
    loads: str | None  # widths in bits of the loads in that loop, or of all, and how many


_FLAGS = ("FIELD", "FIXED", "DENSE", "NOISE", "ADJUST")


def measure(launch: Launch, op: str, target: str, levels: tuple[str, ...], dtype: torch.dtype) -> Row:
    """Compile a launch and read what came of it."""
    compiled, c = compile_launch(launch, target), launch.constants
    registers, spills = resources(compiled, target)
    body: int | None = None
    loop: tuple[float | None, float | None, str | None] = None, None, None
    if target.startswith("sm_"):
        lines = instructions(compiled)
        body, loop = len(lines), (None, None, global_loads(lines))
        if "TAPS" in c:  # a loop over the taps of a window
            taps = c["ROWS"] * (c["WINDOW_X"] or c["TAPS"])
            loop = innermost(lines, taps, int(launch.arguments["radius_y"]), c["ROWS"])  # type: ignore[arg-type]
    name = launch.kernel.__name__.removesuffix("_kernel")
    shape = c["ROWS"] if "TAPS" in c else None, c.get("TAPS"), c.get("TILE", c.get("TILE_X")), c.get("LANES")
    used = registers, spills, compiled.metadata.shared
    flags = tuple(str(c[flag] if flag == "FIELD" else flag.lower()) for flag in _FLAGS if c.get(flag))
    return Row(op, name, flags, target, levels, str(dtype)[6:], *shape, launch.warps, *used, body, *loop)


def table(
    presets: Sequence[str] = PRESETS,
    targets: Sequence[str] = tuple(ARCHITECTURES),
    dtype: torch.dtype = torch.bfloat16,
    ops: Sequence[str] = (),
) -> list[Row]:
    """Every kernel specialisation that the operators run in the presets, compiled for every target."""
    require(bool(KERNELS), "bench static compiles Triton kernels, but the package triton is not installed")
    require(not INTERPRETED, "bench static compiles kernels and cannot with TRITON_INTERPRET set; unset it")
    for target in targets:
        check_choice("target", target, tuple(ARCHITECTURES))
    for op in ops:
        check_choice("op", op, tuple(LAUNCHES))
    jobs: dict[tuple[Any, ...], tuple[str, str, int, list[str]]] = {}
    for target in targets:
        for op in ops or LAUNCHES:
            for preset in presets:
                for index, (level, launch) in enumerate(planned(op, preset, dtype, ARCHITECTURES[target])):
                    job = jobs.setdefault((target, *_specialisation(launch)), (op, preset, index, []))
                    if level not in job[-1]:
                        job[-1].append(level)
    # Fresh processes: a forked one may inherit a lock that a thread of this one held.
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), get_context("spawn")) as pool:
        futures = [pool.submit(_measure, key[0], dtype, *job) for key, job in jobs.items()]
        return [future.result() for future in futures]


def _measure(target: str, dtype: torch.dtype, op: str, preset: str, index: int, levels: list[str]) -> Row:
    _, launch = next(islice(planned(op, preset, dtype, ARCHITECTURES[target]), index, None))
    return measure(launch, op, target, tuple(levels), dtype)


def _specialisation(launch: Launch) -> tuple[Any, ...]:
    """What a compiled kernel depends on, but for strides that Triton may specialise."""
    dtypes = tuple(value.dtype for value in launch.arguments.values() if isinstance(value, Tensor))
    return launch.kernel.__name__, launch.warps, dtypes, str(launch.constants)


def merged(levels: Sequence[str]) -> str:
    """The levels "paper-2d level 0", "paper-2d level 1", "paper-3d level 4" as "2d 0, 1; 3d 4"."""
    presets: dict[str, list[str]] = {}
    for name in dict.fromkeys(levels):
        preset, _, level = name.partition(" level ")
        presets.setdefault(preset.removeprefix("paper-"), []).append(level)
    return "; ".join(f"{preset} {', '.join(numbers)}" for preset, numbers in presets.items())
