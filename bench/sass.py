"""Compile a launch ahead of time and read the machine code: what `coverfast bench static` counts."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from coverfast.kernels.launch import ARCHITECTURES, Launch

#: Address and text of every instruction.
Lines = list[tuple[int, str]]


def compile_launch(launch: Launch, target: str) -> Any:
    """The kernel of a launch as the launcher itself compiles it, bound to the launch's arguments, for a GPU that is
    not there. For a process that runs no kernels.
    """
    from triton.runtime import driver

    driver.set_active(_Absent(target))
    options = {"num_warps": launch.warps, "num_stages": 1, "enable_fp_fusion": True}
    return launch.kernel.warmup(**launch.arguments, **launch.constants, **options, grid=(launch.programs,))


class _Absent:
    """As much of a driver as the launcher asks when it only compiles."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        nvidia = target.startswith("sm_")
        self.target = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
        self.device = list(ARCHITECTURES).index(target)  # the launcher keeps kernels by device

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(compiled: Any, target: str) -> tuple[int, int]:
    """Registers and bytes spilled, a lane."""
    if not target.startswith("sm_"):
        text = compiled.asm["amdgcn"]
        names = (r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)")
        registers, spills = (int(re.findall(name, text)[0]) for name in names)
        return registers, spills
    found = re.search(r"REG:(\d+) STACK:(\d+)", _dump(compiled, "--dump-resource-usage"))
    assert found is not None
    return int(found[1]), int(found[2])


def instructions(compiled: Any) -> Lines:
    """The machine code of an NVIDIA kernel, the padding behind its end left out."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", _dump(compiled, "-sass"), re.M)
    return [(int(at, 16), text) for at, text in found if text != "NOP"]


def _dump(compiled: Any, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def global_loads(lines: Lines) -> str:
    """Widths in bits of the loads from global memory, and how many of each."""
    widths = [m[1] or "32" for _, text in lines if (m := re.search(r"\bLDG\.E(?:\.U?(\d+))?", text))]
    return ", ".join(f"{widths.count(w)} x {w}" for w in sorted(set(widths), key=int, reverse=True))


def innermost(lines: Lines, taps: int, radius_y: int, rows: int) -> tuple[float, float, str]:
    """Instructions a tap of the smallest loop that holds the loads of keys (or queries), and the loads' widths.

    Forward branches inside it skip the work of a query whose window does not reach the row at hand. Of the
    `window_y + rows - 1` rows that a lane walks over, each query uses `window_y`; the second number counts them all.
    """
    branches = [(a, int(m[1], 16)) for a, text in lines if (m := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text))]
    loops = [(to, at) for at, to in branches if to < at]
    loops = [(s, e) for s, e in loops if any("LDG" in text for a, text in lines if s <= a <= e)]
    start, end = min(loops, key=lambda loop: loop[1] - loop[0])
    body = [(a, text) for a, text in lines if start <= a <= end]
    skipped = [(at, to) for at, to in branches if start <= at < to <= end]
    guarded = sum(any(at < a < to for at, to in skipped) for a, _ in body)
    share = (2 * radius_y + 1) / (2 * radius_y + rows)
    return len(body) / taps, ((len(body) - guarded) / share + guarded) / taps, global_loads(body)
