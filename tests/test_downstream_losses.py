"""Losses of fine-tuning and the augmentation of labels, held to their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coverfast import ViewSettings, make_views
from coverfast.augment import augment
from coverfast.downstream.losses import class_sums, cross_entropy_sum, soft_dice_loss, weight_sum
from coverfast.geometry import as_dvf
from coverfast.view_plan import plan_views

NONE = ViewSettings(strength=0.0, probability=0.0, boxes=0)


def dice_by_definition(logits: Tensor, labels: Tensor) -> Tensor:
    """SPEC 8, class by class and pixel by pixel."""
    p = logits.double().softmax(1)
    terms = []
    for c in range(1, logits.shape[1]):
        g = (labels == c).double()
        terms.append((2 * (p[:, c] * g).sum() + 1e-5) / (p[:, c].sum() + g.sum() + 1e-5))
    return 1 - sum(terms) / len(terms)


@given(st.integers(0, 2**32), st.integers(2, 5), st.sampled_from([(4, 6), (3, 4, 5), (1, 1)]), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_losses_and_gradients_are_those_of_the_definition(seed: int, classes: int, size: tuple, batch: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(batch, classes, *size, generator=generator)
    labels = torch.randint(0, classes, (batch, *size), generator=generator, dtype=torch.uint8)
    weights = torch.rand(classes, generator=generator) + 0.1
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    entropy = cross_entropy_sum(ours, labels, weights) / weight_sum(labels, weights).float()
    loss = soft_dice_loss(class_sums(ours, labels)) + entropy
    truth = dice_by_definition(theirs, labels) + F.cross_entropy(theirs, labels.long(), weights.double())
    loss.backward(), truth.backward()
    assert float(loss.detach()) == pytest.approx(float(truth.detach()), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-3, atol=1e-6)


def test_a_class_that_is_nowhere_counts_as_found() -> None:
    logits = torch.full((1, 3, 4, 4), -200.0)
    logits[:, 0] = 200.0
    sums = class_sums(logits, torch.zeros(1, 4, 4, dtype=torch.uint8))
    assert float(soft_dice_loss(sums)) == pytest.approx(0.0, abs=1e-6)
    sums = class_sums(logits, torch.ones(1, 4, 4, dtype=torch.uint8))
    assert float(soft_dice_loss(sums)) == pytest.approx(0.5, abs=1e-5)  # class 1 is all missed, class 2 right


@given(st.integers(0, 2**31), st.sampled_from([(24, 20), (12, 14, 16)]), st.floats(0.1, 1.0), st.booleans())
@settings(max_examples=25, deadline=None)
def test_labels_go_where_the_image_goes(seed: int, size: tuple, strength: float, elastic: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (2, *size), generator=generator, dtype=torch.uint8)
    images = torch.rand(2, 1, *size, generator=generator)
    crop = tuple(s - 4 for s in size)
    ranges = ViewSettings(strength=strength, probability=0.0, boxes=0, elastic=2.0 if elastic else 0.0)
    out, classes = augment(images, labels, crop, seed=seed, iteration=3, settings=ranges)
    views = make_views(images, crop, seed=seed, iteration=3, settings=ranges)
    assert torch.equal(out, views.x_b)  # the very map of view b
    plan = plan_views(images, crop, seed=seed, iteration=3, settings=ranges)
    origin = torch.from_numpy(plan.draws.origin).float().reshape(2, -1, *[1] * len(size))
    grid = torch.stack(torch.meshgrid(*(torch.arange(s) for s in crop), indexing="ij")).float()
    at = (grid + as_dvf(plan.target) + origin).double()
    for b in range(2):
        where = at[b].round()
        inside = torch.stack([(w >= 0) & (w <= s - 1) for w, s in zip(where, size, strict=True)]).all(0)
        index = tuple(w.clamp(0, s - 1).long() for w, s in zip(where, size, strict=True))
        expected = torch.where(inside, labels[b][index], 0)
        halves = ((at[b] - at[b].floor() - 0.5).abs() < 1e-3).any(0)  # either neighbour is the nearest there
        assert torch.equal(classes[b][~halves], expected[~halves].to(torch.uint8))
        assert inside.any()


def test_without_ranges_a_crop_is_cut() -> None:
    images = torch.rand(3, 2, 20, 22)
    labels = torch.arange(440, dtype=torch.int64).reshape(1, 20, 22).repeat(3, 1, 1)
    out, found = augment(images, labels, (8, 10), seed=1, iteration=2, settings=NONE)
    for b in range(3):
        y, x = divmod(int(found[b, 0, 0]), 22)
        assert torch.equal(out[b], images[b, :, y : y + 8, x : x + 10])
        assert torch.equal(found[b], labels[b, y : y + 8, x : x + 10])


def test_appearance_changes_the_image_and_not_the_labels() -> None:
    images, labels = torch.rand(2, 1, 32, 32), torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8)
    plain, where = augment(images, labels, 24, seed=4, iteration=1, settings=ViewSettings(probability=0.0, boxes=0))
    drawn, there = augment(images, labels, 24, seed=4, iteration=1, settings=ViewSettings(probability=1.0, boxes=3))
    assert torch.equal(where, there)
    assert float((plain - drawn).abs().mean()) > 0.01


def test_a_small_image_is_padded_with_background() -> None:
    images, labels = torch.ones(1, 1, 8, 8), torch.ones(1, 8, 8, dtype=torch.uint8)
    out, found = augment(images, labels, 16, seed=0, iteration=1, settings=NONE, pad=True)
    assert int(found.sum()) == 64
    np.testing.assert_array_equal(out[0, 0].numpy(), found[0].numpy())


def test_labels_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must be \(1, 8, 8\) like images, got \(1, 8, 9\)"):
        augment(torch.rand(1, 1, 8, 8), torch.zeros(1, 8, 9, dtype=torch.uint8), 4, seed=0, iteration=1)
