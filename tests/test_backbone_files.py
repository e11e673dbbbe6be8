"""backbone.safetensors: back as it was, or one clear sentence."""

import json

import pytest
import torch
from safetensors.torch import load, save
from strategies import randn, refused

from coverfast import UNet, load_backbone
from coverfast.backbones import load_state, read_backbone
from coverfast.backbones.files import backbone_bytes

CHANNELS = (8, 16, 8)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet(2, 2, CHANNELS)


@pytest.fixture
def content(unet):
    return backbone_bytes(unet, config={"lr": 1e-4, "data": "a.h5"}, preprocessing={"size": 192})


@pytest.fixture
def metadata(content, tmp_path):
    path = tmp_path / "whole.safetensors"
    path.write_bytes(content)
    return read_backbone(path)[1]


def written(tmp_path, content):
    path = tmp_path / "backbone.safetensors"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("ndim", "size"), [(2, (6, 8)), (3, (4, 2, 6))])
def test_round_trip(ndim, size, tmp_path):
    unet, x = UNet(ndim, 2, CHANNELS), randn(2, 2, *size, dtype=torch.float32)
    path = written(tmp_path, backbone_bytes(unet, config={"seed": 3}, preprocessing={"spacing": [1, 2]}))
    for source in (path, str(path)):
        again = load_backbone(source)
        assert not again.training
        assert (again.ndim, again.in_channels, again.channels) == (ndim, 2, CHANNELS)
        for ours, theirs in zip(again(x), unet(x), strict=True):
            assert torch.equal(ours, theirs)
    metadata = read_backbone(path)[1]
    assert json.loads(metadata["config"]) == {"seed": 3}
    assert json.loads(metadata["preprocessing"]) == {"spacing": [1, 2]}


def test_memory_format_does_not_reach_the_file(unet):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    unet = unet.to(memory_format=torch.channels_last)
    for name, tensor in load(backbone_bytes(unet, config={}, preprocessing={})).items():
        assert torch.equal(tensor, before[name])


def test_files_that_are_no_backbone(tmp_path, content):
    path = tmp_path / "backbone.safetensors"
    with refused(str(path), "no such file"):
        load_backbone(path)
    with refused(str(tmp_path)):
        load_backbone(tmp_path)
    for broken in (b"", b"hello", content[:100], content[:-1], content[: len(content) // 2]):
        with refused(str(path), "safetensors"):
            load_backbone(written(tmp_path, broken))
    foreign = {"a": torch.zeros(2)}
    for extra in (None, {"format": "pt"}, {"backbone": "{}"}):
        with refused(str(path), "coverfast"):
            load_backbone(written(tmp_path, save(foreign, extra)))


def test_metadata_that_makes_no_network(tmp_path, content, metadata):
    path, state = tmp_path / "backbone.safetensors", load(content)
    with refused(str(path), "version", "9"):
        load_backbone(written(tmp_path, save(state, {**metadata, "version": "9"})))
    build = json.loads(metadata["backbone"])
    for wrong in (
        "not json",
        "[1]",
        "{}",
        json.dumps({**build, "kind": "resnet"}),
        json.dumps({**build, "depth": 3}),
        json.dumps({**build, "channels": [8, 12, 8]}),
        json.dumps({**build, "ndim": 7}),
    ):
        with refused(str(path)):
            load_backbone(written(tmp_path, save(state, {**metadata, "backbone": wrong})))


@pytest.mark.parametrize("change", ["missing", "unexpected", "reshaped"])
def test_tensors_that_do_not_fit(change, tmp_path, content, metadata):
    state, name = load(content), "stem.0.weight"
    if change == "missing":
        del state[name]
    elif change == "unexpected":
        state[name := "head.weight"] = torch.zeros(1)
    else:
        state[name] = state[name][:4].clone()
    path = written(tmp_path, save(state, metadata))
    with refused(str(path), f"1 {change} ({name}"):
        load_backbone(path)


def test_nothing_is_loaded_unless_all_is(unet):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    del state["stem.0.bias"]
    with refused("half.safetensors", "1 missing (stem.0.bias)"):
        load_state(unet, state, "half.safetensors")
    for name, value in unet.state_dict().items():
        assert torch.equal(value, before[name])
    state["stem.0.bias"] = before["stem.0.bias"]
    report = load_state(unet, state, "whole.safetensors")
    assert len(report.matched) == len(before)
    assert str(report) == f"{len(before)} matched, 0 missing, 0 unexpected, 0 reshaped"
    assert torch.equal(unet.stem[0].weight, before["stem.0.weight"] + 1)
