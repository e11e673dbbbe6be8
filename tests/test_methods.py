"""Methods by name: GVSL and one of the user's own through the whole of training, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import TINY, make_shard, resume, same, weights, without_pictures
from typer.testing import CliRunner

from coverfast.backbones import load_backbone
from coverfast.checks import InputError
from coverfast.cli.main import app
from coverfast.export.facts import Facts
from coverfast.methods.choosing import method_class
from coverfast.training import plan as library
from coverfast.training.restore import restore_method
from coverfast.training.runs import Run
from coverfast.training.settings import Settings, preset_settings, resolve

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
#: What GVSL and a method of one's own take of a tiny run: nothing that is COVER's.
OF_ALL = {name: value for name, value in TINY.items() if name not in ("groups", "window")}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shard(tmp_path_factory.mktemp("methods") / "five.h5", count=5, size=40)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The example of the page, as a file."""
    code = re.search(r"```python\n(# restoration\.py\n.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert code is not None
    path = tmp_path_factory.mktemp("own") / "restoration.py"
    path.write_text(code[1], encoding="utf-8")
    return f"{path}:Restoration"


def ready(shard: Path, run: Path, **flags: Any) -> library.Pretraining:
    found = library.plan(
        {**OF_ALL, "data": str(shard), "run": str(run), "preset": "small-2d", "iterations": 4, **flags}
    )
    found.on_note = lambda text: None
    return found


def start(shard: Path, run: Path, **flags: Any) -> Run:
    return without_pictures(ready(shard, run, **flags)).start()


def records(run: Run) -> Iterator[dict[str, Any]]:
    return map(json.loads, run.metrics.read_text(encoding="utf-8").splitlines())


def flags_of(name: str, own: str) -> dict[str, Any]:
    return {"gvsl": {"method": "gvsl"}, "own": {"method": own, "method_args": ["weight=2.0"]}}[name]


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gvsl", "own"])
def test_a_run_goes_on_with_the_same_bits(name: str, shard: Path, own: str, tmp_path: Path) -> None:
    flags = flags_of(name, own) | {"val": str(shard), "val_every": 2, "val_samples": 3, "monitor_every": 1}
    whole = start(shard, tmp_path / "whole", **flags)
    part = start(shard, tmp_path / "part", **flags, **{"iterations": 2})
    resume(part, iterations=4).start()
    assert same(weights(whole), weights(part))
    a, b = list(records(whole)), list(records(part))
    figures = [name for name in a[0] if re.match(r"loss|ncc|displacement", name)]
    assert {"gvsl": "ncc", "own": "loss_restore"}[name] in figures
    assert [[r[f] for f in figures] for r in a] == [[r[f] for f in figures] for r in b]
    assert a[-1]["val_loss"] == b[-1]["val_loss"] > 0
    assert (a[-1]["loss"] == pytest.approx(2 * a[-1]["loss_restore"])) == (name == "own")


@pytest.mark.parametrize("name", ["gvsl", "own"])
def test_parts_of_a_batch_are_the_whole_of_it(name: str, shard: Path, own: str, tmp_path: Path) -> None:
    runs = [start(shard, tmp_path / str(n), **flags_of(name, own), accumulate=n, batch=4, lr=1e-4) for n in (1, 2)]
    losses = [[r["loss"] for r in records(run)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] != losses[0][1]


def test_a_volume(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "volumes.h5", ndim=3, count=3, size=(36, 32, 40))
    run = start(shard, tmp_path / "run", method="gvsl", preset="small-3d", iterations=2, batch=1)
    assert all(r["ncc"] > 0 for r in records(run))
    assert load_backbone(run.backbone, tell=None).ndim == 3


def test_a_small_network_and_any_backbone(shard: Path, tmp_path: Path) -> None:
    """GVSL has no groups that tell how many levels there are; a network may end above the pixel."""
    run = start(shard, tmp_path / "run", method="gvsl", channels=(8, 8, 16), iterations=1)
    assert load_backbone(run.backbone, tell=None).strides == (4, 2, 1)
    flags = {k: v for k, v in OF_ALL.items() if k != "channels"}
    foreign = {
        "backbone": f"{Path(__file__).with_name('own_network.py')}:Small",
        "method": "gvsl",
        "iterations": 2,
        "preset": "small-2d",
    }
    found = library.plan({**flags, **foreign, "data": str(shard), "run": str(tmp_path / "foreign")})
    found.on_note = lambda text: None
    assert [r["skipped"] for r in records(without_pictures(found).start())] == [0, 0]


@pytest.mark.parametrize("name", ["gvsl", "own"])
def test_a_run_is_drawn_and_its_checkpoint_shown(
    name: str, shard: Path, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coverfast.report.sheet.DPI", 15)
    notes: list[str] = []
    found = ready(shard, tmp_path / "run", **flags_of(name, own))
    found.on_note = notes.append
    run = found.start()
    assert not [n for n in notes if "no pictures" in n]
    page = (run.report / "index.html").read_text(encoding="utf-8")
    assert "overview.png" in page
    assert {"gvsl": "brought over", "own": "restoration"}[name] in page + json.dumps(page)

    path = run.checkpoints.paths()[-1]
    restored = restore_method(path, own_method=own if name == "own" else None)
    assert type(restored.method).__name__ == {"gvsl": "GVSL", "own": "Restoration"}[name]
    state = torch.load(path, weights_only=True)["method"]
    kept = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    assert same(kept, restore_method(path).backbone.state_dict())
    if name == "own":
        assert restore_method(path).method is None  # nothing is imported that a file names


def test_two_images_are_matched_on_the_command_line(shard: Path, tmp_path: Path) -> None:
    run = start(shard, tmp_path / "run", method="gvsl", iterations=1)
    images = []
    for index in range(3):
        images.append(str(tmp_path / f"image-{index}.npy"))
        np.save(images[-1], np.random.default_rng(index).random((40, 36 + index), np.float32))
    runner = CliRunner()
    found = runner.invoke(app, ["visualize", str(run.folder), *images, "--out", str(tmp_path / "seen")])
    assert found.exit_code == 0, found.output
    assert found.output.count("Local NCC") == 2
    assert len(list((tmp_path / "seen").glob("*/index.html"))) == 2
    alone = runner.invoke(app, ["visualize", str(run.folder), images[0], "--out", str(tmp_path / "alone")])
    assert isinstance(alone.exception, InputError)
    assert "images must be at least 2 for a method that learns from pairs, got 1" in str(alone.exception)


_FAULTS = """
from coverfast.methods.gvsl import GVSL


class Mute(GVSL):
    def figures(self, sums):
        return {}


class Text(GVSL):
    def figures(self, sums):
        return {"loss": 1.0, "note": "fine"}


class Greedy(GVSL):
    def figures(self, sums):
        return {"loss": 1.0, "iteration": 77.0}


class Blind(GVSL):
    def pictures(self, batch):
        raise ZeroDivisionError("no paint")
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Mute", "figures of a method must hold 'loss', got {}"),
        ("Text", "figures of a method must be numbers, got 'fine' for 'note'"),
        ("Greedy", "figures of a method must have names that are free, got 'iteration'"),
    ],
)
def test_figures_that_are_none_are_refused_before_the_start(
    name: str, message: str, shard: Path, tmp_path: Path
) -> None:
    (tmp_path / "faults.py").write_text(_FAULTS)
    with pytest.raises(InputError, match=re.escape(message)):
        start(shard, tmp_path / "run", method=f"{tmp_path / 'faults.py'}:{name}")
    assert not (tmp_path / "run").exists()


def test_pictures_that_fail_leave_the_training_alone(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "faults.py").write_text(_FAULTS)
    notes: list[str] = []
    found = ready(shard, tmp_path / "run", method=f"{tmp_path / 'faults.py'}:Blind", report_every=2)
    found.on_note = notes.append
    run = found.start()
    assert run.backbone.exists()
    assert [n for n in notes if "no pictures" in n and "no paint" in n]


def test_a_file_of_code_is_one_module(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class made twice would be two classes, which cannot go to another process; files may share a name."""
    path = Path(own.rpartition(":")[0])
    assert method_class(own) is method_class(own)
    other = tmp_path / path.name
    other.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    there = method_class(f"{other}:Restoration")
    assert there is not method_class(own)
    assert there.__module__ != method_class(own).__module__


def test_code_in_the_current_folder_is_found_from_any_other(
    shard: Path, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "near.py").write_text(Path(own.rpartition(":")[0]).read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path / "here")
    run = start(shard, tmp_path / "run", method="near.py:Restoration", iterations=1)
    monkeypatch.chdir(tmp_path)
    assert resume(run, iterations=2).settings.method == f"{tmp_path / 'here' / 'near.py'}:Restoration"


# --- settings ---------------------------------------------------------------------------------------------------------


def test_presets_of_gvsl_are_the_papers() -> None:
    paper = preset_settings("gvsl-3d")
    assert (paper.method, paper.batch, paper.crop, paper.optimizer, paper.lr, paper.iterations) == (
        *("gvsl", 2, (128,), "adam", 1e-4, 200_000),
    )
    assert paper.channels == preset_settings("paper-3d").channels


@pytest.mark.parametrize(
    ("flags", "preset"),
    [
        ({"method": "gvsl"}, "small-gvsl-2d"),
        ({"preset": "small-gvsl"}, "small-gvsl-2d"),
        ({"preset": "gvsl"}, "gvsl-2d"),
        ({"preset": "small"}, "small-2d"),
        ({}, "small-2d"),
    ],
)
def test_presets_by_method_and_shard(flags: dict[str, str], preset: str, shard: Path, tmp_path: Path) -> None:
    sizes = {"channels": (8, 8, 8, 16, 16), "crop": (32,), "batch": 2, "device": "cpu", "run": str(tmp_path / "run")}
    found = library.plan({**sizes, "data": str(shard), **flags})
    assert found.settings.preset == preset
    assert found.settings.method == ("gvsl" if "gvsl" in preset else "cover")
    assert any(preset in note for note in found.notes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "gvsl", "window": (9,)}, "window is a setting of the method cover, .* by --method-args"),
        ({"method": "gvsl", "rotation": 0.1}, "rotation is a setting of the method cover, but the method is gvsl"),
        ({"method": "gvls"}, r"method must be cover, gvsl, or code of your own: .*, got 'gvls'; did you mean 'gvsl'"),
        ({"method_args": ["window=3"]}, "method_args are for other methods than cover"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve("small-2d", given)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"method": "gvsl", "method_args": ["sharp=2"]},
            "arguments of the method gvsl, it has window, smooth, restore",
        ),
        ({"method": "gvsl", "method_args": ["window"]}, "method_args must be KEY=VALUE, got 'window'"),
        ({"method": "gvsl", "method_args": ["window=4"]}, "window must be an odd int of at least 3, got 4"),
        (
            {"method": "nowhere.py:Method"},
            "method must be code that can be imported, but there is no file .*nowhere.py",
        ),
        (
            {"method": "json:JSONDecoder"},
            r"method must be a class derived from coverfast.methods.Pretext, but json:JSON",
        ),
        ({"method": "coverfast.methods:Prextext"}, r"coverfast.methods has no 'Prextext'; did you mean 'Pretext'"),
    ],
)
def test_methods_that_cannot_be_are_refused(flags: dict[str, Any], message: str, shard: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        ready(shard, tmp_path / "run", **flags)
    assert not (tmp_path / "run").exists()


def test_a_class_that_fails_is_told_in_a_sentence(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "from coverfast.methods.gvsl import GVSL\n\n\nclass Broken(GVSL):\n"
        "    def __init__(self, backbone, **common):\n"
        "        raise ZeroDivisionError('no luck')\n"
    )
    with pytest.raises(InputError, match=r"must be called as Broken.*but it fails: no luck"):
        ready(shard, tmp_path / "run", method=f"{tmp_path / 'broken.py'}:Broken")


def test_one_sample_is_no_pair(tmp_path: Path) -> None:
    one = make_shard(tmp_path / "one.h5", count=1)
    with pytest.raises(InputError, match=r"data must have at least 2 samples for the pairs of gvsl, got 1"):
        ready(one, tmp_path / "run", method="gvsl")
    several = make_shard(tmp_path / "several.h5", count=3)
    with pytest.raises(InputError, match=r"val must have at least 2 samples for the pairs of gvsl, got 1"):
        ready(several, tmp_path / "run", method="gvsl", val=str(one))


def test_code_of_ones_own_may_move_but_is_told_when_it_changes(shard: Path, own: str, tmp_path: Path) -> None:
    path = Path(own.rpartition(":")[0])
    here = tmp_path / path.name
    here.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    run = start(shard, tmp_path / "run", method=f"{here}:Restoration", iterations=1)
    assert Run.open(str(run.folder), Settings)[1].method == f"{here}:Restoration"
    there = tmp_path / "elsewhere.py"
    here.rename(there)
    with pytest.raises(InputError, match="there is no file"):
        resume(run, iterations=2)
    there.write_text(there.read_text(encoding="utf-8") + "# another line\n", encoding="utf-8")
    again = resume(run, iterations=2, method=f"{there}:Restoration")
    assert any("the code of the method was" in note for note in again.notes)
    with pytest.raises(InputError, match="method cannot change on resume"):
        resume(run, iterations=2, method="gvsl")


def test_what_is_kept_names_no_place(shard: Path, own: str, tmp_path: Path) -> None:
    run = start(shard, tmp_path / "run", method=own, method_args=["weight=2.0"], iterations=1)
    settings = {"method": "/home/mueller/net.py:M", "method_args": ["weight=2.0", "atlas='/home/mueller/a'", "on=True"]}
    kept, left = Facts.of({"settings": settings}, "a file")
    assert kept.settings == {"method": "own", "method_args": ["weight=2.0", "on=True"]}
    assert not left
    assert b"weight=2.0" in run.backbone.read_bytes()
    assert str(Path(own).parent).encode() not in run.backbone.read_bytes()
    assert b"restoration.py:Restoration" in run.backbone.read_bytes()


def test_arguments_of_ones_own_are_told(shard: Path, own: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"arguments of the method .*, it has weight; got 'wieght'"):
        ready(shard, tmp_path / "run", method=own, method_args=["wieght=2"])


def test_a_run_is_called_by_its_method() -> None:
    assert resolve("small-2d", {}).label == "small-2d"
    assert resolve("small-gvsl-3d", {}).label == "small-gvsl-3d"
    assert resolve("paper-2d", {"method": "gvsl"}).label == "gvsl-paper-2d"
    assert resolve("small-gvsl-2d", {"method": "cover"}).label == "cover-small-gvsl-2d"
    assert resolve("small-2d", {"method": "/somewhere/net.py:Mine"}).label == "mine-small-2d"


def test_names() -> None:
    assert [method_class(name).__name__ for name in ("cover", "gvsl")] == ["Cover", "GVSL"]
