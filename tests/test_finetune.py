"""Fine-tuning and linear evaluation end to end: what learns, what is kept, exact resume, refusals."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import Run, cli, lines, make_shard, refused, start, together

from coverfast import UNet, load_backbone
from coverfast.backbones.files import backbone_bytes
from coverfast.downstream import plan as library
from coverfast.downstream.finetuning import Finetuning
from coverfast.downstream.network import Standard, load_network, network_about
from coverfast.downstream.validation import Validation
from coverfast.phantom import phantom
from coverfast.shards import Sample, ShardWriter

TINY: dict[str, Any] = {
    "preset": "small-2d",
    "channels": (8, 8, 8, 16, 16),
    "batch": 2,
    "crop": (32,),
    "iterations": 6,
    "val_every": 2,
    "checkpoint_every": 3,
    "threads": 1,
    "tensorboard": False,
}
FLAGS = [
    *("--preset", "small-2d", "--channels", "8,8,8,16,16", "--batch", "2", "--crop", "32", "--iterations", "4"),
    *("--val-every", "2", "--threads", "1", "--no-tensorboard"),
]


def labelled(path: Path, splits: str = "ttttvv", *, ndim: int = 2, classes: int = 9, **more: Any) -> Path:
    """Labelled phantoms, one a letter: t, v or e for its split; of even ones the class is "even"."""
    size = 64 if ndim == 2 else 48
    names = {"t": "train", "v": "val", "e": "test"}
    with ShardWriter(path, ndim=ndim, preprocessing={"preset": "phantom"}, **more) as writer:
        for index, letter in enumerate(splits):
            found = phantom(ndim, size, seed=1, index=index)
            pixels = (255 * found.image[None]).round().astype(np.uint8)
            about = {"split": names[letter], "labels": np.minimum(found.labels, classes - 1)}
            about["target"] = "odd" if index % 2 else "even"
            writer.add(Sample(pixels, 1.0, 0.0, 0.0, 255.0, (1.0,) * ndim, f"subject-{index}", **about))
    return path


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(tmp_path_factory.mktemp("shards") / "labelled.h5")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a real, if short, pretraining."""
    folder = tmp_path_factory.mktemp("pretrained")
    return start(make_shard(folder / "shard.h5"), folder / "run", iterations=2, seed=5).backbone


def quiet(found: Finetuning) -> Finetuning:
    """Without notes and pictures."""
    found.on_note = lambda text: None
    found._draw = lambda iteration: None  # type: ignore[method-assign]
    return found


def ready(shard: Path, run: Path, **flags: Any) -> Finetuning:
    """A tiny run that can start."""
    given = {**TINY, "data": str(shard), "run": str(run), **flags}
    if not given.get("init"):
        given["scratch"] = True
    return quiet(library.plan(given))


def stages(network: Any) -> list[dict[str, torch.Tensor]]:
    """The weights of every stage of a backbone, from the image on, and of the head."""
    return [m.state_dict() for m in (*network.backbone.modules_in_order, network.head)]


def changed(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> list[bool]:
    """Which stages differ by a bit."""
    return [any(not torch.equal(x[n], y[n]) for n in x) for x, y in zip(a, b, strict=True)]


# --- what learns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modules", "learn"), [(0, [False] * 9), (1, [False] * 8 + [True]), (4, [False] * 5 + [True] * 4), (-1, [True] * 9)]
)
def test_the_last_modules_learn_and_no_other(
    shard: Path, backbone: Path, tmp_path: Path, modules: int, learn: list[bool]
) -> None:
    found = ready(shard, tmp_path / "run", init=str(backbone), train_modules=modules)
    before = [{n: t.clone() for n, t in s.items()} for s in stages(found.task.network)]
    assert changed(before[:-1], stages(load_for(backbone))[:-1]) == [False] * 9
    found.start()
    assert changed(before, stages(found.task.network)) == [*learn, True]
    # The file holds the same network: that of the last iteration where it was best.
    kept = load_network(tmp_path / "run")
    assert changed(before, stages(kept)) == [*learn, True]
    assert kept.names == tuple(map(str, ["background", *range(1, 9)]))
    assert kept.preprocessing == {"preset": "phantom"}


def load_for(path: Path) -> Any:
    """A backbone as something with a head."""
    holder: Any = torch.nn.Module()
    holder.backbone, holder.head = load_backbone(path), torch.nn.Identity()
    return holder


def test_classification_trains_the_encoder_alone(shard: Path, backbone: Path, tmp_path: Path) -> None:
    found = ready(shard, tmp_path / "run", init=str(backbone), task="classification", lr=1e-2)
    before = [{n: t.clone() for n, t in s.items()} for s in stages(found.task.network)]
    run = found.start()
    assert changed(before, stages(found.task.network)) == [True] * 5 + [False] * 4 + [True]
    assert {"val_auc", "val_accuracy", "accuracy", "loss_ce"} <= {name for line in lines(run) for name in line}
    network = load_network(run.folder)
    assert network.names == ("even", "odd")
    assert network(torch.rand(3, 1, 32, 32)).shape == (3, 2)


def test_3d(tmp_path: Path) -> None:
    data = labelled(tmp_path / "volumes.h5", "ttv", ndim=3)
    run = ready(data, tmp_path / "run", preset="small-3d", iterations=2, batch=1).start()
    assert load_network(run.folder)(torch.rand(1, 1, 32, 32, 32)).shape == (1, 9, 32, 32, 32)
    assert 0 <= lines(run)[-1]["val_dsc"] <= 1


def test_it_learns(shard: Path, tmp_path: Path) -> None:
    data = labelled(tmp_path / "coarse.h5", "ttttvv", classes=2)  # the body and what is not
    run = ready(data, tmp_path / "run", iterations=40, lr=1e-2, val_every=20, checkpoint_every=100).start()
    found = [line["val_dsc"] for line in lines(run) if "val_dsc" in line]
    assert found[-1] > 0.9, found


def test_class_weights_turn_the_cross_entropy(shard: Path, tmp_path: Path) -> None:
    weights = (0.0, *[1.0] * 8)
    plain = ready(shard, tmp_path / "a")
    turned = ready(shard, tmp_path / "b", class_weights=weights)
    sums = []
    for found in (plain, turned):
        figures = found.engine.step(found._batch(1), update=False)
        sums.append(dict(zip(found.engine.names, figures.tolist(), strict=True)))
    background = sums[0]["g_0"]
    assert sums[1]["count"] == sums[0]["count"] - background == sums[0]["labels"] - background
    assert sums[1]["entropy"] < sums[0]["entropy"]
    with pytest.raises(ValueError, match="class_weights must be one for each of the 9 classes"):
        ready(shard, tmp_path / "c", class_weights=(1.0, 2.0))


# --- cases ----------------------------------------------------------------------------------------------------------


def test_more_cases_hold_those_of_fewer_and_patients_stay_whole(tmp_path: Path) -> None:
    data = tmp_path / "patients.h5"
    with ShardWriter(data, ndim=2, preprocessing={}) as writer:
        for index in range(20):
            found = phantom(2, 64, seed=2, index=index)
            pixels = (255 * found.image[None]).round().astype(np.uint8)
            group = f"patient-{index // 2}" if index < 12 else ""  # 6 patients of two images, 8 of one
            writer.add(Sample(pixels, 1.0, 0.0, 0.0, 255.0, (1.0, 1.0), str(index), group, labels=found.labels))
    chosen = {}
    for cases in (1, 3, 7, 14):
        some = ready(data, tmp_path / "run", cases=cases).shards
        chosen[cases] = {some.source(i) for i in range(len(some))}
        groups = {some.identity(i)[1] or some.source(i) for i in range(len(some))}
        assert len(groups) == cases
        assert all(str(int(i) ^ 1) in chosen[cases] for i in chosen[cases] if int(i) < 12)
    assert chosen[1] < chosen[3] < chosen[7] < chosen[14]
    assert len(chosen[14]) == 20
    half = ready(data, tmp_path / "run", fraction=0.5).shards
    assert {half.source(i) for i in range(len(half))} == chosen[7]
    other = ready(data, tmp_path / "run", cases=7, case_seed=1).shards
    assert {other.source(i) for i in range(len(other))} != chosen[7]
    with pytest.raises(ValueError, match="cases must be at most 14, the cases in the train split, got 15"):
        ready(data, tmp_path / "run", cases=15)


# --- best, resume ---------------------------------------------------------------------------------------------------


def test_the_best_on_validation_is_kept(shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.2, 0.6, float("nan"), 0.6, 0.5, 0.1])
    seen: list[dict[str, torch.Tensor]] = []

    def judged(network: Any, *_: Any, limit: int, **__: Any) -> Validation:
        if limit == 1:  # for its time
            return Validation({}, 0.0)
        seen.append({n: t.clone() for n, t in network.state_dict().items()})
        score = next(scores)
        return Validation({"dsc": score}, score)

    monkeypatch.setattr(Validation, "of", judged)
    run = ready(shard, tmp_path / "run", val_every=1).start()
    kept = load_network(run.folder).state_dict()
    assert all(torch.equal(kept[n], seen[1][n]) for n in kept)
    assert network_about(run.folder)["iteration"] == 2
    assert network_about(run.folder)["score"] == 0.6


def test_a_resumed_run_is_the_undisturbed_one(shard: Path, backbone: Path, tmp_path: Path) -> None:
    flags = {"init": str(backbone), "train_modules": 3, "seed": 3, "ema": 0.5}
    whole = ready(shard, tmp_path / "whole", **flags).start()
    parts = ready(shard, tmp_path / "parts", iterations=3, **flags).start()
    backbone.rename(backbone.with_suffix(".moved"))  # a resume needs it no more
    try:
        quiet(library.resume({"run": str(parts.folder), "iterations": 6})).start()
    finally:
        backbone.with_suffix(".moved").rename(backbone)
    ours, theirs = (load_network(run.folder).state_dict() for run in (parts, whole))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    clock = {"seconds", "data_wait", "iterations_per_s", "images_per_s", "mfu", "peak_memory_gb"}
    told = [[{k: v for k, v in line.items() if k not in clock} for line in lines(run)] for run in (parts, whole)]
    # The third iteration was the last one once, and was then validated.
    for line in told[0]:
        if line["iteration"] == 3:
            line.pop("val_dsc")
    assert told[0] == told[1]
    with pytest.raises(ValueError, match="cases cannot change on resume"):
        library.resume({"run": str(parts.folder), "cases": 2})


def test_killed_and_resumed_by_the_command(shard: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    command = ["finetune", "--scratch", "--data", str(shard), *FLAGS, "--checkpoint-every", "1"]
    before = (
        "from coverfast.training import loop\nsave = loop.Hooks.__init__\n"
        "from coverfast.training.checkpoints import Checkpoints as C\nkeep = C.save\n"
        "def die(self, i, *a, **k):\n    keep(self, i, *a, **k)\n    i == 3 and os.kill(os.getpid(), 9)\nC.save = die\n"
    )
    (killed,) = together(1, [*command, "--run", str(run.folder)], tmp_path / "log", before)
    assert killed.wait() == -9
    done = cli("finetune", "--resume", "--run", str(run.folder))
    assert done.returncode == 0, done.stderr
    assert [line["iteration"] for line in lines(run)] == [1, 2, 3, 4]
    assert "network.safetensors" in done.stdout
    straight = cli(*command, "--run", str(tmp_path / "straight"))
    assert straight.returncode == 0, straight.stderr
    ours, theirs = (load_network(f).state_dict() for f in (run.folder, tmp_path / "straight"))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize("more", [[], ["--fsdp"]])
def test_two_processes_learn_what_one_does(shard: Path, tmp_path: Path, more: list[str]) -> None:
    # Dice is no sum over pixels: without the sums of both processes its gradient would be another one.
    one = ready(shard, tmp_path / "one", iterations=4).start()
    run = Run(tmp_path / "two")
    command = ["finetune", "--scratch", "--data", str(shard), *FLAGS, "--run-folder", str(run.folder), *more]
    both = together(2, command, tmp_path / "log")
    assert [p.wait() for p in both] == [0, 0], [p.errors for p in both]
    for ours, theirs in zip(lines(run), lines(one), strict=True):
        for name in ("loss", "loss_dice", "loss_ce", "accuracy", "grad_norm", "val_dsc"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-5 if theirs["iteration"] == 1 else 5e-3), name
    assert load_network(run.folder).names == load_network(one.folder).names


# --- refusals -------------------------------------------------------------------------------------------------------


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_refusals(shard: Path, backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "bomb.safetensors").write_bytes(pickle.dumps(_Bomb()))
    torch.save({"format": "coverfast-checkpoint", "method": _Bomb()}, tmp_path / "bomb.pt")
    whole = backbone.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    for name, build in {"3d": UNet(3, 1, (8, 8, 8)), "colour": UNet(2, 3, (8, 8, 8))}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(backbone_bytes(build, config={}, preprocessing={}))
    bare = make_shard(tmp_path / "bare.h5", size=64)
    rare = labelled(tmp_path / "rare.h5", "tvvv", classes=3, label_classes={1: "fat", 2: "organs", 7: "tumour"})
    other = labelled(tmp_path / "other.h5", "tttv", classes=3)
    cases: list[tuple[list[str], tuple[str, ...]]] = [
        ([], ("init must name a pretrained backbone, got none", "--scratch")),
        (["--init", "bomb.safetensors"], ("bomb.safetensors must be a safetensors file",)),
        (["--init", "bomb.pt"], ("bomb.pt must be a checkpoint", "checksum")),
        (["--init", "cut.safetensors"], ("cut.safetensors must be a safetensors file, but it cannot be read",)),
        (["--init", "none.safetensors"], ("init must be", "does not exist")),
        (["--init", "3d.safetensors"], ("init must be a backbone for 2D images like data", "3D")),
        (["--init", "colour.safetensors"], ("init must be a backbone for 1 channel(s) like data", "is for 3")),
        (["--scratch", "--data", str(bare)], ("data must hold a class of each image", "--classes")),
        (["--scratch", "--data", str(bare), "--task", "segmentation"], ("must hold label maps", "--labels")),
        (
            ["--scratch", "--data", str(rare)],
            ("training cases must hold every class, but 'tumour' is in none of 1", "--case-seed"),
        ),
        (["--scratch", "--val", str(other)], ("val must have the classes of data", "'1', '2'")),
        (["--scratch", "--train-modules", "12"], ("train_modules must be -1 (all) or 0 to 9", "got 12")),
        (["--scratch", "--accumulate", "2"], ("accumulate must be 1 for a segmentation",)),
        (["--scratch", "--crop", "96"], ("crop must fit into every sample", "(64, 64)")),
        (["--scratch", "--init", str(backbone)], ("init and scratch exclude each other",)),
    ]
    for more, words in cases:
        data = [] if "--data" in more else ["--data", str(shard)]
        refused(cli("finetune", *FLAGS, *data, *more, "--run", "run", cwd=tmp_path), *words)
        assert not (tmp_path / "run").exists()
    refused(cli("probe", *FLAGS, "--data", str(shard), "--scratch", "--train-modules", "2"), "must be 0 for a probe")
    assert not (tmp_path / "exploded").exists()


def test_a_probe_leaves_the_backbone_alone_and_has_its_own_rate(shard: Path, backbone: Path, tmp_path: Path) -> None:
    done = cli("probe", "--data", str(shard), "--init", str(backbone), *FLAGS, "--run", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    head = sum(p.numel() for p in load_network(tmp_path / "run").head.parameters())
    assert f"{head} of " in done.stdout
    before, after = load_backbone(backbone).state_dict(), load_network(tmp_path / "run").backbone.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])["lr"] == 0.1


def test_the_head_sees_standardised_features(shard: Path, backbone: Path, tmp_path: Path) -> None:
    for flags in ({"init": str(backbone)}, {"task": "classification"}):
        found = ready(shard, tmp_path / "run", batch=4, **flags)
        network, seen = found.task.network, []
        for iteration in range(1, 5):  # the 16 crops that it was fitted to
            with torch.no_grad():
                seen.append(network.features(found.task.prepare(found._batch(iteration)).images))
        features = network.standard(torch.cat(seen))
        axes = (0, *range(2, features.ndim))
        torch.testing.assert_close(features.mean(axes), torch.zeros(features.shape[1]), atol=1e-3, rtol=0)
        spread = (features**2).mean(axes).sqrt()
        assert bool(((spread - 1).abs() < 1e-2).all()), spread


def test_standardisation_of_channels_that_do_not_change() -> None:
    standard = Standard(3)
    x = torch.stack([torch.full((4, 5), 7.0), torch.zeros(4, 5), torch.arange(20.0).view(4, 5)])[None]
    standard.fit([x])
    out = standard(x)
    assert torch.equal(out[0, :2], torch.zeros(2, 4, 5))
    assert float(out[0, 2].std(correction=0)) == pytest.approx(1, rel=1e-5)
    assert standard(x[:, :, 0, 0]).shape == (1, 3)


# --- what a reviewer broke -------------------------------------------------------------------------------------------


def test_classification_needs_no_label_maps(tmp_path: Path) -> None:
    data = tmp_path / "classes.h5"
    with ShardWriter(data, ndim=2, preprocessing={}) as writer:
        for index in range(8):
            pixels = np.full((1, 40, 40), 100 + 100 * (index % 2), np.uint8)
            about = {"split": "val" if index > 5 else "train", "target": "bright" if index % 2 else "dark"}
            writer.add(Sample(pixels, 1.0, 0.0, 0.0, 255.0, (1.0, 1.0), str(index), **about))
    done = cli("finetune", "--scratch", "--data", str(data), *FLAGS, "--run", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "task classification" in done.stdout
    assert load_network(tmp_path / "run").names == ("bright", "dark")


def test_without_validation_the_last_network_is_kept_also_after_a_resume(shard: Path, tmp_path: Path) -> None:
    data = labelled(tmp_path / "train.h5", "ttt")
    run = ready(data, tmp_path / "run", iterations=2).start()
    first = load_network(run.folder).state_dict()
    found = quiet(library.resume({"run": str(run.folder), "iterations": 4}))
    found.start()
    last, trained = load_network(run.folder).state_dict(), found.task.network.state_dict()
    assert all(torch.equal(last[n], trained[n]) for n in last)
    assert not all(torch.equal(last[n], first[n]) for n in last)
    assert network_about(run.folder)["iteration"] == 4


def judge(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """Let validations give these scores."""
    given_ = iter(scores)

    def judged(*_: Any, limit: int, **__: Any) -> Validation:
        score = 0.0 if limit == 1 else next(given_)  # one case alone is for its time
        return Validation({"dsc": score}, score)

    monkeypatch.setattr(Validation, "of", judged)


def test_a_network_that_could_not_be_written_is_not_the_mark(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coverfast import InputError
    from coverfast.downstream import finetuning

    write, calls = finetuning.write_atomically, []

    def full_once(path: Path, data: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise InputError(f"{path} cannot be written: no space left on the device")
        write(path, data)

    monkeypatch.setattr(finetuning, "write_atomically", full_once)
    judge(monkeypatch, 0.5, 0.8, 0.75)
    run = ready(shard, tmp_path / "run").start()
    assert len(calls) == 3
    assert network_about(run.folder)["score"] == 0.75


def test_the_mark_survives_a_resume_unless_the_cases_are_others(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge(monkeypatch, -0.4, -0.9, -0.3, -0.5, -0.6, -0.9)  # as minus a cross-entropy is
    run = ready(shard, tmp_path / "run", iterations=4).start()
    assert network_about(run.folder)["score"] == -0.4
    quiet(library.resume({"run": str(run.folder), "iterations": 8})).start()
    assert network_about(run.folder)["score"] == -0.3
    judge(monkeypatch, -0.7)
    notes: list[str] = []
    other = labelled(tmp_path / "other.h5", "vv")
    found = quiet(library.resume({"run": str(run.folder), "iterations": 10, "val": str(other)}))
    found.on_note = notes.append
    found.start()
    assert network_about(run.folder)["score"] == -0.7
    assert any("held-out cases are others" in note for note in notes)


def test_held_out_cases_are_spread_and_bad_ones_left_out_when_asked(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coverfast import InputError
    from coverfast.downstream import validation

    assert validation.spread(10, 4) == [0, 2, 5, 7]
    assert validation.spread(3, 8) == [0, 1, 2]
    found = ready(shard, tmp_path / "run", on_bad_sample="skip")
    image, about = validation.case_image, {"limit": 8, "device": torch.device("cpu")}

    def broken(shards: Any, index: int) -> torch.Tensor:
        if index == 0:
            raise InputError("sample 0 cannot be read")
        return image(shards, index)

    second = Validation.of(found.task.network, found.val.subset([1]), **about)
    monkeypatch.setattr(validation, "case_image", broken)
    seen = Validation.of(found.task.network, found.val, skip=True, **about)
    assert seen.bad == ["sample 0 cannot be read"]
    assert seen.score == second.score
    with pytest.raises(InputError, match="sample 0 cannot be read"):
        Validation.of(found.task.network, found.val, **about)


@pytest.mark.parametrize("task", ["classification"])
def test_parts_of_a_batch_give_the_gradient_of_the_whole_whatever_the_weights(
    shard: Path, tmp_path: Path, task: str
) -> None:
    found = {}
    for parts in (1, 2):
        # Weights whose sum over a batch is far below 1.
        one = ready(shard, tmp_path / "run", task=task, batch=4, accumulate=parts, class_weights=(0.01, 0.02))
        one.engine.step(one._batch(1), update=False)
        found[parts] = {n: p.grad.clone() for n, p in one.task.named_parameters() if p.grad is not None}
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[2][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_runs_of_one_kind_are_not_those_of_another(shard: Path, backbone: Path, tmp_path: Path) -> None:
    run = ready(shard, tmp_path / "run", iterations=2).start()
    refused(cli("pretrain", "--resume", "--run", str(run.folder)), "run must be a pretraining", "is a fine-tuning")
    pretrained = str(backbone.parent)
    refused(cli("finetune", "--resume", "--run", pretrained), "run must be a fine-tuning", "is a pretraining")
    checkpoint = str(run.checkpoints.paths()[-1])
    told = "must be a checkpoint of a pretraining, but it is one of a fine-tuning"
    refused(cli("finetune", "--init", checkpoint, "--data", str(shard), *FLAGS), told)


def test_the_backbone_a_run_starts_from_is_on_record(shard: Path, backbone: Path, tmp_path: Path) -> None:
    init = tmp_path / "backbone.safetensors"
    init.write_bytes(backbone.read_bytes())
    run = ready(shard, tmp_path / "run", iterations=2, init=str(init)).start()
    digest = hashlib.sha256(init.read_bytes()).hexdigest()
    assert network_about(run.folder)["init_sha256"] == digest
    assert digest in run.config.read_text()
    for path in run.checkpoints.paths():  # as if it had been killed before the first one
        path.unlink()
    other = UNet(2, 1, load_backbone(init).channels)
    init.write_bytes(backbone_bytes(other, config={}, preprocessing={}))
    with pytest.raises(ValueError, match="init_sha256 must be that of the run"):
        library.resume({"run": str(run.folder), "iterations": 3})
    with pytest.raises(ValueError, match="channels must be left to the backbone with --init"):
        ready(shard, tmp_path / "new", init=str(backbone), channels=(8, 8, 8))


@pytest.mark.slow
def test_compiled_processes_learn_the_same(shard: Path, tmp_path: Path) -> None:
    # The sums of Dice are exchanged inside the compiled graph.
    one = ready(shard, tmp_path / "one", iterations=2, val_every=100).start()
    run = Run(tmp_path / "two")
    command = ["finetune", "--scratch", "--data", str(shard), *FLAGS, "--run-folder", str(run.folder), "--compile"]
    both = together(2, [*command, "--iterations", "2", "--val-every", "100"], tmp_path / "log")
    assert [p.wait(300) for p in both] == [0, 0], [p.errors for p in both]
    for ours, theirs in zip(lines(run), lines(one), strict=True):
        assert ours["loss_dice"] == pytest.approx(theirs["loss_dice"], rel=1e-4)


@pytest.mark.gpu
def test_augmentation_on_a_gpu_is_that_of_a_cpu(shard: Path, tmp_path: Path) -> None:
    found = ready(shard, tmp_path / "run", batch=4)
    batch = found._batch(1)
    images, labels = found.task.prepare(batch)
    sent = {"images": batch.images.cuda(), "labels": batch.labels.cuda(), "targets": batch.targets.cuda()}
    there, classes = found.task.cuda().prepare(replace(batch, **sent))
    torch.testing.assert_close(there.cpu(), images, atol=2e-5, rtol=0)
    assert float((classes.cpu() != labels).float().mean()) < 1e-3  # two pixels are as near, to rounding


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [{}, {"train_modules": 0}, {"task": "classification"}])
@pytest.mark.parametrize("compiled", [False, True])
def test_training_on_a_gpu_is_that_on_a_cpu(shard: Path, tmp_path: Path, flags: dict[str, Any], compiled: bool) -> None:
    runs = {}
    for device in ("cpu", "cuda"):
        more = {"device": device, "precision": "float32", "compile": compiled and device == "cuda", **flags}
        runs[device] = lines(ready(shard, tmp_path / device, **more).start())
    for ours, theirs in zip(runs["cuda"], runs["cpu"], strict=True):
        for name in ("loss", "loss_ce", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-2), (name, ours["iteration"])
