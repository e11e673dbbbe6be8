"""The examples that train in other frameworks run as a user runs them, and the page shows the lines that they add."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from coverfast.backbones import UNet
from coverfast.backbones.files import backbone_bytes
from coverfast.phantom import phantom

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"MONAI": "examples/monai_finetune.py", "nnU-Net": "examples/nnunet_init.py"}
ALL_LOADED = re.compile(
    r"^\S+backbone.safetensors: [1-9]\d* matched, 0 missing, 0 unexpected, 0 reshaped$", re.MULTILINE
)

needs_monai = pytest.mark.skipif(importlib.util.find_spec("monai") is None, reason="needs monai")
needs_nnunet = pytest.mark.skipif(
    importlib.util.find_spec("nnunetv2") is None, reason="needs nnunetv2, whose dependencies are too many for an extra"
)


def run(name: str, *options: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, on one thread."""
    command = [sys.executable, str(ROOT / SCRIPTS[name]), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def load(name: str) -> ModuleType:
    """The script as a module, its main not run."""
    spec = importlib.util.spec_from_file_location(Path(SCRIPTS[name]).stem, ROOT / SCRIPTS[name])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_backbone(folder: Path, ndim: int) -> Path:
    """A file of random weights."""
    path = folder / "backbone.safetensors"
    path.write_bytes(backbone_bytes(UNet(ndim, 1, (8, 8, 8, 16, 16, 16, 8, 8, 8)), config={}, preprocessing={}))
    return path


@needs_monai
@pytest.mark.parametrize("ndim", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_monai_trains_from_both(ndim: int, tmp_path: Path) -> None:
    """In 2D with a backbone that the script pretrains itself."""
    source = ["--pretrain-iterations", 2] if ndim == 2 else ["--backbone", small_backbone(tmp_path, 3)]
    length = ["--iterations", 12, "--cases", 2, "--held-out", 1]
    done = run("MONAI", "--ndim", ndim, *source, *length, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(ALL_LOADED.findall(done.stdout)) == 1
    found = re.findall(r"^(\w+) +loss (\S+) at first, (\S+) at last \(means of five\), Dice (\S+)$", done.stdout, re.M)
    assert [name for name, *_ in found] == ["scratch", "pretrained"]
    for _, first, last, dice in found:
        assert float(last) < 0.95 * float(first)
        assert 0 < float(dice) <= 1


@needs_monai
def test_monai_refuses_a_backbone_for_other_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence with what is expected and what was given."""
    options = ["--backbone", small_backbone(tmp_path, 3), "--cases", 1, "--held-out", 1]
    monkeypatch.setattr(sys, "argv", [SCRIPTS["MONAI"], *map(str, options)])
    with pytest.raises(SystemExit) as refusal:
        load("MONAI").main()
    assert refusal.value.code == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert "the backbone must be one for 2D images of 1 channel" in sentence
    assert sentence.endswith("got one for 3D, 1 and 1")


@needs_monai
@pytest.mark.parametrize("ndim", [2, 3])
def test_monai_reads_files_as_shards_hold_them(ndim: int, tmp_path: Path) -> None:
    """Range and order of the axes are those of pretraining, for images and label maps."""
    example = load("MONAI")
    files = example.write(tmp_path / "files", ndim, [3])
    sample = example.transforms(ndim)(files[0])
    subject = phantom(ndim, example.SIZE[ndim], seed=example.SEED, index=3)
    np.testing.assert_allclose(sample["image"][0].numpy(), subject.image, atol=0.51 / 255)
    np.testing.assert_array_equal(sample["label"][0].numpy(), subject.labels)


@needs_nnunet
def test_nnunet_trains_from_both(tmp_path: Path) -> None:
    """From plans to pseudo Dice."""
    length = ["--epochs", 2, "--iterations", 5, "--val-iterations", 1, "--cases", 2, "--held-out", 1]
    done = run("nnU-Net", "--backbone", small_backbone(tmp_path, 2), *length, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(ALL_LOADED.findall(done.stdout)) == 1
    found = re.findall(r"^(\w+Trainer) +loss +(\S+) +(\S+) +pseudo Dice (\S+) (\S+)$", done.stdout, re.M)
    assert [name for name, *_ in found] == ["ScratchTrainer", "CoverfastTrainer"]
    for _, first, last, *dice in found:
        assert float(last) < 0.95 * float(first)
        assert all(0 <= float(x) <= 1 for x in dice)


@needs_nnunet
def test_nnunet_can_predict_with_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prediction names the arguments, and builds the network with as many outputs as there are classes."""
    example = load("nnU-Net")
    build = example.CoverfastTrainer.build_network_architecture
    theirs = example.nnUNetTrainerNoDeepSupervision.build_network_architecture
    assert list(inspect.signature(build).parameters) == list(inspect.signature(theirs).parameters)
    monkeypatch.setenv("COVERFAST_BACKBONE", str(small_backbone(tmp_path, 2)))
    logits = build(None, None, 1, 5, enable_deep_supervision=False)(torch.zeros(1, 1, 32, 48))
    assert logits.shape == (1, 5, 32, 48)


@pytest.mark.parametrize(("name", "package"), [("MONAI", "monai"), ("nnU-Net", "nnunetv2")])
def test_an_absent_package_is_one_sentence(name: str, package: str, tmp_path: Path) -> None:
    """With the command that installs it."""
    code = f"""
        import runpy, sys
        class Hidden:
            def find_spec(self, name, path=None, target=None):
                if name == {package!r}:
                    raise ModuleNotFoundError(name=name)
        sys.meta_path.insert(0, Hidden())
        runpy.run_path(sys.argv[1], run_name="__main__")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(ROOT / SCRIPTS[name])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert f"needs {name}, which is not installed: pip install " in sentence
    assert package in sentence.split("pip install ")[1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_page_shows_the_lines_that_the_script_marks(name: str) -> None:
    """All of them, in their order, and no others."""
    marked = re.findall(r"^ *# coverfast\n(.*?)^ *# end$", (ROOT / SCRIPTS[name]).read_text(), re.MULTILINE | re.DOTALL)
    section = (ROOT / "docs/frameworks.md").read_text().split(f"\n## {name}\n")[1].split("\n## ")[0]
    shown = re.findall(r"^```(?:python|text)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert len(marked) >= 1
    assert shown == [textwrap.dedent(block).rstrip() + "\n" for block in marked]
