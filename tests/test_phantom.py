"""Synthetic anatomy: a pure function of its arguments, every class present, everything inside its container."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coverfast.checks import InputError
from coverfast.phantom import CLASSES_2D, CLASSES_3D, Phantom, phantom

CLASSES = {2: CLASSES_2D, 3: CLASSES_3D}


def digest(p: Phantom) -> str:
    return hashlib.sha256(p.image.tobytes() + p.labels.tobytes()).hexdigest()


def neighbours(labels: np.ndarray, of: int) -> set[int]:
    """Labels that share a face (in 2D a face or a corner) with a pixel labelled `of`."""
    near = labels == of
    for axis in range(labels.ndim):
        grown = near if labels.ndim == 2 else labels == of
        near = near | np.roll(grown, 1, axis) | np.roll(grown, -1, axis)
    return set(np.unique(labels[near]).tolist()) - {of}


@pytest.mark.parametrize(("ndim", "size"), [(2, 64), (2, (48, 80)), (3, 32), (3, (20, 32, 26))])
def test_same_arguments_same_bytes_other_arguments_other_bytes(ndim, size):
    first = digest(phantom(ndim, size, seed=3, index=5))
    assert digest(phantom(ndim, size, seed=3, index=5)) == first
    others = [phantom(ndim, size, seed=s, index=i) for s, i in ((3, 6), (4, 5), (5, 3), (3, 0), (2**64 - 1, 5))]
    assert len({first, *map(digest, others)}) == 6


def test_global_random_state_neither_matters_nor_changes():
    np.random.seed(0)  # noqa: NPY002
    first = digest(phantom(2, 32, seed=1))
    after = np.random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    assert after == np.random.random()  # noqa: NPY002
    assert digest(phantom(2, 32, seed=1)) == first


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_size_from_16_on(data):
    ndim = data.draw(st.sampled_from([2, 3]))
    size = tuple(data.draw(st.lists(st.integers(16, 90 if ndim == 2 else 40), min_size=ndim, max_size=ndim)))
    p = phantom(ndim, size, seed=data.draw(st.integers(0, 2**64 - 1)), index=data.draw(st.integers(0, 10**6)))
    assert p.image.shape == p.labels.shape == size
    assert p.image.dtype == np.float32
    assert p.labels.dtype == np.uint8
    assert np.isfinite(p.image).all()
    assert p.image.min() >= 0
    assert p.image.max() <= 1
    assert p.labels.max() < len(CLASSES[ndim])
    assert (p.labels > 0).any()


@pytest.mark.parametrize(
    ("ndim", "size", "subjects"),
    [(2, 64, 150), (2, (64, 200), 20), (2, (130, 64), 20), (2, 192, 10), (3, 48, 20), (3, (48, 70, 52), 8)],
)
def test_every_class_is_in_every_subject(ndim, size, subjects):
    for i in range(subjects):
        counts = np.bincount(phantom(ndim, size, seed=1000 + i, index=i).labels.ravel(), minlength=9)
        absent = [name for name, n in zip(CLASSES[ndim], counts, strict=True) if n < 3]
        assert not absent, f"seed {1000 + i}: {absent}"


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size", [64, 160])
def test_chest_nesting(seed, size):
    labels = phantom(2, size, seed=seed).labels
    c = {name: i for i, name in enumerate(CLASSES_2D)}
    # Only fat meets the air; the heart, the lungs and what is in them never meet fat or air.
    assert neighbours(labels, c["background"]) == {c["fat"]}
    for inner in ("lung", "heart", "vessel", "lesion", "spine"):
        assert not neighbours(labels, c[inner]) & {c["background"], c["fat"]}, inner
    assert neighbours(labels, c["lesion"]) <= {c["lung"], c["vessel"]}


@pytest.mark.parametrize("seed", range(8))
def test_head_nesting(seed):
    labels = phantom(3, 48, seed=seed).labels
    c = {name: i for i, name in enumerate(CLASSES_3D)}
    assert neighbours(labels, c["background"]) == {c["scalp"]}
    assert neighbours(labels, c["skull"]) <= {c["scalp"], c["csf"]}
    outside = {c["background"], c["scalp"], c["skull"]}
    for inner in ("csf", "cortex", "white matter", "ventricle", "nuclei", "cerebellum"):
        assert not neighbours(labels, c[inner]) & (outside - ({c["skull"]} if inner == "csf" else set())), inner


@pytest.mark.parametrize(("ndim", "size"), [(2, 160), (3, 56)])
def test_labels_mean_the_same_intensity_in_every_subject(ndim, size):
    subjects = [phantom(ndim, size, seed=7, index=i) for i in range(6)]
    means = np.array([[p.image[p.labels == k].mean() for k in range(9)] for p in subjects])
    average = means.mean(axis=0)
    assert (np.diff(np.sort(average)) > 0.012).all()  # no two classes alike
    assert means.std(axis=0).max() < 0.09  # one class alike across subjects
    assert means.std(axis=0).max() > 0.01  # but not the same
    for p in subjects:
        assert p.image[p.labels == 0].mean() < 0.05


@pytest.mark.parametrize(("ndim", "size"), [(2, 128), (3, 48)])
def test_every_tissue_has_texture_beyond_noise(ndim, size):
    p = phantom(ndim, size, seed=2)
    for label in range(1, 9):
        assert p.image[p.labels == label].std() > 0.018, CLASSES[ndim][label]


def test_subjects_differ_in_shape_but_not_in_layout():
    labels = [phantom(2, 128, seed=9, index=i).labels for i in range(8)]
    same = [(a == b).mean() for i, a in enumerate(labels) for b in labels[:i]]
    assert max(same) < 0.97
    assert min(same) > 0.6


@pytest.mark.parametrize(("ndim", "size"), [(2, 96), (3, 48)])
def test_one_subject_at_two_sizes_is_the_same_anatomy(ndim, size):
    small, large = phantom(ndim, size, seed=5), phantom(ndim, 2 * size, seed=5)
    other = phantom(ndim, 2 * size, seed=6)
    every_other = (slice(None, None, 2),) * ndim
    agreement = (small.labels == large.labels[every_other]).mean()
    assert agreement > 0.87
    assert agreement > (small.labels == other.labels[every_other]).mean() + 0.03


@pytest.mark.parametrize("seed", range(4))
def test_the_lesion_lies_in_one_place_at_every_size(seed):
    small, large = (phantom(2, s, seed=seed).labels == CLASSES_2D.index("lesion") for s in (96, 192))
    centre = np.argwhere(small).mean(axis=0) * 2 + 0.5
    assert np.abs(centre - np.argwhere(large).mean(axis=0)).max() < 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ndim": 1, "size": 64}, "ndim must be 2 or 3, got 1"),
        ({"ndim": 4, "size": 64}, "ndim must be 2 or 3"),
        ({"ndim": 2, "size": 15}, "size must be an int of at least 16"),
        ({"ndim": 2, "size": (64, 8)}, "size must be an int of at least 16"),
        ({"ndim": 2, "size": (64, 64, 64)}, "or 2 of them"),
        ({"ndim": 3, "size": (64, 64)}, "or 3 of them"),
        ({"ndim": 2, "size": 64.0}, "size must be"),
        ({"ndim": 2, "size": True}, "size must be"),
        ({"ndim": 2, "size": 64, "seed": -1}, "seed must be an int in"),
        ({"ndim": 2, "size": 64, "seed": 2**64}, "seed must be an int in"),
        ({"ndim": 2, "size": 64, "index": 1.5}, "index must be an int in"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(InputError, match=message):
        phantom(**{"seed": 0, **arguments})
