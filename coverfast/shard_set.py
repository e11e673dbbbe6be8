"""Many shards as one sequence of samples."""

from __future__ import annotations

import glob
import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import InputError, check_choice, require
from coverfast.samples import SPLITS, Sample
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
    shards, whatever the split.

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
        where, sizes, scaling = [], [], []
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
        self._where: NDArray[np.int64] = np.concatenate(where)
        self.sizes: NDArray[np.int64] = np.concatenate(sizes)
        self.scaling: NDArray[np.float64] = np.concatenate(scaling)
        some = f"{self.paths[0]}" + (f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else "")
        require(len(self) > 0, f"{some} must hold samples of the split {split!r}, found none; see `shards info`")

    @property
    def content_hash(self) -> str:
        """Of one shard its own; of several the SHA-256 of theirs, in order."""
        return self._hashes[0] if len(self._hashes) == 1 else hashlib.sha256("".join(self._hashes).encode()).hexdigest()

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
        shard, sample = self._where[index].tolist()
        try:
            return self._handle(shard).pixels(sample, regions, allocate)
        except InputError as error:
            path = str(self.paths[shard])
            text = str(error)
            raise InputError(text if f"{path}: sample" in text else f"{path}: sample {sample}: {text}") from error

    def close(self) -> None:
        """Close all files; they are opened again when they are needed."""
        while self._open:
            self._open.popitem()[1].close()
