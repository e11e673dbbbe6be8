"""Time and memory of one call, on a CPU or a GPU."""

from __future__ import annotations

import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], object]

# --- time --------------------------------------------------------------------------------------------------------


def timed(calls: Mapping[str, Run], repeats: int, device: str, notes: dict[str, str]) -> dict[str, list[float]]:
    """Milliseconds of every call, in turn so that a slow moment of the machine meets all of them.

    On a GPU by device events, the L2 cache flushed before every run. What raises gets a note and no times.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    once = _event_ms if device == "cuda" else _clock_ms
    for turn in range(-3 if device == "cuda" else -1, repeats):
        for name, call in calls.items():
            if name in notes:
                continue
            try:
                taken = once(call)
            except Exception as error:
                notes[name] = reason(error)
                continue
            if turn >= 0:  # before that it is warming up
                found[name].append(taken)
    return {name: times for name, times in found.items() if name not in notes}


def _clock_ms(call: Run) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _event_ms(call: Run) -> float:
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


@cache
def copy_rate(device: str) -> float:
    """Bytes a millisecond, read and written, that a copy moves on this device."""
    source = torch.zeros(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(timed({"": lambda: target.copy_(source)}, 10, device, {})[""])


def reason(error: Exception) -> str:
    """Why a variant has no times, in one line; memory that it still held is given back."""
    if torch.cuda.is_available():
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
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


def process_growth(job: Callable[..., float], *arguments: Any, repeats: int = 3) -> float:
    """What `job(*arguments)` returns in a fresh process, median of `repeats`; all of it must pickle.

    For growths of the resident high-water mark. Freed memory must leave the process at once for the mark to mean
    anything, hence the threshold.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", "import pickle, sys; job, a = pickle.load(sys.stdin.buffer); print(job(*a))"]
    given = pickle.dumps((job, arguments))
    found = []
    for _ in range(repeats):
        done = subprocess.run(command, env=environment, input=given, capture_output=True)
        if done.returncode:
            said = done.stderr.decode().strip().splitlines() or [f"ended by signal {-done.returncode}"]
            raise RuntimeError(f"in a fresh process: {said[-1]}")
        found.append(float(done.stdout))
    return statistics.median(found)


def high_water_mark() -> float:
    """Largest resident size of this process so far, in MB (Linux).

    Not `getrusage`: its mark begins with that of the parent process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
