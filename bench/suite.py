"""Every benchmark at sizes that fit the device: what `coverfast bench all` runs, in the order of what matters most."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from pathlib import Path

from coverfast.bench.operators import CASES
from coverfast.bench.problems import preset_levels
from coverfast.bench.step_variants import PUBLISHED
from coverfast.bench.vpa import pairs
from coverfast.training.settings import preset_ndim, preset_settings


def _against(*names: str) -> tuple[str, ...]:
    return tuple(word for name in names for word in ("--against", name))


_SMALL = ("--preset", "small-2d", "--preset", "small-3d")
_PAPER = ("--preset", "paper-3d", "--preset", "paper-2d")
_STEP = ("--repeats", "3", *_against("coverfast", "published A"))
_OTHERS = ("warp", "compose", "fuse", "losses", "ncc", "views", "norm")
_COMPILED = ("eager A", "compiled A")

#: By device: the name of the file, then the benchmark and its options. On a GPU the sizes are the paper's, but for what
#: takes minutes to compile.
STAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "mov": ("mov", *_SMALL, "--sizes", "64,64,64", "--repeats", "9"),
        "vpa": ("vpa", "--repeats", "3"),
        "step": ("step", *_SMALL, "--repeats", "3", "--profile"),
        "step-gvsl": ("step", "--preset", "small-gvsl-2d", "--repeats", "2", "--profile", *_against("coverfast")),
        "head": ("head", *_SMALL),
        **{op: (op, *_SMALL) for op in _OTHERS},
        "mov-windows": ("mov", "--sizes", "192,192", "--window", "3,5,7,9,11", "--repeats", "15"),
        "mov-compiled": (
            *("mov", "--sizes", "192,192", "--window", "3,5", "--repeats", "15"),
            *_against("coverfast torch", *_COMPILED),
        ),
        "data": ("data", "--formats", "--large"),
        "static": ("static", "--target", "sm_90"),
    },
    "cuda": {
        "mov": ("mov", *_PAPER, "--repeats", "10", *_against("coverfast triton", "eager A", "eager B")),
        "vpa": ("vpa", "--repeats", "5", "--seconds", "3"),
        "step-3d": ("step", "--preset", "paper-3d", "--profile", *_STEP),
        "head": ("head", *_PAPER, "--repeats", "5", *_against("coverfast auto", "eager A")),
        "step-2d": ("step", "--preset", "paper-2d", *_STEP),
        "step-gvsl": ("step", "--preset", "gvsl-3d", "--repeats", "3", "--profile", *_against("coverfast")),
        **{op: (op, *_PAPER, "--repeats", "5") for op in _OTHERS},
        "data": ("data", "--repeats", "1"),
        "static": ("static", "--target", "sm_90"),
        "mov-compiled": (
            *("mov", "--sizes", "384,384", "--window", "3"),
            *_against("coverfast triton", *_COMPILED, "FlexAttention"),
        ),
    },
}
_GRIDS = ("mov", "warp", "compose", "fuse", "norm", "losses", "ncc", "views", "head", "vpa", "step")
#: The dtypes of those that do not come in all.
_EXACT = ("float32", "float64")
_DTYPES = {
    "compose": _EXACT,
    "fuse": _EXACT,
    "ncc": _EXACT,
    "views": ("float32",),
    "step": ("float32", "bfloat16"),
    "data": (),
}


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: "done", "failed" or "cut off", or "skipped" where there was no time left.

    Attributes:
        file: its results, as far as it came; None if it has saved none.
    """

    name: str
    how: str
    seconds: float
    file: Path | None


def commands(
    device: str, dtype: str | None = None, sizes: Sequence[Sequence[int]] = (), against: Sequence[str] = ()
) -> dict[str, list[str]]:
    """By stage the arguments of `coverfast bench`.

    Args:
        device: "cpu" or "cuda".
        dtype: of all that can be measured in it.
        sizes: grids instead of the presets' and those above, for all that have grids. Steps of another method than
            cover keep their preset, and are left out where no grid has its axes.
        against: variants, each for the benchmarks that know it; without a name that it knows a benchmark has its own.
    """
    found = {}
    for name, (op, *options) in STAGES[device].items():
        if sizes and op in _GRIDS:
            preset = _not_of_cover(options)
            fitting = [size for size in sizes if preset is None or len(size) == preset_ndim(preset)]
            if not fitting:
                continue
            options = _without(options, "--sizes", *([] if preset else ["--preset"]))
            options += [word for size in fitting for word in ("--sizes", ",".join(map(str, size)))]
        known = [variant for variant in against if variant in variants(op, options)]
        if known:
            options = [*_without(options, "--against"), *_against(*known)]
        if dtype is not None and dtype in _DTYPES.get(op, (dtype,)):
            options += ["--dtype", dtype]
        if op != "static":  # counts of the compiler are of no device
            options += ["--device", device]
        found[name] = [op, *options]
    return found


def variants(op: str, options: Sequence[str] = ()) -> set[str]:
    """Those that a benchmark with such options can be told to measure."""
    if op == "step":
        return {"coverfast", *(() if _not_of_cover(options) else PUBLISHED)}
    if op == "vpa":
        cases = pairs((16, 16), "contiguous", [(3, 1)])[0]
    else:
        cases = CASES[op](preset_levels("small-2d"), "contiguous") if op in CASES else []
    return {name for case in cases for name in case.variants}


def _not_of_cover(options: Sequence[str]) -> str | None:
    """The preset of another method than cover among options, if there is one."""
    presets = [value for name, value in pairwise(options) if name == "--preset"]
    return next((preset for preset in presets if preset_settings(preset).method != "cover"), None)


def _without(options: Sequence[str], *names: str) -> list[str]:
    """Options but for those names and their values."""
    return [word for before, word in zip(["", *options], options, strict=False) if not {before, word} & set(names)]


# --- running -----------------------------------------------------------------------------------------------------


def run(stages: dict[str, list[str]], folder: Path, minutes: float, tell: Callable[[str], None]) -> Iterator[Outcome]:
    """Every stage in a process of its own, so that one that fails leaves the rest. After `minutes` the one that runs is
    cut off, which leaves the cases that it has saved, and the others are skipped.
    """
    end = time.monotonic() + 60 * minutes
    for name, arguments in stages.items():
        place = folder.parent / "compiler" if arguments[0] == "static" else folder
        file, begun = place / f"{name}.json", time.monotonic()
        if begun >= end:
            yield Outcome(name, "skipped", 0.0, None)
            continue
        tell(name)
        before = _changed(file)
        how = _run([sys.executable, "-m", "coverfast", "bench", *arguments, "--save", str(file)], end - begun)
        yield Outcome(name, how, time.monotonic() - begun, file if _changed(file) != before else None)


def _changed(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


def _run(command: Sequence[str], seconds: float) -> str:
    """How a command ended that may take so long; with it end the processes that it has begun."""
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            return "done" if process.wait(None if seconds == inf else seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            _end(process)
            return "cut off"
        except BaseException:
            _end(process)
            raise


def _end(process: subprocess.Popen[bytes]) -> None:
    """As by Ctrl-C, so that it may clear up; then for good."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
