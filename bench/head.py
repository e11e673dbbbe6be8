"""The head of a training step as a case: pyramid and losses, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from coverfast.bench import baselines as eager
from coverfast.bench.problems import Case, Draws, Level, Variant
from coverfast.bench.pyramids import EAGER, eager_field, pyramid_field, pyramid_of, pyramid_work
from coverfast.geometry import AffineDVF, inside_mask
from coverfast.ops.losses import consistency_loss, field_errors


def head_cases(levels: Sequence[Level], layout: str) -> list[Case]:
    """From the features of all levels, both views in one batch, to the gradients of the loss.

    Checked in float32: half precision moves coordinates over the faces of cells, where slopes jump.
    """
    at, of = levels[-1], tuple(levels)
    maps = [f"features {level}" for level in range(len(levels))]
    names = (*maps, "numbers", *(name for name, _ in pyramid_of(of, "torch").named_parameters()))
    facts = {"shape": (2 * at.batch, at.features, *at.size), "window": at.window, "layout": layout}
    variants = {
        "coverfast auto": Variant(partial(head, of, impl="auto"), cpu=False),
        "coverfast torch": Variant(partial(head, of, impl="torch")),
        **{f"eager {way}": Variant(partial(head_eager, of, way)) for way in EAGER},
    }
    make, exact = partial(_head_inputs, of, layout), partial(head, of, impl="reference")
    name = f"{at.name.partition(' level')[0]} head"
    work = pyramid_work(levels, projected=True)
    return [Case(name, "head", facts, at, names, make, variants, exact, checked=torch.float32, work=work)]


def _head_inputs(
    levels: tuple[Level, ...], layout: str, device: str, dtype: torch.dtype, limit: int | None, seed: int
) -> list[Tensor]:
    draws, finest = Draws(device, dtype, layout, seed), 2 ** (len(levels) - 1)
    # Every level is twice the size of the one above, on a small grid too.
    at = levels[0].at_most(None if limit is None else max(1, limit // finest))
    maps = [
        draws.features(2 * at.batch, level.features, [s * 2**step for s in at.size])
        for step, level in enumerate(levels)
    ]
    numbers = draws.affine(at.batch, [s * finest for s in at.size]).numbers
    weights = [p.detach().to(device, draws.exact).requires_grad_() for p in pyramid_of(levels, "torch").parameters()]
    return [*maps, numbers, *weights]


def head_field(levels: tuple[Level, ...], *inputs: Tensor, impl: str) -> Tensor:
    """The predicted field."""
    maps, weights = inputs[: len(levels)], inputs[len(levels) + 1 :]
    return pyramid_field(levels, *maps, *weights, impl=impl)


def head_loss(levels: tuple[Level, ...], psi: Tensor, *inputs: Tensor, impl: str) -> Tensor:
    """The loss of a predicted field, and the figures of merit beside it."""
    truth = AffineDVF.of(inputs[len(levels)], tuple(psi.shape[2:]))
    matched = field_errors(psi, truth, "inside", impl=impl).l1
    feat_a, feat_b = inputs[len(levels) - 1].chunk(2)
    return matched + consistency_loss(feat_a, feat_b, truth, "inside", impl=impl)


def head(levels: tuple[Level, ...], *inputs: Tensor, impl: str) -> Tensor:
    """Features of both views, truth and weights to the loss."""
    return head_loss(levels, head_field(levels, *inputs, impl=impl), *inputs, impl=impl)


def head_eager(levels: tuple[Level, ...], formulation: str, *inputs: Tensor) -> Tensor:
    """The same as people write it: whole feature maps are warped, the truth is a dense field."""
    maps, weights = inputs[: len(levels)], inputs[len(levels) + 1 :]
    psi = eager_field(levels, formulation, *maps, *weights)
    dvf = AffineDVF.of(inputs[len(levels)], tuple(psi.shape[2:])).dense()
    mask, (feat_a, feat_b) = inside_mask(dvf), maps[-1].chunk(2)
    return eager.vector_eager(psi, dvf, mask) + eager.consistency_eager(feat_a, feat_b, dvf, mask)
