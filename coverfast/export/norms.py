"""Norms whose sums stay exact in runtimes that add up one float32 after the other."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn


_Module = TypeVar("_Module", bound=nn.Module)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class StepwiseNorm(nn.Module):
    """A group norm whose means are taken along one axis after the other.

    onnxruntime sums all pixels and channels of a group in one float32: a norm is off by 1e-3 at 8 x 128^3 numbers,
    where sums of a row at a time are off by 2e-7.
    """

    def __init__(self, norm: nn.Module, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """Of `(B, C, *S)`, as it came."""
        centred = x - self._mean(x)
        out = centred * (self._mean(centred.square()) + self.eps).rsqrt()
        shape = (-1, *[1] * (x.ndim - 2))
        return out if self.weight is None else out * self.weight.view(shape) + self.bias.view(shape)

    def _mean(self, x: Tensor) -> Tensor:
        """`(B, C, 1, ...)`, the same for all channels of a group."""
        ndim, channels = x.ndim - 2, x.shape[1]
        for _ in range(ndim):
            x = x.mean(-1)
        x = x.unflatten(1, (self.groups, -1)).mean(-1, keepdim=True)
        return x.expand(-1, -1, channels // self.groups).flatten(1)[(..., *[None] * ndim)]


def stepwise(module: _Module) -> _Module:
    """A copy of a module with `StepwiseNorm` for its group norms and instance norms."""
    found = copy.deepcopy(module)
    for name, norm in list(found.named_modules()):
        if isinstance(norm, nn.GroupNorm):
            found.set_submodule(name, StepwiseNorm(norm, norm.num_groups, norm.eps))
        elif isinstance(norm, _INSTANCE) and not norm.track_running_stats:
            found.set_submodule(name, StepwiseNorm(norm, norm.num_features, norm.eps))
    return found
