"""One training step: parts of a batch, precision, averages, schedules, and no waiting for the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import TINY, same

from coverfast import InputError
from coverfast.methods import Batch, Method, Outcome
from coverfast.training.assembly import build_method
from coverfast.training.engine import Choices, Engine
from coverfast.training.loop import Hooks, train
from coverfast.training.schedules import learning_rate
from coverfast.training.settings import Settings, resolve
from coverfast.training.telemetry import Telemetry, Work
from coverfast.training.world import World

CPU = torch.device("cpu")


def settings(ndim: int = 2, **given_: object) -> Settings:
    tiny = {k: v for k, v in TINY.items() if k != "threads"}
    crop = {} if ndim == 2 else {"crop": (16,)}
    return resolve(f"small-{ndim}d", {**tiny, **crop, "batch": 4, **given_})


def engine(ndim: int = 2, device: torch.device = CPU, **given_: object) -> Engine:
    s = settings(ndim, **given_)
    return Engine(build_method(s, ndim, 1), s, device)


def batch(ndim: int = 2, iteration: int = 1, size: int = 40, device: torch.device = CPU, count: int = 4) -> Batch:
    size = size if ndim == 2 else 24
    images = torch.rand(count, 1, *[size] * ndim, generator=torch.Generator().manual_seed(iteration))
    sizes = torch.full((count, ndim), size)
    return Batch(images.to(device), sizes, torch.zeros_like(sizes), torch.arange(count), 0, iteration)


def gradients(e: Engine) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in e.method.named_parameters() if p.grad is not None}


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("more", [{"accumulate": 2}, {"accumulate": 4}, {"recompute": True}])
def test_gradients_do_not_depend_on_how_a_batch_passes(ndim: int, more: dict[str, object]) -> None:
    found = []
    for given_ in ({}, more):
        # Views far apart: parts share very different numbers of pixels, a mean of means would be another.
        e = engine(ndim, strength=1.7, **given_)
        figures = e.step(batch(ndim), update=False)
        found.append((gradients(e), e.method.figures(dict(zip(e.names, figures.tolist(), strict=True))), figures))
    (whole, figures, row), (parts, others, other) = found
    assert whole.keys() == parts.keys() == dict(e.method.named_parameters()).keys()
    for name, gradient in whole.items():
        # Rounding of float32 through twenty layers; a mean of the means of parts would be off by a tenth and more.
        assert (parts[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max().clamp(min=1e-2), name
    assert others == pytest.approx(figures, rel=1e-5)
    assert other.tolist() == pytest.approx(row.tolist(), rel=1e-4)


def test_the_whole_batch_counts_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would not see if the views of all parts shared as many pixels."""
    e = engine(strength=1.7, accumulate=4)
    counts = {float(e.method.count(e.method.prepare(part))) for part in batch().parts(4)}
    assert len(counts) > 1
    assert max(counts) > 1.5 * min(counts)


# --- the optimiser ----------------------------------------------------------------------------------------------------


class Line(Method):
    """The shortest method: one number, whose loss is its square, or what the iteration asks for."""

    def __init__(self, losses: dict[int, str] | None = None) -> None:
        super().__init__()
        self.x, self.losses = nn.Parameter(torch.tensor([3.0])), losses or {}

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def count(self, prepared: Batch) -> torch.Tensor:
        return torch.tensor(float(len(prepared)), dtype=torch.float64)

    def forward(self, prepared: Batch, denominator: torch.Tensor | None = None) -> Outcome:
        loss = (self.x**2).sum()
        kind = self.losses.get(prepared.iteration, "")
        if kind == "infinite, with a finite gradient":
            loss = loss + torch.inf
        elif kind == "finite, with a gradient that is not":
            loss = loss + (self.x - self.x.detach()).abs().sqrt().sum()  # the slope of a root at 0
        return Outcome(loss, {"loss": loss.detach().double(), "count": loss.new_ones((), dtype=torch.float64)}, None)

    def figures(self, sums):  # type: ignore[no-untyped-def]
        return {"loss": sums["loss"] / sums["count"]}


@pytest.mark.parametrize("kind", ["infinite, with a finite gradient", "finite, with a gradient that is not"])
def test_a_step_that_is_not_finite_changes_nothing(kind: str) -> None:
    e = Engine(Line({3: kind}), settings(ema=0.5), CPU)
    marks = []
    for i in range(1, 5):
        before = copy.deepcopy(e.state())
        figures = e.step(batch(iteration=i))
        marks.append(float(figures[-1]))
        unchanged = same(before["method"], e.state()["method"])
        assert unchanged == (i == 3)
        if i == 3:
            moments = [s["optimizer"]["state"]["x"] for s in (before, e.state())]
            assert all(torch.equal(moments[0][k], moments[1][k]) for k in moments[0])
    assert marks == [0, 0, 1, 0]


def test_training_is_adam_with_clipping_as_torch_has_it() -> None:
    e = Engine(Line(), settings(lr=0.1, clip=0.5), CPU)
    x = nn.Parameter(torch.tensor(3.0))
    adam = torch.optim.Adam([x], lr=0.1)
    for i in range(1, 20):
        norm = e.step(batch(iteration=i))[-2]
        adam.zero_grad()
        (x**2).backward()
        assert norm == pytest.approx(abs(float(x.grad)))
        nn.utils.clip_grad_norm_([x], 0.5)
        adam.step()
        assert e.method.x.item() == pytest.approx(x.item(), rel=1e-6)


def test_weight_decay_is_decoupled_in_adamw_alone() -> None:
    found = {}
    for optimizer in ("adam", "adamw"):
        e = Engine(Line(), settings(optimizer=optimizer, weight_decay=0.5, lr=0.1), CPU)
        e.step(batch())
        found[optimizer] = e.method.x.item()
    assert found["adamw"] == pytest.approx(3 * (1 - 0.05) - 0.1, rel=1e-5)
    assert found["adam"] == pytest.approx(3 - 0.1, rel=1e-5)


def test_the_moving_average_is_the_result_and_survives_a_resume() -> None:
    e = Engine(Line(), settings(ema=0.9, lr=0.1), CPU)
    average = 3.0
    for i in range(1, 6):
        e.step(batch(iteration=i))
        decay = min(0.9, i / (i + 9))
        average = decay * average + (1 - decay) * e.method.x.item()
        assert e.result.x.item() == pytest.approx(average, rel=1e-6)
    again = Engine(Line(), settings(ema=0.9, lr=0.1), CPU)
    again.load_state(copy.deepcopy(e.state()), "here")
    for e_ in (e, again):
        e_.step(batch(iteration=6))
    assert torch.equal(e.result.x, again.result.x)
    assert torch.equal(e.method.x, again.method.x)
    assert float(e.weights()["x"]) == e.result.x.item() != e.method.x.item()
    with pytest.raises(InputError, match="here must hold a moving average"):
        again.load_state({k: v for k, v in e.state().items() if k != "ema"}, "here")


@given(st.integers(1, 60), st.integers(0, 50), st.sampled_from(["constant", "cosine"]))
def test_schedules(iterations: int, warmup: int, schedule: str) -> None:
    assume(warmup < iterations)
    s = settings(iterations=iterations, warmup=warmup, schedule=schedule, lr=0.5)
    rates = [learning_rate(s, i) for i in range(1, iterations + 1)]
    assert all(0 < rate <= 0.5 for rate in rates)
    rising = rates[:warmup]
    assert rising == sorted(rising)
    falling = rates[max(0, warmup - 1) :]
    assert falling == sorted(falling, reverse=True)
    assert schedule == "cosine" or all(rate == 0.5 for rate in falling)
    assert rates[warmup] == 0.5
    # A run that is made longer keeps the schedule it began with.
    pinned = replace(s, schedule_iterations=iterations, iterations=2 * iterations)
    assert [learning_rate(pinned, i) for i in range(1, iterations + 1)] == rates
    if schedule == "cosine" and iterations - warmup >= 4:
        assert rates[warmup + (iterations - warmup) // 2] == pytest.approx(0.25, abs=0.5 * 2 / (iterations - warmup))


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_resumed_step_is_the_same_in_another_layout(ndim: int) -> None:
    """A fused optimiser reads moments in the order of memory, whatever their strides say."""
    first = engine(ndim, layout="channels_last")
    for i in range(1, 4):
        first.step(batch(ndim, i))
    state, found = copy.deepcopy(first.state()), {}
    for layout in ("channels_last", "contiguous"):
        e = engine(ndim, layout=layout)
        e.load_state(copy.deepcopy(state), "here")
        for p, moments in e.optimizer.state.items():
            assert all(m.stride() == p.stride() for m in moments.values() if m.shape == p.shape and m.ndim)
        for p in e.method.parameters():  # the same gradient for both: what differs is the update
            p.grad = torch.full_like(p, 1e-3)
        e._update(4, torch.tensor(False))
        found[layout] = e.state()["method"]
    for name, weight in found["contiguous"].items():
        assert (weight - found["channels_last"][name]).abs().max() <= 1e-7, name


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The graphs that compiling makes, without making code of them."""
    from torch._dynamo.backends.debugging import aot_eager

    found: set[str] = set()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):  # type: ignore[no-untyped-def]
        found.add(str(torch._guards.CompileContext.current_compile_id()))
        return aot_eager(graph, inputs)

    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode, **how: compile_(self, **how, backend=backend))
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("ndim", "more"), [(3, {}), (2, {"recompute": True, "accumulate": 2, "precision": "bfloat16"})]
)
def test_the_method_is_one_graph_and_never_compiled_again(graphs: set[str], ndim: int, more: dict[str, object]) -> None:
    found, three = [], {"channels": (8, 8, 8), "groups": (1, 1, 1)}  # levels: enough to have them all
    for compiled in (False, True):
        e = engine(ndim, compile=compiled, **three, **more)
        rows = []
        for i in range(1, 4):
            # Other images, sizes and parts of them: a step of a run is never quite like another.
            seen = batch(ndim, i, size=40 + 2 * i)
            rows.append(e.step(seen, watch=i % 2 == 0))
            if compiled:
                e.evaluate(seen)
        found.append(torch.stack(rows))
    assert len(graphs) == 1
    tolerance = 5e-2 if "precision" in more else 1e-3
    assert (found[1] - found[0]).abs().max() <= tolerance * found[0].abs().max()


@pytest.mark.slow
def test_inductor_trains_as_eager_does() -> None:
    rows = []
    for compiled in (False, True):
        torch.compiler.reset()
        e = engine(compile=compiled)
        rows.append(torch.stack([e.step(batch(iteration=i)) for i in range(1, 6)]))
        if compiled:
            with torch.compiler.set_stance("fail_on_recompile"):
                e.step(batch(iteration=6, size=44))
    assert (rows[1] - rows[0]).abs().max() <= 1e-3 * rows[0].abs().max()


# --- precision and layout ---------------------------------------------------------------------------------------------


def test_auto_chooses_by_device() -> None:
    cpu, gpu = CPU, torch.device("cuda")
    assert Choices.of(settings(), cpu) == Choices("float32", "channels_last")
    assert Choices.of(settings(precision="float32", compile=True), gpu) == Choices("float32", "channels_last")
    assert Choices.of(settings(precision="float32"), gpu) == Choices("float32", "contiguous")
    assert Choices.of(settings(), cpu, sharded=True) == Choices("float32", "contiguous")
    with pytest.raises(InputError, match="layout must be contiguous with fsdp"):
        Choices.of(settings(layout="channels_last"), cpu, sharded=True)
    assert Choices.of(settings(precision="bfloat16", layout="contiguous"), cpu) == Choices("bfloat16", "contiguous")


@pytest.mark.parametrize("ndim", [2, 3])
def test_half_precision_and_layout_change_rounding_alone(ndim: int) -> None:
    e = engine(ndim)
    views = e.method.prepare(batch(ndim))
    exact = e.method.match(views)
    for given_, tolerance in (({"layout": "contiguous"}, 1e-5), ({"precision": "bfloat16"}, 5e-2)):
        other = engine(ndim, **given_)
        with other.autocast():
            found = other.method.match(other.method.prepare(batch(ndim)))
        assert all(level.dtype == torch.float32 for level in found.levels)  # fields are, whatever the features
        if "precision" in given_:
            assert found.features[-1].dtype == torch.bfloat16
        scale = exact.features[-1].abs().max()
        assert (found.features[-1].float() - exact.features[-1]).abs().max() <= tolerance * scale


# --- nobody waits -----------------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Operators that make the host wait for a device, and those whose result's size depends on its values."""

    NAMES = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("more", [{}, {"ema": 0.9, "accumulate": 2, "schedule": "cosine"}])
def test_a_step_waits_for_nothing(more: dict[str, object]) -> None:
    e, delivered = engine(**more), []
    telemetry = Telemetry(e.method, World(), Work(4), every=2, deliver=delivered.extend)
    e.step(batch())
    prepare = e.method.prepare  # views draw on the host; what they do on a GPU is a test with one
    ready = {i: [prepare(part) for part in batch(iteration=i).parts(e.settings.accumulate)] for i in range(1, 7)}
    e.method.prepare = lambda part: ready[part.iteration].pop(0)  # type: ignore[method-assign]
    hooks = Hooks(None, lambda i, last: None, lambda i: False, lambda i: None, lambda: 0)
    with Waits() as waits:
        train(e, (batch(iteration=i) for i in range(1, 7)), telemetry, hooks)
    assert waits.found == []
    assert [r["iteration"] for r in delivered] == [1, 2, 3, 4, 5, 6]
    with Waits() as waits:
        float(torch.ones(()))
    assert waits.found == ["_local_scalar_dense"]


@pytest.mark.gpu
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_loop_never_waits_for_a_gpu(ndim: int, compiled: bool) -> None:
    gpu, delivered = torch.device("cuda"), []
    e = engine(ndim, gpu, compile=compiled, precision="bfloat16", ema=0.9)
    telemetry = Telemetry(e.method, World(), Work(4), every=2, deliver=delivered.extend)
    hooks = Hooks(None, lambda i, last: None, lambda i: False, lambda i: None, lambda: 0)
    seen = {i: batch(ndim, i, device=gpu) for i in range(1, 30)}
    train(e, (seen[i] for i in range(1, 12)), telemetry, hooks)  # monitors at 1 and 10 are warmed up here
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(e, (seen[i] for i in range(12, 30)), telemetry, hooks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    telemetry.drain(e.names)
    assert [r["iteration"] for r in delivered] == list(range(1, 30))


@pytest.mark.gpu
@pytest.mark.parametrize("ndim", [2, 3])
def test_a_deterministic_run_repeats_to_the_bit_on_a_gpu(ndim: int, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from training_runs import make_shard, start, weights

    shard = make_shard(tmp_path / "s.h5", ndim, size=48 if ndim == 2 else 36)
    flags = {"preset": f"small-{ndim}d", "crop": (32,), "device": "cuda", "deterministic": True, "iterations": 5}
    runs = [start(shard, tmp_path / name, **flags) for name in ("a", "b")]
    assert same(*map(weights, runs))
