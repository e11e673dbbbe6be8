"""The compiled kernels keep their budget: spills, width of loads, instructions a tap. Needs no GPU."""

import json
from importlib import metadata

import pytest
from strategies import refused, run_python
from typer.testing import CliRunner

from coverfast.bench import static
from coverfast.bench.problems import preset_problems
from coverfast.cli.main import app
from coverfast.ops.dispatch import KERNELS

#: The version of the budget, that of constraints.txt; others sum and allot registers a little differently.
PINNED = metadata.version("triton").startswith("3.7.") if "mov" in KERNELS else False

pytestmark = pytest.mark.skipif("mov" not in KERNELS, reason="needs the package triton")


@pytest.fixture(scope="module")
def rows():
    """Every specialisation of both paper presets for every target."""
    return static.table()


def test_every_level_is_compiled_for_every_target(rows):
    for target in static.ARCHITECTURES:
        for preset in static.PRESETS:
            for kernel in ("mov_forward", "mov_dq", "mov_dk"):
                of_it = [r for r in rows if (r.target, r.kernel) == (target, kernel) and preset in r.levels]
                assert sum(len(r.levels.split(preset)[1].split(";")[0].split(",")) for r in of_it) == 5


def test_nothing_spills_on_nvidia(rows):
    bytes_allowed = 0 if PINNED else 8
    assert [r for r in rows if r.target.startswith("sm_") and r.spills > bytes_allowed] == []


def test_keys_are_loaded_sixteen_bytes_at_a_time(rows):
    for row in rows:
        if row.target == "sm_90":
            window = 5 if "paper-3d" in row.levels else 7
            assert row.loads.split(", ")[0] == f"{window} x 128", row


def test_instructions_a_tap(rows):
    hopper = [r for r in rows if r.target == "sm_90"]
    for row in hopper:
        assert row.executed >= row.a_tap
        if row.kernel == "mov_forward":
            assert row.a_tap <= 30, row
    for level in range(5):
        of_it = [r for r in hopper if r.levels == f"paper-3d {level}"]
        assert sum(r.executed for r in of_it if r.kernel != "mov_forward") <= 90
        if level >= 2 and PINNED:  # 99.8 % of the taps
            assert sum(r.executed for r in of_it if r.kernel == "mov_forward") <= 25
            assert sum(r.executed for r in of_it if r.kernel != "mov_forward") <= 70


def test_problems_are_the_calls_of_a_step():
    finest = preset_problems("paper-3d")[-1]
    assert (finest.shape, finest.window, finest.groups) == ((2, 8, 128, 128, 128), (5, 5, 5), 1)
    assert sum(p.taps for p in preset_problems("paper-3d")) == 627_200_000
    assert sum(p.taps for p in preset_problems("paper-2d")) == 273_659_904


def test_the_command_prints_and_saves(tmp_path):
    file = tmp_path / "static.json"
    done = CliRunner().invoke(
        app,
        ["bench", "static", "--target", "sm_90", "--preset", "paper-3d", "--save", str(file)],
        env={"COLUMNS": "200"},
    )
    assert done.exit_code == 0, done.output
    assert all(word in done.output for word in ("forward", "dq", "dk", "3d 3, 4", "5 x 128"))
    saved = json.loads(file.read_text())
    assert len(saved["rows"]) == 15
    assert saved["provenance"]["triton"]


def test_a_target_that_is_not_there_is_refused():
    with refused("target", "sm_12"):
        static.table(targets=["sm_12"])


def test_the_interpreter_compiles_nothing():
    code = "from coverfast.bench import static\ntry: static.table()\nexcept ValueError as error: print(error)"
    assert "TRITON_INTERPRET" in run_python(code, TRITON_INTERPRET="1")


_LAUNCHER = '''
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Hopper:
    """A GPU that is not there: enough of a driver for the launcher to bind arguments and compile."""
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Hopper())
from coverfast.bench import static
from coverfast.kernels import mov as kernels
from coverfast.ops import mov as op

def launches(*shape):
    q = torch.zeros(shape).bfloat16().to(memory_format=torch.channels_last_3d)
    outputs, gradients = op._new_outputs(q, 1), (op._gradient_like(q), op._gradient_like(q))
    problem = (5, 5, 5), 1, 0.35
    yield kernels.forward_launch(q, q, *outputs, *problem)
    yield from kernels.backward_launches(torch.zeros_like(outputs[0]), q, q, *outputs, *gradients, *problem)

for sizes in ((2, 8, 6, 5, 32), (1, 8, 16, 32, 96), (3, 8, 1, 7, 64)):
    for launch in launches(*sizes):
        options = dict(num_warps=launch.warps, num_stages=1, enable_fp_fusion=True, grid=(launch.programs,))
        compiled = launch.kernel.warmup(**launch.arguments, **launch.constants, **options)
        counted = static.compile_launch(launch, "sm_90")
        print(launch.kernel.__name__, compiled.asm["ptx"] == counted.asm["ptx"], id(compiled))
'''


def test_the_launcher_compiles_what_the_table_counts_once_for_all_sizes():
    lines = [line.split() for line in run_python(_LAUNCHER).splitlines()]
    assert len(lines) == 9
    assert all(same == "True" for _, same, _ in lines)
    # Tiles of 32 and 64 lanes: two kernels each for three sizes.
    assert len({(kernel, compiled) for kernel, _, compiled in lines}) <= 6
