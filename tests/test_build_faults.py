"""Builds that are killed, starved and disturbed: nothing lost, nothing double, nothing half-written."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coverfast.checks import InputError
from coverfast.ingest import Source, build_shard, preprocessing
from coverfast.ingest.pieces import Recipe
from coverfast.shards import Shard, verify

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs signals and file locks of POSIX")

RAW = preprocessing("raw")
OPTIONS = {"val_fraction": 0.2, "test_fraction": 0.1, "group": "p[0-9]+", "shard_size": 60_000}
FLAGS = ["--val-fraction", "0.2", "--test-fraction", "0.1", "--group", "p[0-9]+", "--shard-size", "60000"]


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "in", 32)


def make_images(folder, count):
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (50, 60 + i % 3)).astype(np.uint8)
        np.save(folder / f"p{i // 2:02d}_{i}.npy", pixels)
    return folder


def build(paths, out, **options):
    return build_shard(paths, out, **{"preprocessing": RAW, "workers": 0} | OPTIONS | options)


def command(*arguments):
    return [sys.executable, "-m", "coverfast", "shards", "build", *map(str, arguments)]


def run(*arguments, code=0):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    if code == 2:
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1
    return done


def shards(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.h5")) if p.is_file()}


def pieces(out):
    try:
        return sorted(out.with_name(f"{out.name}.partial").glob("??/*.h5"))
    except FileNotFoundError:  # the build came to its end and removed them meanwhile
        return []


# ---- kills


def test_kill_at_random_moments_with_workers(tmp_path, images):
    """KILL_SEED chooses other moments, KILLS how many."""
    draw, most = random.Random(int(os.environ.get("KILL_SEED", "0"))), int(os.environ.get("KILLS", "10"))
    (tmp_path / "whole").mkdir()
    started = time.monotonic()
    run(images, "--out", tmp_path / "whole" / "s.h5", "--workers", "2", *FLAGS)
    takes = time.monotonic() - started
    expected = shards(tmp_path / "whole")
    assert len(expected) == 3
    contents = {name: Shard(tmp_path / "whole" / name).content_hash for name in expected}
    folder = tmp_path / "killed"
    folder.mkdir()
    kills = finished = kept = 0
    while kills < most or shards(folder) or not finished or (folder / "s.h5.partial").exists():
        builder = subprocess.Popen(
            command(images, "--out", folder / "s.h5", "--workers", "2", *FLAGS),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            # Most of the time goes into starting up: wait for that to be over.
            before = len(pieces(folder / "s.h5"))
            delay = takes * (draw.uniform(0.5, 1.1) if before == 32 else draw.uniform(0.0, 0.3))
            while builder.poll() is None and len(pieces(folder / "s.h5")) <= before < 32:
                time.sleep(0.002)
            text, error = builder.communicate(timeout=delay if kills < most else 120)
        except subprocess.TimeoutExpired:
            if draw.random() < 0.5:
                os.killpg(builder.pid, signal.SIGKILL)
            else:
                builder.kill()
            builder.communicate()
            kills += 1
            for name in shards(folder):  # whatever has its name is complete
                assert verify(folder / name) == []
                assert Shard(folder / name).content_hash == contents[name]
            continue
        # The kill before this run may have come when all was done but the end of the process.
        assert (builder.returncode, error) == (0, "") or "exists already" in error
        kept += "of an earlier run" in text
        assert shards(folder) == expected
        assert {p.name for p in folder.iterdir()} == set(expected)
        finished += 1
        for name in expected:  # the next run starts anew
            (folder / name).unlink()
    assert kept >= 1


STEPS = """
    import os, signal, sys
    from coverfast.ingest import build_shard, preprocessing
    left = int(sys.argv[3])

    def count(event, arguments):
        global left
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    import h5py, numpy, coverfast.ingest.build
    sys.addaudithook(count)
    build_shard(
        sys.argv[1], sys.argv[2], preprocessing=preprocessing("raw"), workers=0, shard_size=20_000, overwrite=True
    )
"""


def test_kill_before_every_step_that_changes_a_folder(tmp_path):
    """Among them those between the renames of several shards and in the removal of the partial folder."""
    images = make_images(tmp_path / "in", 4)
    options = {"preprocessing": RAW, "workers": 0, "shard_size": 20_000}
    (tmp_path / "whole").mkdir()
    build_shard(images, tmp_path / "whole" / "s.h5", **options)
    expected = shards(tmp_path / "whole")
    assert len(expected) == 2
    seen = set()
    for step in range(100):
        folder = tmp_path / f"{step}"
        folder.mkdir()
        # An older build of more shards under the same names: replaced as a whole, the rest removed.
        old = {f"s-0000{i}.h5": b"old" for i in range(3)}
        for name, content in old.items():
            (folder / name).write_bytes(content)
        script = [sys.executable, "-c", textwrap.dedent(STEPS), str(images), str(folder / "s.h5"), str(step)]
        code = subprocess.run(script, capture_output=True, timeout=60, check=False).returncode
        if code == 0:
            break
        assert code == -signal.SIGKILL
        found = shards(folder)
        seen.add(sum(found.get(name) == content for name, content in expected.items()))
        assert all(content in (old.get(name), expected.get(name)) for name, content in found.items())
        begun = pieces(folder / "s.h5")
        committed = (folder / "s.h5.partial" / "publish.json").exists()
        if found == expected and not committed:  # all was done but the removal of an empty folder
            with pytest.raises(InputError, match="exists already"):
                build_shard(images, folder / "s.h5", **options)
        else:
            report = build_shard(images, folder / "s.h5", **options, overwrite=not committed)
            assert committed or report.kept == len(begun)
        assert shards(folder) == expected
        assert sorted(p.name for p in folder.iterdir()) == sorted(expected)
    assert step > 20
    assert seen == {0, 1, 2}


def test_a_killed_worker_is_an_error_that_names_the_file(tmp_path, images):
    def kill(stage, done, total):
        if stage == "reading" and done == 12:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    words = (
        r"in/p\d\d_\d+.npy was being read when its worker process was killed by signal 9, perhaps for lack of memory"
    )
    with pytest.raises(InputError, match=f"{words}; finished samples stay in .*s.h5.partial, the same command resumes"):
        build(images, tmp_path / "s.h5", workers=1, progress=kill)
    done = len(pieces(tmp_path / "s.h5"))
    assert 12 <= done < 32
    report = build(images, tmp_path / "s.h5")
    assert (report.kept, report.samples) == (done, 32)
    assert multiprocessing.active_children() == []


def test_an_interrupt_keeps_what_is_finished(tmp_path, images):
    def interrupt(stage, done, total):
        if stage == "writing" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(images, tmp_path / "s.h5", progress=interrupt)
    assert shards(tmp_path) == {}
    assert len(pieces(tmp_path / "s.h5")) == 32
    assert build(images, tmp_path / "s.h5").kept == 32
    build(images, tmp_path / "t.h5")
    assert {k[1:]: v for k, v in shards(tmp_path).items() if k[0] == "s"} == {
        k[1:]: v for k, v in shards(tmp_path).items() if k[0] == "t"
    }


# ---- resuming


@pytest.fixture
def unfinished(tmp_path, images):
    """A build that a bad file has stopped after some samples; the file is mended since."""
    good = (images / "p15_31.npy").read_bytes()
    (images / "p15_31.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"p15_31.npy cannot be read"):
        build(images, tmp_path / "s.h5")
    (images / "p15_31.npy").write_bytes(good)
    assert len(pieces(tmp_path / "s.h5")) > 20
    return tmp_path / "s.h5"


def test_other_settings_are_refused(unfinished, images):
    before = pieces(unfinished)
    for changes, words in (
        (
            {"val_fraction": 0.5},
            "with val_fraction = 0.2, got val_fraction = 0.5; repeat it to resume, or restart=True",
        ),
        ({"preprocessing": preprocessing("raw", size=8)}, r'preprocessing = .*"size": null.*"size": 8'),
        ({"group": None}, "group = .*got group = null"),
        ({"compression": "gzip"}, "compression"),
        ({"shard_size": None}, "shard_size"),
        ({"split_seed": 1}, "split_seed"),
        ({"volume": 1}, "volume"),
        ({"test_fraction": 0.3}, "test_fraction"),
    ):
        with pytest.raises(InputError, match=words):
            build(images, unfinished, **changes)
    assert pieces(unfinished) == before
    (unfinished.parent / "s.h5.partial" / "settings.json").write_text("{")
    with pytest.raises(InputError, match="holds an unfinished build with"):
        build(images, unfinished)
    report = build(images, unfinished, val_fraction=0.5, restart=True)
    assert (report.kept, report.samples) == (0, 32)


def test_other_settings_are_taken_while_nothing_is_finished(tmp_path, images):
    script = """
        import os, signal, sys
        from coverfast.ingest import build_shard, preprocessing
        kill = lambda *call: os.kill(os.getpid(), signal.SIGKILL)
        build_shard(sys.argv[1], sys.argv[2], preprocessing=preprocessing("raw"), workers=0, progress=kill)
    """
    killed = [sys.executable, "-c", textwrap.dedent(script), str(images), str(tmp_path / "s.h5")]
    assert subprocess.run(killed, timeout=60, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "s.h5.partial" / "settings.json").exists()
    assert pieces(tmp_path / "s.h5") == []
    for path in images.iterdir():
        np.save(path, np.zeros((2, 4, 5, 6), np.uint16) + len(path.name))
    np.save(images / "p00_0.npy", np.zeros((3, 3, 3, 3, 3)))
    for _ in range(2):
        with pytest.raises(InputError, match=r"p00_0.npy") as caught:
            build(images / "p00_0.npy", tmp_path / "s.h5", val_fraction=0.0, test_fraction=0.0)
        assert "finished samples" not in str(caught.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    (images / "p00_0.npy").unlink()
    report = build(images, tmp_path / "s.h5", val_fraction=0.0, test_fraction=0.0, shard_size=None)
    assert (report.samples, report.kept) == (31, 0)


def test_a_folder_of_that_name_that_is_no_build_is_left_alone(tmp_path, images):
    (tmp_path / "s.h5.partial").mkdir()
    (tmp_path / "s.h5.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"s.h5.partial must be the folder of a build, got one with thesis.txt"):
        build(images, tmp_path / "s.h5")
    with pytest.raises(InputError, match=r"got one with thesis.txt"):
        build(images, tmp_path / "s.h5", restart=True)
    assert [p.name for p in (tmp_path / "s.h5.partial").iterdir()] == ["thesis.txt"]


def test_damaged_pieces_and_leftovers_are_made_again(unfinished, images):
    found = pieces(unfinished)
    found[0].write_bytes(b"")
    found[1].write_bytes(found[1].read_bytes()[:-100])
    found[2].write_bytes(found[3].read_bytes()[:1000] + bytes(len(found[3].read_bytes()) - 1000))
    found[4].with_name(".x.h5.123.part").write_bytes(b"half")
    (unfinished.parent / "s.h5.partial" / "shard-00000.h5").write_bytes(b"of an assembly that was killed")
    left = []

    def look(stage, done, total):
        if stage == "reading" and done == 0:
            files = [p.name for p in (unfinished.parent / "s.h5.partial").rglob("*") if p.is_file()]
            left.extend(name for name in files if name[0] == "." or name.startswith("shard-"))

    report = build(images, unfinished, progress=look)
    assert left == []
    assert report.kept == len(found) - 3
    build(images, unfinished.with_name("t.h5"))
    for path in report.paths:
        assert path.read_bytes() == path.with_name(path.name.replace("s", "t", 1)).read_bytes()


def test_pixels_that_changed_in_a_piece_are_found_and_removed(unfinished, images):
    piece = pieces(unfinished)[0]
    with Shard(piece) as shard:
        pixels = shard.read(0).pixels.tobytes()
    content = piece.read_bytes()
    assert content.count(pixels) == 1
    place = content.index(pixels) + 100
    piece.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(InputError, match=r"1 finished samples do not read back and were removed .* resumes"):
        build(images, unfinished)
    assert shards(unfinished.parent) == {}
    assert build(images, unfinished).kept == 31


def test_changed_and_removed_sources_are_read_again(unfinished, images):
    count = len(pieces(unfinished))
    np.save(images / "p00_0.npy", np.zeros((4, 4), np.uint8))
    (images / "p00_1.npy").unlink()
    report = build(images, unfinished)
    assert report.samples == 31
    assert count - 2 <= report.kept <= count - 1
    with Shard(report.paths[0]) as shard:
        assert (shard.source(0), shard.info(0).shape) == ("in/p00_0.npy", (1, 4, 4))
        assert shard.source(1) == "in/p01_2.npy"


def test_a_piece_is_named_by_all_that_shapes_it(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 4), np.uint8))
    (tmp_path / "b.npy").write_bytes((tmp_path / "a.npy").read_bytes())
    os.utime(tmp_path / "b.npy", ns=(0, (tmp_path / "a.npy").stat().st_mtime_ns))
    source, recipe = Source(tmp_path / "a.npy", "in/a.npy"), Recipe(RAW, None, "none")
    keys = [recipe.key(source)]
    for changed in ({"group": "p1"}, {"name": "in/c.npy"}, {"path": tmp_path / "b.npy"}):
        keys.append(recipe.key(replace(source, **changed)))
    for changed in ({"volume": 1}, {"compression": "gzip"}, {"preprocessing": preprocessing("raw", size=3)}):
        keys.append(replace(recipe, **changed).key(source))
    os.utime(tmp_path / "a.npy", ns=(0, 5))
    keys.append(recipe.key(source))
    assert len(set(keys)) == len(keys) == 8
    assert Recipe(dict(reversed(RAW.items())), None, "none").key(source) == keys[-1]


def test_a_published_shard_that_has_gone_is_told(tmp_path, images):
    build(images, tmp_path / "s.h5")
    folder = tmp_path / "s.h5.partial"
    folder.mkdir()
    settings = {"preprocessing": RAW, "volume": None, "compression": "none", "split_seed": 0, **OPTIONS}
    from coverfast import __version__
    from coverfast.shards import VERSION

    settings["made by"] = f"coverfast {__version__}, shard format {VERSION}"
    (folder / "settings.json").write_text(json.dumps(settings))
    plan = {"shards": {"shard-00000.h5": "s-00000.h5", "shard-00001.h5": "s-00009.h5"}, "stale": [], "report": {}}
    (folder / "publish.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match=r"s-00009.h5 was published by the build in .* found nothing"):
        build(images, tmp_path / "s.h5")


HOLDER = """
    import sys
    from pathlib import Path
    from coverfast.ingest.partial import Partial
    with Partial(Path(sys.argv[1]), {}):
        print("held", flush=True)
        sys.stdin.read()
"""


def test_one_builder_at_a_time(tmp_path, images):
    holder = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path / "s.h5")]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        second = run(images, "--out", tmp_path / "s.h5", code=2)
        assert "s.h5.partial must have one builder at a time, another one is at work in it" in second.stderr
        third = run(images, "--out", tmp_path / "s.h5", "--restart", code=2)
        assert "one builder at a time" in third.stderr
        first.kill()
    run(images, "--out", tmp_path / "s.h5", "--restart")
    assert verify(tmp_path / "s.h5") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "s.h5"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds children in /proc")
def test_the_next_builder_waits_for_workers_of_a_killed_one(tmp_path):
    images = make_images(tmp_path / "in", 300)
    arguments = (images, "--out", tmp_path / "s.h5", "--workers", "1", *FLAGS)
    with subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        while not pieces(tmp_path / "s.h5"):
            time.sleep(0.002)
        children = [int(p) for p in Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()]
        for child in children:
            os.kill(child, signal.SIGSTOP)  # as one that is deep in a decoder
        first.kill()
    count = len(pieces(tmp_path / "s.h5"))
    assert 0 < count < 300
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True) as second:
        time.sleep(2)
        assert second.poll() is None
        assert len(pieces(tmp_path / "s.h5")) == count
        for child in children:
            os.kill(child, signal.SIGKILL)
        assert f"{count} of an earlier run" in second.communicate(timeout=60)[0]


NO_GUARD = """
    import sys
    from coverfast.ingest import build_shard, preprocessing
    build_shard(sys.argv[1], sys.argv[2], preprocessing=preprocessing("raw"), workers=1)
"""


def test_a_script_without_a_guard_is_told_so(tmp_path, images):
    (tmp_path / "script.py").write_text(textwrap.dedent(NO_GUARD))
    script = [sys.executable, str(tmp_path / "script.py"), str(images), str(tmp_path / "s.h5")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)
    assert "InputError: worker processes must be able to import the main script" in done.stderr
    assert done.returncode == 1
    assert not (tmp_path / "s.h5").exists()


# ---- disks


@contextmanager
def small_disk(folder, size="3m"):
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = sys.platform == "linux" and subprocess.run(options, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_then_more_space(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(30):
        np.save(tmp_path / "in" / f"{i:02}.npy", np.random.default_rng(i).integers(0, 255, (300, 300)).astype(np.uint8))
    with small_disk(tmp_path / "disk") as remount:
        out = tmp_path / "disk" / "s.h5"
        refused = run(tmp_path / "in", "--out", out, code=2)
        assert re.search(r"s.h5 must have about [\d.]+ MiB of disk to be built, got [\d.]+ [KM]iB free", refused.stderr)
        full = run(tmp_path / "in", "--out", out, "--no-disk-check", code=2)
        assert re.search(r"no space left on the device .* finished samples stay in .*s.h5.partial", full.stderr)
        finished = len(pieces(out))
        assert 8 < finished < 30
        assert not out.exists()
        # Room for the samples, not for the shard.
        remount("size=4500k")
        full = run(tmp_path / "in", "--out", out, "--no-disk-check", code=2)
        assert "no space left on the device" in full.stderr
        assert len(pieces(out)) == 30
        remount("size=64m")
        assert "30 of an earlier run" in run(tmp_path / "in", "--out", out).stdout
        assert verify(out) == []
        assert [p.name for p in out.parent.iterdir()] == ["s.h5"]


def test_read_only_target(tmp_path, images):
    with small_disk(tmp_path / "disk", "16m") as remount:
        remount("ro")
        refused = run(images, "--out", tmp_path / "disk" / "s.h5", code=2)
        assert "s.h5.partial cannot be written: Read-only file system" in refused.stderr
        remount("rw")

        def interrupt(stage, done, total):
            if stage == "reading" and done == 10:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(images, tmp_path / "disk" / "s.h5", progress=interrupt)
        remount("ro")
        assert "Read-only file system" in run(images, "--out", tmp_path / "disk" / "s.h5", *FLAGS, code=2).stderr
        remount("rw")
        report = build(images, tmp_path / "disk" / "s.h5")
        assert report.kept == 10
        assert all(verify(path) == [] for path in report.paths)
