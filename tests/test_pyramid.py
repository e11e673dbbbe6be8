"""VPA: against the order the paper prints and against the reference definitions (SPEC 4)."""

import pytest
import torch
import torch.nn.functional as F
from strategies import assert_near, gradients, leaves, randn, refused

import coverfast.pyramid as module
from coverfast import VectorPyramid, compose, mov, reference, upsample_dvf, warp
from coverfast.pyramid import level_windows


def features(channels, coarse, batch=2, seed=0, dtype=torch.float64):
    """Maps of one view, coarse to fine."""
    return [
        randn(batch, c, *(s * 2**level for s in coarse), seed=seed + level, dtype=dtype)
        for level, c in enumerate(channels)
    ]


def build(ndim, channels=(12, 8, 5), groups=(3, 2, 1), head_dim=3, window=3, **options):
    torch.manual_seed(1)
    pyramid = VectorPyramid(ndim, channels, groups, head_dim, window, **options).double()
    for parameter in pyramid.parameters():  # biases and norms that differ from their start
        parameter.data += 0.3 * torch.randn_like(parameter)
    return pyramid


CASES = [(2, (3, 2), 3), (2, (2, 5), (3, 5)), (3, (2, 1, 3), 3)]


@pytest.mark.parametrize(("ndim", "coarse", "window"), CASES)
def test_equals_the_plain_order(ndim, coarse, window):
    # Warp the features, then project, as Eq. 8 reads; the library projects first and warps few channels.
    pyramid = build(ndim, window=window)
    a, b = features(pyramid.channels, coarse), features(pyramid.channels, coarse, seed=50)
    expected = []
    for f_a, f_b, project, groups in zip(a, b, pyramid.projections, pyramid.groups, strict=True):
        if expected:
            f_a = warp(f_a, upsample_dvf(expected[-1], f_a.shape[2:]))
        found = mov(project(f_b), project(f_a), window=window, groups=groups)
        expected.append(compose(found, expected[-1]) if expected else found)
    levels = pyramid(a, b, return_levels=True)
    assert len(levels) == 3
    for ours, plain, f in zip(levels, expected, a, strict=True):
        assert ours.shape == (2, ndim, *f.shape[2:])
        assert_near(ours, plain, atol=1e-9)
    assert torch.equal(pyramid(a, b), levels[-1])
    assert float(levels[-1].detach().abs().max()) > 1


@pytest.mark.parametrize(("ndim", "coarse", "window"), CASES)
def test_both_views_in_one_batch(ndim, coarse, window):
    """All of a before all of b: fields and gradients are those of two batches, and of the plain order."""
    pyramid = build(ndim, window=window)
    a, b = features(pyramid.channels, coarse), features(pyramid.channels, coarse, seed=50)
    apart = leaves(*a, *b)
    levels = pyramid(apart[:3], apart[3:], return_levels=True)
    stacked = leaves(*(torch.cat(pair) for pair in zip(a, b, strict=True)))
    together = pyramid(stacked, return_levels=True)
    for ours, theirs in zip(together, levels, strict=True):
        assert_near(ours, theirs)
    assert torch.equal(pyramid(stacked), together[-1])
    parameters = list(pyramid.parameters())
    ours, theirs = gradients(together[-1], [*stacked, *parameters]), gradients(levels[-1], [*apart, *parameters])
    for slope, of_a, of_b in zip(ours, theirs[:3], theirs[3:6], strict=False):
        assert_near(slope, torch.cat([of_a, of_b]))
    for slope, expected in zip(ours[3:], theirs[6:], strict=True):
        assert_near(slope, expected)
    # Where the views change places the field is another one.
    swapped = pyramid([torch.cat([y, x]) for x, y in zip(a, b, strict=True)])
    assert not torch.allclose(swapped, levels[-1], atol=0.1)
    assert_near(swapped, pyramid(b, a))
    with torch.no_grad():
        psi = None
        for both, project, groups in zip(stacked, pyramid.projections, pyramid.groups, strict=True):
            f_a, f_b = both.chunk(2)
            if psi is not None:
                f_a = warp(f_a, upsample_dvf(psi, f_a.shape[2:]))
            f_a, f_b = (project.norm(project.conv(f)) for f in (f_a, f_b))
            found = mov(f_b, f_a, window=window, groups=groups)
            psi = compose(found, psi) if psi is not None else found
        assert_near(together[-1].detach(), psi, atol=1e-9)


@pytest.mark.parametrize(("ndim", "coarse", "window"), CASES)
def test_equals_the_reference_definitions(ndim, coarse, window):
    pyramid = build(ndim, window=window)
    a, b = features(pyramid.channels, coarse), features(pyramid.channels, coarse, seed=50)
    widths = (window,) * ndim if isinstance(window, int) else window
    mode = "bilinear" if ndim == 2 else "trilinear"

    def project(x, level):
        weight, bias, gain, shift = pyramid.projections[level].parameters()
        x = torch.einsum("oi,bi...->bo...", weight.flatten(1), x) + bias.reshape(-1, *[1] * ndim)
        return F.group_norm(x, 1, gain, shift)

    psi = None
    for level, (f_a, f_b) in enumerate(zip(a, b, strict=True)):
        if psi is not None:
            psi = 2 * F.interpolate(psi, scale_factor=2, mode=mode, align_corners=False)
            f_a = reference.warp(f_a, psi, "linear", "zeros")
        found = reference.mov(project(f_b, level), project(f_a, level), widths, pyramid.groups[level], 3**-0.5)
        psi = found if psi is None else found + reference.warp(psi, found, "linear", "border")
    assert_near(pyramid(a, b), psi, atol=1e-9)
    assert_near(build(ndim, window=window, impl="reference")(a, b), psi, atol=1e-9)


@pytest.mark.parametrize(("ndim", "coarse"), [(2, (3, 2)), (3, (2, 1, 2))])
def test_gradients_reach_everything_and_equal_reference(ndim, coarse):
    results = []
    for impl in ("torch", "reference"):
        pyramid = build(ndim, impl=impl)
        a, b = features(pyramid.channels, coarse), features(pyramid.channels, coarse, seed=50)
        inputs = [*leaves(*a), *leaves(*b)]
        named = [*((f"map {i}", x) for i, x in enumerate(inputs)), *pyramid.named_parameters()]
        slopes = gradients(pyramid(inputs[:3], inputs[3:]), [x for _, x in named])
        for (name, _), slope in zip(named, slopes, strict=True):
            assert slope.isfinite().all(), name
            assert slope.any(), name
        results.append(slopes)
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs, atol=1e-8, rtol=1e-8)


def test_half_precision_features_give_a_float32_field():
    pyramid = build(2).bfloat16()
    a, b = (features(pyramid.channels, (2, 3), seed=s, dtype=torch.bfloat16) for s in (0, 50))
    assert all(level.dtype == torch.float32 for level in pyramid(a, b, return_levels=True))
    pyramid = pyramid.float()
    a, b = [x.float() for x in a], [x.float() for x in b]
    with torch.autocast("cpu", torch.bfloat16):
        cast = pyramid(a, b)
    assert cast.dtype == torch.float32
    assert cast.isfinite().all()


def test_autocast_matches_in_low_precision_and_gives_a_float32_field(monkeypatch):
    dtypes = []

    def spy(q, k, **options):
        dtypes.extend((q.dtype, k.dtype))
        return mov(q, k, **options)

    monkeypatch.setattr(module, "mov", spy)
    pyramid = VectorPyramid(2, (8, 4), (2, 1), 4, 3)
    for projection in pyramid.projections:  # as autocast does on a GPU: norms in float32
        projection.norm.register_forward_hook(lambda norm, inputs, out: out.float())
    maps = [randn(1, c, s, s, dtype=torch.float32) for c, s in ((8, 4), (4, 8))]
    with torch.autocast("cpu", torch.bfloat16):
        psi = pyramid(maps, maps)
    assert dtypes == [torch.bfloat16] * 4
    assert psi.dtype == torch.float32


def test_defaults():
    for ndim, window, reach in ((2, 7, 93), (3, 5, 62)):
        pyramid = VectorPyramid(ndim, (512, 256, 128, 64, 32))
        assert pyramid.windows == [(window,) * ndim] * 5
        assert pyramid.reach == (reach,) * ndim
        assert pyramid.groups == (4, 4, 4, 1, 1)
        assert [p.conv.out_channels for p in pyramid.projections] == [32, 32, 32, 8, 8]
        assert all(p.norm.num_groups == 1 and p.conv.bias is not None for p in pyramid.projections)


def test_forms_of_the_window():
    assert level_windows(5, 2, 3) == [(5, 5)] * 3
    assert level_windows((3, 5), 2, 3) == [(3, 5)] * 3
    assert level_windows((3, 5, 7), 2, 3) == [(3, 3), (5, 5), (7, 7)]
    assert level_windows([(3, 5), 7, 1], 2, 3) == [(3, 5), (7, 7), (1, 1)]
    assert level_windows((3, 5, 7), 3, 3) == [(3, 5, 7)] * 3
    assert level_windows([(3, 3, 3), (5, 5, 5), (7, 7, 7)], 3, 3) == [(3,) * 3, (5,) * 3, (7,) * 3]
    assert build(2, window=[(3, 5), 7, 1]).reach == (4 * 1 + 2 * 3, 4 * 2 + 2 * 3)


def test_no_field_beyond_the_reach():
    pyramid = build(2, window=[3, 5, 3])
    a, b = features(pyramid.channels, (4, 4)), features(pyramid.channels, (4, 4), seed=9)
    assert pyramid.reach == (9, 9)
    assert 3 < float(pyramid([30 * x for x in a], [30 * x for x in b]).detach().abs().max()) <= 9 + 1e-9


def test_one_level():
    pyramid = build(2, (6,), (2,))
    a, b = randn(1, 6, 5, 7), randn(1, 6, 5, 7, seed=1)
    project = pyramid.projections[0]
    assert_near(pyramid([a], [b]), mov(project(b), project(a), window=3, groups=2))


def test_refusals():
    pyramid = build(2)
    a = features(pyramid.channels, (3, 2))
    with refused("features_a", "3 maps", "2"):
        pyramid(a[1:], a)
    with refused("features_b", "3 maps", "4"):
        pyramid(a, [*a, a[0]])
    with refused("features_a[1]", "(B, 8, *S)", "(2, 12, 3, 2)"):
        pyramid([a[0], a[0], a[2]], a)
    with refused("features_a[0]", "2 spatial axes"):
        pyramid([x[..., None] for x in a], [x[..., None] for x in a])
    with refused("features_a", "both views", "3"):
        pyramid([x[[0, 1, 1]] for x in a])
    with refused("features_b[2]", "shape of features_a[2]"):
        pyramid(a, [*a[:2], a[2][..., 1:]])
    with refused("features_b[0]", "dtype of features_a[0]"):
        pyramid(a, [x.float() for x in a])
    odd = [a[0], a[1][..., :3], a[2]]
    with refused("features_a[1]", "twice", "(3, 2)", "(6, 3)", "divisible by 4"):
        pyramid(odd, odd)
    for window in (4, (3, 4), (3, 5, 7, 9), [(3, 3), 5], 2.5, "7", 0, [3, 5, 6]):
        with refused("window"):
            build(2, window=window)
    for groups in ((3, 2), (3, 2, 0), (3, 2, 1, 1)):
        with refused("groups", str(groups)):
            build(2, groups=groups)
    with refused("ndim", "4"):
        build(4)
    with refused("head_dim", "0"):
        build(2, head_dim=0)
    with refused("channels"):
        build(2, channels=(), groups=())
    with refused("impl", "cuda"):
        build(2, impl="cuda")(a, a)
