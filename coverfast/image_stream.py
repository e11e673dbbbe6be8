"""Which samples an iteration sees and which part of them, read into the memory of a batch.

Everything is a function of (seed, iteration): the same batches for any number of reading processes, for any split over
ranks, and from any iteration on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from coverfast.checks import InputError, check_choice, require
from coverfast.foreground import ForegroundMaps, foreground_draws
from coverfast.philox import STREAM_CROP, STREAM_PARTNER, STREAM_SPARE, permutation, scalar_uniform
from coverfast.samples import ON_BAD_SAMPLE
from coverfast.shard_reader import Allocate
from coverfast.shard_set import ShardSet
from coverfast.view_draws import centred

Ints = NDArray[np.int64]
#: Which part of each image an iteration needs: from (seed, iteration, positions in the batch `(B,)`, sizes `(B, n)`,
#: pixels to centre crops on `(B, n)` or -1) to the first pixel and one past the last, `(B, n, 2)`.
Regions = Callable[[int, int, Ints, Ints, Ints], Ints]


@dataclass(frozen=True)
class RandomCrops:
    """Crops at random places, or about the pixels `focus`; all of an axis that is shorter than the crop."""

    crop: tuple[int, ...]

    def __call__(self, seed: int, iteration: int, samples: Ints, sizes: Ints, focus: Ints | None = None) -> Ints:
        """See `Regions`."""
        u = scalar_uniform(seed, STREAM_CROP, iteration, samples, len(self.crop))
        shape = np.minimum(self.crop, sizes)
        start = centred(np.floor(u * (sizes - shape + 1)).astype(np.int64), focus, sizes, self.crop)
        return np.stack([start, start + shape], axis=-1)


class Images(NamedTuple):
    """Parts of the images of one iteration.

    images: `(B, C, *S)` stored values on the host, float32 in [0, 1] once `to_device` has scaled them; zero beyond
    `extents`. On the CPU: extents: `(B, n)` shape of each part. corner: `(B, n)` its first pixel in the whole image.
    focus: `(B, n)` the pixel of the whole image that its crop is centred on, as far as it fits, -1 for none. sizes:
    `(B, n)` of the whole images. scaling: `(B, 4)` float64 slope, intercept, lo, hi. samples: `(B,)` position of each
    in the global batch. indices: `(B,)` place of each sample in the set. bad: why samples were replaced, a sentence
    each. labels: `(B, *S)` uint8 class indices of the same parts, places in `ShardSet.label_classes`, 0 beyond
    `extents`; None unless the stream reads labels. targets: `(B,)` int64 places in `ShardSet.target_classes`, -1 for
    none, and for all where the shards differ in those.
    """

    images: Tensor
    extents: Tensor
    corner: Tensor
    focus: Tensor
    sizes: Tensor
    scaling: Tensor
    samples: Tensor
    indices: Tensor
    iteration: int
    bad: list[str]
    labels: Tensor | None
    targets: Tensor


#: Pixels whose float64 form stays in a core's cache.
_CACHED = 1 << 15
#: So many other samples are tried in the place of one that cannot be read.
_ATTEMPTS = 100
SMALL = ("extents", "corner", "focus", "sizes", "scaling", "samples", "indices", "targets")


class ImageStream(Dataset[Images | InputError]):
    """The batches of an endless stream of seeded permutations; item `i` (from 1) is what iteration `i` sees.

    data: the samples. batch: images an iteration over all ranks. regions: which part of each is read. crops: how
    often in a row a sample is visited, its chunks then being read once. foreground: share of the images that get a
    `focus` on their foreground, see `coverfast.foreground`; each is then read as a whole once. rank, world: this
    process and how many there are; each sees its own `batch / world` of every batch. on_bad_sample: "skip" replaces a
    sample that cannot be read by others, drawn for its place in the stream, and says so in `Images.bad`. least: images
    are filled with zeros at the high end to at least this size. labels: read the label maps too; `InputError` unless
    the shards have them, of the same classes. pairs: `batch` pairs an iteration instead of single images: after each
    image another one, drawn from all the others; both get their focus, if any, at about the same place.
    """

    def __init__(
        self,
        data: ShardSet,
        *,
        batch: int,
        seed: int,
        regions: Regions,
        crops: int = 1,
        foreground: float = 0.0,
        rank: int = 0,
        world: int = 1,
        on_bad_sample: str = "stop",
        least: tuple[int, ...] = (),
        labels: bool = False,
        pairs: bool = False,
    ) -> None:
        for name, value in (("batch", batch), ("crops", crops), ("world", world)):
            require(isinstance(value, int) and value >= 1, f"{name} must be an int of at least 1, got {value!r}")
        require(isinstance(seed, int) and 0 <= seed < 2**64, f"seed must be an int in [0, 2^64), got {seed!r}")
        number = isinstance(foreground, int | float)
        require(number and 0 <= foreground <= 1, f"foreground must be a share in [0, 1], got {foreground!r}")
        require(
            0 <= rank < world and batch % world == 0,
            f"batch must be divisible by the number of processes, got {batch} and {world}",
        )
        check_choice("on_bad_sample", on_bad_sample, ON_BAD_SAMPLE)
        if labels:
            data.need_labels()
        require(not pairs or len(data) > 1, f"data must have at least 2 samples to make pairs of, got {len(data)}")
        self.labels, self.pairs = labels, pairs
        self.data, self.batch, self.seed, self.regions, self.crops = data, batch, seed, regions, crops
        self.foreground, self.maps = foreground, ForegroundMaps(data)
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
        return found._replace(**{name: getattr(found, name).numpy() for name in SMALL})

    def load(self, iteration: int) -> Images:
        """The batch of an iteration, on the host."""
        share = self.batch // self.world
        samples = np.arange(self.rank * share, (self.rank + 1) * share)
        chosen = np.array([self.index((iteration - 1) * self.batch + int(s)) for s in samples])
        if self.pairs:
            u = scalar_uniform(self.seed, STREAM_PARTNER, iteration, samples, 1)[:, 0]
            others = (chosen + 1 + np.floor(u * (len(self.data) - 1)).astype(np.int64)) % len(self.data)
            samples, chosen = _interleaved(2 * samples, 2 * samples + 1), _interleaved(chosen, others)
        return self.gather(iteration, samples, chosen, self.foreground)

    def _replace(
        self, iteration: int, samples: Ints, chosen: Ints, slots: Ints, tried: dict[int, int], bad: Sequence[str]
    ) -> None:
        """Choose another sample for these slots of a batch, not the partner of one of them."""
        first = int(slots[0])
        while True:
            tried[first] = tried.get(first, 0) + 1
            few = tried[first] < _ATTEMPTS
            require(few, f"one sample in {_ATTEMPTS} must be readable, got none: {bad[-1]}")
            # Drawn, not the next one: that would be seen for all the lost ones before it.
            u = scalar_uniform(self.seed, STREAM_SPARE, iteration, samples[slots[:1]], tried[first])[0, -1]
            chosen[slots] = int(u * len(self.data))
            if not self.pairs or (chosen[slots] != chosen[slots ^ 1]).all():
                return

    def held_out(self, places: Ints) -> Images:
        """The samples at these places of the set, unfocused, as iteration 0; in pairs each before the next one."""
        if not self.pairs:
            return self.gather(0, places, places)
        following = (places + 1) % len(self.data)
        return self.gather(0, _interleaved(2 * places, 2 * places + 1), _interleaved(places, following))

    def gather(self, iteration: int, samples: Ints, chosen: Ints, foreground: float = 0.0) -> Images:
        """Read the parts of the chosen samples that the positions `samples` of an iteration's batch need.

        foreground: share of them that get a focus; none unless it is given, as held-out samples are to be seen.
        """
        chosen, bad, ndim = chosen.copy(), [], self.data.sizes.shape[1]
        tried: dict[int, int] = {}
        focus = np.full((len(samples), ndim), -1)
        items = samples // 2 if self.pairs else samples
        wanted, places = foreground_draws(self.seed, iteration, items, ndim, foreground)

        def each(work: Callable[[Ints], None], again: Callable[[Ints], None]) -> None:
            """Work on the slots of each sample together, which is then read once.

            Pairs are mended afterwards, slot by slot: what takes the place of a sample then depends on its pair alone,
            and not on what else this process reads.
            """
            lost: list[int] = []
            for index in dict.fromkeys(chosen.tolist()):
                slots = np.flatnonzero(chosen == index)
                if not self.pairs:
                    settle(slots, work, again)
                    continue
                try:
                    work(slots)
                except InputError as error:
                    if self.on_bad_sample == "stop":
                        raise
                    bad.append(str(error))
                    lost += slots.tolist()
            for slot in sorted(lost):
                self._replace(iteration, samples, chosen, np.array([slot]), tried, bad)
                settle(np.array([slot]), again, again)

        def settle(slots: Ints, work: Callable[[Ints], None], again: Callable[[Ints], None]) -> None:
            """Work on a sample, and again on others in its place until one can be read."""
            while True:
                try:
                    return work(slots)
                except InputError as error:
                    if self.on_bad_sample == "stop":
                        raise
                    bad.append(str(error))
                self._replace(iteration, samples, chosen, slots, tried, bad)
                work = again

        def aim(slots: Ints) -> None:
            focus[slots] = -1
            some = slots[wanted[slots]]
            if some.size and (found := self.maps[int(chosen[slots[0]])]):
                focus[some] = found.pick(places[some])

        def read(slots: Ints) -> None:
            boxes = [[slice(a, b) for a, b in box] for box in ends[slots].tolist()]
            index, places = int(chosen[slots[0]]), slots.tolist()
            pixels = self.data.pixels(index, boxes, together.room(places))
            if self.labels:
                maps.update(zip(places, self.data.labels(index, boxes, labels_together.room(places)), strict=True))
            parts.update(zip(places, pixels, strict=True))

        def read_another(slots: Ints) -> None:
            aim(slots)
            sizes = self.data.sizes[chosen[slots]]
            ends[slots] = self.regions(self.seed, iteration, samples[slots], sizes, focus[slots])
            read(slots)

        each(aim, aim)
        ends = self.regions(self.seed, iteration, samples, self.data.sizes[chosen], focus)
        together, labels_together = (_Together(len(samples), ends, self.least) for _ in range(2))
        parts: dict[int, NDArray[Any]] = {}
        maps: dict[int, NDArray[np.uint8]] = {}
        each(read, read_another)
        corner, extents = np.ascontiguousarray(ends[..., 0]), ends[..., 1] - ends[..., 0]
        order = range(len(samples))
        images, scaling = together.stack([parts[slot] for slot in order], extents, self.data.scaling[chosen])
        labels = None
        if self.labels:
            size = tuple(images.shape[2:])
            labels, _ = labels_together.stack([maps[slot] for slot in order], extents, scaling, size)
        targets = torch.from_numpy(self.data.targets_if_alike()[chosen])
        arrays = (extents, corner, focus, self.data.sizes[chosen], scaling, samples, chosen)
        tensors: Any = tuple(torch.from_numpy(array) for array in arrays)
        return Images._make((images, *tensors, iteration, bad, labels, targets))


def _interleaved(first: Ints, second: Ints) -> Ints:
    """The values of both, in turns."""
    return np.stack([first, second], 1).ravel()


class _Together:
    """The memory of a batch's images or label maps, read into its slots without a copy; shared where a process waits.

    Its size and type are those of the first sample read: one that does not fit gets memory of its own.
    """

    def __init__(self, count: int, ends: Ints, least: tuple[int, ...]) -> None:
        self.count, self.least = count, least
        self.shape = self._size(ends[..., 1] - ends[..., 0])
        self.images: Tensor | None = None
        self.slots: NDArray[Any] = np.empty(0)

    def _size(self, extents: Ints) -> tuple[int, ...]:
        size = extents.max(0)
        return tuple((np.maximum(size, self.least) if self.least else size).tolist())

    def room(self, slots: Sequence[int]) -> Allocate:
        def allocate(number: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
            if self.images is None:
                self.images = _zeros((self.count, *shape[: -len(self.shape)], *self.shape), dtype)
                self.slots = self.images.numpy()
            slot: NDArray[Any] = self.slots[slots[number]]
            fits = slot.dtype == dtype and all(s >= n for s, n in zip(slot.shape, shape, strict=True))
            return slot if fits else np.zeros(shape, dtype)

        return allocate

    def stack(
        self,
        parts: Sequence[NDArray[Any]],
        extents: Ints,
        scaling: NDArray[np.float64],
        size: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, NDArray[np.float64]]:
        """The parts, zero-filled at the high end to a common `size`; of several types, each brought to [0, 1]."""
        if (
            size in (None, self.shape)
            and self.images is not None
            and all(np.shares_memory(p, s) for p, s in zip(parts, self.slots, strict=True))
        ):
            return self.images, scaling
        several = len({part.dtype for part in parts}) > 1
        dtype = np.dtype(np.float32) if several else parts[0].dtype
        lead = parts[0].shape[: -len(self.shape)]
        images = _zeros((self.count, *lead, *(size or self._size(extents))), dtype)
        for slot, part, extent, row in zip(images.numpy(), parts, extents.tolist(), scaling, strict=True):
            inside: Any = (..., *map(slice, extent))
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
