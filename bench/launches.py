"""How many launches the head of a training step is: pyramid, losses, backward.

On a GPU everything that runs on it, counted by torch's profiler. On a CPU what would run there: torch's operators but
for views and allocations, and the Triton kernels, which are planned and not run (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from coverfast.bench.head import head_cases, head_field, head_loss
from coverfast.bench.problems import Level
from coverfast.kernels.launch import Launch

STAGES = ("pyramid", "losses", "backward")

_KERNEL = "coverfast launch"
_FREE = ("aten::empty", "aten::new_empty", "aten::resize_", "aten::set_", "aten::detach_", "aten::_nnpack_available")


def head_launches(levels: Sequence[Level], impl: str, device: str, dtype: torch.dtype, limit: int | None) -> list[int]:
    """Launches of every stage, on a finest grid of at most `limit` pixels an axis."""
    (case,), at = head_cases(levels, "channels_last" if device == "cuda" else "contiguous"), tuple(levels)
    inputs = case.make(device, dtype, limit, 0)
    wanted = [x for x in inputs if x.requires_grad]
    made: dict[str, Any] = {}

    def pyramid() -> None:
        made["psi"] = head_field(at, *inputs, impl=impl)

    def losses() -> None:
        made["loss"] = head_loss(at, made["psi"], *inputs, impl=impl)

    def backward() -> None:
        torch.autograd.grad(made["loss"], wanted)

    stages = (pyramid, losses, backward)
    planning = nullcontext() if device == "cuda" else mock.patch.object(Launch, "run", _planned)
    with planning:
        for stage in stages:  # what a first call compiles or sets up is no part of a step
            stage()
        return [_count(stage, device) for stage in stages]


def _planned(launch: Launch) -> None:
    with record_function(_KERNEL):
        pass


def _count(stage: Callable[[], None], device: str) -> int:
    gpu = device == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks of its own stages
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as found:
        stage()
        if gpu:
            torch.cuda.synchronize()
    events = found.events()
    assert events is not None
    if gpu:
        return sum(e.device_type.name == "CUDA" and not e.is_user_annotation for e in events)
    return sum(_would_launch(e) for e in events if e.cpu_parent is None)


def _would_launch(event: Any) -> int:
    """Launches of an operator: those of the operators that it calls, or itself."""
    if event.name == _KERNEL:
        return 1
    inner = sum(_would_launch(child) for child in event.cpu_children)
    return inner or int(event.name.startswith("aten::") and not _is_free(event.name))


def _is_free(name: str) -> bool:
    """Whether an operator of torch computes nothing: it allocates, asks or returns a view."""
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
    if name.startswith(_FREE) or packet is None:
        return name.startswith(_FREE)
    schema = getattr(packet, packet.overloads()[0])._schema
    return any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
