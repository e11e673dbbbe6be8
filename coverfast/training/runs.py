"""The run folder: resolved configuration, metrics, checkpoints, results."""

from __future__ import annotations

import io
import json
import math
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from coverfast.checks import InputError, require
from coverfast.disk import explained, write_atomically
from coverfast.training.settings import Settings, read_toml, resolve, to_toml

_CHECKPOINT = "coverfast-checkpoint"


@dataclass(frozen=True)
class Run:
    """Paths and files of one run; nothing of it knows a method or a loop."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def backbone(self) -> Path:
        return self.folder / "backbone.safetensors"

    @property
    def picture(self) -> Path:
        return self.folder / "report.png"

    # --- configuration ---

    @classmethod
    def create(cls, settings: Settings, *, data_sha256: str) -> Run:
        """A new run folder with its configuration; refuses a folder that holds anything."""
        name = settings.run or f"runs/{datetime.now():%Y%m%d-%H%M%S}-{settings.preset}"
        run = cls(Path(name))
        check_new_folder(name)
        new = not run.folder.exists()
        with explained(run.folder):
            run.folder.mkdir(parents=True, exist_ok=True)
        try:
            run.write_config(settings, {"provenance": provenance(data_sha256)})
        except InputError:
            if new:
                run.folder.rmdir()
            raise
        return run

    def write_config(self, settings: Settings, tables: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the resolved settings and tables of versions, commit and data hash."""
        write_atomically(self.config, to_toml(settings, tables=tables))

    @classmethod
    def open(cls, folder: str) -> tuple[Run, Settings, dict[str, dict[str, Any]]]:
        """An existing run, its settings and the other tables of its configuration."""
        require(bool(folder), "run must name the folder to resume, got none; use --run DIR")
        run = cls(Path(folder))
        require(run.config.is_file(), f"run must be a folder with config.toml, but {run.config} does not exist")
        values, tables = read_toml(run.config)
        return run, resolve(str(values.get("preset", "")), values), tables

    # --- metrics ---

    def cut_metrics(self, last: int) -> None:
        """Drop the metrics after iteration `last`: a resumed run writes them again."""
        kept = []
        if self.metrics.exists():
            for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    iteration = json.loads(line)["iteration"]
                except (ValueError, KeyError, TypeError):
                    break  # the line that a kill cut short, always the last
                if iteration <= last:
                    kept.append(line + "\n")
        write_atomically(self.metrics, "".join(kept))

    def append_metrics(self, record: Mapping[str, float]) -> None:
        """Add one line; a number that is not finite becomes null, so that every line is JSON."""
        plain = {k: v if math.isfinite(v) else None for k, v in record.items()}
        with explained(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain) + "\n")

    # --- checkpoints ---

    def checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted((self.folder / "checkpoints").glob("iteration-*.pt"))

    def save_checkpoint(self, iteration: int, state: Mapping[str, Any], *, keep: int) -> Path:
        """Write a checkpoint whole, then drop all but the newest `keep`."""
        path = self.folder / "checkpoints" / f"iteration-{iteration:08d}.pt"
        memory = io.BytesIO()  # torch's own writer reports a full disk as a bare RuntimeError
        torch.save({"format": _CHECKPOINT, "version": 1, "iteration": iteration, **state}, memory)
        with explained(path):
            path.parent.mkdir(exist_ok=True)
        # A copy, not a view of the buffer: a view held by the frames of an exception crashes Python 3.12.1 at its end.
        write_atomically(path, memory.getvalue())
        for old in self.checkpoints()[:-keep]:
            old.unlink(missing_ok=True)
        return path

    def load_checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        """The newest checkpoint, or None when the run has none yet. Nothing but tensors and plain values is read."""
        paths = self.checkpoints()
        if not paths:
            return None
        try:
            state = torch.load(paths[-1], map_location=device, weights_only=True)
        except Exception as error:  # a damaged archive fails in many ways
            raise InputError(f"{paths[-1]} must be a checkpoint, but it cannot be read: {error}") from None
        require(
            isinstance(state, dict) and state.get("format") == _CHECKPOINT and state.get("version") == 1,
            f"{paths[-1]} must be a coverfast checkpoint of version 1, but it is none",
        )
        return state


def check_new_folder(name: str) -> None:
    """Refuse a run folder that holds anything; none at all is fine."""
    folder = Path(name)
    with explained(folder):
        if name and folder.exists():
            require(folder.is_dir(), f"run must be a folder, but {folder} is a file")
            require(
                not any(folder.iterdir()),
                f"run must be a new or empty folder, but {folder} holds files; use --resume to continue it",
            )


def provenance(data_sha256: str) -> dict[str, Any]:
    """What the numbers of a run depend on beside its settings."""
    found = {"coverfast": _version("coverfast"), "torch": torch.__version__}
    found |= {name: _version(name) for name in ("triton", "numpy", "h5py", "einops")}
    return found | {
        "python": platform.python_version(),
        "commit": _commit(),
        "threads": torch.get_num_threads(),
        "data_sha256": data_sha256,
        "started": f"{datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Commit of the checkout that the package is imported from; empty for an installed wheel."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
