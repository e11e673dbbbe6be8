"""The views in Triton against those in torch, on the GPU or in Triton's interpreter; unwritten memory is NaN."""

from dataclasses import dataclass, replace
from math import pi
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, KERNEL_LAYOUTS, assert_near, laid_out
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from coverfast import AffineDVF, ViewSettings, inside_mask, make_views
from coverfast.augment import augment
from coverfast.kernels import INTERPRETED
from coverfast.kernels import views as kernels
from coverfast.kernels.launch import override
from coverfast.kernels.views_device import _wave
from coverfast.ops import views as operators
from coverfast.philox import STREAM_FILL, STREAM_NOISE, normal, uniform
from coverfast.view_draws import Draws, draw
from coverfast.views import Views

from .field_cases import far_apart

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU (test_interpreter.py runs these without one)", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned")

#: Every transform on every sample, the blur wide enough to show.
ALL = ViewSettings(probability=1.0, blur=0.5, noise=0.2)
SHARP = replace(ALL, blur=0.0)
STILL = ViewSettings(strength=0.0, probability=1.0, noise=0, blur=0, contrast=0, brightness=0, boxes=0)
ELASTIC = replace(ALL, elastic=2.0, elastic_spacing=4.0)


@dataclass(frozen=True)
class ViewCase:
    """A call of `make_views`, in numbers: images are made of it on any device."""

    size: tuple[int, ...]
    crop: tuple[int, ...]
    channels: int = 1
    batch: int = 2
    settings: ViewSettings = ALL
    sizes: tuple[tuple[int, ...], ...] | None = None
    pad: bool = False
    seed: int = 5
    iteration: int = 3
    samples: tuple[int, ...] | None = None
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32

    def images(self, device: str) -> Tensor:
        """Zero beyond each sample's true size."""
        generator = torch.Generator().manual_seed(7)
        x = torch.rand(self.batch, self.channels, *self.size, generator=generator)
        if self.sizes is not None:
            for image, size in zip(x, self.sizes, strict=True):
                kept = image[(..., *map(slice, size))].clone()
                image.zero_()[(..., *map(slice, size))] = kept
        return laid_out(x.to(device, self.dtype), self.layout)

    @property
    def options(self) -> dict[str, Any]:
        """All but the images, the crop and the implementation."""
        return {
            "seed": self.seed,
            "iteration": self.iteration,
            "samples": None if self.samples is None else torch.tensor(self.samples),
            "sizes": None if self.sizes is None else torch.tensor(self.sizes),
            "settings": self.settings,
            "pad": self.pad,
        }

    def views(self, device: str, impl: str = "triton") -> Views:
        return make_views(self.images(device), self.crop, **self.options, impl=impl)

    def augmented(self, device: str, impl: str = "triton") -> tuple[Tensor, Tensor]:
        """The images through `augment` with labels of their own."""
        images = self.images(device)
        labels = torch.randint(0, 9, images[:, 0].shape, generator=torch.Generator().manual_seed(8), dtype=torch.uint8)
        drawn, classes = augment(images, labels.to(device), self.crop, **self.options, impl=impl)
        assert classes is not None
        return drawn, classes

    def draws(self) -> Draws:
        samples, sizes = self.samples or range(self.batch), self.sizes or [self.size] * self.batch
        return draw(self.seed, self.iteration, np.array(samples), np.array(sizes), self.crop, self.settings)


def assert_same_views(ours: Views, theirs: Views, tolerance: float = 4e-6) -> None:
    """Images to rounding; what says where they come from, to the bit."""
    assert_near(ours.pair, theirs.pair, atol=tolerance, rtol=0)
    assert type(ours.target) is type(theirs.target)
    assert type(ours.shown) is type(theirs.shown)
    assert torch.equal(ours.dvf, theirs.dvf)
    assert torch.equal(ours.mask, theirs.mask)


def assert_equals_torch(case: ViewCase, device: str) -> None:
    assert_same_views(case.views(device), case.views(device, "torch"))


CASES = {
    "two channels": ViewCase((9, 12), (6, 8), channels=2),
    "a volume": ViewCase((5, 6, 9), (3, 4, 8), channels=2, batch=1),
    "a crop of the whole image": ViewCase((5, 8), (5, 8), channels=3, batch=1),
    "a crop of the whole volume": ViewCase((2, 3, 4), (2, 3, 4)),
    "a crop that is larger": ViewCase((4, 5), (6, 8), pad=True, layout="sliced", seed=2),
    "a crop that is larger along one axis": ViewCase((12, 5), (6, 8), pad=True, channels=2),
    "a volume that is smaller": ViewCase(
        (2, 3, 9), (4, 5, 4), pad=True, batch=1, settings=SHARP, layout="sliced", seed=2
    ),
    "sizes that differ": ViewCase((9, 12), (6, 8), sizes=((9, 8), (7, 12))),
    "sizes that differ about the crop": ViewCase((8, 12), (6, 8), sizes=((3, 12), (8, 5)), pad=True),
    "volumes whose sizes differ": ViewCase((4, 5, 9), (3, 4, 4), sizes=((3, 5, 9), (4, 4, 4)), settings=SHARP),
    "an elastic map": ViewCase((9, 12), (6, 8), settings=ELASTIC),
    "an elastic map of a volume": ViewCase((4, 5, 9), (3, 4, 8), settings=ELASTIC, batch=1),
    "an elastic map of a small image": ViewCase((4, 12), (6, 8), settings=ELASTIC, pad=True, channels=2),
    "the paper's settings": ViewCase((9, 12), (6, 8), settings=ViewSettings()),
    "no blur": ViewCase((9, 12), (6, 8), settings=SHARP, channels=3),
    "no noise": ViewCase((9, 12), (6, 8), settings=replace(ALL, noise=0)),
    "no boxes": ViewCase((9, 12), (6, 8), settings=replace(ALL, boxes=0)),
    "no boxes and no blur": ViewCase((9, 12), (6, 8), settings=replace(SHARP, boxes=0)),
    "the spatial map alone": ViewCase((9, 12), (6, 8), settings=replace(ALL, probability=0)),
    "nothing at all": ViewCase((9, 12), (6, 8), settings=STILL),
    "one pixel": ViewCase((1, 1), (1, 1), channels=3),
    "one pixel of a volume": ViewCase((1, 2, 1), (1, 1, 1), batch=1),
    "axes of size one": ViewCase((1, 8), (1, 5), batch=1),
    "no images": ViewCase((9, 12), (6, 8), batch=0, settings=ELASTIC),
    "no volumes": ViewCase((4, 5, 9), (3, 4, 8), batch=0),
}


@pytest.mark.parametrize("name", list(CASES))
def test_equals_torch(name, device):
    assert_equals_torch(CASES[name], device)


@pytest.mark.parametrize("name", list(CASES))
def test_augmentation_equals_torch(name, device):
    (ours, classes), (theirs, expected) = (CASES[name].augmented(device, impl) for impl in ("triton", "torch"))
    assert_near(ours, theirs, atol=4e-6, rtol=0)
    assert torch.equal(classes, expected)


def test_the_smaller_images_begin_within_the_crops():
    """As drawn: otherwise what lies before an image would not be looked for. It is NaN."""
    for name in ("a crop that is larger", "a volume that is smaller"):
        assert (CASES[name].draws().origin[0, :2] < 0).all()


@st.composite
def view_cases(draw: st.DrawFn) -> ViewCase:
    """Any valid call that the interpreter ends within a second."""
    crop = draw(st.sampled_from(((5, 8), (3, 4), (2, 6), (2, 3, 4), (1, 4, 8), (3, 2, 2))))
    pad = draw(st.booleans())
    least = [1 if pad else c for c in crop]
    batch = draw(st.integers(1, 2))
    sizes = tuple(
        tuple(draw(st.integers(low, c + 4)) for low, c in zip(least, crop, strict=True)) for _ in range(batch)
    )
    layout = draw(st.sampled_from(KERNEL_LAYOUTS))
    return ViewCase(
        tuple(max(axis) for axis in zip(*sizes, strict=True)),
        crop,
        channels=draw(st.integers(1, 3 - batch)),
        batch=batch,
        settings=ViewSettings(
            strength=draw(st.sampled_from((0.0, 1.0, 1.5))),
            elastic=draw(st.sampled_from((0.0, 0.0, 3.0))),
            elastic_spacing=4.0,
            probability=draw(st.sampled_from((0.5, 1.0))),
            blur=draw(st.sampled_from((0.05, 0.3))),
            boxes=draw(st.sampled_from((0, 1, 10))),
        ),
        sizes=None if layout == "expanded" else sizes,
        pad=pad,
        seed=draw(st.integers(0, 2**64 - 1)),
        iteration=draw(st.integers(0, 2**32 - 1)),
        samples=tuple(draw(st.lists(st.integers(0, 2**32 - 1), min_size=batch, max_size=batch))),
        layout=layout,
    )


@settings(max_examples=8)
@given(view_cases())
def test_any_call_equals_torch(device, case):
    assert_equals_torch(case, device)


@settings(max_examples=4)
@given(view_cases())
def test_any_augmentation_equals_torch(device, case):
    (ours, classes), (theirs, expected) = (case.augmented(device, impl) for impl in ("triton", "torch"))
    assert_near(ours, theirs, atol=4e-6, rtol=0)
    assert torch.equal(classes, expected)


@pytest.mark.parametrize(
    ("numbers", "pixels", "block"), [({"tile": 4, "tile_y": 2}, 8, 2), ({"tile": 1, "tile_y": 16}, 64, 1024)], ids=str
)
def test_the_split_into_programs_changes_nothing(numbers, pixels, block, device, monkeypatch, launches):
    monkeypatch.setattr(kernels, "PIXELS", pixels)
    monkeypatch.setattr(kernels, "BLOCK", block)
    case = ViewCase((6, 11), (4, 7), channels=2, batch=1)
    expected = case.views(device, "torch")
    with override(**numbers):
        ours = case.views(device)
    assert_same_views(ours, expected)
    x, y = -(-7 // numbers["tile"]), -(-4 // numbers["tile_y"])
    assert [launch.programs for launch in launches[-4:]] == [2 * x * y, 2, 2 * x * y, x * y]


@pytest.mark.parametrize("layout", KERNEL_LAYOUTS[1:])
@pytest.mark.parametrize(("size", "crop"), [((7, 9), (5, 8)), ((2, 4, 5), (1, 3, 4))], ids=str)
def test_layouts(size, crop, layout, device):
    """What lies between the pixels is NaN."""
    case = ViewCase(size, crop, channels=2, batch=1, settings=SHARP, layout=layout)
    assert_same_views(case.views(device), replace(case, layout="contiguous").views(device, "torch"))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=str)
def test_dtypes(dtype, device):
    case = ViewCase((7, 9), (5, 8), channels=2, batch=1, settings=SHARP, layout="sliced_rows", dtype=dtype)
    assert case.views(device).pair.dtype == torch.float32
    assert_equals_torch(case, device)


#: Seed, iteration and positions in the global batch: signs, what float32 does not hold, bits of a signalling NaN.
KEYS = [
    (2**64 - 1, 2**24 + 1, (2**24 + 1, 2**24 + 3)),
    (2**63, 2**31 - 1, (2**31 - 1, 2**31)),
    (2**63 - 1, 0, (0x7F800001, 0xFF800001)),
    (2**32, 2**32 - 1, (2**32 - 1, 0)),
    (1, 2**31, (2, 3)),
]


@pytest.mark.parametrize(("seed", "iteration", "samples"), KEYS)
def test_keys(seed, iteration, samples, device):
    case = ViewCase((6, 9), (5, 8), settings=SHARP, seed=seed, iteration=iteration, samples=samples)
    assert_equals_torch(case, device)


# --- random numbers ---------------------------------------------------------------------------------------------------


NOISE = replace(STILL, noise=1.0)
NOISY = [
    ViewCase((15, 32), (15, 32), channels=3, settings=NOISE, seed=2**63 + 5, samples=(2**24 + 1, 4)),
    ViewCase((3, 5, 8), (3, 5, 8), channels=3, batch=1, settings=NOISE),
]


@pytest.mark.parametrize("case", NOISY, ids=["2D", "3D"])
def test_the_noise_is_that_of_philox(case, device):
    """On a black image, scaled by what is drawn; against `normal` and against Box-Muller in float64."""
    images = torch.zeros(case.batch, case.channels, *case.size, device=device)
    samples = torch.tensor(case.samples or range(case.batch))
    views = make_views(
        images, case.crop, seed=case.seed, iteration=3, samples=samples, settings=case.settings, impl="triton"
    )
    assert not views.x_b.any()
    keys, elements = (case.seed, STREAM_NOISE, 3, samples), images[0].numel()
    scale = torch.from_numpy(case.draws().noise).float()[:, None]
    found = views.x_a.cpu().flatten(1)
    assert_near(found, scale * normal(*keys, elements), atol=3e-6, rtol=0)
    u = uniform(*keys, elements + elements % 2).double().unflatten(1, (-1, 2))
    radius, turn = (-2 * (1 - u[..., 0]).log()).sqrt(), 2 * pi * u[..., 1]
    exact = torch.stack([radius * turn.cos(), radius * turn.sin()], -1).flatten(1)[:, :elements]
    assert float((found - scale * exact).abs().max()) < 2e-6
    assert float(found.std()) > 0.1


@triton.jit
def wave_kernel(turns, out, ODD: tl.constexpr, COUNT: tl.constexpr):
    """The wave at some turns."""
    at = tl.arange(0, COUNT)
    turn = tl.load(turns + at)
    tl.store(out + at, _wave(turn, turn * 0 == 1 - ODD))


@pytest.mark.parametrize("odd", [False, True])
def test_the_wave_is_cosine_or_sine(odd, device):
    """About every eighth of a turn, where the series end, and all over; multiples of 2^-24, as uniforms are."""
    count, unit = 2048, 2.0**-24
    about = (torch.arange(9)[:, None] * 2**21 + torch.arange(-40, 41)).flatten()
    others = torch.randint(2**24, (count,), generator=torch.Generator().manual_seed(0))
    turns = (torch.cat([about[(about >= 0) & (about < 2**24)], others])[:count] * unit).float().to(device)
    out = torch.empty_like(turns)
    wave_kernel[(1,)](turns, out, ODD=int(odd), COUNT=count)
    exact = 2 * pi * turns.double()
    exact = exact.sin() if odd else exact.cos()
    assert float((out - exact).abs().max()) < 2e-7
    quarters = turns * 4 == (turns * 4).round()
    assert quarters.sum() == 4
    assert set(out[quarters].tolist()) == {0.0, 1.0, -1.0}


@pytest.mark.parametrize(
    "case",
    [
        ViewCase((13, 32), (13, 32), channels=3, settings=replace(STILL, boxes=10), seed=2**64 - 1),
        ViewCase((3, 11, 16), (3, 11, 16), channels=2, batch=1, settings=replace(STILL, boxes=4), samples=(2**31 + 3,)),
    ],
    ids=["2D", "3D"],
)
def test_boxes_are_filled_by_philox_and_nothing_else_is(case, device):
    found = case.views(device).x_a.cpu()
    samples = torch.tensor(case.samples or range(case.batch))
    fill = uniform(case.seed, STREAM_FILL, case.iteration, samples, found[0].numel()).view_as(found)
    expected, painted = case.images("cpu"), torch.zeros_like(found, dtype=torch.bool)
    for sample, boxes in zip(painted, case.draws().boxes, strict=True):
        for box in boxes:
            sample[(..., *(slice(*sides) for sides in box))] = True
    assert 0 < float(painted.float().mean()) < 0.8
    assert torch.equal(found[painted], fill[painted])
    assert_near(found[~painted], expected[~painted], atol=1e-6, rtol=0)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        ViewCase((7, 12), (5, 8), channels=2, batch=3, settings=ELASTIC),
        ViewCase((7, 12), (6, 8), sizes=((4, 12), (7, 6), (7, 12)), pad=True, batch=3, settings=SHARP),
        ViewCase((2, 4, 5), (1, 3, 4), batch=3, settings=SHARP),
    ],
    ids=["2D", "padded", "3D"],
)
def test_any_split_of_the_batch_gives_the_same_bits(case, device):
    def views(part: slice) -> Views:
        sizes = torch.tensor(case.sizes or [case.size] * 3)[part]
        return make_views(
            case.images(device)[part],
            case.crop,
            seed=1,
            iteration=2,
            samples=torch.arange(10, 13)[part],
            sizes=sizes,
            settings=case.settings,
            pad=case.pad,
            impl="triton",
        )

    whole = views(slice(None))
    for part in (slice(0, 1), slice(1, 3)):
        found = views(part)
        for name in ("x_a", "x_b", "dvf", "mask"):
            assert torch.equal(getattr(found, name), getattr(whole, name)[part]), name


def test_images_are_left_alone_and_gradients_are_not_followed(device):
    case = ViewCase((6, 9), (5, 8), settings=SHARP)
    images = case.images(device).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        views = make_views(images, case.crop, seed=5, iteration=3, settings=case.settings, impl="triton")
    assert not views.pair.requires_grad
    assert torch.equal(views.pair, case.views(device).pair)
    assert torch.equal(images, case.images(device))
    assert images._version == 0


# --- what is launched and written -------------------------------------------------------------------------------------


def named(launches) -> list[str]:
    return [launch.kernel.__name__.removesuffix("_kernel") for launch in launches]


@pytest.mark.parametrize("size", [(9, 12), (5, 6, 9)], ids=str)
@pytest.mark.parametrize("blur", [0.05, 0.5])
def test_an_affine_field_is_never_written(size, blur, device, launches, monkeypatch):
    """Noise twice, once for the sums; with a blur once, then a pass an axis. The last launch makes view b."""

    def refuse(field):
        raise AssertionError("the field was written")

    dense = AffineDVF.dense
    monkeypatch.setattr(AffineDVF, "dense", refuse)
    crop = (*size[:-2], 4, 8)
    views = ViewCase(size, crop, batch=1, settings=replace(ALL, blur=blur)).views(device)
    steps = ["view_sums", "view_means", "view_appearance", "warp_forward"]
    blurred = ["view_appearance"] + ["view_blur"] * len(size) if blur > 0.15 else []
    assert named(launches) == blurred + steps
    warp = launches[-1]
    assert (warp.constants["FIELD"], warp.constants["ORIGIN"]) == ("affine", True)
    assert warp.arguments["field"] is views.target.numbers
    assert isinstance(views.shown, str)
    for launch in launches:
        for name, value in launch.arguments.items():
            if isinstance(value, Tensor) and value.ndim > 3:
                assert value.shape[:2] == (1, 1), f"{name} is an image, not a field"
    monkeypatch.setattr(AffineDVF, "dense", dense)
    assert torch.equal(views.mask, inside_mask(views.dvf))


def test_a_padded_crop_writes_the_mask_alone_and_an_elastic_map_its_field(device, launches):
    views = ViewCase((4, 12), (6, 8), batch=1, settings=SHARP, pad=True).views(device)
    assert (launches[-1].constants["FIELD"], launches[-1].constants["ORIGIN"]) == ("affine", True)
    assert views.shown.dtype == torch.bool
    launches.clear()
    views = ViewCase((9, 12), (6, 8), batch=1, settings=replace(ELASTIC, blur=0)).views(device)
    assert named(launches) == ["view_sums", "view_means", "view_appearance", "warp_forward"]
    assert (launches[-1].constants["FIELD"], launches[-1].constants["ORIGIN"]) == ("dense", False)
    assert (type(views.target), views.shown) == (Tensor, "inside")


def test_float32_images_are_read_where_they_are(device, launches):
    for layout in ("contiguous", "expanded", "sliced_rows"):
        case = ViewCase((6, 9), (5, 8), channels=2, batch=1, settings=SHARP, layout=layout)
        images = case.images(device)
        launches.clear()
        make_views(images, case.crop, seed=5, iteration=3, settings=case.settings, impl="triton")
        for launch, name in zip(launches, ("source", None, "source", "x"), strict=True):
            if name:
                assert launch.arguments[name].data_ptr() == images.data_ptr()
                assert launch.arguments[name].stride() == images.stride()


def test_an_empty_batch_launches_no_program(device, launches):
    CASES["no images"].views(device)
    assert launches
    assert all(launch.programs == 0 for launch in launches)


def test_auto_takes_the_kernels_on_a_gpu_alone(device, launches):
    case = ViewCase((6, 9), (5, 8), settings=SHARP)
    found = case.views(device, "auto")
    assert len(launches) == (0 if INTERPRETED else 4)
    assert torch.equal(found.pair, case.views(device, "torch" if INTERPRETED else "triton").pair)


@pytest.mark.parametrize("case", [ViewCase((6, 11), (5, 6)), ViewCase((3, 4, 6), (2, 3, 5), batch=1)], ids=["2D", "3D"])
def test_nothing_is_written_around_the_views(case, device, monkeypatch):
    """Views in the middle of marked memory; rows and columns fall short of a tile."""
    memory = []

    def guarded(pair, *arguments, **counts):
        memory.append(torch.full((3, *pair.shape), 7.0, device=pair.device))
        fill_pair(memory[0][1], *arguments, **counts)
        pair.copy_(memory[0][1])

    fill_pair = operators.fill_pair
    monkeypatch.setattr(operators, "fill_pair", guarded)
    with override(tile=4, tile_y=2):
        assert_equals_torch(replace(case, settings=SHARP), device)
    assert (memory[0][::2] == 7).all()


FAR = {
    "samples": ((2, 1, 3, 4), (2**31 + 24, 64, 8, 1)),
    "channels": ((1, 2, 3, 4), (8, 2**31 + 24, 8, 1)),
    "rows": ((1, 1, 4, 4), (8, 64, 2**30 + 8, 1)),
    "pixels": ((1, 1, 2, 4), (8, 64, 8, 2**30 + 8)),
    "planes": ((1, 1, 4, 2, 4), (8, 64, 2**30 + 8, 8, 1)),
}


@pytest.mark.parametrize("axis", list(FAR))
def test_addresses_have_64_bits(axis, device, launches):
    shape, strides = FAR[axis]
    crop = tuple(min(s, 3) for s in shape[2:])
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(device)
    options = {"seed": 1, "iteration": 1, "settings": replace(SHARP, boxes=0)}
    torch.use_deterministic_algorithms(False)  # which would fill all of the memory
    found = make_views(far_apart(x, strides), crop, impl="triton", **options)
    assert_same_views(found, make_views(x, crop, impl="torch", **options))
    for launch in launches:
        assert launch.constants.get("WIDE", axis != "samples") == (axis != "samples"), launch.kernel.__name__


# --- inside PyTorch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [ALL, replace(ELASTIC, blur=0.0)], ids=["affine and blurred", "elastic"])
def test_opcheck(settings, device, monkeypatch):
    calls = []
    fill_pair = operators.fill_pair
    monkeypatch.setattr(operators, "fill_pair", lambda *a, **k: calls.append((a, k)) or fill_pair(*a, **k))
    ViewCase((4, 5), (3, 4), batch=1, settings=settings, seed=2**64 - 1).views(device)
    ((*tensors, seed, iteration), counts) = calls[0]
    assert seed == 2**64 - 1
    arguments = (*tensors, -1, iteration, counts["boxes"], counts["taps"])
    torch.library.opcheck(torch.ops.coverfast.view_pair, arguments)
    out = arguments[0].chunk(2)[0].clone()
    torch.library.opcheck(torch.ops.coverfast.view_augmented, (out, *arguments[1:]))


# --- on a GPU alone ---------------------------------------------------------------------------------------------------


#: Batch, size of the images, crop.
PRESETS = {"2D": (24, (512, 512), 384), "3D": (2, (160, 160, 128), 128)}


def smooth_images(batch: int, size: tuple[int, ...]) -> Tensor:
    """Images that change little from pixel to pixel and vanish at their edges: a rounded coordinate does not show."""
    coarse = torch.rand(batch, 1, *(s // 16 for s in size), generator=torch.Generator().manual_seed(3))
    x = F.interpolate(coarse, size=size, mode="bilinear" if len(size) == 2 else "trilinear", align_corners=True)
    for axis, length in enumerate(size):
        window = torch.hann_window(length, periodic=False)
        x = x * window.view([-1 if i == axis else 1 for i in range(len(size))])
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("blur", [0.05, 0.5])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_views_on_the_gpu_are_those_on_the_cpu(preset, blur):
    batch, size, crop = PRESETS[preset]
    images = smooth_images(batch, size)
    options = {"seed": 2**63 + 11, "iteration": 200_000, "settings": ViewSettings(blur=blur)}
    theirs = make_views(images, crop, **options)
    ours = make_views(images.cuda(), crop, **options)
    assert_near(ours.pair.cpu(), theirs.pair, atol=1e-5, rtol=0)
    assert_near(ours.dvf.cpu(), theirs.dvf, atol=1e-4, rtol=0)
    # A coordinate that rounds to another side of the edge.
    assert float((ours.mask.cpu() != theirs.mask).double().mean()) < 1e-4
    assert_near(make_views(images.cuda(), crop, impl="torch", **options).pair, ours.pair, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("blur", [0.05, 0.5])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_host_never_waits_for_the_device(preset, blur):
    """Sizes, positions and draws are the host's: one copy brings them over, and nothing comes back."""
    batch, size, crop = PRESETS[preset]
    images = smooth_images(batch, size).cuda()
    options = {"seed": 1, "settings": ViewSettings(blur=blur)}
    options |= {"samples": torch.arange(batch), "sizes": torch.tensor([size] * batch)}
    plain = make_views(images, crop, iteration=1, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = make_views(images, crop, iteration=1, **options)
        make_views(images.half(), crop, iteration=2, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again.pair, plain.pair)


@pytest.mark.gpu
def test_numbers_that_the_device_has_not_read_yet_are_kept():
    """The host runs ahead, frees what it has sent and draws again, before the first launch begins."""
    images = smooth_images(4, (64, 80)).cuda()
    expected = [make_views(images, 48, seed=1, iteration=i).pair for i in range(8)]
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    found = [make_views(images, 48, seed=1, iteration=i).pair for i in range(8)]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_memory_of_the_views():
    """The pair and a few numbers a sample; with a blur two crops more, and no field in either."""
    batch, size, crop = PRESETS["3D"]
    images = smooth_images(batch, size).cuda()
    torch.use_deterministic_algorithms(False)
    for blur, crops in ((0.05, 0), (0.5, 2)):
        options = {"seed": 1, "iteration": 1, "settings": ViewSettings(blur=blur)}
        make_views(images, crop, **options)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pair = make_views(images, crop, **options).pair
        growth = torch.cuda.max_memory_allocated() - before
        view = 2 * crop**3 * 4
        assert pair.numel() * 4 == 2 * view
        assert growth < (2 + crops) * view + 2e6
