"""Label maps and classes of images: which belongs to which, by name."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from coverfast.checks import InputError, require
from coverfast.class_tables import ClassTables
from coverfast.disk import explained
from coverfast.ingest.files import PathLike, Source, scan, stem
from coverfast.samples import LabelClass

# What the name of a label map may have more than its image's, and the modality that nnU-Net numbers.
_ENDING = re.compile(r"[_.-](seg|segmentation|labels?|masks?|gt)$", re.IGNORECASE)
_NUMBER = re.compile(r"_\d{4}$")


class Matched(NamedTuple):
    """Images, and the label map and the class of each, or of none."""

    images: list[Source]
    maps: list[Source]
    targets: list[str]

    def of(self, number: int) -> tuple[Source | None, str]:
        """Label map and class of an image."""
        return self.maps[number] if self.maps else None, self.targets[number] if self.targets else ""


class Annotations:
    """What a build is told of images: the options `labels`, `label_table` and `classes` of `build_shard`, checked.

    label_classes: of label maps, None if no table names them. target_classes: of images, sorted, None without a table.
    `InputError`: a table that is none, see `read_label_table` and `read_class_table`.
    """

    def __init__(
        self,
        labels: PathLike | Sequence[PathLike] | None = None,
        label_table: PathLike | None = None,
        classes: PathLike | None = None,
    ) -> None:
        require(
            label_table is None or labels is not None, "label_table (--label-table) needs labels (--labels), got none"
        )
        self._labels, self._classes = labels, classes
        self._rows = {} if classes is None else read_class_table(classes)
        self.label_classes = None if label_table is None else read_label_table(label_table)
        self.target_classes = None if classes is None else sorted(set(self._rows.values()))

    def settings(self) -> dict[str, Any]:
        """What a build that is resumed must have in common, JSON-able."""
        tables = {"label_table": self.label_classes, "classes": self.target_classes}
        return {"labels": True if self._labels is not None else None} | tables

    def match(self, images: list[Source], tell: Callable[[str], None]) -> Matched:
        """Label maps by `find_maps` and classes by `find_targets`; tell: called with sentences for the user."""
        maps: list[Source] = []
        targets: list[str] = []
        if self._labels is not None:
            images, maps = find_maps(images, self._labels)
        if self._classes is not None:
            targets = find_targets(images, self._rows, self._classes, tell)
        return Matched(images, maps, targets)


def find_maps(images: Sequence[Source], labels: PathLike | Sequence[PathLike]) -> tuple[list[Source], list[Source]]:
    """The images and the label map of each, in the same order, from the files and folders `labels`.

    A map belongs to the image with the same path below the folders that were given, without suffixes; where there is
    none, to the one with the same path after an ending such as `_seg` is taken off the map's and `_0000`, any four
    digits, off the image's. One file each belong together whatever they are called. Files that are in `images` and in
    `labels` are maps if they have such an ending, images otherwise. `InputError`: an image without a map or with
    several, a map without an image or with several, and what `scan` refuses.
    """
    listed = [labels] if isinstance(labels, str) or not isinstance(labels, Sequence) else labels
    try:
        found = scan(listed)
        require(not found.refused, "".join(found.refused[:1]))
    except InputError as error:
        raise InputError(f"labels: {error}") from error
    both = {_real(s) for s in images} & {_real(s) for s in found.sources}
    maps = [s for s in found.sources if _real(s) not in both or _ENDING.search(stem(s.below))]
    images = [s for s in images if _real(s) not in both or not _ENDING.search(stem(s.below))]
    if len(images) == len(maps) == len(listed) == 1 and Path(listed[0]).is_file():
        return images, maps

    same, loose = defaultdict(list), defaultdict(list)
    for number, label in enumerate(maps):
        same[stem(label.below)].append(number)
        loose[_ENDING.sub("", stem(label.below))].append(number)
    belongs: list[int] = []
    users: dict[int, Source] = {}
    without = []
    for image in images:
        name = stem(image.below)
        fits = same[name] or sorted({*loose[name], *loose[_NUMBER.sub("", name)], *same[_NUMBER.sub("", name)]})
        require(len(fits) <= 1, f"{_shown(image)} must have 1 label map, got {_names([maps[k] for k in fits])}")
        if not fits:
            without.append(image)
            continue
        other = users.setdefault(fits[0], image)
        require(
            other is image,
            f"{_shown(maps[fits[0]])} must be the label map of 1 image, got {_names([other, image])}",
        )
        belongs.append(fits[0])
    idle = [label for number, label in enumerate(maps) if number not in users]
    _check_pairs(images, without, maps, idle)
    return images, [maps[k] for k in belongs]


def _check_pairs(images: list[Source], without: list[Source], maps: list[Source], idle: list[Source]) -> None:
    said = []
    if without:
        said.append(f"no map for {len(without)} of {len(images)} images ({_names(without)})")
    if idle:
        said.append(f"no image for {len(idle)} of {len(maps)} maps ({_names(idle)})")
    series = any(s.parts for s in without)
    hint = "; a DICOM series goes by the name of its folder, labels/case1.nii.gz for images/case1/*.dcm" * series
    require(not said, f"images and label maps must have the same names, found {' and '.join(said)}{hint}")


def find_targets(
    images: Sequence[Source], rows: dict[str, str], table: PathLike, tell: Callable[[str], None]
) -> list[str]:
    """The class of every image, from the rows (name, class) of `table`.

    A row's name is that of the image's file with or without its suffix, also without nnU-Net's four digits, with its
    path below the folder that was given, or without where no other image has that name; or the image's group. Rows
    without an image are told of. `InputError`: an image without a row, or with rows of several classes.
    """
    forms = [_forms(image.below) for image in images]
    short = [_forms(image.below.rpartition("/")[2]) for image in images]
    times = Counter(name for names in short for name in names)
    used: set[str] = set()
    targets, without = [], []
    for image, full, last in zip(images, forms, short, strict=True):
        names = {*full, *(name for name in last if times[name] == 1), image.group} & rows.keys()
        used |= names
        classes = sorted({rows[name] for name in names})
        require(
            len(classes) <= 1,
            f"{_shown(image)} must have 1 class in {table}, got {' and '.join(classes)} in the rows "
            f"{', '.join(sorted(names))}",
        )
        targets += classes
        if not classes:
            without.append(image)
    require(
        not without,
        f"every image must have a row in {table}, found none for {len(without)} of {len(images)} ({_names(without)})",
    )
    if idle := [name for name in rows if name not in used]:
        tell(f"{len(idle)} of {len(rows)} rows of {table} are of no image ({_some(idle)})")
    return targets


def _forms(name: str) -> set[str]:
    return {name, stem(name), _NUMBER.sub("", stem(name))}


def read_label_table(path: PathLike) -> tuple[LabelClass, ...]:
    """The classes of a CSV file with the columns value, name; value 0 is added as "background" where it is missing.

    `InputError`: a file that is none, a value that is no integer from 0 to 2^32 - 1, a value or a name that is there
    twice.
    """
    names: dict[int, str] = {}
    for at, value, name in _rows(path, ("value", "name")):
        require(value.isascii() and value.isdecimal(), f"{at} must have an integer of at least 0 first, got {value!r}")
        require(int(value) not in names, f"{at} must have a value that is new, got {value} again")
        names[int(value)] = name
    try:
        return ClassTables(names).label_classes
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_class_table(path: PathLike) -> dict[str, str]:
    """Class by name from a CSV file with the columns name, class. `InputError`: a file that is none, a name with two
    classes, more classes than a shard holds.
    """
    rows: dict[str, str] = {}
    for at, name, target in _rows(path, ("name", "class")):
        other = rows.setdefault(name, target)
        require(other == target, f"{at} must have the class of {name} that it has above, {other}, got {target}")
    try:
        ClassTables(target_classes=sorted(set(rows.values())))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return rows


def _rows(path: PathLike, header: tuple[str, str]) -> Iterator[tuple[str, str, str]]:
    """("FILE line 3", first, second) of every row of a CSV file with two columns, but for the header."""
    with explained(Path(path), "read"):
        try:
            text = Path(path).read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} must be a CSV file in UTF-8, got bytes that are none") from error
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    count = 0
    try:
        for cells in reader:
            row = [cell.strip() for cell in cells]
            at = f"{path} line {reader.line_num}"
            first, count = count == 0, count + any(row)
            if not any(row) or (first and tuple(cell.lower() for cell in row) == header):
                continue
            require(len(row) == 2 and all(row), f"{at} must be {','.join(header)}, got {','.join(cells):.80}")
            yield at, row[0], row[1]
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num} must be {','.join(header)}, got {error}") from error
    require(count > 0, f"{path} must have rows of {','.join(header)}, got none")


def _real(source: Source) -> str:
    return str(source.path.absolute())


def _shown(source: Source) -> str:
    """A name to find it by; the one that a DICOM source has in the shard tells nothing."""
    return source.below if source.parts else source.name


def _names(sources: Iterable[Source]) -> str:
    return _some([_shown(s) for s in sources])


def _some(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values[:3])) + ", ..." * (len(values) > 3)
