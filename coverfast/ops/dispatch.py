"""Which implementation runs: `auto`, `triton`, `torch` or `reference`; an explicit choice is never replaced."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from coverfast.checks import InputError, check_choice
from coverfast.kernels import INTERPRETED

if TYPE_CHECKING:
    from torch import Tensor

IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")

OPS = ("mov", "warp", "compose", "fuse", "norm", "losses", "ncc", "views")
_HAS_TRITON = find_spec("triton") is not None
#: Ops that have a Triton kernel which this installation can import. Found once, without importing Triton.
KERNELS = frozenset(op for op in OPS if _HAS_TRITON and find_spec(f"coverfast.kernels.{op}") is not None)


def choose(op: str, impl: str, tensor: Tensor) -> str:
    """The implementation that runs for `op` on `tensor`: "triton", "torch" or "reference".

    `auto` is `triton` when the tensor is on a GPU and the op has an importable kernel, otherwise `torch`. An explicit
    `triton` also takes tensors on the CPU where Triton's interpreter is on.
    """
    check_choice("impl", impl, IMPLEMENTATIONS)
    if impl == "auto":
        return "triton" if tensor.is_cuda and op in KERNELS else "torch"
    if impl == "triton" and op not in KERNELS:
        why = "this version has no Triton kernel for it" if _HAS_TRITON else "the package triton is not installed"
        raise InputError(f"impl='triton' cannot run {op}: {why}; use impl='auto' or 'torch'")
    if impl == "triton" and not tensor.is_cuda and not INTERPRETED:
        raise InputError(
            f"impl='triton' cannot run {op} on {tensor.device}: it needs a GPU, or TRITON_INTERPRET=1 in the "
            "environment before Python starts to interpret the kernels (slowly); use impl='auto' or 'torch'"
        )
    return impl
