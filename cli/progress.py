"""Progress of a training run on the terminal, with rich, which typer brings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

Record = dict[str, float]

#: Seconds between lines where there is no terminal to draw a bar on.
_SECONDS = 15.0
_SMOOTH = 0.9


def _text(record: Record) -> str:
    parts = [f"loss {record['loss']:.3f}", f"L_vec {record['loss_vec']:.3f}", f"L_con {record['loss_con']:.3f}"]
    parts += [f"epe {record['epe']:.2f} px", f"ratio {record.get('epe_ratio', math.nan):.3f}"]
    if "val_epe" in record:
        parts.append(f"held out {record['val_epe']:.2f} px")
    return "  ".join(parts)


class _TwoLines(Progress):
    """The bar, and below it the figures: both fit a terminal of 80 columns."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.figures, no_wrap=True, overflow="ellipsis")


@contextmanager
def training_progress(first: int, iterations: int) -> Iterator[Callable[[Record], None]]:
    """Give a function that shows a record: a bar on a terminal, a line now and then elsewhere.

    Shows loss, its parts, end-point error and ratio (running means), the last held-out error, iterations a second and
    the time left.
    """
    console = Console()
    mean: Record = {}
    started = time.monotonic()

    def smooth(record: Record) -> Record:
        for name, value in record.items():
            if math.isnan(value):  # no pixel in both views: no ratio
                continue
            # Held-out figures come seldom and on the same views: the last is shown as it is.
            old = value if name.startswith("val_") else mean.get(name, value)
            mean[name] = _SMOOTH * old + (1 - _SMOOTH) * value
        return mean

    def rate(done: int) -> float:
        return (done - first + 1) / max(time.monotonic() - started, 1e-9)

    if not console.is_terminal:
        printed = -math.inf

        def print_line(record: Record) -> None:
            nonlocal printed
            done, shown, now = int(record["iteration"]), smooth(record), time.monotonic()
            if now - printed >= _SECONDS or done == iterations:
                printed = now
                left = (iterations - done) / rate(done)
                print(f"{done}/{iterations}  {_text(shown)}  {rate(done):.2f} it/s  {left:.0f} s left", flush=True)

        yield print_line
        return

    columns = [
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.2f} it/s"),
        TimeRemainingColumn(elapsed_when_finished=True),
    ]
    with _TwoLines(*columns, console=console, expand=True) as bar:
        task = bar.add_task("", total=iterations, completed=first - 1, rate=0.0)

        def draw(record: Record) -> None:
            done = int(record["iteration"])
            bar.figures = _text(smooth(record))
            bar.update(task, completed=done, rate=rate(done))

        yield draw


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Give a function that says how far a long measurement is: on a terminal a line that goes, elsewhere nothing."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(what) as status:
        yield lambda text: status.update(f"{what}: {text}")
