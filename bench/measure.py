"""Time and memory of one call, and where it was measured."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from coverfast.disk import write_atomically


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


def provenance(device: str | None = None) -> dict[str, Any]:
    """What a result must say of itself: device, driver, versions, commit and command."""
    facts: dict[str, Any] = {"command": shlex.join(["coverfast", *sys.argv[1:]]), "commit": _commit()}
    facts |= {"torch": torch.__version__, "python": platform.python_version(), "triton": _version("triton")}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        facts |= {"device": properties.name, "processors": properties.multi_processor_count}
        facts |= {"cuda": torch.version.cuda, "driver": _output(query) or "unknown"}
    elif device == "cpu":
        facts |= {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    return facts


def write_results(path: Path, rows: Sequence[Any], device: str | None = None) -> None:
    """Rows and their provenance as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"provenance": provenance(device), "rows": rows}, indent=1) + "\n"
    write_atomically(path, text)


def _commit() -> str:
    here = Path(__file__).resolve().parent
    commit = _output(["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"])
    changed = _output(["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"])
    return (commit or "unknown") + (" with changes" if changed else "")


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def where() -> str:
    """Device, threads and versions, for the head of a table."""
    name = platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"CPU {name}, {torch.get_num_threads()} threads, {versions}"
