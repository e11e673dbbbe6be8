"""Features by class: which pixels, which features, how far apart, and what is refused."""

from __future__ import annotations

import json
import sys
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from training_runs import make_shard

from coverfast import InputError
from coverfast.backbones import UNet
from coverfast.backbones.files import backbone_bytes
from coverfast.ingest.phantoms import build_phantoms
from coverfast.samples import Sample
from coverfast.shard_set import ShardSet
from coverfast.shards import ShardWriter
from coverfast.study import features as library
from coverfast.study.features import (
    load_networks,
    pixel_features,
    principal,
    sample_pixels,
    separation,
    study_features,
)

CHANNELS = (8, 8, 8, 8, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of five phantoms and a backbone for it, of three levels."""
    folder = tmp_path_factory.mktemp("features")
    build_phantoms(folder / "phantoms.h5", 2, (70, 84), seed=1, indices=range(5))
    torch.manual_seed(3)
    (folder / "backbone.safetensors").write_bytes(backbone_bytes(UNet(2, 1, CHANNELS), config={}, preprocessing={}))
    return folder


@pytest.fixture(scope="module")
def shards(folder: Path) -> ShardSet:
    return ShardSet(folder / "phantoms.h5", "all")


def labels_of(shards: ShardSet, pixels: library.Pixels) -> list[np.ndarray]:
    """The labels at the sampled places, read from whole images."""
    found = []
    for image, (region, places) in pixels.places.items():
        found.append(shards.labels(image)[0][tuple(region)].reshape(-1)[places])
    return found


# --- pixels -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32))
def test_pixels_are_as_many_of_every_class_and_no_pixel_twice(shards: ShardSet, seed: int) -> None:
    pixels = sample_pixels(shards, 180, seed, 4)
    assert np.array_equal(np.concatenate(labels_of(shards, pixels)), pixels.classes)
    assert np.bincount(pixels.classes).tolist() == [20] * 9
    for region, places in pixels.places.values():
        assert [(r.start, r.stop) for r in region] == [(1, 69), (0, 84)]
        assert len(np.unique(places)) == len(places)


def test_pixels_are_those_of_the_seed(shards: ShardSet) -> None:
    one, same, other = (sample_pixels(shards, 90, seed, 4) for seed in (1, 1, 2))
    assert all(np.array_equal(one.places[i][1], same.places[i][1]) for i in one.places)
    assert not all(np.array_equal(one.places[i][1], other.places[i][1]) for i in one.places)


def test_class_with_few_pixels_gives_them_all(shards: ShardSet) -> None:
    region = np.s_[1:69, 0:84]
    there = np.bincount(np.concatenate([shards.labels(i)[0][region].ravel() for i in range(5)]))
    wanted = 9 * (int(there.min()) + 10)
    found = np.bincount(sample_pixels(shards, wanted, 0, 4).classes)
    assert found.tolist() == np.minimum(there, wanted // 9).tolist()


def test_images_count_by_their_pixels_of_the_class(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s.h5", ndim=2, preprocessing={}, label_classes={0: "background", 7: "dot"}) as writer:
        for number, share in enumerate((0.75, 0.25)):
            labels = np.zeros((64, 64), np.uint8)
            labels[: int(64 * share)] = 7
            pixels = np.zeros((1, 64, 64), np.uint8)
            writer.add(Sample(pixels, 1.0, 0.0, 0.0, 255.0, (1.0, 1.0), str(number), labels=labels))
    shards = ShardSet(tmp_path / "s.h5", "all")
    found = labels_of(shards, sample_pixels(shards, 2000, 0, 16))
    assert [int((part == 1).sum()) for part in found] == pytest.approx([750, 250], abs=40)


# --- features -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1, 2, -1])
def test_features_are_those_at_the_pixels(folder: Path, shards: ShardSet, level: int) -> None:
    network = load_networks([folder / "backbone.safetensors"], shards, 0)[str(folder / "backbone.safetensors")]
    pixels = sample_pixels(shards, 90, 0, 4)
    found = pixel_features(network, shards, pixels, level, torch.device("cpu"))
    row = 0
    for image, (region, places) in pixels.places.items():
        whole = torch.from_numpy(shards.read(image).normalised()[(slice(None), *region)].copy())[None]
        with torch.no_grad():
            features = network(whole)[level][0].numpy()
        stride = network.strides[level]
        for place in places:
            y, x = divmod(int(place), 84)
            assert found[row] == pytest.approx(features[:, y // stride, x // stride], abs=1e-5)
            row += 1
    assert row == len(found)


def test_random_weights_stand_beside_every_architecture(folder: Path, shards: ShardSet) -> None:
    wide = folder / "wide.safetensors"
    wide.write_bytes(backbone_bytes(UNet(2, 1, (16, 8, 8, 8, 16)), config={}, preprocessing={}))
    one = load_networks([folder / "backbone.safetensors"], shards, 5)
    assert list(one)[1:] == ["random weights"]
    two = load_networks([folder / "backbone.safetensors", wide], shards, 5)
    assert list(two)[2:] == ["random weights, 8-8-8-8-8", "random weights, 16-8-8-8-16"]
    a, b = one["random weights"].state_dict(), two["random weights, 8-8-8-8-8"].state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)


# --- figures ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000))
def test_separation_is_what_it_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = np.repeat([0, 2, 5], [4, 6, 5])
    features = rng.normal(size=(3, 4))[np.searchsorted([0, 2, 5], classes)] + rng.normal(size=(15, 4))
    found = separation(features, classes)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    within = {
        k: np.mean([unit[i] @ unit[j] for i, j in combinations(np.flatnonzero(classes == k), 2)]) for k in (0, 2, 5)
    }
    across = [
        np.mean([unit[i] @ unit[j] for i, j in product(*(np.flatnonzero(classes == k) for k in pair))])
        for pair in combinations((0, 2, 5), 2)
    ]
    means = np.stack([features[classes == k].mean(0) for k in (0, 2, 5)])
    spread = np.mean(
        [np.square(features[classes == k] - m).sum(1).mean() for k, m in zip((0, 2, 5), means, strict=True)]
    )
    assert found["by_class"] == pytest.approx(within)
    assert found["cos_within"] == pytest.approx(np.mean(list(within.values())))
    assert found["cos_between"] == pytest.approx(np.mean(across))
    assert found["separation"] == pytest.approx(np.square(means - means.mean(0)).sum(1).mean() / spread)
    assert found["silhouette"] == pytest.approx(silhouette_score(features, classes))
    alone = separation(np.vstack([features, 100 * np.ones(4)]), np.append(classes, 9))
    assert alone["separation"] == pytest.approx(found["separation"])  # one pixel is no class


def test_separation_tells_clusters_from_noise() -> None:
    rng, classes = np.random.default_rng(0), np.repeat(np.arange(4), 50)
    noise = rng.normal(size=(200, 8))
    apart, mixed = separation(noise + 20 * np.eye(8)[classes], classes), separation(noise, classes)
    assert apart["cos_within"] - apart["cos_between"] > 0.9 > 0.1 > abs(mixed["cos_within"] - mixed["cos_between"])
    assert apart["separation"] > 10 > 0.2 > mixed["separation"]
    assert apart["silhouette"] > 0.7 > 0.1 > mixed["silhouette"]


def test_components_are_those_of_pca() -> None:
    features = np.random.default_rng(1).normal(size=(60, 5)) * [5, 3, 1, 1, 1] + 7
    points, share = principal(features)
    expected = PCA(2).fit(features)
    assert share == pytest.approx(expected.explained_variance_ratio_.sum())
    assert np.abs(points) == pytest.approx(np.abs(expected.transform(features)))
    assert np.array_equal(principal(features)[0], points)


# --- the study ----------------------------------------------------------------------------------------------------


def test_study_is_the_same_for_a_seed_and_draws(folder: Path, tmp_path: Path) -> None:
    def run(name: str, seed: int = 0) -> dict[str, object]:
        place = [folder / "backbone.safetensors"], [folder / "phantoms.h5"], tmp_path / name
        return study_features(*place, split="all", samples=60, seed=seed, device="cpu")

    first, again, other = run("a"), run("b"), run("c", seed=1)
    assert first == again != other
    assert json.loads((tmp_path / "a" / "features.json").read_text()) == first
    assert (tmp_path / "a" / "features.png").read_bytes() == (tmp_path / "b" / "features.png").read_bytes()
    assert (tmp_path / "a" / "features.md").read_text().count("\n| ") == 3
    with pytest.raises(InputError, match="out must be a new folder"):
        run("a")


def test_bad_input_is_refused(folder: Path, shards: ShardSet, tmp_path: Path) -> None:
    backbone, data = folder / "backbone.safetensors", [folder / "phantoms.h5"]
    (tmp_path / "3d.safetensors").write_bytes(backbone_bytes(UNet(3, 1, CHANNELS), config={}, preprocessing={}))
    plain = make_shard(tmp_path / "plain.h5")
    build_phantoms(tmp_path / "small.h5", 2, 16, seed=0, indices=range(1))
    torch.manual_seed(0)
    deep = tmp_path / "deep.safetensors"
    deep.write_bytes(backbone_bytes(UNet(2, 1, (8,) * 13), config={}, preprocessing={}))
    for arguments, level, words in (
        (([backbone], data), 3, "level must be 0 to 2, or -1 for the finest, for .*, got 3"),
        (([backbone, backbone], data), -1, "networks must be different ones"),
        (([tmp_path / "3d.safetensors"], data), -1, "must be a network for 2D images of 1 channel"),
        (([tmp_path], data), -1, "must be a backbone.safetensors file, but there is no such file"),
        (([backbone], [plain]), -1, "must have label maps, but it has none"),
        (([deep], [tmp_path / "small.h5"]), -1, "must have at least 64 pixels an axis for this network, got 16x16"),
    ):
        with pytest.raises(InputError, match=words):
            study_features(*arguments, tmp_path / "out", split="all", level=level)
        assert not (tmp_path / "out").exists()


def test_one_class_alone_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s.h5", ndim=2, preprocessing={}, label_classes={0: "background", 7: "dot"}) as writer:
        pixels, labels = np.zeros((1, 64, 64), np.uint8), np.zeros((64, 64), np.uint8)
        writer.add(Sample(pixels, 1.0, 0.0, 0.0, 255.0, (1.0, 1.0), "empty", labels=labels))
    with pytest.raises(InputError, match="must have pixels of 2 classes or more, found background"):
        sample_pixels(ShardSet(tmp_path / "s.h5", "all"), 10, 0, 16)


def test_missing_package_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(InputError, match=r"t-SNE needs the extra: pip install coverfast\[study\]"):
        study_features([folder / "backbone.safetensors"], [folder / "phantoms.h5"], tmp_path / "out")
