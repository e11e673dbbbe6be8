"""Weights that do not fit, and what is made of them only when asked for: in pretraining and in fine-tuning."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from strategies import refused
from training_runs import TINY, make_shard, ready, resume, start

from coverfast import InputError, UNet, VectorPyramid, load_backbone
from coverfast.backbones import read_backbone
from coverfast.backbones.files import backbone_bytes
from coverfast.downstream import plan as downstream
from coverfast.phantom import phantom
from coverfast.shards import Sample, ShardWriter
from coverfast.training.checkpoints import Checkpoints, read_checkpoint

CHANNELS = (8, 8, 8, 16, 16, 16, 8, 8, 8)


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shard(tmp_path_factory.mktemp("shards") / "grey.h5")


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three equal channels, with label maps."""
    path = tmp_path_factory.mktemp("shards") / "colour.h5"
    with ShardWriter(path, ndim=2, preprocessing={"preset": "phantom"}) as writer:
        for index in range(4):
            found = phantom(2, 48, seed=0, index=index)
            pixels = np.repeat((255 * found.image[None]).round().astype(np.uint8), 3, axis=0)
            about = {"labels": found.labels, "split": "val" if index == 3 else "train"}
            writer.add(Sample(pixels, 1.0, 0.0, 0.0, 255.0, (1.0, 1.0), f"subject-{index}", **about))
    return path


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    path = tmp_path / "backbone.safetensors"
    path.write_bytes(backbone_bytes(UNet(2, 1, CHANNELS), config={}, preprocessing={}))
    return path


def finetuning(shard: Path, run: Path, **flags: object) -> downstream.Finetuning:
    common = {"preset": "small-2d", "batch": 2, "crop": (32,), "iterations": 1, "threads": 1, "tensorboard": False}
    return downstream.plan({**common, "task": "segmentation", "data": str(shard), "run": str(run), **flags})


def test_one_channel_starts_several_when_asked_for(colour: Path, backbone: Path, tmp_path: Path) -> None:
    with refused("3 channel(s)", "is for 1 channel(s)", "--adapt-input"):
        ready(colour, tmp_path / "run", iterations=1, init=str(backbone))
    with refused("for 3 channel(s)", "--adapt-input"):
        finetuning(colour, tmp_path / "run", init=str(backbone))
    runs = [f(colour, tmp_path / "run", init=str(backbone), adapt_input=True) for f in (ready, finetuning)]
    image = torch.rand(1, 1, 32, 32)
    expected = load_backbone(backbone, tell=None)(image)
    for run in runs:
        assert any("1 adapted (stem.0.weight from 1 to 3 channels" in note for note in run.notes)
        for ours, theirs in zip(run.engine.method.backbone(image.expand(-1, 3, -1, -1)), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)
    assert not (tmp_path / "run").exists()


def test_what_fits_starts_a_run_when_asked_for(grey: Path, backbone: Path, tmp_path: Path) -> None:
    torch.manual_seed(6)
    backbone.write_bytes(backbone_bytes(UNet(2, 1, (*CHANNELS[:-1], 16)), config={}, preprocessing={}))
    with refused("does not fit the network"):
        ready(grey, tmp_path / "run", iterations=1, init=str(backbone))
    run = ready(grey, tmp_path / "run", iterations=1, init=str(backbone), partial=True)
    assert any("8 reshaped (up.3.0.weight" in note for note in run.notes)
    own, given = run.method.backbone, load_backbone(backbone, tell=None)
    assert torch.equal(own.state_dict()["stem.0.weight"], given.state_dict()["stem.0.weight"])
    drawn = ready(grey, tmp_path / "run", iterations=1).method.backbone
    assert torch.equal(own.state_dict()["up.3.0.weight"], drawn.state_dict()["up.3.0.weight"])


def test_a_file_with_a_pyramid_starts_both(grey: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    path, unet = tmp_path / "both.safetensors", UNet(2, 1, CHANNELS)
    pyramid = VectorPyramid(2, unet.feature_channels, TINY["groups"], 8, 3)
    path.write_bytes(backbone_bytes(unet, config={}, preprocessing={}, pyramid=pyramid))
    run = ready(grey, tmp_path / "run", iterations=1, init=str(path))
    assert any("pyramid from" in note and "20 matched" in note for note in run.notes)
    for name, value in pyramid.state_dict().items():
        assert torch.equal(run.method.pyramid.state_dict()[name], value)
    with refused("init must have a pyramid like the run", "groups (1, 1, 1, 1, 1) of 8", "--partial"):
        ready(grey, tmp_path / "run", iterations=1, init=str(path), groups=(2, 1, 1, 1, 1))
    run = ready(grey, tmp_path / "run", iterations=1, init=str(path), groups=(2, 1, 1, 1, 1), partial=True)
    assert any("the pyramid of" in note and "left out" in note for note in run.notes)
    run = ready(grey, tmp_path / "run", iterations=1, init=str(path), window=(5,))
    assert any("it matched in windows of [(3, 3)" in note and "[(5, 5)" in note for note in run.notes)


def test_a_wrong_dimension_is_named(tmp_path: Path, backbone: Path) -> None:
    volumes = make_shard(tmp_path / "volumes.h5", ndim=3, size=32)
    with refused("init must be a network for 3D images", "is for 2D images"):
        ready(volumes, tmp_path / "run", iterations=1, init=str(backbone), preset="small-3d", batch=1)


def test_another_network_is_named(grey: Path, tmp_path: Path, backbone: Path) -> None:
    content = backbone.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    about = {"kind": "timm", "name": "convnext_tiny", "args": {}, "ndim": 2, "in_channels": 1}
    header["__metadata__"]["backbone"] = json.dumps(about)
    text = json.dumps(header).encode()
    backbone.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with refused("init must be a unet like the run", "timm:convnext_tiny", "--backbone"):
        ready(grey, tmp_path / "run", iterations=1, init=str(backbone))


def test_a_run_resumes_that_is_older_than_a_setting(grey: Path, tmp_path: Path) -> None:
    run = start(grey, tmp_path / "run", iterations=1)
    lines = run.config.read_text().splitlines()
    new = ("backbone", "backbone_args", "partial", "adapt_input")
    run.config.write_text("\n".join(line for line in lines if line.partition(" =")[0] not in new))
    (path,) = run.checkpoints.paths()
    state = read_checkpoint(path, torch.device("cpu"))
    state["settings"] = {name: value for name, value in state["settings"].items() if name not in new}
    Checkpoints(run.folder / "checkpoints").save(1, state, keep=1)
    found = resume(run, iterations=2)
    assert any("matched, 0 missing, 0 unexpected, 0 reshaped" in note for note in found.notes)
    assert found.first == 2
    run.config.write_text(run.config.read_text().replace("seed = 0", "seed = 1"))
    with pytest.raises(InputError, match="seed was changed"):
        resume(run, iterations=2)


def test_weights_that_lose_their_meaning_are_refused(grey: Path, backbone: Path, tmp_path: Path) -> None:
    content = backbone.read_bytes()
    state, metadata = read_backbone(backbone)
    state = {name: value.clone() for name, value in state.items()}  # or they would change with the file
    for change, words in (
        (lambda x: x.to(torch.int8), ("float32 or the like for stem.0.weight", "int8")),
        (lambda x: x.to(torch.complex64), ("float32 or the like for stem.0.weight", "complex64")),
        (lambda x: torch.full_like(x, torch.nan), ("finite numbers, but stem.0.weight",)),
    ):
        backbone.write_bytes(save({**state, "stem.0.weight": change(state["stem.0.weight"])}, metadata))
        with refused(*words):
            load_backbone(backbone)
    told: list[str] = []
    backbone.write_bytes(save({name: value.half() for name, value in state.items()}, metadata))
    load_backbone(backbone, tell=told.append)
    assert f"{len(state)} matched, {len(state)} converted from float16, 0 missing" in told[0]
    backbone.write_bytes(save({**state, "\x1b[2J": torch.zeros(1)}, metadata))
    load_backbone(backbone, strict=False, tell=told.append)
    assert "1 unexpected (\\x1b[2J)" in told[1]
    backbone.with_suffix(".pt").write_bytes(content)
    with refused("backbone.safetensors file, got a checkpoint", "coverfast export"):
        load_backbone(backbone.with_suffix(".pt"))
    with refused("in_channels must be at least 1, got 0"):
        load_backbone(backbone, in_channels=0)


def test_a_run_knows_what_it_started_from(grey: Path, backbone: Path, tmp_path: Path) -> None:
    run = start(grey, tmp_path / "run", iterations=1, init=str(backbone), ema=0.9)
    about = tomllib.loads(run.config.read_text())["provenance"]
    assert about["init_sha256"] == hashlib.sha256(backbone.read_bytes()).hexdigest()
    assert "72 matched, 0 missing, 0 unexpected, 0 reshaped" in about["init_report"]
    assert str(tmp_path).encode() not in run.backbone.read_bytes()  # which goes to others
    average = ready(grey, tmp_path / "other", iterations=1, init=str(backbone), ema=0.9).engine.ema
    assert torch.equal(average.backbone.state_dict()["stem.0.weight"], read_backbone(backbone)[0]["stem.0.weight"])
