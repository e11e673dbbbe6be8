"""Where the time of a training step goes: shares of its parts, from torch's profiler.

Forward by the ranges that operators ran in, backward by the operators of the forward that they belong to. On a GPU the
time of kernels, on a CPU that of operators and of the Python between them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

#: By method the parts of its forward and the modules that these are; the rest of the forward is its losses.
MODULES: dict[str, dict[str, tuple[str, ...]]] = {
    "cover": {"backbone": ("backbone",), "pyramid": ("pyramid",)},
    "gvsl": {"backbone": ("backbone",), "heads": ("matching", "restoration")},
}
#: By method the names of the ranges. Convolutions of a part and what stands between them are its own.
PARTS = {method: ("data", "views", *modules, "losses", "optimiser") for method, modules in MODULES.items()}
OTHER = "other"

_BACKWARD = "autograd::engine::evaluate_function: "


def milliseconds(step: Callable[[], object], device: str, steps: int, method: str = "cover") -> dict[str, float]:
    """Of one step of a method, part by part, `OTHER` included; a mean over some steps."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks of its own stages
    gpu = device == "cuda"
    step()  # what a first call sets up is no part of a step
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as found:
        for _ in range(steps):
            step()
        if gpu:
            torch.cuda.synchronize()
    events = found.events()
    assert events is not None
    # Those of the GPU are counted with the operators that launched them.
    roots = [e for e in events if e.cpu_parent is None and e.device_type.name == "CPU"]
    owners: _Owners = {}
    names = PARTS[method]
    for event, part in (pair for root in roots for pair in _within(root, OTHER, names)):
        if event.sequence_nr >= 0:
            key, ran = (event.thread, event.sequence_nr), (event.time_range.start, part)
            # Operators without a gradient carry the number of the next one that has one.
            owners[key] = max(owners.get(key, ran), ran)
    spent = dict.fromkeys((*names, OTHER), 0.0)
    for event, part in (pair for root in roots for pair in _within(root, OTHER, names, owners)):
        spent[part] += _kernels(event) if gpu else event.self_cpu_time_total
    if gpu:  # whatever no operator has launched
        ran = sum(
            e.time_range.elapsed_us() for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation
        )
        spent[OTHER] += max(0.0, ran - sum(spent.values()))
    return {part: taken / 1e3 / steps for part, taken in spent.items()}


def _kernels(event: Any) -> float:
    """Microseconds of what an operator itself has launched; a range shows up on the GPU under its own name."""
    return sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)


#: By thread and number of an operator of the forward: when it ran, and in which part.
_Owners = dict[tuple[int, int], tuple[float, str]]


def _within(event: Any, part: str, names: Sequence[str], owners: _Owners | None = None) -> Iterator[tuple[Any, str]]:
    """An event and all those inside, each with the part that it belongs to; without `owners` no backward."""
    if event.name.startswith(_BACKWARD):
        if owners is None:
            return
        part = owners.get((event.fwd_thread, event.sequence_nr), (0.0, part))[1]
    elif event.name in names:
        part = event.name
    yield event, part
    for child in event.cpu_children:
        yield from _within(child, part, names, owners)


@contextmanager
def marked(method: nn.Module, name: str = "cover") -> Iterator[None]:
    """Ranges around the parts of the forward of a method of that name which is not compiled, see `MODULES`."""
    modules = [("losses", method)]
    modules += [(part, method.get_submodule(path)) for part, paths in MODULES[name].items() for path in paths]
    for part, module in modules:
        module.forward = _ranged(part, module.forward)
    try:
        yield
    finally:
        for _, module in modules:
            del module.forward  # that of the class again


def _ranged(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return call(*args, **kwargs)

    return ranged
