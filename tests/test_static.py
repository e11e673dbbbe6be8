"""The compiled kernels keep their budget: spills, width of loads, instructions a tap. Needs no GPU."""

import json
from contextlib import nullcontext
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
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


@pytest.mark.slow
def test_the_local_correlation_compiles_for_every_target():
    """Every pass, though a lane keeps the rows in its window in registers."""
    rows = static.table(ops=["ncc"])
    last = {("ncc_moments", "last"), ("ncc_moments", "last", "to_y"), ("ncc_slopes", "last", "to_y")}
    for preset, of_it in (("2d", last), ("3d", {*last, ("ncc_moments",), ("ncc_slopes",)})):
        for target in ARCHITECTURES:
            here = [r for r in rows if r.target == target and f"paper-{preset} level 4" in r.levels]
            assert {(r.kernel, *r.flags) for r in here} == of_it
    assert [r for r in rows if r.spills > (0 if PINNED else 8)] == []


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


@pytest.mark.slow
def test_sizes_and_launch_numbers_are_compiled_and_saved(tmp_path):
    file = tmp_path / "static.json"
    command = ["bench", "static", "--op", "losses", "--device", "sm_90", "--sizes", "32,32", "--against", "tile=16"]
    done = CliRunner().invoke(app, [*command, "--save", str(file)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert all(word in done.output for word in ("32x32 4 vector", "rules", "tile=16", "commit", "triton 3"))
    rows = json.loads(file.read_text())["rows"]
    by = {label: [r for r in rows if r["launch"] == label] for label in ("rules", "tile=16")}
    assert len(by["rules"]) + len(by["tile=16"]) == len(rows)
    assert len(by["tile=16"]) == sum(r["tile"] != 16 for r in by["rules"])
    assert {r["tile"] for r in by["tile=16"]} == {16}


def test_other_numbers_are_compiled_where_they_change_a_launch(monkeypatch):
    """Nothing is compiled: the rows are the launches, planned in this process."""
    monkeypatch.setattr(static, "ProcessPoolExecutor", lambda *_: nullcontext(SimpleNamespace(map=map)))
    monkeypatch.setattr(static, "measure", lambda launch, *of: (launch.kernel.__name__, launch.constants["ROWS"], *of))
    found = list(static.compiled([(16, 32)], ["sm_90"], ops=["mov"], against=["rows=1", "rows=2,taps=4"]))
    levels = {f"16x32 level {level}" for level in range(5)}
    for kernel in ("mov_forward_kernel", "mov_dq_kernel", "mov_dk_kernel"):
        rows = {label: {} for label in ("rules", "rows=1", "rows=2,taps=4")}
        for name, count, *_, of, _, label in found:
            if name == kernel:
                rows[label] |= dict.fromkeys(of, count)
        by_rules = rows["rules"]
        assert set(by_rules) == levels
        assert rows["rows=1"] == {level: 1 for level in levels if by_rules[level] != 1}
        # Four taps are what the rules choose: only a grid of one row is left to change.
        assert rows["rows=2,taps=4"] == {level: 2 for level in levels if by_rules[level] != 2}
        assert 1 in by_rules.values()
        assert 2 in by_rules.values()


def test_sizes_are_pyramids_of_the_paper():
    coarse, *_, fine = static.levels_of((64, 32, 48))
    assert (coarse.size, coarse.channels, coarse.features) == ((4, 2, 3), 32, 512)
    assert (fine.size, fine.channels, fine.groups, fine.features) == ((64, 32, 48), 8, 1, 32)
    assert (fine.batch, fine.window, fine.image) == (2, (5, 5, 5), (80, 40, 48))
    assert static.levels_of((384, 384))[-1] == replace(static.levels_of("paper-2d")[-1], name="384x384 level 4")


def test_launch_numbers():
    assert static.launch_numbers("rows=1, tile=64") == (("rows", 1), ("tile", 64))
    for text in ("rows", "rows=", "rows=0", "rows=-1", "lanes=4", "", "rows=2000"):
        with refused("against", "rows, taps, tile", repr(text)):
            static.launch_numbers(text)
    with refused("warps", "power of two", "3"):
        static.launch_numbers("warps=3")
    with refused("warps", "32", "64"):
        static.launch_numbers("warps=64")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--op mow", ("op", "mow", "warp")),
        ("--device sm_12", ("target", "sm_12", "gfx942")),
        ("--sizes 20,20", ("divisible by 16", "(20, 20)")),
        ("--sizes 16", ("sizes", "(16,)")),
        ("--op compose --sizes 32,32 --against rows=1", ("rows=1", "compose", "changes none")),
        ("--dtype int8", ("dtype", "int8")),
    ],
)
def test_the_command_refuses_in_one_sentence(arguments, words):
    with refused(*words):
        CliRunner().invoke(app, ["bench", "static", *arguments.split()], catch_exceptions=False)


def test_numbers_that_do_not_compile_say_so(monkeypatch):
    def broken(*_):
        raise RuntimeError("out of registers\nand more")

    monkeypatch.setattr(static, "compile_launch", broken)
    job = static._Job("sm_90", torch.bfloat16, "mov", (16, 32), (("rows", 1),), 0)
    with refused("against", "rows=1", "mov_forward_kernel for sm_90", "out of registers"):
        job.run()
    with pytest.raises(RuntimeError, match="out of registers"):
        replace(job, numbers=()).run()


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
    for op in ("mov", "warp", "compose", "fuse", "norm", "losses"):
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
