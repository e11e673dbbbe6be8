"""make_views with crops larger than the image, and what it refuses."""

import numpy as np
import pytest
import torch
from strategies import assert_near, refused, views_of

from coverfast import ViewSettings, warp

PLAIN = ViewSettings(probability=0.0)


@pytest.mark.parametrize(("sizes", "crop"), [([[20, 40], [40, 24]], (32, 32)), ([[10, 20, 14]], (16, 16, 16))], ids=str)
def test_padding_is_masked(sizes, crop):
    sizes = torch.tensor(sizes)
    n, full = sizes.shape[1], sizes.amax(0).tolist()
    x = torch.zeros(len(sizes), 1, *full)
    for image, size in zip(x, sizes.tolist(), strict=True):
        image[(..., *map(slice, size))] = 1 + torch.rand(size)
    views = views_of(x, crop, sizes=sizes, settings=PLAIN, pad=True, seed=1)
    assert views.x_a.shape[2:] == crop
    axes = np.meshgrid(*map(np.arange, crop), indexing="ij")
    for b, (size, origin) in enumerate(zip(sizes.tolist(), views.target.origin.tolist(), strict=True)):
        here = there = inside = True
        for i, (s, o, c) in enumerate(zip(size, origin, crop, strict=True)):
            assert 0 <= o <= s - c or s - c <= o <= 0
            looks = axes[i] + views.dvf[b, i].numpy()
            here = here & (axes[i] + o >= 0) & (axes[i] + o <= s - 1)
            there = there & (looks + o >= 0) & (looks + o <= s - 1)
            inside = inside & (looks >= 0) & (looks <= c - 1)
        assert torch.equal(views.x_a[b, 0] != 0, torch.from_numpy(here))
        assert torch.equal(views.mask[b, 0], torch.from_numpy(here & there & inside))
        assert views.mask[b].any()
    gap = (warp(views.x_a, views.dvf) - views.x_b) * views.mask
    assert float(gap.abs().max()) < 2e-4
    assert n == len(crop)


def test_padding_changes_nothing_where_the_crop_fits():
    x = torch.rand(2, 1, 40, 36)
    for a, b in ((views_of(x, 32), views_of(x, 32, pad=True)),):
        assert torch.equal(a.x_a, b.x_a)
        assert torch.equal(a.x_b, b.x_b)
        assert torch.equal(a.mask, b.mask)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_constant_image_makes_finite_views(value):
    views = views_of(torch.full((3, 1, 40, 40), value), 32, settings=ViewSettings(noise=0, brightness=0, boxes=0))
    assert_near(views.x_a, torch.full_like(views.x_a, value), atol=1e-6)
    assert views.x_b.isfinite().all()


def test_images_of_any_floating_dtype_and_an_empty_batch():
    for dtype in (torch.float16, torch.float64):
        views = views_of(torch.rand(2, 1, 20, 20).to(dtype), 16)
        assert (views.x_a.dtype, views.x_b.dtype, views.dvf.dtype) == (torch.float32,) * 3
    for settings in (None, ViewSettings(elastic=1.0, blur=1.0)):
        assert views_of(torch.rand(0, 1, 20, 20), 16, settings=settings).x_a.shape == (0, 1, 16, 16)


def test_images_are_left_alone():
    x = torch.rand(2, 1, 20, 20)
    copy = x.clone()
    views_of(x, 20, settings=ViewSettings(probability=1.0, blur=1.0))
    assert torch.equal(x, copy)


def test_autocast_changes_no_bit():
    x, settings = torch.rand(2, 1, 40, 40), ViewSettings(elastic=4.0, blur=1.0)
    plain = views_of(x, 32, settings=settings)
    with torch.autocast("cpu", torch.bfloat16):
        cast = views_of(x, 32, settings=settings)
    for name in ("x_a", "x_b", "dvf", "mask"):
        assert torch.equal(getattr(cast, name), getattr(plain, name)), name


def test_refusals():
    x = torch.rand(2, 1, 30, 40)
    with refused("crop", "(30, 40)", "(32, 32)"):
        views_of(x, 32)
    with refused("crop", "(20, 40)"):
        views_of(x, 24, sizes=torch.tensor([[30, 40], [20, 40]]))
    for crop in (0, (16,), (16, 16, 16), 2.5):
        with refused("crop", str(crop)):
            views_of(x, crop)
    with refused("images", "(B, C, *S)", "(30, 40)"):
        views_of(x[0, 0], 16)
    with refused("images", "uint8"):
        views_of(x.to(torch.uint8), 16)
    with refused("samples", "sizes"):
        views_of(x, 16, samples=torch.arange(3))
    with refused("samples", "sizes"):
        views_of(x, 16, sizes=torch.tensor([30, 40]))


@pytest.mark.parametrize(
    "setting",
    [
        {"strength": 2.0},
        {"strength": -0.1},
        {"scale": 1.0},
        {"probability": 1.1},
        {"probability": -0.1},
        {"rotation": -1.0},
        {"shear": -1.0},
        {"translation": -1.0},
        {"elastic": -1.0},
        {"elastic_spacing": 0.5},
        {"noise": -1.0},
        {"blur": -1.0},
        {"contrast": -1.0},
        {"brightness": -1.0},
        {"boxes": -1},
    ],
    ids=str,
)
def test_settings_that_make_no_map(setting):
    with refused(next(iter(setting))):
        ViewSettings(**setting)
