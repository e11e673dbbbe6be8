"""What the compiler makes of the kernels, without a GPU: registers, spills, instructions.

Deterministic, and good for comparing variants of a kernel; not a timing. Compiled are the launches that training would
run, planned on tensors without memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, product
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from coverfast.bench.operators import CASES
from coverfast.bench.plans import LAUNCHES
from coverfast.bench.problems import Level, preset_levels, pyramid_levels
from coverfast.bench.sass import compile_launch, global_loads, innermost, instructions, resources
from coverfast.checks import InputError, check_choice, require
from coverfast.kernels import INTERPRETED
from coverfast.kernels.launch import ARCHITECTURES, Architecture, Launch, override
from coverfast.ops.dispatch import KERNELS

PRESETS = ("paper-2d", "paper-3d")


#: The name of a preset, or the finest grid of a pyramid that is otherwise the paper's.
Place = str | tuple[int, ...]
#: Launch numbers other than those of the rules, by name: see `coverfast.kernels.launch.override`.
Numbers = tuple[tuple[str, int], ...]
_NUMBERS = ("rows", "taps", "tile", "tile_y", "warps")


def levels_of(place: Place) -> list[Level]:
    """The levels of one training step."""
    if isinstance(place, str):
        return preset_levels(place)
    like = preset_levels(f"paper-{len(place)}d")[-1]
    image = tuple(-(-s * i // whole) for s, i, whole in zip(place, like.image, like.size, strict=True))
    return pyramid_levels("x".join(map(str, place)), like.batch, place, like.window, image=image)


def launch_numbers(text: str) -> Numbers:
    """`rows=1,taps=5`, checked."""
    found = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        fits = name in _NUMBERS and value.isdecimal() and 1 <= int(value) <= 1024
        require(fits, f"against must be numbers of {', '.join(_NUMBERS)}, as rows=1,taps=5, up to 1024, got {text!r}")
        found[name] = int(value)
    for name in ("tile", "tile_y", "warps"):
        require(found.get(name, 1).bit_count() == 1, f"{name} must be a power of two, got {found.get(name)}")
    require(found.get("warps", 1) <= 32, f"warps must be at most 32, got {found.get('warps')}")
    return tuple(found.items())


def planned(
    op: str, place: Place, dtype: torch.dtype, on: Architecture, numbers: Numbers = ()
) -> Iterator[tuple[str, Launch]]:
    """The launches of an operator in one training step of a preset or size, with the names of their levels."""
    with override(**dict(numbers)):
        for case in CASES[op](levels_of(place), "channels_last"):
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
    launch: str  # "rules", or the numbers given instead of theirs
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


_FLAGS = ("FIELD", "FIXED", "DENSE", "NOISE", "ADJUST", "TO_THETA", "LAST", "TO_Y")


def measure(
    launch: Launch, op: str, target: str, levels: tuple[str, ...], dtype: torch.dtype, label: str = "rules"
) -> Row:
    """Compile a launch and read what came of it; `label` says whose numbers it has."""
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
    return Row(op, name, flags, target, label, levels, str(dtype)[6:], *shape, launch.warps, *used, body, *loop)


def table(*arguments: Any, **options: Any) -> list[Row]:
    """All of `compiled`."""
    return list(compiled(*arguments, **options))


def compiled(
    places: Sequence[Place] = PRESETS,
    targets: Sequence[str] = tuple(ARCHITECTURES),
    dtype: torch.dtype = torch.bfloat16,
    ops: Sequence[str] = (),
    against: Sequence[str] = (),
) -> Iterator[Row]:
    """Every kernel specialisation that the operators run in presets or sizes, compiled for every target.

    against: launch numbers, see `launch_numbers`; the launches that they change are compiled beside those of the rules.
    """
    require(bool(KERNELS), "bench static compiles Triton kernels, but the package triton is not installed")
    require(not INTERPRETED, "bench static compiles kernels and cannot with TRITON_INTERPRET set; unset it")
    for target in targets:
        check_choice("target", target, tuple(ARCHITECTURES))
    for op in ops:
        check_choice("op", op, tuple(LAUNCHES))
    others = [launch_numbers(text) for text in against]
    jobs: dict[tuple[Any, ...], _Job] = {}
    for target, op, place in product(targets, ops or LAUNCHES, places):
        on, ruled = ARCHITECTURES[target], dict[int, Any]()
        for numbers in ((), *others):
            for index, (level, launch) in enumerate(planned(op, place, dtype, on, numbers)):
                kind = _specialisation(launch)
                if ruled.setdefault(index, kind) == kind and numbers:
                    continue
                job = jobs.setdefault((target, numbers, *kind), _Job(target, dtype, op, place, numbers, index))
                if level not in job.levels:
                    job.levels.append(level)
    for text, numbers in zip(against, others, strict=True):
        changed = any(job.numbers == numbers for job in jobs.values())
        require(changed, f"against must change a launch of {', '.join(ops or LAUNCHES)}, but {text} changes none")
    # Fresh processes: a forked one may inherit a lock that a thread of this one held.
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), get_context("spawn")) as pool:
        yield from pool.map(_Job.run, jobs.values())


@dataclass(frozen=True)
class _Job:
    """One kernel to compile: the `index`-th launch of an operator at a place. It pickles."""

    target: str
    dtype: torch.dtype
    op: str
    place: Place
    numbers: Numbers
    index: int
    levels: list[str] = field(default_factory=list)

    def run(self) -> Row:
        """In a process that runs no kernels."""
        all_launches = planned(self.op, self.place, self.dtype, ARCHITECTURES[self.target], self.numbers)
        _, launch = next(islice(all_launches, self.index, None))
        label = ",".join(f"{name}={value}" for name, value in self.numbers) or "rules"
        try:
            return measure(launch, self.op, self.target, tuple(self.levels), self.dtype, label)
        except Exception as error:
            if not self.numbers:
                raise
            what = f"{launch.kernel.__name__} for {self.target}"
            said = (str(error).splitlines() or [""])[0][:120]
            raise InputError(f"against must be numbers that compile, but {label} fails in {what}: {said}") from None


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
