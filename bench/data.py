"""How fast random crops reach the training process, and how much is read for them: shards against the usual ways.

Every way serves the same crops of the same images in the same order through the same loader, and is checked to give
the same pixels before it is timed. Images are phantoms (`coverfast.phantom`), shifted to be as many as asked.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from coverfast.checks import require
from coverfast.loader import ImageStream, RandomCrops, load_batches
from coverfast.phantom import phantom
from coverfast.shard_reader import Allocate, Region
from coverfast.shard_set import ShardSet
from coverfast.shards import Sample, ShardWriter

Array = NDArray[Any]


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
    def spec(self) -> str:
        """For people: crop, size and type."""
        crop, size = ("x".join(map(str, v)) for v in (self.crop, self.size))
        return f"{crop} of {size} {self.dtype}"


PROBLEMS = (
    Problem("2D", (512, 512), (384, 384), "uint8", 256, 24),
    Problem("3D", (160, 160, 128), (128, 128, 128), "int16", 16, 2),
)
LARGE = (
    Problem("large 2D", (4096, 4096), (384, 384), "uint8", 1, 4),
    Problem("large 3D", (512, 512, 512), (128, 128, 128), "int16", 1, 2),
)


@dataclass
class Row:
    """One way of reading one problem. Rates are crops a second, medians over passes with their extremes.

    stored: bytes on the disk an image over those of its pixels. read: MB read from files a crop, in a process of its
    own. over: bytes read over those of the chunks that the crop touches, as they are stored.
    """

    problem: str
    way: str
    warm: float | None = None
    warm_spread: tuple[float, float] | None = None
    cold: float | None = None
    stored: float | None = None
    read: float | None = None
    over: float | None = None
    default: bool = False


class Files:
    """One file a sample, decoded whole and then cropped; or, for npy, mapped and cropped."""

    def __init__(self, paths: Sequence[Path], like: ShardSet, read: Callable[[Path], Array]) -> None:
        self.paths, self.sizes, self.scaling, self.read_file = list(paths), like.sizes, like.scaling, read

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self, index: int, regions: Sequence[Region], allocate: Allocate) -> list[Array]:
        """See `ShardSet.pixels`."""
        return _cropped(self.read_file(self.paths[index]), regions, allocate)


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


def read_nifti(path: Path) -> Array:
    """A compressed NIfTI as `(1, z, y, x)`."""
    import nibabel

    return np.asarray(nibabel.load(path).dataobj).T[None]  # type: ignore[attr-defined]


def map_npy(path: Path) -> Array:
    """An npy file, mapped."""
    return np.load(path, mmap_mode="r")


def images(problem: Problem) -> Iterator[Array]:
    """`(1, *S)` images with the grain and the empty borders of real ones."""
    if problem in LARGE:  # drawing anatomy of this size takes minutes
        rng = np.random.default_rng(0)
        yield rng.integers(0, 200, (1, *problem.size), np.uint8).astype(problem.dtype)
        return
    few = [phantom(len(problem.size), problem.size, seed=1, index=i).image for i in range(min(4, problem.count))]
    for number in range(problem.count):
        image = np.roll(few[number % len(few)], 5 * (number // len(few)), axis=-1)
        top = 255 if problem.dtype == "uint8" else 2047
        yield (image * top).round().astype(problem.dtype)[None]


def write_shard(path: Path, problem: Problem) -> Path:
    """The images of a problem as a shard."""
    with ShardWriter(path, preprocessing={}) as writer:
        for number, pixels in enumerate(images(problem)):
            spacing = (1.0,) * len(problem.size)
            writer.add(Sample(pixels, 1.0, 0.0, 0.0, float(pixels.max()), spacing, str(number)))
    return path


def rechunked(source: Path, out: Path, chunks: tuple[int, ...], **filters: Any) -> Path:
    """A copy of a shard with other chunks and filters."""
    with h5py.File(source, locking=False) as old, h5py.File(out, "w", libver=("v110", "v110")) as new:
        for key, value in old.attrs.items():
            new.attrs[key] = value
        for name in ("sizes", "scaling", "splits"):
            old.copy(name, new)
        for name, dataset in old["samples"].items():
            fit = tuple(min(c, s) for c, s in zip((1, *chunks), dataset.shape, strict=True))
            made = new.create_dataset(f"samples/{name}", data=dataset[()], chunks=fit, fletcher32=True, **filters)
            for key, value in dataset.attrs.items():
                made.attrs[key] = value
    return out


def ways(problem: Problem, folder: Path, formats: bool) -> Iterator[tuple[str, Any, list[Path]]]:
    """Name, data and files of every way to read a problem; `formats` adds other chunks and filters."""
    n = len(problem.size)
    shard = write_shard(folder / "default.h5", problem)
    default = ShardSet(shard)
    yield "shard, crops", default, [shard]
    yield "shard, whole samples", Whole(shard), [shard]
    arrays = [folder / f"{i}.npy" for i in range(problem.count)]
    for path, pixels in zip(arrays, images(problem), strict=True):
        np.save(path, pixels)
    yield "npy, mapped", Files(arrays, default, map_npy), arrays
    if n == 2:
        from PIL import Image

        files = [folder / f"{i}.png" for i in range(problem.count)]
        for path, pixels in zip(files, images(problem), strict=True):
            Image.fromarray(pixels[0]).save(path)
        yield "PNG a sample", Files(files, default, read_png), files
    else:
        import nibabel

        files = [folder / f"{i}.nii.gz" for i in range(problem.count)]
        for path, pixels in zip(files, images(problem), strict=True):
            nibabel.save(nibabel.Nifti1Image(pixels[0].T, np.eye(4)), path)
        yield "NIfTI a sample", Files(files, default, read_nifti), files
    if not formats:
        return
    gzip = {"compression": "gzip", "compression_opts": 1, "shuffle": problem.dtype != "uint8"}
    for edge in (128, 256, 512) if n == 2 else (16, 32, 64):
        for name, filters in (("none", {}), ("gzip", gzip), ("lzf", gzip | {"compression": "lzf"})):
            filters = {k: v for k, v in filters.items() if not (name == "lzf" and k == "compression_opts")}
            path = rechunked(shard, folder / f"{edge}-{name}.h5", (edge,) * n, **filters)
            yield f"chunks of {edge}, {name}", ShardSet(path), [path]
            path.unlink()


def measure(
    folder: Path, *, workers: int = 2, repeats: int = 3, formats: bool = False, crops: int | None = None
) -> Iterator[Row]:
    """Measure every way of every problem, each as soon as its files are written to `folder`.

    workers: reading processes. repeats: passes, of which the median counts. crops: a pass; default about two seconds'
    worth.
    """
    for problem in PROBLEMS:
        expected: NDArray[np.int64] | None = None
        here = folder / problem.name.replace(" ", "-")
        here.mkdir(parents=True, exist_ok=True)
        for name, data, files in ways(problem, here, formats):
            row = Row(problem.name, name, default=name == "shard, crops")
            sums = _sums(_stream(data, problem))
            expected = sums if expected is None else expected
            require(bool((sums == expected).all()), f"{name} must give the same pixels as the shard, but it does not")
            raw = problem.count * int(np.prod(problem.size)) * np.dtype(problem.dtype).itemsize
            row.stored = sum(f.stat().st_size for f in files) / raw
            count = crops or (2000 if len(problem.size) == 2 else 60)
            rates = [_rate(_stream(data, problem), problem, workers, count) for _ in range(repeats)]
            row.warm, row.warm_spread = statistics.median(rates), (min(rates), max(rates))
            cold = []
            for _ in range(repeats):
                forget(files)
                cold.append(_rate(_stream(data, problem), problem, workers, min(count, problem.count)))
            row.cold = statistics.median(cold)
            row.read, row.over = _read(data, problem)
            yield row
        _clear(here)


def measure_large(folder: Path) -> Iterator[Row]:
    """What is read for a small crop of a large image, in the default format."""
    for problem in LARGE:
        folder.mkdir(parents=True, exist_ok=True)
        data = ShardSet(write_shard(folder / f"{problem.name}.h5", problem))
        read, over = _read(data, problem)
        warm = _rate(_stream(data, problem), problem, 0, 10 * problem.batch)
        yield Row(problem.name, "shard, crops", warm=warm, read=read, over=over, default=True)
        data.close()
        _clear(folder)


def forget(files: Sequence[Path]) -> None:
    """Drop files from the system's cache, so that the next read comes from the disk."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def as_rows(found: Sequence[Row]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(row) for row in found]


def _stream(data: Any, problem: Problem) -> ImageStream:
    return ImageStream(data, batch=problem.batch, seed=3, regions=RandomCrops(problem.crop))


def _sums(stream: ImageStream) -> NDArray[np.int64]:
    found = [stream.load(i).images.numpy().astype(np.int64) for i in (1, 2)]
    weights = 1 + np.arange(found[0][0].size) % 997
    return np.concatenate([f.reshape(len(f), -1) @ weights for f in found])


def _rate(stream: ImageStream, problem: Problem, workers: int, crops: int) -> float:
    """Crops a second from the first batch on: starting the processes is not counted."""
    last = 1 + max(2, -(-crops // problem.batch))
    batches = load_batches(stream, last=last, workers=workers, device=None)
    next(batches)
    started = time.perf_counter()
    count = sum(len(b.images) for b in batches)
    return count / (time.perf_counter() - started)


def _read(data: Any, problem: Problem, batches: int = 6) -> tuple[float | None, float | None]:
    """MB read a crop by the kernel's count, and that over the stored size of the chunks that the crops touch."""
    counter = Path("/proc/self/io")
    if not counter.exists():
        return None, None
    stream = _stream(data, problem)
    stream.load(1)

    def total() -> int:
        return int(counter.read_text().split("rchar:")[1].split()[0])

    # Reading the counter is itself counted.
    before = total()
    own = total() - before
    before = total()
    found = [stream.load(iteration) for iteration in range(2, 2 + batches)]
    read, crops = total() - before - own, sum(len(batch.images) for batch in found)
    needed = sum(_touched(data, batch) for batch in found) if type(data) is ShardSet else 0
    if isinstance(data, Files) and data.read_file is map_npy:
        return None, None  # pages come in without a read
    return read / crops / 1e6, read / needed if needed else None


def _touched(data: ShardSet, batch: Any) -> int:
    """Bytes on the disk of the chunks that a batch's crops touch."""
    stored = 0
    corners, extents = batch.corner.numpy(), batch.extents.numpy()
    for index, first, shape in zip(batch.indices.tolist(), corners, extents, strict=True):
        path, sample = data.place(index)
        with h5py.File(path, locking=False) as file:
            dataset = file[f"samples/{sample:08d}"]
            for number in range(dataset.id.get_num_chunks()):
                chunk = dataset.id.get_chunk_info(number)
                start, side = np.array(chunk.chunk_offset[1:]), np.array(dataset.chunks[1:])
                if ((start < first + shape) & (start + side > first)).all():
                    stored += chunk.size
    return stored


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            path.unlink()


__all__ = ["LARGE", "PROBLEMS", "Problem", "Row", "as_rows", "forget", "measure", "measure_large"]
