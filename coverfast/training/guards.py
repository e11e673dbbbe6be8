"""What keeps a run going when something fails: checkpoints that cannot be written, steps that are not finite."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from coverfast.checks import InputError
from coverfast.disk import explained, write_atomically
from coverfast.loader import ImageStream
from coverfast.training.checkpoints import Checkpoints
from coverfast.training.settings import TrainingSettings
from coverfast.training.world import World

#: Batches of skipped steps that are saved; more would only fill the disk.
_SAVED = 10
_AMONG = 100


class Saver:
    """Saves checkpoints; one that cannot be written is told and tried again, and training goes on."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        settings: TrainingSettings,
        world: World,
        state: Callable[[], Mapping[str, Any]],
        on_note: Callable[[str], None],
    ) -> None:
        self.checkpoints, self.settings, self.world = checkpoints, settings, world
        self.state, self.on_note = state, on_note
        self._retry: int | None = None

    def due(self, iteration: int) -> bool:
        """Whether a checkpoint belongs after this iteration, by the settings or since the last one failed."""
        again = self._retry is not None and iteration >= self._retry
        s = self.settings
        kept = s.keep_every and iteration % s.keep_every == 0
        return bool(again or kept or iteration % s.checkpoint_every == 0)

    def __call__(self, iteration: int, last: bool) -> None:
        """Save the state after an iteration.

        Raises:
            InputError: when the `last` one cannot be written; it names the newest one that could.
        """
        s = self.settings
        state, failure = self.state(), ""  # all processes hold parts of it, one writes
        if self.world.writes:
            try:
                self.checkpoints.save(iteration, state, keep=s.keep_checkpoints, keep_every=s.keep_every)
            except InputError as error:
                failure = str(error)
        failure = self.world.same(failure)
        self._retry = None
        if not failure:
            return
        if last:
            raise InputError(f"{failure}; {newest(self.checkpoints)}")
        wait = max(1, s.checkpoint_every // 10)
        self._retry = iteration + wait
        self.on_note(f"warning: {failure}; training goes on, the next try is in {wait} iteration(s)")


def newest(checkpoints: Checkpoints) -> str:
    """Where a run can be taken up again, for people."""
    paths = checkpoints.paths()
    return f"the last good checkpoint is {paths[-1]}" if paths else "there is no checkpoint yet"


class SkipGuard:
    """Counts the steps that were skipped since loss or gradient were not finite, keeps their batches, sets a limit."""

    def __init__(
        self, folder: Path, limit: int, world: World, stream: ImageStream, on_note: Callable[[str], None]
    ) -> None:
        self.folder, self.limit, self.world, self.stream, self.on_note = folder, limit, world, stream, on_note
        self._recent: deque[int] = deque()

    def check(self, records: Sequence[Mapping[str, float]], checkpoints: Checkpoints) -> None:
        """Look at delivered records; `checkpoints` are where the run can be taken up.

        Raises:
            InputError: in all processes, when more than `limit` of 100 iterations were skipped.
        """
        for record in records:
            iteration = int(record["iteration"])
            while self._recent and self._recent[0] <= iteration - _AMONG:
                self._recent.popleft()
            if not record["skipped"]:
                continue
            self._recent.append(iteration)
            where = self._keep(iteration, record) if self.world.writes else ""
            self.on_note(f"warning: iteration {iteration} was skipped, its loss or gradient is not finite{where}")
            if len(self._recent) > self.limit:
                raise InputError(
                    f"loss and gradient must be finite, but {len(self._recent)} steps among the last {_AMONG} were "
                    f"skipped, the last at iteration {iteration} (see --skip-limit); {newest(checkpoints)}"
                )

    def _keep(self, iteration: int, record: Mapping[str, float]) -> str:
        """Save the whole batch of an iteration, rebuilt from its counters."""
        path = self.folder / f"iteration-{iteration:08d}.pt"
        if len(list(self.folder.glob("*.pt"))) >= _SAVED:
            return ""
        try:
            batch, data = self.stream.load(iteration), self.stream.data
            sources = [f"{data.place(i)[0]}: {data.source(i)}" for i in batch.indices.tolist()]
            content = batch._asdict() | {"sources": sources, "seed": self.stream.seed, "figures": dict(record)}
            memory = io.BytesIO()
            torch.save(content, memory)
            with explained(self.folder):
                self.folder.mkdir(exist_ok=True)
            write_atomically(path, memory.getvalue())
        except InputError as error:
            return f"; its batch could not be saved: {error}"
        return f"; its batch is in {path}"
