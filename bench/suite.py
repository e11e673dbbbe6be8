"""Every benchmark at sizes that fit the device: what `coverfast bench all` runs, in the order of what matters most."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from coverfast.bench.operators import CASES
from coverfast.bench.problems import preset_levels
from coverfast.bench.step_variants import PUBLISHED

_SMALL = ("--preset", "small-2d", "--preset", "small-3d")
_PAPER = ("--preset", "paper-3d", "--preset", "paper-2d")
#: What takes minutes to compile, beside what it is compared with.
_LATE = ("coverfast torch", "eager A", "compiled A", "FlexAttention")
_OTHERS = ("warp", "compose", "head", "losses", "views", "norm")


def _against(*names: str) -> tuple[str, ...]:
    return tuple(word for name in names for word in ("--against", name))


#: By device: the name of the file, then the benchmark and its options. On a GPU the sizes are the paper's.
STAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "mov": ("mov", *_SMALL, "--sizes", "64,64,64"),
        "vpa": ("vpa", "--repeats", "3"),
        "step": ("step", *_SMALL, "--repeats", "3", "--profile"),
        **{op: (op, *_SMALL) for op in _OTHERS},
        "mov-windows": ("mov", "--sizes", "192,192", "--window", "3,5,7,9,11"),
        "mov-compiled": ("mov", "--sizes", "192,192", "--window", "3,5", *_against(*_LATE)),
        "data": ("data", "--formats", "--large"),
        "static": ("static", "--target", "sm_90"),
    },
    "cuda": {
        "mov": ("mov", *_PAPER, "--repeats", "20", *_against("coverfast triton", "eager A", "eager B")),
        "vpa": ("vpa", "--repeats", "3"),
        **{op: (op, *_PAPER, "--repeats", "20") for op in _OTHERS},
        "step-3d": ("step", "--preset", "paper-3d", "--repeats", "3", "--profile"),
        "step-2d": ("step", "--preset", "paper-2d", "--repeats", "3", "--profile"),
        "static": ("static", "--target", "sm_90"),
        "data": ("data",),
        "mov-3d": ("mov", "--batch", "2", "--sizes", "128,128,128", "--window", "5"),
        "mov-2d": ("mov", "--batch", "24", "--sizes", "384,384", "--window", "7"),
    },
}
#: What takes these options, by option.
_TAKES = {
    "device": ("mov", "warp", "compose", "norm", "losses", "views", "head", "vpa", "step", "data"),
    "dtype": ("mov", "warp", "norm", "losses", "head", "vpa"),
    "sizes": ("mov", "warp", "compose", "norm", "losses", "views", "head", "vpa", "step"),
}


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: "done", "failed" or "cut off", or "skipped" where there was no time left."""

    name: str
    how: str
    seconds: float
    file: Path


def commands(
    device: str, dtype: str | None = None, sizes: Sequence[Sequence[int]] = (), against: Sequence[str] = ()
) -> dict[str, list[str]]:
    """By stage the arguments of `coverfast bench`.

    Args:
        device: "cpu" or "cuda".
        dtype: of all that have a choice.
        sizes: grids instead of the presets' and those above, for all that have grids.
        against: variants, each for the benchmarks that know it; without a name that it knows a benchmark has its own.
    """
    found = {}
    for name, (op, *options) in STAGES[device].items():
        if sizes and op in _TAKES["sizes"]:
            options = _without(options, "--preset", "--sizes")
            options += [word for size in sizes for word in ("--sizes", ",".join(map(str, size)))]
        known = [variant for variant in against if variant in variants(op)]
        if known:
            options = [*_without(options, "--against"), *_against(*known)]
        if dtype is not None and op in _TAKES["dtype"]:
            options += ["--dtype", dtype]
        if op in _TAKES["device"]:
            options += ["--device", device]
        found[name] = [op, *options]
    return found


def variants(op: str) -> set[str]:
    """Those that a benchmark can be told to measure."""
    if op == "step":
        return {"coverfast", *PUBLISHED}
    cases = (
        CASES["mov" if op == "vpa" else op](preset_levels("small-2d"), "contiguous") if op in (*CASES, "vpa") else []
    )
    return {name for case in cases for name in case.variants}


def _without(options: Sequence[str], *names: str) -> list[str]:
    """Options but for those names and their values."""
    kept, skip = [], False
    for word in options:
        if skip or word in names:
            skip = word in names
            continue
        kept.append(word)
    return kept


def run(stages: dict[str, list[str]], folder: Path, minutes: float, tell: Callable[[str], None]) -> Iterator[Outcome]:
    """Every stage in a process of its own, so that one that fails or is cut off leaves the rest, as do its results so
    far: they are written as they come. What has not begun after `minutes` is skipped.
    """
    end = time.monotonic() + 60 * minutes
    for name, arguments in stages.items():
        # Counts of the compiler are of no device.
        place = folder.parent / "compiler" if arguments[0] == "static" else folder
        file, begun = place / f"{name}.json", time.monotonic()
        if begun >= end:
            yield Outcome(name, "skipped", 0.0, file)
            continue
        tell(name)
        command = [sys.executable, "-m", "coverfast", "bench", *arguments, "--save", str(file)]
        try:
            code = subprocess.run(command, timeout=end - begun).returncode
            how = "done" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            how = "cut off"
        yield Outcome(name, how, time.monotonic() - begun, file)
