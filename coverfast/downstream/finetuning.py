"""Fine-tuning and linear evaluation from settings to results: the network that is best on validation."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from coverfast.checks import InputError
from coverfast.disk import write_atomically
from coverfast.downstream.assembly import build_task
from coverfast.downstream.network import Network, network_about, network_bytes
from coverfast.downstream.settings import FinetuneSettings
from coverfast.downstream.tasks import Task
from coverfast.downstream.validation import Validation
from coverfast.training.config import as_plain
from coverfast.training.runs import Run
from coverfast.training.telemetry import Record
from coverfast.training.trainer import Training

#: The figure of a validation that decides which network is kept.
SCORES = {"segmentation": "dsc", "classification": "auc"}


@dataclass
class Finetuning(Training):
    """A run of fine-tuning or linear evaluation that is ready to start or to go on; `plan` or `resume` make one."""

    settings: FinetuneSettings
    best: float | None = None

    labelled = True

    @property
    def task(self) -> Task:
        """What is trained."""
        found = self.engine.method
        assert isinstance(found, Task)
        return found

    def results(self, run: Run) -> list[tuple[Path, str]]:
        """See `Training`."""
        best = "best on validation" if self.val else "as training left it"
        return [
            (run.network, f"the network, {best}; coverfast evaluate and predict read it"),
            (run.report / "index.html", "curves and predictions, to look at"),
        ]

    def finished(self, run: Run) -> bool:
        """See `Training`: without validation the network comes last, with it the report does."""
        return run.network.exists()

    def _blank(self) -> Task:
        return build_task(self.settings, self.shards)

    def _flops(self) -> float:
        """Counted on tensors without values."""
        task = self._blank()
        blank: dict[int, Any] = {id(b): torch.empty_like(b, device="meta") for b in task.buffers()}
        for p in task.parameters():
            blank[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        network = copy.deepcopy(task.network, blank)
        images = torch.empty(self.settings.batch, network.in_channels, *network.crop, device="meta")
        with FlopCounterMode(display=False) as counter:
            network(images).sum().backward()
        return float(counter.get_total_flops())

    # --- validation ---

    def _validate(self, iteration: int) -> Record:
        e, s, world = self.engine, self.settings, self.world
        assert self.val is not None
        about: dict[str, Any] = {"limit": s.val_samples, "device": e.device}
        found: Validation
        if e.sharded:  # whole on the first process alone, which judges it alone
            whole = self._whole()
            found = world.same(Validation.of(_network(whole), self.val, **about) if whole else None)
        else:
            share: dict[str, Any] = {"rank": world.rank, "size": world.size, "total": world.sum}
            found = Validation.of(_network(e.result), self.val, **about, **share)
        self._keep(found.score, found.figures, iteration)
        return found.figures

    def _keep(self, score: float, figures: Record, iteration: int) -> None:
        """Keep the network if none before was as good; the first of equals stays."""
        assert self.run is not None
        if self.best is None:
            self.best = self.world.same(_score(self.run.network))
        if score > self.best:  # never for NaN
            self._write_network(self.run, iteration, figures)
            self.best = score

    def _write_network(self, run: Run, iteration: int, figures: Record) -> None:
        whole = self._whole()
        if whole is None:
            return
        network = _network(whole)
        known = {name: value for name, value in figures.items() if math.isfinite(value)}
        score = known.get(SCORES[network.task])
        about = {"settings": as_plain(self.settings), "iteration": iteration, "figures": known, "score": score}
        try:
            write_atomically(run.network, network_bytes(network, about))
        except InputError as error:
            if iteration >= self.settings.iterations:
                raise
            self._note(f"warning: {error}; training goes on, the network of iteration {iteration} is not kept")

    def _save_result(self, run: Run) -> None:
        if self.world.same(not run.network.exists()):
            self._write_network(run, self.settings.iterations, {})

    # --- pictures ---

    def _draw(self, iteration: int) -> None:
        assert self.run is not None
        whole = self._whole()
        if whole is None:
            return
        about = {"run": self.run.folder, "iteration": f"{iteration} of {self.settings.iterations}"}
        try:
            from coverfast.downstream.pages import write_run_page

            write_run_page(self.run, _network(whole), self.val or self.shards, about, held_out=self.val is not None)
        except InputError as error:
            self._note(f"no pictures: {error}")


def _score(path: Path) -> float:
    """Score of a network that was kept before; below all others where there is none."""
    try:
        return float(network_about(path)["score"])
    except (InputError, KeyError, TypeError, ValueError):
        return -math.inf


def _network(method: nn.Module) -> Network:
    assert isinstance(method, Task)
    return method.network
