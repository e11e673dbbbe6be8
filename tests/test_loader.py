"""The loader: the same batches however they are read, only the chunks that are needed, and faults by name."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coverfast import InputError, ShardSet, ViewRegions, ViewSettings, crop_loader, make_views
from coverfast.loader import ImageStream, RandomCrops, load_batches, to_device, to_unit_range
from coverfast.samples import DTYPES
from coverfast.shards import Sample, Shard, ShardWriter, verify

CPU = torch.device("cpu")


def write(path: Path, arrays: list[np.ndarray], **options) -> Path:
    with ShardWriter(path, preprocessing={}, **options) as writer:
        for i, pixels in enumerate(arrays):
            lo, hi = float(pixels.min()), float(pixels.max())
            spacing = (1.0,) * (pixels.ndim - 1)
            writer.add(Sample(pixels, 1.0, 0.0, lo, hi, spacing, f"{path.stem}/{i}"))
    return path


def noise(*shape: int, seed: int, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (1, *shape)).astype(dtype)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    sizes = [[(40, 50), (33, 70)], [(64, 32), (48, 48), (50, 40)], [(35, 35)]]
    return [
        write(folder / f"{i}.h5", [noise(*size, seed=10 * i + j) for j, size in enumerate(group)])
        for i, group in enumerate(sizes)
    ]


def stream(data, **options) -> ImageStream:
    given = {"batch": 4, "seed": 7, "regions": RandomCrops((32, 32))} | options
    return ImageStream(data if isinstance(data, ShardSet) else ShardSet(data), **given)


def same(a, b) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for p, q in itertools.zip_longest(a, b)
        for x, y in zip(p, q, strict=True)
    )


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "method"), [(1, "fork"), (2, "spawn"), (2, "forkserver")])
def test_any_number_of_processes_and_any_start_give_the_same_batches(shards, workers, method):
    data = ShardSet(shards, open_files=2)
    data.pixels(0)  # an open handle to inherit
    alone = list(load_batches(stream(data), last=5))
    assert [b.iteration for b in alone] == [1, 2, 3, 4, 5]
    assert same(alone, load_batches(stream(data), last=5, workers=workers, start_method=method))
    assert same(alone[3:], load_batches(stream(data), first=4, last=5))


@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**64 - 1))
def test_the_stream_visits_everything_alike_and_ranks_share_it(shards, batch, crops, world, seed):
    data, count = ShardSet(shards), 6
    ranks = [stream(data, batch=batch * world, seed=seed, crops=crops, rank=r, world=world) for r in range(world)]
    whole = stream(data, batch=batch * world, seed=seed, crops=crops)
    positions = crops * count * batch * world
    order = [whole.index(p) for p in range(positions)]
    for start in range(0, positions, crops * count):
        assert sorted(order[start : start + crops * count]) == sorted(list(range(count)) * crops)
    for place in range(0, positions, crops):
        assert len(set(order[place : place + crops])) == 1
    for iteration in (1, 2):
        parts = [rank.load(iteration) for rank in ranks]
        assert torch.cat([p.indices for p in parts]).tolist() == whole.load(iteration).indices.tolist()
        assert torch.cat([p.samples for p in parts]).tolist() == list(range(batch * world))
        assert torch.equal(torch.cat([p.corner for p in parts]), whole.load(iteration).corner)


def test_several_crops_of_a_visit_decode_a_chunk_once(tmp_path, monkeypatch):
    path = write(tmp_path / "v.h5", [noise(64, 64, 64, seed=i, dtype="int16") for i in range(3)])
    data, visits = ShardSet(path), []
    pixels = ShardSet.pixels

    def counted(self, index, regions=(None,), allocate=None):
        visits.append((index, len(regions)))
        return pixels(self, index, regions, allocate)

    monkeypatch.setattr(ShardSet, "pixels", counted)
    found = stream(data, batch=8, crops=4, regions=RandomCrops((32, 32, 32))).load(1)
    assert [count for _, count in visits] == [4, 4]
    assert len({tuple(c) for c in found.corner.tolist()}) == 8


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts reads in /proc")
def test_regions_of_one_call_read_a_chunk_once(tmp_path):
    path = write(tmp_path / "v.h5", [noise(64, 64, 64, seed=1, dtype="int16")])

    def read_in(regions) -> int:
        before = Path("/proc/self/io").read_text()
        shard.pixels(0, regions)
        after = Path("/proc/self/io").read_text()
        return int(after.split()[1]) - int(before.split()[1])

    with Shard(path) as shard:
        shard.pixels(0)
        once = read_in([None])
        four = read_in([[slice(i, i + 50)] * 3 for i in range(4)])
    assert once > path.stat().st_size // 2
    assert four < 1.1 * once


# --- pixels -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(1, 3))
def test_crops_are_the_pixels_they_say(shards, iteration, crops):
    data = ShardSet(shards)
    raw = stream(data, crops=crops, regions=RandomCrops((36, 36))).load(iteration)
    ready = to_device(raw, CPU)
    for slot in range(4):
        box = [slice(a, a + e) for a, e in zip(raw.corner[slot].tolist(), raw.extents[slot].tolist(), strict=True)]
        assert raw.extents[slot].tolist() == [min(36, s) for s in raw.sizes[slot].tolist()]
        sample = data.read(int(raw.indices[slot]))
        inside = (slice(None), *(slice(e) for e in raw.extents[slot].tolist()))
        np.testing.assert_array_equal(raw.images[slot][inside], sample.pixels[:, *box])
        np.testing.assert_array_equal(ready.images[slot][inside], sample.normalised()[:, *box])
        outside = torch.ones_like(ready.images[slot], dtype=torch.bool)
        outside[inside] = False
        assert not ready.images[slot][outside].any()


@given(st.sampled_from(DTYPES), st.integers(0, 10**6), st.floats(-4, 4), st.floats(-100, 100), st.booleans())
def test_scaling_on_the_device_is_that_of_the_sample(dtype, seed, slope, intercept, flat):
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        pixels = rng.normal(0, 50, (1, 5, 6)).astype(np.float32)
    else:
        info = np.iinfo(dtype)
        pixels = rng.integers(info.min, info.max, (1, 5, 6), endpoint=True, dtype=dtype)
    lo = float(pixels.astype(np.float64).min() * slope + intercept)
    hi = lo if flat else lo + abs(float(pixels.astype(np.float64).max()) * slope) + 1
    sample = Sample(pixels, slope, intercept, lo, hi, (1.0, 1.0), "x")
    row = np.array([[slope, intercept, lo, hi]])
    got = to_unit_range(torch.from_numpy(pixels)[None], row)[0]
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), sample.normalised())


def test_the_stored_type_travels_and_mixed_types_are_scaled_first(tmp_path):
    eight = write(tmp_path / "a.h5", [noise(40, 40, seed=1)])
    sixteen = write(tmp_path / "b.h5", [noise(40, 40, seed=2, dtype="uint16")])
    for path, dtype in ((eight, torch.uint8), (sixteen, torch.uint16)):
        assert stream(path, batch=2).load(1).images.dtype == dtype
    data = ShardSet([eight, sixteen])
    mixed = stream(data, batch=2).load(1)
    assert mixed.images.dtype == torch.float32
    whole = [data.read(i).normalised() for i in mixed.indices.tolist()]
    for image, corner, full in zip(to_device(mixed, CPU).images, mixed.corner.tolist(), whole, strict=True):
        np.testing.assert_array_equal(image, full[:, *(slice(c, c + 32) for c in corner)])
    through = list(load_batches(stream(sixteen, batch=2), last=2, workers=1))
    assert same(through, load_batches(stream(sixteen, batch=2), last=2))


def test_crop_loader(shards):
    batch = next(crop_loader(shards, 24, batch=3, seed=5))
    assert batch.images.shape == (3, 1, 24, 24)
    assert batch.images.dtype == torch.float32
    later = next(crop_loader(shards, (24, 24), batch=3, seed=5, first=4))
    assert later.iteration == 4
    wide = next(crop_loader(shards, 60, batch=3, seed=5))
    assert wide.images.shape == (3, 1, 60, 60)
    assert wide.extents.tolist() == wide.sizes.clamp(max=60).tolist()
    assert all(not i[:, e:].any() and not i[..., f:].any() for i, (e, f) in zip(wide.images, wide.extents, strict=True))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"batch": 3, "world": 2}, "batch must be divisible"),
        ({"batch": 2.5}, "batch must be an int of at least 1"),
        ({"seed": -1}, "seed must be an int in"),
        ({"first": 0}, "first must be an int of at least 1"),
        ({"workers": -1}, "workers must be an int of at least 0"),
        ({"device": "cuda"}, "torch finds no GPU"),
        ({"on_bad_sample": "ignore"}, "on_bad_sample"),
        ({"foreground": 1.5}, r"foreground must be a share in \[0, 1\], got 1.5"),
        ({"foreground": float("nan")}, "foreground must be a share"),
    ],
)
def test_wrong_arguments_are_refused(shards, wrong, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=words):
        next(crop_loader(shards, **{"crop": 24, "batch": 3} | wrong))


@pytest.mark.parametrize("ndim", [2, 3])
def test_only_touched_chunks_are_read(tmp_path, ndim):
    size, crop = ((700, 900), (100, 100)) if ndim == 2 else ((90, 100, 70), (20, 20, 20))
    path = write(tmp_path / "big.h5", [noise(*size, seed=1)], compression="none")
    with Shard(path) as shard:
        ends = RandomCrops(crop)(3, 1, np.arange(1), shard.sizes)[0]
        dataset = shard.dataset(0)
        # Every chunk that the crop does not touch is damaged on the disk: reading it would fail.
        content = bytearray(path.read_bytes())
        for number in range(dataset.id.get_num_chunks()):
            chunk = dataset.id.get_chunk_info(number)
            start = np.array(chunk.chunk_offset[1:])
            if ((start >= ends[:, 1]) | (start + dataset.chunks[1:] <= ends[:, 0])).any():
                content[chunk.byte_offset + chunk.size // 2] ^= 1
    path.write_bytes(content)
    assert stream(path, batch=1, seed=3, regions=RandomCrops(crop)).load(1).images.shape[2:] == crop
    assert len(verify(path)) == 1


# --- labels -----------------------------------------------------------------------------------------------------------

VALUES = np.array([0, 2, 4, 1000], np.uint16)


def label_maps(path: Path, sizes: list[tuple[int, ...]], dtypes: tuple[str, ...] = ("uint8",)) -> Path:
    """A shard of noise with label maps of `VALUES`, and targets."""
    rng = np.random.default_rng(int(path.stem))
    with ShardWriter(path, preprocessing={}, target_classes=["a", "b"]) as writer:
        for i, size in enumerate(sizes):
            pixels = rng.integers(0, 255, (1, *size)).astype(dtypes[i % len(dtypes)])
            labels = rng.choice(VALUES, size)
            labels.flat[: len(VALUES)] = VALUES
            target = ("a", "b", "")[i % 3]
            spacing = (1.0,) * len(size)
            writer.add(Sample(pixels, 1.0, 0.0, 0.0, 255.0, spacing, f"{path.stem}/{i}", labels=labels, target=target))
    return path


def check_labels(batch, data: ShardSet) -> None:
    assert batch.labels.dtype == torch.uint8
    assert batch.labels.shape == (len(batch.images), *batch.images.shape[2:])
    for slot, index in enumerate(batch.indices.tolist()):
        corner, extents = batch.corner[slot].tolist(), batch.extents[slot].tolist()
        whole = data.read(index)
        expected = np.zeros(batch.labels.shape[1:], np.uint16)
        box = tuple(slice(c, c + e) for c, e in zip(corner, extents, strict=True))
        expected[tuple(map(slice, extents))] = whole.labels[box]
        np.testing.assert_array_equal(VALUES[batch.labels[slot].cpu().numpy()], expected)
        assert batch.targets[slot] == (data.target_classes.index(whole.target) if whole.target else -1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("volume", [False, True])
def test_labels_are_those_of_the_crop(tmp_path, workers, volume):
    # Other types of pixels in one batch, and images smaller than the crop.
    sizes = [(20, 30, 12), (9, 40, 30), (16, 16, 16)] if volume else [(40, 50), (33, 70), (15, 80), (48, 48)]
    paths = [label_maps(tmp_path / f"{i}.h5", sizes[i:], ("uint8", "int16")) for i in range(2)]
    data, crop = ShardSet(paths), (16, 16, 16) if volume else (36, 30)
    for device in (None, "cpu"):
        found = stream(data, regions=RandomCrops(crop), labels=True, crops=2, foreground=0.5, least=crop)
        for batch in load_batches(found, last=5, workers=workers, device=device):
            assert batch.targets.dtype == torch.int64
            check_labels(batch, data)
    for batch in crop_loader(paths, crop, batch=3, last=2, workers=workers, labels=True):
        check_labels(batch, data)
        assert batch.labels.shape == (3, *crop)


def test_labels_are_read_only_when_they_are_asked_for(tmp_path, monkeypatch):
    path = label_maps(tmp_path / "0.h5", [(40, 50)] * 3)
    with monkeypatch.context() as patch:
        patch.setattr(ShardSet, "labels", None)
        plain = stream(path).load(1)
    assert plain.labels is None
    assert set(plain.targets.tolist()) <= {-1, 0, 1}
    assert same([plain._replace(labels=None)], [stream(path, labels=True).load(1)._replace(labels=None)])
    bare = write(tmp_path / "1.h5", [noise(40, 50, seed=1)])
    with pytest.raises(InputError, match=r"1.h5 must have label maps, found none"):
        stream(bare, labels=True)
    mixed = ShardSet([path, bare])
    with pytest.raises(InputError, match=r"1.h5 must have the label classes of .*0.h5 .*, got none"):
        stream(mixed, labels=True)
    assert set(stream(mixed).load(1).targets.tolist()) == {-1}


@pytest.mark.parametrize(("bad", "workers"), [(2, 0), (2, 2), (3, 0)], ids=["small", "processes", "large"])
def test_a_damaged_label_map_is_treated_as_a_damaged_image(tmp_path, bad, workers):
    # What replaces it is larger, and gets memory of its own, or smaller, and perhaps of another type than the rest.
    path = label_maps(
        tmp_path / "0.h5", [(40, 50), (44, 60), (20, 20), (70, 40), (25, 64)], ("uint8", "uint8", "int16")
    )
    with Shard(path) as shard:
        chunk = shard.label_dataset(bad).id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 5] ^= 1
    path.write_bytes(content)
    data = ShardSet(path)
    given = {"regions": RandomCrops((64, 64)), "batch": 2}
    with pytest.raises(InputError, match=rf"0.h5: label map of sample {bad} \(0/{bad}\) cannot be read: .*[Ff]ilter"):
        list(load_batches(stream(data, labels=True, **given), last=5, workers=workers))
    sound = stream(data, **given)
    assert any(bad in b.indices for b in load_batches(sound, last=5, workers=workers))
    skipping = stream(data, labels=True, on_bad_sample="skip", **given)
    batches = list(load_batches(skipping, last=20, workers=workers))
    assert any(f"label map of sample {bad}" in reason for b in batches for reason in b.bad)
    for batch in batches:
        check_labels(batch, data)


# --- views ------------------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.data(), st.booleans(), st.sampled_from([0.0, 0.7, 1.0, 1.6]), st.sampled_from([0.0, 2.0]))
def test_views_of_the_needed_part_are_those_of_the_whole_image(data, volume, strength, elastic):
    n = 3 if volume else 2
    size = [data.draw(st.integers(20, 60)) for _ in range(n)]
    crop = tuple(data.draw(st.integers(8, 20)) for _ in range(n))
    wanted = ViewSettings(strength=strength, elastic=elastic)
    seed, iteration = data.draw(st.integers(0, 2**64 - 1)), data.draw(st.integers(0, 1000))
    images = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(1))
    sizes = np.array([size, [max(c, s - 7) for c, s in zip(crop, size, strict=True)]])
    for image, true in zip(images, sizes.tolist(), strict=True):
        outside = torch.ones_like(image, dtype=torch.bool)
        outside[(slice(None), *map(slice, true))] = False
        image[outside] = 0
    whole = make_views(images, crop, seed=seed, iteration=iteration, sizes=torch.from_numpy(sizes), settings=wanted)
    ends = ViewRegions(crop, wanted)(seed, iteration, np.arange(2), sizes)
    assert (ends[..., 0] >= 0).all()
    assert (ends[..., 1] <= sizes).all()
    extent = (ends[..., 1] - ends[..., 0]).max(0)
    part = torch.zeros(2, 1, *extent)
    for slot, image, box in zip(part, images, ends.tolist(), strict=True):
        held = image[(slice(None), *(slice(a, b) for a, b in box))]
        slot[tuple(map(slice, held.shape))] = held
    corner = torch.from_numpy(ends[..., 0].copy())
    given = {"seed": seed, "iteration": iteration, "sizes": torch.from_numpy(sizes), "settings": wanted}
    views = make_views(part, crop, corner=corner, **given)
    torch.testing.assert_close(views.pair, whole.pair, atol=2e-4, rtol=0)
    torch.testing.assert_close(views.dvf, whole.dvf, atol=2e-4, rtol=0)
    assert (views.mask != whole.mask).float().mean() < 0.01
    if not elastic:
        with pytest.raises(InputError, match="images must hold the pixels"):
            make_views(part, crop, corner=corner + 1 + torch.tensor(size), **given)


def test_a_small_crop_of_a_large_volume_needs_a_small_part_of_it():
    sizes = np.array([[512, 512, 512]] * 50)
    ends = ViewRegions((128,) * 3, ViewSettings())(0, 1, np.arange(50), sizes)
    assert (ends[..., 1] - ends[..., 0]).prod(1).mean() < 0.12 * 512**3


# --- faults -----------------------------------------------------------------------------------------------------------


def _damage(path: Path, index: int) -> None:
    with Shard(path) as shard:
        chunk = shard.dataset(index).id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_stops_the_stream_by_name_or_is_skipped(tmp_path, workers):
    path = write(tmp_path / "s.h5", [noise(40, 40, seed=i) for i in range(5)])
    sound = list(load_batches(stream(path), last=5))
    _damage(path, 3)
    with pytest.raises(InputError, match=r"s.h5: sample 3 \(s/3\) cannot be read: .*[Ff]ilter"):
        list(load_batches(stream(path), last=5, workers=workers))
    skipped = list(load_batches(stream(path, on_bad_sample="skip"), last=5, workers=workers))
    assert any(b.bad for b in skipped)
    assert all("sample 3 (s/3) cannot be read" in reason for b in skipped for reason in b.bad)
    spares = set()
    for a, b in zip(sound, skipped, strict=True):
        kept = a.indices != 3
        assert torch.equal(a.indices[kept], b.indices[kept])
        spares |= set(b.indices[~kept].tolist())
        assert torch.equal(a.images[kept], b.images[kept])
    assert len(spares - {3}) == len(spares) > 1
    for i in (0, 1, 2, 4):
        _damage(path, i)
    with pytest.raises(InputError, match=r"one sample in 100 must be readable, got none: .*s.h5: sample"):
        list(load_batches(stream(path, on_bad_sample="skip"), last=5, workers=workers))


def test_a_file_that_vanishes_while_it_is_read(tmp_path):
    paths = [write(tmp_path / f"{i}.h5", [noise(40, 40, seed=i)]) for i in range(3)]
    data = ShardSet(paths, open_files=1)
    batches = load_batches(stream(data), last=20)
    next(batches)
    paths[1].unlink()
    with pytest.raises(InputError, match=r"1.h5: sample 0: .*found no such file"):
        list(batches)


def test_a_reading_process_that_is_killed(shards):
    class Deadly(RandomCrops):
        def __call__(self, seed, iteration, *rest):
            if iteration == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(seed, iteration, *rest)

    with pytest.raises(InputError, match="reading processes must live as long as the run"):
        list(load_batches(stream(shards, regions=Deadly((32, 32))), last=9, workers=1, start_method="fork"))


@pytest.mark.parametrize("kind", [RuntimeError, OSError, EOFError, FileNotFoundError])
def test_what_a_reading_process_raises_is_not_taken_for_its_death(shards, kind):
    class Broken(RandomCrops):
        def __call__(self, *_):
            raise kind("a fault of the caller's")

    with pytest.raises(kind, match="a fault of the caller's") as caught:
        list(load_batches(stream(shards, regions=Broken((32, 32))), last=2, workers=1, start_method="fork"))
    assert not isinstance(caught.value, InputError)
    assert not multiprocessing.active_children()  # and nobody waits for it later


def test_a_reading_process_leaves_it_to_the_main_one_to_stop(shards):
    class Interrupted(RandomCrops):
        def __call__(self, *given):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(*given)

    found = load_batches(stream(shards, regions=Interrupted((32, 32))), last=4, workers=2, start_method="fork")
    assert same(found, load_batches(stream(shards), last=4))


ORPHANS = """
import multiprocessing, sys
from coverfast import ShardSet
from coverfast.loader import ImageStream, RandomCrops, load_batches
# What is said of 2000 images fills the pipe to a main process that does not empty it.
stream = ImageStream(ShardSet(sys.argv[1]), batch=2000, seed=1, regions=RandomCrops((8, 8)))
batches = load_batches(stream, workers=2, start_method="fork", device=None)
next(batches)
print(*(p.pid for p in multiprocessing.active_children()), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc who lives")
def test_reading_processes_end_when_the_main_process_is_killed(shards):
    def lives(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    command = [sys.executable, "-c", ORPHANS, str(shards[0])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as main:
        assert main.stdout is not None
        readers = [int(pid) for pid in main.stdout.readline().split()]
        time.sleep(0.5)
        assert len(readers) == 2
        assert all(map(lives, readers))
        main.kill()
    limit = time.monotonic() + 3
    while any(map(lives, readers)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(map(lives, readers))


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_on_a_cpu(shards):
    here = list(load_batches(stream(shards), last=6))
    there = list(load_batches(stream(shards), last=6, workers=2, device="cuda"))
    for a, b in zip(here, there, strict=True):
        assert b.images.is_cuda
        torch.testing.assert_close(b.images.cpu(), a.images, atol=6e-8, rtol=0)
        assert torch.equal(a.indices, b.indices)


@pytest.mark.gpu
def test_labels_on_a_gpu_are_those_on_a_cpu(tmp_path):
    data = ShardSet(label_maps(tmp_path / "0.h5", [(40, 50), (33, 70), (15, 80)]))
    here = list(load_batches(stream(data, labels=True), last=6))
    there = list(load_batches(stream(data, labels=True), last=6, workers=2, device="cuda"))
    for a, b in zip(here, there, strict=True):
        assert b.labels.is_cuda
        assert b.targets.is_cuda
        assert torch.equal(b.labels.cpu(), a.labels)
        assert torch.equal(b.targets.cpu(), a.targets)
