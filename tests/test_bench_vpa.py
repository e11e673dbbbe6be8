"""`coverfast bench vpa`: what both ways see, cost and compute, and the paper's figure."""

from __future__ import annotations

import json
import sys
from math import prod

import pytest
import torch
from strategies import refused
from typer.testing import CliRunner

from coverfast.bench.correctness import definition, error_of
from coverfast.bench.vpa import SERIES, pairs, receptive_field
from coverfast.cli.main import app


def facts(size, window, projected=True):
    """Of pyramid and direct template, by number of levels."""
    found = {}
    for pyramid, direct in pairs(size, "contiguous", [(window, 5)]):
        if pyramid.facts["projections"] == projected:
            found[pyramid.facts["levels"]] = pyramid.facts, direct.facts
    return found


# --- counts ----------------------------------------------------------------------------------------------------------


def test_what_the_finest_levels_see():
    assert [receptive_field(9, m) for m in range(1, 5)] == [9, 25, 57, 121]
    assert [receptive_field(5, m) for m in range(1, 6)] == [5, 13, 29, 61, 125]
    assert SERIES == {2: ((9, 4), (5, 5)), 3: ((5, 4),)}


def test_the_receptive_field_is_what_the_levels_reach():
    """The farthest that the pyramid can point to is the edge of the direct template."""
    for _, direct in pairs((32, 32), "contiguous", [(9, 4)]):
        reach = sum(4 * 2**step for step in range(direct.facts["levels"]))
        assert direct.level.window == (2 * reach + 1,) * 2 == (direct.facts["width"],) * 2


@pytest.mark.parametrize("size", [(32, 48), (16, 16, 32)])
def test_flops_are_those_of_taps_and_projections(size):
    """Counted by hand for the two finest levels at window 5: 8 channels a group, one group, features of 64 and 32."""
    n, pixels = len(size), prod(size)
    per_tap = 2 * (8 + n)
    for projected in (False, True):
        pyramid, direct = facts(size, 5, projected)[2]
        coarse = pixels // 2**n
        convolutions = [2 * 2 * 8 * (64 * coarse + 32 * pixels), 2 * 2 * 8 * 32 * pixels]
        expected = [per_tap * 5**n * (coarse + pixels), per_tap * 13**n * pixels]
        for found, taps, more in zip((pyramid, direct), expected, convolutions, strict=True):
            assert found["flops"] == taps + projected * more
            assert found["exponentials"] == taps / per_tap


@pytest.mark.parametrize(("size", "window"), [((32, 32), 9), ((16, 16, 16), 3)])
@pytest.mark.parametrize("projected", [False, True])
def test_the_counter_finds_the_same(size, window, projected):
    """And one product a tap more, the scale; in the pyramid what warps and compositions multiply as well."""
    for pyramid, direct in facts(size, window, projected).values():
        assert direct["counted"] == direct["flops"] + direct["exponentials"]
        more = pyramid["counted"] - pyramid["flops"] - pyramid["exponentials"]
        warped = sum(prod(size) // 2 ** (len(size) * step) for step in range(pyramid["levels"] - 1))
        assert 0 <= more <= 16 * len(size) * warped
        assert (more > 0) == (pyramid["levels"] > 1)


def test_the_figure_of_the_paper():
    """COVER 4.3.5: more than 52 times at 121 x 121."""
    pyramid, direct = facts((384, 384), 9)[4]
    assert direct["width"] == 121
    assert direct["flops"] / pyramid["flops"] == pytest.approx(52.4, abs=0.05)
    five, _ = facts((384, 384), 9)[5]
    assert direct["flops"] / five["flops"] == pytest.approx(49.9, abs=0.05)  # all five levels, which see 249
    flat = [p["flops"] for p, _ in facts((384, 384), 9).values()]
    assert flat[3] / flat[0] < 2.2
    assert flat == sorted(set(flat))


# --- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "window", "levels"), [((32, 32), 5, 4), ((16, 16, 16), 3, 3)])
def test_both_ways_and_every_variant_compute_their_definition(size, window, levels):
    cases = [case for pair in pairs(size, "contiguous", [(window, levels)]) for case in pair]
    assert len({case.name for case in cases}) == len(cases) == 4 * levels
    for case in cases:
        expected = definition(case, "cpu", torch.float64)
        for name in ("coverfast torch", "eager A", "eager B"):
            assert error_of(case, case.variants[name], *expected) <= 1e-9, (case.name, name)


def test_a_template_of_another_width_is_seen():
    """The check would notice windows that are cut too short where they matter."""
    (_, direct), (_, other) = pairs((32, 32), "contiguous", [(3, 2)])[:2]
    expected = definition(direct, "cpu", torch.float64)
    assert error_of(direct, other.variants["coverfast torch"], *expected) > 1e-2


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_command_prints_and_saves(tmp_path):
    file = tmp_path / "vpa.json"
    options = "--sizes 16,16 --window 3 --levels 1 --repeats 1 --device cpu"
    command = ["bench", "vpa", *options.split(), "--against"]
    done = CliRunner().invoke(app, [*command, "coverfast torch", "--save", str(file)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for words in ("with projections", "without projections", "3 x 3 (1)", "GFLOP", "exponentials", "torch 2"):
        assert words in done.output
    saved = json.loads(file.read_text())
    assert saved["bench"] == "vpa"
    assert saved["rates"]["copy"] > 0
    assert len(saved["rows"]) == 4
    for row in saved["rows"]:
        assert row["both_ms"] > row["both_floor_ms"] > 0
        assert row["facts"]["flops"] > 0
        assert row["facts"]["form"] in ("pyramid", "direct")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sizes", "20,20"], ("divisible by 16", "20")),
        (["--sizes", "32"], ("sizes", "32")),
        (["--sizes", "32,32", "--window", "4"], ("window", "odd")),
        (["--sizes", "32,32", "--against", "eager C"], ("against", "eager B")),
        (["--dtype", "int8"], ("dtype", "int8")),
    ],
)
def test_command_refuses_in_one_sentence(arguments, words):
    with refused(*words):
        CliRunner().invoke(app, ["bench", "vpa", "--device", "cpu", *arguments], catch_exceptions=False)
