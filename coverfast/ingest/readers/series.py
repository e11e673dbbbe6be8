"""DICOM files to images: series by UID, stacks within them, slices by position."""

from __future__ import annotations

import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from coverfast.checks import require
from coverfast.ingest.readers.decoded import Unreadable, blame, need
from coverfast.ingest.readers.dicom import MARKS, Plane, Slice, affine, digest, headers, normal

# How far direction cosines and spacings (mm) may differ within a stack, and positions (mm) that are the same.
_SAME = 1e-3


class Found(NamedTuple):
    """An image in DICOM files. name: digests of UIDs. group: "patient-", the smallest digest of the patient's series.
    parts: (file, frame) of every slice, in order.
    """

    name: str
    group: str
    parts: tuple[tuple[str, int], ...]


def find_series(
    files: Sequence[str], progress: Callable[[int, int], None] | None = None
) -> tuple[list[Found], int, list[str]]:
    """(images, how many files hold none, why each series or file is refused).

    Files without pixels, segmentations, doses, localizers and further copies of an instance count as holding none.
    Slices with a position and an orientation make stacks: one for each orientation, size and spacing in a series.
    Stacks that lie several times over each other are parted by the standard tags (`MARKS`, at most two of them) whose
    values leave each position once in each part. A single slice is a 2D image, as is an image without position. A
    patient is a PatientID, or else a PatientName, or else a study. Uneven stacks are refused as missing slices, see
    `affine`; slices missing at the ends of a stack cannot be seen.
    """
    need("DICOM")
    series: defaultdict[tuple[str, str], list[Slice]] = defaultdict(list)
    smallest: dict[str, str] = {}
    shared: dict[Any, Any] = {}
    seen: set[tuple[object, ...]] = set()
    refused: list[str] = []
    ignored = 0
    for number, file in enumerate(files):
        if progress:
            progress(number, len(files))
        try:
            slices = headers(file)
            # UIDs that should tell instances apart do not always: a copy has the same place too, or the same size.
            copies = [(s.instance, s.frame, s.position or os.path.getsize(file)) for s in slices]  # noqa: PTH202
        except Exception as error:  # pydicom raises whatever it likes on broken files
            blame(error, file)
            # Not the message: it may quote a value, and the value may be a name.
            refused.append(f"{file} cannot be read as DICOM: its header is broken ({type(error).__name__})")
            continue
        slices = [s for s, c in zip(slices, copies, strict=True) if not s.plane.localizer and c not in seen]
        seen.update(copies)
        ignored += not slices
        for part in slices:
            smallest[part.patient] = min(smallest.get(part.patient, part.series), part.series)
            # Most slices share most values: keeping each once is what makes 100,000 of them small.
            plane, marks = shared.setdefault(part.plane, part.plane), shared.setdefault(part.marks, part.marks)
            series[part.series, part.patient].append(part._replace(plane=plane, marks=marks))
    if progress:
        progress(len(files), len(files))
    images = []
    names: Counter[str] = Counter()
    for (name, patient), slices in sorted(series.items()):
        slices.sort(key=lambda s: (s.instance, s.frame))
        stacks = list(_stacks(slices))
        for stack in stacks:
            try:
                parts = _volumes(stack)
            except Unreadable as error:
                refused.append(_sentence(name, stack, error))
                continue
            for volume in parts:
                first = min(volume, key=lambda s: (s.instance, s.frame))
                alone = len(stacks) == len(parts) == 1 and len(volume) > 1
                suffix = "" if alone else "-" + digest(f"{first.instance} {first.frame}", 8)
                names[name + suffix] += 1
                again = f"-{names[name + suffix]}" if names[name + suffix] > 1 else ""
                where = tuple((s.path, s.frame) for s in volume)
                images.append(Found(f"dicom/{name}{suffix}{again}", f"patient-{smallest[patient]}", where))
    return images, ignored, sorted(refused)


def _sentence(name: str, stack: Sequence[Slice], error: Exception) -> str:
    files = sorted({s.path for s in stack})
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{files[0]}{more} (dicom/{name}) cannot be read as DICOM: {error}"


def _stacks(slices: Sequence[Slice]) -> Iterator[list[Slice]]:
    """Slices by orientation, size and spacing; those without a place by file."""
    stacks: dict[Plane | str, list[Slice]] = {}
    for part in slices:
        key: Plane | str = part.path
        if part.position:
            key = next((k for k in stacks if isinstance(k, Plane) and _alike(k, part.plane)), part.plane)
        stacks.setdefault(key, []).append(part)
    yield from stacks.values()


def _alike(one: Plane, other: Plane) -> bool:
    if one is other:
        return True
    # The numbers of each, and what must be the same.
    (a, *same), (b, *others) = (((*(p.cosines or ()), *(p.spacing or ())), p.rows, p.columns) for p in (one, other))
    return same == others and len(a) == len(b) and bool(np.allclose(a, b, rtol=0, atol=_SAME))


def _volumes(stack: list[Slice]) -> list[list[Slice]]:
    """A stack as volumes with their slices in order, each checked to be evenly spaced."""
    try:
        require(not stack[0].plane.mosaic, "it is a mosaic of slices, save it as one image a slice")
        if stack[0].position is None:
            frames = stack[0].frames
            require(frames == 1, f"it has {frames} frames without positions and orientations, expected 1")
            return [stack]
        along = np.array([s.position for s in stack]) @ normal(stack[0].plane)
        order = np.lexsort((np.arange(len(stack)), along))
        # The number of the position at which each slice lies.
        number = np.cumsum(np.diff(along[order], prepend=along[order[0]]) > _SAME)
        slices = [stack[k] for k in order]
        parts = _parted(slices, number.tolist())
        for part in parts:
            if len(part) > 1:
                affine(part)
        return parts
    except Unreadable:
        raise
    except ValueError as error:
        raise Unreadable(str(error)) from error


def _parted(slices: list[Slice], number: list[int]) -> list[list[Slice]]:
    count = number[-1] + 1
    if len(slices) == count:
        return [slices]
    for which in (w for n in (1, 2) for w in itertools.combinations(range(len(MARKS)), n)):
        parts: defaultdict[tuple[str, ...], list[Slice]] = defaultdict(list)
        places: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        for part, place in zip(slices, number, strict=True):
            value = tuple(part.marks[k] for k in which)
            parts[value].append(part)
            places[value].append(place)
        if all(p == list(range(count)) for p in places.values()):
            return [parts[value] for value in sorted(parts)]
    raise Unreadable(f"it has {len(slices)} slices at {count} positions, and no standard tag tells them apart")
