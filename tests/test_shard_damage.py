"""Damaged and foreign shards: refused or named, never read as something else."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from coverfast.checks import InputError
from coverfast.loader import ImageStream, RandomCrops
from coverfast.shard_set import ShardSet
from coverfast.shards import SPLITS, Original, Sample, Shard, ShardWriter, verify


def build(path, count=5, shape=(1, 20, 30), dtype="uint16", labels=""):
    """A shard whose labels, where it has some, are of the type `labels`."""
    rng = np.random.default_rng(0)
    with ShardWriter(path, preprocessing={"preset": "raw"}, overwrite=True) as writer:
        for i in range(count):
            pixels = rng.integers(0, 200, shape).astype(dtype)
            n = len(shape) - 1
            affine = np.diag([3.0, 2.0, 1.0, 1.0]) if n == 3 else None
            original = Original(shape[1:], np.eye(n + 1) * 2, affine, "RAS" if n == 3 else "")
            said = {"source": f"in/{i}.png", "group": f"patient {i}", "split": SPLITS[i % 3], "original": original}
            if labels:
                said |= {"labels": rng.choice([0, 2, 4, 200], shape[1:]).astype(labels), "target": "xyz"[i % 3]}
            writer.add(Sample(pixels, 1.5, 0.25, 0.0, 255.0, (1.0, 2.0, 3.0)[:n], **said))
    return path


@pytest.fixture
def shard_file(tmp_path):
    return build(tmp_path / "s.h5")


def everything(path):
    """All that a shard says, and its pixels once by the shard and once by the loader."""
    with Shard(path) as shard:
        samples = [shard.read(i) for i in range(len(shard))]
        tables = (shard.sizes.tolist(), shard.scaling.tolist(), shard.splits.tolist())
        found = [(shard.ndim, shard.channels, *tables, shard.content_hash, shard.preprocessing)]
        found.append((shard.version, shard.label_classes, shard.target_classes, shard.targets.tolist()))
        for i, sample in enumerate(samples):
            info = shard.info(i)
            original = [np.asarray(v).tolist() for v in vars(info.original).values()]
            found.append((sample.pixels.tobytes(), sample.pixels.shape, info._replace(original=original)))
            if sample.labels is not None:
                found.append((sample.labels.dtype, sample.labels.tobytes(), shard.labels(i)[0].tobytes()))
        labels = bool(shard.label_classes)
    data = ShardSet(path, "all")
    stream = ImageStream(data, batch=len(data), seed=0, regions=RandomCrops((40,) * data.ndim), labels=labels)
    batch = stream.load(1)
    data.close()
    return [*found, [t.tolist() if isinstance(t, torch.Tensor) else t for t in batch]]


def test_files_that_are_no_shards_are_refused(tmp_path, shard_file):
    (tmp_path / "empty.h5").touch()
    (tmp_path / "text.h5").write_text("not a shard\n" * 100)
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["images"] = np.zeros((3, 4))
    cases = {
        "absent.h5": "found no such file",
        ".": "got a folder",
        "empty.h5": "got an empty file",
        "text.h5": "not HDF5",
        "foreign.h5": "without the attribute format",
        "x" * 300: "File name too long",
    }
    for name, words in cases.items():
        with pytest.raises(InputError, match=words) as caught:
            Shard(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert len(verify(tmp_path / name)) == 1


def test_truncated_at_any_length(tmp_path, shard_file):
    whole = shard_file.read_bytes()
    cut = tmp_path / "cut.h5"
    for length in [1, 7, 8, 20, 47, 48, 100, *range(500, len(whole), 997), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"truncated HDF5|not HDF5|damaged HDF5"):
            Shard(cut)
        assert verify(cut)


def _edit(path, change):
    """Change a shard through HDF5, so that every HDF5 checksum is right again."""
    with h5py.File(path, "r+") as file:
        change(file)


def _set(node, key, value):
    def change(file):
        file[node].attrs[key] = value

    return change


def _pixel(file):
    file["samples/00000003"][0, 2, 3] += 1


def _drop(name):
    def change(file):
        del file[name]

    return change


def _rename(file):
    file.move("samples/00000002", "samples/2")


def _swap(file):
    for old, new in (("00000000", "x"), ("00000001", "00000000"), ("x", "00000001")):
        file["samples"].move(old, new)


def _nan(file):
    attributes = dict(file["samples/00000001"].attrs)
    del file["samples/00000001"]
    made = file.create_dataset("samples/00000001", data=np.full((1, 20, 30), np.nan, np.float32))
    for key, value in attributes.items():
        made.attrs[key] = value


def _table(name, where, value):
    def change(file):
        file[name][where] = value

    return change


_resize = _table("sizes", 2, (20, 31))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("/", "version", 4), "must be of shard format version 2 or 3, got version 4"),
        (_set("/", "format", "other"), "without the attribute format"),
        (_set("/", "count", 6), "must have 6 samples of 2 axes, got 5"),
        (_set("/", "preprocessing", "{"), "cannot be read"),
        (_drop("samples/00000004"), "must have 5 samples of 2 axes, got 4"),
        (_drop("samples"), "cannot be read"),
        (_drop("sizes"), "cannot be read"),
        (_table("scaling", (1, 3), np.nan), "5 rows of 4 finite numbers as scaling"),
        (_table("splits", 1, 3), "5 splits below 3"),
    ],
)
def test_an_inconsistent_root_is_refused_on_opening(shard_file, change, words):
    _edit(shard_file, change)
    with pytest.raises(InputError, match=words):
        Shard(shard_file)
    assert len(verify(shard_file)) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("/", "channels", 2), r"sample 0 \(in/0.png\) must be \(2, 20, 30\) as the index says"),
        (_rename, "sample 2 cannot be read"),
        (_resize, r"sample 2 \(in/2.png\) must be \(1, 20, 31\)"),
        (_set("samples/00000003", "spacing", "steep"), "sample 3 cannot be read"),
    ],
)
def test_an_inconsistent_sample_is_refused_on_reading(shard_file, change, words):
    _edit(shard_file, change)
    with pytest.raises(InputError, match=words):
        everything(shard_file)
    assert re.search(words, verify(shard_file)[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_pixel, r"sample 3 \(in/3.png\) does not match its sha256"),
        (_set("samples/00000003", "sha256", "0" * 64), r"sample 3 \(in/3.png\) does not match its sha256"),
        (_set("samples/00000003", "sha256", "none"), "sample 3"),
        (_table("scaling", (1, 0), 1.25), "content_sha256"),
        (_table("splits", 1, 2), "content_sha256"),
        (_set("samples/00000001", "source", "in/9.png"), "content_sha256"),
        (_set("samples/00000001", "spacing", (1.0, 1.0)), "content_sha256"),
        (_set("samples/00000001", "spacing", (1.0, -1.0)), "sample 1.*spacing must be 2 positive"),
        (_set("samples/00000001", "group", "other"), "content_sha256"),
        (_set("/", "content_sha256", "0" * 64), "content_sha256"),
        (_nan, "sample 1.*pixels must be finite"),
        (_swap, "content_sha256"),
    ],
)
def test_verify_finds_what_hdf5_cannot(shard_file, change, words):
    assert verify(shard_file) == []
    _edit(shard_file, change)
    problems = verify(shard_file)
    assert len(problems) == 1
    assert re.search(words, problems[0])
    assert problems[0].startswith(str(shard_file))


def test_verify_names_every_problem_and_reports_progress(shard_file):
    _edit(shard_file, _pixel)
    _edit(shard_file, _set("samples/00000000", "sha256", "0" * 64))
    calls = []
    assert len(verify(shard_file, lambda done, total: calls.append((done, total)))) == 2
    assert calls == [(i, 5) for i in range(1, 6)]


def test_a_failing_checksum_names_file_index_and_source(shard_file):
    with h5py.File(shard_file) as file:
        chunk = file["samples/00000002"].id.get_chunk_info(0)
    content = bytearray(shard_file.read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 1
    shard_file.write_bytes(content)
    with Shard(shard_file) as shard:
        words = rf"{re.escape(str(shard_file))}: sample 2 \(in/2.png\) cannot be read: .*[Ff]ilter"
        with pytest.raises(InputError, match=words):
            shard.read(2)
        assert shard.read(3).source == "in/3.png"
        assert shard.source(2) == "in/2.png"
    assert re.search(r"sample 2 \(in/2.png\).* \(chunks at \(0, 0\)\)$", verify(shard_file)[0])


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_out_of_range_is_refused(shard_file, index):
    with pytest.raises(InputError, match=f"sample index must be 0 to 4, got {index}"):
        Shard(shard_file).read(index)


def _flip_all(path, whole, bits, expected, out):
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            read = "same" if everything(path) == expected else "DIFFERENT"
        except InputError:
            read = "refused"
        out.send((read, "named" if verify(path) else "sound"))
        # HDF5 must not be handed a file of the same identity while it may still hold the last one.
        path.unlink()


def _labelled(path, change):
    build(path, labels="uint16")
    assert verify(path) == []
    _edit(path, change)


def _text(node, key, old, new):
    def change(file):
        text = file[node].attrs[key].decode()
        assert old in text
        file[node].attrs[key] = text.replace(old, new)

    return change


def _small_map(file):
    del file["labels/00000001"]
    file["labels/00000001"] = np.zeros((20, 29), np.uint8)
    file["labels/00000001"].attrs["sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop("labels/00000004"), "must have 5 label maps, got 4"),
        (_set("labels", "classes", "{"), "cannot be read"),
        (_set("labels", "classes", "[]"), "label values must be integers .* rising from 0, got "),
        (_set("targets", "classes", '["x", "x"]'), "target classes must have different names"),
        (_set("targets", "classes", '["x", "y"]'), "must have 5 targets from -1 to 1"),
        (_table("targets", 1, -2), "must have 5 targets from -1 to 2"),
        (_drop("targets"), "content_sha256"),
        (_drop("labels"), "content_sha256"),
        (_set("/", "version", 2), "content_sha256"),
        (_table("targets", 1, 2), "content_sha256"),
        (_table("targets", 1, -1), "content_sha256"),
        (_text("labels", "classes", '"4"', '"lung"'), "content_sha256"),
        (_text("targets", "classes", "z", "a"), "content_sha256"),
        (_text("labels", "classes", '"value": 200', '"value": 201'), r"sample 0 \(in/0.png\).*of the shard's table"),
        (_table("labels/00000003", (2, 3), 9), r"label map of sample 3 \(in/3.png\) does not match its sha256"),
        (_set("labels/00000003", "sha256", "0" * 64), r"label map of sample 3 \(in/3.png\) does not match"),
        (_small_map, r"label map of sample 1 \(in/1.png\) must be \(20, 30\) of uint8, .*, got \(20, 29\)"),
    ],
)
def test_verify_finds_what_is_wrong_with_labels(tmp_path, change, words):
    path = tmp_path / "s.h5"
    _labelled(path, change)
    problems = verify(path)
    assert re.search(words, problems[0])
    assert all(problem.startswith(str(path)) for problem in problems)


def test_a_failing_checksum_of_a_label_map_is_named(tmp_path):
    path = build(tmp_path / "s.h5", labels="uint8")
    with h5py.File(path) as file:
        chunk = file["labels/00000002"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 1
    path.write_bytes(content)
    words = rf"{re.escape(str(path))}: label map of sample 2 \(in/2.png\) cannot be read: .*[Ff]ilter"
    with Shard(path) as shard:
        for read in (shard.read, shard.labels):
            with pytest.raises(InputError, match=words):
                read(2)
        assert shard.pixels(2)[0].shape == (1, 20, 30)
    assert re.search(words + r".* \(chunks at \(0, 0\)\)$", verify(path)[0])


def _structures(whole, rng, count):
    """Bits in the HDF5 structures: headers, link heaps and their trees, chunk indexes."""
    marks = (b"OHDR", b"FRHP", b"FHDB", b"FHIB", b"BTHD", b"BTLF", b"BTIN", b"FAHD", b"FADB")
    starts = [found.start() for mark in marks for found in re.finditer(mark, whole)]
    return [int(rng.choice(starts)) * 8 + int(rng.integers(0, 8 * 256)) for _ in range(count)]


@pytest.mark.parametrize(
    ("count", "shape", "dtype", "flips", "labels"),
    [
        (3, (1, 150, 140), "uint8", 240, ""),
        (18, (1, 7, 9), "uint16", 160, ""),
        (2, (2, 9, 33, 40), "int16", 100, ""),
        (2, (1, 90, 80), "uint8", 140, "uint8"),
        (9, (1, 4, 5, 6), "uint8", 100, "uint32"),
    ],
    ids=["chunks", "many samples", "volumes", "label maps", "many label maps"],
)
def test_no_flipped_bit_goes_unseen(tmp_path, count, shape, dtype, flips, labels):
    path = build(tmp_path / "s.h5", count, shape, dtype, labels)
    whole, expected = path.read_bytes(), everything(path)
    rng = np.random.default_rng(1)
    bits = [int(b) for b in rng.integers(0, len(whole) * 8, flips // 2)] + _structures(whole, rng, flips // 2)
    bits = [b for b in bits if b < len(whole) * 8]
    # In a child, because HDF5 might crash on a damaged file: that, too, would be a failure.
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=_flip_all, args=(tmp_path / "flipped.h5", whole, bits, expected, send)
    )
    child.start()
    send.close()
    outcomes = []
    try:
        while receive.poll(60):
            outcomes.append(receive.recv())
    except EOFError:
        pass
    child.join(10)
    assert child.exitcode == 0, f"died or hung at bit {bits[len(outcomes)]}"
    assert len(outcomes) == len(bits)
    assert set(outcomes) <= {("same", "sound"), ("same", "named"), ("refused", "named")}
    assert outcomes.count(("refused", "named")) > flips // 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("count", 0, "at least 1 sample"), ("ndim", 5, "2 or 3 axes"), ("preprocessing", b"[1]", "JSON object")],
)
def test_a_foreign_writers_mistakes_are_refused(tmp_path: Path, name: str, value: object, message: str) -> None:
    path = tmp_path / "foreign.h5"
    with ShardWriter(path, ndim=2, preprocessing={}) as writer:
        writer.add(Sample(np.zeros((1, 4, 4), np.uint8), 1.0, 0.0, 0.0, 255.0, (1.0, 1.0), "a"))
    with h5py.File(path, "r+") as file:
        file.attrs[name] = np.bytes_(value) if isinstance(value, bytes) else value
    with pytest.raises(InputError, match=message):
        Shard(path)
    assert message in verify(path)[0]
