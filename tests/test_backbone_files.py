"""backbone.safetensors: back as it was, or one clear sentence."""

import json

import pytest
import torch
from safetensors.torch import load, save
from strategies import randn, refused

from coverfast import UNet, VectorPyramid, load_backbone, load_pyramid
from coverfast.backbones import load_state, read_backbone
from coverfast.backbones.files import backbone_bytes, to_bytes

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


# --- reports, and what is only loaded when asked for ----------------------------------------------------------------


def test_every_load_tells_what_it_did(tmp_path, content, unet, capsys):
    path = written(tmp_path, content)
    count = len(unet.state_dict())
    whole = f"{count} matched, 0 missing, 0 unexpected, 0 reshaped"
    load_backbone(path)
    assert capsys.readouterr().out == f"{path}: {whole}\n"
    load_backbone(tmp_path)  # the folder of a run
    assert capsys.readouterr().out == f"{path}: {whole}\n"
    told = []
    load_backbone(path, tell=told.append)
    load_backbone(path, tell=None)
    assert told == [f"{path}: {whole}"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("change", ["missing", "unexpected", "reshaped"])
def test_what_fits_is_loaded_when_that_is_asked_for(change, tmp_path, content, metadata, unet):
    state, name = load(content), "stem.0.weight"
    if change == "missing":
        del state[name]
    elif change == "unexpected":
        state["head.weight"] = torch.zeros(1)
    else:
        state[name] = state[name][:4].clone()
    path, told = written(tmp_path, save(state, metadata)), []
    found = load_backbone(path, strict=False, tell=told.append).state_dict()
    assert f"1 {change} (" in told[0]
    for own, value in unet.state_dict().items():
        assert torch.equal(found[own], value) == (change == "unexpected" or own != name), own
    nothing = {f"other.{n}": value for n, value in state.items()}
    with refused("0 matched"):  # as good as another file
        load_backbone(written(tmp_path, save(nothing, metadata)), strict=False)


def test_one_channel_becomes_several_only_when_asked_for(tmp_path):
    torch.manual_seed(1)
    grey = UNet(2, 1, CHANNELS)
    torch.nn.init.normal_(grey.stem[0].bias)  # without it the norm behind would hide a factor
    path = written(tmp_path, backbone_bytes(grey, config={}, preprocessing={}))
    told = []
    rgb = load_backbone(path, in_channels=3, tell=told.append)
    assert "1 adapted (stem.0.weight from 1 to 3 channels, each weight over 3), 0 missing" in told[0]
    assert rgb.in_channels == 3
    x = randn(2, 1, 8, 8, dtype=torch.float32)
    for ours, theirs in zip(rgb(x.expand(-1, 3, -1, -1)), grey(x), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert load_backbone(path, in_channels=1, tell=told.append).in_channels == 1
    assert "adapted" not in told[1]
    three = UNet(2, 3, CHANNELS)
    with refused("1 reshaped (stem.0.weight (8, 1, 3, 3) for (8, 3, 3, 3))"):
        load_state(three, grey.state_dict(), "grey.safetensors")
    with refused("in_channels must be 3", "got 4"):
        load_backbone(written(tmp_path, backbone_bytes(three, config={}, preprocessing={})), in_channels=4)
    other = dict(grey.state_dict())
    other["down.0.0.weight"] = other["down.0.0.weight"][:, :1].clone()  # not the first: it has 8 channels, not 3
    with refused("1 reshaped (down.0.0.weight"):
        load_state(three, other, "grey.safetensors", adapt=3)


def test_a_pyramid_travels_beside_its_backbone(tmp_path, unet, capsys):
    torch.manual_seed(2)
    pyramid = VectorPyramid(2, unet.feature_channels, (2, 1), 4, [(3, 5), (5, 3)])
    path = written(tmp_path, backbone_bytes(unet, config={}, preprocessing={}, pyramid=pyramid))
    load_backbone(path)
    assert f"{len(unet.state_dict())} matched, 0 missing, 0 unexpected" in capsys.readouterr().out
    again = load_pyramid(tmp_path)
    assert "pyramid: 8 matched" in capsys.readouterr().out
    features = unet(randn(4, 2, 8, 8, dtype=torch.float32))
    assert again.windows == [(3, 5), (5, 3)]
    assert torch.equal(again(features), pyramid(features))
    with refused("the backbone alone"):
        load_pyramid(written(tmp_path, backbone_bytes(unet, config={}, preprocessing={})))


def test_one_tensor_under_two_names_is_written_under_both(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(2, 2)
            self.b = self.a

    tied = Tied()
    found = load(to_bytes(tied.state_dict(), "anything", {}))
    assert sorted(found) == ["a.bias", "a.weight", "b.bias", "b.weight"]
    assert torch.equal(found["a.weight"], found["b.weight"])
    assert torch.equal(found["a.weight"], tied.a.weight)


def test_a_wrong_dimension_is_said(tmp_path, unet):
    volumes = UNet(3, 2, CHANNELS)
    with refused("6 reshaped (stem.0.weight (8, 2, 3, 3) for (8, 2, 3, 3, 3)"):
        load_state(volumes, unet.state_dict(), "planes.safetensors")
