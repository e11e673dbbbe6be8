"""`evaluate`: cases, classes, means and intervals; what does not fit the network; the command and its pictures."""

from __future__ import annotations

import hashlib
import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from coverfast import InputError, ShardSet, UNet
from coverfast.cli.main import app
from coverfast.downstream import Network, evaluate
from coverfast.downstream.bootstrap import bootstrap_mean
from coverfast.downstream.metrics import auc, auc_one_vs_rest, score_case
from coverfast.downstream.network import network_bytes
from coverfast.phantom import CLASSES_2D, phantom
from coverfast.report.cases import ERRORS, CaseView, case_sheet, overlaid, overlay_sheet
from coverfast.samples import LabelClass, Sample
from coverfast.shards import Shard, ShardWriter

pytest.importorskip("scipy")

TABLE = (LabelClass(0, "background"), LabelClass(3, "organ"), LabelClass(70, "lesion"))
PRESET = {"preset": "raw", "size": None}


class Levels(nn.Module):
    """Classes by intensity: 0, 1/2 and 1 of the range."""

    def __init__(self, ndim=2, names=("background", "organ", "lesion"), values=(0, 3, 70), preprocessing=None):
        super().__init__()
        self.task, self.names, self.values, self.ndim, self.in_channels = "segmentation", names, values, ndim, 1
        self.crop, self.preprocessing = (16,) * ndim, PRESET if preprocessing is None else preprocessing

    def forward(self, images):
        return torch.cat([-(40 * (images - level) ** 2) for level in (0, 0.5, 1)], 1)


class Mean(nn.Module):
    """Classes of the whole image by its mean."""

    def __init__(self, names=("well", "ill")):
        super().__init__()
        self.task, self.names, self.values, self.ndim, self.in_channels = "classification", names, (0, 1, 2), 2, 1
        self.crop, self.preprocessing = (16, 16), PRESET

    def forward(self, images):
        mean = images.mean((1, 2, 3))
        return torch.stack([-((4 * (mean - k / (len(self.names) - 1))) ** 2) for k in range(len(self.names))], 1)


def write(path, samples, **options):
    with ShardWriter(path, ndim=samples[0].pixels.ndim - 1, preprocessing=PRESET, **options) as writer:
        for sample in samples:
            writer.add(sample)
    return path


def labelled(number, truth, found, spacing=None, group="", split="test"):
    """A sample that `Levels` makes `found` of."""
    pixels = np.array([0, 128, 255], np.uint8)[found][None]
    values = np.array([c.value for c in TABLE], np.uint8)[truth]
    spacing = spacing or (1.0,) * truth.ndim
    return Sample(pixels, 1, 0, 0, 255, spacing, f"case-{number}", group, split, labels=values)


def maps(size, seed):
    """Blobs of two classes, and the same a little elsewhere."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(size, int)
    found = np.zeros(size, int)
    for label in (1, 2):
        corner = [int(rng.integers(2, s - 9)) for s in size]
        truth[tuple(slice(c, c + 6) for c in corner)] = label
        found[tuple(slice(c + int(rng.integers(0, 3)), c + 7) for c in corner)] = label
    return truth, found


@pytest.fixture
def shard(tmp_path):
    """Five cases of two patients and one alone; the classes are absent here and there."""
    pairs = [maps((30, 25), seed) for seed in range(5)]
    pairs[1][0][pairs[1][0] == 2] = 0  # found, but not there
    pairs[2][0][pairs[2][0] == 2] = 0
    pairs[2][1][pairs[2][1] == 2] = 0  # rightly absent
    groups = ["a", "a", "b", "b", ""]
    cases = [
        labelled(i, *pair, spacing=(0.7, 2.0), group=group)
        for i, (pair, group) in enumerate(zip(pairs, groups, strict=True))
    ]
    path = write(tmp_path / "test.h5", cases, label_classes=TABLE)
    return path, pairs, groups


def test_a_segmentation(shard):
    path, pairs, groups = shard
    steps = []
    found = evaluate(Levels(), ShardSet(path, "test"), batch=1, tolerance=1.5, progress=lambda *at: steps.append(at))
    assert steps[-1] == (5, 5)
    assert steps == sorted(steps)
    assert len(steps) > 5  # within cases too
    assert [case.source for case in found.cases] == [f"case-{i}" for i in range(5)]
    expected = [score_case(p.astype(np.uint8), t.astype(np.uint8), 3, (0.7, 2.0), 1.5) for t, p in pairs]
    for case, scores in zip(found.cases, expected, strict=True):
        for metric, values in scores.items():
            assert [case.classes[name][metric] for name in ("organ", "lesion")] == pytest.approx(
                list(values), nan_ok=True
            )
            known = values[np.isfinite(values)]
            assert case.figures[metric] == pytest.approx(known.mean())
        assert case.score == case.figures["dsc"]
    # The class that one case lacks and the other has beyond it: no distance, one of them counts as right.
    assert found.cases[1].classes["lesion"] == {"dsc": 0, "iou": 0, "hd95": math.inf, "surface_dice": 0}
    assert found.cases[2].classes["lesion"]["dsc"] == 1
    assert math.isnan(found.cases[2].classes["lesion"]["hd95"])
    assert found.one_empty == {"organ": 0, "lesion": 1}
    assert found.notes == ()
    assert [found.classes[name]["hd95"].cases for name in ("organ", "lesion")] == [5, 3]
    dsc = np.array([scores["dsc"] for scores in expected])
    assert found.figures["dsc"] == bootstrap_mean(dsc.mean(axis=1), groups=groups)
    assert found.figures["dsc"] != bootstrap_mean(dsc.mean(axis=1))
    assert found.classes["lesion"]["dsc"] == bootstrap_mean(dsc[:, 1], groups=groups)
    np.testing.assert_array_equal(found.values("dsc"), dsc.mean(axis=1))
    assert [case.score for case in found.ranked()] == sorted(dsc.mean(axis=1))
    plain = json.loads(json.dumps(found.plain(), allow_nan=False))
    assert plain["mean"]["dsc"]["value"] == pytest.approx(dsc.mean())
    assert plain["classes"]["lesion"]["one_empty"] == 1
    assert plain["cases"][1]["classes"]["lesion"]["hd95"] is None
    assert plain["cases"][1]["group"] == "a"
    assert plain["settings"]["tolerance_mm"] == 1.5
    assert set(plain["definitions"]) == set(plain["mean"])


def test_a_perfect_network_in_3d(tmp_path):
    truth, _ = maps((12, 14, 18), 0)
    path = write(tmp_path / "t.h5", [labelled(0, truth, truth, (2.0, 1.0, 1.0))], label_classes=TABLE)
    found = evaluate(Levels(3), ShardSet(path, "test"))
    assert {name: interval.value for name, interval in found.figures.items()} == {
        "dsc": 1,
        "iou": 1,
        "hd95": 0,
        "surface_dice": 1,
    }
    assert math.isnan(found.figures["dsc"].low)  # of one case


@pytest.mark.parametrize("names", [("well", "ill"), ("well", "ill", "very ill")])
def test_a_classification(tmp_path, names):
    rng = np.random.default_rng(0)
    samples = []
    for i in range(24):
        pixels = np.full((1, 20, 18), rng.integers(0, 256), np.uint8)
        target = names[i % len(names)] if i != 5 else ""
        samples.append(Sample(pixels, 1, 0, 0, 255, (1.0, 1.0), f"{i}", split="test", target=target))
    path = write(tmp_path / "c.h5", samples, target_classes=names)
    found = evaluate(Mean(names), ShardSet(path, "test"))
    kept = [i for i in range(24) if i != 5]
    mean = torch.tensor([samples[i].normalised().mean() for i in kept])
    steps = torch.arange(len(names)) / (len(names) - 1)
    probabilities = (-((4 * (mean[:, None] - steps)) ** 2)).softmax(1).numpy()
    targets = np.array([i % len(names) for i in kept])
    overall = auc(probabilities[:, 1], targets == 1) if len(names) == 2 else auc_one_vs_rest(probabilities, targets)
    assert found.figures["accuracy"].value == pytest.approx((probabilities.argmax(1) == targets).mean())
    assert found.figures["auc"].value == pytest.approx(overall)
    assert found.figures["auc"].low < overall < found.figures["auc"].high
    assert found.notes == ("1 of 24 samples have no class and are left out",)
    case = found.cases[-1]
    assert case.labels == (names[23 % len(names)], names[probabilities[-1].argmax()])
    assert [case.classes[name]["probability"] for name in names] == pytest.approx(probabilities[-1].tolist(), rel=1e-5)
    assert case.score == case.classes[case.labels[0]]["probability"]
    plain = json.loads(json.dumps(found.plain(), allow_nan=False))
    assert plain["cases"][0]["truth"] == "well"
    assert set(plain["mean"]) == set(plain["definitions"]) == {"accuracy", "auc"}


def test_what_does_not_fit_is_one_sentence(shard, tmp_path):
    shards = ShardSet(shard[0], "test")
    volume = write(tmp_path / "v.h5", [labelled(0, *maps((12, 12, 12), 0))], label_classes=TABLE)
    bare = Sample(np.zeros((1, 20, 20), np.uint8), 1, 0, 0, 255, (1.0, 1.0), "x", split="test")
    plain = write(tmp_path / "p.h5", [bare])
    two = Sample(np.zeros((2, 20, 20), np.uint8), 1, 0, 0, 255, (1.0, 1.0), "x", split="test")
    for network, given, message in (
        (Levels(), ShardSet(volume, "test"), "must be 2D like the network's images, got 3D"),
        (Levels(), ShardSet(write(tmp_path / "2.h5", [two]), "test"), r"must have 1 channel\(s\) .*, got 2"),
        (Levels(), ShardSet(plain, "test"), "must hold label maps to evaluate a segmentation, found none"),
        (Levels(values=(0, 3, 71)), shards, "classes, 0 background, 3 organ, 71 lesion, got .*70 lesion"),
        (Levels(names=("background", "organ", "cyst")), shards, "classes, .*70 cyst, got .*70 lesion"),
        (Mean(), shards, "must say the class of its images to evaluate a classification"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(network, given)
    with pytest.raises(InputError, match="tolerance must be at least 0 mm, got -1"):
        evaluate(Levels(), shards, tolerance=-1)


def test_another_preprocessing_is_told(shard):
    found = evaluate(Levels(preprocessing={"preset": "chest-xray"}), ShardSet(shard[0], "test"))
    assert len(found.notes) == 1
    assert "was preprocessed by" in found.notes[0]


def test_a_class_that_no_case_has_is_told(tmp_path, phantoms, monkeypatch):
    truth, found = (np.minimum(part, 1) for part in maps((30, 25), 0))
    path = write(tmp_path / "t.h5", [labelled(0, truth, found)], label_classes=TABLE)
    seen = evaluate(Levels(), ShardSet(path, "test"))
    assert seen.classes["lesion"]["dsc"].value == 1
    told = "no case has a true pixel of lesion: DSC, IoU and surface Dice are 1 wherever that is not predicted"
    (note,) = seen.notes
    assert note.startswith(told)
    assert seen.plain()["notes"] == [note]
    # Predicted there, it is still one that no case has.
    wrong = write(tmp_path / "w.h5", [labelled(1, truth, 2 * found)], label_classes=TABLE)
    assert evaluate(Levels(), ShardSet(wrong, "test")).notes == (note,)
    # The command says so, and so does its page.
    monkeypatch.setattr("coverfast.report.sheet.DPI", 15)
    names, values = zip(*((c.name, c.value) for c in TABLE), strict=True)
    network = Network(UNet(2, 1, (8, 8, 8)), "segmentation", names, values, crop=16, preprocessing=PRESET)
    (tmp_path / "network.safetensors").write_bytes(network_bytes(network, {}))
    done = run(tmp_path, "--data", path, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert f"note: {told}" in done.output
    assert told in (tmp_path / "out" / "index.html").read_text()


def test_a_network_stays_where_it_is_unless_asked(shard, monkeypatch):
    network, asked = Levels(), []
    monkeypatch.setattr(network, "to", asked.append)
    evaluate(network, ShardSet(shard[0], "test"))
    assert asked == []
    evaluate(network, ShardSet(shard[0], "test"), device="cpu")
    assert asked == ["cpu"]


def test_a_label_map_is_decoded_once(shard, monkeypatch):
    decoded = []

    def spy(self, *given, original=Shard._label_values):
        decoded.append(given)
        return original(self, *given)

    monkeypatch.setattr(Shard, "_label_values", spy)
    assert len(evaluate(Levels(), ShardSet(shard[0], "test")).cases) == len(decoded) == 5


# --- pictures ---


def test_slices_are_those_with_most_errors_or_else_foreground():
    truth = np.zeros((10, 12, 14), int)
    truth[2:4, 5:7, 6] = 1
    image = np.zeros((1, 10, 12, 14))
    wrong = truth.copy()
    wrong[7, 1:4, 9:12] = 2
    wrong[7:9, 2, 10] = 2

    def shown(**labels):
        return [plane.index for plane in CaseView("x", image, (1.0,) * 3, **labels).planes]

    assert shown(prediction=wrong, truth=truth) == [7, 2, 10]
    assert shown(prediction=truth, truth=truth) == [2, 5, 6]
    assert shown(prediction=truth) == [2, 5, 6]
    assert shown() == [5, 6, 7]


def test_a_sheet_shows_classes_and_errors_where_they_are(monkeypatch):
    monkeypatch.setattr("coverfast.report.cases._FINE", 1)
    monkeypatch.setattr("coverfast.report.cases._FINEST", 24)
    truth = np.zeros((24, 24), int)
    truth[4:12, 4:12] = 1
    found = np.roll(truth, 8, axis=1)
    found[4:6, 4:6] = 2
    sheet = case_sheet(
        CaseView("x", np.full((1, 24, 24), 0.5), (1.0, 1.0), found, truth, "DSC 0"), ["back", "organ", "cyst"]
    )
    image, true, predicted, errors = (tile.rgb for tile in sheet.tiles)
    assert [tile.name for tile in sheet.tiles] == ["image", "truth", "prediction", "errors"]
    np.testing.assert_array_equal((true != image).any(-1), truth > 0)
    np.testing.assert_array_equal((predicted != image).any(-1), found > 0)
    np.testing.assert_array_equal((errors != image).any(-1), truth != found)
    # Missed, too much, wrong class, whatever the strength of the colour.
    for (row, column), colour in zip(((9, 7), (9, 16), (5, 5)), ERRORS.values(), strict=True):
        tint, full = errors[row, column] - image[row, column], np.array(colour) - image[row, column]
        np.testing.assert_allclose(tint / np.linalg.norm(tint), full / np.linalg.norm(full))
    texts = [text.get_text() for text in sheet.canvas.texts]
    assert {"organ", "cyst", "error: missed", "DSC 0"} <= set(texts)
    assert "back" not in texts


def test_an_outline_is_on_the_boundary():
    labels = np.zeros((9, 9), int)
    labels[2:7, 2:7] = 1
    shown = overlaid(np.zeros((9, 9, 3)), labels, np.ones((2, 3)), fill=0.25)[..., 0]
    assert shown[2, 2] == shown[2, 4] == 1
    assert shown[4, 4] == 0.25
    assert shown[1, 4] == 0
    fine = np.zeros((1000, 400), int)
    fine[200:800, 100:300] = 1
    shown = overlaid(np.zeros((1000, 400, 3)), fine, np.ones((2, 3)), fill=0.25)[500, :, 0]
    np.testing.assert_array_equal(shown[98:104], [0, 0, 1, 1, 0.25, 0.25])  # 1000 / 400 pixels wide


def test_anisotropic_slices_keep_their_shape():
    view = CaseView("x", np.zeros((1, 10, 40, 50)), (6.0, 1.0, 1.0), np.zeros((10, 40, 50), int))
    sheet = overlay_sheet(view, ["back", "organ"])
    sizes = [tile.rgb.shape[1] / tile.rgb.shape[0] for tile in sheet.tiles]
    assert sizes[::2] == pytest.approx([50 / 40, 50 / 60, 40 / 60], rel=0.02)
    assert all(tile.wide / tile.tall == pytest.approx(ratio) for tile, ratio in zip(sheet.tiles, sizes, strict=True))
    assert sheet.tiles[0].wide == pytest.approx(sheet.tiles[2].wide)  # both along x
    with pytest.raises(InputError, match="prediction must be on the grid of the image"):
        CaseView("x", np.zeros((1, 5, 5)), (1.0, 1.0), np.zeros((5, 6), int))


# --- the command ---


@pytest.fixture
def phantoms(tmp_path):
    """A run folder with a network, and a shard of phantoms whose classes it has."""
    torch.manual_seed(0)
    network = Network(UNet(2, 1, (8, 8, 8)), "segmentation", CLASSES_2D, crop=48, preprocessing=PRESET)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "network.safetensors").write_bytes(network_bytes(network, {}))
    samples = []
    for index in range(4):
        made = phantom(2, (56, 64), seed=0, index=index)
        pixels = (255 * made.image[None]).round().astype(np.uint8)
        split = "test" if index else "train"
        samples.append(Sample(pixels, 1, 0, 0, 255, (1.0, 1.0), f"p{index}", split=split, labels=made.labels))
    table = [LabelClass(*pair) for pair in enumerate(CLASSES_2D)]
    write(tmp_path / "p.h5", samples, label_classes=table)
    return tmp_path / "run", tmp_path / "p.h5", network


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--device", "cpu"])


def test_the_command(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr("coverfast.report.sheet.DPI", 15)
    folder, data, network = phantoms
    done = run(folder, "--data", data, "--out", tmp_path / "out", "--tolerance", 2)
    assert done.exit_code == 0, done.output
    names = ["best.png", "index.html", "median.png", "metrics.json", "worst.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    expected = evaluate(network.eval(), ShardSet(data, "test"), tolerance=2).plain()
    assert {key: found[key] for key in expected} == json.loads(json.dumps(expected))
    sha256 = hashlib.sha256((folder / "network.safetensors").read_bytes()).hexdigest()
    assert found["network"]["sha256"] == sha256
    assert found["data"]["content_sha256"] == ShardSet(data, "test").content_hash
    assert found["data"]["split"] == "test"
    assert {"coverfast", "torch", "commit", "device"} <= set(found["provenance"])
    for text in ("mean", *CLASSES_2D[1:], f"{found['mean']['dsc']['value']:.3f}", str(tmp_path / "out" / "index.html")):
        assert text in done.output
    page = (tmp_path / "out" / "index.html").read_text()
    worst = min(found["cases"], key=lambda case: case["dsc"])
    assert f"{worst['source']}: mean DSC {worst['dsc']:.3f}" in page
    assert 'src="worst.png"' in page


def test_too_little_memory_is_a_sentence(phantoms, tmp_path, monkeypatch):
    def forward(self, windows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Network, "forward", forward)
    done = run(phantoms[0], "--data", phantoms[1], "--out", tmp_path / "out", "--batch", 7)
    assert isinstance(done.exception, InputError)
    assert str(done.exception) == (
        f"a sample of {phantoms[1]} does not fit into the memory of cpu, 7 window(s) of 48x48 pixels at a time; use a "
        "smaller --batch"
    )
    # Another fault stays what it is.
    monkeypatch.setattr(Network, "forward", lambda self, windows: windows @ windows[..., :5])
    assert type(run(phantoms[0], "--data", phantoms[1], "--out", tmp_path / "out").exception) is RuntimeError


def test_pictures_are_made_as_the_figures_were(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr("coverfast.report.sheet.DPI", 15)
    sizes, real = [], Network.forward
    monkeypatch.setattr(Network, "forward", lambda self, windows: sizes.append(len(windows)) or real(self, windows))
    assert run(phantoms[0], "--data", phantoms[1], "--out", tmp_path / "out", "--batch", 1).exit_code == 0
    assert set(sizes) == {1}


def test_the_command_without_matplotlib(phantoms, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(tmp_path)
    done = run(phantoms[0] / "network.safetensors", "--data", phantoms[1], "--split", "train")
    assert done.exit_code == 0, done.output
    assert "note: no pictures: " in done.output
    assert [p.name for p in tmp_path.glob("runs/*-evaluate/*")] == ["metrics.json"]


def test_the_command_on_classes(tmp_path, monkeypatch):
    monkeypatch.setattr("coverfast.report.sheet.DPI", 15)
    network = Network(UNet(2, 1, (8, 8, 8)), "classification", ("well", "ill"), crop=16, preprocessing=PRESET)
    (tmp_path / "network.safetensors").write_bytes(network_bytes(network, {}))
    samples = [
        Sample(np.full((1, 20, 18), 60 * i, np.uint8), 1, 0, 0, 255, (1.0, 1.0), f"{i}", split="val", target=target)
        for i, target in enumerate(("well", "ill"))
    ]
    data = write(tmp_path / "c.h5", samples, target_classes=("well", "ill"))
    done = run(tmp_path, "--data", data, "--split", "val", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "best.png",
        "index.html",
        "metrics.json",
        "worst.png",
    ]
    assert "AUC of ill" in done.output
    assert isinstance(run(tmp_path, "--data", data).exception, InputError)  # no sample in the split test
