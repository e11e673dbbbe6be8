"""The images that `coverfast bench data` stores, and the ways to read them: shards, and the usual files.

Images are phantoms (`coverfast.phantom`), shifted to be as many as asked and repeated to be as large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from coverfast.checks import check_choice, require
from coverfast.phantom import phantom
from coverfast.samples import DTYPES
from coverfast.shard_reader import Allocate, Region
from coverfast.shard_set import ShardSet
from coverfast.shards import Sample, ShardWriter

Array = NDArray[Any]


# --- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Images of one kind: `count` of `size`, cropped to `crop`, `batch` at a time, as in the paper's presets."""

    name: str
    size: tuple[int, ...]
    crop: tuple[int, ...]
    dtype: str
    count: int
    batch: int

    @property
    def itemsize(self) -> int:
        """Bytes a pixel."""
        return np.dtype(self.dtype).itemsize


PROBLEMS = (
    Problem("2D", (512, 512), (384, 384), "uint8", 256, 24),
    Problem("3D", (160, 160, 128), (128, 128, 128), "int16", 16, 2),
)
LARGE = (
    Problem("large 2D", (4096, 4096), (384, 384), "uint8", 1, 4),
    Problem("large 3D", (512, 512, 512), (128, 128, 128), "int16", 1, 2),
)


def problems(sizes: Sequence[tuple[int, ...]] = (), dtype: str | None = None) -> list[Problem]:
    """Images of those sizes, `PROBLEMS` where there are none, stored in `dtype`, where it is given.

    No more pixels and no more images than those of `PROBLEMS` have, and crops of theirs, at most as large as the image.
    """
    found = list(PROBLEMS)
    if sizes:
        usual = {len(p.size): p for p in PROBLEMS}
        found = [_sized(usual[len(size)], size) for size in dict.fromkeys(sizes)]
    return found if dtype is None else [stored_as(p, dtype) for p in found]


def _sized(usual: Problem, size: tuple[int, ...]) -> Problem:
    count = max(1, min(usual.count, usual.count * prod(usual.size) // prod(size)))
    crop = tuple(min(c, s) for c, s in zip(usual.crop, size, strict=True))
    return replace(usual, name=" x ".join(map(str, size)), size=size, crop=crop, count=count)


def stored_as(problem: Problem, dtype: str) -> Problem:
    """The same images in another dtype that shards can hold."""
    check_choice("dtype", dtype, DTYPES)
    return replace(problem, dtype=dtype)


def images(problem: Problem) -> Iterator[Array]:
    """`(1, *S)` images with the grain and the empty borders of real ones."""
    ndim, kind = len(problem.size), np.dtype(problem.dtype)
    usual = next(p.size for p in PROBLEMS if len(p.size) == ndim)
    # Drawing anatomy of thousands of pixels an axis takes minutes.
    size = tuple(min(s, most) for s, most in zip(problem.size, usual, strict=True))
    few = [phantom(ndim, size, seed=1, index=i).image for i in range(min(4, problem.count))]
    if kind.kind != "f":
        top = min(2047, int(np.iinfo(kind).max))
        few = [(image * top).round().astype(kind) for image in few]
    rest = [(0, s - drawn) for s, drawn in zip(problem.size, size, strict=True)]
    for number in range(problem.count):
        image = np.roll(few[number % len(few)], 5 * (number // len(few)), axis=-1)
        yield np.pad(image, rest, mode="wrap")[None]


def write_shard(path: Path, problem: Problem) -> Path:
    """The images of a problem as a shard."""
    with ShardWriter(path, preprocessing={}) as writer:
        for number, pixels in enumerate(images(problem)):
            spacing = (1.0,) * len(problem.size)
            writer.add(Sample(pixels, 1.0, 0.0, 0.0, float(pixels.max()), spacing, str(number)))
    return path


# --- ways ------------------------------------------------------------------------------------------------------------

#: From a folder and the images in a shard of the default format to data and its files.
Way = Callable[[Path, ShardSet], tuple[Any, list[Path]]]
#: The way that comes first, and what the pixels of the others are compared with.
DEFAULT = "shard, crops"


class Files:
    """One file a sample, decoded whole and then cropped; or, for npy, mapped and cropped."""

    def __init__(self, paths: Sequence[Path], like: ShardSet, read: Callable[[Path], Array]) -> None:
        self.paths, self.sizes, self.scaling, self.read_file = list(paths), like.sizes, like.scaling, read

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self, index: int, regions: Sequence[Region], allocate: Allocate) -> list[Array]:
        """See `ShardSet.pixels`."""
        return _cropped(self.read_file(self.paths[index]), regions, allocate)

    def targets_if_alike(self) -> NDArray[np.int64]:
        """See `ShardSet.targets_if_alike`: files say no class."""
        return np.full(len(self), -1, np.int64)


class Whole(ShardSet):
    """Whole samples of a shard, cropped afterwards."""

    def pixels(
        self, index: int, regions: Sequence[Region | None] = (None,), allocate: Allocate | None = None
    ) -> list[Array]:
        """See `ShardSet.pixels`."""
        (whole,) = super().pixels(index)
        return _cropped(whole, [r for r in regions if r is not None], allocate or (lambda *a: np.empty(a[1], a[2])))


def _cropped(whole: Array, regions: Sequence[Region], allocate: Allocate) -> list[Array]:
    out = []
    for number, region in enumerate(regions):
        crop = whole[(slice(None), *region)]
        out.append(allocate(number, crop.shape, crop.dtype))
        out[-1][:] = crop  # crops of one size: the slot is no larger
    return out


def read_png(path: Path) -> Array:
    """A grey PNG as `(1, H, W)`."""
    from PIL import Image

    return np.asarray(Image.open(path))[None]


def write_png(path: Path, pixels: Array) -> None:
    """Of `(1, H, W)`."""
    from PIL import Image

    Image.fromarray(pixels[0]).save(path)


def read_nifti(path: Path) -> Array:
    """A compressed NIfTI as `(1, z, y, x)`."""
    import nibabel

    return np.asarray(nibabel.load(path).dataobj).T[None]  # type: ignore[attr-defined]


def write_nifti(path: Path, pixels: Array) -> None:
    """Of `(1, z, y, x)`."""
    import nibabel

    nibabel.save(nibabel.Nifti1Image(pixels[0].T, np.eye(4), dtype=pixels.dtype), path)


def map_npy(path: Path) -> Array:
    """An npy file, mapped."""
    return np.load(path, mmap_mode="r")


def ways(problem: Problem, formats: bool = False) -> dict[str, Way]:
    """The ways to read a problem, by name; `formats` adds other chunks and filters.

    A PNG holds unsigned integers of 8 or 16 bits, so that there is none of other images.
    """
    n = len(problem.size)
    found: dict[str, Way] = {
        DEFAULT: lambda folder, like: (like, like.paths),
        "shard, whole samples": lambda folder, like: (Whole(like.paths[0]), like.paths),
        "npy, mapped": partial(_a_file_each, ".npy", np.save, map_npy),
    }
    if n == 2 and problem.dtype in ("uint8", "uint16"):
        found["PNG a sample"] = partial(_a_file_each, ".png", write_png, read_png)
    if n == 3:
        found["NIfTI a sample"] = partial(_a_file_each, ".nii.gz", write_nifti, read_nifti)
    if not formats:
        return found
    shuffle = problem.itemsize > 1
    filters: dict[str, dict[str, Any]] = {
        "none": {},
        "gzip": {"compression": "gzip", "compression_opts": 1, "shuffle": shuffle},
        "lzf": {"compression": "lzf", "shuffle": shuffle},
    }
    for edge in (128, 256, 512) if n == 2 else (16, 32, 64):
        for name, options in filters.items():
            found[f"chunks of {edge}, {name}"] = partial(_rechunked, (edge,) * n, options)
    return found


def check_ways(names: Sequence[str], problems: Sequence[Problem], formats: bool = False) -> None:
    """Refuse a name of a way that none of the problems has."""
    there = dict.fromkeys(name for problem in problems for name in ways(problem, formats))
    for name in names:
        require(name in there, f"against must be one of {'; '.join(_short(list(there)))}, got {name!r}")


def _short(names: Sequence[str]) -> list[str]:
    chunks = [name for name in names if name.startswith("chunks")]
    return [name for name in names if name not in chunks] + ([f"{chunks[0]} and so on"] if chunks else [])


def _a_file_each(
    suffix: str, write: Callable[[Path, Array], None], read: Callable[[Path], Array], folder: Path, like: ShardSet
) -> tuple[Files, list[Path]]:
    files = [folder / f"{index}{suffix}" for index in range(len(like))]
    for index, path in enumerate(files):
        write(path, like.pixels(index)[0])
    return Files(files, like, read), files


def _rechunked(
    chunks: tuple[int, ...], filters: dict[str, Any], folder: Path, like: ShardSet
) -> tuple[ShardSet, list[Path]]:
    path = folder / "other-chunks.h5"
    with h5py.File(like.paths[0], locking=False) as old, h5py.File(path, "w", libver=("v110", "v110")) as new:
        for key, value in old.attrs.items():
            new.attrs[key] = value
        for name in ("sizes", "scaling", "splits"):
            old.copy(name, new)
        for name, dataset in old["samples"].items():
            fit = tuple(min(c, s) for c, s in zip((1, *chunks), dataset.shape, strict=True))
            made = new.create_dataset(f"samples/{name}", data=dataset[()], chunks=fit, fletcher32=True, **filters)
            for key, value in dataset.attrs.items():
                made.attrs[key] = value
    return ShardSet(path), [path]
