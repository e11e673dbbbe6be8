"""Several processes: the same training as one, and one end for all. Real processes over gloo on the CPU."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import SAME, lines, make_shard, ready, resume, start, together, weights

from coverfast import InputError
from coverfast.shards import Shard
from coverfast.training import plan as library
from coverfast.training.runs import Run
from coverfast.training.settings import resolve
from coverfast.training.world import World

# One layout for all: another one rounds otherwise, and FSDP2 knows but this.
_SIX = {"batch": 6, "iterations": 4, "val_every": 2, "checkpoint_every": 2, "strength": 1.5, "layout": "contiguous"}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shard(tmp_path_factory.mktemp("shards") / "small.h5", count=5)


@pytest.fixture(scope="module")
def alone(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What one process makes of it."""
    return start(shard, tmp_path_factory.mktemp("alone") / "run", val=str(shard), **_SIX)


def _command(shard: Path, run: Path, **flags: object) -> list[str]:
    given = {**_SIX, "data": shard, "val": shard, "run": run, **flags}
    words = [w for name, value in given.items() for w in (f"--{name.replace('_', '-')}", str(value))]
    return ["pretrain", *SAME, *words]


# Stands in place of the step's gradients: what every process holds once they are all reduced.
_KEEP_GRADIENTS = """
import torch
from coverfast.training.engine import Engine
update = Engine._update
def keep(self, lr, skipped):
    if self.world.writes and not os.path.exists({path!r}):
        whole = {{n: getattr(p.grad, 'full_tensor', lambda: p.grad)() for n, p in self.method.named_parameters()}}
        torch.save(whole, {path!r})
    update(self, lr, skipped)
Engine._update = keep
"""


@pytest.mark.parametrize(("count", "more"), [(2, []), (3, []), (3, ["--accumulate", "2"]), (2, ["--fsdp"])])
def test_gradients_and_figures_are_those_of_one_process(
    shard: Path, alone: Run, tmp_path: Path, count: int, more: list[str]
) -> None:
    gradients = tmp_path / "gradients.pt"
    before = _KEEP_GRADIENTS.format(path=str(gradients)) if "--fsdp" not in more else ""
    run = Run(tmp_path / "run")
    all_of_them = together(count, [*_command(shard, run.folder), *more], tmp_path / "log", before)
    assert [p.wait() for p in all_of_them] == [0] * count, [p.errors for p in all_of_them]
    assert [bool(p.output) for p in all_of_them] == [True] + [False] * (count - 1)
    assert [line["iteration"] for line in lines(run)] == [1, 2, 3, 4]
    for ours, theirs in zip(lines(run), lines(alone), strict=True):
        for name in ("loss", "loss_vec", "loss_con", "epe", "epe_ratio", "mask", "grad_norm", "val_loss", "val_epe"):
            if name in theirs:
                # Later on the weights differ by rounding, more where Adam divides by a gradient near 0.
                rounding = 2e-5 if theirs["iteration"] == 1 else 2e-4
                assert ours[name] == pytest.approx(theirs[name], rel=rounding), name
    # Adam takes the sign of a gradient that is but rounding: a step's length apart at most.
    for name, tensor in weights(run).items():
        assert (tensor - weights(alone)[name]).abs().max() <= 4 * 2e-3, name
    if before:
        found, exact = torch.load(gradients), _gradients_of_one(shard, tmp_path)
        for name, gradient in exact.items():
            assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max().clamp(min=1e-2), name
    go_on = resume(run, iterations=5)
    assert any(f"processes was {count} and is 1" in note for note in go_on.notes)
    fifth = lines(go_on.start())[-1]
    if more == ["--fsdp"]:  # and back: from whole weights and moments to parts of them
        run.checkpoints.paths()[-1].unlink()
        command = ["pretrain", "--resume", "--run", str(run.folder), "--iterations", "5"]
        both = together(count, command, tmp_path / "again")
        assert [p.wait() for p in both] == [0] * count, [p.errors for p in both]
        assert lines(run)[-1]["loss"] == pytest.approx(fifth["loss"], rel=1e-4)
        assert lines(run)[-1]["grad_norm"] == pytest.approx(fifth["grad_norm"], rel=1e-4)


def _gradients_of_one(shard: Path, folder: Path) -> dict[str, torch.Tensor]:
    one = ready(shard, folder / "one", **_SIX)
    one.engine.step(one._batch(1), update=False)
    return {n: p.grad for n, p in one.method.named_parameters() if p.grad is not None}


def test_a_batch_that_cannot_be_shared_names_the_nearest() -> None:
    settings = resolve("small-2d", {"batch": 8})
    with pytest.raises(InputError, match=r"divisible by 3 for 3 processes, got 8; the nearest are 6 and 9"):
        library.check_batch(settings, World(0, 3))
    two = resolve("small-2d", {"batch": 3, "accumulate": 2})
    with pytest.raises(
        InputError, match=r"divisible by 4 for 2 process\(es\) of 2 parts each, got 3; the nearest are 4"
    ):
        library.check_batch(two, World(0, 2))


def test_a_refusal_is_told_once(shard: Path, tmp_path: Path) -> None:
    both = together(2, _command(shard, tmp_path / "run", batch=5), tmp_path / "log")
    assert [p.wait(30) for p in both] == [2, 2]
    told = "".join(p.errors for p in both)
    assert told.count("batch must be divisible by 2 for 2 processes, got 5; the nearest are 4 and 6") == 1
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_sample_that_one_process_cannot_read_ends_all_with_its_name(tmp_path: Path) -> None:
    data = make_shard(tmp_path / "small.h5", count=9)
    with Shard(data) as opened:
        chunk = opened.dataset(2).id.get_chunk_info(0)
    content = bytearray(data.read_bytes())
    content[chunk.byte_offset + 5] ^= 1
    data.write_bytes(content)
    flags = {"iterations": 50, "val": make_shard(tmp_path / "val.h5", count=1)}
    both = together(2, _command(data, tmp_path / "run", **flags), tmp_path / "log")
    begun = time.monotonic()
    assert [p.wait(60) for p in both] == [2, 2]
    assert time.monotonic() - begun < 45
    told = "".join(p.errors for p in both)
    assert told.count("error: ") == 1, told
    assert "small.h5: sample 2 (subject-2) cannot be read" in told


@pytest.mark.parametrize(("number", "timeout"), [(signal.SIGKILL, "600"), (signal.SIGSTOP, "5")])
def test_a_process_that_is_lost_or_hangs_ends_the_others(
    shard: Path, tmp_path: Path, number: int, timeout: str
) -> None:
    run = Run(tmp_path / "run")
    command = _command(shard, run.folder, iterations=100_000, timeout=timeout)
    first, second = together(2, command, tmp_path / "log")
    first.until(lambda: len(run.checkpoints.paths()) > 0)
    second.kill(number)
    begun = time.monotonic()
    assert first.wait(40) == 2
    assert time.monotonic() - begun < 30
    assert "process 0: another process of the run was lost or did not answer in time" in first.errors
    assert first.errors.count("\n") == 1, first.errors
    second.kill()
    assert run.checkpoints.newest(torch.device("cpu")) is not None


def test_a_signal_to_one_stops_all_at_one_iteration(shard: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    first, second = together(2, _command(shard, run.folder, iterations=100_000), tmp_path / "log")
    first.until(lambda: len(run.checkpoints.paths()) > 0)
    second.kill(signal.SIGTERM)
    assert [first.wait(30), second.wait(30)] == [143, 143], first.errors + second.errors
    newest = run.checkpoints.newest(torch.device("cpu"))
    assert newest is not None
    assert newest[1]["iteration"] == lines(run)[-1]["iteration"]


def test_torchrun(shard: Path, alone: Run, tmp_path: Path) -> None:
    words = _command(shard, tmp_path / "run", layout="auto")
    words[words.index("--run")] = "--run-folder"  # torchrun takes --run for one of its own
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, "-m", "coverfast", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "float32 on 2 processes on cpu" in done.stdout
    assert json.dumps([line["iteration"] for line in lines(Run(tmp_path / "run"))]) == "[1, 2, 3, 4]"
    for ours, theirs in zip(lines(Run(tmp_path / "run")), lines(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--fsdp"]])
def test_pairs_of_several_processes_are_those_of_one(shard: Path, tmp_path: Path, more: list[str]) -> None:
    words = ["--method", "gvsl", "--preset", "small-2d", "--channels", "8,8,8,16,16", "--batch", "4", "--crop", "32"]
    words += ["--iterations", "3", "--val", str(shard), "--val-every", "3", "--threads", "1", "--no-tensorboard"]
    words += ["--no-report", "--layout", "contiguous"]
    runs = [Run(tmp_path / str(count)) for count in (1, 2)]
    for count, run in zip((1, 2), runs, strict=True):
        command = ["pretrain", "--data", str(shard), "--run", str(run.folder), *words, *(more if count > 1 else [])]
        processes = together(count, command, tmp_path / f"log-{count}", "")
        assert [p.wait() for p in processes] == [0] * count, [p.errors for p in processes]
    for alone, shared in zip(*map(lines, runs), strict=True):
        for name in (
            "loss",
            "loss_ncc",
            "loss_smooth",
            "loss_restore",
            "ncc",
            "grad_norm",
            "val_ncc",
            "val_ncc_before",
        ):
            if name in alone:
                rounding = 2e-5 if alone["iteration"] == 1 else 2e-3
                assert shared[name] == pytest.approx(alone[name], rel=rounding, abs=1e-6), name
