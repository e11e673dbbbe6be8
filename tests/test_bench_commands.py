"""The commands of `coverfast bench`: they measure what was asked, print and save it, and refuse in one sentence."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from strategies import refused, run_python
from typer.testing import CliRunner, Result

from coverfast.bench import harness
from coverfast.bench.operators import CASES
from coverfast.cli.main import app

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

#: Commands whose options people compare.
TAKES_ALL = (
    *("mov", "warp", "compose", "fuse", "norm", "losses", "views", "head"),
    *("vpa", "step", "data", "static", "all"),
)


def bench(arguments: str, *more: str) -> Result:
    """A run of a command; pluses in a word stand for blanks."""
    given = [argument.replace("+", " ") for argument in arguments.split()]
    return CliRunner().invoke(app, ["bench", *given, *more], env={"COLUMNS": "200"}, catch_exceptions=False)


@pytest.mark.parametrize("command", TAKES_ALL)
def test_every_command_takes_the_same_options(command):
    text = bench(f"{command} --help").output
    assert all(f"--{name}" in text for name in ("device", "dtype", "sizes", "against", "save")), text


def test_the_command_line_needs_no_torch():
    assert run_python("import sys, coverfast.cli; print('torch' in sys.modules)") == "False"


# --- operators -------------------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize(
    ("arguments", "words", "case"),
    [
        (
            "mov --sizes 12,12 --window 3",
            ("eager A", "eager B", "torch 2", "commit", "threads"),
            "12 x 12 window 3 x 3",
        ),
        ("views --sizes 12,12", ("coverfast torch",), "12 x 12 views"),
        ("head --sizes 16,16 --window 3", ("coverfast torch",), "16 x 16 window 3 head"),
    ],
)
def test_operators_print_and_save(tmp_path, arguments, words, case):
    file = tmp_path / "results.json"
    done = bench(arguments, "--repeats", "1", "--device", "cpu", "--save", str(file))
    assert done.exit_code == 0, done.output
    assert all(word in done.output for word in (*words, case)), done.output
    saved = json.loads(file.read_text())
    assert saved["bench"] == arguments.split()[0]
    assert saved["provenance"]["device"]
    assert {row["case"] for row in saved["rows"]} == {case}
    for row in saved["rows"]:
        assert row["forward_ms"] > 0
        assert row["error"] < 1e-4
        assert row["dtype"] == "float32"


@pytest.fixture
def asked(monkeypatch):
    """What `measure` is called with, by the names of cases; nothing is measured."""
    calls: list[tuple[str, str, list[str]]] = []

    def note(case, device, dtype, repeats, names=(), **_):
        calls.append((case.name, str(dtype)[6:], list(names)))
        return []

    monkeypatch.setattr(harness, "measure", note)
    return calls


def test_fields_take_the_dtypes_that_they_may_have(asked):
    bench("compose --sizes 8,8 --dtype float64 --device cpu")
    bench("compose --sizes 8,8 --device cpu")
    bench("views --sizes 8,8 --dtype float32 --device cpu")
    assert [dtype for _, dtype, _ in asked] == ["float64", "float32", "float32"]


def test_every_size_is_measured_with_every_window(asked):
    bench("mov --sizes 12,12 --sizes 4,5,6 --window 3,5 --device cpu")
    flat, deep = [f"12 x 12 window {w} x {w}" for w in (3, 5)], [f"4 x 5 x 6 window {w} x {w} x {w}" for w in (3, 5)]
    assert [name for name, *_ in asked] == [*flat, *deep]


def test_presets_and_sizes_are_both_measured(asked):
    bench("mov --preset small-2d --sizes 8,8 --device cpu --against coverfast+torch --against eager+A")
    assert [name for name, *_ in asked] == [*(f"small-2d level {i}" for i in range(5)), "8 x 8 window 5 x 5"]
    assert all(names == ["coverfast torch", "eager A"] for *_, names in asked)


def test_cases_without_a_variant_are_left_out(asked):
    """The grid of the pyramid's warp is never ready."""
    bench("warp --sizes 8,8 --device cpu --against grid_sample,+grid+ready")
    assert [name for name, *_ in asked] == ["8 x 8"]
    bench("warp --sizes 8,8 --device cpu")
    assert [name for name, *_ in asked[1:]] == ["8 x 8", "8 x 8 up"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("mov --sizes 8", ("sizes", "two or three axes", "(8,)")),
        ("mov --sizes 8,8 --sizes 8,0", ("sizes", "(8, 0)")),
        ("mov --sizes 8,8 --window 4", ("window", "odd")),
        ("mov --sizes 8,8 --channels 8 --groups 3", ("groups", "8 channels")),
        ("warp --sizes 8,8 --against nothing", ("against", "grid_sample, grid ready", "nothing")),
        ("warp --sizes 8,8 --dtype int8", ("dtype", "int8")),
        ("warp --sizes 8,8 --layout rows", ("layout", "contiguous")),
        ("compose --sizes 8,8 --dtype bfloat16", ("float32 or float64", "half precision", "bfloat16")),
        ("compose --sizes 8,8 --dtype float16", ("float32 or float64", "half precision", "float16")),
        ("compose --sizes 8,9", ("even", "(8, 9)")),
        ("views --sizes 8,8 --dtype float64", ("float32", "float64")),
        ("head --sizes 20,20", ("divisible by 16", "(20, 20)")),
        ("mov --sizes 8,8 --against coverfast+triton", ("coverfast triton", "GPU", "cpu")),
        ("mov --sizes 8,8 --against NATTEN", ("NATTEN", "installed")),
    ],
)
def test_operators_refuse_in_one_sentence(arguments, words):
    with refused(*words):
        bench(f"{arguments} --device cpu")


@pytest.mark.parametrize("op", CASES)
def test_interpreted_kernels_are_not_timed(op, monkeypatch):
    monkeypatch.setattr(harness, "INTERPRETED", True)
    with refused("TRITON_INTERPRET"):
        bench(f"{op} --sizes 16,16 --device cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_says_so():
    for arguments in ("tune", "agree", "mov --device cuda", "step --device cuda", "data --device cuda"):
        with refused("GPU"):
            bench(arguments)
