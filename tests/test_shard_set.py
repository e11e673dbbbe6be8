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
    dtype, values, targets = options.pop("dtype", "uint8"), options.pop("values", ()), options.pop("targets", ("",))
    rng = np.random.default_rng(seed)
    with ShardWriter(path, preprocessing=options.pop("preprocessing", {"preset": "raw"}), **options) as writer:
        for i in range(count):
            pixels = rng.integers(0, 255, (1, *size)).astype(dtype)
            split = ("train", "train", "val", "test")[i % 4]
            said = {"source": f"{path.stem}/{i}", "split": split, "group": f"{path.stem}-{i}"}
            if values:
                said["labels"] = rng.choice(np.array(values, np.uint16), size)
            said["target"] = targets[i % len(targets)]
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


def test_labels_and_targets_of_several_shards(tmp_path):
    said = {"values": (0, 2, 9), "targets": ("b", "a", "")}
    paths = [make(tmp_path / f"{name}.h5", seed=i, count=5, **said) for i, name in enumerate("ab")]
    data = ShardSet(paths)
    data.need_labels()
    assert data.label_classes == ((0, "background"), (2, "2"), (9, "9"))
    assert data.target_classes == ("a", "b")
    assert [data.source(i) for i in range(6)] == ["a/0", "a/1", "a/4", "b/0", "b/1", "b/4"]
    assert data.targets.tolist() == data.targets_if_alike().tolist() == [1, 0, 0, 1, 0, 0]
    part = [slice(3, 9), slice(0, 24)]
    for index in range(6):
        whole = data.read(index)
        assert data.target_classes[data.targets[index]] == whole.target
        for found, where in zip(data.labels(index, [None, part]), ([slice(None)] * 2, part), strict=True):
            np.testing.assert_array_equal(np.array([0, 2, 9])[found], whole.labels[*where])
    assert pickle.loads(pickle.dumps(data)).targets.tolist() == data.targets.tolist()


def test_a_subset(tmp_path):
    paths = [make(tmp_path / f"{n}.h5", seed=i, values=(0, 1), targets=("x", "y", "")) for i, n in enumerate("abc")]
    data = ShardSet(paths, "all", open_files=1)
    chosen = [9, 0, 5, 5]
    part = data.subset(chosen)
    assert len(part) == 4
    assert [part.source(i) for i in range(4)] == ["c/1", "a/0", "b/1", "b/1"]
    assert part.targets.tolist() == data.targets[chosen].tolist()
    assert part.sizes.tolist() == data.sizes[chosen].tolist()
    assert (part.content_hash, part.split_counts) == (data.content_hash, data.split_counts)
    for i, index in enumerate(chosen):
        np.testing.assert_array_equal(part.pixels(i)[0], data.pixels(index)[0])
        np.testing.assert_array_equal(part.labels(i)[0], data.labels(index)[0])
    assert part.subset(np.array([3, 1])).source(1) == "a/0"
    data.close()
    assert len(part._open) == 1
    for wrong in ([], [12], [-1], [[0]], [0.5], [True, False]):
        with pytest.raises(InputError, match="indices must be at least 1 integer from 0 to 11, got"):
            data.subset(wrong)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"values": (0, 3)}, r"b.h5 must have the label classes of .*a.h5 \(0 background, 2 2\), got .*, 3 3"),
        ({"values": ()}, r"b.h5 must have the label classes of .*a.h5 \(0 background, 2 2\), got none"),
    ],
)
def test_shards_of_other_labels_are_for_images_only(tmp_path, other, words):
    first = make(tmp_path / "a.h5", values=(0, 2))
    second = make(tmp_path / "b.h5", seed=1, **other)
    data = ShardSet([first, second])
    assert len(data) == 4
    data.pixels(3)
    for ask in (lambda: data.label_classes, lambda: data.labels(0), data.need_labels):
        with pytest.raises(InputError, match=words):
            ask()
    assert data.targets.tolist() == [-1] * 4
    bare = ShardSet(make(tmp_path / "c.h5", seed=2))
    assert bare.label_classes == ()
    with pytest.raises(InputError, match=r"c.h5 must have label maps, found none"):
        bare.need_labels()


def test_shards_of_other_targets_are_for_images_only(tmp_path):
    data = ShardSet([make(tmp_path / f"{t}.h5", seed=i, targets=(t,)) for i, t in enumerate(("x", "y"))])
    for ask in (lambda: data.target_classes, lambda: data.targets):
        with pytest.raises(InputError, match=r"y.h5 must have the target classes of .*x.h5 \(x\), got y"):
            ask()
    assert data.targets_if_alike().tolist() == [-1] * 4
