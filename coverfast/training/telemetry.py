"""Figures on their way from the device to metrics.jsonl, TensorBoard and the progress bar; nobody waits for them."""

from __future__ import annotations

import math
import resource
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coverfast.methods import Method
from coverfast.training.world import World

Record = dict[str, float]
#: Names of the figures that the loop adds to those of the method.
TAKEN = {"iteration", "grad_norm", "skipped", "lr", "seconds", "data_wait", "iterations_per_s", "images_per_s", "mfu"}
TAKEN |= {"peak_memory_gb"}


class Spent(NamedTuple):
    """Host seconds of an iteration: waiting for data, and all of it."""

    waiting: float
    total: float


@dataclass(frozen=True)
class Work:
    """What an iteration is, to tell rates: images, and floating point operations over what the devices can do."""

    images: int
    flops: float = math.nan
    rate: float = math.nan

    def rates(self, spent: Sequence[Spent]) -> Record:
        """Means over some iterations."""
        total, waiting = sum(s.total for s in spent), sum(s.waiting for s in spent)
        seconds = max(total / len(spent), 1e-9)
        return {
            "seconds": seconds,
            "data_wait": waiting / max(total, 1e-9),
            "iterations_per_s": 1 / seconds,
            "images_per_s": self.images / seconds,
            "mfu": self.flops / seconds / self.rate,
        }


class _Flight(NamedTuple):
    names: tuple[str, ...]
    rows: Tensor
    iterations: list[int]
    extras: list[Record]
    looks: dict[int, dict[str, Tensor]]
    event: Any


class Telemetry:
    """Collects the figures of iterations on the device and delivers them as records, some iterations late.

    Every `every` iterations they are added up over the processes and sent to the host; `deliver` gets them in order
    once they have arrived.
    """

    def __init__(
        self, method: Method, world: World, work: Work, *, every: int, deliver: Callable[[list[Record]], None]
    ) -> None:
        self.method, self.world, self.work, self.every, self.deliver = method, world, work, every, deliver
        self._flights: deque[_Flight] = deque()
        self._start()

    def _start(self) -> None:
        self._rows: list[Tensor] = []
        self._iterations: list[int] = []
        self._spent: list[Spent] = []
        self._extras: list[Record] = []
        self._looks: dict[int, dict[str, Tensor]] = {}

    def add(
        self,
        iteration: int,
        names: tuple[str, ...],
        figures: Tensor,
        spent: Spent,
        *,
        look: Mapping[str, Tensor] | None = None,
        extra: Mapping[str, float] | None = None,
    ) -> None:
        """Take what `Engine.step` returned, what the monitor saw, and what is known on the host."""
        self._rows.append(figures)
        self._iterations.append(iteration)
        self._spent.append(spent)
        self._extras.append(dict(extra or {}))
        if look:
            self._looks[iteration] = dict(look)
        if len(self._rows) == self.every:
            self._send(names)
        self._land(wait=False)

    def drain(self, names: tuple[str, ...]) -> None:
        """Deliver everything, waiting for the device."""
        if self._rows:
            self._send(names)
        self._land(wait=True)

    def _send(self, names: tuple[str, ...]) -> None:
        rows = torch.stack(self._rows)
        if self.world.size > 1:  # all but the last two, which are of all processes
            rows = torch.cat([self.world.sum(rows[:, :-2].contiguous()), rows[:, -2:]], 1)
        looks = {i: {k: _to_host(v) for k, v in look.items()} for i, look in self._looks.items()}
        rates = self.work.rates(self._spent) | {"peak_memory_gb": peak_memory(rows.device) / 1e9}
        extras = [rates | extra for extra in self._extras]
        host, event = _to_host(rows), None
        if rows.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._flights.append(_Flight(names, host, self._iterations, extras, looks, event))
        self._start()

    def _land(self, *, wait: bool) -> None:
        while self._flights:
            flight = self._flights[0]
            if flight.event is not None:
                if wait:
                    flight.event.synchronize()
                elif not flight.event.query():
                    return
            self._flights.popleft()
            self.deliver([*self._records(flight)])

    def _records(self, flight: _Flight) -> list[Record]:
        records = []
        # Not tolist: that of a tensor counts as waiting for a device.
        for iteration, row, extra in zip(flight.iterations, flight.rows.numpy(), flight.extras, strict=True):
            values = dict(zip(flight.names, map(float, row), strict=True))
            norm, skipped = values.pop("grad_norm"), values.pop("skipped")
            record = {"iteration": iteration, **self.method.figures(values), "grad_norm": norm, "skipped": skipped}
            if look := flight.looks.get(iteration):
                record |= self.method.monitored({k: v.numpy() for k, v in look.items()})
            records.append(record | extra)
        return records


def _to_host(values: Tensor) -> Tensor:
    """On the host some time later: from a GPU through pinned memory, without waiting."""
    return values.detach().to("cpu", non_blocking=True)


def peak_memory(device: torch.device) -> float:
    """Most bytes of the device that tensors have held so far; on a CPU, that the process has held."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class TensorBoard:
    """Events of the same figures, where the package tensorboard is installed."""

    def __init__(self, folder: Path, first: int, on_note: Callable[[str], None]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.on_note = on_note
        self._writer: Any = None
        with self._told():
            # What a killed run wrote after its last checkpoint is hidden.
            self._writer = SummaryWriter(str(folder), purge_step=first)  # type: ignore[no-untyped-call]

    @staticmethod
    def installed() -> bool:
        """Whether it can be used."""
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            return False
        return True

    def write(self, records: Sequence[Record]) -> None:
        """One scalar a name; those without a value are left out."""
        for record in records:
            for name, value in record.items():
                if self._writer and name != "iteration" and math.isfinite(value):
                    group = "held out" if name.startswith("val_") else "training"
                    with self._told():
                        self._writer.add_scalar(f"{group}/{name}", value, int(record["iteration"]))

    def close(self) -> None:
        """Write what is left."""
        if self._writer:
            with self._told():
                self._writer.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A full disk ends the events, not the training: metrics.jsonl has all of it."""
        try:
            yield
        except OSError as error:
            self._writer = None
            self.on_note(f"warning: TensorBoard gets no more events: {error.strerror or error}")
