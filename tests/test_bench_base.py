"""`--base REV`: a slowdown between two revisions of a real clone is reported, with the exit code; nothing is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("coverfast", "kernels", "bench", "cli")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("git") is None, reason="needs git, and links to files"
)


def git(clone: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(["git", "-C", clone, *who, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The library in a repository of its own: `mov` takes 0.05 s more in the first revision, 0.1 s in the last."""
    clone = tmp_path_factory.mktemp("clone")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    git(clone, "init", "-q")
    code = (clone / "coverfast/ops/mov.py").read_text()
    begin = "    outputs = _new_outputs(q, groups)\n    with"
    assert begin in code
    for seconds in (0.05, 0.1):
        slow = code.replace(begin, begin.replace("    with", f"    __import__('time').sleep({seconds})\n    with"))
        (clone / "coverfast/ops/mov.py").write_text(slow)
        git(clone, "add", "-A")
        git(clone, "commit", "-qm", f"takes {seconds} s")
    return clone


def bench(
    clone: Path, tmp_path: Path, *arguments: str, only: str = "coverfast torch"
) -> subprocess.CompletedProcess[str]:
    """`coverfast bench mov` as installed from that clone."""
    package = tmp_path / "site/coverfast"
    package.mkdir(parents=True)
    for entry in (clone / "coverfast").iterdir():
        (package / entry.name).symlink_to(entry)
    for name in FOLDERS[1:]:
        (package / name).symlink_to(clone / name)
    words = ["bench", "mov", "--sizes", "8,8", "--device", "cpu", "--against", only, "--repeats", "1"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "COLUMNS": "200"}
    command = [sys.executable, "-m", "coverfast", *words, *arguments]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)


def ratio(output: str, figure: str) -> float:
    """The number in the line of a figure of the table."""
    (line,) = [line for line in output.splitlines() if figure in line and "│" in line and "variant" not in line]
    return float([cell.strip() for cell in line.split("│")][5])


def test_a_planted_twofold_slowdown_between_revisions(clone, tmp_path):
    done = bench(clone, tmp_path, "--base", "HEAD~1")
    assert done.returncode == 1, done.stderr
    commit = git(clone, "rev-parse", "--short", "HEAD~1").strip()
    assert f"coverfast torch @ {commit}" in done.stdout
    assert 1.8 <= ratio(done.stdout, "forward ms") <= 2.2, done.stdout
    assert "worse than at HEAD~1 by more than 1.1; the worst is" in done.stdout
    assert git(clone, "worktree", "list").count("\n") == 1
    assert git(clone, "status", "--porcelain") == ""


@pytest.mark.slow
def test_what_is_no_slower_passes(clone, tmp_path):
    done = bench(clone, tmp_path, "--base", "HEAD", "--threshold", "1.5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert 0.8 <= ratio(done.stdout, "forward ms") <= 1.25


def test_what_compares_nothing_does_not_pass(clone, tmp_path):
    done = bench(clone, tmp_path, "--base", "HEAD", only="eager A")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Nothing was measured both here and at HEAD" in done.stdout


def test_revisions_that_cannot_be_measured_are_refused(clone, tmp_path):
    done = bench(clone, tmp_path / "1", "--base", "nothing")
    assert done.returncode == 2
    assert "base must be a git revision" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    last = git(clone, "rev-parse", "HEAD").strip()
    (clone / "coverfast/geometry.py").rename(clone / "coverfast/geometries.py")
    try:
        git(clone, "add", "-A")
        git(clone, "commit", "-qm", "renamed")
        bad = git(clone, "rev-parse", "HEAD").strip()
    finally:
        git(clone, "reset", "-q", "--hard", last)
    done = bench(clone, tmp_path / "2", "--base", bad)
    assert "base must be a revision that today's benchmarks run with" in done.stdout + done.stderr
    assert done.returncode == 2
    assert "No module named 'coverfast.geometry'" in done.stdout + done.stderr
    assert git(clone, "worktree", "list").count("\n") == 1
