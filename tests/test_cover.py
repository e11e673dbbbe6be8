"""Cover: from a batch of images to named losses, and back to the backbone's weights."""

from math import isfinite, isnan

import pytest
import torch
from strategies import assert_near

from coverfast import Cover, UNet, VectorPyramid, ViewSettings, consistency_loss, end_point_error, vector_loss
from coverfast.methods import Batch

NAMES = ["loss", "loss_vec", "loss_con", "epe", "epe_ratio", "mask"]


def figures(cover, *batches):
    """Of batches together, as the loop computes them."""
    totals = {}
    with torch.no_grad():
        for found in (cover(cover.prepare(batch)).sums for batch in batches):
            totals = {name: totals.get(name, 0.0) + float(value) for name, value in found.items()}
    return cover.figures(totals)


def loss(cover, batch):
    return cover(cover.prepare(batch)).loss


def method(ndim, crop, **options):
    torch.manual_seed(3)
    unet = UNet(ndim, 1, (8, 16, 24, 16, 8))
    pyramid = VectorPyramid(ndim, unet.feature_channels, (2, 2, 1), 4, 3)
    return Cover(unet, pyramid, crop=crop, **options)


def batch(*size, count=3, seed=4, iteration=7):
    images = torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(0))
    return Batch(
        images,
        torch.tensor([size] * count),
        torch.zeros(count, len(size), dtype=torch.long),
        torch.arange(count),
        seed,
        iteration,
    )


CASES = [(2, (30, 34), 24), (3, (14, 16, 18), (12, 8, 16))]


@pytest.mark.parametrize(("ndim", "size", "crop"), CASES)
def test_losses_are_those_of_the_parts(ndim, size, crop):
    cover, images = method(ndim, crop), batch(*size)
    out = cover(cover.prepare(images))
    assert all(value.shape == () and value.isfinite() and value.dtype == torch.float64 for value in out.sums.values())
    assert not any(value.requires_grad for value in out.sums.values())
    views, levels, features = cover.match(cover.prepare(images))
    full = UNet.forward(cover.backbone, torch.cat([views.x_a, views.x_b]))
    assert_near(features[-1], full[-1], atol=1e-5)
    field = cover.pyramid([f[:3] for f in full], [f[3:] for f in full])
    assert_near(levels[-1], field, atol=1e-4)
    vec = vector_loss(field, views.dvf, views.mask)
    con = consistency_loss(full[-1][:3], full[-1][3:], views.dvf, views.mask)
    epe = end_point_error(field, views.dvf, views.mask)
    still = end_point_error(torch.zeros_like(field), views.dvf, views.mask)
    found = figures(cover, images)
    assert list(found) == NAMES
    for name, value in zip(NAMES, (vec + con, vec, con, epe, epe / still, views.mask.float().mean()), strict=True):
        assert found[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-4)
    assert_near(out.loss, vec + con, atol=1e-4, rtol=1e-4)
    assert cover.count(views) == views.mask.sum()


@pytest.mark.parametrize(("ndim", "size", "crop"), CASES)
def test_gradients_reach_every_parameter_and_repeat_to_the_bit(ndim, size, crop):
    cover, runs = method(ndim, crop), []
    for _ in range(2):
        cover.zero_grad()
        found = loss(cover, batch(*size))
        found.backward()
        for name, parameter in cover.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
        runs.append([found.detach(), *(p.grad.clone() for p in cover.parameters())])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_the_views_follow_iteration_seed_and_sample():
    cover = method(2, 24)
    base = figures(cover, batch(30, 34))["loss_con"]
    assert figures(cover, batch(30, 34))["loss_con"] == base
    assert figures(cover, batch(30, 34, iteration=8))["loss_con"] != base
    assert figures(cover, batch(30, 34, seed=5))["loss_con"] != base


def test_no_map_has_no_error_to_divide_by():
    found = figures(method(2, 24, settings=ViewSettings(strength=0.0)), batch(30, 34))
    assert all(isfinite(value) for value in found.values())


def test_small_images_are_padded_on_demand():
    images = batch(20, 40)
    with pytest.raises(ValueError, match="crop must fit"):
        method(2, 24).prepare(images)
    assert all(isfinite(value) for value in figures(method(2, 24, pad=True), images).values())


def test_a_step_downhill_lowers_the_loss():
    cover = method(2, 24)
    images, losses = batch(30, 34), []
    optimiser = torch.optim.Adam(cover.parameters(), lr=5e-3)
    for _ in range(12):
        optimiser.zero_grad()
        found = loss(cover, images)
        found.backward()
        optimiser.step()
        losses.append(found.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(("ndim", "size", "crop"), CASES)
def test_pictures(ndim, size, crop):
    cover = method(ndim, crop)
    seen = cover.pictures(batch(*size))
    whole = (crop,) * ndim if isinstance(crop, int) else crop
    views = cover.prepare(batch(*size))
    assert torch.equal(seen["x_a"], views.x_a[0])
    assert torch.equal(seen["x_b"], views.x_b[0])
    assert torch.equal(seen["dvf_true"], views.dvf[0])
    assert torch.equal(seen["mask"], views.mask[0])
    for level, (field, warped) in enumerate(zip(seen["dvf_levels"], seen["warped"], strict=True)):
        assert field.shape == (ndim, *(s // 2 ** (2 - level) for s in whole))
        assert warped.shape == (1, *whole)
    assert not any(x.requires_grad for value in seen.values() for x in (value if isinstance(value, list) else [value]))


def test_any_backbone_of_feature_maps_will_do():
    class Pooled(torch.nn.Module):
        """Three levels of one convolution."""

        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 6, 3, padding=1)

        def forward(self, x):
            fine = self.conv(x)
            return [torch.nn.functional.avg_pool2d(fine, 2**i) for i in (2, 1)] + [fine]

    cover = Cover(Pooled(), VectorPyramid(2, (6, 6, 6), (1, 1, 1), 4), crop=(20, 24))
    loss(cover, batch(30, 34)).backward()
    assert cover.backbone.conv.weight.grad.any()


def test_views_without_a_common_pixel_have_no_ratio():
    cover = method(2, 16, settings=ViewSettings(translation=40.0))
    found = figures(cover, batch(20, 20))
    assert found["mask"] == 0
    assert isnan(found["epe_ratio"])
    loss(cover, batch(20, 20)).backward()


def test_parts_of_a_batch_add_up_to_it():
    cover, whole = method(2, 24), batch(40, 44, count=4)
    parts = whole.parts(2)
    assert [part.samples.tolist() for part in parts] == [[0, 1], [2, 3]]
    together, split = figures(cover, whole), figures(cover, *parts)
    for name, value in together.items():
        assert split[name] == pytest.approx(value, rel=1e-4)
    count = sum(cover.count(cover.prepare(part)) for part in parts)
    losses = [cover(cover.prepare(part), count).loss for part in parts]
    assert float(sum(losses)) == pytest.approx(together["loss"] + 1, rel=1e-4)  # each part begins from 1
