"""The vector pyramid of some levels, in coverfast's operators and in eager formulations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from coverfast.bench import baselines as eager
from coverfast.bench.problems import Level, Work, mov_work
from coverfast.pyramid import VectorPyramid

#: Formulations of the matching, see `coverfast.bench.baselines`.
EAGER = {"A": eager.mov_a, "B": eager.mov_b}


@cache
def pyramid_of(levels: tuple[Level, ...], impl: str) -> VectorPyramid:
    """Those levels as a module, its weights drawn from one seed."""
    at = levels[-1]
    features, groups = [level.features for level in levels], [level.groups for level in levels]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VectorPyramid(len(at.size), features, groups, at.channels // at.groups, at.window, impl=impl)


def pyramid_field(levels: tuple[Level, ...], *inputs: Tensor, impl: str) -> Tensor:
    """Of coverfast: maps of both views in one batch, coarse to fine, and the weights of `pyramid_of`, to the field."""
    maps, pyramid = inputs[: len(levels)], pyramid_of(levels, impl)
    weights = dict(zip(dict(pyramid.named_parameters()), inputs[len(levels) :], strict=True))
    low = maps[0].dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(maps[0].device.type, maps[0].dtype if low else torch.bfloat16, enabled=low):
        return functional_call(pyramid, weights, (maps,))


def eager_field(levels: Sequence[Level], formulation: str, *inputs: Tensor) -> Tensor:
    """As people write it, in the order of the paper: features are warped, then projected. Without weights among the
    inputs the maps are keys and queries already.
    """
    maps, weights = inputs[: len(levels)], inputs[len(levels) :]
    project = partial(_project, weights) if weights else None
    return fused(levels, maps, project, EAGER[formulation], eager.warp_up_eager, eager.compose_eager)


def _project(weights: Sequence[Tensor], number: int, x: Tensor) -> Tensor:
    weight, bias, scale, shift = (w.to(x.dtype) for w in weights[4 * number : 4 * number + 4])
    return F.group_norm((F.conv2d if x.ndim == 4 else F.conv3d)(x, weight, bias), 1, scale, shift)


def fused(
    levels: Sequence[Level],
    maps: Sequence[Tensor],
    project: Callable[[int, Tensor], Tensor] | None,
    match: Callable[..., Tensor],
    warp: Callable[..., Tensor],
    fuse: Callable[..., Tensor],
) -> Tensor:
    """COVER Eq. 8, of whatever matches, warps and composes."""
    psi: Tensor | None = None
    for number, (level, (a, b)) in enumerate(zip(levels, (x.chunk(2) for x in maps), strict=True)):
        key = a if psi is None else warp(a, psi)
        pair = (b, key) if project is None else (project(number, b), project(number, key))
        found = match(*pair, window=level.window, groups=level.groups).to(torch.promote_types(a.dtype, torch.float32))
        psi = found if psi is None else fuse(found, psi)
    assert psi is not None
    return psi


def convolution_flops(levels: Sequence[Level]) -> float:
    """FLOP of the projections of both views, forward."""
    return sum(2.0 * 2 * level.batch * prod(level.size) * level.features * level.channels for level in levels)


def pyramid_work(levels: Sequence[Level], *, projected: bool) -> tuple[Work, Work]:
    """Of the matching and, where they are part of it, the projections: forward and backward."""
    matrix = convolution_flops(levels) if projected else 0.0
    forward, backward = (sum((mov_work(level)[way] for level in levels), Work()) for way in (0, 1))
    return forward + Work(matrix=matrix), backward + Work(matrix=2 * matrix)
