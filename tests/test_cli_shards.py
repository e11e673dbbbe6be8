"""`coverfast shards` as people run it: real processes, exit codes, one-line refusals."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from coverfast.shards import Shard


def run(*arguments, code=0):
    command = [sys.executable, "-m", "coverfast", "shards", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    if code == 2:
        assert result.stdout == ""
    return result


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(4):
        np.save(folder / f"{i}.npy", np.random.default_rng(i).integers(0, 255, (30, 40 + i)).astype(np.uint8))
    return folder


def refusal(*arguments):
    lines = run(*arguments, code=2).stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_build_info_verify(tmp_path, images):
    (images / "notes.txt").touch()
    out = tmp_path / "s.h5"
    built = run("build", images, "--out", out)
    assert built.stderr == ""
    assert built.stdout.startswith(f"{out}: 4 samples, ")
    assert built.stdout.endswith("1 other files ignored\n")
    assert run("verify", out).stdout == "sound: 4 samples\n"
    facts = dict(line.split(maxsplit=1) for line in run("info", out).stdout.splitlines())
    with Shard(out) as shard:
        assert facts["content"] == shard.content_hash
    assert (facts["dimension"], facts["samples"], facts["dtype"]) == ("2D", "4", "uint8")
    assert facts["size"] == "30x40 to 30x43 pixels"
    assert facts["intensity"] == "0 to 255"
    assert facts["sources"] == "in/0.npy, in/1.npy, in/2.npy, ..."

    assert "exists already" in refusal("build", images, "--out", out)
    run("build", images / "0.npy", images / "1.npy", "--out", out, "--overwrite", "--size", 16)
    with Shard(out) as shard:
        assert shard.sizes.tolist() == [[16, 16]] * 2

    content = bytearray(out.read_bytes())
    content[len(content) // 3] ^= 8
    out.write_bytes(content)
    damaged = run("verify", out, code=2)
    assert damaged.stderr.startswith("error: ")


def test_bad_files(tmp_path, images):
    (images / "1.npy").write_bytes(b"\x93NUMPY junk")
    out = tmp_path / "s.h5"
    assert "1.npy cannot be read as npy" in refusal("build", images, "--out", out)
    assert not out.exists()
    built = run("build", images, "--out", out, "--skip-bad")
    assert built.stderr.startswith("skipped: ")
    assert "3 samples" in built.stdout
    assert "1 unreadable files skipped" in built.stdout


def test_refusals(tmp_path, images):
    (tmp_path / "bare").mkdir()
    (tmp_path / "text.h5").write_text("hello")
    assert "found nothing there" in refusal("build", tmp_path / "nowhere", "--out", tmp_path / "s.h5")
    assert "must hold images" in refusal("build", tmp_path / "bare", "--out", tmp_path / "s.h5")
    assert "size must be an int from 1" in refusal("build", images, "--out", tmp_path / "s.h5", "--size", 0)
    assert "found no such file" in refusal("info", tmp_path / "nowhere.h5")
    assert "not HDF5" in refusal("info", tmp_path / "text.h5")
    assert "not HDF5" in refusal("verify", tmp_path / "text.h5")
    assert not (tmp_path / "s.h5").exists()


def test_help_does_not_load_the_library():
    code = "import sys; from coverfast.cli import shards; print(sorted({'h5py', 'torch', 'rich'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "h5py" not in result.stdout
    for command in ("build", "info", "verify"):
        assert command in run("--help").stdout
