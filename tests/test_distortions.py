"""GVSL's appearance transforms: what each of them may change, how often, and that they are functions of their keys."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import LAYOUTS, laid_out, refused

from coverfast.distortions import DistortionSettings, _curves, _draw, _shuffle, distort

OFF = DistortionSettings(bezier=0, shuffle=0, inpaint=0)
BEZIER, SHUFFLE, INPAINT = replace(OFF, bezier=1), replace(OFF, shuffle=1, shuffle_share=1), replace(OFF, inpaint=1)
MIXED = DistortionSettings(bezier=0.5, shuffle=0.5, inpaint=0.5)
#: What each transform sends to the device.
TABLES = {"bezier": {"curves"}, "shuffle": {"rows", "shuffled", "cuts"}, "inpaint": {"painted"}}
SIZES = [(1, 1), (3, 2), (40, 56), (1, 70), (12, 1, 31), (20, 24, 33)]
some_size = st.sampled_from(SIZES)
some_seed = st.integers(0, 2**64 - 1)


def images(batch, *size, channels=1, seed=0):
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def numbered(batch, *size):
    """Every pixel of a sample another intensity; the second channel backwards."""
    count = int(np.prod(size))
    x = (torch.arange(count) / count).view(size).expand(batch, *size)
    return torch.stack([x, 1 - x], 1)


def drawn(x, settings, **keys):
    keys = {"seed": 0, "iteration": 1, "samples": np.arange(len(x)), **keys}
    return _draw(**keys, size=x.shape[2:], settings=settings)


def of(x, settings, **keys):
    return distort(x, **{"seed": 0, "iteration": 1, **keys}, settings=settings)


# --- shuffling -------------------------------------------------------------------------------------------------------


def boxes_of(x, cuts):
    """Number of the box of every pixel, `(P, *S)`, and the intervals' numbers on each axis."""
    numbers = [part.numpy() for part in torch.from_numpy(cuts[:, 3]).split(x.shape[2:], 1)]
    box = np.zeros((len(x), *[1] * (x.ndim - 2)), np.int64)
    for axis, number in enumerate(numbers):
        shape = [len(x), *[1] * (x.ndim - 2)]
        shape[1 + axis] = -1
        box = box * x.shape[2 + axis] + number.reshape(shape)
    return torch.from_numpy(box), numbers


@given(some_size, st.sampled_from([0.03, 0.1, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0]), some_seed)
def test_pixels_are_permuted_within_their_boxes(size, side, share, seed):
    x, settings = numbered(3, *size), replace(SHUFFLE, shuffle_side=side, shuffle_share=share)
    y = of(x, settings, seed=seed)
    assert torch.equal(y.flatten(2).sort().values, x.flatten(2).sort().values)
    source = (y[:, 0].double() * (x[0, 0].numel())).round().long().flatten(1)
    assert torch.equal(x.flatten(2).gather(2, source[:, None].expand(-1, 2, -1)).view_as(y), y)  # channels alike
    box, numbers = boxes_of(x, drawn(x, settings, seed=seed).tables["cuts"])
    assert torch.equal(box.flatten(1).gather(1, source), box.flatten(1))
    for axis, number in enumerate(numbers):
        assert set(np.unique(np.diff(number, axis=1))) <= {0, 1}
        lengths = np.concatenate([np.bincount(row) for row in number])
        assert 1 <= lengths.min() <= lengths.max() <= max(1, round(side * size[axis]))
    if share == 0:
        assert torch.equal(x, y)


@pytest.mark.parametrize("share", [0.3, 0.85, 1.0])
def test_the_share_of_boxes_is_shuffled(share):
    x = numbered(8, 60, 60)
    settings = replace(SHUFFLE, shuffle_share=share)
    moved = of(x, settings)[:, 0] != x[:, 0]
    box, _ = boxes_of(x, drawn(x, settings).tables["cuts"])
    box = box + torch.arange(8).view(-1, 1, 1) * 3600
    pixels = torch.bincount(box.flatten())
    touched = torch.bincount(box[moved], minlength=len(pixels)) > 0
    large = pixels >= 6  # left as they are by chance once in 720
    assert float(touched[large].double().mean()) == pytest.approx(share, abs=0.06)


def test_every_permutation_is_as_likely():
    count, size = 20_000, (2, 3)
    first, within, number = np.zeros(5), [0, 1, 0, 1, 2], np.zeros(5)
    cuts = torch.tensor(np.stack([first, within, [2, 2, 3, 3, 3], number])).long().expand(count, 4, 5)
    words = torch.randint(2**32, (count, 3), generator=torch.Generator().manual_seed(0))
    y = _shuffle(torch.arange(6.0).view(1, 1, *size).expand(count, 1, *size), cuts, words, torch.ones(count, 1) > 0)
    code = (y.flatten(1).long() * 6 ** torch.arange(6)).sum(1)
    _, counts = code.unique(return_counts=True)
    assert len(counts) == 720
    chi = float(((counts - count / 720) ** 2 / (count / 720)).sum())
    assert abs(chi - 719) < 5 * (2 * 719) ** 0.5


def test_a_large_batch_of_many_boxes():
    # Too many boxes for sort keys of 32 bits: the same result as one by one.
    x, settings = numbered(16, 110, 110), replace(SHUFFLE, shuffle_side=0.02)
    assert drawn(x, settings).shuffled_boxes * 16 > 2**15
    whole = of(x, settings)
    assert torch.equal(whole.flatten(2).sort().values, x.flatten(2).sort().values)
    for i in (0, 7, 15):
        assert torch.equal(of(x[:1], settings, samples=torch.tensor([i])), whole[i : i + 1])


# --- Bezier intensity ------------------------------------------------------------------------------------------------


def test_curves_are_beziers():
    u = np.random.default_rng(0).random((60, 4))
    found = _curves(u, np.arange(60) < 50) * 2.0**-20
    assert (found[:, 0] == 0).all()
    assert (found[:, -1] == 1).all()
    assert (np.diff(found, axis=1) >= 0).all()
    grid = np.arange(1025) / 1024
    assert (found[50:] == grid).all()
    for (x_1, x_2, y_1, y_2), curve in zip(u[:50], found, strict=False):
        (x_1, x_2), (y_1, y_2) = sorted((x_1, x_2)), sorted((y_1, y_2))
        low, high = np.zeros(1025), np.ones(1025)
        for _ in range(50):  # where the curve is above x
            t = (low + high) / 2
            beyond = 3 * (1 - t) ** 2 * t * x_1 + 3 * (1 - t) * t**2 * x_2 + t**3 > grid
            low, high = np.where(beyond, low, t), np.where(beyond, t, high)
        expected = 3 * (1 - t) ** 2 * t * y_1 + 3 * (1 - t) * t**2 * y_2 + t**3
        np.testing.assert_allclose(curve, expected, atol=2e-4)


@given(some_seed)
def test_intensities_keep_their_order_and_range(seed):
    border = torch.arange(1024.0) / 1024  # of the cells, and the closest numbers around
    near = [torch.nextafter(border, torch.tensor(end)).clamp(0, 1) for end in (-1.0, 2.0)]
    ramp = torch.cat([border, *near, torch.ones(1), torch.rand(2, generator=torch.Generator().manual_seed(1))]).sort()
    x = ramp.values.view(1, 1, 25, 123).expand(6, 2, 25, 123)
    y = of(x, BEZIER, seed=seed).flatten(2)
    assert (y.diff() >= 0).all()
    assert (y[..., 0] == 0).all()
    assert (y[..., -1] == 1).all()
    assert torch.equal(y[:, 0], y[:, 1])
    assert all(not torch.equal(a, b) for a, b in pairwise(y))  # one curve a sample
    assert float((y - x.flatten(2)).abs().amax((1, 2)).max()) > 0.05


def test_what_is_not_bent_stays():
    x = images(64, 9, 11)
    y = of(x, replace(OFF, bezier=0.5))
    same = (y == x).flatten(1).all(1)
    assert 16 < int(same.sum()) < 48


# --- in-painting -----------------------------------------------------------------------------------------------------


@given(some_size, some_seed)
def test_only_boxes_are_painted(size, seed):
    x = images(4, *size, channels=2) + 2  # clamped to 1, which no noise is
    y = of(x, INPAINT, seed=seed)
    found = drawn(x, INPAINT, seed=seed).inpainted
    assert [row for row, _ in found] == [0, 1, 2, 3]
    inside = torch.zeros(4, *size, dtype=torch.bool)
    for row, boxes in found:
        assert 1 <= len(boxes) <= 5
        for box in boxes:
            for (first, last), length in zip(box, size, strict=True):
                assert 0 <= first < last <= length
                assert max(1, length // 6) <= last - first <= max(1, length // 3)
            inside[(row, *(slice(*ends) for ends in box))] = True
    assert torch.equal(y < 1, inside[:, None].expand_as(y))


def test_the_fill_is_uniform_noise_of_its_own():
    x = torch.ones(8, 2, 90, 90)
    y = of(x, INPAINT)
    noise = y[y < 1]
    assert noise.unique().numel() > 0.99 * noise.numel()  # no two boxes, channels or samples alike
    share = torch.histc(noise, 16, 0, 1) / noise.numel() * 16
    assert float((share - 1).abs().max()) < 0.1


def test_the_number_of_boxes():
    counts = np.bincount([len(b) for _, b in drawn(torch.ones(4000, 1, 6, 6), INPAINT).inpainted], minlength=6) / 4000
    np.testing.assert_allclose(counts, [0, 0.05, 0.95 * 0.05, 0.95**2 * 0.05, 0.95**3 * 0.05, 0.95**4], atol=0.03)
    assert not drawn(torch.ones(9, 1, 6, 6), replace(INPAINT, boxes=0)).inpainted


# --- all together ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tables"), TABLES.items())
@pytest.mark.parametrize("probability", [0.3, 0.9])
def test_each_transform_is_as_frequent_as_it_should_be(name, tables, probability):
    x, settings = images(1200, 30, 2), replace(OFF, shuffle_share=1, **{name: probability})
    changed = (of(x, settings) != x).flatten(1).any(1)
    assert float(changed.double().mean()) == pytest.approx(probability, abs=0.05)
    assert set(drawn(x, settings).tables) == tables  # no work for the others


def test_transforms_come_independently():
    found = drawn(images(1200, 12, 2), DistortionSettings())
    straight = np.round(np.linspace(0, 2**20, 1025)).astype(np.int64)
    bent, shuffled, painted = (np.zeros(1200) for _ in range(3))
    bent[(found.tables["curves"] != straight).any(1)] = 1
    shuffled[found.tables["rows"]] = 1
    painted[[row for row, _ in found.inpainted]] = 1
    np.testing.assert_allclose([bent.mean(), shuffled.mean(), painted.mean()], [0.9, 0.5, 0.9], atol=0.05)
    np.testing.assert_allclose(np.corrcoef([bent, shuffled, painted]), np.eye(3), atol=0.15)


def test_transforms_come_in_their_order():
    x = images(3, 30, 36)
    bent = of(x, BEZIER)
    shuffled = of(bent, replace(SHUFFLE, shuffle_share=0.85))
    expected = of(shuffled, INPAINT)
    assert torch.equal(of(x, DistortionSettings(bezier=1, shuffle=1, inpaint=1)), expected)


@given(some_size, some_seed, st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 2))
def test_the_split_of_a_batch_does_not_show(size, seed, iteration, first, channels):
    x, samples = images(5, *size, channels=channels), torch.tensor([0, 3, 2**32 - 1, 7, 11])
    whole = distort(x, seed=seed, iteration=iteration, samples=samples, settings=MIXED)
    cuts = (slice(0, first), slice(first, 5))
    parts = [distort(x[c], seed=seed, iteration=iteration, samples=samples[c], settings=MIXED) for c in cuts]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.shape == x.shape
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1


@pytest.mark.parametrize("settings", [BEZIER, SHUFFLE, INPAINT], ids=["bezier", "shuffle", "inpaint"])
def test_every_key_changes_the_result(settings):
    x = images(1, 40, 50)
    keys = {"seed": 1, "iteration": 2, "samples": torch.tensor([3])}
    base = distort(x, **keys, settings=settings)
    assert torch.equal(distort(x, **keys, settings=settings), base)
    for other in ({"seed": 2}, {"seed": 1 + 2**32}, {"iteration": 3}, {"samples": torch.tensor([4])}):
        assert not torch.equal(distort(x, **(keys | other), settings=settings), base)
    default = distort(images(1, 40, 50).expand(4, -1, -1, -1), seed=1, iteration=2, settings=settings)
    assert torch.equal(default[3:], base)


@pytest.mark.parametrize("key", ["seed", "iteration", "samples"])
def test_every_key_changes_the_dense_numbers(key):
    # Where a box is all of the image, what is drawn for its pixels is all that can differ.
    line, whole = numbered(1, 1, 8), replace(SHUFFLE, shuffle_side=1)
    keys = [{key: torch.tensor([i]) if key == "samples" else i} for i in range(60)]
    lone = torch.ones(1, 16, 1, 1)
    assert len({tuple(of(lone, replace(INPAINT, boxes=1), **k).flatten().tolist()) for k in keys}) == 60
    of_draws = [{"samples": np.array([i])} if key == "samples" else {key: i} for i in range(60)]
    one_box = [k for k, d in zip(keys, of_draws, strict=True) if drawn(line, whole, **d).shuffled_boxes == 1]
    assert len(one_box) >= 4
    assert len({tuple(of(line, whole, **k)[0, 0].flatten().tolist()) for k in one_box}) == len(one_box)
    some = replace(whole, shuffle_share=0.5)
    assert len({torch.equal(of(line, some, **k), line) for k in one_box}) == 2


def test_nothing_is_done_where_all_is_off():
    x = images(3, 10, 12).requires_grad_()
    y = of(x, OFF)
    assert torch.equal(x, y)
    assert not y.requires_grad
    assert not drawn(x, OFF).tables
    y.zero_()
    assert float(x.detach().sum()) > 0  # no part of it is shared


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(24, 30), (12, 10, 14)], ids=str)
def test_memory_layout_does_not_show(size, layout):
    x = laid_out(images(4, *size, channels=3), layout)
    kept = x.clone()
    expected = of(x.contiguous().clone(), MIXED)
    assert torch.equal(of(x, MIXED), expected)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    x = images(4, 24, 30).to(dtype)
    y = of(x, MIXED)
    assert y.dtype == torch.float32
    assert torch.equal(y, of(x.float(), MIXED))


def test_no_images_and_no_numbers():
    assert of(torch.rand(0, 2, 8, 9), DistortionSettings()).shape == (0, 2, 8, 9)
    assert of(torch.full((2, 1, 8, 9), torch.nan), BEZIER).isnan().all()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"bezier": 1.1}, ("bezier", "[0, 1]", "1.1")),
        ({"inpaint": -0.1}, ("inpaint", "[0, 1]", "-0.1")),
        ({"shuffle": float("nan")}, ("shuffle", "finite", "nan")),
        ({"shuffle_side": 2}, ("shuffle_side", "[0, 1]", "2")),
        ({"boxes": -1}, ("boxes", "not negative", "-1")),
        ({"boxes": 1.5}, ("boxes", "int", "1.5")),
    ],
)
def test_settings_are_checked(given, words):
    with refused(*words):
        DistortionSettings(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"x": torch.rand(3, 4)}, ("x must be", "(3, 4)")),
        ({"x": torch.ones(2, 1, 4, 4, dtype=torch.uint8)}, ("x must be", "uint8")),
        ({"seed": -1}, ("seed", "2^64", "-1")),
        ({"iteration": 2**32}, ("iteration", "2^32")),
        ({"samples": torch.tensor([0, 1, 2])}, ("samples", "(2,)", "(3,)")),
        ({"samples": torch.tensor([0.0, 1.0])}, ("samples", "integers", "float32")),
        ({"samples": torch.tensor([0, -1])}, ("samples", "2^32")),
    ],
)
def test_arguments_are_checked(given, words):
    with refused(*words):
        distort(**{"x": torch.rand(2, 1, 4, 4), "seed": 0, "iteration": 1, **given})


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(64, 80), (24, 31, 40)], ids=str)
def test_a_gpu_finds_the_same_bits_and_is_not_waited_for(size):
    x = images(6, *size, channels=2)
    there = x.cuda()
    distort(there, seed=5, iteration=0, settings=MIXED)  # memory is found
    for iteration in range(1, 5):
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = distort(there, seed=5, iteration=iteration, settings=MIXED)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found.cpu(), distort(x, seed=5, iteration=iteration, settings=MIXED))
