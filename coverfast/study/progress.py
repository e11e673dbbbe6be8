"""How far a study is: which of its runs, which iteration, and how long the rest may take."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Work(NamedTuple):
    """A run to come: name, kind (an iteration takes the same time in all runs of a kind) and iterations."""

    name: str
    kind: str
    iterations: int


class Moment(NamedTuple):
    """Where a study stands.

    number: of the run, from 1, of `total`. iteration: of `iterations` in it. share: of all iterations that are done.
    left: seconds for the rest, None before anything is known. figures: of the iteration.
    """

    name: str
    number: int
    total: int
    iteration: int
    iterations: int
    share: float
    left: float | None
    figures: Mapping[str, Any]


@dataclass
class Watch:
    """Counts what is done of a study and tells of it."""

    works: Sequence[Work]
    tell: Callable[[Moment], None] = lambda moment: None
    note: Callable[[str], None] = print
    clock: Callable[[], float] = time.monotonic
    _done: dict[str, int] = field(default_factory=dict)
    _spent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _made: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    _since: float = 0.0

    def begin(self, name: str) -> None:
        """A run starts or goes on; what it takes from here on counts as its time."""
        self._since = self.clock()
        self._done.setdefault(name, 0)

    def passed(self, name: str) -> None:
        """A run that was done before."""
        self._done[name] = self._work(name).iterations

    def step(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Some iterations of a run are done; the last record says which."""
        work, now = self._work(name), self.clock()
        iteration = int(records[-1]["iteration"])
        self._made[work.kind] += len(records)
        self._spent[work.kind] += now - self._since
        self._since, self._done[name] = now, iteration
        self._tell(work, iteration, records[-1])

    def end(self, name: str) -> None:
        """A run is done and evaluated."""
        work = self._work(name)
        self._spent[work.kind] += self.clock() - self._since
        self._done[name] = work.iterations
        self._tell(work, work.iterations, {})

    @property
    def left(self) -> float | None:
        """Seconds that the iterations to come take at the pace of their kind, or of all where it is not known yet."""
        whole = sum(self._made.values())
        if not whole:
            return None
        usual = sum(self._spent.values()) / whole
        pace = {kind: self._spent[kind] / made for kind, made in self._made.items()}
        return sum((w.iterations - self._done.get(w.name, 0)) * pace.get(w.kind, usual) for w in self.works)

    def _work(self, name: str) -> Work:
        return next(work for work in self.works if work.name == name)

    def _tell(self, work: Work, iteration: int, figures: Mapping[str, Any]) -> None:
        number = self.works.index(work) + 1
        share = sum(self._done.values()) / sum(w.iterations for w in self.works)
        moment = Moment(work.name, number, len(self.works), iteration, work.iterations, share, self.left, dict(figures))
        self.tell(moment)
