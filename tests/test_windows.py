"""Sliding windows: every pixel is covered, and what a network says of a pixel does not depend on how."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coverfast import InputError, UNet
from coverfast.downstream import Network, predict_windows
from coverfast.downstream.windows import sliding_windows, window_weights


class Stub(nn.Module):
    """A network of no weights: logits by a function of the images."""

    def __init__(self, crop, logits, task="segmentation", channels=1):
        super().__init__()
        self.crop, self.logits, self.task, self.in_channels = crop, logits, task, channels
        self.ndim, self.seen = len(crop), []

    def forward(self, images):
        assert not torch.is_grad_enabled()
        assert not self.training
        assert images.shape[1:] == (self.in_channels, *self.crop)
        self.seen.append(len(images))
        return self.logits(images)


def pixelwise(images):
    """Logits of three classes from the pixel alone."""
    x = images[:, :1]
    return torch.cat([x * 0, 3 * x - 1, torch.sin(9 * x)], 1)


def whole(image):
    return pixelwise(image[None])[0].softmax(0)


sizes = st.integers(2, 3).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(1, 14), min_size=n, max_size=n).map(tuple)] * 2)
)
overlaps = st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9])


@given(sizes, overlaps)
def test_windows_cover_every_pixel_and_stay_inside(case, overlap):
    size, crop = case
    starts = sliding_windows(size, crop, overlap)
    covered = np.zeros(np.maximum(size, crop), int)
    for start in starts:
        window = covered[tuple(slice(a, a + c) for a, c in zip(start, crop, strict=True))]
        assert window.shape == crop
        window += 1
    assert covered.min() >= 1
    assert len(set(starts)) == len(starts)
    for axis, side in enumerate(crop):
        along = sorted({start[axis] for start in starts})
        assert along[0] == 0
        assert along[-1] == max(0, size[axis] - side)
        # Neighbours overlap as asked, to rounding.
        assert all(b - a <= max(1, side * (1 - overlap) + 1) for a, b in itertools.pairwise(along))


def test_no_more_windows_than_needed():
    assert sliding_windows((16,), (8,)) == [(0,), (4,), (8,)]
    assert sliding_windows((17,), (8,)) == [(0,), (3,), (6,), (9,)]
    assert sliding_windows((16,), (8,), 0.0) == [(0,), (8,)]
    assert sliding_windows((5,), (8,)) == [(0,)]


@given(sizes, overlaps, st.integers(1, 5))
def test_a_network_that_sees_one_pixel_needs_no_windows(case, overlap, batch):
    size, crop = case
    image = torch.rand((1, *size))
    found = predict_windows(Stub(crop, pixelwise), image, overlap=overlap, batch=batch)
    assert (found.shape, found.dtype, found.device.type) == ((3, *size), torch.float32, "cpu")
    torch.testing.assert_close(found, whole(image), rtol=0, atol=3e-7)


@given(sizes, overlaps)
def test_a_constant_network_gives_its_constant_to_the_bit(case, overlap):
    size, crop = case
    logits = torch.tensor([0.3, -1.7, 2.2])
    network = Stub(crop, lambda x: logits.view(1, 3, *[1] * len(crop)).expand(len(x), 3, *crop))
    found = predict_windows(network, torch.rand((1, *size)), overlap=overlap)
    assert torch.equal(found, logits.softmax(0).view(3, *[1] * len(size)).expand(3, *size))


def test_windows_count_most_in_their_middle():
    """Two windows that disagree: between their centres the mean passes over from one to the other."""
    told = iter([torch.tensor([9.0, 0.0]), torch.tensor([0.0, 9.0])])
    network = Stub((8, 4), lambda x: torch.stack([next(told) for _ in x]).view(-1, 2, 1, 1).expand(-1, 2, 8, 4))
    first = predict_windows(network, torch.zeros(1, 12, 4))[0, :, 0]
    assert first[0] == first[3] > 0.99  # one window alone
    assert first[8] == first[11] < 0.01
    assert (first[3:9].diff() < 0).all()
    assert float(first[5] + first[6]) == pytest.approx(1.0, abs=1e-5)
    weights = window_weights((8, 4))
    assert weights.shape == (8, 4)
    assert (weights > 0).all()
    assert weights[3:5, 1:3].max() == weights.max()
    assert (window_weights((128, 128, 128)) > 0).all()


@pytest.mark.parametrize("task", ["segmentation", "classification"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_a_real_network_at_any_batch(task, ndim):
    torch.manual_seed(0)
    network = Network(UNet(ndim, 2, (8, 8, 8)), task, ("a", "b", "c"), crop=8).train()
    image = torch.rand(2, *(13, 6, 17)[:ndim])
    one, seven = (predict_windows(network, image, batch=batch) for batch in (1, 7))
    assert network.training
    torch.testing.assert_close(one, seven, rtol=1e-5, atol=1e-6)
    assert one.shape == ((3, *image.shape[1:]) if task == "segmentation" else (3,))
    assert not one.requires_grad
    torch.testing.assert_close(one.sum(0), torch.ones(one.shape[1:]))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(predict_windows(network, image, batch=1), one, rtol=0, atol=0)


def test_small_images_are_filled_at_their_end_with_zeros():
    seen = []
    network = Stub((6, 8), lambda x: seen.append(x.clone()) or pixelwise(x))
    image = torch.rand(1, 4, 8)
    assert predict_windows(network, image).shape == (3, 4, 8)
    assert torch.equal(seen[0][0, :, :4], image)
    assert not seen[0][0, :, 4:].any()


def test_the_classes_of_an_image_are_the_mean_of_its_windows():
    network = Stub((4, 4), lambda x: torch.stack([x.mean((1, 2, 3)) * 8, x[:, 0, 0, 0]], 1), "classification")
    image = torch.rand(1, 7, 4)
    starts = sliding_windows((7, 4), (4, 4))
    assert len(starts) == 3
    parts = [network.eval().logits(image[None, :, a : a + 4])[0].softmax(0) for a, _ in starts]
    torch.testing.assert_close(predict_windows(network, image, batch=2), torch.stack(parts).mean(0))
    assert network.seen == [2, 1]


def test_no_more_than_a_batch_of_windows_is_held():
    alive = []

    def logits(images):
        found = pixelwise(images)
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(images), weakref.ref(found)]
        assert len(alive) <= 2 * 2  # this batch, and the one before while it is replaced
        return found

    network = Stub((16, 16), logits)
    predict_windows(network, torch.rand(1, 96, 96), overlap=0.9, batch=2)
    assert len(network.seen) > 500


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (torch.rand(1, 8), {}, r"image must be \(C, \*S\) with 1 channel\(s\) and 2 spatial axes, got shape \(1, 8\)"),
        (torch.rand(2, 8, 8), {}, "1 channel"),
        (torch.rand(1, 8, 8), {"overlap": 1.0}, "overlap must be at least 0 and below 1, got 1.0"),
        (torch.rand(1, 8, 8), {"batch": 0}, "batch must be at least 1, got 0"),
    ],
)
def test_refusals(image, options, message):
    with pytest.raises(InputError, match=message):
        predict_windows(Stub((4, 4), pixelwise), image, **options)
