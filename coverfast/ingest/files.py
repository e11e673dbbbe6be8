"""Which files are sources: suffixes, folders, order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from coverfast.checks import InputError, require

KINDS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".nii": "NIfTI",
    ".nii.gz": "NIfTI",
    ".npy": "npy",
}

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Source:
    """A file to read. path: as found. name: what the shard keeps, `folder/sub/file` below a folder given by
    the caller, otherwise the file name: the same on every machine.
    """

    path: Path
    name: str

    @property
    def kind(self) -> str:
        """PNG, JPEG, TIFF, NIfTI or npy, by the suffix; "" for anything else."""
        lower = self.path.name.lower()
        return next((kind for suffix, kind in KINDS.items() if lower.endswith(suffix)), "")


def find_sources(paths: PathLike | Sequence[PathLike]) -> list[Source]:
    """The image files among `paths`: files as they are, folders with all below them, each in sorted order.

    Hidden files and other suffixes below a folder are passed over; a file met twice counts once. `InputError`:
    a missing path, a file of another kind given by name, a folder without images.
    """
    return scan(paths)[0]


def scan(paths: PathLike | Sequence[PathLike]) -> tuple[list[Source], int]:
    """`find_sources`, and how many files below the folders were passed over for their suffix."""
    given = [Path(p) for p in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    require(len(given) > 0, "sources must be at least 1 file or folder, got none")
    found: dict[Path, Source] = {}
    ignored = 0
    for path in given:
        if not path.exists():
            raise InputError(f"{path} must be a file or folder, found nothing there")
        if path.is_dir():
            entries = [Source(file, name) for name, file in sorted(_below(path))]
            sources = [source for source in entries if source.kind]
            ignored += len(entries) - len(sources)
            require(
                len(sources) > 0,
                f"{path} must hold images ({', '.join(KINDS)}), found none among {len(entries)} files",
            )
        else:
            sources = [Source(path, path.name)]
            require(
                bool(sources[0].kind), f"{path} must be one of {', '.join(KINDS)}, got {path.suffix or 'no suffix'}"
            )
        for source in sources:
            found.setdefault(source.path.absolute(), source)
    return list(found.values()), ignored


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, path) of every visible file below a folder; links to folders are followed, each folder once."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error

    top = Path(os.path.normpath(folder.absolute())).name
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in files:
            if not file.startswith("."):
                path = Path(here, file)
                yield "/".join((top, *path.relative_to(folder).parts)) if top else file, path
