"""How fast random crops reach the training process, and how much is read for them: shards against the usual ways.

Every way serves the same crops of the same images in the same order through the same loader, and is checked to give
the same pixels before it is timed. What is stored and how it is read is in `coverfast.bench.data_ways`.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from coverfast.bench.data_ways import DEFAULT, LARGE, Files, Problem, map_npy, stored_as, ways, write_shard
from coverfast.checks import require
from coverfast.loader import ImageStream, RandomCrops, load_batches
from coverfast.shard_set import ShardSet


@dataclass
class Row:
    """One way of reading one problem. Rates are crops a second, medians over passes with their extremes.

    size, crop, dtype: of the images as they are stored. device: where crops are delivered, as stored on a CPU and
    scaled to [0, 1] on a GPU. stored: bytes on the disk an image over those of its pixels. read: MB read from files a
    crop, in a process of its own. over: bytes read over those of the chunks that the crop touches, as they are stored.
    """

    problem: str
    way: str
    size: tuple[int, ...]
    crop: tuple[int, ...]
    dtype: str
    device: str
    workers: int
    warm: float | None = None
    warm_spread: tuple[float, float] | None = None
    cold: float | None = None
    stored: float | None = None
    read: float | None = None
    over: float | None = None
    default: bool = False


def _row(problem: Problem, way: str, device: str, workers: int) -> Row:
    of = problem.size, problem.crop, problem.dtype, device, workers
    return Row(problem.name, way, *of, default=way == DEFAULT)


def measure(
    folder: Path,
    problems: Sequence[Problem],
    *,
    names: Sequence[str] = (),
    workers: int = 2,
    repeats: int = 3,
    formats: bool = False,
    crops: int | None = None,
    device: str = "cpu",
) -> Iterator[Row]:
    """Measure the named ways of every problem, by default all, each as soon as its files are written to `folder`.

    workers: reading processes. repeats: passes, of which the median counts. crops: a pass; default about two seconds'
    worth. device: where the crops are to be.
    """
    for problem in problems:
        chosen = {name: way for name, way in ways(problem, formats).items() if not names or name in names}
        if not chosen:
            continue
        here = folder / problem.name.replace(" ", "-")
        here.mkdir(parents=True, exist_ok=True)
        default = ShardSet(write_shard(here / "default.h5", problem))
        expected = _sums(_stream(default, problem))
        for name, way in chosen.items():
            data, files = way(here, default)
            row = _row(problem, name, device, workers)
            same = bool((_sums(_stream(data, problem)) == expected).all())
            require(same, f"{name} must give the same pixels as the shard, but it does not")
            row.stored = sum(f.stat().st_size for f in files) / (problem.count * prod(problem.size) * problem.itemsize)
            count = crops or (2000 if len(problem.size) == 2 else 60)
            rates = [_rate(_stream(data, problem), problem, workers, count, device) for _ in range(repeats)]
            row.warm, row.warm_spread = statistics.median(rates), (min(rates), max(rates))
            cold = []
            for _ in range(repeats):
                forget(files)
                cold.append(_rate(_stream(data, problem), problem, workers, min(count, problem.count), device))
            row.cold = statistics.median(cold)
            row.read, row.over = _read(data, problem)
            yield row
            for path in files if files != default.paths else ():
                path.unlink()
        default.close()
        _clear(here)


def measure_large(folder: Path, dtype: str | None = None, *, device: str = "cpu") -> Iterator[Row]:
    """What is read for a small crop of a large image, in the default format."""
    for usual in LARGE:
        problem = stored_as(usual, dtype or usual.dtype)
        folder.mkdir(parents=True, exist_ok=True)
        data, row = ShardSet(write_shard(folder / f"{problem.name}.h5", problem)), _row(problem, DEFAULT, device, 0)
        row.read, row.over = _read(data, problem)
        row.warm = _rate(_stream(data, problem), problem, 0, 10 * problem.batch, device)
        yield row
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


def _stream(data: Any, problem: Problem) -> ImageStream:
    return ImageStream(data, batch=problem.batch, seed=3, regions=RandomCrops(problem.crop))


def _sums(stream: ImageStream) -> NDArray[np.int64]:
    """A number for every crop of two batches that depends on all of its pixels, to the last bit."""
    found = [stream.load(i).images.numpy() for i in (1, 2)]
    found = [(f.view(np.int32) if f.dtype.kind == "f" else f).astype(np.int64) for f in found]
    weights = 1 + np.arange(found[0][0].size) % 997
    return np.concatenate([f.reshape(len(f), -1) @ weights for f in found])


def _rate(stream: ImageStream, problem: Problem, workers: int, crops: int, device: str) -> float:
    """Crops a second from the first batch on: starting the processes is not counted."""
    last = 1 + max(2, -(-crops // problem.batch))
    gpu = device == "cuda"
    batches = load_batches(stream, last=last, workers=workers, device="cuda" if gpu else None)
    next(batches)
    started = time.perf_counter()
    count = sum(len(b.images) for b in batches)
    if gpu:
        torch.cuda.synchronize()
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
