"""What is shown of COVER: the weights that `mov` saw, the pixels that are marked, and no trace left behind."""

import itertools

import pytest
import torch
from hypothesis import given
from strategies import assert_near, mov_cases, randn, refused

from coverfast import Cover, UNet, VectorPyramid, compose, mov, upsample_dvf, warp
from coverfast.methods import Batch
from coverfast.methods.cover_pictures import _sought, marked, pictures
from coverfast.pyramid import window_weights

CASES = [(2, (72, 88), (48, 64), 7), (3, (28, 36, 32), (16, 32, 16), (3, 5, 3))]


def cover(ndim, crop, window, **options):
    torch.manual_seed(3)
    unet = UNet(ndim, 1, (8, 16, 24, 16, 8))
    return Cover(unet, VectorPyramid(ndim, unet.feature_channels, (2, 2, 1), 4, window), crop=crop, **options)


def batch(*size, count=2, seed=4):
    images = torch.nn.functional.interpolate(
        torch.rand(count, 1, *[s // 4 for s in size], generator=torch.Generator().manual_seed(0)), size
    )
    corner = torch.zeros(count, len(size), dtype=torch.long)
    return Batch(images, torch.tensor([size] * count), corner, torch.arange(count), seed, 7)


def offsets_of(weights):
    boxes = [range(-(w // 2), w // 2 + 1) for w in weights.shape[2:]]
    return torch.tensor(list(itertools.product(*boxes)), dtype=weights.dtype)


@given(mov_cases(least=1))
def test_weights_are_those_of_mov(case):
    """At every pixel their mean offset is what `mov` finds; they are 1 in all and 0 out of the grid."""
    size = case.q.shape[2:]
    points = torch.tensor(list(itertools.product(*map(range, size))))
    weights = window_weights(case.q, case.k, points, **case.options)
    assert weights.shape == (len(case.q), len(points), *case.window)
    assert weights.dtype == torch.float64
    found = weights.flatten(2) @ offsets_of(weights)
    expected = mov(case.q, case.k, impl="reference", **case.options)
    assert_near(found.mT.reshape(expected.shape), expected, atol=1e-9)
    assert_near(weights.flatten(2).sum(-1), torch.ones(len(case.q), len(points), dtype=torch.float64))
    at = points[:, None] + offsets_of(weights).long()
    outside = ((at < 0) | (at >= torch.tensor(size))).any(-1)
    assert not weights.flatten(2)[:, outside].any()


def test_weights_are_the_softmax_that_is_written():
    q, k = randn(1, 6, 4, 5), randn(1, 6, 4, 5, seed=1)
    found = window_weights(q, k, torch.tensor([[1, 0]]), window=(3, 5), groups=2, scale=0.7)[0, 0]
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for c in (slice(0, 3), slice(3, 6)):
        scores = {(i, o): 0.7 * (q[0, c, 1, 0] * k[0, c, i, o]).sum() for i in (0, 1, 2) for o in (0, 1, 2)}
        total = sum(s.exp() for s in scores.values())
        for (i, o), s in scores.items():
            expected[i, 2 + o] += s.exp() / total / 2
    assert_near(found, expected)


def test_points_that_are_no_pixels_are_refused():
    q = randn(1, 2, 4, 5)
    for points in ([[4, 0]], [[-1, 0]], [[0, 0, 0]]):
        with refused("points must be (K, 2) pixels of a grid of (4, 5)"):
            window_weights(q, q, torch.tensor(points), window=3)


@pytest.mark.parametrize(("ndim", "size", "crop", "window"), CASES)
@pytest.mark.parametrize("cast", [False, True])
def test_what_is_shown_is_what_the_network_did(ndim, size, crop, window, cast):
    method, given_batch = cover(ndim, crop, window), batch(*size)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
        seen = pictures(method, given_batch)
        alone = Batch(*(x[:1] for x in (*vars(given_batch).values(),)[:4]), 4, 7)
        views, levels, features = method.match(method.prepare(alone))
    assert torch.equal(seen["x_a"], views.x_a[0])
    assert torch.equal(seen["x_b"], views.x_b[0])
    assert torch.equal(seen["mask"], views.mask[0])
    for i, (field, maps) in enumerate(zip(levels, features, strict=True)):
        assert torch.equal(seen["dvf_levels"][i], field[0])
        assert torch.equal(seen["features_a"][i], maps[0].float())
        assert torch.equal(seen["features_b"][i], maps[1].float())
        full = field
        while full.shape != views.dvf.shape:
            full = upsample_dvf(full, [2 * s for s in full.shape[2:]])
        assert torch.equal(seen["warped"][i], warp(views.x_a, full)[0])
    points = seen["points"]
    assert len(points) == (4 if ndim == 2 else 3)
    assert all(bool(seen["mask"][0][tuple(p)]) for p in points)
    # Each level's vector, fused with the level above, is the level's field there.
    for i, field in enumerate(levels):
        at = points // 2 ** (len(levels) - 1 - i)
        weights, vectors = seen["similarity"][i], seen["vectors"][i]
        assert weights.shape == (len(points), *method.pyramid.windows[i])
        assert_near(weights.flatten(1) @ offsets_of(weights[None]), vectors, atol=1e-5)
        own = torch.zeros_like(field)
        for p, vector in zip(at, vectors, strict=True):
            own[(0, slice(None), *p)] = vector
        fused = compose(own, levels[i - 1]) if i else own
        for p in at:
            assert_near(fused[(0, slice(None), *p)], field[(0, slice(None), *p)], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_vector_that_is_sought_leads_to_the_truth(ndim):
    """Where the level above is smooth, the true field is what the sought vector makes with it."""
    size = (32, 48, 16)[:ndim]
    grid = torch.stack(torch.meshgrid(*[torch.arange(float(s)) for s in size], indexing="ij"))[None]
    truth = 0.1 * (grid - 8) + 2
    coarse = 0.04 * grid[(..., *[slice(None, s // 2) for s in size])] - 0.5
    levels = [coarse, torch.zeros_like(truth)]
    points = torch.tensor([[9, 11, 7], [20, 30, 8]])[:, :ndim]
    vector, window = _sought(truth, levels, 1, 1, points)
    up = upsample_dvf(coarse, size)
    for p, v, w in zip(points, vector, window, strict=True):
        own = torch.zeros_like(truth)
        own[(0, slice(None), *p)] = v
        assert_near(compose(own, coarse)[(0, slice(None), *p)], truth[(0, slice(None), *p)], atol=1e-3)
        assert_near(w, p + up[(0, slice(None), *p)], atol=1e-5)
    vector, window = _sought(truth, levels, 0, 2, points)
    at = points // 2
    blocks = truth.unflatten(2, (-1, 2)).mean(3)[0, 0].unflatten(1, (-1, 2)).mean(2) / 2
    assert_near(
        vector[:, 0], blocks[(at[:, 0], at[:, 1])] if ndim == 2 else blocks[(*at.T[:2], points[:, 2])], atol=1e-4
    )
    assert torch.equal(window, 2.0 * at + 0.5)


def test_where_nothing_leads_to_the_truth_none_is_told():
    torch.manual_seed(0)
    coarse, truth = 30 * torch.randn(1, 2, 16, 16), torch.zeros(1, 2, 32, 32)
    points = torch.randint(0, 32, (30, 2))
    vector, _ = _sought(truth, [coarse, truth], 1, 1, points)
    told = vector.isfinite().all(1)
    assert 0 < int(told.sum()) < 30
    for p, v in zip(points[told], vector[told], strict=True):
        own = torch.zeros_like(truth)
        own[(0, slice(None), *p)] = v
        assert float(compose(own, coarse)[(0, slice(None), *p)].abs().max()) < 0.1


def test_a_look_leaves_no_trace():
    method = cover(2, 32, 3)
    method.backbone.stem.append(torch.nn.BatchNorm2d(8))
    method.train()
    method.pyramid.eval()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    with torch.no_grad():
        first = pictures(method, batch(48, 48))
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    assert method.backbone.training
    assert not method.pyramid.training
    method.eval()
    with torch.no_grad():
        second = pictures(method, batch(48, 48))
    assert torch.equal(first["dvf_levels"][-1], second["dvf_levels"][-1])


def test_marked_pixels_are_corners_inside_the_mask_and_apart():
    image = torch.zeros(1, 60, 80)
    for y, x in ((10, 12), (10, 60), (40, 12), (40, 60), (24, 36)):
        image[0, y : y + 12, x : x + 12] = 1
    mask = torch.ones(60, 80, dtype=torch.bool)
    mask[:, 55:] = False
    _, points = marked(image, mask)
    assert len(points) == 4
    assert bool((points[:, 1] < 55).all())
    corners = [(y + i, x + o) for y, x in ((10, 12), (40, 12), (24, 36)) for i in (-0.5, 11.5) for o in (-0.5, 11.5)]
    near = torch.cdist(points.double(), torch.tensor(corners, dtype=torch.float64)).min(1).values
    assert bool((near < 4).all())
    apart = torch.cdist(points.double(), points.double()) + 100 * torch.eye(4)
    assert float(apart.min()) >= 10
    assert torch.equal(marked(image, mask)[1], points)
    assert len(marked(image, torch.zeros_like(mask))[1]) == 0
    single = torch.zeros_like(image)
    single[0, 20:36, 20:36] = 1
    single += 1e-3 * torch.rand(60, 80, generator=torch.Generator().manual_seed(0))
    assert bool((torch.cdist(marked(single, mask)[1].double(), torch.tensor([[27.5, 27.5]]).double()) < 14).all())


def test_planes_of_a_volume_pass_through_what_is_seen():
    image = torch.zeros(1, 40, 32, 24)
    image[:, 24:36, 4:14, 10:20] = torch.rand(12, 10, 10, generator=torch.Generator().manual_seed(1))
    centre, points = marked(image, torch.ones(40, 32, 24, dtype=torch.bool))
    assert_near(centre, torch.tensor([30, 9, 15]), atol=1)
    assert len(points) == 3
    assert [bool(points[axis, axis] == centre[axis]) for axis in range(3)] == [True] * 3
    flat, _ = marked(torch.zeros(1, 40, 32, 24), torch.zeros(40, 32, 24, dtype=torch.bool))
    assert flat.tolist() == [20, 16, 12]
