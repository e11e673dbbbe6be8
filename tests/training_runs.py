"""Small runs for the tests of training, and real processes that start in milliseconds."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from coverfast.backbones import read_backbone
from coverfast.phantom import phantom
from coverfast.shards import Sample, ShardWriter
from coverfast.training import plan as library
from coverfast.training.runs import Run

TINY = {
    "channels": (8, 8, 8, 16, 16),
    "groups": (1, 1, 1, 1, 1),
    "batch": 2,
    "crop": (32,),
    "window": (3,),
    "lr": 1e-3,
    "threads": 1,
    "tensorboard": False,
}
FLAGS = ["--channels", "8,8,8,16,16", "--groups", "1,1,1,1,1", "--batch", "2", "--crop", "32", "--window", "3"]
#: What the command needs to give the weights of a run with TINY.
SAME = ["--preset", "small-2d", *FLAGS, "--lr", "1e-3", "--threads", "1", "--no-tensorboard"]


def make_shard(path: Path, ndim: int = 2, count: int = 3, size: int | tuple[int, ...] = 48, seed: int = 0) -> Path:
    """A shard of phantoms."""
    with ShardWriter(path, ndim=ndim, preprocessing={"preset": "phantom"}) as writer:
        for index in range(count):
            image = phantom(ndim, size, seed=seed, index=index).image[None]
            pixels = (255 * image).round().astype(np.uint8)
            writer.add(Sample(pixels, 1.0, 0.0, 0.0, 255.0, (1.0,) * ndim, f"subject-{index}"))
    return path


def ready(shard: Path, run: Path, **flags: object) -> library.Pretraining:
    """A tiny run that can start, which draws nothing."""
    found = library.plan({**TINY, "data": str(shard), "run": str(run), "preset": "small-2d", **flags})
    found.on_note = lambda text: None
    return found


def start(shard: Path, run: Path, **flags: object) -> Run:
    """A tiny run from start to end, without pictures."""
    return without_pictures(ready(shard, run, **flags)).start()


def resume(run: Run | Path, **flags: object) -> library.Pretraining:
    """A run to go on with, without pictures."""
    return without_pictures(library.resume({"run": str(getattr(run, "folder", run)), **flags}))


def without_pictures(found: library.Pretraining) -> library.Pretraining:
    """Drawing takes longer than a tiny run."""
    found._draw = lambda iteration: None  # type: ignore[method-assign]
    return found


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Of the backbone on disk."""
    return read_backbone(run.backbone)[0]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def lines(run: Run) -> list[dict[str, float]]:
    """Of metrics.jsonl."""
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def refused(result: Done, *words: str) -> None:
    """Exit code 2, one sentence on stderr, no traceback."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert all(word in result.stderr for word in words), result.stderr


# --- processes that need not load torch first -----------------------------------------------------------------------

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["coverfast.training.plan", "coverfast.downstream.plan", "coverfast.cli.main"])


class Done(NamedTuple):
    """What a command that has ended leaves."""

    returncode: int
    stdout: str
    stderr: str


def cli(*arguments: str, cwd: Path | None = None, draws: bool = False) -> Done:
    """The command in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = Command(list(arguments), Path(folder) / "log", cwd=cwd, draws=draws)
        return Done(command.wait(), command.output, command.errors)


class Command:
    """`coverfast ARGUMENTS` in a process of its own, forked from one that has loaded torch and done nothing else."""

    def __init__(
        self,
        arguments: list[str],
        out: Path,
        environment: dict[str, str] | None = None,
        before: str = "",
        cwd: Path | None = None,
        draws: bool = False,
    ) -> None:
        self.out, self.err = out.with_suffix(".out"), out.with_suffix(".err")
        what = (arguments, self.out, self.err, environment or {}, before, cwd or Path.cwd(), draws)
        self.process = _FORKSERVER.Process(target=_run, args=what, daemon=False)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def wait(self, seconds: float = 120.0) -> int:
        """Exit code; negative for a signal."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"still runs after {seconds} s: {self.output} {self.errors}")
        return self.process.exitcode

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, if it still runs."""
        if self.process.exitcode is None:
            os.kill(self.pid, number)

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait for something that the process does."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.exitcode is None, f"ended early: {self.output} {self.errors}"
            assert time.monotonic() < deadline, "took too long"
            time.sleep(0.005)

    @property
    def output(self) -> str:
        """What it has printed."""
        return self.out.read_text() if self.out.exists() else ""

    @property
    def errors(self) -> str:
        """What it has printed to stderr."""
        return self.err.read_text() if self.err.exists() else ""


def _run(
    arguments: list[str], out: Path, err: Path, environment: dict[str, str], before: str, cwd: Path, draws: bool
) -> None:
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["coverfast", *arguments]
    from coverfast.cli.main import main
    from coverfast.downstream.finetuning import Finetuning
    from coverfast.training.pretrain import Pretraining

    if not draws:
        for kind in (Pretraining, Finetuning):
            kind._draw = lambda self, iteration: None  # type: ignore[method-assign]
    exec(before, {"os": os})
    main()


def together(count: int, arguments: list[str], out: Path, before: str = "") -> list[Command]:
    """The processes of one run, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [Command(arguments, out.with_name(f"{out.name}-{r['RANK']}"), r, before) for r in ranks]
