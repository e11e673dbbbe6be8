"""Studies of transfer and retest: statistics, settings, refusals, and a study that is killed and goes on."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from study_runs import (
    PROBE,
    SHORT,
    TABLES,
    TINY,
    Reached,
    go,
    settings,
    short_of_training,
    without_pictures,
)
from training_runs import Command, cli, refused

from coverfast import InputError
from coverfast.backbones import UNet
from coverfast.backbones.files import backbone_bytes
from coverfast.downstream.evaluation import evaluate
from coverfast.downstream.finetuning import Finetuning
from coverfast.downstream.network import load_network
from coverfast.ingest.phantoms import build_phantoms
from coverfast.shard_set import ShardSet
from coverfast.shards import Sample, ShardWriter
from coverfast.study.data import gather
from coverfast.study.folder import Study
from coverfast.study.progress import Moment, Watch, Work
from coverfast.study.runs import Scores
from coverfast.study.settings import RetestSettings, TransferSettings
from coverfast.study.tables import markdown, transfer_rows
from coverfast.study.transfer import Trial, compare, convergence, trials
from coverfast.study.transfer import works as transfer_works
from coverfast.training.checkpoints import Checkpoints
from coverfast.training.pretrain import Pretraining

#: Pictures of every run take longer than a tiny run.
QUIET = """
from coverfast.downstream.finetuning import Finetuning
Finetuning._draw = lambda self, iteration: None
"""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in SHORT.items()]
    path.write_text("\n".join(lines) + TABLES + PROBE)
    return path


@pytest.fixture
def pictureless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coverfast.study.transfer.write_pictures", lambda *more: None)


# --- what is to be done, and how far it is ------------------------------------------------------------------------


def test_comparison_finds_a_gain_where_there_is_one() -> None:
    s = settings(TransferSettings, cases=[4, 8], seeds=2)
    rng, scores = np.random.default_rng(4), {}
    base = {(k, n): rng.uniform(0.4, 0.6, 16) for k in (0, 1) for n in (4, 8)}
    for t in trials(s):
        gain = 0.3 if (t.init, t.mode) == ("pretrained", "linear") else 0.0
        scores[t] = Scores(["a"] * 16, [""] * 16, base[t.seed, t.cases] + gain, {})
    arms, gains = compare(scores, s)
    assert [(g.mode, g.cases) for g in gains] == [(m, n) for m in ("fine-tuned", "linear") for n in (4, 8)]
    for gain in gains:
        assert gain.dsc[:3] == pytest.approx([0.3 if gain.mode == "linear" else 0.0] * 3)
        assert gain.apart == (gain.mode == "linear")
    assert len(arms) == 8
    rows = {
        "arms": [{**a._asdict(), "dsc": a.dsc.plain()} for a in arms],
        "differences": [{**g._asdict(), "dsc": g.dsc.plain(), "intervals_apart": g.apart} for g in gains],
    }
    headings, cells = transfer_rows(rows)
    assert len(headings) == len(cells[0])
    assert [row[-2:] for row in cells[-2:]] == [["+30.0 [+30.0, +30.0]", "apart"]] * 2


def test_markdown_keeps_its_columns() -> None:
    assert markdown(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |\n"


def test_every_seed_and_number_of_cases_is_trained_in_all_ways() -> None:
    study = Study.open(TransferSettings, Path("nowhere"), {**TINY, "seeds": 2, "cases": [4, 8], "probe_iterations": 7})
    s = study.settings
    assert isinstance(s, TransferSettings)
    found = {t: t.flags(study, {}) for t in trials(s)}
    assert len(found) == 2 * 2 * 2 * 2 == len({t.name for t in found})
    for t, flags in found.items():
        assert (flags["cases"], flags["case_seed"], flags["seed"]) == (t.cases, t.seed, t.seed)
        probes = t.mode == "linear"
        assert (flags["train_modules"], flags["iterations"]) == ((0, 7) if probes else (-1, s.iterations))
    assert len(transfer_works(study)) == 17


def test_curve_is_of_the_iterations_that_all_seeds_have() -> None:
    s = settings(TransferSettings, cases=[4, 8], seeds=2)
    found = {t: {25: 0.1 + t.seed, 50: 0.2 + t.seed} | ({75: 0.3} if t.seed else {}) for t in trials(s)}
    found[Trial("scratch", "linear", 8, 1)] = {}
    curves = convergence(found, s)
    assert len(curves) == 8
    assert curves["pretrained", "fine-tuned", 4] == {25: [0.1, 1.1], 50: [0.2, 1.2]}
    assert curves["scratch", "linear", 8] == {}


def test_time_left_follows_the_pace_of_each_kind() -> None:
    now, told = 0.0, list[Moment]()
    works = [Work("a", "slow", 10), Work("b", "slow", 10), Work("c", "quick", 20), Work("d", "quick", 20)]
    watch = Watch(works, told.append, clock=lambda: now)
    assert watch.left is None
    watch.begin("a")
    now = 20.0
    watch.step("a", [{"iteration": i} for i in range(1, 6)])
    assert watch.left == pytest.approx(4.0 * (5 + 10 + 20 + 20))  # nothing is known of the quick ones yet
    now = 30.0
    watch.end("a")  # the evaluation counts too: 6 s an iteration
    watch.passed("b")
    watch.begin("c")
    now = 31.0
    watch.step("c", [{"iteration": 10, "loss": 0.5}] * 10)
    assert watch.left == pytest.approx(0.1 * 30)
    assert told[-1][:6] == ("c", 3, 4, 10, 20, pytest.approx(30 / 60))
    assert told[-1].figures["loss"] == 0.5


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"preset": "huge-2d"}, "preset must be one of"),
        ({"preset": "small-3d", "ndim": 2}, "preset must be one for 2D images, got 'small-3d'"),
        ({"ndim": 1}, "ndim must be 2 or 3, got 1"),
        ({"data": ["phantom", "atlas"]}, "data must be one of phantom, atlas, or shards"),
        ({"unlabelled": "a.h5"}, "unlabelled must be left out where the study makes the data itself"),
        ({"data": "atlas", "preset": "small-3d", "crop": 48, "size": 64}, "ndim must be 2 for the atlas, got 3"),
        ({"crop": 96}, "crop must fit into images of size 64"),
        ({"crop": 40}, "divisible by 16"),
        ({"cases": [4, 4]}, "cases must be different numbers"),
        ({"cases": [0]}, "cases must be at least 1"),
        ({"test": 1}, "test must be at least 2, got 1"),
        ({"checkpoint": "none.safetensors"}, "checkpoint must be a backbone.safetensors or a run that has one"),
        ({"checkpoint": "none.safetensors", "methods": "cover"}, "methods must be left out with a checkpoint, which"),
        ({"methods": ["cover", "gvsl", "cover"]}, "methods must be of different names, got cover, gvsl, cover"),
        ({"methods": ["a/net.py:Mine", "b/net.py:mine"]}, "methods must be of different names, got net-Mine, net-mine"),
        ({"data": "none.h5"}, "must be a shard, found no such file"),
        ({"epochs": 3}, "there is no setting 'epochs'"),
        ({"images": "many"}, "images must be an int, got 'many'"),
    ],
)
def test_bad_settings_are_refused(flags: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        Study.open(TransferSettings, tmp_path / "new", {**TINY, **flags})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[pretraining]\nlr = 1e-3", "must have settings of this study and the tables pretrain, finetune, probe"),
        ("[finetune]\nseed = 1", "seed of the table finetune of .* must be left to the study"),
        ("[probe]\nchannels = [8, 8, 8, 8, 8]", "channels of the table probe of .* must be left to the study"),
        ("[pretrain]\nmethod = 'gvsl'", "method of the table pretrain of .* must be left to the study"),
        ("[pretrain.cover]\nchannels = [8, 8, 8, 8, 8]", "channels of the table pretrain.cover of .* must be left to"),
        ("[pretrain.cover]\nbatch = 2", r"batch of the table pretrain.cover of .* must be left to \[pretrain\]"),
        (
            "[pretrain.gvsl]\nlr = 1.0",
            r"the table \[pretrain.gvsl\] must be of a method of this study, .* cover",
        ),
        ("[finetune.cover]\nlr = 1.0", "there is no setting 'cover'"),
        ("[pretrain]\nlearning_rate = 1.0", "there is no setting 'learning_rate'"),
        ("[finetune]\nlr = -1.0", "lr must be at least"),
        ("seeds = 'x'", "seeds must be an int"),
        ("seeds =", "config must be a TOML file"),
    ],
)
def test_bad_tables_are_refused_before_anything_is_trained(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(InputError, match=words):
        Study.open(TransferSettings, tmp_path / "new", TINY, tmp_path / "c.toml")
    with pytest.raises(InputError, match="there is no file"):
        Study.open(TransferSettings, tmp_path / "new", TINY, tmp_path / "none.toml")


def test_study_goes_on_with_its_settings_and_no_others(config: Path, tmp_path: Path) -> None:
    study = Study.open(TransferSettings, tmp_path / "a", {"seed": 3}, config)
    assert not study.keep()
    again = Study.open(TransferSettings, tmp_path / "a", {"device": "cpu"})
    assert again.settings == Study.open(TransferSettings, tmp_path / "b", {"seed": 3, "device": "cpu"}, config).settings
    assert (again.tables, again.keep()) == (study.tables, True)
    assert Study.open(TransferSettings, tmp_path / "a", {"seed": 3}, config).tables == study.tables
    copied = Study.open(TransferSettings, tmp_path / "b", {}, study.file)
    assert (copied.settings, copied.tables) == (study.settings, study.tables)
    with pytest.raises(InputError, match=r"^iterations must be 4 as in .*study.toml, got 5; leave it out to go on"):
        Study.open(TransferSettings, tmp_path / "a", {"iterations": 5})
    (tmp_path / "c.toml").write_text("[finetune]\nlr = 0.1")
    with pytest.raises(InputError, match=r"the table finetune of .* must be that of"):
        Study.open(TransferSettings, tmp_path / "a", {}, tmp_path / "c.toml")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="out must be a new or empty folder or one with a study"):
        Study.open(TransferSettings, tmp_path / "full", {})


def test_study_does_not_go_on_as_another_one(tmp_path: Path) -> None:
    study = Study.open(RetestSettings, tmp_path / "out", TINY)
    study.keep()
    assert Study.open(RetestSettings, tmp_path / "out", {}).settings == study.settings
    for folder, config in ((tmp_path / "out", None), (tmp_path / "new", study.file)):
        with pytest.raises(
            InputError, match=r"study.toml must be of a study of the kind transfer, .* the kind retest$"
        ):
            Study.open(TransferSettings, folder, {}, config)


def test_study_does_not_go_on_with_another_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    for seed in (0, 1):
        torch.manual_seed(seed)
        path.write_bytes(backbone_bytes(UNet(2, 1, (8,) * 9), config={}, preprocessing={}))
        if seed == 0:
            Study.open(TransferSettings, tmp_path / "out", {**TINY, "checkpoint": str(path)}).keep()
            Study.open(TransferSettings, tmp_path / "out", {})
    with pytest.raises(InputError, match="checkpoint must be what the study began with"):
        Study.open(TransferSettings, tmp_path / "out", {})


# --- data ---------------------------------------------------------------------------------------------------------


def test_images_that_are_made_are_all_different(tmp_path: Path) -> None:
    study = Study.open(TransferSettings, tmp_path / "out", {**TINY, "cases": [2, 3]})
    study.keep()
    data = gather(study, pretrains=True)
    assert (len(data.test), data.classes[:2]) == (3, ["background", "fat"])
    sets = [data.unlabelled, data.labelled, data.val, list(data.test.paths)]
    pixels = [s.identity(i)[0] for s in (ShardSet(paths, "all") for paths in sets) for i in range(len(s))]
    assert len(pixels) == len(set(pixels)) == 3 + 3 + 1 + 3
    made = {path: path.stat().st_mtime_ns for paths in sets for path in paths}
    gather(study, pretrains=True)
    assert made == {path: path.stat().st_mtime_ns for path in made}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "labelled.h5"
    build_phantoms(path, 2, 64, seed=5, indices=range(12), val_fraction=0.25, test_fraction=0.25)
    return path


def test_shards_without_labels_or_splits_are_refused(labelled: Path, tmp_path: Path) -> None:
    from training_runs import make_shard

    plain, whole = make_shard(tmp_path / "plain.h5", size=64), tmp_path / "whole.h5"
    build_phantoms(whole, 2, 64, seed=6, indices=range(3))
    flags = {"crop": 32, "preset": "small-2d", "cases": [2]}
    for data, more, words in (
        (plain, {}, "data must hold label maps"),
        (whole, {}, "data must have images in the splits train, val and test, but .* has none in val"),
        (labelled, {"unlabelled": str(labelled), "cases": [99]}, "cases must be at most"),
    ):
        with pytest.raises(InputError, match=words):
            go(TransferSettings, tmp_path / "out", None, **{**flags, **more}, data=str(data))
        assert not (tmp_path / "out").exists()  # a refused start leaves nothing


def test_test_images_may_not_be_pretrained_on(labelled: Path, tmp_path: Path) -> None:
    same = tmp_path / "same.h5"
    build_phantoms(same, 2, 64, seed=5, indices=range(12))
    flags = {"crop": 32, "preset": "small-2d", "data": str(labelled), "unlabelled": str(same)}
    with pytest.raises(InputError, match="test images must not be among those to pretrain on, but phantom-5-"):
        gather(Study.open(TransferSettings, tmp_path / "out", flags), pretrains=True)


def grouped(path: Path, seed: int, places: dict[str, str]) -> str:
    """A shard of labelled noise, an image a group, in the split given."""
    rng = np.random.default_rng(seed)
    with ShardWriter(path, ndim=2, preprocessing={}, label_classes={1: "organ"}) as writer:
        for group, split in places.items():
            pixels, labels = (rng.integers(0, top, size, np.uint8) for top, size in ((256, (1, 64, 64)), (2, (64, 64))))
            about = (1.0, 0.0, 0.0, 255.0, (1.0, 1.0), f"{path.stem} {group}", group, split)
            writer.add(Sample(pixels, *about, labels=labels))
    return str(path)


def test_patients_to_learn_from_and_to_test_on_are_told(tmp_path: Path) -> None:
    def told(**flags: Any) -> list[str]:
        notes = list[str]()
        study = Study.open(TransferSettings, tmp_path / "out", {"crop": 32, "preset": "small-2d", **flags})
        gather(study, pretrains=True, tell=notes.append)
        return notes

    most = grouped(tmp_path / "a.h5", 1, {"anna": "train", "bert": "val", "carl": "test"})
    other = grouped(tmp_path / "b.h5", 2, {"anna": "test", "dora": "val"})
    for group, warned in (("carl", 1), ("dora", 0)):
        assert len(told(data=most, unlabelled=grouped(tmp_path / f"{group}.h5", 3, {group: "train"}))) == warned
    assert told(data=most) == []
    (note,) = told(data=[most, other])
    assert note.startswith("warning: 1 group(s) are both learned from and held out, anna for one")


def test_checkpoint_for_other_images_is_refused(labelled: Path, tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    flags = {"crop": 32, "preset": "small-2d", "data": str(labelled), "checkpoint": str(path), "cases": [2]}
    for network, words in (
        (UNet(3, 1, (8,) * 9), "checkpoint does not fit: .* 2D"),
        (UNet(2, 2, (8,) * 9), "checkpoint does not fit: .* 1 channel"),
        (UNet(2, 1, (8, 8, 8, 8, 8, 16, 8, 8, 8)), "channels of the decoder must mirror"),
    ):
        path.write_bytes(backbone_bytes(network, config={}, preprocessing={}))
        with pytest.raises(InputError, match=words):
            go(TransferSettings, tmp_path / "out", None, **flags)
        assert not (tmp_path / "out").exists()


# --- studies ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        patch.setattr("coverfast.downstream.evaluation.score_case", None)  # distances take long, and nothing shows them
        go(TransferSettings, out, config)
    return out


def test_study_leaves_its_table_and_pictures(undisturbed: Path) -> None:
    result, test = (
        json.loads((undisturbed / "transfer.json").read_text()),
        ShardSet(undisturbed / "data/test.h5", "all"),
    )
    assert [(a["init"], a["mode"]) for a in result["arms"]] == [
        (init, mode) for mode in ("fine-tuned", "linear") for init in ("scratch", "pretrained")
    ]
    for arm, trial in zip(result["arms"], trials(settings(TransferSettings, **SHORT)), strict=True):
        scores = Scores.read(undisturbed / "runs" / trial.name / "result.json")
        assert (arm["init"], arm["mode"], arm["cases"]) == trial[:3]
        assert arm["scores"] == [scores.dsc.tolist()]
        assert arm["dsc"]["value"] == pytest.approx(scores.dsc.mean()) == arm["by_seed"]["0"]
        found = evaluate(load_network(undisturbed / "runs" / trial.name / "network.safetensors"), test)
        assert scores.dsc.tolist() == found.values("dsc").tolist()
        assert [scores.classes[c].tolist() for c in found.classes] == [
            [case.classes[c]["dsc"] for case in found.cases] for c in found.classes
        ]
        assert (scores.cases, scores.groups) == tuple([getattr(c, n) for c in found.cases] for n in ("source", "group"))
        seen = map(json.loads, (undisturbed / "runs" / trial.name / "metrics.jsonl").read_text().splitlines())
        assert arm["validation"] == {str(r["iteration"]): r["val_dsc"] for r in seen if "val_dsc" in r}
        assert list(arm["validation"]) == ["2", "4"]
        assert np.mean(list(scores.classes.values()), axis=0) == pytest.approx(scores.dsc)
        assert not (undisturbed / "runs" / trial.name / "checkpoints").exists()
    assert "lr = 0.1\n" in (undisturbed / "runs" / "scratch-linear-2-cases-seed-0" / "config.toml").read_text()
    assert result["content"] == {}
    assert str(undisturbed) not in (undisturbed / "transfer.json").read_text()
    assert "| linear | 2 |" in (undisturbed / "transfer.md").read_text()
    pictures = ("transfer.png", "convergence.png", "example.png")
    assert all((undisturbed / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)


def test_arms_of_a_seed_differ_in_nothing_but_where_the_weights_come_from(undisturbed: Path) -> None:
    def trained(init: str, mode: str) -> dict[str, Any]:
        found = tomllib.loads((undisturbed / "runs" / f"{init}-{mode}-2-cases-seed-0" / "config.toml").read_text())
        return {name: value for name, value in found.items() if not isinstance(value, dict)} | {"run": ""}

    def changed(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
        return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}

    for mode in ("fine-tuned", "linear"):
        a, b = trained("scratch", mode), trained("pretrained", mode)
        assert changed(a, b) == {"init", "scratch", "channels"}
        assert b["channels"] == [8] * 9
        assert (a["channels"], a["scratch"], b["init"]) == (
            [8] * 5,
            True,
            str(undisturbed / "runs/pretraining/backbone.safetensors"),
        )
    for init in ("scratch", "pretrained"):
        assert changed(trained(init, "fine-tuned"), trained(init, "linear")) == {"train_modules", "lr"}


@pytest.fixture
def _short_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_training(monkeypatch)


@pytest.mark.usefixtures("_short_of_training")
@pytest.mark.parametrize("table", ["finetune", "probe"])
def test_trials_that_cannot_work_are_refused_before_pretraining(config: Path, tmp_path: Path, table: str) -> None:
    (tmp_path / "c.toml").write_text(config.read_text().replace(f"[{table}]", f"[{table}]\nclass_weights = [1, 2]"))
    with pytest.raises(InputError, match="class_weights must be one for each of the"):
        go(TransferSettings, tmp_path / "out", tmp_path / "c.toml")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_short_of_training")
def test_trials_are_rehearsed_once_and_cheaply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coverfast.downstream import plan as library

    plan, seen = library.plan, list[dict[str, Any]]()

    def planned(flags: dict[str, Any], **more: Any) -> Finetuning:
        seen.append(flags)
        return plan(flags, **more)

    monkeypatch.setattr(library, "plan", planned)
    monkeypatch.setattr(library, "standardise", None)  # passes images
    flags = {**TINY, "cases": [2, 3], "seeds": 2, "iterations": 40}
    with pytest.raises(Reached):
        go(TransferSettings, tmp_path / "out", **flags)
    found = [(f["train_modules"], f["cases"], f["case_seed"]) for f in seen]
    assert sorted(found) == [(m, n, k) for m in (-1, 0) for n in (2, 3) for k in (0, 1)]
    assert {(f["iterations"], f["val_every"]) for f in seen} == {(40, 10), (80, 20)}
    seen.clear()
    (tmp_path / "out" / "runs").mkdir()
    with pytest.raises(Reached):
        go(TransferSettings, tmp_path / "out")
    assert seen == []


@pytest.mark.parametrize(
    ("killed", "iteration"), [("pretraining", 2), ("pretrained-fine-tuned-2-cases-seed-0", 2), ("scratch-linear", 4)]
)
@pytest.mark.usefixtures("pictureless")
def test_killed_study_goes_on_to_the_same_result(
    undisturbed: Path, config: Path, tmp_path: Path, killed: str, iteration: int
) -> None:
    out = tmp_path / "out"
    # What lies before the run that is killed was tested by the others.
    keep = {"pretraining": 0, "pretrained-fine-tuned-2-cases-seed-0": 2, "scratch-linear": 3}[killed]
    done = ["pretraining", "scratch-fine-tuned-2-cases-seed-0", "pretrained-fine-tuned-2-cases-seed-0"][:keep]
    name = killed if "-0" in killed or killed == "pretraining" else f"{killed}-2-cases-seed-0"
    for part in ("study.toml", "data", *(f"runs/{run}" for run in done)):
        source, target = undisturbed / part, out / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    # As if the machine died right after a checkpoint.
    kill = f"""{QUIET}
import signal
from coverfast.training.checkpoints import Checkpoints
save = Checkpoints.save
def save_and_die(self, iteration, *more, **options):
    path = save(self, iteration, *more, **options)
    if iteration == {iteration} and {name!r} in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return path
Checkpoints.save = save_and_die
"""
    command = Command(["study", "transfer", "--out", str(out)], tmp_path / "log", before=kill)
    assert command.wait() == -9, command.output + command.errors
    assert (out / "runs" / name / "checkpoints" / f"iteration-{iteration:08d}.pt").exists()
    go(TransferSettings, out, config)
    assert (out / "transfer.json").read_bytes() == (undisturbed / "transfer.json").read_bytes()
    resumed = "[resumed]" in (out / "runs" / name / "config.toml").read_text()
    assert resumed == (iteration < 4)  # trained to the end: evaluated, not trained again


@pytest.mark.parametrize(
    ("name", "saved"), [("pretraining", True), ("pretrained-fine-tuned", True), ("pretrained-fine-tuned", False)]
)
@pytest.mark.usefixtures("pictureless")
def test_study_that_was_moved_goes_on(
    undisturbed: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, saved: bool
) -> None:
    before, after, save = tmp_path / "before", tmp_path / "after", Checkpoints.save
    if name != "pretraining":
        for run in ("pretraining", "scratch-fine-tuned-2-cases-seed-0"):
            shutil.copytree(undisturbed / "runs" / run, before / "runs" / run)
        shutil.copytree(undisturbed / "data", before / "data")
        shutil.copy(undisturbed / "study.toml", before)

    def die(self: Checkpoints, *more: Any, **options: Any) -> None:
        if saved:
            save(self, *more, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", die)
        with pytest.raises(KeyboardInterrupt):
            go(TransferSettings, before, config)
    before.rename(after)
    go(TransferSettings, after)
    assert (after / "transfer.json").read_bytes() == (undisturbed / "transfer.json").read_bytes()


@pytest.mark.usefixtures("pictureless")
def test_finished_study_trains_nothing(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (undisturbed / "transfer.json").read_bytes()
    monkeypatch.setattr(Finetuning, "start", None)
    monkeypatch.setattr(Pretraining, "start", None)
    go(TransferSettings, undisturbed)
    assert (undisturbed / "transfer.json").read_bytes() == before


@pytest.mark.usefixtures("pictureless")
def test_study_takes_a_checkpoint_and_shards(undisturbed: Path, config: Path, labelled: Path, tmp_path: Path) -> None:
    backbone = undisturbed / "runs" / "pretraining"
    (tmp_path / "c.toml").write_text(TABLES + PROBE)
    flags = {"data": str(labelled), "checkpoint": str(backbone), "cases": [2], "seeds": 1, "iterations": 2}
    result = go(TransferSettings, tmp_path / "out", tmp_path / "c.toml", preset="small-2d", crop=32, **flags)
    assert result["content"].keys() == {"data", "checkpoint"}
    assert len(result["test_cases"]) == 3
    assert not (tmp_path / "out" / "runs" / "pretraining").exists()
    assert not (tmp_path / "out" / "data").exists()


def test_retest_correlates_two_runs(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(TABLES)
    flags = {**TINY, "labelled": 2, "test": 4, "pretrain_iterations": 1, "iterations": 2}
    result = go(RetestSettings, tmp_path / "out", tmp_path / "c.toml", **flags)
    a, b = (np.array(run["scores"]) for run in result["runs"])
    assert result["pearson"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert 0 <= result["p"] <= 1
    assert not np.array_equal(a, b)
    assert json.loads((tmp_path / "out" / "retest.json").read_text()) == result
    assert "Pearson r" in (tmp_path / "out" / "retest.md").read_text()
    assert (tmp_path / "out" / "retest.png").read_bytes()[:4] == b"\x89PNG"


def test_command_refuses_in_one_sentence(undisturbed: Path) -> None:
    refused(cli("study", "transfer", "--out", str(undisturbed), "--seeds", "7"), "seeds must be 1 as in")


def test_two_processes_do_not_share_a_study(undisturbed: Path) -> None:
    from coverfast.training.runs import Run

    with Run(undisturbed).locked(), pytest.raises(InputError, match="another one trains"):
        go(TransferSettings, undisturbed)


def test_seeds_choose_other_cases_and_weights() -> None:
    a, b = (
        Trial("scratch", "linear", 4, seed).flags(Study.open(TransferSettings, Path("no"), TINY), {}) for seed in (0, 1)
    )
    assert {name for name in a if a[name] != b[name]} == {"seed", "case_seed"}
