"""Triton kernels: pointers, tiles, launch configurations. No autograd, no dispatch, and no import of Triton here."""

from __future__ import annotations

import os

#: Whether kernels run in Triton's interpreter, on the CPU. Triton decides when a kernel is defined, at import.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
