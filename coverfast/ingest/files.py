"""Which files are sources: suffixes, folders, DICOM series, groups, order."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
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
    ".hdr": "NIfTI",
    ".nrrd": "NRRD",
    ".nhdr": "NRRD",
    ".mha": "MetaImage",
    ".mhd": "MetaImage",
    ".npy": "npy",
    ".npz": "npz",
    ".dcm": "DICOM",
    ".dicom": "DICOM",
    ".ima": "DICOM",
}
# How headers name the files that hold their pixels.
_DATA = {
    "NRRD": re.compile(rb"^data ?file: *(.+?)\s*$", re.MULTILINE | re.IGNORECASE),
    "MetaImage": re.compile(rb"^ElementDataFile\s*[=:]\s*(.+?)\s*$", re.MULTILINE),
}
_BIDS = re.compile(r"(?:^|/)(sub-[0-9A-Za-z]+)(?![0-9A-Za-z-])")

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Source:
    """An image to read: a file, or slices of a DICOM series.

    path: the file, or the first of the series. name: what the shard keeps, `folder/sub/file` below a folder given by
    the caller, otherwise the file name: the same on every machine; for DICOM "dicom/" and digests of UIDs, which
    tell nothing of path or person. group: the patient or subject, "" if unknown. parts: for DICOM, (file, frame) of
    each slice in order. place: for DICOM, see `below`.
    """

    path: Path
    name: str
    group: str = ""
    parts: tuple[tuple[str, int], ...] = ()
    place: str = ""

    @property
    def below(self) -> str:
        """What labels and classes are matched with: the path below the folder given, otherwise the file name; of a
        DICOM image in several files, the path of their folder.
        """
        return self.place or self.name.partition("/")[2] or self.name

    @property
    def kind(self) -> str:
        """One of the values of `KINDS`, by the suffix or because it has DICOM parts; "" for anything else."""
        return "DICOM" if self.parts else _kind(self.path.name)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that the image is read from, those of headers with data elsewhere as far as the text names them:
        the more where it is unclear.
        """
        if self.parts:
            return tuple(Path(p) for p in dict.fromkeys(file for file, _ in self.parts))
        return tuple(dict.fromkeys((self.path, *_data_files(self.path, self.kind))))


@dataclass(frozen=True)
class Scan:
    """What `scan` found. sources: sorted by name. ignored: files below the folders that are no images. refused: why
    each DICOM series or file that looked like an image is none, one sentence each.
    """

    sources: list[Source]
    ignored: int
    refused: list[str]


def find_sources(paths: PathLike | Sequence[PathLike]) -> list[Source]:
    """The images among `paths`, as `scan` finds them. `InputError`: as there, and for the first that it refuses."""
    found = scan(paths)
    require(not found.refused, "".join(found.refused[:1]))
    return found.sources


def scan(
    paths: PathLike | Sequence[PathLike],
    *,
    group: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """The images among `paths`: files as they are, folders with all below them, sorted by name.

    Hidden files are passed over, a file met twice counts once. Files with a suffix of DICOM, and others that are of no
    known kind and begin like it, count as DICOM; their headers are read and sorted into series, across folders
    (`readers.series.find_series`). group: a regular expression searched in the names; its first group, or else the
    whole match, is the source's group. Without it that is the "sub-..." of BIDS, where a name has it, and for DICOM
    the patient that its tags name. With it, a DICOM image's group is "patient-" and a digest of what matched in the
    name, `folder/sub/file`, of its first file, never the match itself. progress: called with (headers read, files to
    read headers of). `InputError`: a missing path, a file of another kind given by name, a folder without images, a
    name that `group` does not match.
    """
    given = [Path(p) for p in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    require(len(given) > 0, "sources must be at least 1 file or folder, got none")
    pattern = _compiled(group)
    known: set[str] = set()
    found: list[tuple[str, str]] = []  # (name, path)
    dicom: list[tuple[str, str]] = []
    ignored = 0
    refused: list[str] = []
    for path in given:
        if not path.exists():
            raise InputError(f"{path} must be a file or folder, found nothing there")
        entries = sorted(_below(path)) if path.is_dir() else [(path.name, str(path))]
        images = 0
        for name, file in entries:
            kind = _kind(name)
            if kind == "DICOM" or (kind == "" and _is_dicom(file)):
                target = dicom
            elif kind:
                target = found
            else:
                require(
                    path.is_dir(),
                    f"{path} must be DICOM or one of {', '.join(KINDS)}, got {path.suffix or 'no suffix'}",
                )
                ignored += 1
                continue
            images += 1
            absolute = os.path.abspath(file)  # noqa: PTH100 - 100,000 paths
            if absolute in known:
                continue
            known.add(absolute)
            target.append((name, file))
        require(images > 0, f"{path} must hold images ({', '.join(KINDS)}), found none among {len(entries)} files")
    del known
    sources = [Source(Path(file), name, _group(pattern, name)) for name, file in found]
    if dicom:
        # Only with pydicom, which takes long to load.
        from coverfast.ingest.readers.dicom import digest
        from coverfast.ingest.readers.series import find_series

        images_found, others, sentences = find_series([file for _, file in sorted(dicom)], progress)
        names = {file: name for name, file in dicom}
        for image in images_found:
            first = image.parts[0][0]
            person = f"patient-{digest(_group(pattern, names[first]))}" if pattern else image.group
            alone = all(file == first for file, _ in image.parts)
            sources.append(
                Source(Path(first), image.name, person, image.parts, _dicom_place(names[first], first, alone))
            )
        ignored += others
        refused += sentences
    require(len(sources) + len(refused) > 0, f"sources must hold images, found none among {ignored} DICOM files")
    sources.sort(key=lambda s: s.name)
    return Scan(sources, ignored, refused)


def _data_files(header: Path, kind: str) -> list[Path]:
    """Files with the pixels of a header, if they are not in its own; if none is there, all files of its folder."""
    if header.suffix.lower() == ".hdr":
        return [f for f in (header.with_suffix(".img"), header.with_suffix(".IMG")) if f.is_file()]
    if kind not in _DATA:
        return []
    try:
        with header.open("rb") as file:
            text = re.split(rb"\r?\n\r?\n|\0", file.read(1 << 20))[0]
    except OSError:  # reading it says what is wrong
        return []
    named = _DATA[kind].search(text)
    # NRRD without the field has its data attached, MetaImage says so.
    if (named is None and kind == "NRRD") or (named and named[1].upper() == b"LOCAL"):
        return []
    names = [named[1]] if named else []
    if named and named[1].upper().split()[:1] == [b"LIST"]:
        names = [line.strip() for line in text[named.end() :].splitlines()]
    found = []
    for name in map(os.fsdecode, filter(None, names)):
        path = str(header.parent / name)
        if not os.path.isfile(path):  # noqa: PTH113 - false, not an error, for what cannot be a path
            # Numbered files, as in "slice%03d.raw 1 99 1": any number will do.
            path = re.sub(r"%[\d.]*[diu]", "*", glob.escape(re.sub(r"(\s+-?\d+)+$", "", path)))
            found += [Path(file) for file in sorted(glob.glob(path)) if os.path.isfile(file)]  # noqa: PTH113, PTH207
        else:
            found.append(Path(path))
    return found or sorted(file for file in header.parent.iterdir() if file.is_file())


def _kind(name: str) -> str:
    lower = name.lower()
    return next((kind for suffix, kind in KINDS.items() if lower.endswith(suffix)), "")


def stem(name: str) -> str:
    """A file's name without the suffix of its kind, `.nii.gz` in one."""
    lower = name.lower()
    return next((name[: -len(suffix)] for suffix in KINDS if lower.endswith(suffix)), name)


def _dicom_place(name: str, file: str, alone: bool) -> str:
    """`Source.below` of a DICOM image: its first file is called `name`; alone: it has no other."""
    above, *below = name.split("/")
    if alone:
        return "/".join(below) or above
    # Files that lie in the given folder itself, or were given by name.
    return "/".join(below[:-1]) or (above if below else Path(file).absolute().parent.name)


def _is_dicom(file: str) -> bool:
    if not os.path.isfile(file):  # noqa: PTH113 - a pipe would wait
        return False
    try:
        with open(file, "rb") as opened:  # noqa: PTH123 - 100,000 files
            return opened.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _compiled(group: str | None) -> re.Pattern[str] | None:
    try:
        return None if group is None else re.compile(group)
    except re.error as error:
        raise InputError(f"group must be a regular expression, got {group!r}: {error}") from error


def _group(pattern: re.Pattern[str] | None, name: str) -> str:
    match = (pattern or _BIDS).search(name)
    if match is None:
        require(pattern is None, f"group must match every name, got no match in {name}")
        return ""
    found = match[1] if match.re.groups else match[0]
    require(bool(found), f"group must match something in every name, got nothing in {name}")
    return str(found)


def _below(folder: Path) -> Iterator[tuple[str, str]]:
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
                yield "/".join((top, *path.relative_to(folder).parts)) if top else file, str(path)
