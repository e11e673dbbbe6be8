"""Whether a variant computes what the definition does: outputs and gradients, on a small grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from coverfast.bench.problems import Case, Variant


def outcome(case: Case, variant: Variant, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs, and the gradients of a fixed random projection of them, by name.

    Of an input that the variant has replaced before it is timed there is no gradient.
    """
    ready = variant.ready(inputs)
    with torch.set_grad_enabled(case.backward):
        outputs = outputs_of(variant.call(*ready))
    found = dict(zip(case.outputs, (out.detach() for out in outputs), strict=True))
    if case.backward:
        pairs = zip(case.inputs, inputs, ready, strict=False)
        wanted = {f"d_{name}": x for name, x, y in pairs if x is y and x.requires_grad}
        found |= dict(zip(wanted, torch.autograd.grad(outputs, list(wanted.values()), slopes_of(outputs)), strict=True))
    return found


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; infinite where shapes differ, NaN where a value is."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def definition(case: Case, device: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Inputs on a small grid, and what the definition makes of them in float64."""
    inputs = case.make(device, dtype, case.checked_at, 1)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    return inputs, outcome(case, Variant(case.exact), exact)


def error_of(case: Case, variant: Variant, inputs: Sequence[Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of outputs and gradients from what is expected."""
    found, margin = outcome(case, variant, inputs), variant.margin
    if margin:
        found, expected = ({k: _interior(k, v, margin) for k, v in part.items()} for part in (found, expected))
    # torch's maximum is NaN where anything is; Python's depends on the order.
    return float(torch.tensor([difference(value, expected[name]) for name, value in found.items()]).max())


def _interior(name: str, x: Tensor, margin: Sequence[int]) -> Tensor:
    """Without the border, and the pixels whose gradients have met an output there."""
    margin = [2 * m + 1 for m in margin] if name.startswith("d_") else margin
    for axis, m in enumerate(margin, start=-len(margin)):
        x = x.narrow(axis, m, max(0, x.shape[axis] - 2 * m))
    return x


def outputs_of(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def slopes_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Random gradients, of numbers that every dtype holds exactly.

    Not of the default generator, which a failed capture of a CUDA graph spoils.
    """
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    return [torch.randn(x.shape, generator=generator, device=x.device).bfloat16().to(x.dtype) for x in outputs]
