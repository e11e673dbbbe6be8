"""The pyramid and the method with every op in Triton, on the GPU or in its interpreter; unwritten memory is NaN."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from strategies import assert_near, gradients, leaves, randn
from torch import Tensor

pytest.importorskip("triton")

from coverfast import Cover, UNet, VectorPyramid, ViewSettings, upsample_dvf, warp
from coverfast.kernels import INTERPRETED
from coverfast.kernels.launch import Launch, override
from coverfast.methods import Batch
from coverfast.ops.compose import compose
from coverfast.ops.losses import field_errors
from coverfast.ops.mov import mov

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU (test_interpreter.py runs these without one)", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned")

#: Axes, size of the coarsest level, channels and groups, coarse to fine.
FLAT = (2, (2, 2), (4, 5), (2, 1))
DEEP = (2, (1, 2), (4, 6, 5), (2, 3, 1))
SOLID = (3, (1, 1, 2), (4, 5), (2, 1))
SCATTERS = ("warp_backward_kernel", "compose_backward_kernel")


def build(ndim: int, channels: tuple[int, ...], groups: tuple[int, ...], device: str, impl: str) -> VectorPyramid:
    """The same numbers whatever the implementation; biases and norms that differ from their start."""
    torch.manual_seed(1)
    pyramid = VectorPyramid(ndim, channels, groups, 3, 3, impl=impl).double()
    for parameter in pyramid.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return pyramid.to(device)


def both_views(coarse: tuple[int, ...], channels: tuple[int, ...], device: str, images: int = 1) -> list[Tensor]:
    """Maps `(2 B, C, *S)`: views a before views b."""
    sizes = (tuple(s * 2**level for s in coarse) for level in range(len(channels)))
    return [
        randn(2 * images, c, *size, seed=level).to(device)
        for level, (c, size) in enumerate(zip(channels, sizes, strict=True))
    ]


def results(shape, device: str, impl: str, *, apart: bool = False) -> list[Tensor]:
    """The field of every level, gradients of the maps (both views as one) and of the parameters."""
    ndim, coarse, channels, groups = shape
    pyramid = build(ndim, channels, groups, device, impl)
    maps = leaves(*both_views(coarse, channels, device))
    halves = [x.chunk(2) for x in maps]
    given = ([a for a, _ in halves], [b for _, b in halves]) if apart else (maps,)
    levels = pyramid(*given, return_levels=True)
    return [*(x.detach() for x in levels), *gradients(levels[-1], [*maps, *pyramid.parameters()])]


def assert_all_near(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().all()
        assert_near(a, b, atol=tolerance, rtol=tolerance)


def named(launches: list[Launch]) -> Counter:
    return Counter(launch.kernel.__name__.removesuffix("_kernel") for launch in launches)


def forward_launches(levels: int) -> dict[str, int]:
    """Of a head, 7 a level: queries' and keys' norms in two passes, a match; a warp and a fusion but for the first."""
    norms = {"norm_moments": 2 * levels, "norm_apply": 2 * levels}
    return norms | {"mov_forward": levels, "warp_forward": levels - 1, "compose_forward": levels - 1}


def backward_launches(levels: int) -> dict[str, int]:
    """Of a head, 12 a level: both norms in three passes, queries and keys of the match; but for the first level the
    scatters of the warp and the fusion, each with its sum onto the coarser grid.
    """
    below = levels - 1
    norms = dict.fromkeys(("norm_sums", "norm_backward", "norm_parameters"), 2 * levels)
    fields = {"warp_backward": below, "compose_backward": below, "upsample_backward": 2 * below}
    return norms | {"mov_dq": levels, "mov_dk": levels} | fields


@pytest.mark.parametrize(
    ("shape", "apart", "fixed"),
    [(FLAT, False, False), (FLAT, True, True), (SOLID, False, False)],
    ids=["2D", "2D in two batches and in fixed point", "3D"],
)
def test_equals_torch_in_19_launches_a_level_less_6(shape, apart, fixed, device, launches):
    with override(deterministic=int(fixed)):
        ours = results(shape, device, "triton", apart=apart)
    levels = len(shape[2])
    assert named(launches) == forward_launches(levels) | backward_launches(levels)
    assert len(launches) == 19 * levels - 6
    scatters = [launch for launch in launches if launch.kernel.__name__ in SCATTERS]
    assert [launch.constants["FIXED"] for launch in scatters] == [fixed] * (2 * (levels - 1))
    launches.clear()
    assert_all_near(ours, results(shape, device, "torch"))
    assert not launches


def test_the_fields_of_three_levels(device, launches):
    ndim, coarse, channels, groups = DEEP
    maps, found = both_views(coarse, channels, device, images=2), []
    with torch.no_grad():
        for impl in ("triton", "torch"):
            found.append(build(ndim, channels, groups, device, impl)(maps, return_levels=True))
    assert named(launches) == forward_launches(3)
    assert_all_near(*found)
    # As the paper reads: warp all channels, then project them, bias and all.
    pyramid, plain = build(ndim, channels, groups, device, "torch"), []
    with torch.no_grad():
        for both, project, j in zip(maps, pyramid.projections, groups, strict=True):
            a, b = both.chunk(2)
            if plain:
                a = warp(a, upsample_dvf(plain[-1], a.shape[2:]))
            a, b = (project.norm(project.conv(x)) for x in (a, b))
            match = mov(b, a, window=3, groups=j)
            plain.append(compose(match, plain[-1]) if plain else match)
    assert_all_near(found[0], plain)


def test_the_keys_are_read_in_rows_and_the_coarse_field_where_it_is(device, launches):
    """No copy between the ops: the warp takes the coarse field, each match takes maps that are channels-last."""
    ndim, coarse, channels, groups = FLAT
    with torch.no_grad():
        levels = build(ndim, channels, groups, device, "triton")(
            both_views(coarse, channels, device), return_levels=True
        )
    assert named(launches) == forward_launches(2)
    by_name = {name: [launch for launch in launches if name in launch.kernel.__name__] for name in named(launches)}
    (first, second), (warped,), (fused,) = (by_name[f"{name}_forward"] for name in ("mov", "warp", "compose"))
    assert warped.constants["FIELD"] == "coarse"
    coarse_field = first.arguments["out"].data_ptr()
    assert coarse_field == levels[0].data_ptr()
    assert coarse_field == warped.arguments["field"].data_ptr() == fused.arguments["coarse"].data_ptr()
    assert fused.arguments["fine"].data_ptr() == second.arguments["out"].data_ptr()
    written = {launch.arguments["y"].data_ptr() for launch in by_name["norm_apply"]}
    read = {match.arguments[name].data_ptr() for match in (first, second) for name in ("q", "k")}
    assert read <= written


def test_one_graph(device, launches):
    torch.compiler.reset()
    ndim, coarse, channels, groups = FLAT
    found = []
    for impl in ("triton", "torch"):
        pyramid = build(ndim, channels, groups, device, impl)
        run = torch.compile(pyramid, fullgraph=True, backend="aot_eager") if impl == "triton" else pyramid
        maps = leaves(*both_views(coarse, channels, device))
        psi = run(maps)
        found.append([psi.detach(), *gradients(psi, [*maps, *pyramid.parameters()])])
    assert len(launches) == 19 * 2 - 6
    assert_all_near(*found)
    torch.compiler.reset()


# --- the method -------------------------------------------------------------------------------------------------------


def method(ndim: int, crop, device: str, impl: str, **options: object) -> Cover:
    torch.manual_seed(3)
    unet = UNet(ndim, 1, (8, 8, 8))
    pyramid = VectorPyramid(ndim, unet.feature_channels, (2, 1), 4, 3, impl=impl)
    return Cover(unet, pyramid, crop=crop, impl=impl, **options).to(device)


def batch(*size: int, count: int, device: str) -> Batch:
    images = torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(0))
    return Batch(
        images.to(device),
        torch.tensor([size] * count),
        torch.zeros(count, len(size), dtype=torch.long),
        torch.arange(count),
        4,
        7,
    )


CALM = ViewSettings(strength=0.3)
#: Axes, images, crop, how many.
METHODS = {"2D": (2, (9, 14), (4, 8), 1), "3D": (3, (3, 4, 6), (2, 2, 4), 1)}


def means(cover, batch):
    """The loss, and means over the pixels that count."""
    out = cover(cover.prepare(batch))
    count = out.sums["count"].clamp(min=1)
    return {"loss": out.loss} | {name: value / count for name, value in out.sums.items()}


def assert_same_figures(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, value in theirs.items():
        assert value.isfinite(), name
        assert ours[name].requires_grad == value.requires_grad, name
        assert_near(ours[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", list(METHODS))
def test_losses_and_gradients_of_the_method_equal_torch(name, device, launches, monkeypatch):
    """Four launches of the views, 32 of a head of two levels, a forward and a backward of each loss; no dense field."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    ndim, size, crop, count = METHODS[name]
    found = []
    for impl in ("triton", "torch"):
        cover = method(ndim, crop, device, impl, settings=CALM)
        with override(deterministic=0):
            out = means(cover, batch(*size, count=count, device=device))
            out["loss"].backward()
        found.append((out, [p.grad for p in cover.parameters()]))
    assert len(launches) == 4 + 32 + 2 * 2
    for constant, kinds in (("FIELD", {"affine", "coarse"}), ("MASK", {"inside"})):
        assert {launch.constants.get(constant) for launch in launches} == kinds | {None}
    (ours, slopes), (theirs, others) = found
    assert_same_figures(ours, theirs)
    largest = max(float(g.abs().max()) for g in others)
    for a, b in zip(slopes, others, strict=True):
        assert b.any()
        assert float((a - b).abs().max()) < 1e-4 * largest


@pytest.mark.parametrize(
    ("size", "options", "field", "mask"),
    [
        ((9, 14), {"settings": replace(CALM, elastic=2.0, blur=0.3)}, "dense", "inside"),
        ((3, 14), {"settings": CALM, "pad": True}, "affine", "tensor"),
    ],
    ids=["elastic", "padded"],
)
@torch.no_grad()
def test_elastic_targets_and_padded_crops(size, options, field, mask, device, launches, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    seen = batch(*size, count=1, device=device)
    found = [means(method(2, (4, 8), device, impl, **options), seen) for impl in ("triton", "torch")]
    losses = launches[-2:]
    assert [launch.kernel.__name__ for launch in losses] == [
        "field_errors_forward_kernel",
        "consistency_forward_kernel",
    ]
    assert [launch.constants["FIELD"] for launch in losses] == [field] * 2
    assert [launch.constants["MASK"] for launch in losses] == [mask] * 2
    assert_same_figures(*found)


@pytest.mark.parametrize("mask", ["inside", "some", None])
def test_figures_of_a_field(mask, device):
    """Loss, end-point errors and the share of pixels, against the words that define them."""
    pred, target = (randn(2, 2, 3, 4, seed=i).to(device) for i in (1, 2))
    p = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")).to(device) + target
    last = torch.tensor([2, 3], device=device).view(2, 1, 1)
    eps = {
        "inside": ((p >= 0) & (p <= last)).all(1, keepdim=True),
        "some": randn(2, 1, 3, 4, seed=3).to(device) > 0,
        None: torch.ones_like(target[:, :1], dtype=torch.bool),
    }[mask]
    found = field_errors(pred, target, eps if mask == "some" else mask, impl="triton")
    assert eps.any()
    where = eps.expand_as(pred)
    gap, still = (torch.where(where, x, 0) for x in (pred - target, target))
    expected = (gap.abs().sum(), gap.norm(dim=1).sum(), still.norm(dim=1).sum())
    for ours, total in zip(found[:3], expected, strict=True):
        assert_near(ours, total / eps.sum())
    assert_near(found.mask, eps.double().mean())


# --- on a GPU alone ---------------------------------------------------------------------------------------------------


#: Five levels, as the paper has them.
PAPER = {
    "2D": (2, (6, 8), (512, 256, 128, 64, 32), (4, 4, 4, 1, 1)),
    "3D": (3, (2, 3, 2), (512, 256, 128, 64, 32), (4, 4, 4, 1, 1)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("fixed", [False, True], ids=["any order", "fixed point"])
@pytest.mark.parametrize("name", list(PAPER))
def test_five_levels(name, fixed, device, launches):
    with override(deterministic=int(fixed)):
        ours = results(PAPER[name], device, "triton")
    assert len(launches) == 19 * 5 - 6
    theirs = results(PAPER[name], device, "torch")
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, atol=1e-7 * float(b.abs().max()), rtol=1e-7)


def step(cover: Cover, of: Batch) -> list[Tensor]:
    """Figures and gradients of a step."""
    cover.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        out = means(cover, of)
    out["loss"].backward()
    return [*(x.detach() for x in out.values()), *(p.grad for p in cover.parameters())]


@pytest.mark.gpu
@pytest.mark.parametrize(("ndim", "size"), [(2, (80, 72)), (3, (40, 36, 34))], ids=["2D", "3D"])
def test_a_step_never_makes_the_host_wait(ndim, size, device):
    torch.use_deterministic_algorithms(False)  # torch's own sums in one order look at what they add
    cover, of = method(ndim, 32, device, "auto"), batch(*size, count=2, device=device)
    step(cover, of)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(cover, of)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.isfinite().all() for x in found)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(PAPER))
def test_the_same_bits_on_every_run_in_fixed_point(name, autocast, device):
    ndim, coarse, channels, groups = PAPER[name]
    pyramid = build(ndim, channels, groups, device, "auto").float()
    found = []
    for _ in range(3):
        maps = leaves(*(x.float() for x in both_views(coarse, channels, device)))
        with override(deterministic=1), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            psi = pyramid(maps)
            found.append([psi.detach(), *gradients(psi, [*maps, *pyramid.parameters()])])
    assert found[0][0].dtype == torch.float32
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize(("ndim", "size", "crop"), [(2, (80, 72), 64), (3, (40, 36, 34), 32)], ids=["2D", "3D"])
def test_the_method_on_the_gpu_is_that_on_the_cpu(ndim, size, crop, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found = []
    for where in (device, "cpu"):
        cover = method(ndim, crop, where, "auto", settings=CALM)
        out = means(cover, batch(*size, count=2, device=where))
        out["loss"].backward()
        found.append((out, torch.cat([p.grad.flatten().cpu() for p in cover.parameters()])))
    (ours, slopes), (theirs, others) = found
    for name, value in theirs.items():
        assert_near(ours[name].detach().cpu(), value.detach(), atol=1e-3, rtol=1e-3)
    assert float((slopes - others).norm() / others.norm()) < 1e-2
