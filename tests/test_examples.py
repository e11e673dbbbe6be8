"""The example runs as a user runs it, keeps its promise, and is the code that the README shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "dense_ssl_drop_in.py"


def figures(printed: str, title: str) -> list[float]:
    """The numbers at the end of the line that begins with `title`."""
    line = next(line for line in printed.splitlines() if line.startswith(title))
    return [float(word) for word in line[len(title) :].split()]


@pytest.mark.parametrize(
    ("ndim", "options"),
    [
        (2, ["--size", "32", "--window", "7", "--steps", "30"]),
        pytest.param(3, ["--size", "16", "--steps", "4"], marks=pytest.mark.slow),
    ],
)
def test_both_matchings_learn_along_one_curve(ndim: int, options: list[str], tmp_path: Path) -> None:
    """One thread, so that a busy machine does not stall the threads of these small tensors."""
    command = [sys.executable, str(SCRIPT), "--ndim", str(ndim), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert figures(done.stdout, "largest difference of the curves:")[0] < 1e-4
    assert len(figures(done.stdout, "seconds a step, median")) == 2
    assert len(figures(done.stdout, "matching, extra MB")) == 2
    if ndim == 2:
        first, last = (figures(done.stdout, f"mean of the {which} five") for which in ("first", "last"))
        assert all(after < 0.95 * before for before, after in zip(first, last, strict=True))


def test_readme_shows_the_lines_that_change() -> None:
    """All lines between the markers of the script and no others; an added import stands in the script too."""
    section = (ROOT / "README.md").read_text().split("\n## In your own code\n")[1].split("\n## ")[0]
    (shown,) = re.findall(r"^```diff\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    lines = {sign: [line[1:] for line in shown.splitlines() if line[:1] == sign] for sign in "-+ "}
    assert sum(map(len, lines.values())) == len(shown.splitlines())
    script = SCRIPT.read_text()
    before, after = (
        script.split(f"    # {name}\n")[1].split("    # end\n")[0].splitlines() for name in ("before", "after")
    )
    assert lines["-"] == before
    assert [line for line in lines["+"] if not line.startswith("from ")] == after
    assert set(lines["+"] + lines[" "]) <= set(script.splitlines())
    assert f"python {SCRIPT.relative_to(ROOT).as_posix()}" in section
