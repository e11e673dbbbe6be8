"""The compiled kernels keep their budget: spills, width of loads, instructions a tap. Needs no GPU."""

import json
from importlib import metadata

import pytest
from strategies import refused, run_python
from typer.testing import CliRunner

from coverfast.bench import static
from coverfast.bench.plans import LAUNCHES
from coverfast.cli.main import app
from coverfast.kernels.launch import ARCHITECTURES
from coverfast.ops.dispatch import KERNELS

#: The version of the budget, that of constraints.txt; others sum and allot registers a little differently.
PINNED = metadata.version("triton").startswith("3.7.") if "mov" in KERNELS else False

pytestmark = pytest.mark.skipif("mov" not in KERNELS, reason="needs the package triton")


# --- mov -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    """Every specialisation of `mov` in both paper presets for one target."""
    return static.table(targets=["sm_90"], ops=["mov"])


def _complete_and_without_spills(rows, targets):
    levels = {f"{preset} level {level}" for preset in static.PRESETS for level in range(5)}
    for target in targets:
        for kernel in ("mov_forward", "mov_dq", "mov_dk"):
            found = [name for r in rows if (r.target, r.kernel) == (target, kernel) for name in r.levels]
            assert sorted(found) == sorted(levels)
    bytes_allowed = 0 if PINNED else 8
    assert [r for r in rows if r.target.startswith("sm_") and r.spills > bytes_allowed] == []


def test_every_level_is_compiled_and_nothing_spills(rows):
    _complete_and_without_spills(rows, ["sm_90"])


@pytest.mark.slow
def test_every_level_is_compiled_for_every_target():
    _complete_and_without_spills(static.table(ops=["mov"]), ARCHITECTURES)


def test_keys_are_loaded_sixteen_bytes_at_a_time(rows):
    for row in rows:
        if row.target == "sm_90":
            window = 5 if row.levels[0].startswith("paper-3d") else 7
            assert row.loads.split(", ")[0] == f"{window} x 128", row


def test_instructions_a_tap(rows):
    hopper = [r for r in rows if r.target == "sm_90"]
    for row in hopper:
        assert row.executed >= row.a_tap
        assert row.body > row.a_tap * row.rows * row.taps
        if row.kernel == "mov_forward":
            assert row.a_tap <= 30, row
    for level in range(5):
        of_it = [r for r in hopper if f"paper-3d level {level}" in r.levels]
        assert len(of_it) == 3
        assert sum(r.executed for r in of_it if r.kernel != "mov_forward") <= 90
        if level >= 2 and PINNED:  # 99.8 % of the taps
            assert sum(r.executed for r in of_it if r.kernel == "mov_forward") <= 25
            assert sum(r.executed for r in of_it if r.kernel != "mov_forward") <= 70


# --- the others ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others():
    """The kernels of three operators in 3D, for one target; the last test compiles those of compose and norm."""
    return static.table(["paper-3d"], ["sm_90"], ops=["warp", "losses", "views"])


def _sound(rows):
    assert [r for r in rows if r.spills > (0 if PINNED else 8)] == []
    for row in rows:
        assert row.body > 0
        assert row.a_tap is None
        assert row.rows is None


def test_operators_compile_and_nothing_spills(others):
    assert {r.op for r in others} == {"warp", "losses", "views"}
    _sound(others)


@pytest.mark.slow
def test_every_operator_compiles_and_nothing_spills():
    rest = {op for op in LAUNCHES if op in KERNELS} - {"mov", "warp", "losses", "views"}
    rows = static.table(["paper-3d"], ["sm_90"], ops=sorted(rest))
    assert {r.op for r in rows} == rest
    _sound(rows)


def test_channels_are_loaded_sixteen_bytes_at_a_time(others):
    found = [r for r in others if (r.kernel, r.flags) == ("warp_forward", ("coarse",))]
    assert {name for r in found for name in r.levels} == {f"paper-3d level {level} up" for level in range(1, 5)}
    assert all(r.loads.startswith("8 x 128") for r in found), found  # the corners of a cell


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_and_saves(tmp_path):
    file = tmp_path / "static.json"
    command = ["bench", "static", "--op", "mov", "--target", "sm_90", "--preset", "paper-3d", "--save", str(file)]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert all(word in done.output for word in ("mov_forward", "mov_dq", "mov_dk", "3d 3, 4", "5 x 128"))
    saved = json.loads(file.read_text())
    assert len(saved["rows"]) == 15
    assert saved["provenance"]["triton"]


def test_levels_are_merged():
    names = ["paper-2d level 0", "paper-2d level 1", "paper-3d level 4 up", "paper-2d level 1"]
    assert static.merged(names) == "2d 0, 1; 3d 4 up"


def test_what_is_not_there_is_refused():
    with refused("target", "sm_12"):
        static.table(targets=["sm_12"])
    with refused("op", "head"):
        static.table(ops=["head"])


def test_the_interpreter_compiles_nothing():
    code = "from coverfast.bench import static\ntry: static.table()\nexcept ValueError as error: print(error)"
    assert "TRITON_INTERPRET" in run_python(code, TRITON_INTERPRET="1")


_SIZES = """
import torch
from coverfast.bench.operators import CASES
from coverfast.bench.plans import LAUNCHES
from coverfast.bench.problems import single_level
from coverfast.bench.sass import compile_launch
from coverfast.kernels.launch import ARCHITECTURES

for batch, *size in ((2, 6, 6, 32), (1, 8, 16, 96), (3, 2, 14, 64)):
    for op in ("mov", "warp", "compose", "norm", "losses"):
        for case in CASES[op]([single_level(size, (5, 5, 5), batch=batch)], "channels_last"):
            inputs = case.make("meta", torch.bfloat16, None, 0)
            for launch in LAUNCHES[op](case, inputs, ARCHITECTURES["sm_90"]):
                key = launch.kernel.__name__, str(launch.constants), str(launch.warps)
                print(*key, id(compile_launch(launch, "sm_90")), sep="|")
"""


def test_other_sizes_with_the_same_constants_compile_nothing():
    """What the launcher specialises beyond constants (arguments that are 1 or multiples of 16) is asked not to be."""
    found = [line.rsplit("|", 1) for line in run_python(_SIZES).splitlines()]
    kernels = {launch: {compiled for other, compiled in found if other == launch} for launch, _ in found}
    assert len(found) - len(kernels) > 10, "some launches of different sizes are the same kernel"
    assert {launch: len(compiled) for launch, compiled in kernels.items() if len(compiled) > 1} == {}
