"""Many shards as one sequence of samples."""

from __future__ import annotations

import contextlib
import copy
import glob
import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, check_choice, require
from coverfast.samples import SPLITS, LabelClass, Sample
from coverfast.shard_reader import Allocate, Region, Shard

PathLike = str | os.PathLike[str]


def find_shards(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    """The shards among files, folders (all `*.h5` below) and globs, each once, sorted within a folder or glob.

    `InputError`: a path that is not there, a folder or glob without shards.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    require(len(given) > 0, "shards must be at least 1 file, folder or glob, got none")
    found: dict[Path, None] = {}
    for path in map(Path, given):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*.h5") if p.is_file() and not _unfinished(p.relative_to(path)))
            require(len(inside) > 0, f"{path} must hold shards (*.h5), found none")
        elif path.exists() or not glob.has_magic(str(path)):
            require(path.exists(), f"{path} must be a shard, found no such file")
            inside = [path]
        else:
            inside = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207  # a pattern may be absolute
            require(len(inside) > 0, f"{path} must match shards, found no such file")
        for shard in inside:
            found.setdefault(shard.absolute())
    return list(found)


def _unfinished(path: Path) -> bool:
    """Whether a file is hidden or a piece of a build (`F.h5.partial/`)."""
    return any(part.startswith(".") or part.endswith(".partial") for part in path.parts)


class ShardSet:
    """The samples of one split of many shards as one sequence.

    paths: files, folders and globs, see `find_shards`. split: "train", "val", "test" or "all". open_files: most
    shards held open at a time.

    len(): samples. shards: the files. ndim: 2 or 3. channels. preprocessing: the same in all. sizes: `(N, ndim)` int64.
    scaling: `(N, 4)` float64. split_counts: samples of every split. content_hash: SHA-256 over all samples of all
    shards, whatever the split. label_classes, target_classes, targets, labels(): see `Shard`; only they are refused
    where shards differ in a class table, or some have label maps, or targets, and others have none.

    Pickles by path; handles survive neither fork nor pickling, each process opens its own. `InputError`: see
    `find_shards` and `Shard`; shards that differ in dimension, channels or preprocessing, or are the same by their
    content; a split without samples; a file that was replaced meanwhile.
    """

    def __init__(self, paths: PathLike | Sequence[PathLike], split: str = "train", *, open_files: int = 16) -> None:
        check_choice("split", split, (*SPLITS, "all"))
        require(open_files >= 1, f"open_files must be at least 1, got {open_files}")
        self.paths, self.split, self._most = find_shards(paths), split, open_files
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._hashes: list[str] = []
        where, sizes, scaling, targets = [], [], [], []
        tables: list[tuple[tuple[LabelClass, ...], tuple[str, ...]]] = []
        self.split_counts = dict.fromkeys(SPLITS, 0)
        for number, path in enumerate(self.paths):
            shard = self._handle(number)
            if number == 0:
                self.ndim, self.channels, self.preprocessing = shard.ndim, shard.channels, shard.preprocessing
            self._check_alike(shard)
            require(
                shard.content_hash not in self._hashes,
                f"{path} must hold other samples than {self._twin(shard.content_hash)}, but the two are the same",
            )
            self._hashes.append(shard.content_hash)
            for name, count in zip(SPLITS, np.bincount(shard.splits, minlength=len(SPLITS)).tolist(), strict=True):
                self.split_counts[name] += count
            chosen = np.arange(len(shard)) if split == "all" else np.flatnonzero(shard.splits == SPLITS.index(split))
            where.append(np.stack([np.full(len(chosen), number), chosen], axis=1))
            sizes.append(shard.sizes[chosen])
            scaling.append(shard.scaling[chosen])
            targets.append(shard.targets[chosen])
            tables.append((shard.label_classes, shard.target_classes))
        self._where: NDArray[np.int64] = np.concatenate(where)
        self.sizes: NDArray[np.int64] = np.concatenate(sizes)
        self.scaling: NDArray[np.float64] = np.concatenate(scaling)
        self._targets: NDArray[np.int64] = np.concatenate(targets)
        (self._label_classes, self._target_classes), *_ = tables
        self._apart = {
            kind: next((i for i, table in enumerate(tables) if table[place] != tables[0][place]), None)
            for place, kind in enumerate(("label", "target"))
        }
        require(
            len(self) > 0, f"{self._some()} must hold samples of the split {split!r}, found none; see `shards info`"
        )

    @property
    def content_hash(self) -> str:
        """Of one shard its own; of several the SHA-256 of theirs, in order."""
        return self._hashes[0] if len(self._hashes) == 1 else hashlib.sha256("".join(self._hashes).encode()).hexdigest()

    def _some(self) -> str:
        return f"{self.paths[0]}" + (f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else "")

    def _check_alike(self, shard: Shard) -> None:
        first = self.paths[0]
        require(shard.ndim == self.ndim, f"{shard.path} must be {self.ndim}D like {first}, got {shard.ndim}D")
        require(
            shard.channels == self.channels,
            f"{shard.path} must have {self.channels} channels like {first}, got {shard.channels}",
        )
        require(
            shard.preprocessing == self.preprocessing,
            f"{shard.path} must be preprocessed like {first} ({self.preprocessing}), got {shard.preprocessing}",
        )

    @property
    def label_classes(self) -> tuple[LabelClass, ...]:
        """What the values of the label maps mean; empty without label maps. See `Shard`."""
        self._check_together("label", self._label_classes)
        return self._label_classes

    @property
    def target_classes(self) -> tuple[str, ...]:
        """The names of the images' classes; empty without targets. See `Shard`."""
        self._check_together("target", self._target_classes)
        return self._target_classes

    @property
    def targets(self) -> NDArray[np.int64]:
        """`(N,)` int64, the place of each sample's class in `target_classes`, -1 for none."""
        self._check_together("target", self._target_classes)
        return self._targets

    def targets_if_alike(self) -> NDArray[np.int64]:
        """`targets`, or -1 throughout where the shards differ in their target classes."""
        return self._targets if self._apart["target"] is None else np.full(len(self), -1, np.int64)

    def need_labels(self) -> None:
        """Raise `InputError` unless every shard has label maps, of the same classes."""
        require(len(self.label_classes) > 0, f"{self._some()} must have label maps, found none")

    def _check_together(self, kind: str, first: Sequence[Any]) -> None:
        if (number := self._apart[kind]) is not None:
            shard = self._handle(number)
            other = shard.label_classes if kind == "label" else shard.target_classes
            raise InputError(
                f"{shard.path} must have the {kind} classes of {self.paths[0]} ({_classes(first)}), got "
                f"{_classes(other)}"
            )

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> ShardSet:
        """The chosen samples, in that order, as a set of their own; `InputError` for none or one that is not there.

        paths, split, split_counts and content_hash stay those of the whole.
        """
        chosen = np.asarray(indices)
        sound = chosen.ndim == 1 and chosen.size > 0 and chosen.dtype.kind in "iu"
        require(
            sound and bool(((chosen >= 0) & (chosen < len(self))).all()),
            f"indices must be at least 1 integer from 0 to {len(self) - 1}, got {chosen.tolist()!r:.80}",
        )
        part = copy.copy(self)  # by way of __getstate__: with handles of its own
        part._where, part._targets = self._where[chosen], self._targets[chosen]
        part.sizes, part.scaling = self.sizes[chosen], self.scaling[chosen]
        return part

    def _twin(self, content_hash: str) -> Path | str:
        return self.paths[self._hashes.index(content_hash)] if content_hash in self._hashes else ""

    def _handle(self, number: int) -> Shard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= self._most:
            self._open.popitem(last=False)[1].close()
        shard = Shard(self.paths[number])
        if number < len(self._hashes) and shard.content_hash != self._hashes[number]:
            shard.close()
            raise InputError(f"{shard.path} must not change while it is in use, got another content")
        self._open[number] = shard
        return shard

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def __len__(self) -> int:
        return len(self._where)

    def place(self, index: int) -> tuple[Path, int]:
        """The file of sample `index` and its number there."""
        shard, sample = self._where[index].tolist()
        return self.paths[shard], sample

    def source(self, index: int) -> str:
        """The source name of sample `index`."""
        shard, sample = self._where[index].tolist()
        return self._handle(shard).source(sample)

    def identity(self, index: int) -> tuple[str, str]:
        """SHA-256 of the pixels of sample `index` and its group, see `Shard.identity`."""
        shard, sample = self._where[index].tolist()
        return self._handle(shard).identity(sample)

    def read(self, index: int, region: Region | None = None) -> Sample:
        """Sample `index` or a region of it, see `Shard.read`."""
        shard, sample = self._where[index].tolist()
        return self._handle(shard).read(sample, region)

    def pixels(
        self, index: int, regions: Sequence[Region | None] = (None,), allocate: Allocate | None = None
    ) -> list[NDArray[Any]]:
        """Stored pixels of sample `index` in each region, see `Shard.pixels`; `InputError` names file and sample."""
        number, sample = self._where[index].tolist()
        with self._naming(number, sample):
            return self._handle(number).pixels(sample, regions, allocate)

    def labels(
        self, index: int, regions: Sequence[Region | None] = (None,), allocate: Allocate | None = None
    ) -> list[NDArray[np.uint8]]:
        """Class indices of sample `index` in each region, see `Shard.labels`; `InputError` names file and sample."""
        self.need_labels()
        number, sample = self._where[index].tolist()
        with self._naming(number, sample):
            return self._handle(number).labels(sample, regions, allocate)

    @contextlib.contextmanager
    def _naming(self, number: int, sample: int) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            path, text = str(self.paths[number]), str(error)
            named = f"{path}: sample" in text or f"{path}: label map" in text
            raise InputError(text if named else f"{path}: sample {sample}: {text}") from error

    def close(self) -> None:
        """Close all files; they are opened again when they are needed."""
        while self._open:
            self._open.popitem()[1].close()


def _classes(table: Sequence[Any]) -> str:
    """A class table as part of a sentence."""
    names = [f"{c.value} {c.name}" if isinstance(c, LabelClass) else str(c) for c in table]
    return ", ".join(names[:10]) + f" and {len(names) - 10} more" * (len(names) > 10) if names else "none"
