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
from coverfast.methods import Batch
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
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterable[Batch],
    run: Run,
    schedule: Schedule,
    *,
    validation: Callable[[], Iterable[Batch]] | None = None,
    on_step: Callable[[Record], None] = lambda record: None,
) -> None:
    """Train over `data`, one batch an iteration, writing metrics and checkpoints into `run`.

    `on_step` gets every iteration's record: `iteration`, the method's named scalars and `seconds`; with `val_` before
    the names on iterations that were validated.
    """
    method.train()
    before = time.perf_counter()
    for batch in data:
        losses = method(batch)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(method.parameters(), schedule.clip)
        record: Record = {"iteration": batch.iteration, **to_floats(losses)}
        if not math.isfinite(record["loss"]):
            raise InputError(
                f"the loss is {record['loss']} at iteration {batch.iteration}; the weights are as of the step before, "
                f"see the last checkpoint in {run.folder / 'checkpoints'}"
            )
        optimizer.step()
        last = batch.iteration == schedule.iterations
        if validation and (last or batch.iteration % schedule.val_every == 0):
            record |= {f"val_{name}": value for name, value in evaluate(method, validation()).items()}
        record["seconds"], before = time.perf_counter() - before, time.perf_counter()
        run.append_metrics(record)
        if last or batch.iteration % schedule.checkpoint_every == 0:
            run.save_checkpoint(
                batch.iteration,
                {"method": method.state_dict(), "optimizer": optimizer.state_dict()},
                keep=schedule.keep_checkpoints,
            )
        on_step(record)


@torch.no_grad()
def evaluate(method: nn.Module, data: Iterable[Batch]) -> Record:
    """Mean of a method's named scalars over held-out samples."""
    total: Record = {}
    count = 0
    training = method.training
    method.eval()
    for batch in data:
        size = len(batch.samples)
        count += size
        for name, value in to_floats(method(batch)).items():
            total[name] = total.get(name, 0.0) + size * value
    method.train(training)
    return {name: value / count for name, value in total.items()}


def to_floats(losses: dict[str, Any]) -> Record:
    """Scalars of a method as numbers, in one copy from the device."""
    values = torch.stack([v.detach().float() for v in losses.values()]).tolist()
    return dict(zip(losses, values, strict=True))
