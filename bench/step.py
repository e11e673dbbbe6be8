"""Measure a training step of a preset in several ways: loss and gradients first, then time, memory and its parts.

What computes another loss or gradient than the definition, does not run or does not fit is not timed and says so.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coverfast.bench import parts, published_step
from coverfast.bench.correctness import difference
from coverfast.bench.harness import TOLERANCE
from coverfast.bench.measure import high_water_mark, process_growth, reason, timed
from coverfast.bench.published_step import Seen
from coverfast.bench.step_variants import PLAIN, PUBLISHED, Problem, Runner, levels_of, set_up
from coverfast.checks import require
from coverfast.kernels import INTERPRETED
from coverfast.loader import to_device
from coverfast.methods import Pretext
from coverfast.methods.cover import Cover
from coverfast.methods.gvsl import Pair
from coverfast.training.assembly import build_method
from coverfast.training.data import batches
from coverfast.training.estimate import matrix_rate, step_flops
from coverfast.training.settings import Settings, preset_ndim
from coverfast.views import Views

#: Steps that are timed as one on a GPU, so that the host may run ahead as it does in training.
_IN_A_ROW = 4
#: Steps that are profiled: on a CPU the operators of one are many, and torch takes seconds to sort them.
_PROFILED = {"cpu": 1, "cuda": 3}
#: Largest difference, over the largest value, of the views that a baseline makes from ours.
_VIEWS = TOLERANCE[torch.float32]
#: The same of the figures of a first step from those of `PLAIN`.
_FIRST = {"float32": 1e-3, "bfloat16": TOLERANCE[torch.bfloat16]}


@dataclass(frozen=True)
class Result:
    """One variant of one preset. None: not measured, and `note` says why.

    Attributes:
        batch: images, or pairs where the method takes these.
        errors: of loss and gradients: "small", see `Checks`, and of ours "first step", what is timed from `PLAIN`.
        spread_ms: between the quartiles.
        images_per_s: pairs where the method takes these.
        peak_mb: at the peak, with weights, gradients and the optimiser's moments; on a CPU the process's growth.
        flops: of a step's convolutions. rate: FLOP/s of a product of large matrices in the same precision. mfu: the
            share of that rate which the step reaches.
        parts_ms: of a step by part, without compilation; see `coverfast.bench.parts`.
    """

    preset: str
    variant: str
    batch: int
    crop: tuple[int, ...]
    precision: str = ""
    layout: str = ""
    compiled: bool = False
    errors: Mapping[str, float] = field(default_factory=dict)
    step_ms: float | None = None
    spread_ms: float | None = None
    images_per_s: float | None = None
    peak_mb: float | None = None
    flops: float | None = None
    rate: float | None = None
    mfu: float | None = None
    parts_ms: Mapping[str, float] | None = None
    note: str = ""

    @property
    def sound(self) -> bool:
        """Whether its errors are as small as rounding may make them."""
        limits = {"small": TOLERANCE[torch.float64], "first step": _FIRST.get(self.precision, 0.0)}
        return all(error <= limits[name] for name, error in self.errors.items())


def measure(
    s: Settings,
    variants: Sequence[str],
    device: torch.device,
    repeats: int,
    *,
    profile: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """The named variants of a step; those that are right in turn, so that a slow moment meets all of them."""
    # Every variant is a graph of its own: let torch.compile keep them all.
    with torch._dynamo.config.patch(recompile_limit=256):
        return _measure(s, variants, device, repeats, profile, tell)


def _measure(
    s: Settings,
    variants: Sequence[str],
    device: torch.device,
    repeats: int,
    profile: bool,
    tell: Callable[[str], None],
) -> list[Result]:
    require(not INTERPRETED, "bench times kernels and cannot with TRITON_INTERPRET set; unset it")
    problem = Problem(s)
    results = {name: Result(s.preset, name, s.batch, problem.crop) for name in variants}
    notes: dict[str, str] = {}

    def each(doing: str, work: Callable[[str], Mapping[str, Any]]) -> None:
        """Something about every variant that there is no note on yet; a baseline may fail in any way."""
        for name in [name for name in variants if name not in notes]:
            tell(f"{s.preset}: {doing} {name}")
            try:
                results[name] = replace(results[name], **work(name))
                if not results[name].sound:
                    notes[name] = "wrong: not timed"
            except Exception as error:
                notes[name] = reason(error)

    checks = Checks(s, device)
    each("checking", lambda name: {"errors": {"small": checks.error(name)}})
    # Before this process holds any memory of the device.
    each("memory of", lambda name: {"peak_mb": process_growth(peak, s, name, str(device), repeats=1)})
    runners: dict[str, Runner] = {}
    plain: list[Tensor] = []

    def prepare(name: str) -> Mapping[str, Any]:
        runner = runners[name] = set_up(problem, name, device)
        facts, errors = {**runner.facts, "precision": str(runner.dtype)[6:]}, results[name].errors
        if runner.engine:
            plain[:] = plain or figures(problem, set_up(problem, PLAIN, device), device)
            errors = {**errors, "first step": furthest(figures(problem, runner, device), plain)}
        return {**facts, "errors": errors}

    each("preparing", prepare)
    tell(f"{s.preset}: timing")
    # What waits for the device in every step gains nothing from the next one.
    rows = {name: _IN_A_ROW if r.engine and device.type == "cuda" else 1 for name, r in runners.items()}
    calls = {name: _repeated(r.step, rows[name]) for name, r in runners.items() if name not in notes}
    times = timed(calls, repeats, device.type, notes)
    calls.clear()
    runners.clear()
    _give_back(device)
    flops = step_flops(build_method(s, problem.ndim, 1), s.batch)
    rates = {name: matrix_rate(device, getattr(torch, name)) for name in {results[n].precision for n in times}}

    def rate(name: str) -> Mapping[str, Any]:
        of_step = np.array(times[name]) / rows[name]
        ms, spread = float(np.median(of_step)), float(np.subtract(*np.percentile(of_step, (75, 25))))
        reached, of = flops / (ms / 1e3), rates[results[name].precision]
        per_second = {"images_per_s": 1e3 * s.batch / ms, "flops": flops, "rate": of, "mfu": reached / of}
        return {"step_ms": ms, "spread_ms": spread, **per_second}

    each("rates of", rate)
    if profile:
        each("parts of", lambda name: {"parts_ms": _parts(problem, name, device)})
    return [replace(r, note=notes.get(name, "")) for name, r in results.items()]


def _repeated(step: Callable[[], object], count: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(count):
            step()

    return steps


def _give_back(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _parts(problem: Problem, variant: str, device: torch.device) -> dict[str, float]:
    """Of ours without compilation, which leaves no ranges."""
    runner = set_up(problem, variant if variant in PUBLISHED else f"{variant} eager", device)
    method = problem.settings.method
    with parts.marked(runner.engine.method, method) if runner.engine else nullcontext():
        return parts.milliseconds(runner.step, device.type, _PROFILED[device.type], method)


def peak(s: Settings, variant: str, device_name: str) -> float:
    """In a process of its own: MB at the peak of training steps, everything that they need included."""
    device = torch.device(device_name)
    if device.type == "cuda":
        step = set_up(Problem(s), variant, device).step
        _repeated(step, 3)()  # compilers and libraries try things out in the first steps
        _give_back(device)
        torch.cuda.reset_peak_memory_stats()
        _repeated(step, 2)()
        _give_back(device)
        # What CUDA graphs hold counts as reserved alone.
        return max(torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()) / 1e6
    # What a first call loads is not the step's memory.
    set_up(Problem(replace(small(s), crop=(2 ** (levels_of(s) - 1),), batch=1)), variant, device).step()
    problem, before = Problem(s), high_water_mark()
    _repeated(set_up(problem, variant, device).step, 2)()
    return high_water_mark() - before


# --- correctness -------------------------------------------------------------------------------------------------


def small(s: Settings) -> Settings:
    """The same objective, quick to compute by its definition: few channels and a small crop, no cube."""
    levels = levels_of(s)
    side = 2 ** (levels - 1)
    crop = (side, side, 2 * side) if preset_ndim(s.preset) == 3 else (2 * side, 3 * side)
    return replace(s, channels=tuple(8 * min(2**i, 4) for i in range(levels)), crop=crop, batch=2)


class Checks:
    """Loss and gradients of all weights by the definition in float64, on small views without noise and boxes.

    What is random but for the draws differs between ours and the baselines, and is left out. Layers that start at zero
    start as others do: there were no gradients to what lies before them.
    """

    def __init__(self, s: Settings, device: torch.device) -> None:
        self.settings, self.device = replace(small(s), noise=0.0, boxes=0), device
        self.problem = Problem(self.settings)
        self.exact = self.method(replace(self.settings, impl="reference"))
        loaded = to_device(self.problem.loaded(self.exact, 1), device)
        self.views = self.exact.prepare(next(batches([loaded], self.settings.seed, print)))
        self.truth = exactly(self.views)
        self.expected = gradients(self.exact, self.exact(self.truth).loss)

    def method(self, s: Settings) -> Pretext:
        """A method on the device in float64."""
        method = build_method(s, self.problem.ndim, 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for layer in method.modules():
                weight, reset = getattr(layer, "weight", None), getattr(layer, "reset_parameters", None)
                if isinstance(weight, Tensor) and callable(reset) and not weight.any():
                    reset()
        return method.to(self.device, torch.float64)

    def error(self, variant: str) -> float:
        """Largest difference over the largest value, in float64; infinite where a baseline makes other views.

        Not in float32: a rounding that moves a coordinate over the face of a cell changes slopes.
        """
        if variant not in PUBLISHED:
            method = self.method(self.settings)
            return furthest(gradients(method, method(self.truth).loss), self.expected)
        assert isinstance(self.exact, Cover)
        assert isinstance(self.truth, Views)
        truth = Seen(self.truth.x_a, self.truth.x_b, self.truth.dvf, self.truth.mask.double())
        if not furthest(self.problem.published_views(self.exact, 1, self.device)(), truth) <= _VIEWS:
            return float("inf")
        matching = published_step.MATCHING[PUBLISHED[variant][0]]
        network = published_step.Network(self.exact, self.settings.unet_channels(), matching)
        vec, con = network.to(self.device, torch.float64)(truth)
        return furthest(gradients(network, vec + con), self.expected)


def exactly(prepared: Views | Pair) -> Views | Pair:
    """What a method has prepared, in float64."""
    if isinstance(prepared, Pair):
        return Pair(*(x.double() for x in prepared))
    return replace(prepared, pair=prepared.pair.double(), target=prepared.target.to(torch.float64))


def gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    """The loss, then its gradients to all parameters."""
    return [loss.detach(), *torch.autograd.grad(loss, list(module.parameters()))]


def furthest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest `difference` of all; NaN where a value is."""
    # torch's maximum is NaN where anything is; Python's depends on the order.
    return float(torch.tensor([difference(a, b) for a, b in zip(found, expected, strict=True)]).max())


def figures(problem: Problem, runner: Runner, device: torch.device) -> list[Tensor]:
    """What the method tells of its losses, and the gradient's norm, of a first step of ours at full size."""
    engine = runner.engine
    assert engine is not None
    loaded = to_device(problem.loaded(engine.method, 1), device)
    row = engine.step(next(batches([loaded], problem.settings.seed, print)), update=False)
    values = dict(zip(engine.names, row.tolist(), strict=True))
    norm = values.pop("grad_norm")
    found = engine.method.figures(values)
    losses = [value for name, value in found.items() if name.startswith("loss")]
    return [torch.tensor(x) for x in (*losses, norm)]
