"""Pairs of different samples: who is paired with whom, and what keeps it so."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_runs import make_shard

from coverfast.checks import InputError
from coverfast.crops import CropRegions, crop_images
from coverfast.image_stream import Images, ImageStream
from coverfast.loader import load_batches, to_device
from coverfast.shard_set import ShardSet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shard(tmp_path_factory.mktemp("pairs") / "seven.h5", count=7, size=40)


def stream(path: Path, **options: object) -> ImageStream:
    given = {"batch": 4, "seed": 5, "regions": CropRegions((32, 32), pairs=True), "pairs": True} | options
    return ImageStream(ShardSet([str(path)], "all"), **given)


def test_a_pair_is_two_samples_and_every_other_sample_is_equally_likely(shard: Path) -> None:
    found = stream(shard)
    met = Counter()
    for iteration in range(1, 400):
        images = found.load(iteration)
        assert images.samples.tolist() == list(range(8))
        first, second = images.indices[::2].tolist(), images.indices[1::2].tolist()
        assert all(a != b for a, b in zip(first, second, strict=True))
        met.update(zip(first, second, strict=True))
    assert len(met) == 7 * 6
    expected = 399 * 4 / 42  # 38: a binomial deviate of 5 sigma is 31
    assert all(abs(count - expected) < 31 for count in met.values())


def test_the_first_images_are_those_of_a_stream_without_pairs(shard: Path) -> None:
    alone = stream(shard, pairs=False, regions=CropRegions((32, 32)))
    for iteration in (1, 2, 3):
        assert stream(shard).load(iteration).indices[::2].tolist() == alone.load(iteration).indices.tolist()


def test_processes_and_readers_see_the_same_pairs(shard: Path) -> None:
    def cut(images: Images) -> torch.Tensor:
        keys = {"samples": images.samples, "sizes": images.sizes, "corner": images.corner}
        return crop_images(to_device(images, CPU).images, 32, seed=5, iteration=3, **keys, pairs=True)

    whole = stream(shard).load(3)
    for rank in range(2):
        part = stream(shard, rank=rank, world=2).load(3)
        half = slice(4 * rank, 4 * rank + 4)
        for name in ("indices", "samples", "corner", "sizes"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[half]), name
        assert torch.equal(cut(part), cut(whole)[half])
    read = list(load_batches(stream(shard), first=2, last=3, workers=2, device=CPU))
    assert torch.equal(read[1].images, to_device(whole, CPU).images)
    assert torch.equal(read[1].indices, whole.indices)


def test_both_are_cut_at_the_same_place_relative_to_their_sizes(tmp_path: Path) -> None:
    regions = CropRegions((10, 10), pairs=True)
    sizes = np.array([[40, 70], [70, 40], [40, 40], [40, 40]])
    samples = np.arange(4)
    for iteration in range(1, 30):
        images = torch.arange(70.0).view(1, 1, 1, 70).expand(4, 2, 70, 70).clone()  # channels: column, row
        images[:, 1] = images[:, 0].transpose(1, 2)
        cut = crop_images(
            images, 10, seed=3, iteration=iteration, samples=torch.arange(4), sizes=torch.from_numpy(sizes), pairs=True
        )
        column, row = cut[:, 0, 0, 0], cut[:, 1, 0, 0]
        shares = torch.stack([row, column], 1) / torch.from_numpy(sizes - 10)
        assert (shares[0] - shares[1]).abs().max() < 1 / 31 + 1e-6  # both are rounded down to pixels
        assert torch.equal(shares[2], shares[3])
        ends = regions(3, iteration, samples, sizes)
        assert (ends[:, 0, 0] <= row.numpy()).all()
        assert (ends[:, 0, 1] >= row.numpy() + 10).all()


@given(st.integers(1, 2**31), st.sampled_from([2, 3]))
def test_what_is_read_is_all_that_is_cut(iteration: int, n: int) -> None:
    size, crop = (19, 23, 17)[:n], (8, 16, 17)[:n]
    whole = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(iteration % 97))
    keys = {"seed": 1, "iteration": iteration, "samples": torch.arange(2), "pairs": True}
    expected = crop_images(whole, crop, **keys)
    sizes = np.array([size, size])
    ends = CropRegions(crop, pairs=True)(1, iteration, np.arange(2), sizes)
    boxes = [(0, *(slice(a, b) for a, b in box)) for box in ends.tolist()]
    parts = [whole[i][box] for i, box in enumerate(boxes)]
    held = torch.stack(parts)[:, None]
    found = crop_images(held, crop, **keys, sizes=torch.from_numpy(sizes), corner=torch.from_numpy(ends[..., 0].copy()))
    assert torch.equal(found, expected)


def test_a_sample_that_cannot_be_read_is_never_replaced_by_its_partner(tmp_path: Path) -> None:
    path = make_shard(tmp_path / "three.h5", count=3, size=40)
    with h5py.File(path) as file:
        offset, length = _chunk(file)
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(bytes(b ^ 0xFF for b in range(min(length, 200))))
    damaged = ImageStream(
        ShardSet([str(path)], "all"),
        batch=6,
        seed=1,
        regions=CropRegions((32, 32), pairs=True),
        pairs=True,
        on_bad_sample="skip",
    )
    lost = next(i for i in range(3) if not _readable(damaged, i))
    replaced = 0
    for iteration in range(1, 15):
        images = damaged.load(iteration)
        replaced += len(images.bad)
        assert (images.indices[::2] != images.indices[1::2]).all()
        assert not (images.indices == lost).any()
    assert replaced > 10


def test_what_takes_the_place_of_a_sample_does_not_depend_on_the_processes(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With half of the samples lost, partners are lost together and one after the other."""
    real = ShardSet.pixels

    def pixels(self: ShardSet, index: int, *more: Any) -> Any:
        if index in (0, 2, 5):
            raise InputError(f"sample {index} cannot be read")
        return real(self, index, *more)

    monkeypatch.setattr(ShardSet, "pixels", pixels)
    whole, parts = (
        [stream(shard, on_bad_sample="skip", rank=rank, world=world) for rank in range(world)] for world in (1, 4)
    )
    for iteration in range(1, 60):
        together = whole[0].load(iteration).indices
        assert torch.equal(torch.cat([part.load(iteration).indices for part in parts]), together)
        assert (together[::2] != together[1::2]).all()


def _readable(found: ImageStream, index: int) -> bool:
    try:
        found.data.pixels(index, [[slice(0, 40)] * 2], lambda number, shape, dtype: np.empty(shape, dtype))
    except InputError:
        return False
    return True


def _chunk(file: h5py.File) -> tuple[int, int]:
    """Place and length in the file of the pixels of the second sample."""
    found: list[h5py.Dataset] = []
    file.visititems(lambda name, item: found.append(item) if isinstance(item, h5py.Dataset) and item.chunks else None)
    pixels = max(found, key=lambda d: d.id.get_storage_size())
    infos = [pixels.id.get_chunk_info(i) for i in range(pixels.id.get_num_chunks())]
    middle = infos[len(infos) // 2]
    return middle.byte_offset, middle.size


def test_foreground_is_looked_for_at_the_same_place_in_both(shard: Path) -> None:
    """Where both images of a pair are the same one, both are cut about the same pixel."""
    found = stream(shard, foreground=1.0)
    images = found.gather(3, np.arange(6), np.array([0, 0, 3, 3, 5, 5]), 1.0)
    assert (images.focus >= 0).all()
    assert torch.equal(images.focus[::2], images.focus[1::2])
    assert len({tuple(f) for f in images.focus.tolist()}) == 3


def test_held_out_samples_are_each_paired_with_the_next_one(shard: Path) -> None:
    images = stream(shard).held_out(np.array([0, 5, 6]))
    assert images.indices.tolist() == [0, 1, 5, 6, 6, 0]
    assert images.samples.tolist() == [0, 1, 10, 11, 12, 13]
    assert images.iteration == 0


def test_one_sample_makes_no_pairs(tmp_path: Path) -> None:
    path = make_shard(tmp_path / "one.h5", count=1)
    with pytest.raises(InputError, match="data must have at least 2 samples to make pairs of, got 1"):
        stream(path)
