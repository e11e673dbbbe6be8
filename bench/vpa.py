"""The vector pyramid against one direct template as wide as what the pyramid sees (COVER 4.3.5).

The m finest levels at window N see 1 + (N - 1)(2^m - 1) pixels along each axis; the direct way matches the finest level
alone, in a window of that width. Both forward and backward, from projected keys or with the projections that make them
of the backbone's features, in coverfast's operators and in the eager formulations A and B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from coverfast.bench.problems import Case, Draws, Level, Variant, pyramid_levels
from coverfast.bench.pyramids import (
    EAGER,
    convolution_flops,
    eager_field,
    fused,
    pyramid_field,
    pyramid_of,
    pyramid_work,
)
from coverfast.ops.compose import compose
from coverfast.ops.mov import mov
from coverfast.ops.warp import warp_up

#: By number of axes: window N, and the largest number m of finest levels.
SERIES = {2: ((9, 4), (5, 5)), 3: ((5, 4),)}
#: Batch and finest grid by number of axes: as many pixels as a CPU does in minutes, and the paper's crops.
SIZES = {"cpu": {2: (128, 128), 3: (32, 32, 32)}, "cuda": {2: (384, 384), 3: (128, 128, 128)}}

#: The same of all levels from the coarsest: groups of `mov` and channels of the U-Net's maps.
_GROUPS: tuple[int, ...] = (4, 4, 4, 1, 1)
_FEATURES: tuple[int, ...] = (512, 256, 128, 64, 32)
_WIDTH = 8


def receptive_field(window: int, levels: int) -> int:
    """Pixels along an axis that the finest levels of a pyramid see (COVER 4.3.5)."""
    return 1 + (window - 1) * (2**levels - 1)


def pairs(size: Sequence[int], layout: str, series: Sequence[tuple[int, int]] = ()) -> list[list[Case]]:
    """Pyramid and direct template, to be measured together, for every window and number of levels of `SERIES`."""
    found = []
    for window, most in series or SERIES[len(size)]:
        for projected in (False, True):
            for m in range(1, most + 1):
                levels = _levels(size, window, m)
                direct = [replace(levels[-1], window=(receptive_field(window, m),) * len(size))]
                facts: dict[str, Any] = {
                    "ndim": len(size),
                    "window": window,
                    "levels": m,
                    "width": receptive_field(window, m),
                }
                facts |= {"projections": projected, "layout": layout}
                found.append([_case(form, at, facts, layout) for form, at in (("pyramid", levels), ("direct", direct))])
    return found


def _levels(size: Sequence[int], window: int, count: int) -> list[Level]:
    finest = slice(len(_GROUPS) - count, None)
    return pyramid_levels("vpa", 1, size, (window,) * len(size), _GROUPS[finest], _WIDTH, _FEATURES[finest])


def _case(form: str, levels: list[Level], facts: Mapping[str, Any], layout: str) -> Case:
    projected, at, of = bool(facts["projections"]), levels[-1], tuple(levels)
    n, maps = len(at.size), [f"features {level}" for level in range(len(levels))]
    weights = [name for name, _ in pyramid_of(of, "torch").named_parameters()] if projected else []
    find = pyramid_field if projected else _matched
    # Scores of all taps, once each and once stacked, and by B the products with all channels: two bytes a number.
    scores = 2 * 2.0 * sum(level.taps for level in levels)
    needs = {"A": scores, "B": _WIDTH * scores / 2}
    others = {f"eager {name}": Variant(partial(eager_field, of, name), needs=needs[name]) for name in EAGER}
    variants = {
        "coverfast triton": Variant(partial(find, of, impl="triton"), cpu=False),
        "coverfast torch": Variant(partial(find, of, impl="torch"), gpu=False),
    }
    numbers = {"flops": flops(levels, projected=projected), "exponentials": sum(float(level.taps) for level in levels)}
    numbers |= {"counted": counted_flops(of, projected=projected)}
    grid = " x ".join(map(str, at.size))
    return Case(
        f"{grid} N={facts['window']} m={facts['levels']} {form}" + (" with projections" if projected else ""),
        "vpa",
        {"shape": (at.batch, at.channels, *at.size), "form": form, **facts, **numbers},
        at,
        (*maps, *weights),
        partial(_draw, of, projected, layout),
        {**variants, **others},
        partial(_exact, find, of),
        checked=torch.float64,  # rounding moves coordinates over the faces of cells, where slopes jump
        checked_at={2: 24, 3: 16}[n] // (2 if form == "direct" else 1),
        work=pyramid_work(levels, projected=projected),
    )


# --- counts ------------------------------------------------------------------------------------------------------


def flops(levels: Sequence[Level], *, projected: bool) -> float:
    """FLOP of a forward by the definitions: products of a tap with its key's channels and its offset's components,
    two each; and the projections of both views.

    Neither the softmax's few a tap, told apart as exponentials, nor warps and compositions, a few hundred a pixel.
    """
    taps = sum(2.0 * (level.channels // level.groups + len(level.size)) * level.taps for level in levels)
    return taps + (convolution_flops(levels) if projected else 0.0)


def counted_flops(levels: tuple[Level, ...], *, projected: bool) -> float:
    """FLOP of the eager formulation B by torch's counter, on tensors without values: matrix products and convolutions
    as it knows them, and products and sums element by element.

    More than `flops` by the scale of every score, one a tap, and what warps and compositions multiply.
    """
    inputs = [x.detach() for x in _draw(levels, projected, "contiguous", "meta", torch.float32, None, 0)]
    aten = torch.ops.aten
    elements = {aten.mul: lambda *_, out_shape, **__: prod(out_shape), aten.sum: lambda x, *_, **__: prod(x)}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=elements) as counter:
        eager_field(levels, "B", *inputs)
    return float(counter.get_total_flops())


# --- ways --------------------------------------------------------------------------------------------------------


def _draw(
    levels: tuple[Level, ...],
    projected: bool,
    layout: str,
    device: str,
    dtype: torch.dtype,
    limit: int | None,
    seed: int,
) -> list[Tensor]:
    """Maps of both views in one batch, coarse to fine, and the projections' weights."""
    draws, finest = Draws(device, dtype, layout, seed), 2 ** (len(levels) - 1)
    # Every level is twice the size of the one above, on a small grid too.
    at = levels[0].at_most(None if limit is None else max(1, limit // finest))
    widths = [level.features if projected else level.channels for level in levels]
    maps = [draws.features(2 * at.batch, width, [s * 2**step for s in at.size]) for step, width in enumerate(widths)]
    weights = list(pyramid_of(levels, "torch").parameters()) if projected else []
    return [*maps, *(w.detach().to(device, draws.exact).requires_grad_() for w in weights)]


def _matched(levels: tuple[Level, ...], *maps: Tensor, impl: str) -> Tensor:
    """Of coverfast, from projected keys and queries."""
    ways = partial(mov, impl=impl), partial(warp_up, impl=impl), partial(compose, impl=impl)
    return fused(levels, maps, None, *ways)


def _exact(find: Callable[..., Tensor], levels: tuple[Level, ...], *inputs: Tensor) -> Tensor:
    """The definition. Taps out of a small grid have no weight: windows that reach beyond it are cut."""
    sizes = [x.shape[2:] for x in inputs[: len(levels)]]
    fitting = tuple(
        replace(level, window=tuple(min(w, 2 * s - 1) for w, s in zip(level.window, size, strict=True)))
        for level, size in zip(levels, sizes, strict=True)
    )
    return find(fitting, *inputs, impl="reference")
