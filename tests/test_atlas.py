"""Subjects from the MNI152 template: brains with their tissues, from a seed, without the network."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from coverfast.checks import InputError

pytest.importorskip("nilearn")

from coverfast.ingest import atlas
from coverfast.ingest.atlas import CLASSES, FIELD, atlas_subject, build_atlas_subjects
from coverfast.shards import Shard, verify

CSF, GREY, WHITE = 1, 2, 3


@pytest.fixture(scope="module")
def subjects():
    return [atlas_subject(96, seed=7, index=index) for index in range(12)]


def test_the_template_comes_out_of_the_package(monkeypatch):
    def refused(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    atlas._template.cache_clear()
    t1, grey, white, brain = atlas._template()
    assert t1.shape == grey.shape == white.shape == brain.shape
    assert all(part.min() >= 0 and part.max() <= 1 for part in (t1, grey, white, brain))
    # Along its first axis the brain ends above the last plane; along its second, the cerebellum lies in the back.
    assert not brain[-1].any()
    cerebellum = np.nonzero(brain[72 - 60].any(axis=1))[0]
    commissure = brain.shape[1] - 1 - 134
    assert cerebellum.mean() > commissure + 40


def test_brains_with_tissues_where_they_belong(subjects):
    shares = []
    for image, labels in subjects:
        assert image.shape == labels.shape == (96, 96)
        assert image.dtype == np.float32
        assert labels.dtype == np.uint8
        assert image.min() >= 0
        assert image.max() <= 1
        means = [float(image[labels == k].mean()) for k in range(len(CLASSES))]
        assert means == sorted(means)  # T1: air, csf, grey, white
        parts, count = ndimage.label(labels > 0)
        sizes = ndimage.sum_labels(np.ones_like(parts), parts, range(1, count + 1))
        assert sizes.max() > 0.98 * sizes.sum()  # one brain
        border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
        assert not border.any()  # the whole of it
        # White matter lies inside, grey matter around it.
        depth = ndimage.distance_transform_edt(labels > 0)
        assert depth[labels == WHITE].mean() > depth[labels == GREY].mean()
        shares.append(np.bincount(labels.ravel(), minlength=4) / np.count_nonzero(labels))
    shares = np.array(shares)
    assert (shares[:, GREY] > 0.3).all()
    assert (shares[:, WHITE] > 0.25).all()
    assert (shares[:, CSF] > 0.005).all()
    assert (shares[:, CSF] < 0.2).all()


def test_grey_and_white_are_told_apart_in_every_subject(subjects):
    for image, labels in subjects:
        grey, white = image[labels == GREY], image[labels == WHITE]
        above = np.mean(white[:, None] > np.random.default_rng(0).choice(grey, 400)[None])
        assert above > 0.75


def test_subjects_differ_in_form_and_contrast(subjects):
    for k in range(1, len(subjects)):
        first, other = subjects[0], subjects[k]
        both = np.logical_and(first.labels == WHITE, other.labels == WHITE).sum()
        either = np.logical_or(first.labels == WHITE, other.labels == WHITE).sum()
        assert both < 0.85 * either
    ratios = [image[labels == GREY].mean() / image[labels == WHITE].mean() for image, labels in subjects]
    assert max(ratios) - min(ratios) > 0.1


def test_same_arguments_same_bytes_at_any_size_the_same_anatomy():
    def digest(**arguments):
        subject = atlas_subject(48, **arguments)
        return hashlib.sha256(subject.image.tobytes() + subject.labels.tobytes()).hexdigest()

    first = digest(seed=3, index=5)
    assert digest(seed=3, index=5) == first
    assert len({first, *(digest(seed=s, index=i) for s, i in ((5, 3), (3, 6), (4, 5), (2**64 - 1, 5)))}) == 5
    small, large = (atlas_subject(size, seed=3, index=5).labels for size in (64, 128))
    quarters = large.reshape(64, 2, 64, 2) > 0
    inside, outside = quarters.all(axis=(1, 3)), ~quarters.any(axis=(1, 3))
    assert (small[inside] > 0).all()
    assert (small[outside] == 0).all()
    wide = atlas_subject((64, 96), seed=3, index=5).labels
    np.testing.assert_array_equal(wide[:, 16:80], small)


def test_the_shard(tmp_path):
    path = tmp_path / "s.h5"
    calls = []
    build_atlas_subjects(
        path, count=5, seed=2, size=48, first=3, val_fraction=0.4, progress=lambda *call: calls.append(call)
    )
    assert verify(path) == []
    assert calls[-1] == ("checking", 5, 5)
    with Shard(path) as shard:
        assert tuple(shard.label_classes) == tuple(enumerate(CLASSES))
        assert shard.target_classes == ()
        assert shard.preprocessing == {"preset": "atlas"}  # shards of other seeds are one set with it
        assert sorted(shard.splits.tolist()) == [0, 0, 0, 1, 1]
        sample = shard.read(2)
        assert sample.spacing == pytest.approx((FIELD / 48,) * 2)
        assert sample.source == "mni152-2-5"
        subject = atlas_subject(48, seed=2, index=5)
        np.testing.assert_array_equal(sample.labels, subject.labels)
        np.testing.assert_allclose(sample.normalised()[0], subject.image, atol=0.5 / 255 + 1e-6)


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"seed must be an int in \[0, 2\^64\), got -1"):
        atlas_subject(48, seed=-1)
    with pytest.raises(InputError, match="size must be an int of at least 16"):
        build_atlas_subjects(tmp_path / "s.h5", count=1, seed=0, size=8)
    with pytest.raises(InputError, match="indices must be at least 1, got none"):
        build_atlas_subjects(tmp_path / "s.h5", count=0, seed=0)
    monkeypatch.setitem(sys.modules, "nilearn", None)
    atlas._template.cache_clear()
    with pytest.raises(InputError, match="need the packages nilearn and scipy, found no nilearn"):
        build_atlas_subjects(tmp_path / "s.h5", count=1, seed=0)
    assert not (tmp_path / "s.h5").exists()


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "coverfast", "shards", "atlas", "--count", "2", "--seed", "4", "--size", "32"]
    done = subprocess.run([*command, "--out", str(tmp_path / "s.h5")], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path / 's.h5'}: 2 samples, ")
    assert done.stderr == ""
    assert verify(tmp_path / "s.h5") == []
