"""Pretraining end to end: exact resume, the run folder, refusals. Real processes where a process is the point."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import (
    FLAGS,
    TINY,
    cli,
    lines,
    make_shard,
    refused,
    resume,
    same,
    start,
    weights,
    without_pictures,
)

from coverfast import InputError, load_backbone
from coverfast.backbones import read_backbone
from coverfast.shards import Sample, Shard, ShardWriter
from coverfast.training import plan as library
from coverfast.training.runs import Run


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shard(tmp_path_factory.mktemp("shards") / "small.h5")


# --- resume -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_equals_undisturbed_run_bit_for_bit(shard: Path, tmp_path: Path, workers: int) -> None:
    whole = start(shard, tmp_path / "whole", iterations=6)
    start(shard, tmp_path / "halves", iterations=3)
    halves = resume(tmp_path / "halves", iterations=6, workers=workers).start()
    assert same(weights(whole), weights(halves))
    timed = {"seconds", "data_wait", "iterations_per_s", "images_per_s", "mfu", "peak_memory_gb"}
    plain = [[{k: v for k, v in line.items() if k not in timed} for line in lines(run)] for run in (whole, halves)]
    assert plain[0] == plain[1]
    assert timed < lines(whole)[0].keys()
    states = [run.checkpoints.newest(torch.device("cpu")) for run in (whole, halves)]
    assert all(s is not None for s in states)
    moments = [[t for m in s[1]["optimizer"]["state"].values() for t in m.values()] for s in states if s]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


def test_seeds_give_different_weights(shard: Path, tmp_path: Path) -> None:
    runs = [start(shard, tmp_path / str(seed), iterations=1, seed=seed) for seed in (0, 1)]
    assert not same(*map(weights, runs))


def test_run_killed_before_its_first_checkpoint_starts_over(shard: Path, tmp_path: Path) -> None:
    whole = start(shard, tmp_path / "whole", iterations=2)
    run = start(shard, tmp_path / "early", iterations=2)
    for path in run.checkpoints.paths():
        path.unlink()
    run.backbone.unlink()
    again = resume(run).start()
    assert same(weights(whole), weights(again))


def test_resume_refuses_what_may_not_change_and_names_it(shard: Path, tmp_path: Path) -> None:
    run = str(start(shard, tmp_path / "run", iterations=1).folder)
    for name, value in {"lr": 0.5, "crop": (16,), "seed": 9, "window": (5,), "strength": 0.5, "pad": True}.items():
        with pytest.raises(InputError, match=rf"^{name} cannot change on resume"):
            library.resume({"run": run, name: value})
    library.resume({"run": run, "lr": TINY["lr"], "checkpoint_every": 7, "workers": 1, "iterations": 2})
    other = make_shard(tmp_path / "other.h5", seed=5)
    with pytest.raises(InputError, match="data must be that of the run"):
        library.resume({"run": run, "data": str(other)})
    copy = tmp_path / "moved.h5"
    copy.write_bytes(shard.read_bytes())
    assert library.resume({"run": run, "data": str(copy), "iterations": 2}).first == 2
    with pytest.raises(InputError, match="iterations must be more than 1, where the run stands"):
        library.resume({"run": run, "iterations": 1})
    with pytest.raises(InputError, match=r"give its new place with --data: .*gone.h5 must be a shard"):
        library.resume({"run": run, "data": str(tmp_path / "gone.h5"), "iterations": 2})
    config = Path(run, "config.toml")
    config.write_text(config.read_text().replace("strength = 1.0", "strength = 0.1"))
    with pytest.raises(InputError, match="strength was changed since"):
        library.resume({"run": run, "iterations": 2})


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch exploded",))


def test_pickle_bomb_as_checkpoint_does_not_run(shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(shard, tmp_path / "run", iterations=1)
    (path,) = run.checkpoints.paths()
    path.unlink()
    monkeypatch.setattr("coverfast.training.checkpoints._FORMAT", _Bomb())
    run.checkpoints.save(1, {}, keep=1)  # its checksum is right
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="must be a checkpoint, but it cannot be read"):
        library.resume({"run": str(run.folder), "iterations": 2})
    assert not (tmp_path / "exploded").exists()


# --- the run folder -------------------------------------------------------------------------------------------------


def test_run_folder_holds_everything(shard: Path, tmp_path: Path) -> None:
    flags = {"iterations": 3, "val": str(shard), "val_every": 2, "checkpoint_every": 1, "monitor_every": 2}
    run = library.plan(
        {**TINY, "data": str(shard), "run": str(tmp_path / "run"), "preset": "small-2d", **flags}
    ).start()
    config = tomllib.loads(run.config.read_text())
    assert config["iterations"] == 3
    assert config["provenance"]["data_sha256"] == Shard(shard).content_hash
    assert {"torch", "numpy", "python", "commit", "coverfast", "processes"} <= config["provenance"].keys()
    records = lines(run)
    keys = {"iteration", "loss", "loss_vec", "loss_con", "epe", "epe_ratio", "mask", "grad_norm", "skipped", "lr"}
    keys |= {"seconds", "data_wait", "iterations_per_s", "images_per_s", "mfu", "peak_memory_gb"}
    assert [r["iteration"] for r in records] == [1, 2, 3]
    assert all(keys <= r.keys() for r in records)
    assert ["val_epe" in r for r in records] == [False, True, True]
    seen = {"beyond_reach", "background", "cos_random", "cos_near", "rank", "epe_0", "ratio_4"}
    assert [seen <= r.keys() for r in records] == [True, True, False]
    assert records[1]["epe_4"] == pytest.approx(records[1]["epe"], rel=1e-5)
    assert [p.name for p in run.checkpoints.paths()] == [f"iteration-{i:08d}.pt" for i in (1, 2, 3)]
    assert (run.report / "overview.png").read_bytes().startswith(b"\x89PNG")
    assert (run.report / "index.html").is_file()
    assert not [p for p in run.folder.rglob("*") if "partial" in p.name or "tmp" in p.name]


def test_backbone_on_disk_is_the_trained_one(shard: Path, tmp_path: Path) -> None:
    flags = {**TINY, "data": str(shard), "run": str(tmp_path / "run"), "preset": "small-2d", "iterations": 2}
    ready = library.plan(flags)
    before = {n: p.clone() for n, p in ready.method.backbone.named_parameters()}
    run = without_pictures(ready).start()
    loaded = load_backbone(run.backbone)
    image = torch.rand(1, 1, 32, 48)
    trained = ready.method.backbone.eval()
    with torch.no_grad():
        for a, b in zip(loaded(image), trained(image), strict=True):
            assert (a - b).abs().max() < 1e-5  # the weights are the same, in another layout
    assert same(loaded.state_dict(), trained.state_dict())
    assert any(not torch.equal(before[n], p) for n, p in loaded.named_parameters())
    metadata = read_backbone(run.backbone)[1]
    assert json.loads(metadata["config"])["iterations"] == 2
    assert json.loads(metadata["preprocessing"]) == {"preset": "phantom"}


def test_warm_start_uses_the_given_weights(shard: Path, tmp_path: Path) -> None:
    first = start(shard, tmp_path / "first", iterations=1)
    flags = {**TINY, "data": str(shard), "preset": "small-2d", "init": str(first.backbone), "seed": 3}
    warm = library.plan(flags)
    assert same(dict(warm.method.backbone.state_dict()), weights(first))
    assert any("58 matched" in n or "matched, 0 missing" in n for n in warm.notes)
    with pytest.raises(InputError, match=r"does not fit the network: .*reshaped"):
        library.plan({**flags, "channels": (8, 8, 8, 16, 32)})


def test_validation_views_never_change_and_do_not_touch_training(shard: Path, tmp_path: Path) -> None:
    plain = start(shard, tmp_path / "plain", iterations=2)
    seen = start(shard, tmp_path / "seen", iterations=2, val=str(shard), val_every=1)
    assert same(weights(plain), weights(seen))
    frozen = start(shard, tmp_path / "frozen", iterations=2, val=str(shard), val_every=1, lr=1e-30)
    first, second = lines(frozen)
    assert first["val_epe"] == second["val_epe"]
    assert first["epe"] != second["epe"]


def test_training_lowers_the_end_point_ratio(shard: Path, tmp_path: Path) -> None:
    run = start(shard, tmp_path / "run", iterations=60, lr=3e-3, strength=0.5)
    ratios = [r["epe_ratio"] for r in lines(run)]
    assert np.mean(ratios[-15:]) < np.mean(ratios[:15]) - 0.05


def test_3d_run_end_to_end(tmp_path: Path) -> None:
    data = make_shard(tmp_path / "volume.h5", ndim=3, count=2, size=(32, 36, 40))
    flags = {**TINY, "preset": "small-3d", "iterations": 2, "crop": (16, 32, 32), "batch": 1}
    run = library.plan({**flags, "data": str(data), "run": str(tmp_path / "run")}).start()
    assert len(lines(run)) == 2
    assert load_backbone(run.backbone).ndim == 3
    assert (run.report / "index.html").is_file()


# --- data -----------------------------------------------------------------------------------------------------------


def with_splits(path: Path, splits: str, seed: int = 0) -> Path:
    """A shard of one 48 px noise image a letter: t train, v val, x test."""
    names = {"t": "train", "v": "val", "x": "test"}
    rng = np.random.default_rng(seed)
    with ShardWriter(path, ndim=2, preprocessing={}) as writer:
        for i, letter in enumerate(splits):
            pixels = rng.integers(0, 255, (1, 48, 48), np.uint8)
            said = {"source": f"{path.stem}/{i}", "split": names[letter]}
            writer.add(Sample(pixels, 1.0, 0.0, 0.0, 255.0, (1.0, 1.0), **said))
    return path


def test_many_shards_give_their_train_split_and_are_validated_on_their_val_split(tmp_path: Path) -> None:
    a, b = with_splits(tmp_path / "in" / "a.h5", "tvtx"), with_splits(tmp_path / "in" / "b.h5", "ttv", seed=1)
    flags = {**TINY, "preset": "small-2d"}
    for data in ([str(a), str(b)], str(tmp_path / "in"), str(tmp_path / "in" / "?.h5")):
        ready = library.plan({**flags, "data": data})
        assert (len(ready.shards), ready.val and len(ready.val)) == (4, 2)
    assert len(library.plan({**flags, "data": str(a), "split": "all"}).shards) == 4
    assert library.plan({**flags, "data": str(a), "split": "all"}).val is None
    assert library.plan({**flags, "data": str(a), "val": str(b)}).val.source(0) == "b/2"
    held = with_splits(tmp_path / "held.h5", "tt", seed=2)
    assert len(library.plan({**flags, "data": str(a), "val": str(held)}).val) == 2
    with pytest.raises(InputError, match="must hold samples of the split 'val'"):
        library.plan({**flags, "data": str(held), "split": "val"})
    result = cli("pretrain", "--data", str(a), "--data", str(b), "--preset", "small-2d", *FLAGS, "--iterations", "2",
                 "--run", str(tmp_path / "run"), "--crops", "2", "--workers", "1")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "4 sample(s)" in result.stdout
    run = Run(tmp_path / "run")
    assert "val_epe" in lines(run)[-1]
    assert tomllib.loads(run.config.read_text())["data"] == [str(a), str(b)]
    again = resume(run, iterations=3)
    assert len(again.shards) == 4
    without_pictures(again).start()
    a.unlink()
    with pytest.raises(InputError, match=r"give its new place with --data: .*a.h5 must be a shard, found no such file"):
        library.resume({"run": str(run.folder), "iterations": 4})


def test_what_shards_share_is_told(tmp_path: Path) -> None:
    def make(name: str, images: str) -> str:
        with ShardWriter(tmp_path / f"{name}.h5", ndim=2, preprocessing={}) as writer:
            for i, (letter, split) in enumerate(images.split(":")):
                pixels = np.random.default_rng(ord(letter)).integers(0, 255, (1, 48, 48), np.uint8)
                said = {"source": f"{name}/{i}", "group": f"p{letter}", "split": "val" if split == "v" else "train"}
                writer.add(Sample(pixels, 1.0, 0.0, 0.0, 255.0, (1.0, 1.0), **said))
        return str(tmp_path / f"{name}.h5")

    flags = {**TINY, "preset": "small-2d", "strength": 0.1}
    apart = library.plan({**flags, "data": [make("a", "at:bt:cv"), make("b", "dt:ev")]})
    assert apart.notes == []
    notes = library.plan({**flags, "data": [make("c", "at:bt:cv"), make("d", "at:cv:bv")]}).notes
    assert notes[0] == "warning: 1 of 3 samples have the pixels of another one"
    assert notes[1].startswith("warning: 1 of 3 held-out samples are learned from: d/2 of ")
    assert notes[1].endswith(f"has the pixels of c/1 of {tmp_path / 'c.h5'}")
    assert notes[2].startswith("warning: 1 group(s) are both learned from and held out, pb for one")


def test_a_sample_that_breaks_stops_the_run_by_name_or_is_skipped(tmp_path: Path) -> None:
    data = make_shard(tmp_path / "small.h5", count=4)
    with Shard(data) as opened:
        chunk = opened.dataset(2).id.get_chunk_info(0)
    content = bytearray(data.read_bytes())
    content[chunk.byte_offset + 5] ^= 1
    data.write_bytes(content)
    # With seed 3 the second iteration is the first one that sees it.
    flags = ["pretrain", "--data", str(data), "--preset", "small-2d", *FLAGS, "--iterations", "3", "--seed", "3"]
    refused(cli(*flags, "--run", str(tmp_path / "stopped")), "small.h5: sample 2 (subject-2) cannot be read")
    # What was learned before is kept, and the run goes on without the sample.
    stopped = Run(tmp_path / "stopped")
    assert [line["iteration"] for line in lines(stopped)] == [1]
    assert [p.name for p in stopped.checkpoints.paths()] == ["iteration-00000001.pt"]
    go_on = cli("pretrain", "--resume", "--run", str(stopped.folder), "--on-bad-sample", "skip")
    assert go_on.returncode == 0, go_on.stderr
    assert [line["iteration"] for line in lines(stopped)] == [1, 2, 3]
    skipped = cli(*flags, "--run", str(tmp_path / "run"), "--on-bad-sample", "skip")
    assert skipped.returncode == 0, skipped.stderr
    assert skipped.stdout.count("skipped: ") == 1
    assert "small.h5: sample 2 (subject-2) cannot be read" in skipped.stdout


def test_crop_larger_than_a_sample_is_named_or_padded(tmp_path: Path) -> None:
    data = tmp_path / "mixed.h5"
    with ShardWriter(data, ndim=2, preprocessing={}) as writer:
        for name, size in (("large", (64, 64)), ("narrow", (64, 24))):
            pixels = np.random.default_rng(0).integers(0, 255, (1, *size), np.uint8)
            writer.add(Sample(pixels, 1.0, 0.0, 0.0, 255.0, (1.0, 1.0), name))
    with pytest.raises(InputError, match=r"'narrow' .* is \(64, 24\)"):
        start(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert len(lines(start(data, tmp_path / "run", pad=True, iterations=2))) == 2


# --- refusals -------------------------------------------------------------------------------------------------------


def test_bad_settings_are_refused_before_anything_is_written(shard: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cases = {
        "crop": ((40,), "divisible by 16"),
        "window": ((4,), "odd"),
        "groups": ((1, 1), "channels must be 2"),
        "channels": ((8, 8, 8, 16, 12), "multiples of 8"),
        "impl": ("triton", "impl='triton' cannot run (mov|warp)"),
        "seed": (2**64, "seed must be at most"),
        "clip": (0, "clip must be at least"),
        "shear": (2.0, "below pi/2"),
        "threads": (10**6, "threads must be at most"),
        "device": ("tpu", "device must be"),
        "strength": (2.5, r"strength must be in \[0, 2\)"),
        "batch": (0, "batch must be at least 1"),
        "preset": ("paper-3d", "must be a 3D shard for preset paper-3d"),
        "data": (str(tmp_path / "none.h5"), "none.h5"),
        "val": (str(tmp_path / "gone.h5"), "gone.h5"),
        "init": (str(tmp_path / "no.safetensors"), "no.safetensors"),
        "iterations": ("ten", "iterations must be an int"),
        "warmup": (500, "warmup must be below the 300 iterations of the schedule"),
        "layout": ("nhwc", "layout must be"),
        "ema": (1.0, "ema must be below 1"),
        "cuda_graphs": (True, "cuda_graphs need compile"),
        "accumulate": (4, r"divisible by 4 .* got 2"),
        "optimizer": ("sgd", "optimizer must be"),
    }
    for name, (value, message) in cases.items():
        with pytest.raises(InputError, match=message):
            start(shard, run, **{name: value})
        assert not run.exists(), name


def test_workers_refuse_in_one_sentence_too(shard: Path, tmp_path: Path) -> None:
    import h5py

    damaged = tmp_path / "damaged.h5"
    data = bytearray(shard.read_bytes())
    with h5py.File(shard, locking=False) as file:  # as the library opens it: another handle may live
        chunk = file["samples/00000001"].id.get_chunk_info(0)
    data[chunk.byte_offset + chunk.size // 2] ^= 1
    damaged.write_bytes(data)
    result = cli("pretrain", "--data", str(damaged), "--run", str(tmp_path / "run"), *FLAGS, "--workers", "2")
    refused(result, "damaged.h5", "sample 1", "subject-1")


def test_a_crop_far_smaller_than_the_images_is_warned_of(tmp_path: Path) -> None:
    data = make_shard(tmp_path / "large.h5", count=1, size=512)
    flags = {**TINY, "data": str(data), "preset": "small-2d"}
    assert any("of a view lies in the other" in n for n in library.plan(flags).notes)
    assert not library.plan({**flags, "crop": (384,)}).notes


def test_any_printable_name_survives_the_configuration(shard: Path, tmp_path: Path) -> None:
    name = 'r \U0001f600 "quoted" \\ é'
    run = start(shard, tmp_path / name, iterations=1)
    again = resume(run, iterations=2).start()
    assert len(lines(again)) == 2
    with pytest.raises(InputError, match="run must be printable"):
        start(shard, tmp_path / "a\nb", iterations=1)


def test_cli_refusals(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("itertions = 3\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("precious")
    data = ["--data", str(shard)]
    refused(cli("pretrain"), "--data")
    refused(cli("pretrain", *data, "--config", str(tmp_path / "bad.toml")), "itertions", "'iterations'")
    refused(cli("pretrain", *data, "--run", str(tmp_path / "taken"), *FLAGS), "taken", "--resume")
    refused(cli("pretrain", "--resume", "--run", str(tmp_path / "none")), "config.toml")
    refused(cli("config", "tiny-4d"), "tiny-4d", "small-2d")
    refused(cli("demo", "--out", str(tmp_path / "taken")), "taken")
    assert (tmp_path / "taken" / "file").read_text() == "precious"


def test_cli_runs_resumes_and_says_where_things_are(shard: Path, tmp_path: Path) -> None:
    arguments = ["pretrain", "--data", str(shard), *FLAGS, "--iterations", "2"]
    first = cli(*arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "preset small-2d" in first.stdout  # the choice is printed
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.endswith("-small-2d")
    second = cli("pretrain", "--resume", "--run", str(run), "--iterations", "4", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "backbone.safetensors" in second.stdout
    assert [line["iteration"] for line in lines(Run(run))] == [1, 2, 3, 4]


def test_config_prints_toml_that_config_reads(shard: Path, tmp_path: Path) -> None:
    printed = cli("config", "small-2d").stdout
    path = tmp_path / "run.toml"
    path.write_text(printed.replace("iterations = 300 ", "iterations = 7 "))
    ready = library.plan({**TINY, "data": str(shard), "run": str(tmp_path / "run")}, path)
    assert ready.settings.iterations == 7
    assert ready.settings.batch == 2  # flags win over the file
