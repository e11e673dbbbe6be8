"""The harness tests itself: planted mistakes, slowness and waste are seen, and what does not fit ends nothing."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from itertools import product
from math import prod

import pytest
import torch
from torch import Tensor

from coverfast import mov
from coverfast.bench import measure as measuring
from coverfast.bench import rates
from coverfast.bench.correctness import definition, error_of
from coverfast.bench.harness import OURS_TOLERANCE, TOLERANCE, measure, measure_together
from coverfast.bench.measure import Elsewhere, NoRoom, available_memory, process_growth, timed
from coverfast.bench.operators import CASES
from coverfast.bench.problems import Case, Variant, Work, mov_work, preset_levels, single_level
from coverfast.bench.vpa import pairs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

WINDOW = (5, 5)


@pytest.fixture
def no_processes(monkeypatch):
    """Memory is not measured: every process of its own takes seconds."""
    monkeypatch.setattr("coverfast.bench.prepared.process_growth", lambda *_, **__: 1.0)


def planted(size: tuple[int, ...] = (160, 160), **variants: Variant) -> Case:
    """`mov` as coverfast has it, first, beside other variants."""
    (case,) = CASES["mov"]([single_level(size, WINDOW)], "contiguous")
    return replace(case, variants={"coverfast torch": case.variants["coverfast torch"], **variants})


def plain(q: Tensor, k: Tensor) -> Tensor:
    """What is measured."""
    return mov(q, k, window=WINDOW)


# --- a wrong kernel --------------------------------------------------------------------------------------------------


def shifted(q: Tensor, k: Tensor) -> Tensor:
    """Half a hundredth of a pixel off."""
    return plain(q, k) + 0.005


def one_tap(q: Tensor, k: Tensor) -> Tensor:
    """Wrong in one pixel alone."""
    out = plain(q, k)
    return torch.cat([out[..., :-1], out[..., -1:] * torch.tensor([1.0] * (out.shape[-2] - 1) + [1.01])[:, None]], -1)


def key_gradient(q: Tensor, k: Tensor) -> Tensor:
    """Right values; the gradient of the keys is a hundredth too large."""
    return plain(q, k + 0.01 * (k - k.detach()))


def test_a_planted_wrong_kernel_gets_no_ratio(no_processes):
    wrong = {f.__name__: Variant(f) for f in (shifted, one_tap, key_gradient)}
    good, *bad = measure(planted((24, 24), **wrong), "cpu", torch.float32, 1)
    assert good.of_floor > 1
    for r in bad:
        assert r.note == "wrong: not timed", r
        assert TOLERANCE[torch.float32] < r.error < 0.05
        assert r.of_floor is r.ms is r.forward_ms is r.extra_mb is None
        assert r.runs == 0


# --- a slow one ------------------------------------------------------------------------------------------------------


def leisurely(q: Tensor, k: Tensor, *, seconds: float) -> Tensor:
    """A kernel that takes its time, whatever else the machine does."""
    time.sleep(seconds)
    return plain(q, k)


def test_a_planted_twofold_slowdown_is_reported(no_processes):
    names = {"coverfast torch": 0.05, "same": 0.05, "slow": 0.1}
    variants = {name: Variant(partial(leisurely, seconds=seconds)) for name, seconds in names.items()}
    ours, same, slow = measure(planted((8, 8), **variants), "cpu", torch.float32, 7)
    for figure in ("forward_ms", "both_ms", "of_floor"):
        assert 1.8 <= getattr(slow, figure) / getattr(ours, figure) <= 2.2, (figure, slow, ours)
        assert 0.9 <= getattr(same, figure) / getattr(ours, figure) <= 1.1, (figure, same, ours)
    assert ours.runs == slow.runs == 7


def twice(q: Tensor, k: Tensor) -> Tensor:
    """The work done twice."""
    return (plain(q, k) + plain(q, k)) / 2


@pytest.mark.slow  # a machine that does something else at the same time fails it
def test_work_done_twice_takes_twice_as_long(no_processes):
    ours, slow = measure(planted((192, 192), slow=Variant(twice)), "cpu", torch.float32, 25)
    for figure in ("forward_ms", "both_ms"):
        assert 1.8 <= getattr(slow, figure) / getattr(ours, figure) <= 2.2, (figure, slow, ours)


def test_a_slow_moment_of_the_machine_meets_all_variants():
    """Everything takes three times as long in the second half of the runs."""
    count = [0]

    def call(ms: float) -> Elsewhere:
        def taken() -> float:
            count[0] += 1
            return ms * (3.0 if count[0] > 20 else 1.0)

        return Elsewhere(taken)

    found = timed({"one": call(1.0), "two": call(2.0)}, 20, "cpu", {})
    assert sum(found["two"]) == 2 * sum(found["one"])
    assert len(found["one"]) == len(found["two"]) == 20


def test_cases_measured_together_run_in_turn(no_processes):
    order: list[str] = []
    first, second = (replace(planted((8, 8)), name=name, backward=False) for name in ("first", "second"))

    def noted(name: str):
        def call(q: Tensor, k: Tensor) -> Tensor:
            order.append(name)
            return plain(q, k)

        return call

    cases = [replace(c, variants={"coverfast torch": Variant(noted(c.name))}) for c in (first, second)]
    results = measure_together(cases, "cpu", torch.float32, 4)
    assert [r.case for r in results] == ["first", "second"]
    turns = [tuple(order[i : i + 2]) for i in range(len(order) - 8, len(order), 2)]
    assert all(sorted(turn) == ["first", "second"] for turn in turns)
    assert len(set(turns)) == 2  # neither always follows the other


# --- a hungry one ----------------------------------------------------------------------------------------------------

HOARD = 50_000_000


def hoarding(q: Tensor, k: Tensor) -> Tensor:
    """50 MB that are of no use."""
    waste = torch.ones(HOARD // 4)
    return plain(q, k) + 0 * waste[0]


def keeping(q: Tensor, k: Tensor) -> Tensor:
    """50 MB kept for the backward alone."""
    scale = torch.ones(HOARD // 4).requires_grad_()
    return plain(q, k) + 0 * (scale * scale).sum()


def test_a_planted_memory_hog_is_seen():
    hogs = {f.__name__: Variant(f) for f in (hoarding, keeping)}
    ours, *others = measure(planted((64, 64), **hogs), "cpu", torch.float32, 1)
    assert ours.extra_mb < 5
    # The second keeps its factor and the product, and gets a gradient. Some pages that were free before are used again.
    for r, least, most in zip(others, (1, 2), (1.2, 3.2), strict=True):
        assert not r.note, r
        assert 0.99 * least * HOARD / 1e6 < r.extra_mb < most * HOARD / 1e6, r


def boundless(q: Tensor, k: Tensor) -> Tensor:
    """More than the machine has."""
    return plain(q, k) + 0 * torch.ones(available_memory())[0]


def endless(q: Tensor, k: Tensor) -> Tensor:
    """Not over in a test's time."""
    time.sleep(60)
    return plain(q, k)


def test_what_does_not_fit_is_told_and_ends_nothing(monkeypatch):
    monkeypatch.setattr(measuring, "_BEGINS", 4.0)
    variants = {"boundless": Variant(boundless), "endless": Variant(endless)}
    ours, large, slow = measure(planted((24, 24), **variants), "cpu", torch.float32, 1, seconds=1.0)
    assert ours.ms > 0
    assert large.note.startswith("does not fit in ")
    assert large.note.endswith(" GB")
    assert slow.note == "not run: takes more than 1 s"
    assert large.ms is slow.ms is large.extra_mb is slow.extra_mb is None


def test_what_cannot_fit_is_not_tried(no_processes):
    tried: list[str] = []

    def vast(q: Tensor, k: Tensor) -> Tensor:
        tried.append("vast")
        return plain(q, k)

    ours, other = measure(planted((8, 8), vast=Variant(vast, needs=5e15)), "cpu", torch.float32, 1)
    assert ours.ms > 0
    assert other.note == "does not fit: needs 5000000 GB at least"
    assert other.error is other.ms is None
    assert tried == []


def test_a_process_says_why_it_has_ended():
    with pytest.raises(RuntimeError, match="in a fresh process: ValueError"):
        process_growth(float, "no number", repeats=1)
    with pytest.raises(NoRoom, match="does not fit"):
        process_growth(bytearray, 10**15, repeats=1)


def test_long_runs_are_few():
    calls = {"long": Elsewhere(lambda: 5e3), "short": Elsewhere(lambda: 1.0)}
    found = timed(calls, 10, "cpu", {}, seconds=12.0)
    assert {name: len(times) for name, times in found.items()} == {"long": 3, "short": 10}


@pytest.mark.parametrize(("ms", "expected"), [(10.0, 3), (400.0, 3), (600.0, 2), (1e4, 1)])
def test_the_first_runs_warm_up_and_do_not_count(ms, expected):
    """Three on a GPU, or a second."""
    count = [0]

    def taken() -> float:
        count[0] += 1
        return ms if count[0] > 1 else ms + 1

    assert timed({"": Elsewhere(taken)}, 4, "cuda", {}) == {"": [ms] * 4}
    assert count[0] == expected + 4


# --- floors ----------------------------------------------------------------------------------------------------------


def test_rates_are_those_of_a_machine():
    found = rates.rates("cpu", torch.float32)
    assert 5e8 < found.copy < 1e12
    assert 1e9 < found.multiply_add < 1e14
    assert 1e7 < found.exponential < 1e12
    assert found.matrix == {"float32": found.multiply_add}


def test_rates_are_the_best_run(monkeypatch):
    """256 MB read and written in 20 ms, 16 times 2^18 exponentials in 5 ms."""
    taken = iter([[30.0, 20.0, 25.0], [5.0, 6.0]])
    monkeypatch.setattr(rates, "timed", lambda *_: {"": next(taken)})
    assert rates.copy_rate.__wrapped__("cpu") == pytest.approx(2 * 2**28 / 0.02)
    assert rates.exponential_rate.__wrapped__("cpu") == pytest.approx(16 * 2**18 / 0.005)


@pytest.mark.parametrize("which", ["copy", "multiply_add", "exponential", "matrix"])
def test_the_floor_is_whatever_takes_longest(which, monkeypatch, no_processes):
    can = {"copy": 1e15, "multiply_add": 1e15, "exponential": 1e15, "matrix": {"float32": 1e15}}
    can[which] = {"float32": 1e3} if which == "matrix" else 1e3
    monkeypatch.setattr("coverfast.bench.harness.rates", lambda *_: rates.Rates(**can))
    work = Work(multiply_adds=50, exponentials=30, matrix=200), Work(multiply_adds=100, exponentials=90, matrix=500)
    (r,) = measure(replace(planted((4, 4)), work=work), "cpu", torch.float32, 1)
    size = 8 * 16 * 4  # bytes of q, and of k
    moved = 2 * size + 2 * 16 * 4, 4 * size + 2 * 16 * 4
    expected = {"copy": moved, "multiply_add": (100, 200), "exponential": (30, 90), "matrix": (200, 500)}[which]
    assert r.forward_floor_ms == pytest.approx(expected[0])
    assert r.both_floor_ms == pytest.approx(sum(expected))


def test_the_work_of_the_paper_is_that_of_its_taps():
    levels = preset_levels("paper-3d")
    taps = sum(level.taps_inside for level in levels)
    assert 0.9 * 627_200_000 < taps < 627_200_000
    forward = sum((mov_work(level)[0] for level in levels), Work())
    backward = sum((mov_work(level)[1] for level in levels), Work())
    assert forward == Work(11 * taps, taps)
    assert backward == Work(39 * taps, 2 * taps)


@pytest.mark.parametrize(("size", "window"), [((7, 5), (3, 5)), ((2, 9), (7, 1)), ((1, 4, 6), (9, 3, 5))])
def test_taps_in_the_grid_are_counted(size, window):
    offsets = product(*(range(-(w // 2), w // 2 + 1) for w in window))
    expected = sum(prod(max(0, s - abs(o)) for s, o in zip(size, offset, strict=True)) for offset in offsets)
    level = single_level(size, window, batch=3, channels=4, groups=2)
    assert level.taps_inside == 3 * 2 * expected


# --- variants that mean something else at the border -----------------------------------------------------------------


def frayed(q: Tensor, k: Tensor) -> Tensor:
    """Other values in the two outermost pixels."""
    out = plain(q, k)
    inner = torch.zeros_like(out)
    inner[..., 2:-2, 2:-2] = 1
    return inner * out + (1 - inner) * (3 * out + 1)


def twentieth(q: Tensor, k: Tensor) -> Tensor:
    """A twentieth too much."""
    return 1.05 * plain(q, k)


def test_half_precision_is_allowed_less_where_results_alone_are_rounded(no_processes):
    """A twentieth is what eager code may be off in bfloat16, and not ours."""
    case = planted((24, 24))
    variants = {name: Variant(twentieth) for name in ("coverfast torch", "eager")}
    ours, eager = measure(replace(case, variants=variants), "cpu", torch.bfloat16, 1)
    assert ours.error == eager.error == pytest.approx(0.05, rel=0.2)
    assert ours.note == "wrong: not timed"
    assert eager.ms > 0
    (plainly,) = measure(case, "cpu", torch.bfloat16, 1)
    assert plainly.error < OURS_TOLERANCE[torch.bfloat16] / 2


def test_a_margin_is_left_out_of_the_comparison():
    case = planted((24, 24))
    expected = definition(case, "cpu", torch.float64)
    assert error_of(case, Variant(frayed), *expected) > 0.1
    assert error_of(case, Variant(frayed, margin=(1, 2)), *expected) > 0.1
    assert error_of(case, Variant(frayed, margin=(2, 2)), *expected) < 1e-10
    assert error_of(case, Variant(shifted, margin=(2, 2)), *expected) > 1e-4


# --- on a GPU --------------------------------------------------------------------------------------------------------


def resting(q: Tensor, k: Tensor, *, cycles: int) -> Tensor:
    """A kernel that takes so long."""
    torch.cuda._sleep(cycles)
    return plain(q, k)


def hoarding_there(q: Tensor, k: Tensor) -> Tensor:
    """50 MB of the GPU that are of no use."""
    waste = torch.ones(HOARD // 4, device=q.device)
    return plain(q, k) + 0 * waste[0]


@pytest.mark.gpu
def test_plants_are_seen_on_a_gpu():
    variants = {f"rests {n}": Variant(partial(resting, cycles=n * 20_000_000)) for n in (1, 2)}
    variants |= {f.__name__: Variant(f) for f in (shifted, hoarding_there)}
    found = {r.variant: r for r in measure(planted((64, 64), **variants), "cuda", torch.float32, 5)}
    assert found["shifted"].note == "wrong: not timed"
    assert 1.8 <= found["rests 2"].forward_ms / found["rests 1"].forward_ms <= 2.2
    assert 1.8 <= found["rests 2"].both_ms / found["rests 1"].both_ms <= 2.2
    assert HOARD / 1e6 <= found["hoarding_there"].extra_mb - found["coverfast torch"].extra_mb <= 1.3 * HOARD / 1e6


@pytest.mark.gpu
def test_rates_of_a_gpu():
    found = rates.rates("cuda", torch.bfloat16)
    assert 1e11 < found.copy < 2e13
    assert 1e11 < found.exponential < 5e13
    assert found.multiply_add <= 1.05 * found.matrix["float32"]
    assert found.matrix["bfloat16"] > found.multiply_add


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(48, 48), (16, 16, 16)])
def test_pyramids_and_templates_are_measured_on_a_gpu(size):
    for pair in pairs(size, "channels_last", [(3, 2)]):
        found = measure_together(pair, "cuda", torch.bfloat16, 2)
        assert {r.variant for r in found} >= {"coverfast triton", "eager A", "eager B"}
        for r in found:
            assert not r.note, r
            assert r.ms > 0
