"""The training loop: batches in, steps, and now and then something else. It does not know which method it trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch.profiler import record_function

from coverfast.checks import InputError
from coverfast.methods import Batch
from coverfast.training.engine import Engine
from coverfast.training.schedules import learning_rate
from coverfast.training.telemetry import Record, Spent, Telemetry


@dataclass(frozen=True)
class Hooks:
    """What the loop calls between steps.

    validate: figures on held-out data after an iteration. save: write a checkpoint after one, "last" or not. due:
    whether one is due. draw: make pictures. stop: the number of the signal that asks all processes to stop, 0 for none.
    """

    validate: Callable[[int], Record] | None
    save: Callable[[int, bool], Any]
    due: Callable[[int], bool]
    draw: Callable[[int], Any]
    stop: Callable[[], int]


def train(engine: Engine, data: Iterable[Batch], telemetry: Telemetry, hooks: Hooks) -> int:
    """Train over `data`, one batch an iteration; the number of the signal that ended it early, or 0."""
    s, writes = engine.settings, engine.world.writes
    engine.method.train()
    batches, i = iter(data), 0
    while True:
        begun = time.perf_counter()
        try:
            with record_function("data"):
                batch = next(batches, None)
        except InputError:  # what has been learned so far is kept, by one process: others cannot be asked any more
            if i and engine.world.size == 1:
                telemetry.drain(engine.names)
                with suppress(InputError):  # the first failure is the one to tell
                    hooks.save(i, True)
            raise
        if batch is None:  # all are seen, or a signal has ended those who read
            signal = hooks.stop()
            if signal and i:
                telemetry.drain(engine.names)
                hooks.save(i, True)
            return signal
        arrived, i = time.perf_counter(), batch.iteration
        last = i == s.iterations

        look = i % s.monitor_every == 0 or i == 1
        figures = engine.step(batch, watch=look and writes)
        spent = Spent(arrived - begun, time.perf_counter() - begun)

        extra = {"lr": learning_rate(s, i)}
        if hooks.validate and (last or i % s.val_every == 0):
            engine.agree()
            extra |= {f"val_{name}": value for name, value in hooks.validate(i).items()}
        telemetry.add(i, engine.names, figures, spent, look=engine.look if look and writes else None, extra=extra)

        signal = hooks.stop()
        if last or signal or hooks.due(i):
            telemetry.drain(engine.names)
            hooks.save(i, bool(last or signal))
        if s.report and i % s.report_every == 0 and not last and not signal:
            hooks.draw(i)
        if signal:
            return signal
