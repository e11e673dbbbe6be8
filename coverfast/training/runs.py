"""The run folder: resolved configuration, metrics, checkpoints, results."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import subprocess
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from coverfast.checks import InputError, require
from coverfast.disk import explained, write_atomically
from coverfast.training.checkpoints import Checkpoints
from coverfast.training.config import read_toml, to_toml
from coverfast.training.settings import S, TrainingSettings, resolve


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
    def network(self) -> Path:
        """The backbone with the head of a task."""
        return self.folder / "network.safetensors"

    @property
    def report(self) -> Path:
        """Folder of the pictures; its `index.html` shows them."""
        return self.folder / "report"

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints")

    # --- configuration ---

    @classmethod
    def create(cls, settings: TrainingSettings, provenance: Mapping[str, Any]) -> Run:
        """A new run folder with its configuration; refuses a folder that holds anything."""
        name = settings.run or f"runs/{datetime.now():%Y%m%d-%H%M%S}-{settings.label}"
        run = cls(Path(name))
        check_new_folder(name)
        new = not run.folder.exists()
        with explained(run.folder):
            run.folder.mkdir(parents=True, exist_ok=True)
        try:
            run.write_config(settings, {"provenance": provenance})
        except InputError:
            if new:
                run.folder.rmdir()
            raise
        return run

    def write_config(self, settings: TrainingSettings, tables: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the resolved settings and tables of versions, commit and data hash."""
        write_atomically(self.config, to_toml(settings, tables=tables))

    @classmethod
    def open(cls, folder: str, kind: type[S]) -> tuple[Run, S, dict[str, dict[str, Any]]]:
        """An existing run, its settings and the other tables of its configuration."""
        require(bool(folder), "run must name the folder to resume, got none; use --run DIR")
        run = cls(Path(folder))
        require(run.config.is_file(), f"run must be a folder with config.toml, but {run.config} does not exist")
        _check_kind(run.config, kind.kind)
        values, tables = read_toml(run.config, kind)
        return run, resolve(str(values.get("preset", "")), values, kind=kind), tables

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While entered, no other process on this machine can train the run."""
        if fcntl is None:
            yield
            return
        with explained(self.folder):
            file = (self.folder / ".lock").open("a")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"run must be trained by one process, but another one trains {self.folder}") from None
            yield

    def clean(self, last: int) -> None:
        """Drop what a resumed run after iteration `last` writes anew, and what a kill left half-written."""
        self.checkpoints.set_aside(last)
        for folder in (self.folder, self.checkpoints.folder, self.report):
            for left in folder.glob(".*.partial"):
                left.unlink(missing_ok=True)
        self.cut_metrics(last)

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

    def append_metrics(self, records: Iterable[Mapping[str, float]]) -> None:
        """Add a line a record, all of them or none; a number that is not finite becomes null, so that it is JSON."""
        plain = ({k: v if math.isfinite(v) else None for k, v in record.items()} for record in records)
        text = "".join(json.dumps(record) + "\n" for record in plain)
        with explained(self.metrics), self.metrics.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                written = file.write(text.encode())
                if written != len(text.encode()):  # the disk took a part of it
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)
                raise


def _check_kind(config: Path, kind: str) -> None:
    try:
        found = tomllib.loads(config.read_text(encoding="utf-8"))["provenance"].get("kind", "pretraining")
    except (OSError, ValueError, KeyError, AttributeError):  # reading it says what is wrong
        return
    require(found == kind, f"run must be a {kind}, but {config.parent} is a {found}")


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
