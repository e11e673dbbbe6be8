"""The NATTEN baseline is `mov` inside of its margin, and not a pixel further; NATTEN itself where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from strategies import LAYOUTS, gradients, laid_out, leaves, randn, refused
from torch import Tensor

from coverfast import reference
from coverfast.bench.natten_baseline import available, head_dim, margin, mov_natten

CASES = [  # size, window, groups, channels of a group
    ((7, 12), (3, 5), 1, 8),
    ((16, 9), (7, 3), 3, 4),
    ((7, 8, 11), (3, 3, 5), 2, 6),
    ((11, 7, 7), (5, 3, 3), 1, 12),
]


def neighborhood(q: Tensor, k: Tensor, v: Tensor, kernel_size: Sequence[int], scale: float | None = None) -> Tensor:
    """NATTEN's na2d and na3d as documented: heads last, whole windows, at the border shifted into the grid."""
    n, (batch, *size, heads, dim) = q.ndim - 3, q.shape
    assert q.shape == k.shape == v.shape
    assert q.dtype == k.dtype == v.dtype == torch.float32  # float64 is refused; half is not meant
    assert dim >= 8
    assert dim.bit_count() == 1
    assert len(kernel_size) == n
    for axis, (s, w) in enumerate(zip(size, kernel_size, strict=True)):
        assert 1 < w <= s
        first = (torch.arange(s) - w // 2).clamp(0, s - w)
        taps = first[:, None] + torch.arange(w)
        # Taps of this axis go behind the channels: (B, *S, J, D, taps of the axes before, these).
        k, v = (
            x.index_select(axis + 1, taps.flatten()).unflatten(axis + 1, (s, w)).movedim(axis + 2, -1) for x in (k, v)
        )
    k, v = k.flatten(n + 3), v.flatten(n + 3)
    scores = (q.unsqueeze(-1) * k).sum(-2) * (dim**-0.5 if scale is None else scale)
    out = (v * scores.softmax(-1).unsqueeze(-2)).sum(-1)
    assert out.shape == (batch, *size, heads, dim)
    return out


@pytest.fixture
def natten(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that is found and imported as NATTEN."""
    module = ModuleType("natten")
    module.__spec__ = ModuleSpec("natten", None)
    vars(module).update(__version__="0.21.7", HAS_LIBNATTEN=False, na2d=neighborhood, na3d=neighborhood)
    monkeypatch.setitem(sys.modules, "natten", module)
    return module


def maps(size: Sequence[int], groups: int, channels: int) -> list[Tensor]:
    """Queries and keys whose scores tell the taps of a window apart."""
    return leaves(*(randn(2, groups * channels, *size, seed=seed, scale=1.5) for seed in (1, 2)))


def expected(q: Tensor, k: Tensor, window: Sequence[int], groups: int) -> Tensor:
    return reference.mov(q, k, window, groups, (q.shape[1] // groups) ** -0.5)


def error(found: Tensor, exact: Tensor, away: Sequence[int]) -> float:
    """Largest difference, relative to the largest value, of what is `away` from the border; there must be such."""
    inside = (..., *(slice(m, s - m) for m, s in zip(away, exact.shape[2:], strict=True)))
    assert found.shape == exact.shape
    assert exact[inside].numel() > 0
    found, exact, largest = found.detach()[inside], exact.detach()[inside], exact.detach().abs().max()
    return float((found - exact).abs().max() / largest)


@pytest.mark.parametrize(("size", "window", "groups", "channels"), CASES)
def test_interior_is_the_definition_and_the_margin_is_tight(natten, size, window, groups, channels):
    q, k = maps(size, groups, channels)
    found, exact = mov_natten(q, k, window=window, groups=groups), expected(q, k, window, groups)
    assert found.dtype == torch.float32
    away, ours = margin(window), (exact, *gradients(exact, [q, k]))
    results = zip((found, *gradients(found, [q, k])), ours, (away.queries, *away), strict=True)
    for name, (a, b, m) in zip(("output", "d_q", "d_k"), results, strict=True):
        assert error(a, b, m) < 1e-5, name
        for axis in range(len(size)):
            less = [x - (i == axis) for i, x in enumerate(m)]
            assert error(a, b, less) > 1e-3, (name, axis)


@pytest.mark.parametrize(("size", "window", "groups", "channels"), CASES)
def test_a_loss_of_interior_outputs_has_the_same_gradients_everywhere(natten, size, window, groups, channels):
    q, k = maps(size, groups, channels)
    inside = (..., *(slice(m, s - m) for m, s in zip(margin(window).queries, size, strict=True)))
    found, exact = mov_natten(q, k, window=window, groups=groups), expected(q, k, window, groups)
    for a, b in zip(gradients(found[inside], [q, k]), gradients(exact[inside], [q, k]), strict=True):
        assert error(a, b, [0] * len(size)) < 1e-5


def test_a_window_as_large_as_the_grid(natten):
    q, k = maps((5, 7), 2, 8)
    found, exact = mov_natten(q, k, window=(5, 7), groups=2), expected(q, k, (5, 7), 2)
    assert error(found, exact, margin((5, 7)).queries) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_layout_and_half_precision(natten, layout, dtype):
    q, k = (laid_out(x.detach().to(dtype), layout) for x in maps((7, 8), 2, 8))
    found = mov_natten(q, k, window=(3, 3), groups=2)
    assert found.dtype == torch.float32
    assert error(found, expected(q.double(), k.double(), (3, 3), 2), (1, 1)) < 1e-5


def test_margins():
    assert margin((3, 9)) == ((1, 4), (3, 9))
    assert margin((5, 5, 7)).keys == (5, 5, 7)


def test_head_dims():
    """What NATTEN's checks ask for: multiples of 8 by CUTLASS, powers of two from 8 by FlexAttention."""
    assert [head_dim(d, cuda=True) for d in (1, 8, 9, 24, 33)] == [8, 8, 16, 24, 40]
    assert [head_dim(d, cuda=False) for d in (1, 8, 9, 24, 33)] == [8, 8, 16, 32, 64]


@pytest.mark.parametrize("version", ["0.17.5", "0.19.0+torch260cpu", "unknown"])
def test_older_versions_are_refused(natten, version):
    natten.__version__ = version
    with refused("NATTEN", "0.20", version):
        mov_natten(*maps((7, 7), 1, 8), window=(3, 3))


@pytest.mark.parametrize("version", ["0.20.0", "0.21.5+torch2110cu130", "1.0"])
def test_newer_versions_are_taken(natten, version):
    natten.__version__ = version
    assert mov_natten(*maps((7, 7), 1, 8), window=(3, 3)).shape == (2, 2, 7, 7)


@pytest.mark.parametrize("window", [(1, 3), (3, 9), (4, 3)])
def test_windows_that_natten_has_not(natten, window):
    with refused("window", str(window)):
        mov_natten(*maps((7, 7), 1, 8), window=window)


def test_without_natten(monkeypatch):
    monkeypatch.setitem(sys.modules, "natten", None)
    monkeypatch.setattr("coverfast.bench.natten_baseline.find_spec", lambda name: None)
    assert not available()
    with refused("NATTEN", "installed"):
        mov_natten(*maps((7, 7), 1, 8), window=(3, 3))


def test_found_without_import(monkeypatch, tmp_path):
    (tmp_path / "natten.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "natten", raising=False)
    assert available()


def test_no_gpu_without_kernels(natten):
    """On a GPU, NATTEN without its own kernels is FlexAttention that writes all scores to memory: no baseline."""
    with refused("NATTEN", "CUDA", "libnatten"):
        mov_natten(SimpleNamespace(shape=(1, 8, 7, 7), is_cuda=True), None, window=(3, 3))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:return_lse is deprecated")
@pytest.mark.parametrize(("size", "window", "groups", "channels"), CASES)
def test_natten_itself(size, window, groups, channels):
    """Where it is installed: outputs on a CPU, gradients too on a GPU."""
    natten = pytest.importorskip("natten", reason="NATTEN is not installed")
    gpu, away = torch.cuda.is_available() and natten.HAS_LIBNATTEN, margin(window)
    q, k = (x.requires_grad_(gpu) for x in maps(size, groups, channels))
    device = "cuda" if gpu else "cpu"
    found = mov_natten(q.to(device), k.to(device), window=window, groups=groups).cpu()
    exact = expected(q, k, window, groups)
    assert error(found, exact, away.queries) < 1e-5
    assert error(found, exact, [m - 1 for m in away.queries]) > 1e-3
    if gpu:
        pairs = zip(gradients(found, [q, k]), gradients(exact, [q, k]), away, strict=True)
        assert all(error(a, b, m) < 1e-4 for a, b, m in pairs)
