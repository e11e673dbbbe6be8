"""Progress of a training run on the terminal, with rich, which typer brings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

Record = dict[str, float]

#: Seconds between lines where there is no terminal to draw a bar on.
_SECONDS = 15.0
_SMOOTH = 0.9


#: Figures that are shown where a training has them: name, and how it reads.
_FIGURES = (
    ("loss", "loss {:.3f}"),
    ("loss_vec", "L_vec {:.3f}"),
    ("loss_con", "L_con {:.3f}"),
    ("loss_dice", "Dice {:.3f}"),
    ("loss_ce", "CE {:.3f}"),
    ("accuracy", "right {:.1%}"),
    ("epe", "epe {:.2f} px"),
    ("epe_ratio", "ratio {:.3f}"),
    ("ncc", "NCC {:.3f}"),
    ("ncc_before", "from {:.3f}"),
    ("val_epe", "held out {:.2f} px"),
    ("val_ncc", "held out NCC {:.3f}"),
    ("val_ncc_before", "from {:.3f}"),
    ("val_dsc", "held out DSC {:.3f}"),
    ("val_auc", "held out AUC {:.3f}"),
)


def _text(record: Record) -> str:
    parts = [text.format(record[name]) for name, text in _FIGURES if name in record]
    if record.get("data_wait", 0) >= 0.02:
        parts.append(f"waiting {record['data_wait']:.0%}")
    if record.get("skipped"):
        parts.append(f"skipped {record['skipped']}")
    return "  ".join(parts)


class _TwoLines(Progress):
    """The bar, and below it the figures: both fit a terminal of 80 columns."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.figures, no_wrap=True, overflow="ellipsis")


@dataclass
class Shown:
    """Where a training's figures and notes go."""

    show: Callable[[list[Record]], None]
    note: Callable[[str], None]


@contextmanager
def training_progress(first: int, iterations: int) -> Iterator[Shown]:
    """Give what shows records and notes: a bar on a terminal with notes above it, a line now and then elsewhere.

    Shows the loss and, where a training has them, its known parts, end-point error and ratio or NCC (running means) and
    the last of these on held-out samples; the share of time spent waiting for data, iterations a second and the time
    left.
    """
    console = Console()
    mean: Record = {}
    started: float | None = None
    skipped = 0

    def smooth(records: list[Record]) -> Record:
        nonlocal skipped
        for record in records:
            skipped += int(record.get("skipped", 0))
            for name, value in record.items():
                if not math.isfinite(value):  # no pixel in both views: no ratio; or a step that was skipped
                    continue
                # Held-out figures come seldom and on the same views: the last is shown as it is.
                old = value if name.startswith("val_") else mean.get(name, value)
                mean[name] = _SMOOTH * old + (1 - _SMOOTH) * value
        return mean | {"skipped": skipped}

    def rate(done: int) -> float:
        nonlocal started
        now = time.monotonic()
        if started is None:  # what comes before the first step is no part of the rate
            started = now - mean.get("seconds", 0.0) * (done - first + 1)
        return (done - first + 1) / max(now - started, 1e-9)

    if not console.is_terminal:
        printed = -math.inf

        def print_line(records: list[Record]) -> None:
            nonlocal printed
            done, shown, now = int(records[-1]["iteration"]), smooth(records), time.monotonic()
            speed = rate(done)
            if now - printed >= _SECONDS or done == iterations:
                printed = now
                left = (iterations - done) / speed
                print(f"{done}/{iterations}  {_text(shown)}  {speed:.2f} it/s  {left:.0f} s left", flush=True)

        yield Shown(print_line, lambda text: print(text, flush=True))
        return

    columns = [
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.2f} it/s"),
        TimeRemainingColumn(elapsed_when_finished=True),
    ]
    with _TwoLines(*columns, console=console, expand=True) as bar:
        task = bar.add_task("", total=iterations, completed=first - 1, rate=0.0)

        def draw(records: list[Record]) -> None:
            done = int(records[-1]["iteration"])
            bar.figures = _text(smooth(records))
            bar.update(task, completed=done, rate=rate(done))

        yield Shown(draw, lambda text: bar.console.print(text, highlight=False, markup=False))


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Give a function that says how far a long measurement is: on a terminal a line that goes, elsewhere nothing."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(what) as status:
        yield lambda text: status.update(f"{what}: {text}")
