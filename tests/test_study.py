"""Studies of transfer and retest: statistics, settings, refusals, and a study that is killed and goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from training_runs import Command, cli, refused

from coverfast import InputError
from coverfast.backbones import UNet
from coverfast.backbones.files import backbone_bytes
from coverfast.downstream.finetuning import Finetuning
from coverfast.ingest.phantoms import build_phantoms
from coverfast.study.data import gather
from coverfast.study.folder import Study
from coverfast.study.progress import Moment, Watch, Work
from coverfast.study.retest import retest
from coverfast.study.retest import works as retest_works
from coverfast.study.runs import Scores
from coverfast.study.settings import RetestSettings, StudySettings, TransferSettings
from coverfast.study.statistics import Interval, correlation, crossed_interval
from coverfast.study.tables import markdown, transfer_rows
from coverfast.study.transfer import Trial, compare, transfer, trials
from coverfast.study.transfer import works as transfer_works
from coverfast.training.pretrain import Pretraining

TINY = {"images": 3, "validation": 1, "test": 3, "size": 64, "crop": 32, "preset": "small-2d"}
SHORT = {**TINY, "cases": [2], "seeds": 1, "pretrain_iterations": 4, "iterations": 4, "probe_iterations": 4}
TABLES = """
[pretrain]
channels = [8, 8, 8, 8, 8]
groups = [1, 1, 1, 1, 1]
window = 3
threads = 1
batch = 2
checkpoint_every = 2
tensorboard = false
[finetune]
threads = 1
batch = 2
val_every = 2
checkpoint_every = 2
"""
PROBE = "[probe]\nthreads = 1\nbatch = 2\nval_every = 2\ncheckpoint_every = 2\n"
#: Pictures of every run take longer than a tiny run.
QUIET = """
from coverfast.downstream.finetuning import Finetuning
Finetuning._draw = lambda self, iteration: None
"""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Finetuning, Pretraining):
        monkeypatch.setattr(kind, "_draw", lambda self, iteration: None)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in SHORT.items()]
    path.write_text("\n".join(lines) + TABLES + PROBE)
    return path


def settings(kind: type[StudySettings], **flags: Any) -> Any:
    return Study.open(kind, Path("nowhere"), {**TINY, **flags}).settings


def go(kind: type[StudySettings], out: Path, config: Path | None = None, **flags: Any) -> dict[str, Any]:
    """A study from start to end, in this process."""
    study = Study.open(kind, out, flags, config)
    works, library = (transfer_works, transfer) if kind is TransferSettings else (retest_works, retest)
    return library(study, Watch(works(study), note=lambda text: None))


@pytest.fixture
def pictureless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coverfast.study.transfer.write_pictures", lambda *more: None)


# --- statistics ---------------------------------------------------------------------------------------------------


def test_interval_of_one_seed_is_the_percentile_bootstrap_of_scipy() -> None:
    scores = np.random.default_rng(1).beta(5, 2, 24)
    found = crossed_interval(scores[None])
    whole = stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    assert found.mean == pytest.approx(scores.mean())
    assert (found.low, found.high) == pytest.approx((whole.low, whole.high), abs=0.004)


def test_interval_over_seeds_and_cases_is_that_of_drawing_both() -> None:
    rng = np.random.default_rng(2)
    scores = rng.normal(0.6, 0.05, (4, 1)) + rng.normal(0, 0.1, 16) + rng.normal(0, 0.02, (4, 16))
    means = []
    for _ in range(10_000):
        seeds, cases = rng.integers(0, 4, 4), rng.integers(0, 16, 16)
        means.append(scores[seeds][:, cases].mean())
    found, width = crossed_interval(scores), np.ptp(np.quantile(means, (0.025, 0.975)))
    assert (found.low, found.high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.04 * width)
    assert found.high - found.low > 1.2 * np.ptp(crossed_interval(scores.mean(axis=0)[None])[1:])


def test_cases_of_one_patient_are_drawn_together() -> None:
    scores = np.random.default_rng(3).random((2, 12))
    twice, patients = np.repeat(scores, 2, axis=1), [f"p{i:02d}" for i in range(12) for _ in range(2)]
    assert crossed_interval(twice, patients)[1:] == pytest.approx(crossed_interval(scores)[1:], abs=0.01)
    assert np.ptp(crossed_interval(twice)[1:]) < 0.9 * np.ptp(crossed_interval(twice, patients)[1:])
    assert crossed_interval(scores, [""] * 12) == crossed_interval(scores)


@given(arrays(np.float64, (3, 8), elements=st.floats(0, 1)), st.floats(-0.5, 0.5))
def test_differences_are_paired_in_seed_and_case(scores: np.ndarray, gain: float) -> None:
    found = crossed_interval((scores + gain) - scores)
    assert found == pytest.approx((gain, gain, gain), abs=1e-12)


def test_intervals_are_apart_only_without_a_value_in_common() -> None:
    low, high = Interval(0.5, 0.4, 0.6), Interval(0.7, 0.61, 0.8)
    assert low.apart(high)
    assert high.apart(low)
    assert not low.apart(high._replace(low=0.6))


@given(arrays(np.float64, (2, 12), elements=st.floats(0, 1).map(lambda v: round(v, 3))))
def test_correlation_and_p_value_are_those_of_the_t_distribution(runs: np.ndarray) -> None:
    found = correlation(*runs)
    if np.ptp(runs, axis=1).min() == 0:
        assert found[:2] == (None, None)
        return
    r = float(np.corrcoef(runs)[0, 1])
    assert found.r == pytest.approx(r, abs=1e-9)
    if abs(r) < 0.999999:
        assert found.p == pytest.approx(2 * stats.t.sf(abs(r) * np.sqrt(10 / (1 - r * r)), 10), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("scores", [np.zeros(3), np.zeros((0, 3)), np.array([[0.5, np.nan]])])
def test_scores_that_make_no_interval_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(InputError, match="scores must be"):
        crossed_interval(scores)


def test_scores_that_make_no_correlation_are_refused() -> None:
    for a, b in ((np.zeros(2), np.zeros(2)), (np.zeros(4), np.zeros(3)), (np.full(4, np.nan), np.zeros(4))):
        with pytest.raises(InputError, match="at least 3 finite numbers"):
            correlation(a, b)


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
        assert gain.dsc == pytest.approx([0.3 if gain.mode == "linear" else 0.0] * 3)
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


# --- what is to be done, and how far it is ------------------------------------------------------------------------


def test_arms_of_a_seed_differ_in_nothing_but_where_the_weights_come_from() -> None:
    study = Study.open(TransferSettings, Path("nowhere"), {**TINY, "seeds": 2, "cases": [4, 8], "probe_iterations": 7})
    s = study.settings
    assert isinstance(s, TransferSettings)
    found = {t: t.flags(study, {}) for t in trials(s)}
    assert len(found) == 2 * 2 * 2 * 2 == len({t.name for t in found})
    for t, flags in found.items():
        other = found[t._replace(init="scratch")]
        assert flags == other
        assert (flags["cases"], flags["case_seed"], flags["seed"]) == (t.cases, t.seed, t.seed)
        probes = t.mode == "linear"
        assert (flags["train_modules"], flags["iterations"]) == ((0, 7) if probes else (-1, s.iterations))
    assert len(transfer_works(study)) == 17


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
    from coverfast.shard_set import ShardSet

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
        for kind in (Finetuning, Pretraining):
            patch.setattr(kind, "_draw", lambda self, iteration: None)
        go(TransferSettings, out, config)
    return out


def test_study_leaves_its_table_and_pictures(undisturbed: Path) -> None:
    result = json.loads((undisturbed / "transfer.json").read_text())
    assert [(a["init"], a["mode"]) for a in result["arms"]] == [
        (init, mode) for mode in ("fine-tuned", "linear") for init in ("scratch", "pretrained")
    ]
    for arm, trial in zip(result["arms"], trials(settings(TransferSettings, **SHORT)), strict=True):
        scores = Scores.read(undisturbed / "runs" / trial.name / "result.json")
        assert (arm["init"], arm["mode"], arm["cases"]) == trial[:3]
        assert arm["scores"] == [scores.dsc.tolist()]
        assert arm["dsc"]["mean"] == pytest.approx(scores.dsc.mean()) == arm["by_seed"]["0"]
        assert np.mean(list(scores.classes.values()), axis=0) == pytest.approx(scores.dsc)
        assert not (undisturbed / "runs" / trial.name / "checkpoints").exists()
    assert "lr = 0.1\n" in (undisturbed / "runs" / "scratch-linear-2-cases-seed-0" / "config.toml").read_text()
    assert result["content"] == {}
    assert str(undisturbed) not in (undisturbed / "transfer.json").read_text()
    assert "| linear | 2 |" in (undisturbed / "transfer.md").read_text()
    assert all((undisturbed / name).read_bytes()[:4] == b"\x89PNG" for name in ("transfer.png", "example.png"))


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
