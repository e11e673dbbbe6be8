"""What the tests feed the library: drawn shapes, tensors in many memory layouts, and one form of refusal."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from coverfast import InputError, make_views
from coverfast.views import Views

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")
#: Besides, channels contiguous in every pixel, but pixels and rows apart.
KERNEL_LAYOUTS = (*LAYOUTS, "sliced_rows")
#: Besides, one number everywhere, with no strides: what a sum passes back.
SLOPE_LAYOUTS = (*KERNEL_LAYOUTS, "scalar")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of `x` in another memory layout; "expanded" repeats its first sample, "scalar" its first number."""
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if layout == "sliced":
        # What lies between the pixels of the view is NaN: it shows when it is read.
        around = x.new_full((x.shape[0], x.shape[1] + 1, *(2 * s + 1 for s in x.shape[2:])), float("nan"))
        view = around[(slice(None), slice(1, None), *[slice(1, None, 2)] * (x.ndim - 2))]
        return view.copy_(x)
    if layout == "sliced_rows":
        around = x.new_full((x.shape[0], x.shape[1] + 1, *(2 * s + 1 for s in x.shape[2:])), float("nan"))
        view = laid_out(around, "channels_last")[(slice(None), slice(1, None), *[slice(1, None, 2)] * (x.ndim - 2))]
        return view.copy_(x)
    if layout == "scalar":
        return x.flatten()[:1].reshape([1] * x.ndim).expand_as(x) if x.numel() else x
    if layout == "transposed":
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x.contiguous()


def leaves(*tensors: Tensor) -> list[Tensor]:
    """The same values as leaves that require a gradient, strides kept."""
    return [t.detach().requires_grad_() for t in tensors]


def gradients(out: Tensor, inputs: list[Tensor], seed: int = 99) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of `out`."""
    return torch.autograd.grad(out, inputs, randn(*out.shape, seed=seed, dtype=out.dtype).to(out.device))


def assert_near(actual: Tensor, expected: Tensor, atol: float = 1e-10, rtol: float = 1e-10) -> None:
    """Equal shape and dtype, and values to rounding; NaN is never near."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def views_of(images: Tensor, crop: int | tuple[int, ...], **options: object) -> Views:
    """`make_views` with a seed and an iteration unless they are given."""
    return make_views(images, crop, **{"seed": 0, "iteration": 1, **options})


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """An InputError of one line that says each of `words`."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    for word in words:
        assert word in message, message


def run_python(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def sizes(ndim: int, largest: int = 7) -> st.SearchStrategy[tuple[int, ...]]:
    """Grid sizes, odd, even and 1, seldom square."""
    return st.tuples(*[st.integers(1, largest)] * ndim)


@dataclass(frozen=True)
class MovCase:
    """Arguments of `mov`."""

    q: Tensor
    k: Tensor
    window: tuple[int, ...]
    groups: int
    scale: float | None

    @property
    def options(self) -> dict[str, object]:
        return {"window": self.window, "groups": self.groups, "scale": self.scale}


@st.composite
def mov_cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64,), least: int = 0) -> MovCase:
    """Any valid call: sizes of 1, windows beyond the grid, odd group widths, any layout, empty batches."""
    n = draw(st.sampled_from((2, 3)))
    size = draw(sizes(n, 7 if n == 2 else 5))
    window = draw(st.tuples(*[st.sampled_from((1, 3, 5, 9) if n == 2 else (1, 3, 5))] * n))
    groups, width = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 3, 5, 6, 8)))
    batch, seed = draw(st.integers(least, 3)), draw(st.integers(0, 2**16))
    dtype = draw(st.sampled_from(dtypes))
    layout_q, layout_k = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))
    scale = draw(st.sampled_from((None, 0.1, 1.0, -2.0)))
    shape = (batch, groups * width, *size)
    q = laid_out(randn(*shape, seed=seed, dtype=dtype), layout_q)
    k = laid_out(randn(*shape, seed=seed + 1, dtype=dtype), layout_k)
    return MovCase(q, k, window, groups, scale)


@dataclass(frozen=True)
class MovSpec:
    """A call of `mov` and the gradient that comes back to it, in numbers: tensors are made of it on any device."""

    size: tuple[int, ...]
    window: tuple[int, ...]
    groups: int = 1
    width: int = 2
    batch: int = 1
    dtype: torch.dtype = torch.float64
    layouts: tuple[str, str] = ("contiguous", "channels_last")
    slope_layout: str = "contiguous"
    scale: float | None = None
    seed: int = 0

    def case(self, device: str = "cpu") -> MovCase:
        shape = (self.batch, self.groups * self.width, *self.size)
        q, k = (
            laid_out(randn(*shape, seed=2 * self.seed + i, dtype=self.dtype).to(device), layout)
            for i, layout in enumerate(self.layouts)
        )
        return MovCase(q, k, self.window, self.groups, self.scale)

    def slope(self, device: str = "cpu") -> Tensor:
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        shape = (self.batch, len(self.size), *self.size)
        return laid_out(randn(*shape, seed=99 + self.seed, dtype=dtype).to(device), self.slope_layout)


@st.composite
def mov_specs(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64,), least: int = 0) -> MovSpec:
    """Any valid call that the interpreter ends within seconds."""
    n = draw(st.sampled_from((2, 3)))
    size = draw(st.tuples(*[st.integers(1, most) for most in ((5, 12) if n == 2 else (2, 3, 6))]))
    window = draw(st.tuples(*[st.sampled_from((1, 3, 5))] * (n - 1), st.sampled_from((1, 3, 5, 9, 11, 15))))
    batch = draw(st.integers(least, 2))
    # Rows of keys that are read, times taps on them.
    rows = batch * prod(s * min(w, s) for s, w in zip(size[:-1], window[:-1], strict=True))
    assume(rows * min(window[-1], 2 * size[-1]) <= 90)
    return MovSpec(
        size,
        window,
        groups=draw(st.integers(1, 5)),
        width=draw(st.sampled_from((1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 33))),
        batch=batch,
        dtype=draw(st.sampled_from(dtypes)),
        layouts=draw(st.tuples(*[st.sampled_from(KERNEL_LAYOUTS)] * 2)),
        slope_layout=draw(st.sampled_from(SLOPE_LAYOUTS)),
        scale=draw(st.sampled_from((None, 0.0, 0.1, 1.0, -2.0))),
        seed=draw(st.integers(0, 2**16)),
    )


def assert_within_budget(ours: list[Tensor], eager: list[Tensor], truth: list[Tensor], slack: float) -> None:
    """Errors at most twice those of the eager formulation in the same precision, and a few roundings."""
    for a, b, c in zip(ours, eager, truth, strict=True):
        assert a.shape == c.shape
        assert a.dtype == b.dtype
        if a.numel():
            # The last place of every element, and a few roundings of the arithmetic, which is in float32 or better.
            exact = torch.float64 if a.dtype == torch.float64 else torch.float32
            rounding = torch.finfo(a.dtype).eps * c.abs() + 8 * torch.finfo(exact).eps * (slack + float(c.abs().max()))
            assert bool(((a - c).abs() <= 2 * float((b - c).abs().max()) + rounding).all())


@st.composite
def dvfs(draw: st.DrawFn, batch: int, size: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """Fields that point inside, across every border and far beyond, at and between pixel centres."""
    n, seed = len(size), draw(st.integers(0, 2**16))
    reach = draw(st.sampled_from((0.4, 1.5, max(size) + 2.0, 40.0)))
    step = draw(st.sampled_from((None, 0.25, 0.5, 1.0)))
    field = (randn(batch, n, *size, seed=seed) / 2).clamp(-1, 1) * reach
    return (field if step is None else (field / step).round() * step).to(dtype)
