"""Studies of transfer with several methods: equal treatment, names, tables of a method, and a kill between them."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_runs import (
    COVER,
    FINETUNE,
    PRETRAIN,
    PROBE,
    SHORT,
    TINY,
    Reached,
    go,
    settings,
    short_of_training,
    without_pictures,
)

from coverfast import InputError
from coverfast.study.folder import Study
from coverfast.study.progress import Moment, Watch
from coverfast.study.runs import Scores
from coverfast.study.settings import RetestSettings, TransferSettings, label
from coverfast.study.tables import transfer_rows
from coverfast.study.transfer import compare, pretrainings, transfer, trials, works
from coverfast.training.checkpoints import Checkpoints
from coverfast.training.settings import OF_COVER

BOTH = {"methods": ["cover", "gvsl"]}
#: A method of a user's own.
MINE = """
from coverfast.checks import InputError
from coverfast.methods.gvsl import GVSL

class Mine(GVSL):
    def __init__(self, *more, broken=False, **options):
        super().__init__(*more, **options)
        if broken:
            raise InputError("it is broken")
"""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)


def written(path: Path, *, pretrain: str = PRETRAIN, more: str = f"[pretrain.cover]\n{COVER}") -> Path:
    lines = [f"{name} = {json.dumps(value)}" for name, value in SHORT.items()]
    path.write_text("\n".join(lines) + pretrain + more + FINETUNE + PROBE)
    return path


# --- names, order, figures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("gvsl", "gvsl"),
        ("nets/mine.py:Mine", "mine-Mine"),
        ("/a b/my net.v2.py:Mine", "my-net-v2-Mine"),
        ("C:\\nets\\mine.py:Mine", "mine-Mine"),
        ("package.module:Class", "package-module-Class"),
        ("größe.py:Öl", "gr-e-l"),
    ],
)
def test_names_of_methods_are_fit_for_folders(method: str, name: str) -> None:
    assert label(method) == name


def test_every_method_is_pretrained_once_and_trained_in_all_ways() -> None:
    study = Study.open(TransferSettings, Path("nowhere"), {**TINY, **BOTH, "seeds": 2, "cases": [4, 8]})
    todo = works(study)
    assert [work[:3] for work in todo[:2]] == [(name, name, 600) for name in ("pretraining-cover", "pretraining-gvsl")]
    assert len(todo) == 2 + 3 * 2 * 2 * 2 == len({work.name for work in todo})
    assert {t.init for t in trials(study.settings)} == {"scratch", "cover", "gvsl"}  # type: ignore[arg-type]


def test_single_method_keeps_the_names_of_old() -> None:
    for methods in ((), ("gvsl",), ("nets/mine.py:Mine",)):
        s = settings(TransferSettings, methods=methods)
        assert s.inits == ("scratch", "pretrained")
        assert pretrainings(s) == {"pretrained": "pretraining"}
    assert s.pretrained["pretrained"] == str(Path("nets/mine.py").absolute()) + ":Mine"


def test_methods_are_compared_with_scratch_and_with_one_another() -> None:
    s = settings(TransferSettings, methods=["cover", "gvsl"], cases=[4, 8], seeds=2)
    rng, gain = np.random.default_rng(4), {"scratch": 0.0, "cover": 0.2, "gvsl": 0.1}
    base = {(k, n): rng.uniform(0.4, 0.6, 16) for k in (0, 1) for n in (4, 8)}
    scores = {t: Scores(["a"] * 16, [""] * 16, base[t.seed, t.cases] + gain[t.init], {}) for t in trials(s)}
    arms, gains = compare(scores, s)
    assert len(arms) == 3 * 2 * 2
    pairs = [("cover", "scratch"), ("gvsl", "scratch"), ("gvsl", "cover")]
    assert [(g.init, g.minus) for g in gains] == pairs * 4
    for g in gains:
        assert g.dsc[:3] == pytest.approx([gain[g.init] - gain[g.minus]] * 3)
    result = {
        "arms": [{**a._asdict(), "dsc": a.dsc.plain()} for a in arms],
        "differences": [{**g._asdict(), "dsc": g.dsc.plain(), "intervals_apart": g.apart} for g in gains],
    }
    headings, rows = transfer_rows(result)
    assert headings[2:] == ["weights", "DSC %", "minus scratch, points", "minus cover, points"]
    assert [row[2] for row in rows] == ["scratch", "cover", "gvsl"] * 4
    assert [row[4:] for row in rows[-3:]] == [
        ["", ""],
        ["+20.0 [+20.0, +20.0]", ""],
        ["+10.0 [+10.0, +10.0]", "-10.0 [-10.0, -10.0]"],
    ]


# --- settings -----------------------------------------------------------------------------------------------------


def test_table_of_a_method_lies_over_the_common_one(tmp_path: Path) -> None:
    config = written(tmp_path / "c.toml", more="lr = 1e-3\n[pretrain.gvsl]\nlr = 1e-2\n")
    study = Study.open(TransferSettings, tmp_path / "out", BOTH, config)
    for each in (study, again(study)):
        assert [each.pretraining(m)["lr"] for m in ("cover", "gvsl")] == [1e-3, 1e-2]
        assert [each.pretraining(m)["method"] for m in ("cover", "gvsl")] == ["cover", "gvsl"]
        assert each.pretraining("gvsl")["batch"] == 2
        assert each.pretraining("") == {k: v for k, v in each.pretraining("cover").items() if k != "method"}


def again(study: Study) -> Study:
    study.keep()
    return Study.open(type(study.settings), study.folder, {})


@pytest.mark.parametrize("setting", ["window = 3", "rotation = 0.1"])
def test_setting_of_one_method_among_those_of_all_is_refused_at_once(tmp_path: Path, setting: str) -> None:
    config = written(tmp_path / "c.toml", more=f"{setting}\n")
    words = rf"^gvsl cannot pretrain: .*{setting[:6]}.* goes into its own table of --config, such as \[pretrain.gvsl\]"
    with pytest.raises(InputError, match=words):
        Study.open(TransferSettings, tmp_path / "out", BOTH, config)
    written(config, more=f"[pretrain.cover]\n{setting}\n")
    Study.open(TransferSettings, tmp_path / "out", BOTH, config)


def test_methods_that_would_pretrain_other_networks_are_refused(tmp_path: Path) -> None:
    config = written(tmp_path / "c.toml", more="[pretrain.cover]\ngroups = [1, 1, 1]\n")
    with pytest.raises(InputError, match="channels must be the same for all methods, got "):
        go(TransferSettings, tmp_path / "out", config, **BOTH)
    assert not (tmp_path / "out").exists()


def test_study_from_before_there_were_methods_goes_on(tmp_path: Path) -> None:
    study = Study.open(TransferSettings, tmp_path / "out", TINY)
    study.keep()
    lines = study.file.read_text().splitlines()
    study.file.write_text("\n".join(line for line in lines if not line.startswith("methods")))
    for flags in ({}, {"methods": "cover"}):
        assert Study.open(TransferSettings, tmp_path / "out", flags).settings == study.settings
    with pytest.raises(InputError, match=r"methods must be cover as in .*study.toml, got cover,gvsl; leave it out"):
        Study.open(TransferSettings, tmp_path / "out", BOTH)


def test_retest_takes_its_method_from_the_table(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[pretrain]\nmethod = 'gvsl'\n")
    assert Study.open(RetestSettings, tmp_path / "out", TINY, tmp_path / "c.toml").pretraining("")["method"] == "gvsl"
    (tmp_path / "c.toml").write_text("[pretrain.gvsl]\nlr = 1.0\n")
    with pytest.raises(InputError, match=r"the table \[pretrain.gvsl\] must be of a method of this study"):
        Study.open(RetestSettings, tmp_path / "out", TINY, tmp_path / "c.toml")


def test_method_that_cannot_be_made_is_refused_before_the_first_is_pretrained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_training(monkeypatch)
    (tmp_path / "mine.py").write_text(MINE)
    flags = {"methods": ["cover", f"{tmp_path / 'mine.py'}:Mine"]}
    for broken in (True, False):
        args = f"method_args = ['broken={broken}']"
        config = written(tmp_path / "c.toml", more=f"[pretrain.cover]\n{COVER}[pretrain.mine-Mine]\n{args}\n")
        with pytest.raises(InputError if broken else Reached, match="it is broken" if broken else None):
            go(TransferSettings, tmp_path / "out", config, **flags)
        assert (tmp_path / "out").exists() != broken
    with pytest.raises(InputError, match="gvls"):
        go(TransferSettings, tmp_path / "new", written(tmp_path / "c.toml"), methods=["cover", "gvls"])
    assert not (tmp_path / "new").exists()


# --- a study ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Moment]]:
    """A study of two methods that was stopped while it pretrained the second one, and went on."""
    folder = tmp_path_factory.mktemp("methods")
    study = Study.open(TransferSettings, folder / "out", BOTH, written(folder / "c.toml"))
    told, save = list[Moment](), Checkpoints.save

    def save_and_die(self: Checkpoints, *more: Any, **options: Any) -> Any:
        path = save(self, *more, **options)
        if "pretraining-gvsl" in str(path):
            raise KeyboardInterrupt
        return path

    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        with patch.context() as dying:
            dying.setattr(Checkpoints, "save", save_and_die)
            with pytest.raises(KeyboardInterrupt):
                transfer(study, Watch(works(study), note=lambda text: None))
        shutil.copytree(study.folder / "runs" / "pretraining-cover", folder / "cover")
        again = Study.open(TransferSettings, folder / "out", {})
        transfer(again, Watch(works(again), told.append, note=lambda text: None))
    return study.folder, told


def config_of(out: Path, run: str) -> dict[str, Any]:
    found = tomllib.loads((out / "runs" / run / "config.toml").read_text())
    return {name: value for name, value in found.items() if not isinstance(value, dict)} | {"run": ""}


def changed(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


def test_arms_differ_in_nothing_but_the_method(killed: tuple[Path, list[Moment]]) -> None:
    out, _ = killed
    cover, gvsl = (config_of(out, f"pretraining-{method}") for method in ("cover", "gvsl"))
    assert changed(cover, gvsl) == {"method", *OF_COVER}
    assert not set(gvsl) & set(OF_COVER)
    assert (cover["method"], gvsl["method"]) == ("cover", "gvsl")
    for mode in ("fine-tuned", "linear"):
        scratch, *both = (config_of(out, f"{init}-{mode}-2-cases-seed-0") for init in ("scratch", "cover", "gvsl"))
        assert changed(*both) == {"init"}
        assert changed(scratch, both[0]) == {"init", "scratch", "channels"}
        for method, found in zip(("cover", "gvsl"), both, strict=True):
            assert found["init"] == str(out / f"runs/pretraining-{method}/backbone.safetensors")


def test_stopped_study_goes_on_with_the_method_it_was_at(killed: tuple[Path, list[Moment]]) -> None:
    out, told = killed
    for file in (out.parent / "cover").glob("*.*"):
        assert (out / "runs" / "pretraining-cover" / file.name).stat().st_mtime_ns == file.stat().st_mtime_ns
    assert "[resumed]" in (out / "runs" / "pretraining-gvsl" / "config.toml").read_text()
    assert (told[0].name, told[0].number, told[0].total) == ("pretraining-gvsl", 2, 8)
    assert told[0].iteration == 3
    assert told[-1].share == 1.0


def test_study_of_methods_leaves_its_tables_and_pictures(killed: tuple[Path, list[Moment]]) -> None:
    out, _ = killed
    result = json.loads((out / "transfer.json").read_text())
    inits, modes = ("scratch", "cover", "gvsl"), ("fine-tuned", "linear")
    assert [(a["init"], a["mode"]) for a in result["arms"]] == [(init, mode) for mode in modes for init in inits]
    means = {(a["init"], a["mode"]): a["dsc"]["value"] for a in result["arms"]}
    assert len(result["differences"]) == 3 * 2
    for d in result["differences"]:
        assert d["dsc"]["value"] == pytest.approx(means[d["init"], d["mode"]] - means[d["minus"], d["mode"]])
    assert result["settings"]["methods"] == ["cover", "gvsl"]
    assert result["tables"]["pretrain.cover"]["window"] == 3
    assert "| linear | 2 | gvsl |" in (out / "transfer.md").read_text()
    for name in ("transfer.png", "convergence.png", "example.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
