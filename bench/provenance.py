"""Where and with what a result was measured."""

from __future__ import annotations

import json
import platform
import re
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
        facts |= {"device": f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}
        facts |= {"threads": torch.get_num_threads()}
    return facts


def folder_of(facts: dict[str, Any]) -> str:
    """The name of the folder for what was measured on that device: "nvidia-h200", "cpu-x86-64-2-threads"."""
    if "threads" in facts:
        return f"{_slug(facts['device'].rpartition(' ')[0])}-{facts['threads']}-threads"
    return _slug(facts["device"])


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def write_results(path: Path, bench: str, rows: Sequence[Any], device: str | None = None, **more: Any) -> None:
    """Which benchmark, where and with what, and the rows that it gave, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"bench": bench, "provenance": provenance(device), **more, "rows": rows}
    write_atomically(path, json.dumps(found, indent=1) + "\n")


def _commit() -> str:
    here = Path(__file__).resolve().parent
    commit = _output(["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"])
    # Results that are just being replaced change nothing that is measured.
    others = ["--", ":/", ":(exclude,top)bench/results", ":(exclude,top)bench/RESULTS.md"]
    changed = _output(["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no", *others])
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
