"""`coverfast bench data`: the same pixels by every way, what was read counted right, and a file of results."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coverfast.bench import data
from coverfast.checks import InputError
from coverfast.shard_set import ShardSet

SMALL = tuple(replace(p, size=s, crop=c, count=3, batch=2) for p, s, c in zip(
    data.PROBLEMS, ((300, 320), (40, 70, 34)), ((100, 120), (16, 32, 20)), strict=True))  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(data, "PROBLEMS", SMALL)


def test_every_way_is_measured(small, tmp_path):
    rows = list(data.measure(tmp_path, workers=0, repeats=1, formats=True, crops=4))
    names = [row.way for row in rows if row.problem == "2D"]
    assert names[:4] == ["shard, crops", "shard, whole samples", "npy, mapped", "PNG a sample"]
    assert len(names) == 4 + 9
    assert [row.way for row in rows if row.problem == "3D"][3] == "NIfTI a sample"
    for row in rows:
        assert row.warm > 0
        assert row.cold > 0
    if Path("/proc/self/io").exists():
        shards = [row for row in rows if row.over is not None]
        assert len(shards) == 2 * 10
        # Headers of HDF5 objects come on top of the chunks, and count for more where the images are small.
        assert all(0.99 < row.over < 1.3 for row in shards), [(row.way, row.over) for row in shards]
        whole = next(row for row in rows if row.way == "shard, whole samples")
        assert whole.read == pytest.approx(300 * 320 / 1e6, rel=0.3)
    assert not any(p.is_file() for p in tmp_path.rglob("*"))


def test_other_pixels_are_not_timed(small, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "map_npy", lambda path: np.load(path) + np.uint8(1))
    with pytest.raises(InputError, match="npy, mapped must give the same pixels"):
        list(data.measure(tmp_path, workers=0, repeats=1, crops=4))


def test_a_file_that_was_forgotten_is_read_from_the_disk(tmp_path):
    path = data.write_shard(tmp_path / "x.h5", replace(SMALL[1], size=(100, 100, 100)))
    data.forget([path])
    shard = ShardSet(path)
    shard.pixels(0)
    assert path.stat().st_size > 0


def test_command(tmp_path):
    out = tmp_path / "r.json"
    command = [sys.executable, "-c", "\n".join([
        "import sys; from dataclasses import replace; from coverfast.bench import data",
        "data.PROBLEMS = tuple(replace(p, size=(64,) * len(p.size), crop=(32,) * len(p.size), count=2, batch=1)"
        " for p in data.PROBLEMS)",
        f"sys.argv = 'coverfast bench data --workers 1 --repeats 1 --crops 2 --save {out}'.split()",
        "from coverfast.cli.main import main; main()",
    ])]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "shard, crops" in result.stdout
    found = json.loads(out.read_text())
    assert {row["problem"] for row in found["rows"]} == {"2D", "3D"}
    assert found["provenance"]["command"].startswith("coverfast bench data")
