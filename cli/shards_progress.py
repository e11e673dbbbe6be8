"""Progress of work on shards, and how many samples, in words."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Seconds between lines where there is no terminal to draw a bar on.
_SECONDS = 15.0


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar a stage on a terminal; elsewhere, a line now and then."""
    if not sys.stderr.isatty():
        printed = time.monotonic()

        def say(stage: str, done: int, total: int) -> None:
            nonlocal printed
            if time.monotonic() - printed >= _SECONDS:
                printed = time.monotonic()
                print(f"{stage} {done}/{total}", file=sys.stderr, flush=True)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        tasks = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield advance


def samples(count: int) -> str:
    """`1 sample`, `2 samples`."""
    return f"{count} sample" + "s" * (count != 1)
