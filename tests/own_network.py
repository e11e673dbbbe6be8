"""A user's own network, as `--backbone own_network.py:Small` takes it: three maps down to stride 4."""

from __future__ import annotations

from torch import Tensor, nn

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Small(nn.Module):
    """Maps of strides 16, 8 and 4. normed: batch norms; else group norms. drop: probability of dropout."""

    def __init__(self, ndim: int, in_channels: int, width: int = 8, normed: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        self.feature_channels, self.strides = (4 * width, 2 * width, width), (16, 8, 4)

        def stage(before: int, after: int, stride: int) -> nn.Module:
            norm = _BATCH_NORM[ndim](after) if normed else nn.GroupNorm(1, after)
            return nn.Sequential(_CONV[ndim](before, after, stride, stride), norm, nn.SiLU(), nn.Dropout(drop))

        self.first = stage(in_channels, width, 4)
        self.second = stage(width, 2 * width, 2)
        self.third = stage(2 * width, 4 * width, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.first(x)
        middle = self.second(fine)
        return [self.third(middle), middle, fine]


def wrong(ndim: int, in_channels: int) -> nn.Module:
    """Says strides that are not those of its maps."""
    network = Small(ndim, in_channels)
    network.strides = (8, 4, 2)
    return network


def single(ndim: int, in_channels: int) -> nn.Module:
    """One map and no pyramid."""
    return _CONV[ndim](in_channels, 8, 3, padding=1)


def stepping(ndim: int, in_channels: int) -> nn.Module:
    """Maps that shrink four times from one to the next."""
    network = Small(ndim, in_channels)
    network.second = nn.Sequential(_CONV[ndim](8, 16, 4, 4))
    network.third = nn.Sequential(_CONV[ndim](16, 32, 2, 2))
    return network


def number(ndim: int, in_channels: int) -> int:
    """No network at all."""
    return ndim * in_channels


class Looking(Small):
    """Looks at values, imports what lies beside it, and leaves its first layer as it is drawn."""

    def __init__(self, ndim: int, in_channels: int) -> None:
        super().__init__(ndim, in_channels, normed=False)
        import libraries  # noqa: F401

        self.first.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(x / 2 if x.max() > 2 else x)


class Pooled(Small):
    """Maps of one size whatever the image's."""

    def forward(self, x: Tensor) -> list[Tensor]:
        pool = {4: nn.functional.adaptive_avg_pool2d, 5: nn.functional.adaptive_avg_pool3d}[x.ndim]
        return [pool(f, size) for f, size in zip(super().forward(x), (8, 16, 32), strict=True)]


class Overlapping(Small):
    """Two buffers that share memory."""

    def __init__(self, ndim: int, in_channels: int) -> None:
        super().__init__(ndim, in_channels)
        from torch import zeros

        whole = zeros(10)
        self.register_buffer("head", whole[:8])
        self.register_buffer("tail", whole[2:])


def failing(ndim: int, in_channels: int) -> nn.Module:
    """Does not get as far as a network."""
    raise RuntimeError("no such thing\nand more")


def lazy(ndim: int, in_channels: int) -> nn.Module:
    """Weights of no shape yet."""
    return nn.Sequential(nn.LazyConv2d(8, 3))
