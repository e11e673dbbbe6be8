"""One step before the start: what a run will take, known before anything is written."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coverfast.checks import require
from coverfast.disk import byte_count
from coverfast.methods import Batch
from coverfast.training.engine import Engine
from coverfast.training.estimate import duration, matrix_rate
from coverfast.training.telemetry import TAKEN, peak_memory

#: A first step that takes longer than this is not repeated without what only a first step does.
_LONG = 20.0


@dataclass(frozen=True)
class Rehearsal:
    """What a step takes.

    seconds: of it. memory: bytes at the peak. flops: of all processes, NaN if not known. rate: FLOP/s of them.
    """

    seconds: float
    memory: float
    flops: float
    rate: float


def check_figures(found: Any) -> None:
    """Refuse what a method calls figures and is none: they must be numbers, "loss" among them, of names that are free.

    Raises:
        InputError: naming the figure.
    """
    require(isinstance(found, dict) and "loss" in found, f"figures of a method must hold 'loss', got {found!r:.80}")
    for name, value in found.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        require(number, f"figures of a method must be numbers, got {value!r:.40} for {name!r}")
        free = isinstance(name, str) and name.isidentifier() and not name.startswith("val_") and name not in TAKEN
        require(free, f"figures of a method must have names that are free, got {name!r}")


def rehearse(engine: Engine, batch: Batch, flops: float) -> Rehearsal:
    """Forward and backward of a batch, as the training will do them; the weights are left as they are.

    flops: of a step of all processes.
    """
    device, world = engine.device, engine.world
    seconds = math.inf
    for attempt in range(2):
        before = time.perf_counter()
        row = engine.step(batch, update=False, watch=world.writes and not attempt)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - before
        seconds = min(seconds, took)
        if world.same(took > _LONG and not (attempt or engine.settings.compile)):
            break
    engine.optimizer.zero_grad(set_to_none=True)
    check_figures(engine.method.figures(dict(zip(engine.names[:-2], row.tolist(), strict=False))))
    held = (getattr(p, "_local_tensor", p) for p in engine.method.parameters())
    moments = 8 * sum(p.numel() for p in held)
    dtype = torch.bfloat16 if engine.choices.precision == "bfloat16" else torch.float32
    return Rehearsal(seconds, peak_memory(device) + moments, flops, matrix_rate(device, dtype) * world.size)


def forecast(found: Rehearsal, engine: Engine, first: int, folder: Path) -> list[str]:
    """Sentences for people: memory, time and disk of the run."""
    s = engine.settings
    left = s.iterations - first + 1
    weights = sum(p.numel() for p in engine.method.parameters())
    one = 4 * weights * (4 if engine.ema else 3)
    kept = min(s.keep_checkpoints, math.ceil(left / s.checkpoint_every))
    kept += s.iterations // s.keep_every if s.keep_every else 0
    metrics = 600 * s.iterations
    need = one * (kept + 1) + 4 * weights + metrics  # one more while the oldest still stands
    there = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    work = f", {found.flops / 1e9:,.3g} GFLOP" if math.isfinite(found.flops) else ""
    notes = [
        f"a step takes about {duration(found.seconds)}{work} and {byte_count(found.memory)} "
        f"of memory; {left:,} of them about {duration(left * found.seconds)}",
        f"checkpoints of {byte_count(one)}, {kept} of them; {byte_count(need)} of disk in all, {byte_count(free)} free",
    ]
    if need > free:
        notes.append(f"warning: {folder} has not enough space for this run; see --keep-checkpoints and --keep-every")
    return notes
