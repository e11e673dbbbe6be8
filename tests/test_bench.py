"""The measuring tools measure: baselines compute the same numbers, memory and time are seen."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from coverfast import mov
from coverfast.bench.baselines import mov_a, mov_b
from coverfast.bench.measure import interleaved, peak_growth


@pytest.mark.parametrize(("size", "window"), [((7, 5), (3, 5)), ((5, 4, 6), (3, 3, 5))])
@pytest.mark.parametrize("baseline", [mov_a, mov_b])
def test_baselines_compute_mov(baseline, size, window) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 6, *size, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = mov(q, k, window=window, groups=2, impl="reference")
    torch.testing.assert_close(baseline(q, k, window=window, groups=2), expected)


def test_interleaved_sees_a_slow_variant() -> None:
    seconds = interleaved({"fast": lambda: time.sleep(0.01), "slow": lambda: time.sleep(0.05)}, 3)
    assert 3 < min(seconds["slow"]) / min(seconds["fast"]) < 6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_is_that_of_the_child_alone() -> None:
    """Whatever this process has used before, the streaming form needs a fraction of the unfolded one."""
    hog = bytearray(os.urandom(1) * 600_000_000)
    del hog
    shape = ["32,32,32", "5,5,5", "8", "1"]
    ours, unfolded = (peak_growth("coverfast.bench.mov", [n, *shape], 1) for n in ("coverfast torch", "eager B"))
    assert 2 < ours < 60
    assert unfolded > 150  # the products alone: 8 x 32^3 x 125 floats, 131 MB


def test_bench_mov_prints_a_table() -> None:
    command = [sys.executable, "-m", "coverfast", "bench", "mov", "--size", "12,12", "--window", "3", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("coverfast torch", "eager A", "eager B", "torch 2"))
