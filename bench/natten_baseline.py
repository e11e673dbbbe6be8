"""`mov` by NATTEN's fused neighborhood attention, of a grid's interior only: its windows are others at the border."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coverfast.checks import check_window, require

#: The first release whose na2d and na3d are called as below.
OLDEST = (0, 20)


class Margin(NamedTuple):
    """Pixels along each axis, from either border, that are not compared.

    Attributes:
        queries: of outputs and of gradients of the queries.
        keys: of gradients of the keys.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]


def available() -> bool:
    """Whether NATTEN is installed, of whatever version; it is not imported."""
    return find_spec("natten") is not None


def margin(window: Sequence[int]) -> Margin:
    """How far from the border `mov_natten` is `coverfast.mov`.

    A query sees other keys when it is closer than the radius. Its shifted window is the outermost one of the grid, so
    that the keys of just this window, as wide as the window is, have other gradients.
    """
    return Margin(tuple(w // 2 for w in window), tuple(window))


def mov_natten(q: Tensor, k: Tensor, *, window: Sequence[int], groups: int = 1) -> Tensor:
    """NATTEN's attention over windows, its values the absolute coordinates; own position subtracted afterwards.

    At the border NATTEN shifts windows into the grid, where they are whole but off the pixel's centre; those of
    `coverfast.mov` stay centred and lose the taps outside. So only what is inside of `margin` is compared.

    Computed in float32, as coordinates beyond 256 are not exact in half precision, by NATTEN's CUTLASS kernels on a GPU
    (three TF32 products a float32 one) and by uncompiled FlexAttention, without a backward, on a CPU. Queries, keys and
    values are padded to one head dim that those take; layout and values are made at every call.

    Args:
        q: queries `(B, C, *S)`, any floating dtype.
        k: keys, alike.
        window: odd, one int an axis, from 3 to the size of the grid.
        groups: J; channels are `(J, C / J)`.

    Returns:
        A field in pixels `(B, n, *S)`, float32.

    Raises:
        InputError: NATTEN is missing, older than 0.20 or, for a GPU, without kernels; it does not take the window.
    """
    n, size, d = len(window), q.shape[2:], q.shape[1] // groups
    fits = all(3 <= w <= s for w, s in zip(check_window(window, n), size, strict=True))
    require(fits, f"window must be 3 to the grid's {tuple(size)} along each axis for NATTEN, got {tuple(window)}")
    attend = _attention(n, cuda=q.is_cuda)
    width = head_dim(d, cuda=q.is_cuda)

    def heads(x: Tensor) -> Tensor:
        return F.pad(x.float().movedim(1, -1).unflatten(-1, (groups, d)), (0, width - d))

    axes = (torch.arange(s, device=q.device, dtype=torch.float32) for s in size)
    own = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    values = F.pad(own, (0, width - n)).unsqueeze(-2).expand(q.shape[0], *size, groups, width)
    found = attend(heads(q), heads(k), values, kernel_size=tuple(window), scale=d**-0.5)
    return (found[..., :n].mean(-2) - own).movedim(-1, 1)


def head_dim(channels: int, *, cuda: bool) -> int:
    """The least head dim that NATTEN takes in float32: a multiple of 8 on a GPU, a power of two from 8 elsewhere."""
    return -(-channels // 8) * 8 if cuda else max(8, 1 << (channels - 1).bit_length())


def _attention(n: int, *, cuda: bool) -> Any:
    require(available(), "NATTEN 0.20 or newer must be installed to compare with it, found none")
    natten: Any = importlib.import_module("natten")
    version = re.match(r"(\d+)\.(\d+)", natten.__version__)
    new = version is not None and tuple(map(int, version.groups())) >= OLDEST
    require(new, f"NATTEN must be 0.20 or newer, whose functions are others before, got {natten.__version__}")
    # Without kernels of its own it falls back to a FlexAttention that writes all scores of all pixels to memory.
    require(
        not cuda or natten.HAS_LIBNATTEN,
        "NATTEN must be built with its CUDA kernels for a GPU, got one without libnatten",
    )
    return {2: natten.na2d, 3: natten.na3d}[n]
