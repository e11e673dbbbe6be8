"""Time and memory of one call, and where it was measured."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def interleaved(variants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every variant, run in turn so that a slow moment of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for _ in range(repeats):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_growth(module: str, arguments: list[str], repeats: int = 3) -> float:
    """Growth in MB of the resident high-water mark that a fresh process reports; median of `repeats`.

    `python -m module arguments` prints the number. Freed memory must leave the process at once for the mark to mean
    anything, hence the threshold.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", module, *arguments]
    runs = [
        float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    return statistics.median(runs)


def high_water_mark() -> float:
    """Largest resident size of this process so far, in MB (Linux).

    Not `getrusage`: its mark begins with that of the parent process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def where() -> str:
    """Device, threads and versions, for the head of a table."""
    name = platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"CPU {name}, {torch.get_num_threads()} threads, {versions}"
