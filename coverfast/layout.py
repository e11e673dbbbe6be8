"""How a map lies in memory: in rows of channels (channels-last), or plane by plane."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def channels_last(x: Tensor) -> torch.memory_format:
    """Torch's name of the layout in rows of channels, for as many axes as `x` has."""
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def has_rows(x: Tensor) -> bool:
    """Whether the channels of a pixel are contiguous; the pixels need not be."""
    return x.shape[1] == 1 or x.stride(1) == 1


def rows_of(x: Tensor) -> Tensor:
    """`x` itself where the channels of a pixel are contiguous, otherwise a channels-last copy."""
    return x if has_rows(x) else x.contiguous(memory_format=channels_last(x))


def new_like(x: Tensor, size: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised map for what is computed from `x`: channels-last where `x` has rows, otherwise contiguous.

    `size` of its spatial axes, default that of `x`.
    """
    shape = x.shape if size is None else (*x.shape[:2], *size)
    rows = has_rows(x) and x.shape[1] > 1
    layout = channels_last(x) if rows else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=layout)
