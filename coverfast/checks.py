"""One validator: every refusal says what the thing must be and what it was.

Messages read "q must be (B, C, *S) with 2 or 3 spatial axes, got shape (3, 4)".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class InputError(ValueError):
    """Something the caller can mend: a shape, a setting, a file, a full disk.

    The message is one sentence that names the thing, what was expected and what was found. The command line
    prints it without a traceback and exits with code 2.
    """


def require(condition: bool, message: str) -> None:
    """Raise `InputError(message)` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(int(s) for s in tensor.shape)


# The checks below raise inside an `if`, not through `require`: they run under torch.compile too, where
# building the message of a check that passes would pin every dynamic shape to a constant.


def check_map(name: str, value: Any, *, floating: bool = True) -> int:
    """Check that `value` is a tensor `(B, C, *S)` with 2 or 3 spatial axes; return their number."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.ndim not in (4, 5):
        raise InputError(f"{name} must be (B, C, *S) with 2 or 3 spatial axes, got shape {shape_of(value)}")
    for size in value.shape[1:]:
        if size < 1:
            raise InputError(f"{name} must have channels and pixels on every axis, got shape {shape_of(value)}")
    if floating and value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InputError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    return value.ndim - 2


def check_dvf(name: str, value: Any) -> int:
    """Check that `value` is a displacement vector field `(B, n, *S)`, float32 or float64; return n."""
    import torch

    ndim = check_map(name, value)
    if value.shape[1] != ndim:
        raise InputError(f"{name} must have one channel per spatial axis, (B, {ndim}, *S), got shape {shape_of(value)}")
    if value.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"{name} must be float32 or float64 (a half-precision field is off by up to half a pixel), "
            f"got {value.dtype}"
        )
    return ndim


def check_same(name: str, value: Tensor, other_name: str, other: Tensor, *whats: str) -> None:
    """Check that two tensors agree in each of `whats`: "shape", "batch", "size", "dtype", "device"."""
    for what in whats:
        match what:
            case "shape":
                same = value.shape == other.shape
            case "batch":
                same = value.shape[0] == other.shape[0]
            case "size":
                same = value.shape[2:] == other.shape[2:]
            case "dtype":
                same = value.dtype == other.dtype
            case _:
                same = value.device == other.device
        if not same:
            found, expected = _facet(value, what), _facet(other, what)
            raise InputError(f"{name} must have the {what} of {other_name}, {expected}, got {found}")


def _facet(value: Tensor, what: str) -> object:
    match what:
        case "shape":
            return shape_of(value)
        case "batch":
            return int(value.shape[0])
        case "size":
            return shape_of(value)[2:]
        case "dtype":
            return value.dtype
        case _:
            return value.device


def per_axis(name: str, value: int | Sequence[int], ndim: int, *, least: int = 1) -> tuple[int, ...]:
    """An int (the same on every axis) or one int an axis, as a tuple of `ndim` ints."""
    values: Any = (value,) * ndim if isinstance(value, int) else value
    ok = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == ndim
    ok = ok and all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values)
    if not ok:
        raise InputError(f"{name} must be an int of at least {least}, or {ndim} of them (one per axis), got {value!r}")
    return tuple(values)


def check_window(window: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """An odd window per axis, as a tuple of `ndim` ints."""
    sizes = per_axis("window", window, ndim)
    if any(w % 2 == 0 for w in sizes):
        raise InputError(f"window must be odd on every axis, got {window!r}")
    return sizes


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Check that a string is one of `choices`."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def printable(text: str) -> str:
    """A file may have any name: nothing that moves the cursor, ends a line or colours the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
