"""`coverfast bench data`: the same pixels by every way, what was read counted right, and a file of results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from strategies import refused
from typer.testing import CliRunner

from coverfast.bench import data, data_ways
from coverfast.bench.data_ways import PROBLEMS, check_ways, images, problems, ways, write_shard
from coverfast.cli.main import app
from coverfast.shard_set import ShardSet

SMALL = tuple(replace(p, size=s, crop=c, count=3, batch=2) for p, s, c in zip(
    PROBLEMS, ((300, 320), (40, 70, 34)), ((100, 120), (16, 32, 20)), strict=True))  # fmt: skip


def test_every_way_is_measured(tmp_path):
    rows = list(data.measure(tmp_path, SMALL, workers=0, repeats=1, formats=True, crops=4))
    names = [row.way for row in rows if row.problem == "2D"]
    assert names[:4] == ["shard, crops", "shard, whole samples", "npy, mapped", "PNG a sample"]
    assert len(names) == 4 + 9
    assert [row.way for row in rows if row.problem == "3D"][3] == "NIfTI a sample"
    for row in rows:
        assert row.warm > 0
        assert row.cold > 0
        assert row.stored > 0.1
    if Path("/proc/self/io").exists():
        shards = [row for row in rows if row.over is not None]
        assert len(shards) == 2 * 10
        # Headers of HDF5 objects come on top of the chunks, and count for more where the images are small.
        assert all(0.99 < row.over < 1.3 for row in shards), [(row.way, row.over) for row in shards]
        whole = next(row for row in rows if row.way == "shard, whole samples")
        assert whole.read == pytest.approx(300 * 320 / 1e6, rel=0.3)
    assert not any(p.is_file() for p in tmp_path.rglob("*"))


def test_named_ways_alone_are_measured(tmp_path):
    named = ["npy, mapped", "PNG a sample"]
    rows = list(data.measure(tmp_path, SMALL, names=named, workers=0, repeats=1, crops=4))
    assert [(row.problem, row.way) for row in rows] == [("2D", named[0]), ("2D", named[1]), ("3D", named[0])]
    assert list(data.measure(tmp_path, SMALL[1:], names=["PNG a sample"], workers=0, repeats=1, crops=4)) == []


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_other_pixels_are_not_timed(dtype, tmp_path, monkeypatch):
    """Even if it is one bit in one kind of file; also if they are less than 1."""
    monkeypatch.setattr(
        data_ways, "map_npy", lambda path: (np.load(path).view(f"u{np.dtype(dtype).itemsize}") + 1).view(dtype)
    )
    with refused("npy, mapped must give the same pixels"):
        list(data.measure(tmp_path, problems([(40, 50)], dtype), workers=0, repeats=1, crops=4))


def test_a_file_that_was_forgotten_is_read_from_the_disk(tmp_path):
    path = write_shard(tmp_path / "x.h5", replace(SMALL[1], size=(100, 100, 100)))
    data.forget([path])
    shard = ShardSet(path)
    shard.pixels(0)
    assert path.stat().st_size > 0


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int64", "float32"])
def test_every_stored_type_is_the_same_image(dtype, tmp_path):
    (flat,) = problems([(40, 50)], dtype)
    found = list(images(replace(flat, count=6)))
    assert {(x.shape, x.dtype.name) for x in found} == {((1, 40, 50), dtype)}
    top = {"uint8": 255, "int8": 127, "float32": 1}.get(dtype, 2047)
    expected = next(images(replace(flat, count=1, dtype="float32")))
    assert float(np.abs(found[0].astype(float) / top - expected).max()) <= 0.5 / top
    assert len({x.tobytes() for x in found}) == 6
    rows = list(data.measure(tmp_path, problems([(40, 50), (16, 20, 24)], dtype), workers=0, repeats=1, crops=4))
    assert ("PNG a sample" in {row.way for row in rows}) == (dtype in ("uint8", "uint16"))
    assert "NIfTI a sample" in {row.way for row in rows}


def test_sizes_take_the_place_of_the_usual_images():
    assert problems() == list(PROBLEMS)
    wide, deep = problems([(1024, 2048), (16, 200, 128), (1024, 2048)])
    assert (wide.name, wide.size, wide.crop, wide.count, wide.batch) == (
        "1024 x 2048",
        (1024, 2048),
        (384, 384),
        32,
        24,
    )
    assert (deep.crop, deep.dtype, deep.count) == ((16, 128, 128), "int16", 16)
    (image,) = images(replace(wide, count=1))
    assert image.shape == (1, 1024, 2048)
    assert np.array_equal(image[0, :512, :512], image[0, 512:, 1024:1536]), "drawn once and repeated"


# --- delivery --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "asked"), [("cpu", None), ("cuda", "cuda")])
def test_crops_are_delivered_where_they_are_asked(device, asked, tmp_path, monkeypatch):
    """As stored on a CPU; to a GPU as `crop_loader` does, and the clock waits for them."""
    seen, waited = set(), []
    real = data.load_batches

    def load(*arguments, device, **options):
        seen.add(device)
        return real(*arguments, device=None, **options)

    monkeypatch.setattr(data, "load_batches", load)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    of = {"names": ["shard, crops"], "workers": 0, "repeats": 1, "crops": 4}
    (row,) = data.measure(tmp_path, problems([(40, 50)]), device=device, **of)
    assert row.device == device
    assert seen == {asked}
    assert bool(waited) == (device == "cuda")


@pytest.mark.gpu
def test_crops_reach_the_gpu(tmp_path):
    of = {"names": ["shard, crops"], "workers": 1, "repeats": 1, "crops": 4}
    (row,) = data.measure(tmp_path, problems([(40, 50)], "uint16"), device="cuda", **of)
    assert row.warm > 0


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_prints_and_saves(tmp_path, monkeypatch):
    file = tmp_path / "r.json"
    lengths = []
    real = data.forget
    monkeypatch.setattr(
        data,
        "forget",
        lambda f: (lengths.append(len(json.loads(file.read_text())["rows"]) if file.exists() else 0), real(f)),
    )
    command = "bench data --workers 1 --repeats 1 --crops 2 --dtype uint16 --device cpu --sizes 64,70 --sizes 32,20,24"
    named = ["--against", "npy, mapped", "--against", "shard, crops"]
    done = CliRunner().invoke(app, [*command.split(), *named, "--save", str(file)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for word in ("shard, crops", "npy, mapped", "64x70 of 64x70 uint16, 1 processes, as stored", "commit", "threads"):
        assert word in done.output
    saved = json.loads(file.read_text())
    assert saved["bench"] == "data"
    both = ["shard, crops", "npy, mapped"]
    assert [(row["problem"], row["way"]) for row in saved["rows"]] == [
        (problem, way) for problem in ("64 x 70", "32 x 20 x 24") for way in both
    ]
    assert {(row["dtype"], row["device"], row["workers"]) for row in saved["rows"]} == {("uint16", "cpu", 1)}
    assert saved["rows"][2]["crop"] == saved["rows"][2]["size"] == [32, 20, 24]
    assert lengths == [0, 1, 2, 3], "what is there is saved after every way"


def test_large_images_are_read_in_the_type_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LARGE", tuple(replace(p, name=f"large {p.name}") for p in SMALL))
    rows = list(data.measure_large(tmp_path, "uint16"))
    assert [(row.problem, row.dtype, row.workers) for row in rows] == [
        ("large 2D", "uint16", 0),
        ("large 3D", "uint16", 0),
    ]
    assert all(row.warm > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--against", "TIFF"], ("against", "shard, crops", "NIfTI a sample", "TIFF")),
        (["--against", "PNG a sample", "--dtype", "int16"], ("against", "npy, mapped", "PNG a sample")),
        (["--against", "NIfTI a sample", "--sizes", "64,64"], ("against", "PNG a sample")),
        (["--against", "chunks of 128, gzip"], ("against", "chunks of 128, gzip")),
        (["--dtype", "float64"], ("dtype", "uint16", "float64")),
        (["--sizes", "64"], ("sizes", "two or three axes", "(64,)")),
        (["--sizes", "64,8"], ("sizes", "16", "(64, 8)")),
        (["--device", "tpu"], ("device", "cuda", "tpu")),
    ],
)
def test_command_refuses_in_one_sentence(arguments, words):
    with refused(*words):
        CliRunner().invoke(app, ["bench", "data", "--device", "cpu", *arguments], catch_exceptions=False)


def test_names_of_formats_are_known_where_they_are_measured():
    assert len(ways(PROBLEMS[0], formats=True)) == len(ways(PROBLEMS[0])) + 9
    check_ways(["chunks of 512, lzf", "chunks of 16, none"], PROBLEMS, formats=True)
