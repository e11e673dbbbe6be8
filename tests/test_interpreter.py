"""The kernel tests in Triton's interpreter: the kernels as they are, run on the CPU, on any machine with Triton.

They run beside the other tests, on the second core: `conftest.py` starts them before the first test and puts this last.
"""

import re

import pytest

from coverfast.kernels import INTERPRETED
from coverfast.ops.dispatch import KERNELS


@pytest.mark.skipif(not KERNELS, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="tests/kernels are interpreted in this process")
def test_the_kernel_tests_pass_in_the_interpreter(interpreted):
    code, output = interpreted.wait(1800)
    tail = "\n".join(output.splitlines()[-60:])
    assert code == 0, tail
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (\w+)", output.strip().splitlines()[-1])}
    assert counts.get("passed", 0) >= 400, tail
    assert not {"skipped", "failed", "error", "errors", "xfailed"} & set(counts), tail
