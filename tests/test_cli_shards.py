"""`coverfast shards` as people run it: real processes, exit codes, one-line refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from coverfast.cli.shards import byte_size
from coverfast.shards import Shard


def run(*arguments, code=0, **environment):
    command = [sys.executable, "-m", "coverfast", "shards", *map(str, arguments)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment
    )
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(4):
        np.save(folder / f"{i}.npy", np.random.default_rng(i).integers(0, 255, (30, 40 + i)).astype(np.uint8))
    return folder


def refusal(*arguments):
    result = run(*arguments, code=2)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def facts(shard):
    return dict(line.split(maxsplit=1) for line in run("info", shard).stdout.splitlines())


def test_build_info_verify(tmp_path, images):
    (images / "notes.txt").touch()
    out = tmp_path / "s.h5"
    built = run("build", images, "--out", out)
    assert built.stderr == ""
    estimate, done = built.stdout.splitlines()
    assert re.match(r"4 samples take about [\d.]+ KiB, 0 B more while they are built; ", estimate)
    assert done.startswith(f"{out}: 4 samples, ")
    assert done.endswith(", 1 other files ignored")
    assert run("verify", out).stdout == "sound: 4 samples\n"
    said = facts(out)
    with Shard(out) as shard:
        assert said["content"] == shard.content_hash
    assert (said["dimension"], said["samples"], said["dtype"]) == ("2D", "4", "uint8")
    assert said["size"] == "30x40 to 30x43 pixels"
    assert said["intensity"] == "0 to 255"
    assert said["sources"] == "in/0.npy, in/1.npy, in/2.npy, ..."
    assert said["splits"] == "train 4, val 0, test 0"
    assert said["groups"] == "4 samples without one"
    assert (said["compression"], said["chunks"]) == ("none", "1x30x40, 1x30x41, 1x30x42, 1x30x43")
    assert said["preprocessing"] == "preset = raw, size = None"

    assert "exists already" in refusal("build", images, "--out", out)
    run("build", images / "0.npy", images / "1.npy", "--out", out, "--overwrite", "--size", 16)
    with Shard(out) as shard:
        assert shard.sizes.tolist() == [[16, 16]] * 2

    content = bytearray(out.read_bytes())
    content[len(content) // 3] ^= 8
    out.write_bytes(content)
    damaged = run("verify", out, code=2)
    assert damaged.stderr.startswith("error: ")
    assert damaged.stdout == ""


def test_presets_and_their_flags(tmp_path, images):
    out = tmp_path / "s.h5"
    run("build", images, "--out", out, "--preset", "chest-xray", "--size", 24, "--fit", "pad", "--compression", "gzip")
    assert facts(out)["preprocessing"] == "fit = pad, preset = chest-xray, size = 24"
    assert facts(out)["compression"] == "gzip"
    wrong = refusal("build", images, "--out", tmp_path / "t.h5", "--preset", "ct", "--size", 24)
    assert "size must be a parameter of the preset ct, it has spacing, clip" in wrong
    assert "preset must be one of raw, chest-xray" in refusal("build", images, "--out", out, "--preset", "mri")
    np.save(tmp_path / "ct.npy", np.linspace(-1000, 1000, 8 * 9 * 10).reshape(8, 9, 10).astype(np.int16))
    flags = ("--preset", "ct", "--clip", "-500,500", "--spacing", 2)
    run("build", tmp_path / "ct.npy", "--out", tmp_path / "ct.h5", *flags)
    with Shard(tmp_path / "ct.h5") as shard:
        assert shard.preprocessing == {"preset": "ct", "spacing": 2.0, "clip": [-500.0, 500.0]}
        assert shard.sizes.tolist() == [[4, 4, 5]]
    bad = run("build", images, "--out", out, "--preset", "ct", "--clip", "a,b", code=2)
    assert "expected numbers with commas between, got 'a,b'" in bad.stderr


def test_splits_sizes_merge_and_verify_of_several(tmp_path, images):
    (images / "4.npy").write_bytes((images / "2.npy").read_bytes())
    flags = ("--val-fraction", 0.4, "--group", "[0-9]", "--split-seed", 1, "--workers", 2)
    built = run("build", images, "--out", tmp_path / "s.h5", "--shard-size", "16KiB", *flags).stdout.splitlines()
    shards = sorted(tmp_path.glob("*.h5"))
    assert len(shards) > 1
    assert built[1].startswith(f"{shards[0]} to {shards[-1].name}: 5 samples, ")
    assert re.fullmatch(r"splits: train 3 samples of [23] groups, val 2 samples of [12] groups?", built[2])
    assert built[3] == "duplicates: 1 sample with the pixels of an earlier one: in/4.npy = in/2.npy"
    assert run("verify", *shards).stdout.splitlines()[0] == f"sound: {_samples_in(shards[0])}, {shards[0]}"
    merged = run("merge", *shards, "--out", tmp_path / "m.h5")
    assert merged.stdout.startswith(f"{tmp_path}/m.h5: 5 samples, ")
    assert facts(tmp_path / "m.h5")["splits"] == "train 3, val 2, test 0"
    assert facts(tmp_path / "m.h5")["groups"] == "5 named"
    run("build", images, "--out", tmp_path / "whole.h5", *flags)
    assert (tmp_path / "whole.h5").read_bytes() == (tmp_path / "m.h5").read_bytes()
    shards[1].write_bytes(b"gone")
    checked = run("verify", *shards, code=2)
    assert checked.stderr.startswith("error: ")
    assert len(checked.stdout.splitlines()) == len(shards) - 1


def _samples_in(path):
    with Shard(path) as shard:
        return f"{len(shard)} sample" + "s" * (len(shard) != 1)


def test_bad_files_and_resuming(tmp_path, images):
    (images / "3.npy").write_bytes(b"\x93NUMPY junk")
    out = tmp_path / "s.h5"
    stopped = refusal("build", images, "--out", out)
    assert "3.npy cannot be read as npy" in stopped
    assert f"finished samples stay in {out}.partial, the same command resumes" in stopped
    assert not out.exists()
    assert "got val_fraction = 0.5; repeat it to resume" in refusal(
        "build", images, "--out", out, "--val-fraction", 0.5
    )
    built = run("build", images, "--out", out, "--skip-bad")
    assert built.stderr.startswith("skipped: ")
    assert "3 samples" in built.stdout
    assert "3 of an earlier run, 1 unreadable files skipped" in built.stdout


def test_refusals(tmp_path, images):
    (tmp_path / "bare").mkdir()
    (tmp_path / "text.h5").write_text("hello")
    assert "found nothing there" in refusal("build", tmp_path / "nowhere", "--out", tmp_path / "s.h5")
    assert "must hold images" in refusal("build", tmp_path / "bare", "--out", tmp_path / "s.h5")
    assert "size must be an int from 1" in refusal("build", images, "--out", tmp_path / "s.h5", "--size", 0)
    assert "found no such file" in refusal("info", tmp_path / "nowhere.h5")
    assert "not HDF5" in refusal("info", tmp_path / "text.h5")
    assert "not HDF5" in refusal("verify", tmp_path / "text.h5")
    assert "not HDF5" in refusal("merge", tmp_path / "text.h5", "--out", tmp_path / "s.h5")
    assert "must be a PNG file" in refusal("preview", tmp_path / "text.h5", tmp_path / "s.gif")
    assert "not HDF5" in refusal("preview", tmp_path / "text.h5", tmp_path / "s.png")
    assert not (tmp_path / "s.h5").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare", "in", "text.h5"]


def test_merge_sees_what_is_given_twice_and_tells_people_apart(tmp_path, images):
    for name, flags in (("a", ()), ("b", ("--val-fraction", 0.5))):
        run("build", images, "--out", tmp_path / f"{name}.h5", "--group", "[0-9]", *flags)
    out = ("--out", tmp_path / "m.h5")
    assert "must be given once" in refusal("merge", tmp_path / "a.h5", tmp_path / "a.h5", *out)
    assert "must be given once" in refusal("merge", tmp_path / "a.h5", tmp_path / "[a].h5", *out)
    assert "(--distinct-groups)" in refusal("merge", tmp_path / "a.h5", tmp_path / "b.h5", *out)
    run("merge", tmp_path / "?.h5", *out, "--distinct-groups")
    assert facts(tmp_path / "m.h5")["groups"] == "8 named"


def test_an_out_that_is_a_folder_is_none(tmp_path, images):
    run("build", images, "--out", tmp_path / "s.h5")
    for command, source in (("build", images), ("merge", tmp_path / "s.h5")):
        said = refusal(command, source, "--out", f"{tmp_path}/new/")
        assert said == f"error: out must be a file name, got '{tmp_path}/new/'"
    assert not (tmp_path / "new").exists()


def test_names_of_files_do_not_reach_the_terminal_raw(tmp_path, images):
    names = ["\x1b[31mred", "two\nlines", "\u202eback", "\u00e9\u4e2d"]
    for path, name in zip(sorted(images.iterdir()), names, strict=True):
        path.rename(images / f"{name}.npy")
        (images / f"{name}2.npy").write_bytes((images / f"{name}.npy").read_bytes())
        (images / f"{name}3.npy").write_bytes(b"junk")
    out = tmp_path / "a\x1bb.h5"
    built = run("build", images, "--out", out, "--skip-bad", PYTHONIOENCODING="utf-8")
    twin = out.with_name("twin.h5")
    twin.write_bytes(out.read_bytes())
    told = run("info", out, PYTHONIOENCODING="utf-8").stdout + run("verify", out, twin, PYTHONIOENCODING="utf-8").stdout
    text = built.stdout + built.stderr + told
    assert len(built.stderr.splitlines()) == 4
    assert not {"\x1b", "\u202e"} & set(text)
    assert "\nlines" not in text
    for shown in (
        r"in/\x1b[31mred2.npy = in/\x1b[31mred.npy",
        r"two\nlines",
        r"\u202eback",
        "\u00e9\u4e2d",
        r"a\x1bb.h5",
    ):
        assert shown in text


def test_preview(tmp_path, images):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    run("build", images, "--out", tmp_path / "s.h5", "--val-fraction", 0.25)
    shown = run("preview", tmp_path / "s.h5", tmp_path / "s.png", "--count", 3)
    assert shown.stdout == f"{tmp_path}/s.png\n"
    with image.open(tmp_path / "s.png") as opened:
        assert min(opened.size) > 100
    run("preview", tmp_path / "s.h5", tmp_path / "val.png", "--split", "val")
    assert "split must be one of" in refusal("preview", tmp_path / "s.h5", tmp_path / "x.png", "--split", "fold")


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("512MiB", 512 << 20), ("1.5 kB", 1500), ("16KiB", 16384), ("1000", 1000), ("2t", 2 * 10**12)],
)
def test_byte_sizes(text, size):
    assert byte_size(text) == size


def test_byte_sizes_that_are_none(tmp_path, images):
    for text in ("4XB", "GB", "-3", "4i"):
        result = run("build", images, "--out", tmp_path / "s.h5", f"--shard-size={text}", code=2, COLUMNS="200")
        assert "expected a number of bytes such as 4GB or 512MiB" in " ".join(result.stderr.split())


def test_lines_now_and_then_without_a_terminal(monkeypatch, capsys):
    import coverfast.cli.shards_progress as cli

    monkeypatch.setattr(cli, "_SECONDS", 0.0)
    with cli.progress() as advance:
        advance("reading", 3, 8)
    assert capsys.readouterr().err == "reading 3/8\n"


def test_help_does_not_load_the_library():
    code = "import sys; from coverfast.cli import shards; print(sorted({'h5py', 'torch', 'rich'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "h5py" not in result.stdout
    for command in ("build", "info", "verify", "merge", "preview", "phantom", "atlas"):
        assert command in run("--help").stdout
    said = run("build", "--help", COLUMNS="160").stdout
    for flag in (
        *("--preset", "--workers", "--val-fraction", "--test-fraction", "--split-seed", "--group", "--volume"),
        *(
            "--labels",
            "--label-table",
            "--classes",
            "--shard-size",
            "--compression",
            "--skip-bad",
            "--overwrite",
            "--restart",
            "--no-disk-check",
        ),
        *("--size", "--fit", "--shape", "--threshold", "--enlarge", "--spacing", "--clip"),
    ):
        assert flag in said
