"""Networks of other libraries, a transformer and convolutional ones, from pretraining to a fine-tuned network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from libraries import library
from test_finetune import labelled
from training_runs import lines, resume, same, start, weights

from coverfast import load_backbone
from coverfast.downstream import plan as downstream
from coverfast.downstream.network import load_network

#: Name, arguments, library, and the size of the views: the coarsest maps must not end at one pixel.
NETWORKS = [
    pytest.param("monai:SwinUNETR", ("feature_size=12", "drop_rate=0.1"), "monai", 64, id="transformer"),
    pytest.param("timm:convnext_atto", ("drop_path_rate=0.2",), "timm", 64, id="convolutional"),
    pytest.param("monai:BasicUNet", ("features=[8,8,8,16,16,8]",), "monai", 32, id="u-net", marks=pytest.mark.slow),
    pytest.param(
        *("smp:Unet", ("encoder_name=resnet18",), "segmentation_models_pytorch", 64),
        id="batch-norms",
        marks=pytest.mark.slow,
    ),
]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(tmp_path_factory.mktemp("shards") / "labelled.h5")


@pytest.mark.parametrize(("name", "args", "package", "crop"), NETWORKS)
def test_from_pretraining_to_a_network(shard, tmp_path, name, args, package, crop):
    library(package)
    common = {"crop": (crop,), "batch": 2, "threads": 1, "channels": (16, 32, 64, 128, 256)}
    pretraining = {**common, "groups": (4, 4, 4, 1, 1), "backbone": name, "backbone_args": args}
    run = start(shard, tmp_path / "run", iterations=2, checkpoint_every=1, **pretraining)
    assert all(record["loss"] > 0 and record["skipped"] == 0 for record in lines(run))
    again = start(shard, tmp_path / "again", iterations=1, **pretraining)
    assert same(weights(resume(again, iterations=2).start()), weights(run))  # dropout and statistics too
    told: list[str] = []
    backbone = load_backbone(run.folder, tell=told.append)
    assert "0 missing, 0 unexpected, 0 reshaped" in told[0]
    flags = {**common, "preset": "small-2d", "tensorboard": False, "iterations": 2, "val_every": 1}
    ready = downstream.plan({**flags, "data": str(shard), "run": str(tmp_path / "fine"), "init": str(run.folder)})
    assert same(ready.engine.method.backbone.core.state_dict(), weights(run))
    assert any("0 missing, 0 unexpected, 0 reshaped" in note for note in ready.notes)
    ready.on_note = lambda text: None
    ready._draw = lambda iteration: None  # type: ignore[method-assign]
    network = load_network(ready.start().folder, tell=None)
    assert network.backbone.description == backbone.description
    before, after = backbone.core.state_dict(), network.backbone.core.state_dict()
    assert any(not torch.equal(before[n], after[n]) for n in before if before[n].is_floating_point())
    image = torch.rand(1, 1, 2 * crop, crop)
    assert network(image).shape == (1, 9, 2 * crop, crop)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("name", "args", "package", "crop"), NETWORKS)
def test_on_a_gpu(shard, tmp_path, name, args, package, crop, compiled):
    """In bfloat16 through the Triton kernels, graphs of other libraries broken where they break."""
    library(package)
    common = {"crop": (crop,), "batch": 2, "channels": (16, 32, 64, 128, 256), "groups": (4, 4, 4, 1, 1)}
    how = {"device": "cuda", "impl": "triton", "compile": compiled}
    run = start(shard, tmp_path / "run", iterations=3, backbone=name, backbone_args=args, **common, **how)
    assert all(record["loss"] > 0 and record["skipped"] == 0 for record in lines(run))
    load_backbone(run.folder, tell=None)
