"""Crops weighted to the foreground: by the definition, on the object, inside the image, and the same however read."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import refused, views_of

from coverfast import Cover, InputError, ShardSet, UNet, VectorPyramid, ViewRegions, ViewSettings, crop_loader, philox
from coverfast import foreground as module
from coverfast.foreground import ForegroundMap, ForegroundMaps, foreground_draws, foreground_map, otsu
from coverfast.image_stream import ImageStream, RandomCrops
from coverfast.loader import load_batches, to_device
from coverfast.samples import DTYPES, Sample
from coverfast.shards import Shard, ShardWriter
from coverfast.training.data import batches, held_out
from coverfast.view_draws import centred, draw

CPU = torch.device("cpu")


class Stored:
    """What a map needs of a `ShardSet`: one sample."""

    def __init__(self, pixels: np.ndarray, scaling: tuple[float, ...]) -> None:
        self.whole, self.channels, self.reads = pixels, len(pixels), 0
        self.sizes, self.scaling = np.array([pixels.shape[1:]]), np.array([scaling])

    def pixels(self, index, regions):
        self.reads += 1
        return [self.whole[:, *region] for region in regions]


def write(path: Path, arrays: list[np.ndarray], **options) -> ShardSet:
    with ShardWriter(path, preprocessing={}, **options) as writer:
        for i, pixels in enumerate(arrays):
            lo, hi = float(pixels.min()), float(pixels.max())
            writer.add(Sample(pixels[None], 1.0, 0.0, lo, hi, (1.0,) * pixels.ndim, f"{path.stem}/{i}"))
    return ShardSet(path)


def empty_with_object(size: tuple[int, ...], side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hardly any noise and a bright cube, and the cube's first pixel."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 3, size).astype(np.uint8)
    first = rng.integers(0, np.array(size) - side + 1)
    image[tuple(slice(f, f + side) for f in first)] += 200
    return image, first


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    arrays = [empty_with_object(size, 6, i)[0] for i, size in enumerate([(70, 50), (90, 64), (48, 81), (60, 60)])]
    return write(tmp_path_factory.mktemp("foreground") / "s.h5", [*arrays, np.full((50, 70), 7, np.uint8)])


def damage_last_chunk(path: Path, index: int) -> None:
    with Shard(path) as shard:
        dataset = shard.dataset(index).id
        last = max((dataset.get_chunk_info(i) for i in range(dataset.get_num_chunks())), key=lambda c: c.chunk_offset)
    content = bytearray(path.read_bytes())
    content[last.byte_offset + 9] ^= 1
    path.write_bytes(content)


def stream(data: ShardSet, **options) -> ImageStream:
    return ImageStream(data, **({"batch": 4, "seed": 7, "regions": RandomCrops((32, 32)), "foreground": 0.5} | options))


def same(a, b) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for p, q in itertools.zip_longest(a, b)
        for x, y in zip(p, q, strict=True)
    )


# --- the map ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12))
def test_otsu_by_the_definition(counts):
    levels, spread = np.arange(len(counts)), []
    for last in range(len(counts) - 1):
        classes = [np.repeat(levels[part], np.array(counts)[part]) for part in (slice(last + 1), slice(last + 1, None))]
        sizes = [len(c) for c in classes]
        spread.append(sizes[0] * sizes[1] * np.subtract(*map(np.mean, classes)) ** 2 if all(sizes) else 0.0)
    found = otsu(np.array(counts))
    if max(spread, default=0) == 0:
        assert found is None
    else:
        assert found is not None
        assert spread[found] == pytest.approx(max(spread), rel=1e-12)


@given(st.data(), st.sampled_from(DTYPES), st.sampled_from((2, 3)), st.booleans())
def test_the_map_counts_what_is_brighter_than_the_threshold(data, dtype, n, in_slabs):
    size = tuple(data.draw(st.integers(1, 100 if n == 2 else 40)) for _ in range(n))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    slope, intercept = data.draw(st.sampled_from(((1.0, 0.0), (-0.5, 3.0), (2.0, -1024.0))))
    pixels = (rng.random((data.draw(st.integers(1, 2)), *size)) ** 3 * 100).astype(dtype)
    values = pixels.astype(np.float64) * slope + intercept
    lo, hi = float(values.min()), float(values.max()) * data.draw(st.sampled_from((1.0, 0.5)))
    stored = Stored(pixels, (slope, intercept, lo, hi))
    with pytest.MonkeyPatch.context() as patch:
        if in_slabs:
            patch.setattr(module, "_SLAB", 300)
        found = foreground_map(stored, 0)
    unit = (pixels.astype(np.float64) * slope + (intercept - lo)) / (hi - lo) if hi > lo else np.zeros(pixels.shape)
    level = np.floor(np.clip(unit * 256, 0, 255))
    threshold = otsu(np.bincount(level.astype(int).ravel(), minlength=256))
    if threshold is None:
        assert found is None
        return
    assert found is not None
    assert found.side == tuple(-(-s // 32) for s in size)
    assert found.counts.shape == tuple(-(-s // side) for s, side in zip(size, found.side, strict=True))
    above, expected = (level > threshold).sum(0), np.zeros(found.counts.shape)
    for cell in np.ndindex(expected.shape):
        expected[cell] = above[tuple(slice(c * s, (c + 1) * s) for c, s in zip(cell, found.side, strict=True))].sum()
    np.testing.assert_array_equal(found.counts, expected)


def test_a_large_volume_is_read_once_slab_by_slab():
    stored = Stored(np.zeros((1, 300, 256, 256), np.uint8), (1.0, 0.0, 0.0, 255.0))
    stored.whole[:, 100:110, 30:40, 250:] = 255
    found = foreground_map(stored, 0)
    assert found is not None
    assert found.counts.sum() == 10 * 10 * 6
    assert found.counts.dtype == np.uint16  # 10 * 8 * 8 pixels a cell
    assert 4 <= stored.reads <= 6
    full = foreground_map(Stored(np.repeat(np.uint8([[0, 255]]), 80 * 16, 1).reshape(1, 80, 32), (1, 0, 0, 255)), 0)
    assert full is not None
    assert full.counts.max() == 3


def test_a_constant_image_has_no_foreground():
    for value, scaling in ((9, (1.0, 0.0, 0.0, 255.0)), (9, (1.0, 0.0, 9.0, 9.0))):
        assert foreground_map(Stored(np.full((1, 40, 50), value, np.uint8), scaling), 0) is None


def test_maps_are_kept_as_long_as_there_is_room(shards, monkeypatch):
    read = []
    monkeypatch.setattr(module, "foreground_map", lambda data, index: read.append(index) or foreground_map(data, index))
    maps = ForegroundMaps(shards)
    first = [maps[i] for i in range(5)]
    assert all(maps[i] is first[i] for i in range(5))
    assert read == list(range(5))
    monkeypatch.setattr(module, "_KEPT", 2 * first[0].counts.nbytes)
    maps = ForegroundMaps(shards)
    again = [maps[i] for i in [0, 1, 2, 3, 4] * 2]
    assert read[5:] == [0, 1, 2, 3, 4, 2, 3] or read[5:] == [0, 1, 2, 3, 4, 1, 2, 3]
    assert all(np.array_equal(a.counts, b.counts) for a, b in zip(first[:4], again[:4], strict=True))


# --- the place --------------------------------------------------------------------------------------------------------


def test_each_foreground_pixel_is_as_likely():
    counts = np.array([[0, 2, 0], [6, 0, 1]], np.uint8)
    wanted, u = foreground_draws(3, 1, np.arange(9000), 2, 1.0)
    assert wanted.all()
    found = ForegroundMap(counts, (4, 3), (7, 8)).pick(u)
    cells, times = np.unique(found // (4, 3), axis=0, return_counts=True)
    assert cells.tolist() == [[0, 1], [1, 0], [1, 2]]
    assert np.allclose(times / 9000, [2 / 9, 6 / 9, 1 / 9], atol=0.02)
    edges = ForegroundMap(counts, (4, 3), (7, 8)).pick(np.array([[0, 0, 0], [2 / 9, 0, 0], [8 / 9, 0, 0]]))
    assert edges.tolist() == [[0, 3], [4, 0], [4, 6]]
    # All pixels of a cell, those at the high end being smaller.
    for cell, count in (((0, 1), 12), ((1, 0), 9), ((1, 2), 6)):
        pixels, times = np.unique(found[(found // (4, 3) == cell).all(1)], axis=0, return_counts=True)
        assert len(pixels) == count
        assert times.min() > 0.7 * times.mean()
    assert (found < (7, 8)).all()


def test_the_share_is_that_asked_for_and_what_it_takes_nests():
    streams = [value for name, value in vars(philox).items() if name.startswith("STREAM_")]
    assert len(set(streams)) == len(streams)
    draws = {share: foreground_draws(11, 5, np.arange(4000), 3, share)[0] for share in (0.0, 0.25, 0.5, 1.0)}
    assert [d.mean() for d in draws.values()] == pytest.approx([0, 0.25, 0.5, 1], abs=0.03)
    assert (draws[0.5] >= draws[0.25]).all()


@given(st.data(), st.sampled_from((2, 3)))
def test_crops_lie_in_the_image_about_their_focus(data, n):
    size = [data.draw(st.integers(1, 30)) for _ in range(n)]
    crop = tuple(data.draw(st.one_of(st.just(s), st.integers(1, 40))) for s in size)
    sizes, samples = np.array([size] * 8), np.arange(8)
    seed, iteration = data.draw(st.integers(0, 2**64 - 1)), data.draw(st.integers(0, 100))
    focus = np.floor(foreground_draws(seed, iteration, samples, n, 1.0)[1][:, 1:] * sizes).astype(int)
    focus[::4] = -1
    plain, found = (draw(seed, iteration, samples, sizes, crop, ViewSettings(), f) for f in (None, focus))
    for field in fields(plain):
        if field.name != "origin":
            assert np.array_equal(getattr(plain, field.name), getattr(found, field.name)), field.name
    regions = RandomCrops(crop)(seed, iteration, samples, sizes, focus)
    for slot in range(8):
        for axis in range(n):
            s, c, start, f = size[axis], crop[axis], found.origin[slot, axis], focus[slot, axis]
            low, high = regions[slot, axis]
            assert 0 <= low < high <= s
            assert high - low == min(s, c)
            if f < 0 or c >= s:
                assert start == plain.origin[slot, axis]
                assert min(0, s - c) <= start <= max(0, s - c)
            else:
                assert start == low == min(max(f - c // 2, 0), s - c)
                assert low <= f < high
    assert centred(plain.origin, None, sizes, crop) is plain.origin


@pytest.mark.parametrize("n", [2, 3])
def test_crops_show_a_small_object_as_often_as_asked_for(tmp_path, n):
    size, crop, side = ((200, 150), 32, 5) if n == 2 else ((70, 60, 50), 14, 4)
    made = [empty_with_object(size, side, seed) for seed in range(5)]
    data = write(tmp_path / "s.h5", [image for image, _ in made])
    share = {}
    for regions in (RandomCrops((crop,) * n), ViewRegions((crop,) * n, ViewSettings(strength=0.0))):
        for foreground in (0.0, 0.5, 1.0):
            seen = 0
            for batch in load_batches(stream(data, batch=20, regions=regions, foreground=foreground), last=10):
                whole, focus = batch.sizes.numpy(), batch.focus.numpy()
                origin = draw(7, batch.iteration, np.arange(20), whole, (crop,) * n, ViewSettings(), focus).origin
                if isinstance(regions, RandomCrops):
                    origin = batch.corner.numpy()
                assert (origin >= 0).all()
                assert (origin + crop <= whole).all()
                first = np.array([made[i][1] for i in batch.indices.tolist()])
                seen += ((origin < first + side) & (first < origin + crop)).all(1).sum()
            share[foreground] = seen / 200
        assert share[0.0] < 0.2
        assert 0.45 < share[0.5] < 0.72
        assert share[1.0] == 1


# --- the stream -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "method"), [(2, "fork"), (2, "spawn")])
def test_crops_are_the_same_however_they_are_read(shards, workers, method):
    alone = list(load_batches(stream(shards), last=6))
    assert 0 < (torch.cat([b.focus for b in alone]) >= 0).float().mean() < 1
    assert same(alone, load_batches(stream(shards), last=6, workers=workers, start_method=method))
    assert same(alone[3:], load_batches(stream(shards), first=4, last=6))
    known = stream(shards)
    for i in (4, 2, 0, 1, 3):
        known.maps[i]
    assert same(alone, load_batches(known, last=6))


@pytest.mark.parametrize(
    "regions", [RandomCrops((32, 32)), ViewRegions((32, 32), ViewSettings())], ids=["crops", "views"]
)
def test_ranks_share_a_batch(shards, regions):
    whole = stream(shards, batch=6, crops=2, regions=regions)
    ranks = [stream(shards, batch=6, crops=2, regions=regions, rank=r, world=2) for r in range(2)]
    for iteration in range(1, 5):
        parts, all_of_it = [rank.load(iteration) for rank in ranks], whole.load(iteration)
        for name in ("focus", "corner", "extents", "indices", "samples"):
            assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(all_of_it, name)), name


def test_none_is_as_without_and_a_constant_image_stays_where_it_was(shards):
    plain = list(load_batches(stream(shards, foreground=0.0), last=8))
    assert all((b.focus == -1).all() for b in plain)
    for batch, other in zip(plain, load_batches(stream(shards, foreground=1.0), last=8), strict=True):
        corner = RandomCrops((32, 32))(7, batch.iteration, np.arange(4), batch.sizes.numpy())[..., 0]
        assert torch.equal(batch.corner, torch.from_numpy(corner))
        constant = other.indices == 4
        assert torch.equal((other.focus == -1).all(1), constant)
        assert torch.equal(batch.corner[constant], other.corner[constant])
        assert not torch.equal(batch.corner[~constant], other.corner[~constant])


def test_the_loader_for_other_code_takes_it(shards):
    batch = next(crop_loader(shards.paths, 32, batch=8, foreground=1.0))
    inside = (batch.focus >= batch.corner) & (batch.focus < batch.corner + 32)
    assert inside[batch.indices != 4].all()
    lit = (batch.images > 0.5).flatten(1).any(1)
    assert lit[batch.indices != 4].all()


def test_damage_anywhere_in_a_sample_is_met_as_in_reading(tmp_path):
    arrays = [empty_with_object((700, 600), 60, i)[0] for i in range(4)]
    data = write(tmp_path / "s.h5", arrays, compression="none")
    (path,) = data.paths
    damage_last_chunk(path, 2)
    options = {"crops": 2, "regions": RandomCrops((64, 64))}
    with pytest.raises(InputError, match=r"s.h5: sample 2 \(s/2\) cannot be read"):
        list(load_batches(stream(ShardSet(path), foreground=1.0, **options), last=4))
    found = list(load_batches(stream(ShardSet(path), foreground=1.0, on_bad_sample="skip", **options), last=8))
    assert any(b.bad for b in found)
    assert all("sample 2 (s/2) cannot be read" in reason for b in found for reason in b.bad)
    for batch in found:
        assert 2 not in batch.indices.tolist()
        lit = (batch.images > 0.5).flatten(1).any(1)
        assert lit.all()  # what came in its place, too
        for image, index, corner in zip(batch.images, batch.indices.tolist(), batch.corner.tolist(), strict=True):
            whole = data.read(index).normalised()
            np.testing.assert_array_equal(image, whole[:, *(slice(c, c + 64) for c in corner)])


def test_a_sample_lost_after_its_map_was_made(tmp_path):
    data = write(tmp_path / "s.h5", [empty_with_object((60, 60), 6, 0)[0], np.full((60, 60), 5, np.uint8)])
    known = stream(data, foreground=1.0, on_bad_sample="skip")
    assert known.maps[0] is not None
    data.close()
    damage_last_chunk(data.paths[0], 0)
    # In its place comes an image without foreground.
    streams = (known, stream(data, foreground=0.0, on_bad_sample="skip"))
    for batch, plain in zip(*(load_batches(s, last=3) for s in streams), strict=True):
        assert (batch.indices == 1).all()
        assert (batch.focus == -1).all()
        assert torch.equal(batch.corner, plain.corner)


# --- views and methods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elastic", [0.0, 2.0])
def test_views_of_the_part_that_was_read_are_those_of_the_whole_image(shards, elastic):
    settings, crop = ViewSettings(elastic=elastic), (40, 56)
    (batch,) = load_batches(stream(shards, batch=5, foreground=1.0, regions=ViewRegions(crop, settings)), last=1)
    options = {"seed": 7, "settings": settings, "pad": True, "sizes": batch.sizes, "focus": batch.focus}
    part = views_of(batch.images, crop, corner=batch.corner, **options)
    whole = torch.zeros(5, 1, *batch.sizes.amax(0).tolist())
    for image, index in zip(whole, batch.indices.tolist(), strict=True):
        found = torch.from_numpy(shards.read(index).normalised())
        image[(..., *map(slice, found.shape[1:]))] = found
    expected = views_of(whole, crop, **options)
    torch.testing.assert_close(part.pair, expected.pair, atol=2e-4, rtol=0)
    torch.testing.assert_close(part.dvf, expected.dvf, atol=2e-4, rtol=0)
    plain = views_of(whole, crop, **(options | {"focus": None}))
    assert not torch.equal(plain.x_a, expected.x_a)
    same_place = views_of(whole, crop, **(options | {"focus": torch.full((5, 2), -1)}))
    assert torch.equal(plain.pair, same_place.pair)
    with refused("focus", "(B, n)", "(5, 3)"):
        views_of(whole, crop, **(options | {"focus": torch.zeros(5, 3, dtype=torch.long)}))
    with refused("focus", "float32"):
        views_of(whole, crop, **(options | {"focus": batch.focus.float()}))


def test_a_method_gets_the_focus_in_whole_batches_and_in_parts(shards):
    backbone = UNet(2, 1, (8, 8, 8))
    method = Cover(backbone, VectorPyramid(2, backbone.feature_channels, (1, 1), 8, 3), crop=32)
    given_ = {"regions": method.regions, "foreground": 1.0}
    (batch,) = batches(load_batches(stream(shards, **given_), last=1), 7, pytest.fail)
    assert batch.focus is not None
    views = method.prepare(batch)
    origin = centred(np.full((4, 2), -9), batch.focus.numpy(), batch.sizes.numpy(), (32, 32))
    known = batch.focus[:, 0] >= 0
    assert known.any()
    found = views.target.origin + batch.corner
    assert torch.equal(found[known].long(), torch.from_numpy(origin)[known])
    parts = [method.prepare(part) for part in batch.parts(2)]
    assert torch.equal(torch.cat([p.x_b for p in parts]), views.x_b)
    assert [len(p.images) for p in replace(batch, focus=None).parts(4)] == [1] * 4


@pytest.mark.parametrize(("limit", "world"), [(5, 1), (5, 2), (4, 3), (3, 4), (99, 2)])
def test_processes_share_held_out_samples_at_random_places(shards, limit, world):
    def held(rank: int, world: int):
        # Whatever the stream does in training.
        kept = stream(shards, batch=2, foreground=1.0, regions=ViewRegions((32, 32), ViewSettings()))
        return list(held_out(kept, limit=limit, device=CPU, on_bad=pytest.fail, rank=rank, world=world))

    alone = held(0, 1)
    assert torch.cat([b.samples for b in alone]).tolist() == list(range(min(limit, 5)))
    assert all(b.iteration == 0 and (b.focus == -1).all() for b in alone)
    ranks = [held(rank, world) for rank in range(world)]
    together = [b for row in itertools.zip_longest(*ranks) for b in row if b is not None]
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "samples", "corner", "sizes"))
    first = to_device(stream(shards, regions=ViewRegions((32, 32), ViewSettings())).gather(0, *[np.arange(2)] * 2), CPU)
    assert torch.equal(alone[0].images, first.images)
