"""A bar over cases or images that take long each, on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from coverfast.checks import printable


@contextmanager
def counting(what: str, total: int) -> Iterator[tuple[Callable[[str], None], Callable[[float], None]]]:
    """Give what prints a line and what says how many of `total` are done, a part of one included.

    A bar on a terminal, elsewhere nothing.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    def tell(text: str) -> None:
        print(printable(text), flush=True)

    console = Console(stderr=True)
    if not console.is_terminal:
        yield tell, lambda done: None
        return
    columns = [
        TextColumn(what),
        BarColumn(),
        TextColumn("{task.fields[whole]}/{task.total:.0f}"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(what, total=total, whole=0)
        yield tell, lambda done: bar.update(task, completed=done, whole=int(done))
