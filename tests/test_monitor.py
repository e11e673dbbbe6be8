"""What a look into training tells: by its definitions, without waiting for the device, leaving no trace in training."""

import json
from itertools import product
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_near, dvfs, laid_out, randn, refused, sizes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coverfast import AffineDVF, Cover, UNet, VectorPyramid, inside_mask, upsample_dvf
from coverfast.dispersion import dispersion, effective_rank
from coverfast.geometry import downsample_dvf
from coverfast.methods import Batch, cover_monitor, sampling
from coverfast.methods.cover import Matched
from coverfast.views import Views

# --- the field of a coarser level ---------------------------------------------------------------------------------


def blocks(size):
    """Every coarse pixel with the fine pixels it covers."""
    for c in product(*(range(s // 2) for s in size)):
        yield c, [tuple(2 * i + bit for i, bit in zip(c, bits, strict=True)) for bits in product((0, 1), repeat=len(c))]


def halved(dvf, mask):
    """The definition: the mean of what a coarse pixel covers, halved, where all of it counts."""
    n, size = dvf.ndim - 2, dvf.shape[2:]
    coarse = dvf.new_zeros(len(dvf), n, *(s // 2 for s in size))
    counts = mask.new_zeros(len(dvf), 1, *(s // 2 for s in size))
    for b in range(len(dvf)):
        for c, fine in blocks(size):
            coarse[(b, slice(None), *c)] = sum(dvf[(b, slice(None), *p)] for p in fine) / 2**n / 2
            counts[(b, 0, *c)] = all(bool(mask[(b, 0, *p)]) for p in fine)
    return coarse, counts


@given(st.sampled_from((2, 3)), st.data())
def test_a_field_and_its_mask_on_a_coarser_grid(n, data):
    size = tuple(2 * s for s in data.draw(sizes(n, 3)))
    dvf, mask = data.draw(dvfs(2, size)), randn(2, 1, *size, seed=data.draw(st.integers(0, 99))) > -1.2
    coarse, counts = downsample_dvf(dvf, mask)
    expected = halved(dvf, mask)
    assert_near(coarse, expected[0])
    assert torch.equal(counts, expected[1])


def test_down_undoes_up_for_affine_fields_and_keeps_float32():
    theta = torch.tensor([[[1.2, 0.1, 2.0], [-0.3, 0.8, -1.0]]], dtype=torch.float64)
    field = AffineDVF(theta, (8, 6)).dense()
    up = upsample_dvf(field, (16, 12))
    down, _ = downsample_dvf(up, torch.ones_like(up[:, :1], dtype=torch.bool))
    assert_near(down[..., 1:-1, 1:-1], field[..., 1:-1, 1:-1])
    assert (
        downsample_dvf(torch.zeros(1, 3, 2, 2, 4), torch.ones(1, 1, 2, 2, 4, dtype=torch.bool))[0].dtype
        == torch.float32
    )


def test_what_does_not_count_may_be_anything():
    dvf, mask = torch.ones(1, 2, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    dvf[0, :, 0, 0], mask[0, 0, 0, 0] = torch.nan, False
    coarse, counts = downsample_dvf(dvf, mask)
    assert counts.flatten().tolist() == [False, True, True, True]
    assert (coarse.movedim(1, -1)[counts[:, 0]] == 0.5).all()


def test_refusals_of_a_coarser_grid():
    with refused("dvf", "even", "(4, 5)"):
        downsample_dvf(torch.zeros(1, 2, 4, 5), torch.ones(1, 1, 4, 5, dtype=torch.bool))
    with refused("mask", "(4, 4)"):
        downsample_dvf(torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 2, dtype=torch.bool))


# --- by the definitions -------------------------------------------------------------------------------------------

LEVELS, CHANNELS, WINDOW = 3, (12, 8, 6), 3


def looker(ndim):
    """A method that need not match anything."""
    return Cover(torch.nn.Identity(), VectorPyramid(ndim, CHANNELS, (1, 1, 1), 4, WINDOW), crop=8)


def matched(ndim, size, *, batch=2, seed=0, shown="inside", target=None, dtype=torch.float32, layout="contiguous"):
    """Made-up views, fields and features."""
    if target is None:
        shift = 3 * randn(batch, ndim, 1, seed=seed, dtype=torch.float32)
        turn = torch.eye(ndim) + 0.2 * randn(batch, ndim, ndim, seed=seed + 1, dtype=torch.float32)
        target = AffineDVF(torch.cat([turn, shift], 2), size)
    levels, features = [], []
    for level, c in enumerate(CHANNELS):
        here = tuple(s // 2 ** (LEVELS - 1 - level) for s in size)
        levels.append(2 * randn(batch, ndim, *here, seed=seed + 2 + level, dtype=torch.float32))
        features.append(laid_out(randn(2 * batch, c, *here, seed=seed + 9 + level, dtype=dtype), layout))
    # Parts of both channels vary by less than the threshold.
    pair = torch.rand(2 * batch, 2, *size, generator=torch.Generator().manual_seed(seed)) - 0.7
    for part in (pair[:, 0, ..., : size[-1] // 2], pair[:, 1, : size[0] * 3 // 4]):
        part.mul_(0.019).sub_(0.5)
    return Matched(Views(pair, target, shown), levels, features)


def told(method, what, iteration=1):
    found = method.monitor(what.views, (what.levels, what.features), iteration)
    return method.monitored({name: value.numpy() for name, value in found.items()})


CASES = [(2, (16, 24)), (3, (8, 12, 16))]


@pytest.mark.parametrize("shown", ["inside", "given"])
@pytest.mark.parametrize(("ndim", "size"), CASES, ids=str)
def test_errors_by_their_definition(ndim, size, shown):
    given_mask = randn(2, 1, *size, seed=5) > -1.5 if shown == "given" else "inside"
    what = matched(ndim, size, shown=given_mask)
    found = told(looker(ndim), what)
    truth, mask = what.views.dvf.double(), what.views.mask
    for level in reversed(range(LEVELS)):
        off, still, count = 0.0, 0.0, 0
        for b, *p in mask[:, 0].nonzero().tolist():
            at = (b, slice(None), *p)
            off += float((what.levels[level][at].double() - truth[at]).square().sum().sqrt())
            still += float(truth[at].square().sum().sqrt())
            count += 1
        assert 0 < count < mask.numel()
        assert found[f"epe_{level}"] == pytest.approx(off / count, rel=1e-5)
        assert found[f"ratio_{level}"] == pytest.approx(off / still, rel=1e-5)
        truth, mask = halved(truth, mask)


@pytest.mark.parametrize(("ndim", "size"), CASES, ids=str)
def test_out_of_reach_by_its_definition(ndim, size):
    method, what = looker(ndim), matched(ndim, size)
    method.pyramid.windows = [(3, 5, 3)[:ndim], (1,) * ndim, (1,) * ndim]
    reach = method.pyramid.reach
    assert reach == (4, 8, 4)[:ndim]
    mask = what.views.mask[:, 0]
    rows = what.views.dvf.movedim(1, -1)[mask].tolist()
    beyond = sum(any(abs(v) > r for v, r in zip(row, reach, strict=True)) for row in rows)
    assert 0 < beyond < len(rows)
    assert told(method, what)["beyond_reach"] == pytest.approx(beyond / len(rows), abs=1e-12)


def background(image, mask, radius):
    """Share of the counting pixels around which no channel differs by the threshold or more, pixel by pixel."""
    flat = count = 0
    for b, *p in mask[:, 0].nonzero().tolist():
        box = [range(max(0, i - radius), min(s, i + radius + 1)) for i, s in zip(p, mask.shape[2:], strict=True)]
        near = [image[(b, slice(None), *q)] for q in product(*box) if mask[(b, 0, *q)]]
        near = torch.stack(near)
        flat += bool(((near.amax(0) - near.amin(0)) < cover_monitor.FLAT).all())
        count += 1
    return flat / count


@pytest.mark.parametrize(("ndim", "size"), CASES, ids=str)
def test_background_by_its_definition(ndim, size):
    what = matched(ndim, size, seed=3)
    expected = background(what.views.x_b, what.views.mask, WINDOW // 2)
    assert 0.1 < expected < 0.9
    assert told(looker(ndim), what)["background"] == pytest.approx(expected, abs=1e-12)


def test_zeros_beyond_the_image_are_neither_background_nor_an_edge():
    # The upper half of view b lies beyond the image: zeros that do not count. The rest is flat and bright.
    size = (16, 16)
    shown = torch.ones(1, 1, *size, dtype=torch.bool)
    shown[..., :8, :] = False
    what = matched(2, size, batch=1, shown=shown)
    what.views.x_b.copy_(0.8 * shown)
    assert told(looker(2), what)["background"] == 1
    what.views.x_b[..., 8:, :] += 0.1 * torch.rand(1, 2, 8, 16)
    assert told(looker(2), what)["background"] < 0.1


def test_a_window_larger_than_the_view():
    method = looker(2)
    method.pyramid.windows = [(99, 99)] * LEVELS
    assert told(method, matched(2, (8, 12)))["background"] == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("ndim", "size"), CASES, ids=str)
def test_dispersion_is_that_of_view_b_where_both_pixels_count(ndim, size, dtype, layout):
    what = matched(ndim, size, dtype=dtype, layout=layout)
    # Features that name their pixel: sample, then position; those of view a are of another sign.
    here = torch.meshgrid(*(torch.arange(s).float() for s in size), indexing="ij")
    names = torch.stack([torch.stack([torch.full(size, b), *here]) for b in (-2.0, -3.0, 0.0, 1.0)])
    what.features[-1][:, : ndim + 1] = names.to(dtype)
    method = looker(ndim)
    found = cover_monitor.look(method, what, 7)
    assert found["samples"].dtype == found["coarse"].dtype == torch.float32
    at, beside = (found[name][:, : ndim + 1].long() for name in ("samples", "neighbours"))
    mask = what.views.mask
    for row, (p, q) in enumerate(zip(at.tolist(), beside.tolist(), strict=True)):
        away = [abs(i - j) for i, j in zip(p, q, strict=True)]
        assert away[0] == 0
        assert sum(away) == 1
        assert torch.equal(found["samples"][row], what.features[-1][2:][(p[0], slice(None), *p[1:])].float())
        assert torch.equal(found["neighbours"][row], what.features[-1][2:][(q[0], slice(None), *q[1:])].float())
        assert bool(found["counts"][row]) == bool(mask[(p[0], 0, *p[1:])] and mask[(q[0], 0, *q[1:])])
    steps = (beside - at).abs().sum(0)[1:]
    assert steps.max() - steps.min() <= 1  # the axes take turns
    counts = found["counts"].numpy()
    assert 0.1 < counts.mean() < 0.95
    out = method.monitored({name: value.numpy() for name, value in found.items()})
    expected = dispersion(found["samples"].numpy()[counts], found["neighbours"].numpy()[counts])
    assert {name: out[name] for name in expected} == expected
    coarse = {tuple(row) for row in what.features[0][2:].float().movedim(1, -1).flatten(0, -2).tolist()}
    assert {tuple(row) for row in found["coarse"].tolist()} == coarse
    assert out["rank_coarse"] == effective_rank(found["coarse"].numpy())


@pytest.mark.parametrize("size", [(384, 256), (48, 64, 80)], ids=str)
def test_pixels_lie_evenly_and_change_with_the_iteration(size):
    rows, seen = torch.empty(4, *size, 0), set()
    for iteration in (1, 50, 2**32 - 1):
        points = torch.stack(sampling.some_pixels(iteration, rows), 1)
        assert torch.equal(torch.bincount(points[:, 0]), torch.full((4,), 256))
        # As many in every eighth of every axis as there should be, a few more or fewer.
        for axis, s in enumerate(size, start=1):
            counted = torch.bincount(points[:, axis] * 8 // s, minlength=8)
            assert len(counted) == 8
            assert (counted - 128).abs().max() < 16
        found = {tuple(p) for p in points.tolist()}
        assert len(found) == 1024
        assert len(found & seen) < 200
        seen |= found


def test_a_grid_of_single_pixels_has_neighbours_where_there_are_any():
    at = tuple(torch.tensor(v) for v in ([0, 0, 0], [0, 0, 0], [0, 3, 4], [0, 0, 0]))
    beside = sampling.beside(at, (1, 5, 1))
    assert [b.tolist() for b in beside] == [[0, 0, 0], [0, 0, 0], [1, 4, 3], [0, 0, 0]]
    assert [b.tolist() for b in sampling.beside(at, (1, 1, 1))] == [a.tolist() for a in at]


def test_nothing_counts():
    found = told(looker(2), matched(2, (16, 24), shown=torch.zeros(2, 1, 16, 24, dtype=torch.bool)))
    assert found.pop("rank_coarse") > 1
    for name, value in found.items():
        assert value == 0 if name.startswith("epe") else np.isnan(value), name


def test_names_and_types():
    found = told(looker(2), matched(2, (16, 24)))
    assert list(found) == [
        *(f"{name}_{level}" for name in ("epe", "ratio") for level in range(LEVELS)),
        *("beyond_reach", "background", "cos_random", "cos_random_std", "cos_near", "cos_near_std"),
        *("rank", "rank_coarse"),
    ]
    assert all(type(value) is float for value in found.values())
    assert json.loads(json.dumps(found)) == found


# --- in training --------------------------------------------------------------------------------------------------


def training(ndim):
    torch.manual_seed(3)
    unet = UNet(ndim, 1, (8, 16, 24, 16, 8))
    pyramid = VectorPyramid(ndim, unet.feature_channels, (2, 2, 1), 4, 3)
    cover = Cover(unet, pyramid, crop=(24, 16, 12)[:ndim])
    return cover, torch.optim.Adam(cover.parameters(), lr=1e-3)


def batch(ndim, iteration=1, count=2):
    size = (30, 24, 20)[:ndim]
    images = torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(0))
    corner = torch.zeros(count, ndim, dtype=torch.long)
    return Batch(images, torch.tensor([size] * count), corner, torch.arange(count), 4, iteration)


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_finest_level_is_what_the_method_tells(ndim):
    cover, _ = training(ndim)
    views = cover.prepare(batch(ndim))
    out = cover(views)
    figures = cover.figures({name: float(value) for name, value in out.sums.items()})
    found = cover.monitor(views, out.seen, 1)
    told = cover.monitored({name: value.numpy() for name, value in found.items()})
    assert 0 < figures["mask"] < 1
    assert told["epe_2"] == pytest.approx(figures["epe"], rel=1e-12)
    assert told["ratio_2"] == pytest.approx(figures["epe_ratio"], rel=1e-12)


@pytest.mark.parametrize("ndim", [2, 3])
def test_training_is_the_same_to_the_bit_with_and_without_a_look(ndim):
    ends = []
    for looks in (False, True):
        cover, optimiser = training(ndim)
        for iteration in (1, 2, 3):
            views = cover.prepare(batch(ndim, iteration))
            out = cover(views)
            if looks:
                before = [x.clone() for x in (views.pair, *out.seen[0], *out.seen[1])]
                cover.monitor(views, out.seen, iteration)
                assert all(map(torch.equal, before, (views.pair, *out.seen[0], *out.seen[1])))
            optimiser.zero_grad()
            out.loss.backward()
            optimiser.step()
        ends.append([torch.get_rng_state(), *(p.detach() for p in cover.parameters())])
    assert all(map(torch.equal, *ends))


def test_autocast_changes_nothing():
    what = matched(2, (16, 24), dtype=torch.bfloat16)
    plain = told(looker(2), what)
    with torch.autocast("cpu", torch.bfloat16):
        assert told(looker(2), what) == plain


class Watch(TorchDispatchMode):
    """Refuses what makes a device wait, and notes the sizes of what is written anew."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "linalg", "item")

    def __init__(self):
        super().__init__()
        self.largest, self.called = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert not any(word in name for word in self.waits), name
        if "index" in name:
            assert all(i is None or i.dtype == torch.int64 for i in args[1]), "an index of bools is a nonzero"
        out = func(*args, **(kwargs or {}))
        devices = {x.device for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        assert len(devices) == 1, f"{name} between host and device"
        self.called.append(name)
        owned = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in owned:
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("dense", [False, True], ids=["affine", "dense"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_a_look_never_waits_for_the_device(ndim, dense):
    size, method = (48, 40, 32)[:ndim], looker(ndim)
    what = matched(ndim, size, dtype=torch.bfloat16)
    if dense:
        views = Views(what.views.pair, what.views.dvf, inside_mask(what.views.dvf))
        what = Matched(views, *what[1:])
    with Watch() as watch:
        cover_monitor.look(method, what, 5)
    assert "aten::index.Tensor" in watch.called
    # Nothing larger than the field; the feature maps are never written anew.
    assert watch.largest <= max(2, ndim) * 2 * prod(size)


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_look_on_another_device_brings_nothing_from_the_host(ndim):
    # Fake tensors of another device: an operation on both devices, or one whose result is to be read, is an error.
    size, method = (16, 24, 32)[:ndim], looker(ndim)
    real = matched(ndim, size, dtype=torch.bfloat16)
    with FakeTensorMode():

        def there(x):
            return torch.empty(x.shape, dtype=x.dtype, device="meta")

        target = AffineDVF.of(there(real.views.target.numbers), size)
        levels, features = ([there(x) for x in given] for given in real[1:])
        what = Matched(Views(there(real.views.pair), target, "inside"), levels, features)
        with Watch():
            found = cover_monitor.look(method, what, 5)
        with pytest.raises(Exception, match=r"device"):
            found["errors"] + torch.zeros(LEVELS, 3)
        with pytest.raises(Exception, match=r"_local_scalar_dense"):
            found["beyond"].item()
    assert {value.device.type for value in found.values()} == {"meta"}
    assert sum(value.numel() for value in found.values()) <= 4 * 2**10 * max(CHANNELS)


@pytest.mark.gpu
@pytest.mark.parametrize("ndim", [2, 3])
def test_a_look_on_a_gpu_waits_for_nothing_and_sees_the_same(ndim):
    method, what = looker(ndim), matched(ndim, (32, 48, 64)[:ndim], dtype=torch.bfloat16)
    target = what.views.target.to("cuda")
    views = Views(what.views.pair.cuda(), target, "inside")
    there = Matched(views, [x.cuda() for x in what.levels], [x.cuda() for x in what.features])
    cover_monitor.look(method, there, 5)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = cover_monitor.look(method, there, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in cover_monitor.look(method, what, 5).items():
        here = found[name].cpu()
        assert torch.allclose(here, value, rtol=1e-3) if name == "errors" else torch.equal(here, value), name
