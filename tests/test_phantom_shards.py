"""Shards of phantoms: label maps and classes as the anatomy says, the same for the same arguments."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from coverfast.checks import InputError
from coverfast.ingest import build_phantoms
from coverfast.ingest.phantoms import LARGE_VENTRICLES, TARGETS, phantom_target
from coverfast.phantom import CLASSES_2D, CLASSES_3D, phantom
from coverfast.shard_set import ShardSet
from coverfast.shards import Shard, verify


@pytest.mark.parametrize(("ndim", "size"), [(2, 64), (2, (48, 80)), (3, (32, 48, 40))])
def test_images_label_maps_and_classes(tmp_path, ndim, size):
    build_phantoms(tmp_path / "s.h5", ndim, size, seed=3, indices=[4, 7])
    assert verify(tmp_path / "s.h5") == []
    with Shard(tmp_path / "s.h5") as shard:
        names = CLASSES_2D if ndim == 2 else CLASSES_3D
        assert tuple(shard.label_classes) == tuple(enumerate(names))
        assert shard.target_classes == TARGETS[ndim]
        for i, index in enumerate((4, 7)):
            subject = phantom(ndim, size, seed=3, index=index)
            sample = shard.read(i)
            assert sample.source == f"phantom-3-{index}"
            np.testing.assert_allclose(sample.normalised()[0], subject.image, atol=0.5 / 255 + 1e-6)
            np.testing.assert_array_equal(shard.labels(i)[0], subject.labels)
            assert sample.target == phantom_target(subject.labels)
            assert shard.targets[i] == TARGETS[ndim].index(sample.target)


def test_the_side_of_the_lesion_is_the_subject_s():
    # Columns run from the subject's right to the left, so what is left in the picture is right.
    labels = np.zeros((8, 10), np.uint8)
    assert phantom_target(labels) == ""
    labels[2:4, 1:3] = CLASSES_2D.index("lesion")
    assert phantom_target(labels) == "lesion right"
    assert phantom_target(labels[:, ::-1]) == "lesion left"
    # The heart lies on the left, in the right half of the picture.
    found = []
    for index in range(20):
        subject = phantom(2, 64, seed=5, index=index).labels
        heart = np.nonzero(subject == CLASSES_2D.index("heart"))[1].mean()
        assert heart > 31.5
        found.append(phantom_target(subject))
    assert 4 <= found.count("lesion left") <= 16


def test_the_size_of_the_ventricles_parts_phantoms_in_two():
    found = [phantom_target(phantom(3, 64, seed=1, index=index).labels) for index in range(20)]
    assert 5 <= found.count("small ventricles") <= 15
    assert found.count("large ventricles") == 20 - found.count("small ventricles")
    labels = np.full((10, 10, 10), CLASSES_3D.index("cortex"), np.uint8)
    labels[0] = CLASSES_3D.index("skull")  # no part of what it holds
    count = int(np.ceil(LARGE_VENTRICLES * 900))
    labels.reshape(-1)[-count:] = CLASSES_3D.index("ventricle")
    assert phantom_target(labels) == "large ventricles"
    labels.reshape(-1)[-count] = CLASSES_3D.index("cortex")
    assert phantom_target(labels) == "small ventricles"


def test_same_arguments_same_bytes_and_other_numbers_other_subjects(tmp_path):
    contents = []
    for name, first in (("a", 0), ("b", 0), ("c", 6)):
        path = tmp_path / f"{name}.h5"
        calls = []
        build_phantoms(
            path,
            2,
            32,
            seed=1,
            indices=range(first, first + 6),
            val_fraction=0.34,
            test_fraction=0.17,
            progress=lambda *call, calls=calls: calls.append(call),
        )
        contents.append(path.read_bytes())
        assert [done for stage, done, total in calls if stage == "writing"] == list(range(7))
        assert calls[-1] == ("checking", 6, 6)
    assert contents[0] == contents[1] != contents[2]
    sets = {split: ShardSet(tmp_path / "a.h5", split=split) for split in ("train", "val", "test")}
    assert {split: len(s) for split, s in sets.items()} == {"train": 3, "val": 2, "test": 1}


def test_shards_of_two_seeds_are_one_set(tmp_path):
    for seed in (1, 2):
        build_phantoms(tmp_path / f"{seed}.h5", 2, 32, seed=seed, indices=range(2))
    shards = ShardSet(tmp_path, "all")
    assert [shards.source(i) for i in range(4)] == [f"phantom-{seed}-{i}" for seed in (1, 2) for i in range(2)]


def test_refusals(tmp_path):
    out = tmp_path / "s.h5"
    with pytest.raises(InputError, match="ndim must be 2 or 3, got 4"):
        build_phantoms(out, 4, 32, seed=1, indices=[0])
    with pytest.raises(InputError, match="size must be an int of at least 16"):
        build_phantoms(out, 2, 8, seed=1, indices=[0])
    with pytest.raises(InputError, match="indices must be at least 1, got none"):
        build_phantoms(out, 2, 32, seed=1, indices=[])
    with pytest.raises(InputError, match="val_fraction must be a number from 0 to 1"):
        build_phantoms(out, 2, 32, seed=1, indices=[0], val_fraction=2)
    assert not out.exists()


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "coverfast", "shards", "phantom", "--ndim", "3", "--count", "3", "--seed", "2"]
    command += ["--size", "32,32,24", "--first", "5", "--test-fraction", "0.34", "--out", str(tmp_path / "s.h5")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path / 's.h5'}: 3 samples, ")
    with Shard(tmp_path / "s.h5") as shard:
        assert [shard.source(i) for i in range(3)] == ["phantom-2-5", "phantom-2-6", "phantom-2-7"]
        assert shard.sizes.tolist() == [[32, 32, 24]] * 3
        assert sorted(shard.splits.tolist()) == [0, 0, 2]
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr.splitlines() == [
        f"error: {tmp_path / 's.h5'} must be a new file, it exists already (overwrite replaces it)"
    ]
    subprocess.run([*command, "--overwrite"], capture_output=True, check=True)
