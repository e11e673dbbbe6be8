"""Exported files give the network's features without coverfast, at any size they take, and refuse or say the rest."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from own_network import Small
from strategies import assert_near, refused
from torch import Tensor, nn
from training_runs import cli, make_shard, same, start
from training_runs import refused as declined

from coverfast import UNet, load_backbone
from coverfast.backbones import choose
from coverfast.backbones.files import backbone_bytes
from coverfast.downstream import Network
from coverfast.downstream.network import load_network, network_bytes
from coverfast.export import FORMATS, Exported, export, onnx
from coverfast.export import writing as library
from coverfast.export.graph import Graph, Sizes
from coverfast.export.norms import StepwiseNorm, stepwise
from coverfast.export.sources import open_source
from coverfast.training.runs import Run

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
ROOT, HERE = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent
PLAIN, OWN = ROOT / "examples" / "plain_unet.py", f"{HERE / 'own_network.py'}:Small"
#: Images of other sizes and batches than those that an export is made with and tried on.
OTHERS = {2: [(1, 28, 8), (4, 12, 24)], 3: [(1, 8, 20, 12), (2, 16, 8, 8)]}
#: Strides 4, 2, 1, and in 3D 2, 1: the exporters' time goes with the number of layers.
FLAT: dict[str, Any] = {"channels": (8, 16, 16), "groups": (1, 1, 1), "iterations": 2, "ema": 0.5}
DEEP: dict[str, Any] = {"channels": (8, 16), "groups": (1, 1), "iterations": 2, "preset": "small-3d", "crop": (16,)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    """Real, if short, pretraining."""
    folder = tmp_path_factory.mktemp("runs")
    flat, deep = make_shard(folder / "2.h5"), make_shard(folder / "3.h5", ndim=3, size=20)
    return {2: start(flat, folder / "flat", **FLAT), 3: start(deep, folder / "deep", **DEEP, batch=1)}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A backbone file."""
    torch.manual_seed(3)
    path = tmp_path / "in" / "backbone.safetensors"
    path.parent.mkdir()
    path.write_bytes(backbone_bytes(UNet(2, 1, (8, 8, 8)), config={"crop": [32]}, preprocessing={"preset": "ct"}))
    return path


def silently(path: Path, to: str, **more: Any) -> Exported:
    return export(path, to, tell=None, **more)


def runner(done: Exported) -> Any:
    """What a torch file gives."""
    if done.path.suffix == ".ts":
        return torch.jit.load(done.path)
    return torch.export.load(done.path).module()


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_same_features_without_coverfast(ndim: int, runs: dict[int, Run], tmp_path: Path) -> None:
    """Pretrained, exported, and read where coverfast cannot be imported, at sizes that the export has not seen."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    backbone = load_backbone(runs[ndim].folder, tell=None)
    for to in FORMATS:
        done = silently(runs[ndim].folder, to, out=tmp_path / f"network{FORMATS[to]}")
        assert done.free
        assert done.difference is not None
        assert done.difference < 1e-5
    images = [torch.rand(b, 1, *size) for b, *size in OTHERS[ndim]]
    with torch.no_grad():
        torch.save([(image, backbone(image)) for image in images], tmp_path / "expected.pt")
    command = [sys.executable, "-I", str(HERE / "outside_coverfast.py"), str(tmp_path), str(PLAIN)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    said = json.loads(found.stdout)
    assert set(said["differences"]) == {"safetensors", "ts", "pt2", "onnx"}
    for name, parts in said["differences"].items():
        assert len(parts) == len(images)
        assert max(parts) < 1e-5, name
    strides = list(backbone.strides)
    axes = [f"{strides[0]}*{axis}" for axis in "zyx"[-ndim:]]
    assert said["shapes"]["image"] == ["batch", 1, *axes]
    assert said["shapes"]["features_0"] == ["batch", 16, *"zyx"[-ndim:]]
    assert said["shapes"][f"features_{len(strides) - 1}"] == ["batch", 8, *axes]
    for name in ("ts", "pt2", "onnx"):
        facts = said["about"][name]
        assert json.loads(facts["strides"]) == strides
        assert json.loads(facts["config"])["lr"] == 1e-3
        assert json.loads(facts["preprocessing"]) == {"preset": "phantom"}
        assert json.loads(facts["outputs"]) == [f"features_{level}" for level in range(len(strides))]
        least = strides[0] * (2 if name == "pt2" else 1)
        assert facts["sizes"].startswith(f"multiples of {strides[0]} from {least} on")
    home = str(runs[ndim].folder.parent).encode()
    for to, suffix in FORMATS.items():
        content = (tmp_path / f"network{suffix}").read_bytes()
        assert home not in content, to  # what travels does not
        assert b"unet.py" not in content, to
    assert b"InstanceNormalization" not in (tmp_path / "network.onnx").read_bytes()  # inexact over large volumes


def test_a_checkpoint_and_its_moving_average(runs: dict[int, Run], tmp_path: Path) -> None:
    """A checkpoint gives what the run gives; a run that has no result yet its newest one."""
    out = tmp_path / "weights.safetensors"
    checkpoint = runs[2].checkpoints.paths()[-1]
    done = cli("export", str(checkpoint), "--to", "safetensors", "--out", str(out))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{checkpoint}: ")
    assert "matched, 0 missing, 0 unexpected, 0 reshaped" in lines[0]
    assert lines[1] == f"{out}: {out.stat().st_size / 1e6:.1f} MB, safetensors"
    assert "the same bits" in lines[2]
    assert same(load_backbone(out, tell=None).state_dict(), load_backbone(runs[2].folder, tell=None).state_dict())
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "checkpoints").symlink_to(runs[2].checkpoints.folder)
    source = open_source(unfinished)
    assert source.file == unfinished / "checkpoints" / checkpoint.name
    assert same(source.network.state_dict(), load_backbone(out, tell=None).state_dict())


def test_the_example_shows_its_maps(small: Path) -> None:
    done = subprocess.run([sys.executable, str(PLAIN), str(small)], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["(1, 8, 4, 4)", "(1, 8, 8, 8)"], done.stderr


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_a_fine_tuned_network_gives_logits(task: str, tmp_path: Path) -> None:
    """Through its head; of a user's network that ends above the pixel too."""
    torch.manual_seed(0)
    backbone = choose(OWN, ["normed=True"], ndim=2, in_channels=2) if task == "segmentation" else UNet(2, 2, (8, 8, 8))
    backbone.train()(torch.rand(2, 2, 32, 32))  # its batch norms have seen something
    network = Network(backbone, task, ("none", "some", "all"), (0, 3, 7), crop=48, preprocessing={"preset": "raw"})
    (tmp_path / "network.safetensors").write_bytes(network_bytes(network.eval(), {"settings": {"lr": 0.5}}))
    done = silently(tmp_path, "torchscript", own=OWN)
    assert done.path == tmp_path / "network.ts"
    image, files = torch.rand(3, 2, 80, 16), {"coverfast.json": ""}
    loaded = torch.jit.load(done.path, _extra_files=files)
    assert_near(loaded(image), network(image), atol=1e-6)
    about = json.loads(files["coverfast.json"])
    assert json.loads(about["names"]) == ["none", "some", "all"]
    assert json.loads(about["values"]) == [0, 3, 7]
    assert json.loads(about["crop"]) == [48, 48]
    assert json.loads(about["outputs"]) == ["logits"]
    assert json.loads(about["config"]) == {"lr": 0.5}
    copied = silently(tmp_path, "safetensors", own=OWN, out=tmp_path / "copy.safetensors")
    assert same(load_network(copied.path, own=OWN, tell=None).state_dict(), network.state_dict())


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_a_file_refuses_what_it_does_not_take(small: Path) -> None:
    script = runner(silently(small, "torchscript"))
    for shape in ((1, 1, 15, 16), (1, 2, 16, 16), (1, 1, 16), (1, 1, 16, 16, 16), (1, 1, 0, 16)):
        with pytest.raises(Exception, match=r"image must be .* 0 for any multiple of 2"):
            script(torch.zeros(shape))


class Baked(Small):
    """Its features depend on the size of the image by a number that Python computes."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [features * (1 + int(x.shape[-1])) for features in super().forward(x)]


@pytest.fixture
def baked(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    backbone = choose("test_export:Baked", ["normed=False"], ndim=2, in_channels=1)
    path = tmp_path / "baked.safetensors"
    path.write_bytes(backbone_bytes(backbone, config={"crop": [48, 32]}, preprocessing={}))
    return path


@pytest.mark.parametrize("to", ["torchscript", "torch-export"])
def test_a_network_that_follows_no_sizes_gets_one_and_says_so(to: str, baked: Path) -> None:
    """A trace of it would give other numbers at every other size, without a word."""
    own = "test_export:Baked"
    done = silently(baked, to, own=own)
    assert not done.free
    assert any("48x32 alone" in line for line in done.lines)
    run, image = runner(done), torch.rand(3, 1, 48, 32)
    for a, b in zip(run(image), load_backbone(baked, own=own, tell=None)(image), strict=True):
        assert_near(a, b, atol=1e-4, rtol=1e-5)
    with pytest.raises(Exception, match=r"image must be|to be equal to 48"):
        run(torch.rand(1, 1, 32, 32))
    files = {"coverfast.json": ""}
    if to == "torchscript":
        torch.jit.load(done.path, _extra_files=files)
    else:
        torch.export.load(done.path, extra_files=files)
    assert json.loads(files["coverfast.json"])["sizes"].startswith("48x32 alone: ")
    given = silently(baked, to, own=own, size=(64, 48), out=baked.with_name("given"))
    assert any("64x48 alone" in line for line in given.lines)


def test_what_an_exporter_cannot_leave_open_is_fixed(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = library._MAKERS["torchscript"]

    def stubborn(graph: Graph, sizes: Sizes, about: Any) -> Any:
        if sizes.free:
            raise RuntimeError("sizes are constants\nand pages of detail")
        return make(graph, sizes, about)

    monkeypatch.setitem(library._MAKERS, "torchscript", stubborn)
    done = silently(small, "torchscript")
    (line,) = [line for line in done.lines if line.startswith("takes")]
    assert line.endswith("32x32 alone: torchscript cannot leave it open (sizes are constants)")
    monkeypatch.setitem(library._MAKERS, "torchscript", lambda *_: 1 / 0)
    with refused("to must be a format that the network can have", "division by zero"):
        silently(small, "torchscript", out=small.with_name("other"))


# --- checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["values", "shape", "nan"])
def test_a_file_that_would_be_wrong_is_not_written(wrong: str, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = library._MAKERS["torchscript"]
    change = {"values": lambda f: f + 2e-4 * f.abs().max(), "shape": lambda f: f[1:], "nan": lambda f: f / 0 * 0}[wrong]

    def broken(graph: Graph, sizes: Sizes, about: Any) -> Any:
        content, run = make(graph, sizes, about)
        return content, lambda image: [change(f) if f.shape[1] == 8 and len(image) == 3 else f for f in run(image)]

    monkeypatch.setitem(library._MAKERS, "torchscript", broken)
    with refused("backbone.ts is not written", "features_0 of 4x6 (batch 3)"):
        silently(small, "torchscript")
    assert list(small.parent.iterdir()) == [small]


def test_features_that_are_not_finite_are_no_measure(small: Path) -> None:
    unet = UNet(2, 1, (8, 8, 8))
    with torch.no_grad():
        unet.stem[0].weight.fill_(3e38)
    small.write_bytes(backbone_bytes(unet, config={}, preprocessing={}))
    with refused("must be finite"):
        silently(small, "torchscript")


def test_without_onnxruntime_it_says_that_nothing_was_checked(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is exported all the same."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert onnx._runner(b"a file") is None
    monkeypatch.setattr(library, "need_onnx", lambda: None)
    monkeypatch.setitem(library._MAKERS, "onnx", lambda *_: (b"a file", onnx._runner(b"a file")))
    done = silently(small, "onnx")
    assert done.difference is None
    assert done.lines[0] == "not checked: that needs onnxruntime, pip install coverfast[export]"
    assert done.path.read_bytes() == b"a file"


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.GroupNorm(3, 12), (2, 12, 5, 4)),
        (nn.GroupNorm(1, 4, eps=0.1), (1, 4, 3, 2, 5)),
        (nn.GroupNorm(2, 4, affine=False), (2, 4, 3, 3)),
        (nn.InstanceNorm3d(4, affine=True), (2, 4, 3, 2, 5)),
        (nn.InstanceNorm2d(4), (2, 4, 3, 2)),
    ],
)
def test_norms_of_onnx_files_are_the_same_norms(norm: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for weights in norm.parameters():
        nn.init.normal_(weights)
    before = nn.Sequential(norm, nn.Sequential(norm, nn.BatchNorm2d(3))).double()
    after = stepwise(before)
    assert isinstance(after[0], StepwiseNorm)
    assert isinstance(before[0], type(norm))
    image = 3 * torch.randn(shape, dtype=torch.float64) + 5
    assert_near(after[0](image), norm(image))


def test_norms_with_running_statistics_stay(small: Path) -> None:
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    assert isinstance(stepwise(nn.Sequential(norm))[0], nn.InstanceNorm2d)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals_of_the_command(small: Path, tmp_path: Path) -> None:
    """One sentence, exit code 2, no file."""
    path = str(small)
    declined(cli("export", path, "--to", "tflite"), "to must be one of safetensors, torchscript, onnx", "'tflite'")
    declined(cli("export", str(tmp_path / "no"), "--to", "onnx"), "checkpoint must be", "there is no", "no")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(small.read_bytes()[:-1])
    declined(cli("export", str(damaged), "--to", "torchscript"), str(damaged), "cannot be read")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.safetensors", "in"]


def test_refusals(small: Path, runs: dict[int, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = small.with_suffix(".ts")
    there.write_text("mine")
    for more in ({}, {"out": there}):
        with refused("out must be a new file", str(there), "--out"):
            silently(small, "torchscript", **more)
    assert there.read_text() == "mine"
    before = small.read_bytes()
    assert silently(small, "safetensors").path == small.with_name("backbone-export.safetensors")
    assert small.read_bytes() == before
    with refused("out must be a new file", "backbone-export.safetensors"):
        silently(small, "safetensors")
    with refused("folder that is there", str(tmp_path / "none")):
        silently(small, "torchscript", out=tmp_path / "none" / "x.ts")
    for size in ((15, 16), (0, 16)):
        with refused("size must", str(size)):
            silently(small, "torchscript", size=size, out=tmp_path / "x")
    with refused("size must be an int", "2 of them"):
        silently(small, "torchscript", size=(16, 16, 16), out=tmp_path / "x")
    with refused("size must not be given for safetensors"):
        silently(small, "safetensors", size=16, out=tmp_path / "x")
    (tmp_path / "empty").mkdir()
    with refused("run folder with a checkpoint", "empty"):
        silently(tmp_path / "empty", "torchscript")
    broken = tmp_path / "iteration-1.pt"
    broken.write_bytes(runs[2].checkpoints.paths()[-1].read_bytes()[:-200])
    with refused("iteration-1.pt", "checksum"):
        silently(broken, "torchscript")
    with refused("README.md", "safetensors"):
        silently(ROOT / "README.md", "torchscript", out=tmp_path / "x")
    for package in ("onnx", "onnxscript"):
        with monkeypatch.context() as gone:
            gone.setitem(sys.modules, package, None)
            with refused("an ONNX file needs the extra: pip install coverfast[export]"):
                silently(small, "onnx")
    assert not (tmp_path / "x").exists()


def test_what_the_disk_refuses(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full, or not to be written to: a sentence, and nothing left behind."""
    before = sorted(small.parent.iterdir())
    write = Path.write_bytes
    for number, words in ((errno.ENOSPC, "no space left"), (errno.EACCES, "Permission denied")):

        def fails(self: Path, data: bytes, number: int = number) -> int:
            write(self, data[: len(data) // 2])
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "write_bytes", fails)
        for to in ("torchscript", "safetensors"):
            out = small.with_name(f"new{FORMATS[to]}")
            with refused(f"{out} cannot be written", words):
                silently(small, to, out=out)
        assert sorted(small.parent.iterdir()) == before
