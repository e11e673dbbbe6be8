"""GVSL: the affine map, the heads, what becomes of a pair, and that it finds what it is to find."""

from __future__ import annotations

from math import cos, pi, sin
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coverfast.affine import ROTATION, SCALING, SHEAR, TRANSLATION, bounded, compose_affine, rotations
from coverfast.backbones import UNet, choose
from coverfast.checks import InputError
from coverfast.geometry import affine_dvf
from coverfast.methods import Batch
from coverfast.methods.gvsl import GVSL, Pair
from coverfast.ops.ncc import ncc_loss
from coverfast.ops.warp import warp
from coverfast.phantom import phantom
from coverfast.regularity import jacobian_determinant, smoothness
from coverfast.z_matching import AffineHead, ZMatching


def method(ndim: int = 2, channels: int = 1, crop: tuple[int, ...] = (32, 16, 16), **options: object) -> GVSL:
    torch.manual_seed(0)
    return GVSL(UNet(ndim, channels, (8, 16, 8)), crop=crop[:ndim], **options)


def batch(ndim: int = 2, count: int = 2, channels: int = 1, iteration: int = 1) -> Batch:
    size = (40, 24, 20)[:ndim]
    images = [torch.from_numpy(phantom(ndim, size, seed=1, index=i).image).float() for i in range(2 * count)]
    stacked = torch.stack(images)[:, None].expand(-1, channels, *size).contiguous()
    sizes = torch.tensor([size] * 2 * count)
    return Batch(stacked, sizes, torch.zeros_like(sizes), torch.arange(2 * count), 7, iteration)


def moved(m: GVSL, by: float = 0.3) -> GVSL:
    """Away from the identity, where nothing is to be seen."""
    torch.manual_seed(1)
    for parameter in (*m.matching.affine.parameters(), *m.matching.deformable.field.parameters()):
        parameter.data.normal_(0, by)
    return m


# --- the affine map ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31))
def test_the_matrix_is_that_of_eq_11(seed: int) -> None:
    """Written as the paper does, with axes x, y, z."""
    draw = torch.Generator().manual_seed(seed)
    x, y, z = (torch.rand(3, generator=draw, dtype=torch.float64) * 2 - 1).tolist()
    s = 1 + 0.2 * torch.randn(3, generator=draw, dtype=torch.float64)
    t = torch.randn(3, generator=draw, dtype=torch.float64)
    shears = {pair: 0.1 * torch.randn((), generator=draw).item() for pair in ("xy", "xz", "yx", "yz", "zx", "zy")}
    rotation = torch.tensor(
        [
            [cos(y) * cos(z), sin(x) * sin(y) * cos(z) - sin(z) * cos(x), sin(y) * cos(x) * cos(z) + sin(x) * sin(z)],
            [cos(y) * sin(z), cos(x) * cos(z) + sin(x) * sin(y) * sin(z), -sin(x) * cos(z) + sin(z) * sin(y) * cos(x)],
            [-sin(y), sin(x) * cos(y), cos(x) * cos(y)],
        ],
        dtype=torch.float64,
    )
    shear = torch.tensor(
        [[1, shears["yx"], shears["zx"]], [shears["xy"], 1, shears["zy"]], [shears["xz"], shears["yz"], 1]],
        dtype=torch.float64,
    )
    expected = rotation @ torch.diag(s) @ shear
    theta = compose_affine(
        torch.tensor([[z, y, x]], dtype=torch.float64),
        s.flip(0)[None],
        # Row by row, axes z, y, x: (z, y), (z, x), (y, z), (y, x), (x, z), (x, y) of the matrix.
        torch.tensor([[shears[p] for p in ("yz", "xz", "zy", "xy", "zx", "yx")]], dtype=torch.float64),
        t.flip(0)[None],
    )
    torch.testing.assert_close(theta[0, :, :3].flip(0, 1), expected)
    torch.testing.assert_close(theta[0, :, 3].flip(0), expected @ t)


@given(st.integers(0, 2**31), st.sampled_from([2, 3]))
def test_no_map_within_the_bounds_folds(seed: int, n: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def raw(count: int) -> torch.Tensor:
        return 100 * torch.randn(8, count, generator=draw)

    theta = compose_affine(
        bounded(raw(rotations(n)), ROTATION),
        1 + bounded(raw(n), SCALING),
        bounded(raw(n * (n - 1)), SHEAR),
        bounded(raw(n), TRANSLATION),
    )
    determinants = torch.linalg.det(theta[..., :n])
    assert (determinants > 0.75**n * 0.6).all()


def test_a_positive_rotation_in_the_image_is_that_about_z_in_the_volume() -> None:
    flat = compose_affine(torch.tensor([[0.3]]), torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))
    deep = compose_affine(torch.tensor([[0.3, 0, 0]]), torch.ones(1, 3), torch.zeros(1, 6), torch.zeros(1, 3))
    torch.testing.assert_close(deep[:, 1:, 1:], flat)


# --- the heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [2, 3])
def test_all_starts_at_the_identity_exactly(ndim: int) -> None:
    m = method(ndim)
    pair = m.prepare(batch(ndim))
    found = m.match(pair)
    assert not found.matched.local.any()
    assert not found.matched.dvf.any()
    assert torch.equal(found.moved, pair.moving)
    assert torch.equal(found.matched.theta[..., :ndim], torch.eye(ndim).expand(2, ndim, ndim))


def test_the_head_has_the_numbers_of_the_paper() -> None:
    for ndim, counts in ((3, [3, 3, 6, 3]), (2, [1, 2, 2, 2])):
        assert [layer.out_features for layer in AffineHead(ndim, 4).layers.values()] == counts


def test_the_affine_head_is_bounded_and_differentiable_far_out() -> None:
    head = AffineHead(3, 4)
    for layer in head.layers.values():
        torch.nn.init.normal_(layer.weight, std=30.0)
    a, b = torch.randn(2, 4, 4, 4, 4, requires_grad=True), torch.randn(2, 4, 4, 4, 4)
    theta = head(a, b, torch.Size([32, 64, 16]))
    theta.sum().backward()
    assert theta.isfinite().all()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    largest = 1.25 * (1 + 2 * SHEAR) * TRANSLATION * 64 * 3
    assert theta[..., 3].abs().max() < largest


def test_the_bounds_are_those_of_the_paper_along_every_axis() -> None:
    head = AffineHead(3, 2)
    for layer in head.layers.values():
        torch.nn.init.constant_(layer.bias, 50.0)
    theta = head(torch.zeros(1, 2, 2, 2, 2), torch.zeros(1, 2, 2, 2, 2), torch.Size([32, 64, 16]))
    expected = compose_affine(
        torch.full((1, 3), pi / 9),
        torch.full((1, 3), 1.25),
        torch.full((1, 6), pi / 18),
        0.25 * torch.tensor([[32.0, 64.0, 16.0]]),
    )
    torch.testing.assert_close(theta, expected)


def test_the_affine_head_sees_where_features_lie_whatever_the_size() -> None:
    """A mean over the grid alone would give both the same map."""
    head = AffineHead(2, 1)
    torch.nn.init.normal_(head.layers["translation"].weight)
    spot = torch.zeros(1, 1, 8, 8)
    spot[..., 1, 1] = 1
    other = spot.flip(2)
    here, there = (head(x, torch.zeros_like(x), torch.Size([64, 64])) for x in (spot, other))
    assert (here - there).abs().max() > 0.1
    larger = head(spot.repeat_interleave(2, 2).repeat_interleave(2, 3), torch.zeros(1, 1, 16, 16), torch.Size([64, 64]))
    torch.testing.assert_close(larger, here)


def test_b_passes_through_the_affine_map_before_the_deformable_head_sees_it() -> None:
    torch.manual_seed(0)
    head = ZMatching(2, 4, 8)
    torch.nn.init.normal_(head.affine.layers["rotation"].weight)
    coarse, fine = torch.randn(2, 1, 4, 4, 4), torch.randn(2, 1, 8, 16, 16)
    seen: list[torch.Tensor] = []
    head.deformable.register_forward_pre_hook(lambda module, args: seen.extend(args))
    found = head(*coarse, *fine)
    assert torch.equal(seen[0], fine[0])
    torch.testing.assert_close(seen[1], warp(fine[1], affine_dvf(found.theta, (16, 16)), padding="border"))
    assert (seen[1] - fine[1]).abs().max() > 0.1


def test_the_field_is_the_affine_map_after_the_deformation() -> None:
    m = moved(method())
    found = m.match(m.prepare(batch())).matched
    p = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(16.0), indexing="ij"), -1)
    centre = torch.tensor([15.5, 7.5])
    at = p + found.local[0].movedim(0, -1)
    expected = (at - centre) @ found.theta[0, :, :2].T + found.theta[0, :, 2] + centre - p
    torch.testing.assert_close(found.dvf[0].movedim(0, -1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_network_that_ends_above_the_pixel_gets_a_field_of_the_image(ndim: int) -> None:
    """Its affine map, seen on the coarser grid, is the same map: half a pixel of it would show."""
    size = (64, 48, 32)[:ndim]
    backbone = choose(f"{Path(__file__).with_name('own_network.py')}:Small", ["normed=False"], ndim=ndim, in_channels=1)
    m = moved(GVSL(backbone, crop=size), by=1.0)
    torch.nn.init.zeros_(m.matching.deformable.field.weight)
    torch.nn.init.zeros_(m.matching.deformable.field.bias)
    images = torch.rand(2, 1, *size)
    seen: list[torch.Tensor] = []
    m.matching.deformable.register_forward_pre_hook(lambda module, args: seen.extend(args))
    found = m.match(Pair(images, images[:1]))
    assert found.matched.dvf.shape == (1, ndim, *size)
    assert found.restored.shape == images[:1].shape
    grid = [s // 4 for s in size]
    pooled = found.matched.dvf
    for axis in range(2, 2 + ndim):
        pooled = pooled.unflatten(axis, (-1, 4)).mean(axis + 1)
    on_grid = warp(m.backbone(images)[-1][1:], pooled / 4, padding="border")
    assert list(on_grid.shape[2:]) == grid
    torch.testing.assert_close(seen[1], on_grid, rtol=1e-3, atol=1e-4)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ndim", "channels"), [(2, 1), (2, 3), (3, 1)])
def test_the_loss_is_that_of_its_parts(ndim: int, channels: int) -> None:
    m = moved(method(ndim, channels, smooth=0.5, restore=2.0, window=5), by=0.1)
    pair = m.prepare(batch(ndim, channels=channels))
    outcome, found = m(pair), m.match(pair)
    ncc = ncc_loss(pair.fixed, found.moved, 5)
    smooth = smoothness(found.matched.dvf)
    restore = (found.restored - pair.fixed).square().mean()
    torch.testing.assert_close(outcome.loss, ncc + 0.5 * smooth + 2 * restore, rtol=1e-4, atol=1e-5)
    figures = m.figures({name: float(value) for name, value in outcome.sums.items()})
    assert figures["loss"] == pytest.approx(outcome.loss.item(), rel=1e-4)
    assert figures["ncc"] == pytest.approx(1 - float(ncc), rel=1e-4)
    assert figures["ncc_before"] == pytest.approx(1 - float(ncc_loss(pair.fixed, pair.moving, 5)), rel=1e-4)
    assert figures["loss_smooth"] == pytest.approx(float(smooth), rel=1e-4)
    assert figures["loss_restore"] == pytest.approx(float(restore), rel=1e-4)


def test_parts_of_a_batch_add_up() -> None:
    m, whole = moved(method(), by=0.1), batch(count=4)
    m(m.prepare(whole)).loss.backward()
    expected = {name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None}
    parts = [m.prepare(part) for part in whole.parts(2)]
    assert torch.equal(torch.cat([p.fixed for p in parts]), m.prepare(whole).fixed)
    total = torch.stack([m.count(part) for part in parts]).sum()
    m.zero_grad()
    sums = [m(part, total) for part in parts]
    torch.stack([s.loss for s in sums]).sum().backward()
    for name, parameter in m.named_parameters():
        scale = expected[name].abs().max()
        assert parameter.grad is not None
        assert (parameter.grad - expected[name]).abs().max() <= 2e-4 * scale + 1e-7, name
    together = {k: sum(float(s.sums[k]) for s in sums) for k in sums[0].sums}
    assert together == pytest.approx({k: float(v) for k, v in m(m.prepare(whole)).sums.items()}, rel=1e-4)


def test_a_is_restored_from_its_own_features() -> None:
    m = moved(method())
    pair = m.prepare(batch(count=1))
    seen = pair.seen.clone().requires_grad_()
    m.match(pair._replace(seen=seen)).restored.square().sum().backward()
    assert seen.grad is not None
    assert seen.grad[0].abs().max() > 0
    assert not seen.grad[1].any()


def test_b_is_sampled_with_its_border_repeated() -> None:
    m = moved(method())
    pair = m.prepare(batch())
    pair = pair._replace(seen=pair.seen.clone().add_(1))  # no black border to hide in
    found = m.match(pair)
    torch.testing.assert_close(found.moved, warp(pair.moving, found.matched.dvf, padding="border"))
    assert (found.moved - warp(pair.moving, found.matched.dvf)).abs().max() > 0.5


def test_every_weight_learns() -> None:
    m = moved(method(3))
    m(m.prepare(batch(3))).loss.backward()
    for name, parameter in m.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_only_a_is_distorted_and_it_is_restored_to_what_it_was() -> None:
    m, whole = method(), batch(count=3)
    pair = m.prepare(whole)
    crops = m.crops(whole)
    assert torch.equal(pair.fixed, crops[::2])
    assert torch.equal(pair.moving, crops[1::2])
    assert (pair.seen[:3] - pair.fixed).abs().amax((1, 2, 3)).min() > 0.01
    off = method(bezier=0, shuffle=0, inpaint=0).prepare(whole)
    assert torch.equal(off.seen[:3], off.fixed)
    assert not torch.equal(m.prepare(batch(count=3, iteration=2)).seen, pair.seen)


def test_a_step_is_one_graph() -> None:
    m = moved(method())
    pair = m.prepare(batch())
    expected = m(pair)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager", dynamic=False)
    found = compiled(pair)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, "window must be an odd int of at least 3, got 4"),
        ({"smooth": -1.0}, "smooth must be a weight of at least 0, got -1.0"),
        ({"restore": "much"}, "restore must be a weight of at least 0, got 'much'"),
        ({"smooth": True}, "smooth must be a weight of at least 0, got True"),
        ({"bezier": "often"}, "bezier must be a finite number, got 'often'"),
        ({"bezier": 1.5}, r"bezier must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        method(**options)


def test_a_crop_of_one_int_and_half_a_pair() -> None:
    m = GVSL(UNet(2, 1, (8, 8, 8)), crop=16)
    assert m.crop == (16, 16)
    with pytest.raises(InputError, match="a batch must hold pairs of images, got 3"):
        m.prepare(batch(count=2).first(3))


# --- fields -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.sampled_from([2, 3]))
def test_smoothness_and_determinant_of_a_linear_field(seed: int, n: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    size = [5, 7, 4][:n]
    slope = torch.randn(n, n, generator=draw, dtype=torch.float64)
    p = torch.stack(torch.meshgrid(*[torch.arange(s, dtype=torch.float64) for s in size], indexing="ij"), 0)
    dvf = torch.einsum("ij,j...->i...", slope, p)[None]
    determinant = torch.linalg.det(torch.eye(n, dtype=torch.float64) + slope)
    torch.testing.assert_close(jacobian_determinant(dvf), determinant.expand(1, *[s - 1 for s in size]))
    shares = torch.tensor([(s - 1) / s for s in size], dtype=torch.float64)
    torch.testing.assert_close(smoothness(dvf), ((slope**2) * shares).sum())
    assert smoothness(dvf + 3) == pytest.approx(float(smoothness(dvf)))


def test_a_fold_has_a_negative_determinant() -> None:
    dvf = torch.zeros(1, 2, 4, 4)
    dvf[0, 0, 1] = 3.0
    assert (jacobian_determinant(dvf)[0, 1] < 0).all()
    assert (jacobian_determinant(dvf)[0, 2] == 1).all()


# --- what it is for ---------------------------------------------------------------------------------------------------


def test_a_known_map_is_found() -> None:
    """An affine map by the affine head alone or with the other; a network of few weights, from scratch."""
    torch.manual_seed(0)
    moving = torch.from_numpy(phantom(2, 48, seed=3).image)[None, None].float()
    theta = compose_affine(
        torch.tensor([[pi / 30]]), torch.tensor([[1.08, 0.95]]), torch.zeros(1, 2), torch.tensor([[2.0, -3.0]])
    )
    truth = affine_dvf(theta, (48, 48))
    fixed = warp(moving, truth)
    m = GVSL(UNet(2, 1, (8, 16, 16, 16, 8)), crop=(48, 48), bezier=0, shuffle=0, inpaint=0)
    optimizer = torch.optim.Adam(m.parameters(), lr=2e-3)
    pair = Pair(torch.cat([fixed, moving]), fixed)
    for _ in range(60):
        optimizer.zero_grad()
        m(pair).loss.backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        optimizer.step()
    found = m.match(pair)
    body = (fixed > 0.05)[0, 0]
    error = torch.linalg.vector_norm(found.matched.dvf - truth, dim=1)[0][body].mean().item()
    still = torch.linalg.vector_norm(truth, dim=1)[0][body].mean().item()
    assert error < 0.35 * still, (error, still)
    assert ncc_loss(fixed, found.moved) < 0.6 * ncc_loss(fixed, moving)
