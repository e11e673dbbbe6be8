"""Fine-tuning and linear evaluation from settings to results: the network that is best on validation."""

from __future__ import annotations

import copy
import math
import time
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
from coverfast.training.config import travelling
from coverfast.training.estimate import duration
from coverfast.training.rehearsal import Rehearsal
from coverfast.training.runs import Run
from coverfast.training.telemetry import Record
from coverfast.training.trainer import Training


@dataclass
class Finetuning(Training):
    """A run of fine-tuning or linear evaluation that is ready to start or to go on; `plan` or `resume` make one."""

    settings: FinetuneSettings
    best: float | None = None
    init_sha256: str = ""
    init_report: str = ""

    @property
    def labelled(self) -> bool:  # type: ignore[override]
        """Whether batches carry label maps."""
        return self.settings.task == "segmentation"

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

    def facts(self) -> dict[str, str]:
        """See `Training`."""
        found = {"init_sha256": self.init_sha256, "init_report": self.init_report}
        return found if self.init_sha256 else {}

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

    def _rehearse(self) -> Rehearsal:
        """See `Training`; a case is validated too, for its time."""
        found, s = super()._rehearse(), self.settings
        if self.val and not self.engine.sharded:
            begun = time.perf_counter()
            Validation.of(_network(self.engine.result), self.val, limit=1, device=self.engine.device)
            count, each = self._held_out()["samples"], time.perf_counter() - begun
            seconds = each * math.ceil(count / self.world.size)
            times = (s.iterations - self.first) // s.val_every + 1
            self._note(
                f"a validation of {count} case(s) takes about {duration(seconds)}, every {s.val_every} iterations; "
                f"{times:,} of them about {duration(times * seconds)}"
            )
        return found

    def _validate(self, iteration: int) -> Record:
        e, s, world = self.engine, self.settings, self.world
        assert self.val is not None
        about: dict[str, Any] = {"limit": s.val_samples, "device": e.device, "skip": s.on_bad_sample == "skip"}
        found: Validation
        if e.sharded:  # whole on the first process alone, which judges it alone
            whole = self._whole()
            found = world.same(Validation.of(_network(whole), self.val, **about) if whole else None)
        else:
            share: dict[str, Any] = {"rank": world.rank, "size": world.size, "total": world.sum}
            found = Validation.of(_network(e.result), self.val, **about, **share)
        for reason in found.bad:
            self._skipped(reason)
        self._keep(found, iteration)
        return found.figures

    def _keep(self, found: Validation, iteration: int) -> None:
        """Keep the network if none before was as good on these cases; the first of equals stays."""
        assert self.run is not None
        if self.best is None:
            self.best = self.world.same(self._score_before(self.run))
        # Never for NaN. What could not be written has not set the mark.
        if found.score > self.best and self.world.same(self._write_network(self.run, iteration, found)):
            self.best = found.score

    def _score_before(self, run: Run) -> float:
        """Score of the network that is kept; below all others where there is none, or one judged on other cases."""
        if not (self.world.writes and run.network.exists()):
            return -math.inf
        try:
            about = network_about(run.network)
        except InputError:
            return -math.inf
        if about.get("held_out") != self._held_out():
            self._note("the held-out cases are others than before: the best network is looked for anew")
            return -math.inf
        score = about.get("score")
        return -math.inf if score is None else float(score)

    def _held_out(self) -> dict[str, Any]:
        """Which cases decide."""
        val = self.val
        count = min(self.settings.val_samples, len(val)) if val else 0
        return {"content": val.content_hash if val else "", "split": val.split if val else "", "samples": count}

    def _write_network(self, run: Run, iteration: int, found: Validation | None = None) -> bool:
        """Write the network and say whether that went well; called in all processes."""
        whole = self._whole()
        if whole is None:
            return True
        network, s = _network(whole), self.settings
        about: dict[str, Any] = {"settings": travelling(s), "iteration": iteration, "held_out": self._held_out()}
        about |= {"init_sha256": self.init_sha256 or self.origin.get("init_sha256", "")}
        if found:
            known = {name: value for name, value in found.figures.items() if math.isfinite(value)}
            about |= {"figures": known, "score": found.score}
        try:
            write_atomically(run.network, network_bytes(network, about))
        except InputError as error:
            if iteration >= s.iterations:
                raise
            self._note(f"warning: {error}; training goes on, the network of iteration {iteration} is not kept")
            return False
        return True

    def _save_result(self, run: Run) -> None:
        if self.val is None or self.world.same(not run.network.exists()):
            self._write_network(run, self.settings.iterations)

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


def _network(method: nn.Module) -> Network:
    assert isinstance(method, Task)
    return method.network
