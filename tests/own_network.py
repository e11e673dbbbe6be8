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
