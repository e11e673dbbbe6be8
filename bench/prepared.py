"""A case whose variants can be looked at: their error, their memory, and what is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from coverfast.bench.correctness import definition, error_of, outputs_of, slopes_of
from coverfast.bench.measure import Run, device_growth, high_water_mark, process_growth
from coverfast.bench.plans import shared_numbers
from coverfast.bench.problems import Case, Variant
from coverfast.kernels.launch import override


@dataclass(frozen=True)
class Runs:
    """A variant that is ready: what is timed, and the bytes that it writes."""

    forward: Run
    both: Run | None
    written: int


class Prepared(Protocol):
    """A case whose variants can be looked at, here or in another process."""

    @property
    def checked(self) -> torch.dtype:
        """In which errors are looked for."""

    def error(self, name: str) -> float:
        """Largest difference from the definition."""

    def growth(self, name: str, repeats: int, seconds: float) -> float:
        """MB at the peak, over the inputs."""

    def runs(self, name: str) -> Runs:
        """What is timed."""


class Here:
    """A case in this process."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype

    @cached_property
    def inputs(self) -> list[Tensor]:
        """Those that are timed."""
        return self.case.make(self.device, self.dtype, None, 0)

    @cached_property
    def checked(self) -> torch.dtype:
        """In which errors are looked for."""
        return self.case.checked or self.inputs[0].dtype

    @cached_property
    def _definition(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        return definition(self.case, self.device, self.checked)

    def error(self, name: str) -> float:
        """See `Prepared`."""
        numbers = shared_numbers(self.case, self.dtype) if self.device == "cuda" else {}
        with override(**numbers), _full_precision():  # checked are the kernels that are timed
            return error_of(self.case, self.case.variants[name], *self._definition)

    def growth(self, name: str, repeats: int, seconds: float) -> float:
        """See `Prepared`."""
        if self.device == "cpu":
            job = self.case.make, self.case.variants[name], self.case.backward, self.dtype
            return process_growth(growth, *job, min(3, repeats), repeats=1, seconds=seconds)
        ready = self.runs(name)
        return device_growth(ready.both or ready.forward)

    def runs(self, name: str) -> Runs:
        """See `Prepared`."""
        variant = self.case.variants[name]
        ready = variant.ready(self.inputs)

        def forward() -> Any:
            with torch.no_grad():
                return variant.call(*ready)

        outputs = outputs_of(forward())
        written = sum(x.nbytes for x in outputs)
        if not self.case.backward:
            return Runs(forward, None, written)
        wanted, slopes = [x for x in ready if x.requires_grad], slopes_of(outputs)

        def both() -> Any:
            return torch.autograd.grad(outputs_of(variant.call(*ready)), wanted, slopes)

        return Runs(forward, both, written)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Convolutions in float32 and not in TF32, which is the default and has three digits."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def growth(
    make: Callable[..., list[Tensor]], variant: Variant, backward: bool, dtype: torch.dtype, repeats: int
) -> float:
    """In a process of its own: how far one forward and backward lifts the high-water mark, in MB, median of some."""

    def run(limit: int | None) -> float:
        ready = variant.ready(make("cpu", dtype, limit, 0))
        before = high_water_mark(reset=True)
        outputs = outputs_of(variant.call(*ready))
        if backward:
            torch.autograd.grad(sum(x.sum() for x in outputs), [x for x in ready if x.requires_grad])  # type: ignore[arg-type]
        return high_water_mark() - before

    run(8)  # what a first call loads is not the call's memory
    begun, found = time.perf_counter(), list[float]()
    while len(found) < repeats and (not found or time.perf_counter() - begun < _ENOUGH):
        found.append(run(None))
    return statistics.median(found)


#: Seconds after which no further growth is measured: those of long runs vary little.
_ENOUGH = 5.0


class Version(Protocol):
    """A version of the library in another process, see `coverfast.bench.base`. That of this code has no name."""

    name: str

    def forget(self) -> None:
        """All cases so far."""

    def prepared(self, case: Case, device: str, dtype: torch.dtype) -> Prepared:
        """A case there."""
