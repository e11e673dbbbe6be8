"""Many shards as one sequence: which files, which split, how many handles, and what is refused."""

from __future__ import annotations

import contextlib
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from coverfast import InputError, ShardSet
from coverfast.shard_set import find_shards
from coverfast.shards import Sample, ShardWriter


def make(path: Path, *, count: int = 4, seed: int = 0, size: tuple[int, ...] = (20, 24), **options) -> Path:
    """A shard whose samples alternate between train, train, val, test."""
    dtype = options.pop("dtype", "uint8")
    rng = np.random.default_rng(seed)
    with ShardWriter(path, preprocessing=options.pop("preprocessing", {"preset": "raw"}), **options) as writer:
        for i in range(count):
            pixels = rng.integers(0, 255, (1, *size)).astype(dtype)
            split = ("train", "train", "val", "test")[i % 4]
            said = {"source": f"{path.stem}/{i}", "split": split, "group": f"{path.stem}-{i}"}
            writer.add(Sample(pixels, 1.0, 0.0, 0.0, 255.0, (1.0,) * len(size), **said))
    return path


@pytest.fixture
def three(tmp_path):
    folder = tmp_path / "set"
    return [make(folder / f"{name}.h5", seed=i, count=4 + i) for i, name in enumerate("abc")]


def test_splits_of_several_shards(three):
    train = ShardSet(three)
    assert [len(ShardSet(three, split)) for split in ("train", "val", "test", "all")] == [9, 3, 3, 15]
    assert train.split_counts == {"train": 9, "val": 3, "test": 3}
    assert [train.source(i) for i in range(4)] == ["a/0", "a/1", "b/0", "b/1"]
    assert train.place(3) == (three[1], 1)
    np.testing.assert_array_equal(train.pixels(3)[0], train.read(3).pixels)


def test_files_folders_and_globs(three, tmp_path, monkeypatch):
    folder = three[0].parent
    make(folder / "deep" / "d.h5", seed=9)
    make(folder / "e.h5.partial" / "piece.h5", seed=10)
    (folder / ".f.h5.0123.part").touch()
    deep = folder / "deep" / "d.h5"
    assert find_shards(folder) == [*three, deep]
    assert find_shards([folder / "b.h5", folder]) == [three[1], three[0], three[2], deep]
    assert find_shards(str(folder / "[ab].h5")) == three[:2]
    monkeypatch.chdir(folder)
    assert find_shards("*.h5") == three
    (folder / "x[1].h5").symlink_to(deep)
    assert find_shards("x[1].h5") == [folder / "x[1].h5"]
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, words in (
        (empty, "must hold shards"),
        (empty / "*.h5", "must match shards"),
        (empty / "no.h5", "found no such file"),
    ):
        with pytest.raises(InputError, match=words):
            find_shards(path)
    with pytest.raises(InputError, match="at least 1 file"):
        find_shards([])


def test_few_files_are_open_at_a_time(three):
    data = ShardSet(three, "all", open_files=2)

    def opened() -> set[str]:
        found = set()
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(link.readlink().name)
        return {name for name in found if name.endswith(".h5")}

    order = np.random.default_rng(0).permutation(np.arange(len(data)).repeat(3))
    sums = {}
    for index in order.tolist():
        sums.setdefault(index, set()).add(int(data.pixels(index)[0].sum()))
        assert len(opened()) <= 2
    assert all(len(s) == 1 for s in sums.values())
    data.close()
    assert not opened()
    assert data.pixels(0)[0].shape == (1, 20, 24)


def test_pickles_without_handles(three):
    data = ShardSet(three)
    copy = pickle.loads(pickle.dumps(data))
    assert copy._open == {}
    np.testing.assert_array_equal(copy.pixels(5)[0], data.pixels(5)[0])
    assert copy.content_hash == data.content_hash != ShardSet(three[:2]).content_hash


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"size": (8, 8, 8)}, "must be 2D like .*a.h5, got 3D"),
        ({"preprocessing": {"preset": "raw", "size": 20}}, "must be preprocessed like .*a.h5"),
        ({"seed": 0, "name": "a"}, "must hold other samples than .*a.h5"),
    ],
)
def test_shards_that_do_not_go_together(three, tmp_path, other, words):
    odd = make(tmp_path / "odd" / f"{other.pop('name', 'odd')}.h5", **{"seed": 5} | other)
    with pytest.raises(InputError, match=words):
        ShardSet([three[0], odd])


def test_an_empty_split_and_a_wrong_one(tmp_path):
    path = make(tmp_path / "s.h5", count=2)
    with pytest.raises(InputError, match=re.escape(f"{path} must hold samples of the split 'val', found none")):
        ShardSet(path, "val")
    with pytest.raises(InputError, match="split"):
        ShardSet(path, "valid")


def test_a_file_that_vanishes_or_changes(three):
    data = ShardSet(three, "all", open_files=1)
    data.pixels(0)
    three[2].unlink()
    with pytest.raises(InputError, match=r"c.h5: sample 0: .*found no such file"):
        data.pixels(9)
    data.pixels(0)
    make(three[2], seed=77, count=6)
    with pytest.raises(InputError, match="must not change while it is in use"):
        data.pixels(9)
