"""The kernel tests in Triton's interpreter: the kernels as they are, run on the CPU, on any machine with Triton."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coverfast.kernels import INTERPRETED
from coverfast.ops.dispatch import KERNELS

ROOT = Path(__file__).resolve().parents[1]
#: Triton decides once, at import, whether it interprets: a process of its own, which sees no GPU.
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
}


@pytest.mark.skipif(not KERNELS, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="tests/kernels are interpreted in this process")
def test_the_kernel_tests_pass_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-m", "not slow and not gpu"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"} | ENVIRONMENT
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    tail = "\n".join((done.stdout + done.stderr).splitlines()[-60:])
    assert done.returncode == 0, tail
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (\w+)", done.stdout.strip().splitlines()[-1])}
    assert counts.get("passed", 0) >= 120, tail
    assert not {"skipped", "failed", "error", "errors", "xfailed"} & set(counts), tail
