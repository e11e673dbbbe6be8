"""The cases of every operator: what is computed, on what, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coverfast.bench import baselines as eager
from coverfast.bench import natten_baseline as natten
from coverfast.bench.head import head_cases
from coverfast.bench.problems import NCC_WINDOW, Case, Draws, Level, Variant, mov_work
from coverfast.geometry import AffineDVF, inside_mask
from coverfast.ops.compose import compose
from coverfast.ops.fuse import fuse_affine
from coverfast.ops.losses import consistency_loss, end_point_error, vector_loss
from coverfast.ops.mov import mov
from coverfast.ops.ncc import ncc_loss
from coverfast.ops.norm import sample_norm
from coverfast.ops.warp import warp, warp_up
from coverfast.views import make_views


def _case(
    level: Level,
    what: str,
    op: str,
    facts: Mapping[str, Any],
    inputs: Mapping[str, str],
    ours: Callable[..., Any],
    others: Mapping[str, Variant],
    *,
    layout: str = "contiguous",
    **more: Any,
) -> Case:
    """`what` it is beside others of its level; names of the inputs and what `_draw` makes; `ours` takes `impl`."""
    variants = {
        "coverfast triton": Variant(partial(ours, impl="triton"), cpu=False),
        "coverfast torch": Variant(partial(ours, impl="torch")),
    }
    make, exact = partial(_draw, level, tuple(inputs.values()), layout), partial(ours, impl="reference")
    return Case(
        f"{level.name} {what}".strip(), op, facts, level, tuple(inputs), make, {**variants, **others}, exact, **more
    )


def _draw(
    level: Level, kinds: Sequence[str], layout: str, device: str, dtype: torch.dtype, limit: int | None, seed: int
) -> list[Tensor]:
    at, draws = level.at_most(limit, whole_x=device == "cuda"), Draws(device, dtype, layout, seed)
    makers: dict[str, Callable[[], Tensor]] = {
        "keys": lambda: draws.features(at.batch, at.channels, at.size),
        "features": lambda: draws.features(at.batch, at.features, at.size),
        "field": lambda: draws.field(at.batch, at.size),
        "coarse field": lambda: draws.coarse_field(at.batch, [s // 2 for s in at.size]),
        "affine": lambda: draws.affine(at.batch, at.size).numbers,
        "theta": lambda: draws.affine(at.batch, at.size).theta.contiguous().requires_grad_(),
        "channels": lambda: draws.uniform(at.channels).requires_grad_(),
        "images": lambda: draws.uniform(at.batch, 1, *at.image),
        "fixed image": lambda: draws.uniform(at.batch, 1, *at.size),
        "moved image": lambda: draws.uniform(at.batch, 1, *at.size).requires_grad_(),
    }
    return [makers[kind]() for kind in kinds]


def _facts(level: Level, layout: str) -> dict[str, Any]:
    return {"shape": (level.batch, level.channels, *level.size), "layout": layout}


def mov_cases(levels: Sequence[Level], layout: str) -> list[Case]:
    """Every level, its floor by `mov_work`."""
    cases = []
    for at in levels:
        options: dict[str, Any] = {"window": at.window, "groups": at.groups}
        others = {
            "eager A": Variant(partial(eager.mov_a, **options)),
            "eager B": Variant(partial(eager.mov_b, **options)),
            "compiled A": Variant(partial(eager.mov_compiled, **options), cpu=False),
            "FlexAttention": Variant(partial(eager.mov_flex, **options), cpu=False),
        }
        # The grid of the check must have an interior.
        if natten.available() and all(min(s, 24) > 2 * w for s, w in zip(at.size, at.window, strict=True)):
            margin = natten.margin(at.window).queries
            others["NATTEN, interior"] = Variant(partial(natten.mov_natten, **options), cpu=False, margin=margin)
        inputs, ours = {"q": "keys", "k": "keys"}, partial(mov, **options)
        cases.append(
            _case(at, "", "mov", _facts(at, layout) | options, inputs, ours, others, layout=layout, work=mov_work(at))
        )
    return cases


def warp_cases(levels: Sequence[Level], layout: str) -> list[Case]:
    """The projected keys of every level but the coarsest, brought over by a field, and as the pyramid does by that of
    the level above.
    """
    dense = {
        "grid_sample": Variant(eager.warp_eager),
        "grid_sample, grid ready": Variant(eager.sample, _with_grid),
    }
    up = {"grid_sample": Variant(eager.warp_up_eager)}
    cases = []
    for at in levels[1:] or levels:
        for what, inputs, ours, others in (
            ("", {"x": "keys", "dvf": "field"}, warp, dense),
            ("up", {"x": "keys", "coarse": "coarse field"}, warp_up, up),
        ):
            if all(s % 2 == 0 for s in at.size) or what != "up":
                form = {"field": "coarse" if what else "dense"}
                cases.append(_case(at, what, "warp", _facts(at, layout) | form, inputs, ours, others, layout=layout))
    return cases


def _with_grid(x: Tensor, dvf: Tensor) -> list[Tensor]:
    return [x, eager.sampling_grid(dvf.detach()).requires_grad_()]


def compose_cases(levels: Sequence[Level], layout: str) -> list[Case]:
    """The field of every level but the coarsest, over that of the level above. Fields are contiguous."""
    inputs, others = {"fine": "field", "coarse": "coarse field"}, {"eager": Variant(eager.compose_eager)}
    return [
        _case(at, "", "compose", {"shape": (at.batch, len(at.size), *at.size)}, inputs, compose, others)
        for at in levels[1:] or levels
    ]


def fuse_cases(levels: Sequence[Level], layout: str) -> list[Case]:
    """A field of the finest level and an affine map after it. Fields are contiguous."""
    at = levels[-1]
    facts, inputs = {"shape": (at.batch, len(at.size), *at.size)}, {"dvf": "field", "theta": "theta"}
    others = {"eager, matrix product": Variant(eager.fuse_eager)}
    return [_case(at, "", "fuse", facts, inputs, fuse_affine, others)]


def norm_cases(levels: Sequence[Level], layout: str) -> list[Case]:
    """The norm of every level's projection. What people write today is what `impl="torch"` does."""
    inputs = {"x": "keys", "bias": "channels", "weight": "channels", "shift": "channels"}
    return [_case(at, "", "norm", _facts(at, layout), inputs, sample_norm, {}, layout=layout) for at in levels]


def loss_cases(levels: Sequence[Level], layout: str) -> list[Case]:
    """Features and field of the finest level against an affine truth; the end-point error is a figure of merit."""
    at = levels[-1]
    facts = {"shape": (at.batch, at.features, *at.size), "layout": layout}
    inputs = {"feat_a": "features", "feat_b": "features", "numbers": "affine"}
    others = {"eager, field ready": Variant(eager.consistency_eager, _with_field)}
    cases = [_case(at, "consistency", "losses", facts, inputs, _consistency, others, layout=layout)]
    facts, inputs = {"shape": (at.batch, len(at.size), *at.size)}, {"pred": "field", "numbers": "affine"}
    for what, loss, baseline in (
        ("vector", vector_loss, eager.vector_eager),
        ("end point", end_point_error, eager.end_point_eager),
    ):
        others = {"eager, field ready": Variant(baseline, _with_field)}
        cases.append(_case(at, what, "losses", facts, inputs, partial(_field_loss, loss), others))
    return cases


def _consistency(feat_a: Tensor, feat_b: Tensor, numbers: Tensor, *, impl: str) -> Tensor:
    truth = AffineDVF.of(numbers, tuple(feat_a.shape[2:]))
    return consistency_loss(feat_a, feat_b, truth, "inside", impl=impl)


def _field_loss(loss: Callable[..., Tensor], pred: Tensor, numbers: Tensor, *, impl: str) -> Tensor:
    return loss(pred, AffineDVF.of(numbers, tuple(pred.shape[2:])), "inside", impl=impl)


def _with_field(*inputs: Tensor) -> list[Tensor]:
    """The dense truth and its mask instead of its numbers, as a data pipeline may hand them over."""
    *maps, numbers = inputs
    dvf = AffineDVF.of(numbers, tuple(maps[0].shape[2:])).dense()
    return [*maps, dvf, inside_mask(dvf)]


def ncc_cases(levels: Sequence[Level], layout: str) -> list[Case]:
    """Images of the finest level's size in the windows of GVSL, one of them brought over; images are in float32."""
    at = levels[-1]
    facts = {"shape": (at.batch, 1, *at.size), "window": (NCC_WINDOW,) * len(at.size)}
    inputs = {"x": "fixed image", "y": "moved image"}
    others = {
        "eager, convolutions": Variant(partial(eager.ncc_eager, window=NCC_WINDOW)),
        "eager, 1D convolutions": Variant(partial(eager.ncc_eager, window=NCC_WINDOW, separable=True)),
    }
    # The definition holds whole windows: a small grid, but one with an interior.
    ours = partial(ncc_loss, window=NCC_WINDOW)
    return [_case(at, "", "ncc", facts, inputs, ours, others, checked_at=NCC_WINDOW + 2)]


def views_cases(levels: Sequence[Level], layout: str) -> list[Case]:
    """Both views of a batch of images."""
    at = levels[-1]
    shares = tuple(zip(at.size, at.image, strict=True))
    facts, ours = {"images": (at.batch, 1, *at.image), "crop": at.size}, partial(_views, shares)
    return [_case(at, "views", "views", facts, {"images": "images"}, ours, {}, outputs=("pair",), backward=False)]


def _views(shares: Sequence[tuple[int, int]], images: Tensor, *, impl: str) -> Tensor:
    if impl == "reference":  # views are the same on every device
        return _views(shares, images.cpu(), impl="torch").to(images.device)
    crop = tuple(s * part // whole for s, (part, whole) in zip(images.shape[2:], shares, strict=True))
    return make_views(images, crop, seed=1, iteration=1, impl=impl).pair


#: By the name of the command.
CASES: dict[str, Callable[[Sequence[Level], str], list[Case]]] = {
    "mov": mov_cases,
    "warp": warp_cases,
    "compose": compose_cases,
    "fuse": fuse_cases,
    "norm": norm_cases,
    "losses": loss_cases,
    "ncc": ncc_cases,
    "views": views_cases,
    "head": head_cases,
}
