"""What the compiler makes of the kernels, without a GPU: registers, spills, instructions a tap.

Deterministic, and good for comparing variants of a kernel; not a timing. Compiled are the launches that training would
run, planned on tensors without memory.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coverfast.bench.problems import Problem, preset_problems
from coverfast.checks import check_choice, require
from coverfast.kernels import INTERPRETED
from coverfast.kernels.launch import ARCHITECTURES, Launch
from coverfast.ops import mov as op
from coverfast.ops.dispatch import KERNELS

PRESETS = ("paper-2d", "paper-3d")
_NAMES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
}  # fmt: skip


def launches(problem: Problem, dtype: torch.dtype, target: str) -> Iterator[Launch]:
    """The launches of one forward and backward on channels-last maps."""
    from coverfast.kernels import mov as kernels

    q = torch.empty(problem.shape, dtype=dtype, device="meta")
    q = q.to(memory_format=torch.channels_last if q.ndim == 4 else torch.channels_last_3d)
    window, groups, on = problem.window, problem.groups, ARCHITECTURES[target]
    outputs = op._new_outputs(q, groups)
    yield kernels.forward_launch(q, q, *outputs, window, groups, 1.0, on)
    gradients = op._gradient_like(q), op._gradient_like(q)
    grad = torch.empty_like(outputs[0])
    yield from kernels.backward_launches(grad, q, q, *outputs, *gradients, window, groups, 1.0, on)


@dataclass(frozen=True)
class Row:
    """What one kernel specialisation compiled to. None: not counted for this target."""

    kernel: str
    target: str
    levels: str
    dtype: str
    shape: str  # of the launch: rows x taps, tile x lanes, warps
    registers: int
    spills: int  # bytes a lane
    shared: int  # bytes a program
    a_tap: float | None  # instructions of the innermost loop over the taps of one pass
    executed: float | None  # the same with the rows at both ends of a lane's walk, which serve fewer queries
    loads: str | None  # widths in bits of the loads in that loop, and how many


def compile_launch(launch: Launch, target: str) -> Any:
    """The kernel of a launch, compiled ahead of time as the launcher would for pointers aligned to 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes, constants = {}, {}, dict(launch.constants)
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.constants[name] if name in constants else launch.arguments[name]
        if name in constants or (name in launch.unit and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[index,] = f"*{_NAMES[value.dtype]}", [["tt.divisibility", 16]]
        else:
            signature[name] = "i64" if name == "scale" or value >= 2**31 else "i32"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    options = {"num_warps": launch.warps, "num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=gpu, options=options)


def measure(launch: Launch, target: str, levels: str) -> Row:
    """Compile a launch and read what came of it."""
    compiled, c = compile_launch(launch, target), launch.constants
    a_tap: float | None = None
    executed: float | None = None
    loads: str | None = None
    if target.startswith("sm_"):
        usage, assembly = _dump(compiled.asm["cubin"], "--dump-resource-usage"), _dump(compiled.asm["cubin"], "-sass")
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None
        registers, spills = int(found[1]), int(found[2])
        taps = c["ROWS"] * (c["WINDOW_X"] or c["TAPS"])
        a_tap, executed, loads = _innermost(assembly, taps, int(launch.arguments["radius_y"]), c["ROWS"])  # type: ignore[arg-type]
    else:
        text = compiled.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
        spills = int(re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)[0])
    shape = f"{c['ROWS']}x{c['TAPS']} {c['TILE']}x{c['LANES']} {launch.warps}"
    dtype = str(launch.arguments["q"].dtype).removeprefix("torch.")  # type: ignore[union-attr]
    name = launch.kernel.__name__.removesuffix("_kernel")
    return Row(
        name, target, levels, dtype, shape, registers, spills, compiled.metadata.shared, a_tap, executed, loads
    )  # fmt: skip


def _dump(cubin: bytes, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _innermost(assembly: str, taps: int, radius_y: int, rows: int) -> tuple[float, float, str]:
    """Instructions a tap of the smallest loop that holds the loads of keys (or queries), and the loads' widths.

    Forward branches inside it skip the work of a query whose window does not reach the row at hand. Of the
    `window_y + rows - 1` rows that a lane walks over, each query uses `window_y`.
    """
    lines = [(int(a, 16), text) for a, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", assembly, re.M)]
    branches = [(a, int(m[1], 16)) for a, text in lines if (m := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text))]
    loops = [(to, at) for at, to in branches if to < at]
    loops = [(s, e) for s, e in loops if any("LDG" in text for a, text in lines if s <= a <= e)]
    start, end = min(loops, key=lambda loop: loop[1] - loop[0])
    body = [(a, text) for a, text in lines if start <= a <= end]
    skipped = [(at, to) for at, to in branches if start <= at < to <= end]
    guarded = sum(any(at < a < to for at, to in skipped) for a, _ in body)
    share = (2 * radius_y + 1) / (2 * radius_y + rows)
    widths = [m[1] or "32" for _, text in body if (m := re.search(r"\bLDG\.E(?:\.U?(\d+))?", text))]
    loads = ", ".join(f"{widths.count(w)} x {w}" for w in sorted(set(widths), key=int, reverse=True))
    return len(body) / taps, ((len(body) - guarded) / share + guarded) / taps, loads


def table(
    presets: Sequence[str] = PRESETS, targets: Sequence[str] = tuple(ARCHITECTURES), dtype: torch.dtype = torch.bfloat16
) -> list[Row]:
    """Every kernel specialisation that the presets use, compiled for every target."""
    require("mov" in KERNELS, "bench static compiles Triton kernels, but the package triton is not installed")
    require(not INTERPRETED, "bench static compiles kernels and cannot with TRITON_INTERPRET set; unset it")
    for target in targets:
        check_choice("target", target, tuple(ARCHITECTURES))
    jobs: dict[tuple[Any, ...], tuple[Problem, int, str, list[str]]] = {}
    for target in targets:
        for preset in presets:
            for problem in preset_problems(preset):
                for index, launch in enumerate(launches(problem, dtype, target)):
                    key = (target, index, launch.warps, str(launch.constants))
                    jobs.setdefault(key, (problem, index, target, []))[3].append(problem.name)
    # Fresh processes: a forked one may inherit a lock that a thread of this one held.
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), get_context("spawn")) as pool:
        futures = [pool.submit(_measure, p, dtype, i, target, _short(names)) for p, i, target, names in jobs.values()]
        return [future.result() for future in futures]


def _measure(problem: Problem, dtype: torch.dtype, index: int, target: str, levels: str) -> Row:
    return measure(list(launches(problem, dtype, target))[index], target, levels)


def _short(names: list[str]) -> str:
    levels: dict[str, list[str]] = {}
    for name in names:
        preset, _, level = name.rsplit(" ", 2)
        levels.setdefault(preset, []).append(level)
    return "; ".join(f"{preset} {', '.join(numbers)}" for preset, numbers in levels.items())
