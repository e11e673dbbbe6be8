"""Checkpoints: whole or not there, with a checksum, and the newest sound one found again."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coverfast.checks import InputError, require
from coverfast.disk import explained, write_atomically

_NAME = re.compile(r"iteration-\d+\.pt")
_FORMAT, _VERSION = "coverfast-checkpoint", 2
# A zip archive, which torch.save writes, may end in a comment, whose length stands before it. Ours holds the SHA-256
# of all that comes before the comment: one file, renamed once, that torch.load reads as it is.
_LABEL = b"sha256:"
_COMMENT = len(_LABEL) + 64
_END, _END_SIZE = b"PK\x05\x06", 22


class Damaged(InputError):
    """A checkpoint that is not as it was written."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run, a file `iteration-N.pt` each."""

    folder: Path

    def paths(self) -> list[Path]:
        """Oldest first."""
        return sorted((p for p in self.folder.glob("iteration-*.pt") if _NAME.fullmatch(p.name)), key=_iteration)

    def set_aside(self, last: int) -> None:
        """Rename what came after iteration `last`: damaged checkpoints, which a resumed run writes anew."""
        for path in self.paths():
            if _iteration(path) > last:
                with explained(path):
                    path.replace(path.with_name(f"{path.name}.damaged"))

    def save(self, iteration: int, state: Mapping[str, Any], *, keep: int, keep_every: int = 0) -> Path:
        """Write a checkpoint whole, then drop all but the newest `keep` and those of every `keep_every` iterations.

        Raises:
            InputError: when it cannot be written; the older ones are then as they were.
        """
        path = self.folder / f"iteration-{iteration:08d}.pt"
        memory = io.BytesIO()  # torch's own writer reports a full disk as a bare RuntimeError
        torch.save({"format": _FORMAT, "version": _VERSION, "iteration": iteration, **state}, memory)
        content = memory.getbuffer()
        content[-2:] = _COMMENT.to_bytes(2, "little")
        digest = hashlib.sha256(content).hexdigest().encode()
        content.release()
        memory.seek(0, io.SEEK_END)
        memory.write(_LABEL + digest)
        with explained(self.folder):
            self.folder.mkdir(exist_ok=True)
        write_atomically(path, memory.getbuffer())
        for old in [p for p in self.paths() if _iteration(p) <= iteration][:-keep]:
            if not (keep_every and _iteration(old) % keep_every == 0):
                with suppress(OSError):  # one too many is no reason to stop
                    old.unlink()
        return path

    def newest(self, device: torch.device) -> tuple[Path, dict[str, Any], list[str]] | None:
        """The newest sound checkpoint with a sentence for every damaged one after it; None when there is none at all.

        Raises:
            InputError: when all are damaged.
        """
        paths, damaged = self.paths(), list[str]()
        for path in reversed(paths):
            try:
                return path, read_checkpoint(path, device), damaged
            except Damaged as error:
                damaged.append(str(error))
        require(not paths, f"one checkpoint must be sound, but none of {len(paths)} is: {'; '.join(damaged)}")
        return None


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """A checkpoint, verified. Nothing but tensors and plain values is read.

    Raises:
        Damaged: when it cannot be read or its checksum is wrong.
        InputError: when it is none of this version.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path} must be a checkpoint, but it cannot be read: {error.strerror or error}") from None
    body, comment = memoryview(content)[:-_COMMENT], content[-_COMMENT:]  # no second copy of gigabytes
    ends = bytes(body[-_END_SIZE:]).startswith(_END)
    sound = ends and comment == _LABEL + hashlib.sha256(body).hexdigest().encode()
    if not sound:
        raise Damaged(f"{path} must be a checkpoint, but its checksum is missing or wrong: it is damaged")
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:  # an archive that is none fails in many ways
        raise Damaged(f"{path} must be a checkpoint, but it cannot be read: {error}") from None
    found = (state.get("format"), state.get("version")) if isinstance(state, dict) else (None, None)
    require(
        found == (_FORMAT, _VERSION),
        f"{path} must be a coverfast checkpoint of version {_VERSION}, got {found[0]!r} of version {found[1]!r}",
    )
    return state


def _iteration(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])
