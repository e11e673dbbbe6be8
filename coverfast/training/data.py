"""Which samples an iteration sees, and how they get from the shard to the training device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from coverfast.checks import InputError, require
from coverfast.methods import Batch
from coverfast.philox import permutation
from coverfast.shards import Shard

#: An image and its position in the stream, or why it could not be read: a worker process would wrap an exception in
#: a traceback of its own.
Item = tuple[Tensor | InputError, int]


class _Positions:
    """Positions of the endless stream, a list an iteration: batch `i` (from 1) holds `(i - 1) * B .. i * B - 1`."""

    def __init__(self, batch: int, first: int, last: int) -> None:
        self.batch, self.first, self.last = batch, first, last

    def __iter__(self) -> Iterator[list[int]]:
        for iteration in range(self.first, self.last + 1):
            yield list(range((iteration - 1) * self.batch, iteration * self.batch))

    def __len__(self) -> int:
        return max(0, self.last - self.first + 1)


class ShuffledShard(Dataset[Item]):
    """The samples of a shard as an endless stream of seeded permutations; a position always gives the same sample."""

    def __init__(self, shard: Shard, seed: int) -> None:
        self.shard, self.seed = shard, seed
        self._epoch, self._order = -1, torch.empty(0)

    def index(self, position: int) -> int:
        """Which sample of the shard stands at a position of the stream."""
        epoch, place = divmod(position, len(self.shard))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.seed, epoch, len(self.shard))
        return int(self._order[place])

    def __getitem__(self, position: int) -> Item:
        try:
            return load_image(self.shard, self.index(position)), position
        except InputError as error:
            return error, position


def load_image(shard: Shard, index: int) -> Tensor:
    """A sample as `(C, *S)` float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(shard.read(index).normalised()))


def collate(items: list[Item]) -> tuple[Tensor, Tensor, Tensor] | InputError:
    """Images zero-filled at the high end to a common size `(B, C, *S)`, their true sizes `(B, n)`, positions `(B,)`."""
    images = []
    for image, _ in items:
        if isinstance(image, InputError):
            return image
        images.append(image)
    sizes = torch.tensor([image.shape[1:] for image in images])
    out = torch.zeros(len(images), images[0].shape[0], *sizes.amax(0).tolist())
    for slot, image in zip(out, images, strict=True):
        slot[tuple(slice(s) for s in image.shape)] = image
    return out, sizes, torch.tensor([position for _, position in items])


def batches(
    shard: Shard, *, batch: int, seed: int, first: int, last: int, workers: int, device: torch.device
) -> Iterator[Batch]:
    """The batches of iterations `first .. last`, on `device`; the same for any number of workers."""
    loader = DataLoader(
        ShuffledShard(shard, seed),
        batch_sampler=_Positions(batch, first, last),
        collate_fn=collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    for iteration, collated in enumerate(loader, start=first):
        images, sizes, positions = _sound(collated)
        yield Batch(images.to(device, non_blocking=True), sizes, positions % batch, seed, iteration)


def _sound(collated: tuple[Tensor, Tensor, Tensor] | InputError) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(collated, InputError):
        raise collated
    return collated


def held_out(shard: Shard, *, batch: int, limit: int, seed: int, device: torch.device) -> Iterator[Batch]:
    """The first `limit` samples of a held-out shard with views that never change (iteration 0)."""
    for start in range(0, min(limit, len(shard)), batch):
        indices = range(start, min(start + batch, limit, len(shard)))
        images, sizes, positions = _sound(collate([(load_image(shard, i), i) for i in indices]))
        yield Batch(images.to(device), sizes, positions, seed, 0)


def check_fits(shard: Shard, crop: tuple[int, ...], *, pad: bool) -> None:
    """Refuse a crop larger than a sample, by name, unless it is to be padded."""
    if pad:
        return
    small = np.flatnonzero((shard.sizes < np.array(crop)).any(axis=1))
    if small.size:
        worst = int(small[np.argmin(shard.sizes[small].prod(axis=1))])
        size = tuple(int(s) for s in shard.sizes[worst])
        require(
            False,
            f"crop must fit into every sample, got {crop}, but {shard.source(worst)!r} of {shard.path} is {size}; "
            f"use a smaller --crop, or --pad to zero-pad",
        )
