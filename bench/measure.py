"""Time and memory of one call, on a CPU or a GPU."""

from __future__ import annotations

import os
import pickle
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Run = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

# --- time --------------------------------------------------------------------------------------------------------


#: Milliseconds of warming up that are enough.
WARM = 1e3


@dataclass(frozen=True)
class Elsewhere:
    """A run in another process, which measures its milliseconds itself."""

    ms: Callable[[], float]

    def __call__(self) -> float:
        return self.ms()


def timed(
    calls: Mapping[Name, Run], repeats: int, device: str, notes: dict[Name, str], seconds: float = inf
) -> dict[Name, list[float]]:
    """Milliseconds of every call, in turn so that a slow moment of the machine meets all of them, and every turn in
    another order so that none always follows the same one.

    On a GPU by device events, the L2 cache flushed before every run. What raises gets a note and no times. A call whose
    runs have taken `seconds` is not run again.
    """
    found: dict[Name, list[float]] = {name: [] for name in calls}
    once = event_ms if device == "cuda" else clock_ms
    order, shuffle, warmed = list(calls), random.Random(0).shuffle, dict.fromkeys(calls, 0.0)
    for turn in range(-3 if device == "cuda" else -1, repeats):
        shuffle(order)
        for name in order:
            if name in notes or sum(found[name]) >= 1e3 * seconds or (turn < 0 and warmed[name] >= WARM):
                continue
            try:
                call = calls[name]
                taken = call() if isinstance(call, Elsewhere) else once(call)
            except Exception as error:
                notes[name] = reason(error)
                continue
            if turn >= 0:
                found[name].append(taken)
            else:
                warmed[name] += taken
    return {name: times for name, times in found.items() if name not in notes}


def clock_ms(call: Run) -> float:
    """Of one run, by the clock."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def event_ms(call: Run) -> float:
    """Of one run, by the events of the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush().zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


@cache
def _flush() -> Tensor:
    """More than any L2 cache holds."""
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def captured(call: Run) -> Run:
    """`call` as a CUDA graph, captured when it first runs."""
    graph = torch.cuda.CUDAGraph()

    @cache
    def capture() -> None:
        before, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(before)
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        before.wait_stream(side)
        try:
            with torch.cuda.graph(graph):
                call()
        except BaseException:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own stream current
            raise

    def replay() -> None:
        capture()
        graph.replay()

    return replay


def reason(error: Exception) -> str:
    """Why a variant has no times, in one line; memory that it still held is given back."""
    if torch.cuda.is_available():
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
    if isinstance(error, NoRoom):
        return str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "does not fit: out of the GPU's memory"
    return f"does not run: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


# --- memory ------------------------------------------------------------------------------------------------------


def device_growth(run: Run) -> float:
    """MB that a run allocates on the GPU at its peak, beyond what is there before it."""
    run()  # what a first call keeps (a compiled module, a workspace) is not the call's memory
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


class NoRoom(Exception):
    """A call that needs more memory or time than there is; its message is a note."""


def process_growth(job: Callable[..., float], *arguments: Any, repeats: int = 3, seconds: float = inf) -> float:
    """What `job(*arguments)` returns in a fresh process, median of `repeats`; all of it must pickle.

    For growths of the resident high-water mark. Freed memory must leave the process at once for the mark to mean
    anything, hence the threshold. The process may use nine tenths of the memory that is available, and no more than
    `seconds` beyond what it needs to begin: `NoRoom` says which it was.
    """
    # It finds what this process finds: a job may come from anybody's script.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    # Where there is a GPU its driver reserves addresses without end, which the limit would count.
    limit = -1 if torch.cuda.is_available() else int(0.9 * available_memory())
    given = pickle.dumps((job, arguments))
    found: list[float] = []
    for _ in range(repeats):
        begun = time.perf_counter()
        command, allowed = [sys.executable, "-c", _CHILD, str(limit)], None if seconds == inf else _BEGINS + seconds
        try:
            done = subprocess.run(command, env=environment, input=given, capture_output=True, timeout=allowed)
        except subprocess.TimeoutExpired:
            raise NoRoom(f"not run: takes more than {seconds:.0f} s") from None
        if done.returncode:
            said = done.stderr.decode().strip().splitlines() or [f"ended by signal {-done.returncode}"]
            if "not enough memory" in said[-1] or said[-1].startswith("MemoryError") or "allocate memory" in said[-1]:
                raise NoRoom(f"does not fit in {limit / 1e9:.1f} GB")
            raise RuntimeError(f"in a fresh process: {said[-1]}")
        found.append(float(done.stdout))
        if time.perf_counter() - begun > 2 * _BEGINS:  # the growth of a long run varies little
            break
    return statistics.median(found)


#: Seconds that a process may need to import everything.
_BEGINS = 15.0
_CHILD = """
import pickle, resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
job, arguments = pickle.load(sys.stdin.buffer)
print(job(*arguments))
"""


def available_memory() -> int:
    """Bytes of memory that a process can still get without swapping (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


def total_memory(device: str) -> int:
    """Bytes of memory of a GPU, or those of the host that are available."""
    return torch.cuda.get_device_properties(0).total_memory if device == "cuda" else available_memory()


def high_water_mark(*, reset: bool = False) -> float:
    """Largest resident size of this process so far, or since the last `reset`, in MB (Linux).

    Not `getrusage`: its mark begins with that of the parent process, and stays.
    """
    if reset:
        with suppress(OSError):  # a sandbox may forbid it: the mark then stays, and small growths are not seen
            Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
