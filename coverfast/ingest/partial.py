"""`OUT.partial/`: what an unfinished build has done, kept by one builder at a time.

    lock               held by the builder that is at work
    workers            held by each of its processes, which may outlive it for a moment
    settings.json      what shapes the result; other settings do not resume what is finished
    ab/ab01....h5      pieces: finished samples, a shard of one each
    shard-00000.h5     finished shards without their names yet
    publish.json       there once all of them are: which file gets which name, and the report

Until publish.json is there, the names belong to what was before; from then on any run only finishes the renaming.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from coverfast.checks import InputError, require
from coverfast.disk import explained, sync_folder, write_atomically

try:
    import fcntl
except ImportError:  # no such locks on Windows: there, two builds of one shard are the user's to avoid
    fcntl = None  # type: ignore[assignment]

_LOCK, _WORKERS, _SETTINGS, _PUBLISH = "lock", "workers", "settings.json", "publish.json"
# Seconds that a new builder waits for the worker processes of a killed one.
_PATIENCE = 30.0


def existing_targets(out: Path, numbered: bool) -> list[Path]:
    """The files that a build of `out` would be found under: itself, or OUT-00000.h5 and so on, in order."""
    if not numbered:
        return [out] if os.path.lexists(out) else []
    if not out.parent.is_dir():
        return []
    pattern = re.compile(rf"{re.escape(out.stem)}-\d{{5,}}{re.escape(out.suffix)}")
    return sorted(path for path in out.parent.iterdir() if pattern.fullmatch(path.name))


def target_names(out: Path, count: int, numbered: bool) -> list[str]:
    """The names of `count` shards of a build of `out`."""
    return [f"{out.stem}-{i:05d}{out.suffix}" for i in range(count)] if numbered else [out.name]


class Partial:
    """The partial folder of `out`, locked while the block runs, with temporaries of an earlier run swept away.

    settings: a JSON-able dict. restart: forget what is there. Leaving the block removes a folder without pieces.
    `InputError`: another builder holds it, it has samples finished with other settings, or it cannot be written.
    """

    def __init__(self, out: Path, settings: dict[str, Any], *, restart: bool = False) -> None:
        require(not out.is_dir(), f"{out} must be a file name, got a folder")
        self.out, self.folder = out, out.with_name(f"{out.name}.partial")
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._restart = restart

    def __enter__(self) -> Partial:
        with explained(self.folder):
            self._handle = _lock(self.folder)
            try:
                self._check_ours()
                self._wait_for_orphans()
                if self._restart:
                    self._clear()
                self._check_settings()
                self._sweep()
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with explained(self.folder):
            if not self.has_pieces() and not (self.folder / _PUBLISH).exists():
                self._clear()
            self._release()

    def has_pieces(self) -> bool:
        """Whether any sample is finished."""
        return any(self.folder.glob("??/*.h5"))

    @property
    def held_by_workers(self) -> Path:
        """The file that `hold` keeps the next builder out with."""
        return self.folder / _WORKERS

    def piece(self, key: bytes) -> Path:
        """Where the finished sample of that key lies."""
        return self.folder / key.hex()[:2] / f"{key.hex()}.h5"

    def draft(self, number: int) -> Path:
        """Where a finished shard waits for its name."""
        return self.folder / f"shard-{number:05d}.h5"

    def publish(self, names: list[str], stale: list[Path], report: dict[str, Any]) -> None:
        """Give the finished shards their names, all or, after a kill, all when `published` is next called.

        stale: files that are to go, shards of an older build in more parts. report: kept with the plan.
        """
        drafts = {self.draft(number).name: name for number, name in enumerate(names)}
        plan = {"shards": drafts, "stale": [path.name for path in stale], "report": report}
        write_atomically(self.folder / _PUBLISH, json.dumps(plan))
        self.published()

    def published(self) -> dict[str, Any] | None:
        """Finish a publication that was decided on and remove the folder; its report, None if there is none."""
        with explained(self.out):
            try:
                plan = json.loads((self.folder / _PUBLISH).read_bytes())
            except FileNotFoundError:
                return None
            for draft, name in plan["shards"].items():
                target = self.out.with_name(name)
                if (self.folder / draft).exists():
                    (self.folder / draft).replace(target)
                require(
                    target.exists(),
                    f"{target} was published by the build in {self.folder} and must be there, found nothing; "
                    "restart=True (--restart) builds anew",
                )
            for name in plan["stale"]:
                self.out.with_name(name).unlink(missing_ok=True)
            sync_folder(self.out.parent)
            self._clear()
        report: dict[str, Any] = plan["report"]
        return report

    def _check_ours(self) -> None:
        strange = [p.name for p in self.folder.iterdir() if p.name not in (_LOCK, _WORKERS) and p.name[0] != "."]
        require(
            not strange or (self.folder / _SETTINGS).exists(),
            f"{self.folder} must be the folder of a build, got one with {min(strange, default='')}",
        )

    def _wait_for_orphans(self) -> None:
        handle, end = os.open(self.held_by_workers, os.O_RDWR | os.O_CREAT, 0o666), time.monotonic() + _PATIENCE
        try:
            while not _flock(handle, exclusive=True):
                require(
                    time.monotonic() < end,
                    f"{self.folder} must be left by the processes of a killed build, some are on",
                )
                time.sleep(0.02)
        finally:
            os.close(handle)

    def _check_settings(self) -> None:
        path = self.folder / _SETTINGS
        # Where nothing is finished, as when a build was killed at once, nothing is lost either.
        if not path.exists() or not (self.has_pieces() or (self.folder / _PUBLISH).exists()):
            write_atomically(path, json.dumps(self._settings, indent=1))
            return
        try:
            old = json.loads(path.read_bytes())
        except ValueError:
            old = {}
        for key in sorted(old.keys() | self._settings.keys()):
            before, now = (json.dumps(settings.get(key)) for settings in (old, self._settings))
            require(
                before == now,
                f"{self.folder} holds an unfinished build with {key} = {before}, got {key} = {now}; repeat it to "
                "resume, or restart=True (--restart) forgets it",
            )

    def _sweep(self) -> None:
        """Remove temporaries, which start with a dot, and shards of an assembly that was not finished."""
        finished = (self.folder / _PUBLISH).exists()
        for here, _, files in os.walk(self.folder):
            for name in files:
                if name.startswith(".") or (name.startswith("shard-") and not finished):
                    Path(here, name).unlink(missing_ok=True)

    def _clear(self) -> None:
        # What decides how a rerun goes on comes last: it must be there as long as anything else is.
        last = (_PUBLISH, _SETTINGS, _LOCK)
        for path in [p for p in self.folder.iterdir() if p.name not in last]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for name in last[:2]:
            (self.folder / name).unlink(missing_ok=True)

    def _release(self) -> None:
        with contextlib.suppress(OSError):  # the next builder may be in already
            if not (self.folder / _SETTINGS).exists():
                self.held_by_workers.unlink(missing_ok=True)
                (self.folder / _LOCK).unlink()
                self.folder.rmdir()
        os.close(self._handle)


def hold(path: Path) -> None:
    """Keep the next builder out of the folder of `path`, a `held_by_workers`, until this process ends."""
    _flock(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), exclusive=False)


def _flock(handle: int, *, exclusive: bool) -> bool:
    """Lock an open file, or say that another process has; a file system without locks has none."""
    if fcntl is not None:
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
    return True


def _lock(folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another builder has just finished and removed it
            continue
        if not _flock(handle, exclusive=True):
            os.close(handle)
            raise InputError(f"{folder} must have one builder at a time, another one is at work in it")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), (folder / _LOCK).stat()):
                return handle
        os.close(handle)
