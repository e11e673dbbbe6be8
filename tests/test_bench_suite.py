"""`coverfast bench all`: every stage is a command that the command line knows, and how each ends is told."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from strategies import refused
from typer.main import get_command
from typer.testing import CliRunner

from coverfast.bench import suite
from coverfast.bench.operators import CASES
from coverfast.bench.problems import preset_levels
from coverfast.bench.step_variants import check_variant
from coverfast.bench.suite import Outcome, commands, run, variants
from coverfast.bench.vpa import pairs
from coverfast.cli.main import app

BENCH = get_command(app).commands["bench"].commands


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("asked", [{}, {"dtype": "float32", "sizes": [(64, 64), (32, 32, 32)], "against": ["eager A"]}])
def test_stages_are_commands_with_options_that_they_take(device, asked):
    stages = commands(device, **asked)
    assert {words[0] for words in stages.values()} >= {
        "mov",
        "warp",
        "compose",
        "head",
        "vpa",
        "step",
        "data",
        "static",
    }
    for name, (op, *options) in stages.items():
        context = BENCH[op].make_context(op, [*options, "--save", "x.json"])  # raises where an option is none
        found = context.params
        if asked and "against" in found and op in ("mov", "vpa", "head"):
            assert found["against"] == ["eager A"], name
        if asked and op in ("mov", "warp", "head", "vpa", "losses", "views"):
            assert [tuple(size) for size in found["sizes"]] == asked["sizes"], name
        if asked and op in ("mov", "vpa"):
            assert found["dtype"] == "float32"
        if not asked and op in ("mov", "step", "head") and device == "cuda":
            at = f"{found.get('preset')} {found['sizes']}"
            assert any(word in at for word in ("paper", "'gvsl-3d'", "128", "384"))


def test_variants_go_where_they_are_known():
    stages = commands("cpu", against=["published A", "grid_sample"])
    with_names = {name: words for name, words in stages.items() if "--against" in words}
    assert {words[0] for words in with_names.values()} == {"step", "warp", "mov"}
    assert "compiled A" in with_names["mov-compiled"]  # its own names
    assert with_names["step"][-4:] == ["--against", "published A", "--device", "cpu"]


def test_steps_of_another_method_keep_to_what_they_know():
    """Grids of its axes, and no published code, which is that of cover."""
    grids = [(64, 64), (32, 32, 32)]
    for device, preset, grid in (("cpu", "small-gvsl-2d", "64,64"), ("cuda", "gvsl-3d", "32,32,32")):
        words = commands(device, sizes=grids, against=["published A"])["step-gvsl"]
        assert words[:3] == ["step", "--preset", preset]
        assert [b for a, b in pairwise(words) if a == "--sizes"] == [grid]
        assert "published A" not in words
    assert "step-gvsl" not in commands("cpu", sizes=[(32, 32, 32)])


def stand_in(monkeypatch, tmp_path: Path, code: str) -> None:
    """Instead of the command line."""
    package = tmp_path / "site/coverfast"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)  # where a process starts comes first


def test_results_of_an_earlier_run_are_not_taken_for_new(monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path, "import sys; sys.exit(1)")
    (tmp_path / "one.json").write_text("of yesterday")
    (outcome,) = run({"one": ["good"]}, tmp_path, 1, print)
    assert (outcome.how, outcome.file) == ("failed", None)
    assert (tmp_path / "one.json").read_text() == "of yesterday"


WAYS = """
import sys, time, pathlib
pathlib.Path(sys.argv[-1]).write_text(" ".join(sys.argv[1:-1]))
{"good": lambda: None, "bad": lambda: sys.exit(1), "late": lambda: time.sleep(60)}[sys.argv[2]]()
"""


def test_what_fails_or_takes_too_long_leaves_the_rest(monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path, WAYS)
    told: list[str] = []
    stages = {"one": ["bad"], "two": ["good", "--device", "cpu"], "three": ["late"], "four": ["good"]}
    found = list(run(stages, tmp_path, 0.05, told.append))
    assert [(o.name, o.how) for o in found] == [
        ("one", "failed"),
        ("two", "done"),
        ("three", "cut off"),
        ("four", "skipped"),
    ]
    assert told == ["one", "two", "three"]
    assert (tmp_path / "two.json").read_text() == "bench good --device cpu --save"
    assert (tmp_path / "three.json").exists()  # what it had by then stays
    assert [o.file for o in found] == [*(tmp_path / f"{name}.json" for name in ("one", "two", "three")), None]
    assert not (tmp_path / "four.json").exists()
    assert 2 < found[2].seconds < 4


def test_command(monkeypatch, tmp_path):
    seen = {}

    def pretend(stages, folder, minutes, tell):
        seen.update(stages=stages, folder=folder, minutes=minutes)
        for number, name in enumerate(stages):
            tell(name)
            yield Outcome(name, "failed" if number else "done", 3.0, folder / f"{name}.json")

    monkeypatch.setattr(suite, "run", pretend)
    command = ["bench", "all", "--device", "cpu", "--only", "mov", "--only", "warp", "--save", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert list(seen["stages"]) == ["mov", "warp"]
    assert seen["folder"].parent == tmp_path
    assert seen["folder"].name.startswith("cpu-")
    assert "[2/2] coverfast bench warp" in done.output
    assert "1 of 2 stages are not done: warp" in done.output
    with refused("only", "mov-windows"):
        CliRunner().invoke(app, ["bench", "all", "--device", "cpu", "--only", "all"], catch_exceptions=False)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_real_stage(tmp_path):
    command = ["bench", "all", "--device", "cpu", "--only", "compose", "--sizes", "8,8", "--dtype", "float32", "--save"]
    done = CliRunner().invoke(app, [*command, str(tmp_path)])
    assert done.exit_code == 0, done.output
    (file,) = tmp_path.rglob("*.json")
    saved = json.loads(file.read_text())
    assert (saved["bench"], file.name) == ("compose", "compose.json")
    asked = "coverfast bench compose --sizes 8,8 --dtype float32 --device cpu --save"
    assert saved["provenance"]["command"].startswith(asked)


@pytest.mark.parametrize("op", [*CASES, "vpa", "step"])
def test_known_variants_are_those_that_the_command_takes(op):
    """A name that is passed on must not be refused there."""
    for name in sorted(variants(op)):
        if op == "step":
            check_variant(name)
            continue
        cases = pairs((16, 16), "", [(3, 1)])[0] if op == "vpa" else CASES[op](preset_levels("small-2d"), "")
        assert any(name in case.variants for case in cases)
    assert variants("static") == variants("data") == set()
