"""Vector pyramid aggregation (VPA): the displacement field between two views, from coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coverfast.checks import InputError, check_choice, check_map, check_same, check_window, require, shape_of
from coverfast.ops.compose import compose
from coverfast.ops.dispatch import IMPLEMENTATIONS
from coverfast.ops.mov import mov
from coverfast.ops.norm import sample_norm
from coverfast.ops.warp import warp_up

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}

#: Best in the paper's ablation (2D); 7 costs 2.7 times the taps of 5 in 3D.
DEFAULT_WINDOW = {2: 7, 3: 5}

Window = int | Sequence[int] | Sequence[int | Sequence[int]]


class Projection(nn.Module):
    """1x1 convolution with bias, then GroupNorm with one group; in two halves, so that a warp can stand between.

    A convolution of 1x1 commutes with a per-channel linear warp, its bias does not: `linear`, warp, `finish` equals
    warp, convolution, norm, and warps few channels instead of many.
    """

    def __init__(self, ndim: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = _CONV[ndim](in_channels, out_channels, 1)
        self.norm = nn.GroupNorm(1, out_channels)
        nn.init.kaiming_normal_(self.conv.weight, a=1.0)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def linear(self, x: Tensor) -> Tensor:
        """The convolution without its bias."""
        return (F.conv2d if x.ndim == 4 else F.conv3d)(x, self.conv.weight)

    def finish(self, x: Tensor, *, impl: str = "auto") -> Tensor:
        """The bias and the norm, in the dtype of `x`: autocast would leave float32, twice the bytes for `mov`."""
        assert self.conv.bias is not None
        norm = self.norm
        return sample_norm(x, self.conv.bias, norm.weight, norm.bias, eps=norm.eps, impl=impl)

    def forward(self, x: Tensor, *, impl: str = "auto") -> Tensor:
        """Both halves."""
        return self.finish(self.linear(x), impl=impl)


class VectorPyramid(nn.Module):
    """Predicts the DVF between two views from their feature pyramids (COVER Eq. 8).

    Every level matches the view b features with those of view a, already warped by the level above, in a small
    window, and fuses what it finds with the level above. Reach: sum over levels of window radius times stride.

    Args:
        ndim: 2 or 3 spatial axes.
        channels: channels of the L feature maps, coarse to fine.
        groups: groups J of `mov` at each level, coarse to fine.
        head_dim: channels of a group.
        window: odd window, an int, one per axis, or one per level (nested when L equals `ndim`); default 7 in 2D,
            5 in 3D.
        impl: implementation of the ops, see `mov`.
    """

    def __init__(
        self,
        ndim: int,
        channels: Sequence[int],
        groups: Sequence[int] = (4, 4, 4, 1, 1),
        head_dim: int = 8,
        window: Window | None = None,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        require(ndim in (2, 3), f"ndim must be 2 or 3, got {ndim}")
        channels, groups = tuple(channels), tuple(groups)
        require(len(channels) >= 1, "channels must name at least one level, got none")
        require(
            len(groups) == len(channels) and all(g >= 1 for g in groups),
            f"groups must be {len(channels)} positive ints, one per level, got {groups}",
        )
        check_choice("impl", impl, IMPLEMENTATIONS)
        require(head_dim >= 1, f"head_dim must be at least 1, got {head_dim}")
        self.ndim, self.channels, self.groups, self.head_dim, self.impl = ndim, channels, groups, head_dim, impl
        self.windows = level_windows(DEFAULT_WINDOW[ndim] if window is None else window, ndim, len(channels))
        self.projections = nn.ModuleList(
            Projection(ndim, c, g * head_dim) for c, g in zip(channels, groups, strict=True)
        )

    @property
    def reach(self) -> tuple[int, ...]:
        """Largest displacement along each axis that the pyramid can express, in pixels of the finest level."""
        levels = len(self.windows)
        return tuple(
            sum((w[axis] - 1) // 2 * 2 ** (levels - 1 - level) for level, w in enumerate(self.windows))
            for axis in range(self.ndim)
        )

    def forward(
        self,
        features_a: Sequence[Tensor],
        features_b: Sequence[Tensor] | None = None,
        return_levels: bool = False,
    ) -> Tensor | list[Tensor]:
        """The field from view b into view a.

        Args:
            features_a: L maps `(B, C_l, *S_l)` of view a, coarse to fine, each twice the size of the one before; or
                `(2 B, C_l, *S_l)` of both views, all of a before all of b: one convolution then projects both.
            features_b: the same of view b; None where `features_a` holds both.
            return_levels: also give the coarser levels' fields.

        Returns:
            `psi_ab`, `(B, n, *S)` in pixels of the finest level, float32; with `return_levels` the list of the L
            fields, coarse to fine, each in pixels of its own level.
        """
        self._check(features_a, features_b)
        levels: list[Tensor] = []
        for level, (window, groups) in enumerate(zip(self.windows, self.groups, strict=True)):
            queries, keys = self._matched(level, features_a, features_b, levels)
            found = mov(queries, keys, window=window, groups=groups, impl=self.impl)
            levels.append(compose(found, levels[-1], impl=self.impl) if levels else found)
        return levels if return_levels else levels[-1]

    def _matched(
        self, level: int, features_a: Sequence[Tensor], features_b: Sequence[Tensor] | None, levels: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys of `mov` at a level, given the fields of those above."""
        project = self.projections[level]
        assert isinstance(project, Projection)
        if features_b is None:
            keys, queries = project.linear(features_a[level]).chunk(2)
        else:
            keys, queries = project.linear(features_a[level]), project.linear(features_b[level])
        if level:
            keys = warp_up(keys, levels[level - 1], impl=self.impl)
        return project.finish(queries, impl=self.impl), project.finish(keys, impl=self.impl)

    def weights(
        self,
        features_a: Sequence[Tensor],
        features_b: Sequence[Tensor] | None,
        levels: Sequence[Tensor],
        points: Tensor,
    ) -> list[Tensor]:
        """What `mov` weighs at a few pixels of view b, at every level: see `window_weights`.

        Args:
            features_a: as in `forward`.
            features_b: as in `forward`.
            levels: the fields that `forward` gave for these features with `return_levels`.
            points: `(K, n)` integers, pixels of the finest level; at a coarser one, the pixel that covers each.

        Returns:
            L weights `(B, K, *window)`, coarse to fine; the mean offset under them is what `mov` found there.
        """
        self._check(features_a, features_b)
        found = []
        for level, (window, groups) in enumerate(zip(self.windows, self.groups, strict=True)):
            queries, keys = self._matched(level, features_a, features_b, levels)
            covering = points // 2 ** (len(self.windows) - 1 - level)
            found.append(window_weights(queries, keys, covering, window=window, groups=groups))
        return found

    def _check(self, features_a: Sequence[Tensor], features_b: Sequence[Tensor] | None) -> None:
        for name, features in (("features_a", features_a), ("features_b", features_b)):
            if features is not None and len(features) != len(self.channels):
                raise InputError(f"{name} must be {len(self.channels)} maps, coarse to fine, got {len(features)}")
        coarser = None
        for level, (a, c) in enumerate(zip(features_a, self.channels, strict=True)):
            if check_map(f"features_a[{level}]", a) != self.ndim or a.shape[1] != c:
                raise InputError(
                    f"features_a[{level}] must be (B, {c}, *S) with {self.ndim} spatial axes, got {shape_of(a)}"
                )
            if features_b is not None:
                whats = ("shape", "dtype", "device")
                check_same(f"features_b[{level}]", features_b[level], f"features_a[{level}]", a, *whats)
            elif a.shape[0] % 2:
                raise InputError(f"features_a must hold both views, an even batch, without features_b, got {len(a)}")
            check_same(f"features_a[{level}]", a, "features_a[0]", features_a[0], "batch", "device")
            if coarser is not None and any(f != 2 * s for f, s in zip(a.shape[2:], coarser, strict=True)):
                divisor = 2 ** (len(self.channels) - 1)
                raise InputError(
                    f"features_a[{level}] must be twice the size of the level above, {tuple(coarser)}, got "
                    f"{shape_of(a)[2:]}: images must have sizes divisible by {divisor}"
                )
            coarser = a.shape[2:]


def level_windows(window: Window, ndim: int, levels: int) -> list[tuple[int, ...]]:
    """One window of `ndim` odd ints for each level, from an int, one per axis, or one per level."""
    if isinstance(window, int) or (
        isinstance(window, Sequence) and len(window) == ndim and all(isinstance(w, int) for w in window)
    ):
        return [check_window(window, ndim)] * levels  # type: ignore[arg-type]
    require(
        isinstance(window, Sequence) and len(window) == levels,
        f"window must be an odd int, {ndim} of them (one per axis) or {levels} (one per level), got {window!r}",
    )
    return [check_window(w, ndim) for w in window]


def window_weights(
    q: Tensor, k: Tensor, points: Tensor, *, window: int | Sequence[int], groups: int = 1, scale: float | None = None
) -> Tensor:
    """The weights that `mov` gives the offsets of its window at a few pixels, mean over groups (SPEC 1).

    Args:
        q: queries `(B, C, *S)`, as in `mov`; so are `k`, `window`, `groups` and `scale`.
        k: keys `(B, C, *S)`.
        points: `(K, n)` integers inside the grid.

    Returns:
        `(B, K, *window)`, float32 (float64 for float64 input): 0 for offsets out of the grid, 1 in all. `mov` at a
        point is the mean of the offsets under them.
    """
    n = check_map("q", q)
    check_same("k", k, "q", q, "shape", "dtype", "device")
    sizes, dtype = check_window(window, n), torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = (q.shape[1] // groups) ** -0.5 if scale is None else scale
    points, size = points.to(q.device), torch.tensor(q.shape[2:], device=q.device)
    if points.ndim != 2 or points.shape[1] != n or bool(((points < 0) | (points >= size)).any()):
        raise InputError(f"points must be (K, {n}) pixels of a grid of {shape_of(q)[2:]}, got {points.tolist()}")
    steps = [torch.arange(w, device=q.device) - w // 2 for w in sizes]
    at = points[:, None] + torch.cartesian_prod(*steps)  # (K, taps, n)
    inside = ((at >= 0) & (at < size)).all(-1)

    def look_up(x: Tensor, index: Tensor) -> Tensor:
        """`(B, groups, d, ...)` in `dtype`, at pixels `(..., n)`."""
        flat = torch.zeros_like(index[..., 0])
        for i, s in zip(index.unbind(-1), x.shape[2:], strict=True):
            flat = flat * s + i.clamp(0, s - 1)
        return x.flatten(2)[:, :, flat].to(dtype).unflatten(1, (groups, -1))

    with torch.autocast(q.device.type, enabled=False):
        scores = scale * (look_up(q, points)[..., None] * look_up(k, at)).sum(2)
        weights = scores.masked_fill(~inside, -torch.inf).softmax(-1).mean(1)
    return weights.unflatten(-1, sizes)
