"""Shards: what goes in comes out; what is damaged, foreign or half-written is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coverfast.checks import InputError
from coverfast.samples import DTYPES
from coverfast.shards import Original, Sample, Shard, ShardWriter, chunk_shape, verify


def image(source="a.png", shape=(1, 20, 30), dtype="uint8", seed=0, **changes):
    pixels = np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)
    fields = {"slope": 1.0, "intercept": 0.0, "lo": 0.0, "hi": 255.0, "spacing": (1.0,) * (len(shape) - 1)}
    return Sample(**({"pixels": pixels, "source": source} | fields | changes))


def write(path, samples, **options):
    with ShardWriter(path, **({"preprocessing": {"preset": "raw"}} | options)) as writer:
        for sample in samples:
            writer.add(sample)
    return Path(path)


@pytest.fixture
def shard_file(tmp_path):
    return write(tmp_path / "s.h5", [image(f"in/{i}.png", seed=i) for i in range(5)])


floats = st.floats(-1e6, 1e6)
shapes = st.tuples(st.integers(1, 2), st.lists(st.integers(1, 40), min_size=2, max_size=3)).map(lambda t: (t[0], *t[1]))


@given(st.data(), shapes, st.sampled_from(DTYPES), st.sampled_from("<>"))
def test_round_trip(tmp_path_factory, data, shape, dtype, order):
    elements = st.floats(-1e6, 1e6, width=32) if dtype == "float32" else None
    pixels = data.draw(hnp.arrays(np.dtype(dtype), shape, elements=elements))
    scaling = {key: data.draw(floats) for key in ("slope", "intercept", "lo", "hi")}
    spacing = tuple(data.draw(st.floats(1e-3, 1e3)) for _ in shape[1:])
    source = data.draw(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20))
    # Neither byte order nor strides reach the file.
    odd = np.repeat(pixels, 2, axis=-1).astype(pixels.dtype.newbyteorder(order))[..., ::2]
    path = write(tmp_path_factory.mktemp("trip") / "x.h5", [Sample(odd, spacing=spacing, source=source, **scaling)])
    with Shard(path) as shard:
        back = shard.read(0)
        assert (len(shard), shard.ndim, shard.channels) == (1, len(shape) - 1, shape[0])
        assert shard.sizes.tolist() == [list(shape[1:])]
        assert shard.preprocessing == {"preset": "raw"}
        assert shard.info(0).shape == shape
        assert shard.source(0) == source
    np.testing.assert_array_equal(back.pixels, pixels)
    assert back.pixels.dtype == np.dtype(dtype)
    assert (back.slope, back.intercept, back.lo, back.hi) == tuple(scaling.values())
    assert (back.spacing, back.source) == (spacing, source)
    assert verify(path) == []
    # The file ends where HDF5 thinks it ends: nothing of the reserved space is left over.
    assert int.from_bytes(path.read_bytes()[28:36], "little") == path.stat().st_size


def test_normalised():
    pixels = np.array([[[-1024, 0, 1000, 3000]]], np.int16)
    sample = image(dtype="int16", slope=2.0, intercept=24.0, lo=-24.0, hi=4024.0)
    got = Sample(pixels, *(getattr(sample, k) for k in ("slope", "intercept", "lo", "hi", "spacing", "source")))
    values = got.normalised()
    assert values.dtype == np.float32
    np.testing.assert_allclose(values[0, 0], [0, 48 / 4048, 2048 / 4048, 1], rtol=1e-7)
    assert not image(lo=7.0, hi=7.0).normalised().any()
    np.testing.assert_array_equal(image().normalised(), (image().pixels / 255).astype(np.float32))


def test_same_images_give_the_same_bytes_and_hash(tmp_path):
    images = [image(str(i), seed=i) for i in range(20)]
    a, b = write(tmp_path / "a.h5", images), write(tmp_path / "b.h5", images)
    assert a.read_bytes() == b.read_bytes()
    renamed = write(tmp_path / "c.h5", [image(f"{i}!", seed=i) for i in range(20)])
    swapped = write(tmp_path / "d.h5", images[::-1])
    scaled = write(tmp_path / "e.h5", [image(str(i), seed=i, hi=256.0) for i in range(20)])
    assert len({Shard(p).content_hash for p in (a, b, renamed, swapped, scaled)}) == 4


def test_hash_definition_of_the_format_page(tmp_path):
    import hashlib
    import struct

    matrix, affine = np.arange(16.0).reshape(4, 4), np.diag([1.0, 2.0, 3.0, 1.0])
    original = Original((5, 4, 3), matrix, affine, "LPS")
    said = {"spacing": (1.5, 2.0, 3.0), "slope": 0.5, "intercept": -1.0, "group": "g", "split": "val"}
    sample = image("ä.nii", (2, 3, 4, 5), "int16", **said, original=original)
    shard = Shard(write(tmp_path / "x.h5", [sample]))
    one = hashlib.sha256(b"i2 2x3x4x5\n" + sample.pixels.astype("<i2").tobytes())
    assert shard.info(0).sha256 == one.hexdigest()
    parts = [one.digest(), "ä.nii".encode(), b"g", b"val", b"LPS"]
    parts += [struct.pack("<4d", 0.5, -1.0, 0.0, 255.0), struct.pack("<3d", 1.5, 2.0, 3.0)]
    parts += [matrix.tobytes(), struct.pack("<3d", 5, 4, 3), affine.tobytes()]
    whole = hashlib.sha256(b"".join(struct.pack("<Q", len(part)) + part for part in parts))
    assert shard.content_hash == whole.hexdigest()


def test_every_dataset_is_checksummed_and_nothing_has_variable_length(shard_file):
    with h5py.File(shard_file) as file:
        datasets = [*(file[name] for name in ("sizes", "scaling", "splits")), *file["samples"].values()]
        assert all(d.fletcher32 and d.chunks for d in datasets)
        for plist in (d.id.get_create_plist() for d in datasets):
            assert plist.get_filter(plist.get_nfilters() - 1)[0] == h5py.h5z.FILTER_FLETCHER32
        for node in [file, *datasets]:
            assert len(node.attrs) <= 8
            kinds = [h5py.h5a.open(node.id, name.encode()).get_type() for name in node.attrs]
            assert not any(isinstance(k, h5py.h5t.TypeStringID) and k.is_variable_str() for k in kinds)
    assert shard_file.read_bytes()[8] == 3  # superblock version


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 129, 257), (3, 300, 5), (1, 33, 65, 31)])
def test_reserved_space_is_never_exceeded(tmp_path, shape):
    with ShardWriter(tmp_path / "x.h5", preprocessing={"long": "x" * 30000}) as writer:
        for i in range(40):
            noise = np.random.default_rng(i).integers(0, 2**63, shape)
            writer.add(image("n" * 30000, shape, "int64", pixels=noise))
            assert writer._file.id.get_filesize() <= writer._reserved


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pixels": np.full((1, 2, 2), np.nan, np.float32)}, "odd.png: pixels must be finite, got 4 NaN"),
        ({"pixels": np.array([[[np.inf, 0]]], np.float32)}, "odd.png: pixels must be finite, got 1 NaN"),
        ({"pixels": np.zeros((1, 2, 2))}, "got float64"),
        ({"pixels": np.zeros((1, 2, 2), bool)}, "got bool"),
        ({"pixels": np.zeros((1, 0, 2), np.uint8)}, "without empty axes, got shape"),
        ({"pixels": np.zeros((2, 2), np.uint8)}, "got shape (2, 2)"),
        ({"pixels": [[1]]}, "got list"),
        ({"spacing": (1.0,)}, "spacing must be 2 positive numbers"),
        ({"spacing": (1.0, 0.0)}, "spacing must be 2 positive numbers"),
        ({"slope": float("nan")}, "must be finite"),
        ({"lo": -1e308, "hi": 1.7e308}, "must be finite"),
        ({"source": "a\0b"}, "without NUL"),
        (
            {"pixels": np.zeros((1, 2, 2, 2), np.uint8), "spacing": (1.0,) * 3},
            "odd.png must be 2D like a.png, got 3D",
        ),
        ({"pixels": np.zeros((2, 2, 2), np.uint8)}, "odd.png must have 1 channels like a.png, got 2"),
    ],
)
def test_bad_samples_are_refused_and_the_rest_goes_on(tmp_path, changes, words):
    with ShardWriter(tmp_path / "x.h5", preprocessing={}) as writer:
        writer.add(image())
        with pytest.raises(InputError, match=re.escape(words)):
            writer.add(image(**({"source": "odd.png"} | changes)))
        writer.add(image("b.png"))
    with Shard(tmp_path / "x.h5") as shard:
        assert [shard.source(i) for i in range(2)] == ["a.png", "b.png"]


def test_bad_targets_and_settings_are_refused(tmp_path, shard_file):
    before = shard_file.read_bytes()
    with pytest.raises(InputError, match="it exists already"):
        ShardWriter(shard_file, preprocessing={})
    with pytest.raises(InputError, match="got a folder"):
        ShardWriter(tmp_path, preprocessing={}, overwrite=True)
    with pytest.raises(InputError, match="must be a folder, got a file"):
        ShardWriter(shard_file / "x.h5", preprocessing={})
    with pytest.raises(InputError, match="cannot be written: Not a directory"):
        write(shard_file / "deep" / "x.h5", [image()])
    with pytest.raises(InputError, match="cannot be written: File name too long"):
        write(tmp_path / ("x" * 300), [image()])
    with pytest.raises(InputError, match="at least 1 sample"):
        write(tmp_path / "none.h5", [])
    with pytest.raises(InputError, match="JSON"):
        ShardWriter(tmp_path / "x.h5", preprocessing={"a": object()})
    with pytest.raises(InputError, match="ndim must be 2 or 3"):
        ShardWriter(tmp_path / "x.h5", ndim=4, preprocessing={})
    with pytest.raises(InputError, match="open for writing"):
        ShardWriter(tmp_path / "x.h5", preprocessing={}).add(image())
    assert shard_file.read_bytes() == before
    write(shard_file, [image("new")], overwrite=True)
    assert Shard(shard_file).source(0) == "new"
    assert write(tmp_path / "new" / "folders" / "x.h5", [image()]).exists()
    assert not list(tmp_path.rglob(".*"))


def _interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["block", "create_dataset", "verify", "fsync", "rename"])
def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch, where):
    import coverfast.shards as shards

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117
        with ShardWriter(tmp_path / "x.h5", preprocessing={}) as writer:
            writer.add(image())
            match where:
                case "block":
                    _interrupt()
                case "create_dataset":
                    patch.setattr(shards, "put_metadata", _interrupt)
                    writer.add(image())
                case "verify":
                    patch.setattr(shards, "verify", _interrupt)
                case "fsync":
                    patch.setattr(os, "fsync", _interrupt)
                case "rename":
                    patch.setattr(Path, "replace", _interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_does_not_read_back_is_not_published(tmp_path, monkeypatch):
    import coverfast.shards as shards

    monkeypatch.setattr(shards, "pixel_digest", lambda pixels: "0" * 64)
    with pytest.raises(InputError, match=r"does not read back .* sample 0 \(a.png\) does not match its sha256"):
        write(tmp_path / "x.h5", [image()])
    assert list(tmp_path.iterdir()) == []


BUILDER = """
    import sys, time
    import numpy as np
    from coverfast.shards import Sample, ShardWriter
    pixels = np.random.default_rng(0).integers(0, 255, (1, 300, 400)).astype(np.uint8)
    with ShardWriter(sys.argv[1], preprocessing={}) as writer:
        for i in range(200):
            writer.add(Sample(pixels, 1.0, 0.0, 0.0, 255.0, (1.0, 1.0), f"{i}.png"))
            print(i, flush=True)
            time.sleep(float(sys.argv[2]))
"""


def test_kill_in_mid_build_leaves_no_shard_and_a_rebuild_succeeds(tmp_path):
    target = tmp_path / "x.h5"
    command = [sys.executable, "-c", textwrap.dedent(BUILDER), str(target), "0.01"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        while builder.stdout.readline().strip() != "5":
            pass
        builder.send_signal(signal.SIGKILL)
    assert builder.returncode == -signal.SIGKILL
    assert not target.exists()
    assert all(p.name.startswith(".x.h5.") for p in tmp_path.iterdir())
    assert verify(write(target, [image()])) == []


FULL = """
    import os, sys
    import numpy as np
    from coverfast.checks import InputError
    from coverfast.shards import Sample, ShardWriter
    folder, limit = sys.argv[1], int(sys.argv[2])
    if limit:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    pixels = np.random.default_rng(0).integers(0, 255, (1, 100, 120)).astype(np.uint8)
    for left in range(0, 4000, 500):  # KiB left to the build, from nothing to enough
        if not limit:
            room = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            with open(folder + "/ballast", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, room - left * 1024))
        try:
            with ShardWriter(folder + "/x.h5", preprocessing={}) as writer:
                for i in range(150):
                    writer.add(Sample(pixels, 1.0, 0.0, 0.0, 255.0, (1.0, 1.0), f"{i}.png"))
            print("written")
            os.unlink(folder + "/x.h5")
        except InputError as error:
            print(error)
        if not limit:
            os.unlink(folder + "/ballast")
        assert os.listdir(folder) == [], os.listdir(folder)
"""


def _run_full(folder, limit=0):
    command = [sys.executable, "-c", textwrap.dedent(FULL), str(folder), str(limit)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs tmpfs")
def test_full_disk(tmp_path):
    options = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)]
    try:
        mounted = subprocess.run(options, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        lines = _run_full(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert len(lines) == 8
    assert lines[-1] == "written"
    refused = [line for line in lines if line != "written"]
    assert len(refused) >= 5
    assert all(re.search(r"x.h5 cannot be written: no space left on .*[\d,]+ bytes free", line) for line in refused)


def test_reserving_without_fallocate(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    path = write(tmp_path / "x.h5", [image(str(i), seed=i) for i in range(3)])
    assert verify(path) == []
    assert path.stat().st_size < 20000


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_file_size_limit(tmp_path):
    lines = _run_full(tmp_path, 1_500_000)
    assert set(lines) == {f"{tmp_path}/x.h5 cannot be written: File too large"}


def _read_all(path_or_shard, out):
    shard = path_or_shard if isinstance(path_or_shard, Shard) else Shard(path_or_shard)
    fresh = shard._file is None
    for _ in range(20):
        sums = [int(shard.read(i).pixels.sum()) for i in range(len(shard))]
    out.put((fresh, sums))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_readers_in_other_processes(shard_file, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    context = multiprocessing.get_context(method)
    shard, other = Shard(shard_file), Shard(shard_file)
    expected = [int(shard.read(i).pixels.sum()) for i in range(len(shard))]
    other.read(0)
    out = context.SimpleQueue()
    readers = [context.Process(target=_read_all, args=(shard, out)) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(20):
        assert [int(other.read(i).pixels.sum()) for i in range(len(other))] == expected
    results = [out.get() for _ in readers]
    for reader in readers:
        reader.join()
        assert reader.exitcode == 0
    # A forked child starts without a handle; a spawned one has opened its own on unpickling.
    assert results == [(method == "fork", expected)] * 3
    assert [int(shard.read(i).pixels.sum()) for i in range(len(shard))] == expected


def test_pickle_refuses_another_content(shard_file):
    shard = Shard(shard_file)
    packed = pickle.dumps(shard)
    assert pickle.loads(packed).read(1).source == "in/1.png"
    write(shard_file, [image("other")], overwrite=True)
    assert shard.source(1) == "in/1.png"  # an open handle keeps what it opened
    with pytest.raises(InputError, match="must not change while it is in use"):
        pickle.loads(packed)
    shard.close()
    with pytest.raises(InputError, match="it was closed"):
        shard.read(0)


@given(st.data(), shapes)
def test_regions_and_copies(tmp_path_factory, data, shape):
    pixels = data.draw(hnp.arrays(np.dtype("int16"), shape))
    matrix = np.diag([2.0] * (len(shape) - 1) + [1.0])
    original = Original(shape[1:], matrix)
    said = {"spacing": (1.0,) * (len(shape) - 1), "group": "p", "original": original}
    folder = tmp_path_factory.mktemp("regions")
    first = write(folder / "a.h5", [image("a", (shape[0], *shape[1:])), image("b", pixels=pixels, **said)])
    ends = [sorted(data.draw(st.sets(st.integers(0, s), min_size=2, max_size=2))) for s in shape[1:]]
    region = [slice(np.int64(a), b) for a, b in ends]
    with Shard(first) as shard:
        part = shard.read(1, region)
        np.testing.assert_array_equal(part.pixels, pixels[:, *region])
        assert part.original.to_original[:-1, -1].tolist() == [2 * a for a, _ in ends]
        for got, where in zip(shard.pixels(1, [region, None]), (region, [slice(None)] * len(region)), strict=True):
            np.testing.assert_array_equal(got, pixels[:, *where])
        with pytest.raises(InputError, match="region must be a slice within"):
            shard.read(1, [slice(0, s + 1) for s in shape[1:]])
        with ShardWriter(folder / "b.h5", preprocessing={}) as writer:
            writer.copy(shard, 1, split="val")
        assert shard.splits.tolist() == [0, 0]
    with Shard(folder / "b.h5") as shard:
        info = shard.info(0)
        assert (info.split, info.group, info.source, info.original.shape) == ("val", "p", "b", shape[1:])
        np.testing.assert_array_equal(shard.read(0).pixels, pixels)
    assert verify(folder / "b.h5") == []


def test_a_copy_is_stored_as_an_image_added(tmp_path, shard_file):
    smooth = np.arange(40 * 50 * 60).reshape(1, 40, 50, 60) // 900
    volumes = [image(f"{i}", pixels=(smooth + i).astype(np.int16), spacing=(1.0,) * 3) for i in range(2)]
    whole = write(tmp_path / "whole.h5", volumes, compression="gzip")
    with Shard(whole) as shard, ShardWriter(tmp_path / "copy.h5", preprocessing={"preset": "raw"}) as writer:
        writer.copy(shard, 0)
        writer.copy(shard, 1)
    assert (tmp_path / "copy.h5").stat().st_size <= whole.stat().st_size
    with Shard(tmp_path / "copy.h5") as shard:
        dataset = shard.dataset(1)
        assert (dataset.compression, dataset.shuffle, dataset.fletcher32) == ("gzip", True, True)
    assert Shard(tmp_path / "copy.h5").content_hash == Shard(whole).content_hash
    with Shard(whole) as shard, ShardWriter(tmp_path / "flat.h5", preprocessing={}) as writer:
        writer.add(image())
        with pytest.raises(InputError, match=r"0 must be 2D like a\.png, got 3D"):
            writer.copy(shard, 0)


@pytest.mark.parametrize("asked", ["none", "gzip"])
@pytest.mark.parametrize("shape", [(1, 90, 80, 70), (1, 90, 80)])
def test_compression(tmp_path, asked, shape):
    path = write(tmp_path / "x.h5", [image("x", shape, "int16")], compression=asked)
    with Shard(path) as shard:
        dataset = shard.dataset(0)
        assert (dataset.compression, dataset.shuffle) == (("gzip", True) if asked == "gzip" else (None, False))
        np.testing.assert_array_equal(shard.read(0).pixels, image("x", shape, "int16").pixels)
    with pytest.raises(InputError, match="compression"):
        ShardWriter(tmp_path / "y.h5", preprocessing={}, compression="zip")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 512, 512), (1, 256, 256)), ((3, 257, 1), (1, 129, 1)), ((1, 160, 155, 128), (1, 32, 31, 32))],
)
def test_chunks_are_even(shape, expected):
    assert chunk_shape(shape) == expected


def test_readers_accept_other_layouts(tmp_path, shard_file):
    with h5py.File(shard_file) as old, h5py.File(tmp_path / "other.h5", "w") as new:
        for key, value in old.attrs.items():
            new.attrs[key] = value.decode() if isinstance(value, bytes) else value
        new["sizes"] = old["sizes"][()].astype(">i4")
        new["scaling"], new["splits"] = old["scaling"][()].astype(">f8"), old["splits"][()].astype("i2")
        ways = [{}, {"chunks": (1, 7, 9)}, {"compression": "lzf"}, {"compression": 9}, {"chunks": True}]
        for (name, dataset), way in zip(old["samples"].items(), ways, strict=True):
            copy = new.create_dataset(f"samples/{name}", data=dataset[()], **way)
            for key, value in dataset.attrs.items():
                copy.attrs[key] = value.decode() if isinstance(value, bytes) else value
    assert verify(tmp_path / "other.h5") == []
    assert Shard(tmp_path / "other.h5").read(4).normalised().shape == (1, 20, 30)
    assert json.loads(json.dumps(Shard(tmp_path / "other.h5").preprocessing)) == {"preset": "raw"}
