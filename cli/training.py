"""A training run on the terminal, whatever it trains."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from coverfast.cli.progress import training_progress

if TYPE_CHECKING:
    from coverfast.training.trainer import Training


def run_training(ready: Training, command: str) -> None:
    """Train with progress on the terminal and say where everything lies. command: that resumes it."""
    s = ready.settings
    if not ready.world.writes:
        ready.start()
        return
    for note in ready.notes:
        print(note)
    told = len(ready.notes)
    where = (
        f"{ready.world.size} processes on {ready.engine.device.type}" if ready.world.size > 1 else ready.engine.device
    )
    print(
        f"{s.label}: iterations {ready.first} to {s.iterations}, batch {s.batch}, crop {'x'.join(map(str, s.crop))}, "
        f"{len(ready.shards)} sample(s) of {_first_of(ready.shards.paths)} (split {ready.shards.split}), "
        f"{len(ready.val) if ready.val else 0} held out, {ready.engine.choices.precision} on {where}"
    )
    started = time.monotonic()
    try:
        with training_progress(ready.first, s.iterations) as progress:
            ready.on_note = progress.note
            run = ready.start(on_step=progress.show)
    except (KeyboardInterrupt, SystemExit):
        if ready.run and ready.run.checkpoints.paths():
            print(f"stopped; continue with: coverfast {command} --resume --run {shlex.quote(str(ready.run.folder))}")
        raise
    for note in ready.notes[told:]:
        print(note)
    print(f"done in {time.monotonic() - started:.0f} s: {run.folder}")
    everything = [
        *ready.results(run),
        (run.metrics, "figures of every iteration"),
        (run.config, "settings, versions, commit, data hash"),
    ]
    for path, what in everything:
        if path.exists():
            print(f"  {path}  {what}")


def _first_of(paths: list[Path]) -> str:
    return str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
