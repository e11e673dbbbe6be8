"""Figures on their way from the device to the files and the terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from test_engine import Line
from training_runs import lines, make_shard, ready, resume, without_pictures

from coverfast.cli.progress import training_progress
from coverfast.training.telemetry import Spent, Telemetry, TensorBoard, Work, _Flight
from coverfast.training.world import World

NAMES = ("loss", "count", "grad_norm", "skipped")


def row(loss: float, count: float = 2.0, norm: float = 1.0, skipped: float = 0.0) -> torch.Tensor:
    return torch.tensor([loss, count, norm, skipped], dtype=torch.float64)


def test_records_come_in_order_with_means_of_their_window() -> None:
    found: list[list[dict[str, float]]] = []
    telemetry = Telemetry(Line(), World(), Work(8, flops=4e9, rate=1e10), every=3, deliver=found.append)
    for i, (waiting, total) in enumerate([(0.1, 0.5), (0.2, 0.5), (0.3, 2.0), (0.0, 1.0)], 1):
        telemetry.add(i, NAMES, row(10.0 * i), Spent(waiting, total), extra={"lr": i / 10})
    assert [[r["iteration"] for r in records] for records in found] == [[1, 2, 3]]
    telemetry.drain(NAMES)
    assert [[r["iteration"] for r in records] for records in found] == [[1, 2, 3], [4]]
    (first, second, _), (last,) = found
    assert [r["loss"] for r in (first, second, last)] == [5, 10, 20]
    assert [r["lr"] for r in (first, second, last)] == [0.1, 0.2, 0.4]
    assert first["seconds"] == pytest.approx(1.0)
    assert first["data_wait"] == pytest.approx(0.2)
    assert first["images_per_s"] == pytest.approx(8.0)
    assert first["mfu"] == pytest.approx(0.4)
    assert first["peak_memory_gb"] > 0.01


class Event:
    """Stands for one of CUDA, which a machine without a GPU does not have."""

    def __init__(self, arrived: bool) -> None:
        self.arrived, self.waited = arrived, False

    def query(self) -> bool:
        return self.arrived

    def synchronize(self) -> None:
        self.waited = self.arrived = True


def test_what_is_still_under_way_is_not_waited_for_until_the_end() -> None:
    found: list[dict[str, float]] = []
    telemetry = Telemetry(Line(), World(), Work(1), every=1, deliver=found.extend)
    events = [Event(False), Event(True)]
    for i, event in enumerate(events, 1):
        telemetry._flights.append(_Flight(NAMES, row(float(i))[None], [i], [{}], {}, event))
    telemetry.add(3, NAMES, row(3.0), Spent(0, 1))
    assert found == []  # in order: the second waits for the first
    events[0].arrived = True
    telemetry._land(wait=False)
    assert [r["iteration"] for r in found] == [1, 2, 3]
    assert not any(event.waited for event in events)
    telemetry._flights.append(_Flight(NAMES, row(4.0)[None], [4], [{}], {}, event := Event(False)))
    telemetry.drain(NAMES)
    assert event.waited
    assert [r["iteration"] for r in found] == [1, 2, 3, 4]


def test_every_line_is_json_and_complete_whatever_the_interval(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.h5")
    runs = []
    for every in (1, 4):
        run = without_pictures(ready(shard, tmp_path / str(every), iterations=6, log_every=every, monitor_every=3))
        runs.append(lines(run.start()))
    assert [r["iteration"] for r in runs[1]] == [1, 2, 3, 4, 5, 6]
    for one, four in zip(*runs, strict=True):
        assert one.keys() == four.keys()
        assert {k: v for k, v in one.items() if k in ("loss", "epe", "rank", "lr")} == {
            k: v for k, v in four.items() if k in ("loss", "epe", "rank", "lr")
        }


@pytest.mark.skipif(not TensorBoard.installed(), reason="needs the extra tensorboard")
def test_tensorboard_hides_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shard = make_shard(tmp_path / "s.h5")
    flags = {"iterations": 4, "tensorboard": True, "val": str(shard), "val_every": 2, "checkpoint_every": 2}
    run = without_pictures(ready(shard, tmp_path / "run", **flags)).start()
    for path in run.checkpoints.paths()[1:]:
        path.unlink()
    run.backbone.unlink()
    resume(run, iterations=5).start()
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("training/loss")] == [1, 2, 3, 4, 5]
    assert [e.step for e in events.Scalars("held out/val_epe_ratio")] == [2, 4, 5]
    losses = [line["loss"] for line in lines(run)]
    assert [e.value for e in events.Scalars("training/loss")] == pytest.approx(losses, rel=1e-6)
    assert "training/iteration" not in events.Tags()["scalars"]


def test_progress_elsewhere_than_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"loss": 2.0, "loss_vec": 1.5, "loss_con": 0.5, "epe": 1.0, "epe_ratio": 0.5, "seconds": 0.1}
    record |= {"data_wait": 0.25, "skipped": 0.0}
    with training_progress(11, 20) as progress:
        progress.show([{**record, "iteration": 11}])
        progress.note("warning: something")
        progress.show([{**record, "iteration": 19, "skipped": 1.0, "loss": math.nan, "epe_ratio": math.nan}])
        progress.show([{**record, "iteration": 20, "val_epe": 3.0}])
    first, note, last = capsys.readouterr().out.splitlines()
    assert first.startswith("11/20  loss 2.000  L_vec 1.500  L_con 0.500  epe 1.00 px  ratio 0.500  waiting 25%  ")
    assert note == "warning: something"
    assert "held out 3.00 px" in last
    assert "skipped 1" in last
    assert last.endswith("it/s  0 s left")


def test_metrics_are_plain_json(tmp_path: Path) -> None:
    run = without_pictures(ready(make_shard(tmp_path / "s.h5"), tmp_path / "run", iterations=1)).start()
    run.append_metrics([{"iteration": 2, "loss": math.nan}, {"iteration": 3, "loss": math.inf}])
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()][1:] == [
        {"iteration": 2, "loss": None},
        {"iteration": 3, "loss": None},
    ]
