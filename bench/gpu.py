"""`mov` on a GPU: correctness first, then time and memory of every variant beside the arithmetic floor.

Variants take turns, the L2 cache is flushed before every run, medians are reported. What does not fit in memory, or
does not run, says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coverfast.bench.baselines import mov_a, mov_b, mov_flex
from coverfast.bench.problems import Problem
from coverfast.kernels.launch import override
from coverfast.ops.mov import mov

_DEVICE = "cuda"

Call = Callable[[Tensor, Tensor], Tensor]

#: Largest difference from the definition in float64 that a variant may show and still be timed, by dtype, over the
#: window radius for values and over the largest gradient for gradients.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-8}


@dataclass(frozen=True)
class Result:
    """One variant on one problem. None: not measured, and `note` says why."""

    problem: str
    shape: tuple[int, ...]
    window: tuple[int, ...]
    groups: int
    dtype: str
    layout: str
    variant: str
    error: float | None
    forward_ms: float | None
    both_ms: float | None  # forward and backward
    spread_ms: float | None  # between the quartiles of both_ms
    extra_mb: float | None  # peak over what inputs and the output's gradient hold, forward and backward
    forward_floor_ms: float
    both_floor_ms: float
    note: str = ""


def floors(problem: Problem) -> tuple[float, float]:
    """Milliseconds that the multiply-adds and exponentials of all taps take at best: forward, forward and backward.

    A tap costs `d + 3` multiply-adds forward and `4 d + 7` backward, and one exponential in each of the three passes;
    a multiprocessor does 128 and 16 of them a clock.
    """
    properties = torch.cuda.get_device_properties(0)
    rate = properties.multi_processor_count * _clock_khz()
    one = problem.taps * max((problem.width + 3) / 128, 1 / 16) / rate
    two = problem.taps * max((4 * problem.width + 7) / 128, 2 / 16) / rate
    return one, one + two


def _clock_khz() -> float:
    """The highest clock of the multiprocessors; of an H200 where the driver does not tell."""
    rate = getattr(torch.cuda.get_device_properties(0), "clock_rate", 0)
    return float(rate) if rate else 1.98e6


def variants(problem: Problem, names: Sequence[str]) -> dict[str, Call]:
    """The named formulations: ours, and what people write today."""
    window, groups = problem.window, problem.groups
    every: dict[str, Call] = {
        "coverfast triton": lambda q, k: mov(q, k, window=window, groups=groups, impl="triton"),
        "coverfast torch": lambda q, k: mov(q, k, window=window, groups=groups, impl="torch"),
        "eager A": lambda q, k: mov_a(q, k, window=window, groups=groups),
        "eager B": lambda q, k: mov_b(q, k, window=window, groups=groups),
        "compiled A": torch.compile(lambda q, k: mov_a(q, k, window=window, groups=groups), dynamic=False),
        "FlexAttention": lambda q, k: mov_flex(q, k, window=window, groups=groups),
    }
    return {name: every[name] for name in names}


def inputs(shape: Sequence[int], dtype: torch.dtype, layout: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random queries and keys on the GPU that require gradients."""
    generator = torch.Generator(_DEVICE).manual_seed(seed)
    pair = []
    for _ in range(2):
        x = torch.randn(*shape, generator=generator, device=_DEVICE, dtype=torch.float32).to(dtype)
        if layout == "channels_last":
            x = x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
        pair.append(x.requires_grad_())
    return pair[0], pair[1]


def compare(
    problem: Problem, dtype: torch.dtype, names: Sequence[str], layout: str = "channels_last", repeats: int = 20
) -> list[Result]:
    """Every named variant on one problem."""
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    memory: dict[str, float] = {}
    notes: dict[str, str] = {}
    for name, call in variants(problem, names).items():
        try:
            with override(**_launch_numbers(problem, dtype)):  # checked are the kernels that are timed
                errors[name] = _error(problem, call, dtype, layout)
            if not errors[name] <= TOLERANCE[dtype]:
                notes[name] = "wrong: not timed"
                continue
            memory[name] = _extra_mb(problem, call, dtype, layout)
            calls[name] = call
        except Exception as error:  # a baseline may fail in any way; the others are still to be measured
            notes[name] = _reason(error)
            torch.cuda.empty_cache()
    one: dict[str, list[float]] = {}
    two: dict[str, list[float]] = {}
    try:
        q, k = inputs(problem.shape, dtype, layout)
        one = timed({n: _forward(c, q, k) for n, c in calls.items()}, repeats)
        two = timed({n: _both(c, q, k) for n, c in calls.items()}, repeats)
        if "coverfast triton" in calls:
            # Small levels are over before Python has launched them; replayed as a graph they show what kernels take.
            ours, name = calls["coverfast triton"], "coverfast triton, CUDA graph"
            one |= timed({name: captured(_forward(ours, q, k))}, repeats)
            two |= timed({name: captured(_both(ours, q, k))}, repeats)
            errors[name] = errors["coverfast triton"]
    except Exception as error:  # the next problem is still to be measured
        notes = {name: _reason(error) for name in calls} | notes
        torch.cuda.empty_cache()
    results = []
    for name in [*dict.fromkeys([*names, *two])]:
        facts = (problem.name, problem.shape, problem.window, problem.groups, str(dtype)[6:], layout, name)
        forward, both, spread = None, None, None
        if name in two:
            low, middle, high = statistics.quantiles(two[name], n=4)
            forward, both, spread = statistics.median(one[name]), middle, high - low
        times = (forward, both, spread, memory.get(name), *floors(problem))
        results.append(Result(*facts, errors.get(name), *times, notes.get(name, "")))
    return results


def _launch_numbers(problem: Problem, dtype: torch.dtype) -> dict[str, int]:
    """What `kernels.mov.choose` says for the forward of a problem on this GPU, to be had on a smaller grid too."""
    from coverfast.kernels.launch import architecture_of
    from coverfast.kernels.mov import choose

    shape, words = problem.shape, problem.width * (2 if dtype == torch.float64 else 1)
    on = architecture_of(torch.empty(0, device=_DEVICE))
    found = choose(shape[2:], shape[0], problem.groups, words, problem.window[-1], on, backward=False)
    return {"rows": found.rows, "tile": found.tile, "warps": found.warps}


def _forward(call: Call, q: Tensor, k: Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            call(q, k)

    return run


def _both(call: Call, q: Tensor, k: Tensor) -> Callable[[], object]:
    with torch.no_grad():
        g = torch.randn_like(call(q, k))
    return lambda: torch.autograd.grad(call(q, k), (q, k), g)


def sweep(
    problem: Problem, dtype: torch.dtype, grid: Sequence[Mapping[str, int]], repeats: int = 20
) -> list[dict[str, Any]]:
    """Milliseconds of the forward and of forward and backward for every launch configuration of `grid`."""
    q, k = inputs(problem.shape, dtype, "channels_last")
    call = variants(problem, ["coverfast triton"])["coverfast triton"]
    rows = []
    for values in grid:
        with override(**values):
            one, two = timed({"": _forward(call, q, k)}, repeats)[""], timed({"": _both(call, q, k)}, repeats)[""]
        row = {"forward_ms": statistics.median(one), "both_ms": statistics.median(two)}
        rows.append({"problem": problem.name, "dtype": str(dtype)[6:], **values, **row})
    return rows


# --- measuring -------------------------------------------------------------------------------------------------


def timed(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every call by device events, in turn, with the L2 cache flushed before each."""
    flush = torch.empty(2**28, dtype=torch.uint8, device=_DEVICE)
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(repeats):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            milliseconds[name].append(start.elapsed_time(end))
    return milliseconds


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """`call` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _error(problem: Problem, call: Call, dtype: torch.dtype, layout: str) -> float:
    """Largest relative difference from the definition in float64, on a grid of at most 24 pixels an axis."""
    shape = (1, problem.shape[1], *(min(s, 24) for s in problem.shape[2:]))
    q, k = inputs(shape, dtype, layout, seed=1)
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    exact = mov(*wide, window=problem.window, groups=problem.groups, impl="reference")
    g = torch.randn_like(exact)
    out = call(q, k)
    pairs = [(out.detach(), exact.detach(), float(max(problem.window) // 2))]
    slopes = torch.autograd.grad(out, (q, k), g.to(out.dtype)), torch.autograd.grad(exact, wide, g)
    pairs += [(a, b, float(b.abs().max())) for a, b in zip(*slopes, strict=True)]
    return max(float((a.double() - b).abs().max()) / max(1e-30, size) for a, b, size in pairs)


def _extra_mb(problem: Problem, call: Call, dtype: torch.dtype, layout: str) -> float:
    q, k = inputs(problem.shape, dtype, layout)
    g = torch.randn(1, device=_DEVICE).expand(problem.shape[0], len(problem.window), *problem.shape[2:])
    first = call(q, k)  # what a first call keeps (a compiled module, a workspace) is not the call's memory
    torch.autograd.grad(first, (q, k), g.to(first.dtype))
    del first
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = call(q, k)
    torch.autograd.grad(out, (q, k), g.to(out.dtype))
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _reason(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"does not run: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


@contextmanager
def quiet_compiler() -> Iterator[None]:
    """Every shape is a graph of its own in a benchmark: let torch.compile keep them all."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = 256
    try:
        yield
    finally:
        torch._dynamo.config.recompile_limit = limit
