"""Where and with what a result was measured."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from coverfast.disk import write_atomically


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
