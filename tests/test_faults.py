"""What can happen to a training: kill -9, signals, damaged checkpoints, full disks, losses that are not finite."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_runs import SAME, Command, lines, make_shard, ready, resume, same, start, weights, without_pictures

from coverfast import InputError
from coverfast.methods.cover import Cover
from coverfast.training.checkpoints import Checkpoints, Damaged, read_checkpoint
from coverfast.training.runs import Run
from coverfast.training.signals import StopSignals

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shard(tmp_path_factory.mktemp("shards") / "small.h5")


# --- kill -9 ----------------------------------------------------------------------------------------------------------

_ITERATIONS = 40


@pytest.fixture(scope="module")
def undisturbed(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return start(shard, tmp_path_factory.mktemp("whole") / "run", iterations=_ITERATIONS, checkpoint_every=4)


def _killed_again_and_again(shard: Path, folder: Path, kills: int, seed: int) -> Run:
    """A run that is killed `kills` times at random moments and resumed each time, then ends."""
    run, moments = Run(folder / "run"), random.Random(seed)
    begin = ["pretrain", "--data", str(shard), *SAME, "--run", str(run.folder)]
    begin += ["--iterations", str(_ITERATIONS), "--checkpoint-every", "4"]
    go_on = ["pretrain", "--resume", "--run", str(run.folder)]
    killed = 0
    for attempt in range(10 * kills):
        stands = [p.name for p in run.checkpoints.paths()]
        command = Command(go_on if run.config.exists() else begin, folder / f"attempt-{attempt}")
        if killed == kills:
            assert command.wait() == 0, command.errors
            assert attempt >= kills
            return run
        time.sleep(moments.uniform(0.2, 2.0))
        if command.process.exitcode is not None:  # it came to its end before
            assert command.process.exitcode == 0, command.errors
            run.backbone.unlink()
            for path in run.checkpoints.paths()[1:]:
                path.unlink()
            continue
        command.kill()
        assert command.wait() == -signal.SIGKILL
        killed += 1
        left = run.checkpoints.paths()
        assert len(left) >= min(1, len(stands))
        for path in left:
            read_checkpoint(path, CPU)
    raise AssertionError("the run always ended before it could be killed")


def _is_as_undisturbed(run: Run, undisturbed: Run) -> None:
    assert same(weights(run), weights(undisturbed))
    assert [line["iteration"] for line in lines(run)] == list(range(1, _ITERATIONS + 1))
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in lines(undisturbed)]
    assert not [p for p in run.folder.rglob("*") if "partial" in p.name]  # the last resume cleaned up after the kills


def test_killed_thrice_at_random_moments(shard: Path, undisturbed: Run, tmp_path: Path) -> None:
    _is_as_undisturbed(_killed_again_and_again(shard, tmp_path, 3, seed=1), undisturbed)


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments(shard: Path, undisturbed: Run, tmp_path: Path) -> None:
    _is_as_undisturbed(_killed_again_and_again(shard, tmp_path, 20, seed=2), undisturbed)


def test_a_kill_loses_at_most_the_interval(shard: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    flags = ["--iterations", "100000", "--checkpoint-every", "3", "--run", str(run.folder)]
    command = Command(["pretrain", "--data", str(shard), *SAME, *flags], tmp_path / "log")
    command.until(lambda: len(run.checkpoints.paths()) >= 2)
    command.kill()
    command.wait()
    newest = run.checkpoints.newest(CPU)
    assert newest is not None
    # Its lines go up to the checkpoint at least, and no further than one interval (and the step in flight).
    assert 0 <= lines(run)[-1]["iteration"] - newest[1]["iteration"] <= 4


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_and_its_code(shard: Path, tmp_path: Path, number: int, code: int) -> None:
    run = Run(tmp_path / "an interrupted run")
    flags = ["--iterations", "100000", "--workers", "1", "--run", str(run.folder)]
    command = Command(["pretrain", "--data", str(shard), *SAME, *flags], tmp_path / "log")
    command.until(lambda: run.metrics.exists() and run.metrics.stat().st_size > 0)
    command.kill(number)
    assert command.wait(30) == code, command.errors
    assert command.errors == ""
    last = lines(run)[-1]["iteration"]
    newest = run.checkpoints.newest(CPU)
    assert newest is not None
    assert newest[1]["iteration"] == last
    assert f"coverfast pretrain --resume --run '{run.folder}'" in command.output
    whole = start(shard, tmp_path / "whole", iterations=last + 2)
    assert same(weights(resume(run, iterations=last + 2).start()), weights(whole))


def test_a_second_signal_is_not_held_back() -> None:
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("checkpoint")
    path = Checkpoints(folder).save(7, {"method": {"w": torch.arange(50.0)}}, keep=1)
    assert torch.equal(torch.load(path, weights_only=True)["method"]["w"], torch.arange(50.0))  # plain torch reads it
    return path.read_bytes()


@given(st.data())
def test_no_damage_to_a_checkpoint_goes_unseen(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(checkpoint)
    assert read_checkpoint(path, CPU)["iteration"] == 7
    place = data.draw(st.integers(0, len(checkpoint) - 1))
    flipped = bytearray(checkpoint)
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    for damage in (bytes(flipped), checkpoint[:place], checkpoint + b"\0"):
        path.write_bytes(damage)
        with pytest.raises(Damaged, match=r"damaged\.pt must be a checkpoint"):
            read_checkpoint(path, CPU)


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(shard: Path, tmp_path: Path) -> None:
    whole = start(shard, tmp_path / "whole", iterations=6)
    run = start(shard, tmp_path / "run", iterations=4, checkpoint_every=1)
    *_, before, last = run.checkpoints.paths()
    last.write_bytes(last.read_bytes()[:1000])
    again = resume(run, iterations=6)
    assert again.first == 4
    assert any(str(last) in note and "going on from the one before" in note for note in again.notes)
    assert same(weights(again.start()), weights(whole))
    for path in run.checkpoints.paths():
        path.write_bytes(b"none")
    with pytest.raises(InputError, match=f"one checkpoint must be sound, but none of 3 is: .*{before.parent}"):
        resume(run, iterations=7)


def test_a_checkpoint_just_written_outlives_damaged_later_ones(shard: Path, tmp_path: Path) -> None:
    run = start(shard, tmp_path / "run", iterations=6, checkpoint_every=2, keep_checkpoints=2)
    for path in run.checkpoints.paths()[1:]:
        path.write_bytes(b"none")
    (run.checkpoints.folder / "iteration-9-of-mine.pt").write_bytes(b"a stranger")
    (run.checkpoints.folder / ".iteration-00000005.pt.1.partial").write_bytes(b"what a kill left")
    run.backbone.unlink()
    resume(run, iterations=5, keep_checkpoints=1).start()
    left = sorted(p.name for p in run.checkpoints.folder.iterdir())
    assert left == ["iteration-00000005.pt", "iteration-00000006.pt.damaged", "iteration-9-of-mine.pt"]
    assert run.checkpoints.newest(CPU) is not None


def test_one_process_trains_a_run(shard: Path, tmp_path: Path) -> None:
    run = start(shard, tmp_path / "run", iterations=2)
    with run.locked(), pytest.raises(InputError, match="run must be trained by one process, but another one trains"):
        resume(run, iterations=4).start()
    assert [line["iteration"] for line in lines(run)] == [1, 2]
    assert len(lines(resume(run, iterations=4).start())) == 4


def test_old_checkpoints_go_but_for_every_mth(shard: Path, tmp_path: Path) -> None:
    flags = {"iterations": 7, "checkpoint_every": 2, "keep_checkpoints": 2, "keep_every": 3}
    run = start(shard, tmp_path / "run", **flags)
    assert [int(p.stem[-8:]) for p in run.checkpoints.paths()] == [3, 6, 7]


def test_a_checkpoint_of_another_version_is_not_taken_for_damage(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(1, {"version": 1}, keep=1)
    with pytest.raises(InputError, match="checkpoint of version 2, got 'coverfast-checkpoint' of version 1") as refusal:
        Checkpoints(tmp_path).newest(CPU)
    assert not isinstance(refusal.value, Damaged)
    assert path.exists()


def test_a_run_at_its_end_without_results_gets_them(shard: Path, tmp_path: Path) -> None:
    run = start(shard, tmp_path / "run", iterations=2)
    trained = weights(run)
    run.backbone.unlink()
    assert same(weights(resume(run).start()), trained)
    with pytest.raises(InputError, match="iterations must be more than 2, where the run stands"):
        resume(run)


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a device of 900 kB: two checkpoints of a tiny run and a bit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _fill(folder: Path) -> Path:
    filler = folder / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=1k"], capture_output=True, check=False)
    return filler


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_training_goes_on_over_a_full_disk_and_catches_up(shard: Path, small_disk: Path, tmp_path: Path) -> None:
    whole = start(shard, tmp_path / "whole", iterations=14)
    flags = {"iterations": 14, "checkpoint_every": 4, "keep_checkpoints": 1, "tensorboard": True}
    run, notes = ready(shard, small_disk / "run", **flags), list[str]()
    without_pictures(run).on_note = notes.append
    filler = small_disk / "filler"

    def on_step(records: list[dict[str, float]]) -> None:
        if records[-1]["iteration"] == 5:
            _fill(small_disk)
        if records[-1]["iteration"] == 10:
            filler.unlink()

    done = run.start(on_step)
    told = [note for note in notes if note.startswith("warning: ")]
    assert "metrics.jsonl cannot be written: no space left on the device" in told[0]
    assert sum("iteration-00000008.pt cannot be written" in note for note in told) == 1
    assert "training goes on, the next try is in 1 iteration(s)" in "".join(told)
    assert [int(p.stem[-8:]) for p in done.checkpoints.paths()] == [14]
    assert [line["iteration"] for line in lines(done)] == list(range(1, 15))
    assert same(weights(done), weights(whole))
    assert not [p for p in done.folder.rglob("*") if ".partial" in p.name]


def test_a_last_checkpoint_that_cannot_be_saved_names_the_last_good_one(
    shard: Path, small_disk: Path, tmp_path: Path
) -> None:
    run, notes = without_pictures(ready(shard, small_disk / "run", iterations=3, checkpoint_every=2)), list[str]()
    run.on_note = notes.append
    with pytest.raises(InputError, match=r"no space left.*; the last good checkpoint is .*iteration-00000002\.pt"):
        run.start(lambda records: _fill(small_disk) and None if records[-1]["iteration"] == 3 else None)
    assert run.run is not None
    assert [p.name for p in run.run.checkpoints.paths()] == ["iteration-00000002.pt"]
    assert not run.run.backbone.exists()
    (small_disk / "filler").unlink()
    assert same(weights(resume(run.run).start()), weights(start(shard, tmp_path / "whole", iterations=3)))


def test_nothing_is_left_where_nothing_fits(shard: Path, small_disk: Path) -> None:
    _fill(small_disk)
    with pytest.raises(InputError, match="no space left on the device"):
        ready(shard, small_disk / "run", iterations=2).start()
    assert not (small_disk / "run").exists()


# --- not finite -------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Iterations whose loss is NaN."""
    found: set[int] = set()
    prepare = Cover.prepare

    def spoil(self: Cover, batch):  # type: ignore[no-untyped-def]
        views = prepare(self, batch)
        if batch.iteration in found and self.training:
            views.pair[0] = torch.nan
        return views

    monkeypatch.setattr(Cover, "prepare", spoil)
    return found


def test_a_step_that_is_not_finite_is_skipped_and_its_batch_kept(
    shard: Path, tmp_path: Path, spoiled: set[int]
) -> None:
    spoiled |= {2, 4}
    run, notes = without_pictures(ready(shard, tmp_path / "run", iterations=5, checkpoint_every=1)), list[str]()
    run.on_note = notes.append
    done = run.start()
    assert [line["skipped"] for line in lines(done)] == [0, 1, 0, 1, 0]
    assert [line["loss"] is None for line in lines(done)] == [False, True, False, True, False]
    assert sum("was skipped" in note for note in notes) == 2
    states = {i: read_checkpoint(done.folder / "checkpoints" / f"iteration-{i:08d}.pt", CPU) for i in (3, 4, 5)}
    assert same(states[3]["method"], states[4]["method"])
    assert not same(states[4]["method"], states[5]["method"])
    for name, moment in states[3]["optimizer"]["state"].items():
        assert all(torch.equal(moment[k], states[4]["optimizer"]["state"][name][k]) for k in moment)
    assert {float(m["step"]) for m in states[5]["optimizer"]["state"].values()} == {3.0}
    kept = torch.load(done.folder / "skipped" / "iteration-00000002.pt", weights_only=True)
    assert kept["iteration"] == 2
    assert torch.equal(kept["images"], run._stream(run.shards, 0).load(2).images)
    assert all("subject-" in source for source in kept["sources"])


def test_too_many_skipped_steps_end_the_run(shard: Path, tmp_path: Path, spoiled: set[int]) -> None:
    spoiled |= set(range(3, 100))
    run = without_pictures(ready(shard, tmp_path / "run", iterations=100, checkpoint_every=2, skip_limit=4))
    with pytest.raises(
        InputError, match=r"but 5 steps among the last 100 were skipped, the last at iteration 7 .*0006"
    ):
        run.start()
    assert run.run is not None
    newest = run.run.checkpoints.newest(CPU)
    assert newest is not None
    assert all(w.isfinite().all() for w in newest[1]["method"].values())
