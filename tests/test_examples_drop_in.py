"""The two methods that take `mov` in place of their own matching learn as before, and the page shows what changes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_examples import ROOT, figures

PIXELS, REGISTRATION = "pixel_consistency", "registration_cost_volume"
#: The curves part by rounding, 1e-7 here. Where a pixel's match lies on a pixel centre to rounding, interpolation has
#: the slope of one cell or of the next, and they part by up to 5e-5 from there on. A window that lacks its mask at the
#: border parts them by 6e-4 at least.
ROUNDING = 2e-4


def printed(script: str, *options: str, folder: Path) -> str:
    """One thread, so that a busy machine does not stall the threads of these small tensors."""
    command = [sys.executable, str(ROOT / "examples" / f"{script}.py"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("script", "options", "better"),
    [
        pytest.param(
            *(PIXELS, ["--size", "48", "--window", "7", "--steps", "40"], "share in its own tissue"),
            marks=pytest.mark.slow,
        ),
        (REGISTRATION, ["--size", "48", "--window", "7", "--steps", "20"], "Dice"),
    ],
)
def test_both_variants_learn_along_one_curve(script: str, options: list[str], better: str, tmp_path: Path) -> None:
    out = printed(script, *options, folder=tmp_path)
    assert figures(out, "largest difference of the curves:")[0] < ROUNDING
    first, last = (figures(out, f"mean of the {which} five") for which in ("first", "last"))
    assert all(after < 0.95 * before for before, after in zip(first, last, strict=True))
    for title, factor in (("pixels off", 1), (better, -1)):
        untrained, trained = (figures(out, f"{title}, {when}") for when in ("untrained", "trained"))
        assert len(trained) == 2
        assert all(factor * b < factor * a for a, b in zip(untrained, trained, strict=True))
    assert len(figures(out, "seconds a step, median")) == 2
    assert len(figures(out, "matching, extra MB")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("script", "size"), [(PIXELS, "16"), (REGISTRATION, "24")])
def test_volumes(script: str, size: str, tmp_path: Path) -> None:
    """Too few steps to learn; enough for backward passes that differ to show."""
    out = printed(script, "--ndim", "3", "--size", size, "--steps", "4", folder=tmp_path)
    assert figures(out, "largest difference of the curves:")[0] < ROUNDING
    own, ours = figures(out, "matching, extra MB")
    assert not ours > own  # no numbers where there is no Linux


@pytest.mark.parametrize(("script", "number"), [(PIXELS, 0), (REGISTRATION, 1)])
def test_page_shows_the_lines_that_change(script: str, number: int) -> None:
    """All lines between the markers of the script, and no others."""
    page, text = ((ROOT / name).read_text() for name in ("docs/drop-in.md", f"examples/{script}.py"))
    before, after = (
        text.split(f"    # {name}\n")[1].split("    # end\n")[0].splitlines() for name in ("before", "after")
    )
    shown = re.findall(r"^```diff\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(shown) == 2
    assert shown[number].splitlines() == [*(f"-{line}" for line in before), *(f"+{line}" for line in after)]
    assert f"python examples/{script}.py" in page
