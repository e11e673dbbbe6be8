"""Measure the variants of cases: only what is right, in memory and time, beside a floor.

What is wrong, does not run or does not fit is not timed and says so; the rest goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coverfast.bench.measure import captured, reason, timed, total_memory
from coverfast.bench.prepared import Here, Prepared, Runs, Version
from coverfast.bench.problems import Case, Work
from coverfast.bench.rates import Rates, rates
from coverfast.checks import require
from coverfast.kernels import INTERPRETED
from coverfast.kernels.launch import override
from coverfast.ops.dispatch import KERNELS

#: Largest difference from the definition in float64 that a variant may show and still be timed, over the largest value.
#: Eager code rounds every step to half precision; ours rounds results alone.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-8}
OURS_TOLERANCE = TOLERANCE | {torch.float16: 2.5e-3, torch.bfloat16: 2e-2}

#: Variants that are also measured as a CUDA graph.
GRAPHED = ("coverfast triton", "coverfast auto")
OURS = "coverfast"


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
    forward_spread_ms: float | None  # between the quartiles
    spread_ms: float | None  # the same of both, or of the forward where there is no backward
    runs: int  # that these are the medians of
    extra_mb: float | None  # at the peak, over the inputs and the output's gradient
    forward_floor_ms: float | None
    both_floor_ms: float | None
    note: str = ""

    @property
    def ms(self) -> float | None:
        """Of forward and backward where there is one."""
        return self.forward_ms if self.both_floor_ms is None else self.both_ms

    @property
    def floor_ms(self) -> float | None:
        """Below which `ms` cannot come."""
        return self.forward_floor_ms if self.both_floor_ms is None else self.both_floor_ms

    @property
    def of_floor(self) -> float | None:
        """Time over floor."""
        return None if self.ms is None or self.floor_ms is None else self.ms / self.floor_ms


def default_names(case: Case, device: str) -> list[str]:
    """The variants that are measured where nobody asks for others."""
    compiled = ("mov" if case.op == "vpa" else case.op) in KERNELS
    there = {name: v for name, v in case.variants.items() if name != "coverfast triton" or compiled}
    return [name for name, variant in there.items() if (variant.cpu if device == "cpu" else variant.gpu)]


# --- measuring ---------------------------------------------------------------------------------------------------


def measure(
    case: Case, device: str, dtype: torch.dtype, repeats: int, names: Sequence[str] = (), **options: Any
) -> list[Result]:
    """The named variants of a case, by default those of `default_names`; options as in `measure_together`."""
    return measure_together([case], device, dtype, repeats, names, **options)


def measure_together(
    cases: Sequence[Case],
    device: str,
    dtype: torch.dtype,
    repeats: int,
    names: Sequence[str] = (),
    *,
    seconds: float = inf,
    versions: Sequence[Version] = (),
) -> list[Result]:
    """Variants of several cases, all of them timed in turn.

    Args:
        cases: what is computed.
        device: "cpu" or "cuda".
        dtype: of the maps.
        repeats: runs that are timed.
        names: variants; those that a case lacks are left out. Default: each case's `default_names`.
        seconds: that a run may take on a CPU; a variant that has been timed for so long is not run again.
        versions: of the library, that of this code first: everything then runs in the processes of these, and what is
            coverfast's in each of them.
    """
    require(not INTERPRETED, "bench times kernels and cannot with TRITON_INTERPRET set; unset it")
    measured = _Measured()
    floors: list[tuple[float | None, float | None]] = []
    here = [Here(case, device, dtype) for case in cases]
    for version in versions:
        version.forget()
    # Every shape is a graph of its own in a benchmark: let torch.compile keep them all.
    with torch._dynamo.config.patch(recompile_limit=256):
        for number, mine in enumerate(here):
            there = [(version.name, version.prepared(mine.case, device, dtype)) for version in versions]
            chosen = [name for name in names if name in mine.case.variants]
            for name in chosen if names else default_names(mine.case, device):
                for revision, place in (there if name.startswith(OURS) else there[:1]) or [("", mine)]:
                    label = f"{name} @ {revision}" if revision else name
                    needs = mine.case.variants[name].needs
                    measured.look_at((number, label), place, name, device, repeats, seconds, needs)
        if device == "cuda" and not versions:
            measured.add_graphs(cases)
        measured.time(repeats, device, seconds)
    for number, mine in enumerate(here):
        written = [runs.written for key, runs in measured.ready.items() if key[0] == number]
        floors.append(_floors(mine.case, mine.inputs, min(written, default=0), rates(device, dtype)))
    return [measured.result(key, here[key[0]], *floors[key[0]]) for key in sorted(measured.keys, key=lambda k: k[0])]


Key = tuple[int, str]


@dataclass
class _Measured:
    """What has been found of every variant, by the number of its case and its name."""

    keys: list[Key] = field(default_factory=list)
    notes: dict[Key, str] = field(default_factory=dict)
    errors: dict[Key, float] = field(default_factory=dict)
    extra: dict[Key, float] = field(default_factory=dict)
    ready: dict[Key, Runs] = field(default_factory=dict)
    forward: dict[Key, list[float]] = field(default_factory=dict)
    both: dict[Key, list[float]] = field(default_factory=dict)

    def look_at(
        self, key: Key, there: Prepared, name: str, device: str, repeats: int, seconds: float, needs: float
    ) -> None:
        """Error and memory of a variant; a baseline may fail in any way."""
        self.keys.append(key)
        if needs > total_memory(device):
            self.notes[key] = f"does not fit: needs {needs / 1e9:.0f} GB at least"
            return
        try:
            # On a CPU memory comes first, and from another process: what does not fit would end this one.
            extra = there.growth(name, repeats, seconds) if device == "cpu" else None
            self.errors[key] = there.error(name)
            allowed = OURS_TOLERANCE if name.startswith(OURS) else TOLERANCE
            if not self.errors[key] <= allowed[there.checked]:
                self.notes[key] = "wrong: not timed"
                return
            ready = there.runs(name)
            self.extra[key] = there.growth(name, repeats, seconds) if extra is None else extra
            self.ready[key] = ready
        except Exception as error:
            self.notes[key] = reason(error)

    def add_graphs(self, cases: Sequence[Case]) -> None:
        """The same as CUDA graphs: small levels are over before Python has launched them.

        They are captured when they first run. What they hold is theirs alone, and is not measured.
        """
        for key, ours in list(self.ready.items()):
            # Views are drawn on the CPU, which no graph can hold.
            if key[1] in GRAPHED and cases[key[0]].op != "views":
                twin = (key[0], f"{key[1]}, CUDA graph")
                self.keys.append(twin)
                self.errors[twin] = self.errors[key]
                self.ready[twin] = Runs(captured(ours.forward), ours.both and captured(ours.both), ours.written)

    def time(self, repeats: int, device: str, seconds: float) -> None:
        """Milliseconds of the forward, and of forward and backward."""
        calls = {key: runs.forward for key, runs in self.ready.items()}
        self.forward |= timed(calls, repeats, device, self.notes, seconds)
        calls = {key: runs.both for key, runs in self.ready.items() if runs.both is not None}
        self.both |= timed(calls, repeats, device, self.notes, seconds)

    def result(self, key: Key, here: Here, forward_floor: float | None, both_floor: float | None) -> Result:
        """For tables and files."""
        one, two = self.forward.get(key), self.both.get(key)
        medians = [None if times is None else float(np.median(times)) for times in (one, two)]
        last = two or one or []
        spreads = [float(np.subtract(*np.percentile(t, (75, 25)))) if t and len(t) > 1 else None for t in (one, last)]
        note, case = self.notes.get(key, ""), here.case
        return Result(
            case=case.name,
            op=case.op,
            facts=case.facts,
            dtype=str(here.inputs[0].dtype)[6:],
            variant=key[1],
            error=self.errors.get(key),
            forward_ms=medians[0],
            both_ms=medians[1],
            forward_spread_ms=spreads[0],
            spread_ms=spreads[1],
            runs=len(last),
            extra_mb=None if note else self.extra.get(key),
            forward_floor_ms=forward_floor,
            both_floor_ms=both_floor,
            note=note,
        )


def _floors(case: Case, inputs: Sequence[Tensor], written: int, can: Rates) -> tuple[float | None, float | None]:
    """Milliseconds below which neither forward nor forward and backward can come, whichever is longest: arithmetic
    where the case counts it, at the measured rates; and memory, where every input is read in both directions, the
    output written and its gradient read, the inputs' gradients written, as fast as a copy.
    """
    one = sum(x.nbytes for x in inputs) + written
    two = one + sum(x.nbytes for x in inputs if x.requires_grad)
    forward, backward = case.work or (Work(), Work())
    first = _floor(one, forward, can, inputs[0].dtype)
    return first, first + _floor(two, backward, can, inputs[0].dtype) if case.backward else None


def _floor(moved: float, work: Work, can: Rates, dtype: torch.dtype) -> float:
    arithmetic = 2 * work.multiply_adds / can.multiply_add, work.exponentials / can.exponential
    matrix = work.matrix / can.matrix.get(str(dtype)[6:], can.multiply_add)
    return 1e3 * max(moved / can.copy, *arithmetic, matrix)


def sweep(case: Case, dtype: torch.dtype, numbers: Mapping[str, int], repeats: int) -> dict[str, Any]:
    """Milliseconds of the kernels of a case on this GPU, launched with these numbers and not those of the rules."""
    measured, key = _Measured(), (0, "coverfast triton")
    times: list[float | None] = [None, None]
    with override(**numbers):
        try:
            measured.ready[key] = Here(case, "cuda", dtype).runs(key[1])
            measured.time(repeats, "cuda", inf)
            found = measured.forward.get(key), measured.both.get(key)
            times = [float(np.median(t)) if t else None for t in found]
        except Exception as error:  # too many registers, say; the other launches are still to be timed
            measured.notes[key] = reason(error)
    return {
        "case": case.name,
        "dtype": str(dtype)[6:],
        **numbers,
        "forward_ms": times[0],
        "both_ms": times[1],
        "note": measured.notes.get(key, ""),
    }
