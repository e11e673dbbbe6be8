"""The training loop: batches in, steps, metrics and checkpoints out. It does not know which method it trains."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from coverfast.checks import InputError
from coverfast.methods import Batch, Method
from coverfast.training.runs import Run

Record = dict[str, float]


@dataclass(frozen=True)
class Schedule:
    """When the loop does what besides stepping."""

    iterations: int
    clip: float
    checkpoint_every: int
    keep_checkpoints: int
    val_every: int


def train(
    method: Method,
    optimizer: torch.optim.Optimizer,
    data: Iterable[Batch],
    run: Run,
    schedule: Schedule,
    *,
    settings: dict[str, Any],
    validation: Callable[[], Iterable[Batch]] | None = None,
    on_step: Callable[[Record], None] = lambda record: None,
) -> None:
    """Train over `data`, one batch an iteration, writing metrics and checkpoints (with `settings`) into `run`.

    `on_step` gets every iteration's record: `iteration`, the method's named scalars and `seconds` (waiting for data
    and the step); on iterations that were validated also the figures of `method.evaluate`, `val_` before their names.
    """
    method.train()
    before = time.perf_counter()
    for batch in data:
        losses = method(batch)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = float(nn.utils.clip_grad_norm_(method.parameters(), schedule.clip))
        record: Record = {"iteration": batch.iteration, **to_floats(losses)}
        if not (math.isfinite(record["loss"]) and math.isfinite(norm)):
            raise InputError(
                f"loss and gradient must be finite, got loss {record['loss']} and gradient norm {norm} at iteration "
                f"{batch.iteration}; the last checkpoint in {run.folder / 'checkpoints'} is sound"
            )
        optimizer.step()
        record["seconds"] = time.perf_counter() - before
        last = batch.iteration == schedule.iterations
        if validation and (last or batch.iteration % schedule.val_every == 0):
            method.eval()
            record |= {f"val_{name}": value for name, value in method.evaluate(validation()).items()}
            method.train()
        run.append_metrics(record)
        if last or batch.iteration % schedule.checkpoint_every == 0:
            run.save_checkpoint(
                batch.iteration,
                {"method": method.state_dict(), "optimizer": optimizer.state_dict(), "settings": settings},
                keep=schedule.keep_checkpoints,
            )
        on_step(record)
        before = time.perf_counter()


def to_floats(losses: dict[str, Any]) -> Record:
    """Scalars of a method as numbers, in one copy from the device."""
    values = torch.stack([v.detach().float() for v in losses.values()]).tolist()
    return dict(zip(losses, values, strict=True))
