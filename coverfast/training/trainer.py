"""A training run from settings to results: whatever is trained, and whatever happens on the way."""

from __future__ import annotations

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coverfast.backbone_names import code_sha256
from coverfast.backbones import load_state
from coverfast.checks import InputError
from coverfast.loader import ImageStream, load_batches, lost_reader, reading_processes, to_device
from coverfast.methods import Batch
from coverfast.shard_set import ShardSet
from coverfast.training.config import as_plain
from coverfast.training.data import batches
from coverfast.training.engine import Engine
from coverfast.training.guards import Saver, SkipGuard
from coverfast.training.loop import Hooks, train
from coverfast.training.rehearsal import Rehearsal, forecast, rehearse
from coverfast.training.runs import Run, provenance
from coverfast.training.settings import TrainingSettings
from coverfast.training.signals import StopSignals, end_by
from coverfast.training.telemetry import Record, Telemetry, TensorBoard, Work
from coverfast.training.world import StopVote, World


@dataclass
class Training(ABC):
    """A run that is ready to start or to go on. What is trained is a subclass's to say.

    Attributes:
        labelled: whether batches carry labels.
        results: files of the run folder for people, with what they are.
    """

    settings: TrainingSettings
    run: Run | None
    shards: ShardSet
    val: ShardSet | None
    engine: Engine
    first: int
    notes: list[str]
    world: World = field(default_factory=World)
    origin: dict[str, Any] = field(default_factory=dict)
    bad: dict[str, None] = field(default_factory=dict)
    on_note: Callable[[str], None] = print

    labelled = False

    # --- what a subclass says ---

    @abstractmethod
    def _blank(self) -> nn.Module:
        """The method before training, on the CPU."""

    @abstractmethod
    def _flops(self) -> float:
        """Floating point operations of a training step of all processes."""

    @abstractmethod
    def _validate(self, iteration: int) -> Record:
        """Figures on held-out data."""

    @abstractmethod
    def _save_result(self, run: Run) -> None:
        """Write what the run was for; called in all processes."""

    @abstractmethod
    def _draw(self, iteration: int) -> None:
        """Make pictures of the run; called in all processes."""

    @abstractmethod
    def results(self, run: Run) -> list[tuple[Path, str]]:
        """Files for people, with what they are."""

    def facts(self) -> dict[str, str]:
        """What else the weights at the start depend on, for the provenance of the run."""
        return {}

    def finished(self, run: Run) -> bool:
        """Whether the run has what it was for."""
        return self.results(run)[0][0].exists()

    # --- the run ---

    def start(self, on_step: Callable[[list[Record]], None] = lambda records: None) -> Run:
        """Train to the end, write the result and, with matplotlib, `report/`; return the run.

        `on_step` gets records as they come, some iterations late: `iteration`, the method's figures, gradient norm,
        rates; on some iterations also what the monitor saw and, `val_` before their names, figures on held-out data.

        A signal that asks to stop (SIGINT, SIGTERM) leaves a checkpoint and raises what it means to Python.
        """
        s = self.settings
        with ExitStack() as stack, _determinism(s), _explained(s, self.engine.device):
            rehearsed = self._rehearse() if self.first <= s.iterations else None
            run = self._open(stack)
            if rehearsed:
                with StopSignals() as signals:
                    stopped = self._train(run, signals, rehearsed, on_step)
                if stopped:
                    self._note(f"signal {stopped}: stopped after a checkpoint")
                    end_by(stopped)
            if self.bad:
                self.notes.append(f"{len(self.bad)} sample(s) could not be read and were skipped, named above")
            self._save_result(run)
            if s.report:
                self._draw(s.iterations)
        return run

    def _rehearse(self) -> Rehearsal:
        s = self.settings
        if s.compile:
            self._note("compiling a step, which takes a minute or more ...")
        try:
            flops = self._flops()
        except Exception:  # what code of a user's own may raise that cannot do without values
            if not self.engine.foreign:
                raise
            flops = math.nan
        found = rehearse(self.engine, self._batch(self.first), flops)
        folder = self.run.folder if self.run else Path(s.run or "runs")
        for note in forecast(found, self.engine, self.first, folder):
            self._note(note)
        return found

    def _open(self, stack: ExitStack) -> Run:
        """The run folder, made or taken up, and this process's alone until the stack is left."""
        s, e = self.settings, self.engine
        facts = {"device": str(e.device), "processes": self.world.size}
        facts |= {"precision": e.choices.precision, "layout": e.choices.layout}
        facts |= {"kind": s.kind, **self.facts()}
        for name, code in (("code_sha256", s.backbone), ("method_code_sha256", getattr(s, "method", ""))):
            if digest := code_sha256(code):
                facts[name] = digest
        if self.world.writes:
            now = provenance(self.shards.content_hash) | facts
            if self.run is None:
                self.run = Run.create(s, now)
                stack.enter_context(self.run.locked())
            else:
                stack.enter_context(self.run.locked())
                self.run.clean(self.first - 1)
                self.run.write_config(s, {"provenance": self.origin, "resumed": now})
        self.run = Run(Path(self.world.same(str(self.run.folder) if self.run else "")))
        return self.run

    def _train(self, run: Run, signals: StopSignals, found: Rehearsal, on_step: Callable[[list[Record]], None]) -> int:
        s, e, world = self.settings, self.engine, self.world
        workers = reading_processes(e.device) if s.workers < 0 else s.workers
        stream = self._stream(self.shards, s.seed)
        loaded = load_batches(stream, first=self.first, last=s.iterations, workers=workers, device=e.device)
        guard = SkipGuard(
            run.folder / "skipped", s.skip_limit, world, self._stream(self.shards, s.seed, World()), self._note
        )
        board = self._tensorboard(run)
        stack = ExitStack()
        if board:
            stack.callback(board.close)
        unwritten: list[Record] = []

        def deliver(records: list[Record]) -> None:
            if world.writes:
                self._write_metrics(run, unwritten, records)
                if board:
                    board.write(records)
                on_step(records)
            guard.check(records, run.checkpoints)

        work = Work(s.batch, found.flops, found.rate)
        telemetry = Telemetry(self.engine.method, world, work, every=s.log_every, deliver=deliver)
        saver = Saver(run.checkpoints, s, world, self._state, self._note)
        vote = StopVote(world)
        hooks = Hooks(
            validate=self._validate if self.val else None,
            save=saver,
            due=saver.due,
            draw=self._draw,
            stop=lambda: vote(signals.received),
        )
        with stack:
            data = _until_stopped(batches(loaded, s.seed, self._skipped), signals, world)
            stopped = train(e, data, telemetry, hooks)
            vote.close()
        if unwritten:
            self._note(f"warning: {len(unwritten)} lines of {run.metrics} could not be written")
        return stopped

    def _state(self) -> dict[str, Any]:
        shards = self.shards
        about = {"ndim": shards.ndim, "channels": shards.channels, "preprocessing": shards.preprocessing}
        said = {"kind": self.settings.kind, "settings": as_plain(self.settings), "data": about}
        return self.engine.state() | said

    def _write_metrics(self, run: Run, unwritten: list[Record], records: list[Record]) -> None:
        """Append to metrics.jsonl; what a full disk refuses is kept and tried again with the next lines."""
        told = bool(unwritten)
        unwritten += records
        try:
            run.append_metrics(unwritten)
            unwritten.clear()
        except InputError as error:
            if not told:
                self._note(f"warning: {error}; training goes on, its figures are written once there is space")

    def _tensorboard(self, run: Run) -> TensorBoard | None:
        wanted = self.settings.tensorboard and self.world.writes and TensorBoard.installed()
        return TensorBoard(run.folder / "tensorboard", self.first, self._note) if wanted else None

    # --- data ---

    def _stream(self, shards: ShardSet, seed: int, world: World | None = None) -> ImageStream:
        s, world = self.settings, world or self.world
        return ImageStream(
            shards,
            batch=s.batch,
            seed=seed,
            regions=self.engine.method.regions,
            crops=s.crops,
            foreground=s.foreground,
            on_bad_sample=s.on_bad_sample,
            rank=world.rank,
            world=world.size,
            labels=self.labelled,
            pairs=self.engine.method.pairs,
        )

    def _batch(self, iteration: int) -> Batch:
        """What an iteration sees, read in this process."""
        loaded = self._stream(self.shards, self.settings.seed).load(iteration)
        return next(batches([to_device(loaded, self.engine.device)], self.settings.seed, self._skipped))

    def _skipped(self, reason: str) -> None:
        """Tell once of every sample that was replaced."""
        if reason not in self.bad:
            self.bad[reason] = None
            self.on_note(f"skipped: {reason}")

    def _note(self, text: str) -> None:
        if self.world.writes:
            self.on_note(text)

    def _whole(self) -> nn.Module | None:
        """The result on the device, whole; None where another process has it, or this one a part of it alone."""
        if not self.engine.sharded:
            return self.engine.result if self.world.writes else None
        weights = self.engine.weights()
        if not self.world.writes:
            return None
        method = self._blank()
        load_state(method, weights, "the trained network")
        return method.to(self.engine.device)


def _until_stopped(data: Iterator[Batch], signals: StopSignals, world: World) -> Iterator[Batch]:
    """The batches; a signal to a whole group of processes may end those who read before the training is done."""
    try:
        yield from data
    except InputError:
        time.sleep(0.5)  # it may be on its way to this process
        if not signals.received or world.size > 1:
            raise


@contextmanager
def _determinism(s: TrainingSettings) -> Iterator[None]:
    """The same bits on a GPU every time, when asked for; otherwise cuDNN may choose its fastest convolutions."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    memory: Any = torch.utils.deterministic
    filling = memory.fill_uninitialized_memory
    torch.backends.cudnn.benchmark = not s.deterministic
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        memory.fill_uninitialized_memory = filling


@contextmanager
def _explained(s: TrainingSettings, device: torch.device) -> Iterator[None]:
    """Too little memory and lost reading processes, in a sentence."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise InputError(
                f"a batch of {s.batch} crops of {s.crop} does not fit into the memory of {device}; "
                f"use --recompute, {s.smaller}a smaller --batch or a smaller --crop"
            ) from None
        if lost := lost_reader(error):
            raise lost from error
        raise
