"""Calls of warp, composition and the losses, in numbers: tensors are made of them on any device, in any precision."""

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from strategies import KERNEL_LAYOUTS, SLOPE_LAYOUTS, assert_near, assert_within_budget, laid_out, leaves, randn
from torch import Tensor

from coverfast import AffineDVF, compose, consistency_loss, end_point_error, vector_loss
from coverfast.kernels import INTERPRETED
from coverfast.kernels.launch import override
from coverfast.ops.losses import field_errors
from coverfast.ops.warp import resample, warp, warp_up

MARKS = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),  # numpy, interpreting
]
INF, NAN = math.inf, math.nan
WILD = (NAN, INF, -INF, 1e30, -1e30, 2.0**31, -(2.0**31))
CHANNELS = (1, 2, 3, 8, 12, 33, 36)
FIELD_DTYPES = (torch.float32, torch.float64)
LABELS = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.bool),
)


def field_like(
    batch: int, size: tuple[int, ...], *, reach: float = 1.5, step: float | None = None, seed: int = 0
) -> Tensor:
    """A dense field, float64: at most `reach` pixels along every axis, in whole steps."""
    field = (randn(batch, len(size), *size, seed=seed) / 2).clamp(-1, 1) * reach
    return field if step is None else (field / step).round() * step


def theta_like(batch: int, n: int, *, seed: int = 0, turn: float = 0.2) -> Tensor:
    """Affine maps that turn, shear and scale a little and move by a pixel, float64."""
    matrix = torch.eye(n, dtype=torch.float64) + turn * randn(batch, n, n, seed=seed)
    return torch.cat([matrix, randn(batch, n, 1, seed=seed + 1)], 2)


def as_double(x: Tensor | AffineDVF) -> Tensor | AffineDVF:
    return AffineDVF.of(x.numbers.double(), x.size) if isinstance(x, AffineDVF) else x.double()


def gradients_of(out: Tensor, inputs: list[Tensor], slope: Tensor) -> list[Tensor]:
    """The value and its gradients, brought to the CPU."""
    return [t.detach().cpu() for t in (out, *torch.autograd.grad(out, inputs, slope))]


@dataclass(frozen=True)
class Spec(ABC):
    """What every call has: how sums are taken, and in what tiles (y, x); None leaves both to the library."""

    size: tuple[int, ...]
    channels: int = 2
    batch: int = 1
    form: str = "dense"
    dtype: torch.dtype = torch.float64
    field_dtype: torch.dtype = torch.float64
    layouts: tuple[str, ...] = ("contiguous",) * 4
    reach: float = 1.5
    step: float | None = None
    seed: int = 0
    fixed: bool | None = False
    tile: tuple[int, int] | None = (4, 8)

    @contextmanager
    def launched(self) -> Iterator[None]:
        """With the launches that the case asks for."""
        values = {} if self.fixed is None else {"deterministic": int(self.fixed)}
        if self.tile is not None:
            values |= {"tile_y": self.tile[0], "tile": self.tile[1]}
        with override(**values):
            yield

    def _map(self, index: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
        x = randn(*shape, seed=7 * self.seed + index)
        if dtype == torch.bool:
            x = x > 0
        elif not dtype.is_floating_point:
            x = (40 * x).to(torch.int64)
        x = x.to(dtype)
        return laid_out(x.to(device), self.layouts[index])

    @abstractmethod
    def results(self, device: str = "cpu", impl: str = "triton", *, exact: bool = False) -> list[Tensor]:
        """The value of a call and its gradients, on the CPU; exact: computed in float64."""


def assert_equals_reference(spec: Spec, device: str, tolerance: float = 1e-10) -> list[Tensor]:
    """Value and gradients are those of the definition; gives them."""
    ours = spec.results(device)
    for a, b in zip(ours, spec.results(impl="reference"), strict=True):
        assert_near(a, b, atol=tolerance, rtol=tolerance)
    return ours


def assert_precise(spec: Spec, device: str) -> list[Tensor]:
    """Errors are at most twice those of the torch implementation in the same precision; gives value and gradients."""
    ours, truth = spec.results(device), spec.results(impl="reference", exact=True)
    assert_within_budget(ours, spec.results(impl="torch"), truth, 2 + spec.channels)
    return ours


# --- warp -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WarpSpec(Spec):
    """A call of `warp`, of `warp_up` ("coarse") or, with a source of another size, of `resample`.

    Layouts of the image, the field, the gradient that comes back.
    """

    source: tuple[int, ...] | None = None
    mode: str = "linear"
    padding: str = "zeros"

    def image(self, device: str = "cpu") -> Tensor:
        return self._map(0, (self.batch, self.channels, *(self.source or self.size)), self.dtype, device)

    def field(self, device: str = "cpu") -> Tensor | AffineDVF:
        n = len(self.size)
        if self.form == "affine":
            theta = theta_like(self.batch, n, seed=self.seed + 5).to(device, self.field_dtype)
            if self.source is None:
                return AffineDVF(theta, self.size, full_size=[s + 2 for s in self.size], origin=1)
            origin = torch.arange(self.batch * n, device=device).view(self.batch, n) % 3
            return AffineDVF(theta, self.size, full_size=self.source, origin=origin)
        size = tuple(s // 2 for s in self.size) if self.form == "coarse" else self.size
        field = field_like(self.batch, size, reach=self.reach, step=self.step, seed=self.seed + 3)
        return laid_out(field.to(device, self.field_dtype), self.layouts[1])

    def slope(self, device: str = "cpu") -> Tensor:
        return self._map(2, (self.batch, self.channels, *self.size), self.dtype, device)

    def call(self, x: Tensor, field: Tensor | AffineDVF, impl: str) -> Tensor:
        if self.form == "coarse":
            assert isinstance(field, Tensor)
            return warp_up(x, field, impl=impl)
        function = warp if self.source is None else resample
        return function(x, field, mode=self.mode, padding=self.padding, impl=impl)

    def results(self, device: str = "cpu", impl: str = "triton", *, exact: bool = False) -> list[Tensor]:
        """Value, gradient of the image, gradient of a dense or coarse field where there is one."""
        x, field, slope = self.image(device), self.field(device), self.slope(device)
        if exact:
            x, field, slope = x.double(), as_double(field), slope.double()
        with self.launched():
            if not x.is_floating_point():
                return [self.call(x, field, impl).cpu()]
            wanted = leaves(x, field) if isinstance(field, Tensor) and self.mode == "linear" else leaves(x)
            out = self.call(wanted[0], wanted[1] if len(wanted) == 2 else field, impl)
            return gradients_of(out, wanted, slope)


def _shape(draw: st.DrawFn, form: str = "dense") -> tuple[int, ...]:
    """Sizes odd, even and 1; a plane costs a program, and one of a volume twice as much."""
    size = draw(st.tuples(*[st.integers(1, most) for most in draw(st.sampled_from(((4, 6), (4, 6), (2, 2, 4))))]))
    return tuple(2 * -(-s // 2) for s in size) if form == "coarse" else size


def _batch(draw: st.DrawFn, size: tuple[int, ...], least: int) -> int:
    return draw(st.integers(least, 2 if len(size) == 2 else 1))


def _affordable(layouts: tuple[str, ...], channels: int) -> int:
    """Maps that do not lie in rows cost a step a channel."""
    return channels if set(layouts) <= {"channels_last", "sliced_rows", "transposed"} else min(channels, 3)


def _interpretable(dtype: torch.dtype, field_dtype: torch.dtype) -> torch.dtype:
    """Triton's interpreter takes float64 to bfloat16 as to an integer."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else field_dtype


@st.composite
def warp_specs(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    field_dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    least: int = 0,
) -> WarpSpec:
    """Any valid call that the interpreter ends within a second."""
    form = draw(st.sampled_from(("dense", "dense", "coarse", "affine")))
    size = _shape(draw, form)
    mode, padding = "linear", "zeros"
    if form != "coarse":
        mode, padding = (
            draw(st.sampled_from(("linear", "linear", "nearest"))),
            draw(st.sampled_from(("zeros", "border"))),
        )
    x_layout = draw(st.sampled_from(KERNEL_LAYOUTS))
    source = None if form == "coarse" else draw(st.sampled_from((None, None, tuple(s + 2 for s in size))))
    dtype = draw(st.sampled_from(dtypes))
    return WarpSpec(
        size,
        channels=_affordable((x_layout,), draw(st.sampled_from(CHANNELS))),
        batch=_batch(draw, size, least),
        form=form,
        dtype=dtype,
        field_dtype=_interpretable(dtype, draw(st.sampled_from(field_dtypes))),
        layouts=(x_layout, draw(st.sampled_from(KERNEL_LAYOUTS)), draw(st.sampled_from(SLOPE_LAYOUTS))),
        reach=draw(st.sampled_from((0.4, 1.5, 9.0, 40.0))),
        step=draw(st.sampled_from((None, 0.25, 0.5, 1.0))),
        seed=draw(st.integers(0, 2**10)),
        fixed=draw(st.booleans()),
        tile=draw(st.sampled_from(((4, 8), (4, 8), (2, 4)))),
        source=source,
        mode=mode,
        padding=padding,
    )


# --- compose ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComposeSpec(Spec):
    """A call of `compose` at the fine size. Layouts of the fine field, the coarse one, the gradient that comes back."""

    def fields(self, device: str = "cpu") -> list[Tensor]:
        sizes = self.size, tuple(s // 2 for s in self.size)
        return [
            laid_out(
                field_like(self.batch, size, reach=self.reach, step=self.step, seed=self.seed + i).to(
                    device, self.field_dtype
                ),
                self.layouts[i],
            )
            for i, size in enumerate(sizes)
        ]

    def slope(self, device: str = "cpu") -> Tensor:
        return self._map(2, (self.batch, len(self.size), *self.size), self.field_dtype, device)

    def results(self, device: str = "cpu", impl: str = "triton", *, exact: bool = False) -> list[Tensor]:
        """Value, gradients of both fields."""
        fields, slope = self.fields(device), self.slope(device)
        if exact:
            fields, slope = [f.double() for f in fields], slope.double()
        with self.launched():
            wanted = leaves(*fields)
            return gradients_of(compose(*wanted, impl=impl), wanted, slope)


@st.composite
def compose_specs(
    draw: st.DrawFn, field_dtypes: tuple[torch.dtype, ...] = (torch.float64,), least: int = 0
) -> ComposeSpec:
    """Any valid call that the interpreter ends within two seconds."""
    size = draw(st.sampled_from(((2, 2), (4, 6), (2, 8), (6, 2), (8, 4), (4, 4), (2, 2, 4))))
    return ComposeSpec(
        size,
        batch=_batch(draw, size, least),
        field_dtype=draw(st.sampled_from(field_dtypes)),
        layouts=(
            draw(st.sampled_from(KERNEL_LAYOUTS)),
            draw(st.sampled_from(KERNEL_LAYOUTS)),
            draw(st.sampled_from(SLOPE_LAYOUTS)),
        ),
        reach=draw(st.sampled_from((0.4, 1.5, 9.0, 40.0))),
        step=draw(st.sampled_from((None, 0.25, 0.5, 1.0))),
        seed=draw(st.integers(0, 2**10)),
        fixed=draw(st.booleans()),
    )


# --- losses -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossSpec(Spec):
    """Calls of the losses. Layouts of the features of both views, the predicted field, the true one."""

    mask: str | None = None
    mask_layout: str = "contiguous"
    denominator: float | None = None

    def pred(self, device: str = "cpu") -> Tensor:
        field = field_like(self.batch, self.size, reach=self.reach, step=self.step, seed=self.seed + 3)
        return laid_out(field.to(device, self.field_dtype), self.layouts[2])

    def target(self, device: str = "cpu") -> Tensor | AffineDVF:
        if self.form == "affine":
            theta = theta_like(self.batch, len(self.size), seed=self.seed + 5).to(device, self.field_dtype)
            return AffineDVF(theta, self.size, full_size=[s + 3 for s in self.size], origin=1)
        field = field_like(self.batch, self.size, reach=self.reach, step=self.step, seed=self.seed + 4)
        return laid_out(field.to(device, self.field_dtype), self.layouts[3])

    def features(self, device: str = "cpu") -> list[Tensor]:
        return [self._map(i, (self.batch, self.channels, *self.size), self.dtype, device) for i in (0, 1)]

    def shown(self, device: str = "cpu") -> Tensor | str | None:
        """The mask: a tensor where it is "some" or "none"."""
        if self.mask not in ("some", "none"):
            return self.mask
        mask = randn(self.batch, 1, *self.size, seed=self.seed + 6) > (0 if self.mask == "some" else 1e9)
        spread = mask.new_ones(self.batch, 1, *(2 * s for s in self.size)).to(device)
        view = spread[(..., *[slice(None, None, 2)] * len(self.size))]
        return view.copy_(mask) if self.mask_layout == "sliced" else mask.to(device)

    def _options(self, device: str, impl: str) -> dict[str, object]:
        return {"mask": self.shown(device), "impl": impl, "denominator": self.denominator}

    def field_results(self, device: str = "cpu", impl: str = "triton", *, exact: bool = False) -> list[Tensor]:
        """Vector loss, end-point error, their gradients; all four field errors."""
        pred, target = self.pred(device), self.target(device)
        if exact:
            pred, target = as_double(pred), as_double(target)
        options = self._options(device, impl)
        found = []
        with self.launched():
            for loss in (vector_loss, end_point_error):
                wanted = leaves(pred, target) if isinstance(target, Tensor) else leaves(pred)
                if loss is end_point_error:
                    del options["denominator"]
                value = loss(wanted[0], wanted[1] if len(wanted) == 2 else target, **options)
                found += gradients_of(value, wanted, value.new_tensor(0.7))
            found += [x.cpu() for x in field_errors(pred, target, **options) if self.batch]
        return found

    def results(self, device: str = "cpu", impl: str = "triton", *, exact: bool = False) -> list[Tensor]:
        """Consistency loss; gradients of both features and of a dense field."""
        (a, b), target = self.features(device), self.target(device)
        if exact:
            a, b, target = a.double(), b.double(), as_double(target)
        with self.launched():
            wanted = leaves(a, b, target) if isinstance(target, Tensor) else leaves(a, b)
            field = wanted[2] if len(wanted) == 3 else target
            value = consistency_loss(*wanted[:2], field, **self._options(device, impl))
            return gradients_of(value, wanted, value.new_tensor(0.7))


@st.composite
def loss_specs(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    field_dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    least: int = 0,
) -> LossSpec:
    """Any valid call that the interpreter ends within a second."""
    layouts = tuple(draw(st.sampled_from(KERNEL_LAYOUTS)) for _ in range(4))
    size = _shape(draw)
    return LossSpec(
        size,
        channels=_affordable(layouts[:2], draw(st.sampled_from(CHANNELS))),
        batch=_batch(draw, size, least),
        form=draw(st.sampled_from(("dense", "affine"))),
        dtype=draw(st.sampled_from(dtypes)),
        field_dtype=draw(st.sampled_from(field_dtypes)),
        layouts=layouts,
        reach=draw(st.sampled_from((0.4, 1.5, 9.0))),
        step=draw(st.sampled_from((None, 0.25, 0.5, 1.0))),
        seed=draw(st.integers(0, 2**10)),
        fixed=draw(st.booleans()),
        tile=draw(st.sampled_from(((4, 8), (4, 8), (2, 4)))),
        mask=draw(st.sampled_from((None, "inside", "some", "none"))),
        mask_layout=draw(st.sampled_from(("contiguous", "sliced"))),
        denominator=draw(st.sampled_from((None, 2.5))),
    )


# --- memory -----------------------------------------------------------------------------------------------------------


class Guarded:
    """Maps that stand in the middle of marked memory."""

    MARK = 7

    def __init__(self) -> None:
        self.around: list[Tensor] = []

    def like(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An unwritten map of the shape, layout and device of `x`."""
        count = 3 * max(1, x.numel())
        memory = torch.full((count,), self.MARK, dtype=dtype or x.dtype, device=x.device)
        strides = torch.empty_like(x).stride()
        self.around.append(memory)
        return memory.as_strided(x.shape, strides, count // 3)

    def assert_kept(self) -> None:
        for memory in self.around:
            third = len(memory) // 3
            assert (memory[:third] == self.MARK).all()
            assert (memory[2 * third :] == self.MARK).all()


def far_apart(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`x` at these strides, in memory that is taken only where it is written; on a GPU, all of it."""
    count = 1 + sum((s - 1) * t for s, t in zip(x.shape, strides, strict=True))
    if x.is_cuda:
        if torch.cuda.mem_get_info()[0] < 1.1 * count * x.element_size():
            pytest.skip("needs more memory")
        memory = torch.empty(count, dtype=x.dtype, device=x.device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = torch.frombuffer(mmap.mmap(-1, count * x.element_size(), flags=flags), dtype=x.dtype)
    return memory.as_strided(x.shape, strides).copy_(x)
