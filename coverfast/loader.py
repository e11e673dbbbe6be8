"""From shards to the training device: which samples an iteration sees, which part of them, and how they get there.

Everything is a function of (seed, iteration): the same batches for any number of reading processes, for any split over
ranks, and from any iteration on.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from coverfast.checks import InputError, check_choice, per_axis, require
from coverfast.geometry import Size
from coverfast.machine import usable_cores
from coverfast.philox import STREAM_CROP, STREAM_SPARE, permutation, scalar_uniform
from coverfast.samples import ON_BAD_SAMPLE
from coverfast.shard_reader import Allocate
from coverfast.shard_set import PathLike, ShardSet

#: Which part of each image an iteration needs: from (seed, iteration, positions in the batch `(B,)`, sizes `(B, n)`) to
#: the first pixel and one past the last, `(B, n, 2)`.
Regions = Callable[[int, int, NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]


@dataclass(frozen=True)
class RandomCrops:
    """Crops at random places; all of an axis that is shorter than the crop."""

    crop: tuple[int, ...]

    def __call__(
        self, seed: int, iteration: int, samples: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """See `Regions`."""
        u = scalar_uniform(seed, STREAM_CROP, iteration, samples, len(self.crop))
        shape = np.minimum(self.crop, sizes)
        start = np.floor(u * (sizes - shape + 1)).astype(np.int64)
        return np.stack([start, start + shape], axis=-1)


class Images(NamedTuple):
    """Parts of the images of one iteration.

    images: `(B, C, *S)` stored values on the host, float32 in [0, 1] once `to_device` has scaled them; zero beyond
    `extents`. On the CPU: extents: `(B, n)` shape of each part. corner: `(B, n)` its first pixel in the whole image.
    sizes: `(B, n)` of the whole images. scaling: `(B, 4)` float64 slope, intercept, lo, hi. samples: `(B,)` position of
    each in the global batch. indices: `(B,)` place of each sample in the set. bad: why samples were replaced, a
    sentence each.
    """

    images: Tensor
    extents: Tensor
    corner: Tensor
    sizes: Tensor
    scaling: Tensor
    samples: Tensor
    indices: Tensor
    iteration: int
    bad: list[str]


#: Pixels whose float64 form stays in a core's cache.
_CACHED = 1 << 15
#: So many other samples are tried in the place of one that cannot be read.
_ATTEMPTS = 100
_SMALL = ("extents", "corner", "sizes", "scaling", "samples", "indices")


class ImageStream(Dataset[Images | InputError]):
    """The batches of an endless stream of seeded permutations; item `i` (from 1) is what iteration `i` sees.

    data: the samples. batch: images an iteration over all ranks. regions: which part of each is read. crops: how
    often in a row a sample is visited, its chunks then being read once. rank, world: this process and how many there
    are; each sees its own `batch / world` of every batch. on_bad_sample: "skip" replaces a sample that cannot be read
    by others, drawn for its place in the stream, and says so in `Images.bad`. least: images are filled with zeros at
    the high end to at least this size.
    """

    def __init__(
        self,
        data: ShardSet,
        *,
        batch: int,
        seed: int,
        regions: Regions,
        crops: int = 1,
        rank: int = 0,
        world: int = 1,
        on_bad_sample: str = "stop",
        least: tuple[int, ...] = (),
    ) -> None:
        for name, value in (("batch", batch), ("crops", crops), ("world", world)):
            require(isinstance(value, int) and value >= 1, f"{name} must be an int of at least 1, got {value!r}")
        require(isinstance(seed, int) and 0 <= seed < 2**64, f"seed must be an int in [0, 2^64), got {seed!r}")
        require(
            0 <= rank < world and batch % world == 0,
            f"batch must be divisible by the number of processes, got {batch} and {world}",
        )
        check_choice("on_bad_sample", on_bad_sample, ON_BAD_SAMPLE)
        self.data, self.batch, self.seed, self.regions, self.crops = data, batch, seed, regions, crops
        self.rank, self.world, self.on_bad_sample, self.least = rank, world, on_bad_sample, least
        self._epoch, self._order = -1, torch.empty(0)

    def index(self, position: int) -> int:
        """Which sample stands at a position of the stream."""
        epoch, place = divmod(position // self.crops, len(self.data))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.seed, epoch, len(self.data))
        return int(self._order[place])

    def __getitem__(self, iteration: int) -> Images | InputError:
        # A worker process would wrap an exception in a traceback of its own.
        try:
            found = self.load(iteration)
        except InputError as error:
            return error
        # A tensor crosses to another process as a file of shared memory and a call: only images are worth that.
        return found._replace(**{name: getattr(found, name).numpy() for name in _SMALL})

    def load(self, iteration: int) -> Images:
        """The batch of an iteration, on the host."""
        share = self.batch // self.world
        samples = np.arange(self.rank * share, (self.rank + 1) * share)
        chosen = [self.index((iteration - 1) * self.batch + int(s)) for s in samples]
        return self.gather(iteration, samples, np.array(chosen))

    def gather(self, iteration: int, samples: NDArray[np.int64], chosen: NDArray[np.int64]) -> Images:
        """Read the parts of the chosen samples that the positions `samples` of an iteration's batch need."""
        chosen, bad = chosen.copy(), []
        ends = self.regions(self.seed, iteration, samples, self.data.sizes[chosen])
        together = _Together(len(samples), ends, self.least)
        parts: dict[int, NDArray[Any]] = {}
        for index in dict.fromkeys(chosen.tolist()):
            slots = np.flatnonzero(chosen == index)
            for attempt in range(_ATTEMPTS):
                if attempt:
                    # Drawn, not the next one: that would be seen for all the lost ones before it.
                    u = scalar_uniform(self.seed, STREAM_SPARE, iteration, samples[slots[:1]], attempt)[0, -1]
                    chosen[slots] = int(u * len(self.data))
                    ends[slots] = self.regions(self.seed, iteration, samples[slots], self.data.sizes[chosen[slots]])
                try:
                    boxes = [[slice(a, b) for a, b in box] for box in ends[slots].tolist()]
                    read = self.data.pixels(int(chosen[slots[0]]), boxes, together.room(slots.tolist()))
                    parts |= zip(slots.tolist(), read, strict=True)
                    break
                except InputError as error:
                    if self.on_bad_sample == "stop":
                        raise
                    bad.append(str(error))
            else:
                raise InputError(f"one sample in {_ATTEMPTS} must be readable, got none: {bad[-1]}")
        corner, extents = np.ascontiguousarray(ends[..., 0]), ends[..., 1] - ends[..., 0]
        ordered = [parts[slot] for slot in range(len(samples))]
        images, scaling = together.stack(ordered, extents, self.data.scaling[chosen])
        arrays = (extents, corner, self.data.sizes[chosen], scaling, samples, chosen)
        tensors: Any = tuple(torch.from_numpy(array) for array in arrays)
        return Images._make((images, *tensors, iteration, bad))


class _Together:
    """The memory of a batch, into whose slots samples are read without a copy; shared where another process waits.

    Its size and type are those of the first sample read: one that does not fit gets memory of its own.
    """

    def __init__(self, count: int, ends: NDArray[np.int64], least: tuple[int, ...]) -> None:
        self.count, self.least = count, least
        self.shape = self._size(ends[..., 1] - ends[..., 0])
        self.images: Tensor | None = None
        self.slots: NDArray[Any] = np.empty(0)

    def _size(self, extents: NDArray[np.int64]) -> tuple[int, ...]:
        size = extents.max(0)
        return tuple((np.maximum(size, self.least) if self.least else size).tolist())

    def room(self, slots: Sequence[int]) -> Allocate:
        def allocate(number: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
            if self.images is None:
                self.images = _zeros((self.count, shape[0], *self.shape), dtype)
                self.slots = self.images.numpy()
            slot: NDArray[Any] = self.slots[slots[number]]
            fits = slot.dtype == dtype and all(s >= n for s, n in zip(slot.shape, shape, strict=True))
            return slot if fits else np.zeros(shape, dtype)

        return allocate

    def stack(
        self, parts: Sequence[NDArray[Any]], extents: NDArray[np.int64], scaling: NDArray[np.float64]
    ) -> tuple[Tensor, NDArray[np.float64]]:
        """The parts, zero-filled at the high end to a common size; of several types, each brought to [0, 1]."""
        if self.images is not None and all(np.shares_memory(p, s) for p, s in zip(parts, self.slots, strict=True)):
            return self.images, scaling
        several = len({part.dtype for part in parts}) > 1
        dtype = np.dtype(np.float32) if several else parts[0].dtype
        images = _zeros((self.count, parts[0].shape[0], *self._size(extents)), dtype)
        for slot, part, extent, row in zip(images.numpy(), parts, extents.tolist(), scaling, strict=True):
            inside = (slice(None), *map(slice, extent))
            found = part[inside]
            slot[inside] = to_unit_range(torch.from_numpy(found)[None], row[None])[0] if several else found
        return images, np.tile([1.0, 0.0, 0.0, 1.0], (self.count, 1)) if several else scaling


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
    if get_worker_info() is None:
        return torch.from_numpy(np.zeros(shape, dtype))
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    # What torch's own collation does, to spare a copy: new shared memory, which is zero.
    size = math.prod(shape) * dtype.itemsize
    return torch.empty(0, dtype=kind).set_(torch.UntypedStorage._new_shared(size)).view(kind).reshape(shape)


def to_unit_range(stored: Tensor, scaling: Tensor | NDArray[np.float64]) -> Tensor:
    """`(stored * slope + intercept - lo) / (hi - lo)` in [0, 1], in float64, then rounded to float32.

    stored: `(B, C, *S)`. scaling: `(B, 4)`, slope, intercept, lo, hi. Images with hi <= lo are all 0.
    """
    slope, intercept, lo, hi = np.asarray(scaling, np.float64).T
    flat = hi <= lo
    factors = np.stack([np.where(flat, 0.0, slope), np.where(flat, 0.0, intercept - lo), np.where(flat, 1.0, hi - lo)])
    if stored.is_cuda:
        on_device = torch.from_numpy(factors).to(stored.device, non_blocking=True)
        slope_, shift, span = on_device.reshape(3, -1, *[1] * (stored.ndim - 1)).unbind()
        return stored.double().mul_(slope_).add_(shift).div_(span).clamp_(0, 1).float()
    # A cache full at a time: float64 of the whole batch would go through memory five times.
    out = torch.empty(stored.shape)
    numbers = zip(stored.flatten(1), out.view(len(out), -1), *factors.tolist(), strict=True)
    for image, result, a, b, c in numbers:
        for start in range(0, len(image), _CACHED):
            part = image[start : start + _CACHED].double().mul_(a).add_(b).div_(c)
            result[start : start + _CACHED] = part.clamp_(0, 1)
    return out


def to_device(batch: Images, device: torch.device) -> Images:
    """The images as they are stored to the device, there to [0, 1]."""
    images = to_unit_range(batch.images.to(device, non_blocking=True), batch.scaling)
    for axis, size in enumerate(images.shape[2:]):
        if bool((batch.extents[:, axis] < size).any()):
            inside = torch.arange(size) < batch.extents[:, axis, None]
            shape = [len(images), 1, *(size if i == axis else 1 for i in range(images.ndim - 2))]
            images *= inside.to(device, non_blocking=True).reshape(shape)
    return batch._replace(images=images)


class _Iterations:
    def __init__(self, first: int, last: int | None) -> None:
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[int]:
        iteration = self.first
        while self.last is None or iteration <= self.last:
            yield iteration
            iteration += 1


def load_batches(
    stream: ImageStream,
    *,
    first: int = 1,
    last: int | None = None,
    workers: int = 0,
    device: torch.device | str | None = "cpu",
    start_method: str | None = None,
) -> Iterator[Images]:
    """Batches `first .. last` (None: without end), on `device` in [0, 1], or on the host as they are stored (None).

    workers: reading processes; 0 reads in this one. start_method: "fork", "spawn", "forkserver" or None for Python's
    choice. On a GPU the next batch is copied from pinned memory while this one is worked on. `InputError`: a sample
    that cannot be read, unless the stream skips it, and a reading process that died.
    """
    fits = isinstance(first, int) and first >= 1 and (last is None or isinstance(last, int))
    require(fits, f"first must be an int of at least 1 and last an int or None, got {first!r} and {last!r}")
    require(isinstance(workers, int) and workers >= 0, f"workers must be an int of at least 0, got {workers!r}")
    device = None if device is None else torch.device(device)
    gpu = device is not None and device.type == "cuda"
    require(not gpu or torch.cuda.is_available(), f"device must be one that is there, but torch finds no GPU: {device}")
    loader = DataLoader(
        stream,
        batch_size=None,
        collate_fn=_as_it_is,
        sampler=_Iterations(first, last),
        num_workers=workers,
        pin_memory=gpu,
        multiprocessing_context=start_method if workers else None,
    )
    sound = _sound(loader)
    yield from sound if device is None else _ahead(sound, device)


def _as_it_is(batch: Any) -> Any:
    return batch


def _sound(loader: Iterable[Images | InputError]) -> Iterator[Images]:
    try:
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            small: dict[str, Any] = {name: torch.from_numpy(getattr(batch, name)) for name in _SMALL}
            yield batch._replace(**small)
    except (EOFError, ConnectionError, FileNotFoundError, RuntimeError) as error:
        # The signal of a process's death may still be on its way, and torch raises wherever it arrives.
        with contextlib.suppress(RuntimeError):
            time.sleep(0.5)
        if lost := lost_reader(error):
            raise lost from error
        raise


def lost_reader(error: BaseException) -> InputError | None:
    """The refusal if an error means that a reading process has died; torch may raise it anywhere in the main thread."""
    # What a process raised is told as "in DataLoader worker process 0", its death as "DataLoader worker (pid ...".
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
        return None
    if "in DataLoader worker process" in str(error):
        return None
    return InputError(
        "reading processes must live as long as the run, but one ended (too little memory, or a script without "
        f"`if __name__ == '__main__':`?): {error or type(error).__name__}"
    )


def _ahead(batches: Iterator[Images], device: torch.device) -> Iterator[Images]:
    """Batches on the device; on a GPU each is on its way there while the one before is worked on."""
    if device.type != "cuda":
        for batch in batches:
            yield to_device(batch, device)
        return
    stream = torch.cuda.Stream(device)
    waiting: tuple[Images, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = to_device(batch, device), stream.record_event()
        if waiting:
            yield _arrived(*waiting)
        waiting = moved
    if waiting:
        yield _arrived(*waiting)


def _arrived(batch: Images, event: torch.cuda.Event) -> Images:
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(event)
    batch.images.record_stream(current)
    return batch


def crop_loader(
    data: PathLike | list[PathLike],
    crop: Size,
    *,
    batch: int,
    seed: int = 0,
    split: str = "train",
    crops: int = 1,
    first: int = 1,
    last: int | None = None,
    workers: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    on_bad_sample: str = "stop",
) -> Iterator[Images]:
    """Random crops of the samples of shards, for a training loop of your own; see `ShardSet` and `ImageStream`.

    crop: an int or one per axis. Yields `Images` with float32 images `(batch / world, C, *crop)` in [0, 1] on `device`,
    smaller images zero-filled. Begin at `first` to go on where another run stopped.
    """
    shards = ShardSet(data, split)
    size = per_axis("crop", crop, shards.ndim)
    stream = ImageStream(
        shards,
        batch=batch,
        seed=seed,
        regions=RandomCrops(size),
        least=size,
        crops=crops,
        rank=rank,
        world=world,
        on_bad_sample=on_bad_sample,
    )
    return load_batches(stream, first=first, last=last, workers=workers, device=device)


def reading_processes(device: torch.device) -> int:
    """How many processes to read with: the cores but one, at most eight, for a GPU; none where the CPU trains."""
    return min(8, max(1, usable_cores() - 1)) if device.type == "cuda" else 0
