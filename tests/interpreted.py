"""A process that interprets the kernel tests. Triton decides once, at import, whether it does: hence its own."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",  # it sees no GPU
    "HIP_VISIBLE_DEVICES": "",
}


class Interpreted:
    """`pytest tests/kernels` under the interpreter, started at once."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-m", "not slow and not gpu"]
        environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"} | ENVIRONMENT
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115, lives as long as the process
        self.process = subprocess.Popen(
            command, cwd=Path(__file__).resolve().parents[1], env=environment, stdout=self.output, stderr=self.output
        )

    def wait(self, seconds: float) -> tuple[int, str]:
        """Exit status and output."""
        code = self.process.wait(seconds)
        self.output.seek(0)
        return code, self.output.read()

    def stop(self) -> None:
        """Leave nothing running."""
        self.process.kill()
        self.process.wait()
        self.output.close()
