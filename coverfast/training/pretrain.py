"""Pretraining from settings to results: train, leave checkpoints, a backbone and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from coverfast.backbones import Backbone, load_state
from coverfast.backbones.files import backbone_bytes
from coverfast.checks import InputError
from coverfast.disk import write_atomically
from coverfast.methods import Batch, Pretext
from coverfast.own_code import refusing
from coverfast.training.assembly import build_method
from coverfast.training.config import travelling
from coverfast.training.data import held_out
from coverfast.training.estimate import step_flops
from coverfast.training.runs import Run
from coverfast.training.settings import Settings
from coverfast.training.telemetry import Record
from coverfast.training.trainer import Training
from coverfast.training.world import World

#: Separates the views of validation from those of training.
_VALIDATION_KEY = 0x5A17


@dataclass
class Pretraining(Training):
    """A pretraining run, of whatever method, that is ready to start or to go on; `plan` or `resume` make one."""

    settings: Settings
    started_from: dict[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, str]:
        """See `Training`."""
        return self.started_from

    @property
    def method(self) -> Pretext:
        """What is trained."""
        found = self.engine.method
        assert isinstance(found, Pretext)
        return found

    def _blank(self) -> Pretext:
        return build_method(self.settings, self.shards.ndim, self.shards.channels)

    def _flops(self) -> float:
        return step_flops(self._blank(), self.settings.batch)

    def results(self, run: Run) -> list[tuple[Path, str]]:
        """See `Training`."""
        return [
            (run.backbone, "the trained backbone, coverfast.load_backbone() reads it"),
            (run.report / "index.html", "pictures and curves, to look at"),
        ]

    def _held_out(self, limit: int, *, shared: bool = False) -> Iterator[Batch]:
        """Held-out batches of the size that passes in training, all or this process's share of them."""
        s, world = self.settings, self.world
        stream = self._stream(self.val or self.shards, s.seed ^ (_VALIDATION_KEY << 32), World())
        stream.batch = max(1, s.batch // (s.accumulate * world.size))
        rank, size = (world.rank, world.size) if shared else (0, 1)
        return held_out(stream, limit=limit, device=self.engine.device, on_bad=self._skipped, rank=rank, world=size)

    def _validate(self, iteration: int) -> Record:
        """Figures over all held-out pixels, which the processes share."""
        e = self.engine
        names, shared = e.names[:-2], not e.sharded
        totals = torch.zeros(len(names), dtype=torch.float64, device=e.device)
        for batch in self._held_out(self.settings.val_samples, shared=shared):
            totals += torch.stack(list(e.evaluate(batch).values()))
        if shared:
            self.world.sum(totals)
        return self.method.figures(dict(zip(names, totals.tolist(), strict=True)))

    def _save_result(self, run: Run) -> None:
        weights = self.engine.weights()
        if self.world.writes:
            whole = self._blank()
            load_state(whole, weights, "the trained network")
            backbone = whole.backbone
            assert isinstance(backbone, Backbone)
            about = self.shards.preprocessing
            content = backbone_bytes(backbone, config=travelling(self.settings), preprocessing=about)
            write_atomically(run.backbone, content)

    def _draw(self, iteration: int) -> None:
        """Pictures of the run, from fixed views of the first (held-out) sample; what stands in their way is told."""
        assert self.run is not None
        method = self._whole()
        if method is None:
            return
        assert isinstance(method, Pretext)
        method.eval()
        try:
            from coverfast.report import load_metrics, on_host, write_report
            from coverfast.report.sheet import need_matplotlib

            need_matplotlib()
            batch = next(self._held_out(1))
            # Whatever an own method does wrong here, the training is worth more than its pictures.
            with refusing("they must be what the method makes"), torch.no_grad(), self.engine.autocast():
                seen = on_host(method.pictures(batch))
            about = {
                "run": self.run.folder,
                "method": self.settings.method,
                "preset": self.settings.preset,
                "iteration": f"{iteration} of {self.settings.iterations}",
                "shown": f"{(self.val or self.shards).source(0)}, " + ("held out" if self.val else "learned from"),
            }
            title = f"Pretraining {self.run.folder.name}"
            write_report(self.run.report, seen, load_metrics(self.run.metrics), title=title, about=about)
        except InputError as error:
            self._note(f"no pictures: {error}")
        finally:
            method.train()
