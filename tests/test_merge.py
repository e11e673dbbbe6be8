"""Merging: the samples as they were stored, in order, with their splits; what does not belong together is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from coverfast.checks import InputError
from coverfast.ingest import merge_shards
from coverfast.samples import Original
from coverfast.shards import Sample, Shard, ShardWriter, verify


def image(source, seed=0, shape=(1, 40, 50), **changes):
    pixels = np.random.default_rng(seed).integers(0, 100, shape).astype(np.uint8)
    n = len(shape) - 1
    fields = {"slope": 2.0, "intercept": -1.0, "lo": 0.0, "hi": 200.0, "spacing": (0.5,) * n}
    fields["original"] = Original(shape[1:], np.eye(n + 1) * 2)
    return Sample(**({"pixels": pixels, "source": source} | fields | changes))


def write(path, samples, preprocessing=None, **options):
    with ShardWriter(path, preprocessing=preprocessing or {"preset": "raw"}, **options) as writer:
        for sample in samples:
            writer.add(sample)
    return path


@pytest.fixture
def three(tmp_path):
    (tmp_path / "parts").mkdir()
    splits = ("train", "val", "test")
    return [
        write(
            tmp_path / "parts" / f"{i}.h5",
            [image(f"{i}/{j}", 10 * i + j, split=splits[i], group=f"g{i}") for j in range(4)],
        )
        for i in range(3)
    ]


def all_of(paths):
    for path in paths:
        assert verify(path) == []
        with Shard(path) as shard:
            for i in range(len(shard)):
                info = shard.info(i)
                rest = (info.original.to_original.tolist(), info.original.shape)
                yield info._replace(original=None), rest, shard.read(i).pixels.tobytes()


def test_merge_keeps_everything(tmp_path, three):
    calls = []
    report = merge_shards(three, tmp_path / "all.h5", progress=lambda *call: calls.append(call))
    assert report.paths == [tmp_path / "all.h5"]
    assert list(all_of(report.paths)) == list(all_of(three))
    assert (report.samples, report.size_bytes) == (12, report.paths[0].stat().st_size)
    assert report.splits == {"train": (4, 1), "val": (4, 1), "test": (4, 1)}
    assert (report.duplicates, report.crossing) == (0, 0)
    for stage in ("scanning", "writing", "checking"):
        assert [call for call in calls if call[0] == stage][-1] == (stage, 12, 12)
    # One shard written at once has the same bytes.
    with ShardWriter(tmp_path / "whole.h5", preprocessing={"preset": "raw"}) as writer:
        for path in three:
            with Shard(path) as shard:
                for i in range(len(shard)):
                    writer.add(shard.read(i))
    with Shard(tmp_path / "whole.h5") as whole, Shard(tmp_path / "all.h5") as merged:
        assert whole.content_hash == merged.content_hash
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.h5", "parts", "whole.h5"]


def test_cutting_to_size_and_back(tmp_path, three):
    whole = merge_shards(three, tmp_path / "whole.h5").paths[0]
    report = merge_shards(whole, tmp_path / "s.h5", shard_size=20_000)
    assert len(report.paths) > 2
    assert all(path.stat().st_size <= 20_000 for path in report.paths)
    assert list(all_of(report.paths)) == list(all_of(three))
    again = merge_shards(report.paths, tmp_path / "again.h5").paths[0]
    assert again.read_bytes() == whole.read_bytes()


def test_chunks_are_not_decoded(tmp_path, monkeypatch):
    first = write(tmp_path / "a.h5", [image("a", shape=(1, 40, 40, 40))], compression="gzip")
    second = write(tmp_path / "b.h5", [image("b", 1, shape=(1, 40, 40, 40))], compression="none")
    merge_shards([first, second], tmp_path / "c.h5")
    with Shard(tmp_path / "c.h5") as shard:
        assert [shard.dataset(i).compression for i in range(2)] == ["gzip", None]


def test_duplicates_are_told(tmp_path):
    first = write(tmp_path / "a.h5", [image("a0", 0), image("a1", 1), image("a2", 0)])
    second = write(tmp_path / "b.h5", [image("b0", 1, split="val"), image("b1", 2)])
    report = merge_shards([first, second], tmp_path / "c.h5")
    assert report.duplicates == 2
    assert report.duplicate_pairs == [("a0", "a2"), ("a1", "b0")]
    assert report.crossing == 1


def test_refusals(tmp_path, three):
    volume = write(tmp_path / "volume.h5", [image("v", shape=(1, 4, 5, 6))])
    two = write(tmp_path / "two.h5", [image("v", shape=(2, 40, 50))])
    other = write(tmp_path / "other.h5", [image("o")], {"preset": "raw", "size": 3})
    leak = write(tmp_path / "leak.h5", [image("x", 99, split="test", group="g0")])
    (tmp_path / "text.h5").write_text("hello")
    target = tmp_path / "out.h5"
    for shards, words in (
        ([three[0], volume], r"volume.h5 must have ndim = 2 like .*0.h5, got 3"),
        ([three[0], two], r"two.h5 must have channels = 1 like .*0.h5, got 2"),
        ([three[0], other], r"other.h5 must have preprocessing = {'preset': 'raw'} like .*0.h5, got .*'size': 3"),
        ([three[1], three[0], leak], r"group g0 must be in one split, got it in train of .*0.h5 and in test of .*leak"),
        ([three[0], three[0]], "0.h5 must be given once"),
        ([three[0], tmp_path / "text.h5"], "not HDF5"),
        ([three[0], target], "out.h5 must be another file than the shards to merge"),
        ([], "at least 1 file"),
    ):
        with pytest.raises(InputError, match=words):
            merge_shards(shards, target)
    with pytest.raises(InputError, match=r"out must be a file name, got '.*new/'"):
        merge_shards(three, f"{tmp_path}/new/")
    assert not target.exists()
    assert not list(tmp_path.glob("*.partial"))
    target.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        merge_shards(three, target)
    assert target.read_text() == "mine"
    merge_shards(three, target, overwrite=True)
    assert verify(target) == []


def test_people_of_one_name_in_different_data_sets(tmp_path):
    long, long_name = "x" * 3000, "leeds" * 40
    first = write(
        tmp_path / f"{long_name}.h5",
        [image(str(i), i, group="sub-01", shape=(1, 4, 5)) for i in range(30)] + [image("n", 99)],
    )
    second = write(tmp_path / "york.h5", [image("y", 50, group="sub-01", split="val"), image("z", 51, group=long)])
    with pytest.raises(
        InputError, match=r"sub-01 must be in one split, .*; distinct_groups=True \(--distinct-groups\)"
    ):
        merge_shards([first, second], tmp_path / "m.h5")
    report = merge_shards([first, second], tmp_path / "m.h5", distinct_groups=True)
    assert verify(tmp_path / "m.h5") == []
    assert report.splits == {"train": (32, 3), "val": (1, 1)}
    with Shard(tmp_path / "m.h5") as shard:
        groups = [shard.info(i).group for i in range(len(shard))]
    assert groups == [f"{long_name}/sub-01"] * 30 + ["", "york/sub-01", f"york/{long}"]
    again = merge_shards([first, second], tmp_path / "again.h5", distinct_groups=True).paths[0]
    assert again.read_bytes() == (tmp_path / "m.h5").read_bytes()
    # The same from pixels: what the hash of the content says is what was written.
    with Shard(tmp_path / "m.h5") as shard:
        samples = [shard.read(i) for i in range(len(shard))]
        decoded = write(tmp_path / "decoded.h5", samples, shard.preprocessing)
        with Shard(decoded) as other:
            assert other.content_hash == shard.content_hash
    small = merge_shards([first, second], tmp_path / "s.h5", distinct_groups=True, shard_size=9000).paths
    assert len(small) > 3
    assert max(path.stat().st_size for path in small[:-2]) <= 9000

    (tmp_path / "x").mkdir()
    twin = write(tmp_path / "x" / "york.h5", [image("t", 60)])
    with pytest.raises(InputError, match=r"distinct_groups .* must have shards of different names, got york twice"):
        merge_shards([second, twin], tmp_path / "t.h5", distinct_groups=True)
    leak = write(tmp_path / "leak.h5", [image("t", 60, group="a"), image("u", 61, group="a", split="val")])
    with pytest.raises(InputError, match=r"in val of .*leak.h5$"):
        merge_shards([first, leak], tmp_path / "t.h5", distinct_groups=True)
    with ShardWriter(tmp_path / "w.h5", preprocessing={}) as writer, Shard(first) as shard:
        for wrong, words in (
            ("g" * 32769, "group must be at most 32768 bytes"),
            ("g\0", "group must be .* without NUL"),
        ):
            with pytest.raises(InputError, match=words):
                writer.copy(shard, 0, group=wrong)
        writer.copy(shard, 0, group="")
    with Shard(tmp_path / "w.h5") as shard:
        assert shard.info(0).group == ""
    assert verify(tmp_path / "w.h5") == []


def test_longer_groups_count_in_the_size_of_shards(tmp_path):
    fields = {"group": "sub-01", "shape": (1, 4, 5, 6), "original": Original((4, 5, 6), np.eye(4), np.eye(4), "LPS")}
    shard = write(tmp_path / f"{'leeds' * 48}.h5", [image(str(i), i, **fields) for i in range(300)])
    report = merge_shards(shard, tmp_path / "s.h5", distinct_groups=True, shard_size=300_000)
    assert report.paths[0].stat().st_size <= 300_000


def test_groups_without_a_name_are_their_own(tmp_path):
    paths = [write(tmp_path / f"{s}.h5", [image(s, n, split=s)]) for n, s in enumerate(("train", "val"))]
    assert merge_shards(paths, tmp_path / "c.h5").splits == {"train": (1, 1), "val": (1, 1)}


def test_a_damaged_shard_is_not_merged(tmp_path, three):
    content = bytearray(three[1].read_bytes())
    with Shard(three[1]) as shard:
        place = content.index(shard.read(2).pixels.tobytes()) + 7
    content[place] ^= 4
    three[1].write_bytes(content)
    with pytest.raises(InputError, match=r"does not read back as it was written: .*1/2"):
        merge_shards(three, tmp_path / "out.h5")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts"]


def labels_of(values, shape=(40, 50), dtype=np.uint16):
    return np.resize(np.array(values, dtype), shape)


def test_labels_and_classes_are_joined(tmp_path):
    first = write(
        tmp_path / "a.h5",
        [image(f"a{i}", i, labels=labels_of((0, 2, 300)), target=("ill", "")[i % 2]) for i in range(8)],
        label_classes={2: "lung", 300: "rib"},
    )
    second = write(
        tmp_path / "b.h5",
        [image(f"b{i}", 20 + i, labels=labels_of((0, 2, 5), dtype=np.uint8), target="fit") for i in range(8)],
        label_classes={2: "lung", 5: "skin"},
    )
    report = merge_shards([first, second], tmp_path / "m.h5")
    merged, table = report.paths[0], ((0, "background"), (2, "lung"), (5, "skin"), (300, "rib"))
    assert verify(merged) == []
    with Shard(merged) as shard:
        assert (shard.label_classes, shard.target_classes) == (table, ("fit", "ill"))
        assert shard.targets.tolist() == [1, -1] * 4 + [0] * 8
        for index, values in ((3, labels_of((0, 2, 300))), (12, labels_of((0, 2, 5), dtype=np.uint8))):
            assert shard.read(index).labels.dtype == values.dtype
            np.testing.assert_array_equal(shard.read(index).labels, values)
            np.testing.assert_array_equal(np.array([0, 2, 5, 300])[shard.labels(index)[0]], values)
        with Shard(first) as one:
            assert shard.info(5).labels_sha256 == one.info(5).labels_sha256
    # Every part says all classes, and is no larger than asked for.
    parts = merge_shards(merged, tmp_path / "s.h5", shard_size=36_000).paths
    assert len(parts) > 1
    for part in parts:
        assert part.stat().st_size <= 36_000
        with Shard(part) as shard:
            assert (shard.label_classes, shard.target_classes) == (table, ("fit", "ill"))
    again = merge_shards(parts, tmp_path / "again.h5").paths[0]
    assert again.read_bytes() == merged.read_bytes()


def test_the_classes_count_in_the_size_of_shards(tmp_path):
    names = {i: f"{i} {'n' * 90}" for i in range(1, 256)}
    noise = np.random.default_rng(0).integers(0, 256, (20, 100, 100)).astype(np.uint8)
    samples = [image(str(i), i, (1, 100, 100), labels=labels, target="t" * 20_000) for i, labels in enumerate(noise)]
    shard = write(tmp_path / "a.h5", samples, label_classes=names)
    paths = merge_shards(shard, tmp_path / "s.h5", shard_size=120_000).paths
    assert len(paths) > 1
    assert all(path.stat().st_size <= 120_000 for path in paths)


def test_shards_whose_labels_do_not_go_together(tmp_path):
    first = write(tmp_path / "a.h5", [image("a", 1, labels=labels_of((0, 2)))], label_classes={2: "lung"})
    other = write(tmp_path / "b.h5", [image("b", 2, labels=labels_of((0, 2)))], label_classes={2: "rib"})
    bare = write(tmp_path / "c.h5", [image("c", 3, target="x")])
    for shards, words in (
        ([first, other], r"b.h5: label value 2 must be 'lung' as in .*a.h5, got 'rib'"),
        ([first, bare], r"c.h5 must have a label map like .*a.h5, got none"),
        ([bare, first], r"a.h5 must have no label map like .*c.h5, got one"),
    ):
        with pytest.raises(InputError, match=words):
            merge_shards(shards, tmp_path / "m.h5")
    assert not list(tmp_path.glob("m.h5*"))
    plain = write(tmp_path / "d.h5", [image("d", 4)])
    report = merge_shards([plain, bare], tmp_path / "m.h5")
    with Shard(report.paths[0]) as shard:
        assert (shard.version, shard.label_classes, shard.targets.tolist()) == (3, (), [-1, 0])


KILLED = """
    import os, signal, sys
    from coverfast.ingest import merge_shards
    import coverfast.ingest.partial, coverfast.ingest.merge
    left = int(sys.argv[1])

    def count(event, arguments):
        global left
        if event == "os.rename" and "/shard-" in str(arguments[0]) and "/s-" in str(arguments[1]):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    merge_shards(sys.argv[3:], sys.argv[2], shard_size=20_000)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_kill_between_the_renames_is_finished_by_the_next_run(tmp_path, three):
    (tmp_path / "whole").mkdir()
    expected = {
        p.name: p.read_bytes() for p in merge_shards(three, tmp_path / "whole" / "s.h5", shard_size=20_000).paths
    }
    for step in range(1, len(expected)):
        folder = tmp_path / str(step)
        folder.mkdir()
        script = [sys.executable, "-c", textwrap.dedent(KILLED), str(step), str(folder / "s.h5"), *map(str, three)]
        assert subprocess.run(script, timeout=60, check=False).returncode == -signal.SIGKILL
        assert len(list(folder.glob("*.h5"))) == step
        with pytest.raises(InputError, match="holds an unfinished build with merge = "):
            merge_shards(three[:2], folder / "s.h5", shard_size=20_000)
        report = merge_shards([os.fspath(p) for p in three], folder / "s.h5", shard_size=20_000)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == expected
        assert report.splits == {"train": (4, 1), "val": (4, 1), "test": (4, 1)}
