"""The measuring tools measure: what is compared computes the same numbers, what is wrong is not timed."""

from __future__ import annotations

import os
import pickle
import sys
import time
from dataclasses import replace

import pytest
import torch
from strategies import run_python
from torch import Tensor

from coverfast import upsample_dvf, warp
from coverfast.bench import plans
from coverfast.bench.correctness import definition, difference, error_of
from coverfast.bench.harness import default_names, measure
from coverfast.bench.launches import STAGES, head_launches
from coverfast.bench.measure import process_growth, timed
from coverfast.bench.operators import CASES
from coverfast.bench.prepared import growth
from coverfast.bench.problems import Case, Variant, preset_levels, pyramid_levels, single_level
from coverfast.bench.vpa import pairs
from coverfast.kernels.launch import ARCHITECTURES

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def cases(op: str, size: tuple[int, ...], layout: str = "contiguous") -> list[Case]:
    """The cases of an operator on one grid."""
    window = (3, 5, 3)[-len(size) :]
    if op == "head":
        return CASES[op](pyramid_levels("test", 1, size, window, features=(40, 32, 24, 16, 8)), layout)
    return CASES[op]([single_level(size, window, batch=2, channels=6, groups=2)], layout)


# --- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("size", [(16, 32), (16, 16, 32)])
def test_every_variant_computes_the_definition(op, size):
    for case in cases(op, size, "channels_last" if len(size) == 2 else "contiguous"):
        expectation = definition(case, "cpu", torch.float64)
        for name in default_names(case, "cpu"):
            tolerance = 1e-6 if op == "views" else 1e-9  # views are made in float32
            assert error_of(case, case.variants[name], *expectation) <= tolerance, (case.name, name)


def test_flex_attention_computes_mov():
    """Forward alone: on a CPU it has no backward."""
    case = replace(cases("mov", (5, 4, 6))[0], backward=False)
    assert error_of(case, case.variants["FlexAttention"], *definition(case, "cpu", torch.float64)) <= 1e-5


@pytest.mark.parametrize("op", CASES)
def test_cases_pickle_and_name_their_gradients(op):
    for case in pickle.loads(pickle.dumps(cases(op, (16, 16)))):
        inputs, expected = definition(case, "cpu", torch.float32)
        assert len(inputs) == len(case.inputs)
        gradients = [f"d_{name}" for name, x in zip(case.inputs, inputs, strict=True) if x.requires_grad]
        assert list(expected) == [*case.outputs, *(gradients if case.backward else [])]


def test_inputs_are_those_of_the_call():
    level = single_level((6, 40, 50), (3, 3, 3), batch=5)
    (case,) = CASES["mov"]([level], "channels_last")
    q, k = case.make("cpu", torch.bfloat16, None, 0)
    assert q.shape == k.shape == (5, 8, 6, 40, 50)
    assert q.is_contiguous(memory_format=torch.channels_last_3d)
    assert q.dtype == torch.bfloat16
    assert not torch.equal(q, k)
    assert torch.equal(q, case.make("cpu", torch.bfloat16, None, 0)[0])
    assert case.make("cpu", torch.float32, 24, 0)[0].shape == (2, 8, 6, 24, 24)
    assert level.at_most(24, whole_x=True).size == (6, 24, 50)
    fine, coarse = CASES["compose"]([level], "")[0].make("cpu", torch.bfloat16, None, 0)
    assert fine.dtype == coarse.dtype == torch.float32
    assert coarse.shape == (5, 3, 3, 20, 25)


def test_fields_keep_off_the_faces_of_cells_where_slopes_jump():
    for op, least in (("warp", 0.0999), ("compose", 0.0999)):
        for case in CASES[op]([single_level((2, 30, 384), (3, 3, 3))], "contiguous"):
            for name, field in zip(case.inputs, case.make("cpu", torch.float32, None, 0), strict=True):
                if name == "coarse":
                    field, least = upsample_dvf(field, [2 * s for s in field.shape[2:]]), 1 / 256
                if name != "x":
                    away = (field - field.round()).abs().detach()
                    assert float(away.min()) >= least
                    assert float(field.detach().std()) > 1


def test_presets_are_the_calls_of_a_step():
    levels = preset_levels("paper-3d")
    shapes = [case.facts["shape"] for case in CASES["mov"](levels, "contiguous")]
    assert shapes[0] == (2, 32, 8, 8, 8)
    assert shapes[-1] == (2, 8, 128, 128, 128)
    assert sum(level.taps for level in levels) == 627_200_000
    assert sum(level.taps for level in preset_levels("paper-2d")) == 273_659_904
    assert [level.features for level in levels] == [512, 256, 128, 64, 32]
    (views,) = CASES["views"](preset_levels("paper-2d"), "contiguous")
    assert views.facts == {"images": (24, 1, 512, 512), "crop": (384, 384)}


@pytest.mark.parametrize("op", [*CASES, "vpa"])
def test_every_case_can_be_checked_as_it_is_launched_on_a_gpu(op, monkeypatch):
    """With the launch numbers of its full size; those are planned here as for an H100."""
    pytest.importorskip("triton")
    monkeypatch.setattr(plans, "architecture_of", lambda _: ARCHITECTURES["sm_90"])
    monkeypatch.setattr(plans, "_on_gpu", lambda: torch.empty(0))
    grids = preset_levels("paper-3d"), preset_levels("small-2d")
    cases = [case for levels in grids for case in CASES[op](levels, "channels_last")] if op in CASES else []
    for case in cases or [c for pair in pairs((64, 64), "channels_last", [(9, 2)]) for c in pair]:
        numbers = plans.shared_numbers(case, torch.bfloat16)
        assert (set(numbers) == {"rows", "tile", "warps"}) == (op == "mov"), case.name
        assert any(name in default_names(case, "cuda") for name in ("coverfast triton", "coverfast auto")), case.name


def test_kernels_are_compared_only_where_there_are_any():
    (case,) = CASES["mov"]([single_level((8, 8), (3, 3))], "contiguous")
    assert "coverfast triton" not in default_names(case, "cpu")
    assert "coverfast triton" not in default_names(replace(case, op="nothing"), "cuda")


# --- correctness comes first -----------------------------------------------------------------------------------------


def tilted(x: Tensor, dvf: Tensor) -> Tensor:
    """The right values with a gradient that is 0.1 off."""
    pull = 0.1 * dvf.sum()
    return warp(x, dvf) + pull - pull.detach()


def poisoned(x: Tensor, dvf: Tensor) -> Tensor:
    """The right values with a gradient that is not a number."""
    return warp(x, dvf) + 0 * (x - x.detach()).abs().sqrt()


def off(x: Tensor, dvf: Tensor) -> Tensor:
    """A thousandth too much."""
    return 1.001 * warp(x, dvf)


def broadcast(x: Tensor, dvf: Tensor) -> Tensor:
    """One sample for all."""
    return warp(x, dvf)[:1]


def missing(x: Tensor, dvf: Tensor) -> Tensor:
    raise MemoryError("no room\nfor this")


def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr("coverfast.bench.prepared.process_growth", lambda *_, **__: 1.0)
    case = replace(
        cases("warp", (16, 16))[0],
        variants={
            "coverfast torch": Variant(warp),
            "off": Variant(off),
            "tilted": Variant(tilted),
            "poisoned": Variant(poisoned),
            "broadcast": Variant(broadcast),
            "missing": Variant(missing),
        },
    )
    good, *bad = measure(case, "cpu", torch.float32, 1)
    assert not good.note
    assert good.error < 1e-5
    assert good.both_ms > good.both_floor_ms > 0
    assert good.of_floor == good.both_ms / good.both_floor_ms
    for result in bad:
        numbers = (result.forward_ms, result.both_ms, result.spread_ms, result.extra_mb, result.of_floor)
        assert numbers == (None,) * 5, result
    notes = {r.variant: r.note for r in bad}
    assert notes["missing"] == "does not run: MemoryError: no room"
    assert notes["off"] == notes["tilted"] == notes["poisoned"] == "wrong: not timed"
    assert notes["broadcast"]


def test_differences_are_seen_wherever_they_are():
    x = torch.tensor([1.0, -4.0])
    assert difference(x, x) == 0
    assert difference(torch.tensor([1.0, -3.0]), x) == 0.25
    assert difference(x[:1], x) == float("inf")
    assert not difference(torch.tensor([float("nan"), -4.0]), x) <= 1e9
    assert difference(torch.zeros(2), torch.zeros(2)) == 0


def test_interpreted_kernels_are_not_timed():
    code = "from typer.testing import CliRunner; from coverfast.cli.main import app\n"
    code += "print(repr(CliRunner().invoke(app, ['bench', 'warp', '--sizes', '8,8']).exception))"
    assert "TRITON_INTERPRET" in run_python(code, TRITON_INTERPRET="1")


# --- time and memory -------------------------------------------------------------------------------------------------


def test_a_slow_variant_is_seen_and_a_broken_one_is_left_out():
    notes: dict[str, str] = {}
    calls = {"fast": lambda: time.sleep(0.01), "broken": lambda: missing(*[torch.ones(1)] * 2)}
    found = timed({**calls, "slow": lambda: time.sleep(0.05)}, 3, "cpu", notes)
    assert set(found) == {"fast", "slow"}
    assert "no room" in notes["broken"]
    assert 3 < min(found["slow"]) / min(found["fast"]) < 6
    assert 10 <= min(found["fast"]) < 50


@linux
def test_peak_is_that_of_the_child_alone():
    """Whatever this process has used before, the streaming form needs a fraction of the unfolded one."""
    hog = bytearray(os.urandom(1) * 600_000_000)
    del hog
    (case,) = CASES["mov"]([single_level((32, 32, 32), (5, 5, 5))], "contiguous")
    jobs = [(case.make, case.variants[name], True, torch.float32, 1) for name in ("coverfast torch", "eager B")]
    ours, unfolded = (process_growth(growth, *job, repeats=1) for job in jobs)
    assert 2 < ours < 60
    assert unfolded > 150  # the products alone: 8 x 32^3 x 125 floats, 131 MB
    with pytest.raises(RuntimeError, match="process: ValueError"):
        process_growth(float, "no number", repeats=1)


# --- launches --------------------------------------------------------------------------------------------------------


def test_launches_are_counted_by_stage():
    levels = preset_levels("small-2d")
    counts = head_launches(levels, "torch", "cpu", torch.float32, 16)
    assert len(counts) == len(STAGES)
    assert counts == head_launches(levels, "torch", "cpu", torch.float32, 16)
    assert all(count > 50 for count in counts)
    code = "import torch; from coverfast.bench.launches import *; from coverfast.bench.problems import preset_levels\n"
    code += "print(*head_launches(preset_levels('small-2d'), 'triton', 'cpu', torch.float32, 16))"
    pytest.importorskip("triton")
    planned = [int(n) for n in run_python(code, TRITON_INTERPRET="1").split()]
    # At least what is ours: mov, warp and compose of the levels; sums of both losses; two kernels a level back.
    assert all(least <= n < count / 4 for least, n, count in zip((13, 4, 20), planned, counts, strict=True))
