"""Measure the variants of a case: correctness first, then time and memory, beside a floor.

What is wrong, does not run or does not fit is not timed and says so; the rest goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coverfast.bench.correctness import definition, error_of, outputs_of, slopes_of
from coverfast.bench.measure import (
    Run,
    captured,
    copy_rate,
    device_growth,
    high_water_mark,
    process_growth,
    reason,
    timed,
)
from coverfast.bench.plans import shared_numbers
from coverfast.bench.problems import Case, Variant
from coverfast.checks import require
from coverfast.kernels import INTERPRETED
from coverfast.kernels.launch import override
from coverfast.ops.dispatch import KERNELS

#: Largest difference from the definition in float64 that a variant may show and still be timed, over the largest value.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-8}

#: Variants that are also measured as a CUDA graph.
GRAPHED = ("coverfast triton", "coverfast auto")


@dataclass(frozen=True)
class Result:
    """One variant of one case. None: not measured, and `note` says why."""

    case: str
    op: str
    facts: Mapping[str, Any]
    dtype: str
    variant: str
    error: float | None
    forward_ms: float | None
    both_ms: float | None  # forward and backward
    spread_ms: float | None  # between the quartiles, of both where there is a backward
    extra_mb: float | None  # at the peak, over the inputs and the output's gradient
    forward_floor_ms: float | None
    both_floor_ms: float | None
    note: str = ""

    @property
    def of_floor(self) -> float | None:
        """Time over floor, of forward and backward where there is one."""
        both = self.both_floor_ms is not None
        taken, floor = (self.both_ms, self.both_floor_ms) if both else (self.forward_ms, self.forward_floor_ms)
        return None if taken is None or floor is None else taken / floor


def default_names(case: Case, device: str) -> list[str]:
    """The variants that are measured where nobody asks for others."""
    there = {name: v for name, v in case.variants.items() if name != "coverfast triton" or case.op in KERNELS}
    return [name for name, variant in there.items() if variant.cpu or device != "cpu"]


@dataclass(frozen=True)
class _Checked:
    """A variant that is right: what is timed, its memory, the bytes that it writes."""

    forward: Run
    both: Run | None
    written: int
    extra_mb: float | None = None


def measure(case: Case, device: str, dtype: torch.dtype, repeats: int, names: Sequence[str] = ()) -> list[Result]:
    """The named variants of a case, by default those of `default_names`."""
    require(not INTERPRETED, "bench times kernels and cannot with TRITON_INTERPRET set; unset it")
    inputs = case.make(device, dtype, None, 0)
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    found: dict[str, _Checked] = {}
    names = list(names or default_names(case, device))
    # Every shape is a graph of its own in a benchmark: let torch.compile keep them all.
    with torch._dynamo.config.patch(recompile_limit=256):
        _check(case, names, inputs, device, dtype, errors, notes)
        for name in [name for name in names if name not in notes]:
            try:
                checked = _runs(case, case.variants[name], inputs)
                if device == "cpu":
                    job = case.make, case.variants[name], case.backward, dtype
                    extra = process_growth(growth, *job, repeats=min(3, repeats))
                else:
                    extra = device_growth(checked.both or checked.forward)
                found[name] = replace(checked, extra_mb=extra)
            except Exception as error:  # a baseline may fail in any way
                notes[name] = reason(error)
        one, two = _times(found, repeats, device, notes)
        # Views are drawn on the CPU, which no graph can hold.
        for name in [name for name in GRAPHED if name in one and device == "cuda" and case.op != "views"]:
            # Small levels are over before Python has launched them; replayed as a graph they show their kernels.
            graph, ours = f"{name}, CUDA graph", found[name]
            names, errors[graph] = [*names, graph], errors[name]
            found[graph] = _Checked(captured(ours.forward), ours.both and captured(ours.both), ours.written)
            for times, more in zip((one, two), _times({graph: found[graph]}, repeats, device, notes), strict=True):
                times |= more
    floors = _floors(case, inputs, max((c.written for c in found.values()), default=0), device)
    results = []
    for name in names:
        samples = [times.get(name) for times in (one, two)]
        medians = [None if sample is None else float(np.median(sample)) for sample in samples]
        last = samples[1] or samples[0]
        spread = None if last is None else float(np.subtract(*np.percentile(last, (75, 25))))
        extra_mb = found[name].extra_mb if name in found else None
        of = case.name, case.op, case.facts, str(inputs[0].dtype)[6:], name, errors.get(name)
        results.append(Result(*of, medians[0], medians[1], spread, extra_mb, floors[0], floors[1], notes.get(name, "")))
    return results


def _check(
    case: Case,
    names: Sequence[str],
    inputs: Sequence[Tensor],
    device: str,
    dtype: torch.dtype,
    errors: dict[str, float],
    notes: dict[str, str],
) -> None:
    """Errors of the variants, and notes on those that are not to be timed."""
    checked = case.checked or inputs[0].dtype
    small, expected = definition(case, device, checked)
    numbers = shared_numbers(case, dtype) if device == "cuda" else {}
    for name in names:
        try:
            with override(**numbers), _full_precision():  # checked are the kernels that are timed
                errors[name] = error_of(case, case.variants[name], small, expected)
            if not errors[name] <= TOLERANCE[checked]:
                notes[name] = "wrong: not timed"
        except Exception as error:
            notes[name] = reason(error)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Convolutions in float32 and not in TF32, which is the default and has three digits."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _times(
    found: Mapping[str, _Checked], repeats: int, device: str, notes: dict[str, str]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds of the forward, and of forward and backward."""
    one = timed({name: c.forward for name, c in found.items()}, repeats, device, notes)
    return one, timed({name: c.both for name, c in found.items() if c.both is not None}, repeats, device, notes)


def sweep(case: Case, dtype: torch.dtype, numbers: Mapping[str, int], repeats: int) -> dict[str, Any]:
    """Milliseconds of the kernels of a case on this GPU, launched with these numbers and not those of the rules."""
    notes: dict[str, str] = {}
    times: list[float | None] = [None, None]
    with override(**numbers):
        try:
            found = {"": _runs(case, case.variants["coverfast triton"], case.make("cuda", dtype, None, 0))}
            times = [float(np.median(t[""])) if t else None for t in _times(found, repeats, "cuda", notes)]
        except Exception as error:  # too many registers, say; the other launches are still to be timed
            notes[""] = reason(error)
    return {
        "case": case.name,
        "dtype": str(dtype)[6:],
        **numbers,
        "forward_ms": times[0],
        "both_ms": times[1],
        "note": notes.get("", ""),
    }


# --- runs --------------------------------------------------------------------------------------------------------


def _runs(case: Case, variant: Variant, inputs: Sequence[Tensor]) -> _Checked:
    """Forward, and forward and backward."""
    ready = variant.ready(inputs)

    def forward() -> Any:
        with torch.no_grad():
            return variant.call(*ready)

    outputs = outputs_of(forward())
    written = sum(x.nbytes for x in outputs)
    if not case.backward:
        return _Checked(forward, None, written)
    wanted, slopes = [x for x in ready if x.requires_grad], slopes_of(outputs)

    def both() -> Any:
        return torch.autograd.grad(outputs_of(variant.call(*ready)), wanted, slopes)

    return _Checked(forward, both, written)


def growth(make: Callable[..., list[Tensor]], variant: Variant, backward: bool, dtype: torch.dtype) -> float:
    """In a process of its own: how far one forward and backward lifts the high-water mark, in MB."""

    def run(limit: int | None) -> float:
        ready = variant.ready(make("cpu", dtype, limit, 0))
        before = high_water_mark()
        outputs = outputs_of(variant.call(*ready))
        if backward:
            torch.autograd.grad(sum(x.sum() for x in outputs), [x for x in ready if x.requires_grad])  # type: ignore[arg-type]
        return high_water_mark() - before

    run(8)  # what a first call loads is not the call's memory
    return run(None)


def _floors(case: Case, inputs: Sequence[Tensor], written: int, device: str) -> tuple[float | None, float | None]:
    """Milliseconds below which neither forward nor forward and backward can come.

    Arithmetic where the case counts its clocks. Otherwise memory: every input read in both directions, the output
    written and its gradient read, the inputs' gradients written, as fast as a copy.
    """
    if case.clocks is not None:
        if device == "cpu":
            return None, None
        properties = torch.cuda.get_device_properties(0)
        # In kHz; an H200's where the driver does not tell.
        clocks = properties.multi_processor_count * float(getattr(properties, "clock_rate", 0) or 1.98e6)
        return case.clocks[0] / clocks, sum(case.clocks) / clocks
    one = sum(x.nbytes for x in inputs) + written
    two = one + sum(x.nbytes for x in inputs if x.requires_grad)
    return one / copy_rate(device), (one + two) / copy_rate(device) if case.backward else None
