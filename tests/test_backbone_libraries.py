"""Networks of timm, MONAI and segmentation_models_pytorch as backbones: their own maps, their own names."""

import copy
import functools
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import library
from safetensors.torch import load_file
from strategies import randn, refused
from torch import nn

from coverfast import VectorPyramid
from coverfast.backbones import Adapted, build, choose, load_backbone, load_state
from coverfast.backbones.files import backbone_bytes

PACKAGE = {"timm": "timm", "monai": "monai", "smp": "segmentation_models_pytorch"}


@dataclass(frozen=True, eq=False)
class Case:
    """A small network. taps: modules of the library's own network whose outputs are the maps, coarse to fine; one that
    ends in "<" is tapped before, at its first input. finest: the last stride.
    """

    kind: str
    name: str
    taps: str
    args: dict[str, Any] = field(default_factory=dict)
    finest: int = 1
    ndim: int = 2
    channels: int = 1

    @property
    def tapped(self) -> list[str]:
        return self.taps.split()

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.finest * 2**level for level in reversed(range(len(self.tapped))))

    @property
    def size(self) -> list[int]:
        if "img_size" in self.args:
            return [self.args["img_size"]] * self.ndim
        coarsest = (
            32 if self.kind == "smp" else self.strides[0]
        )  # an encoder of smp runs all stages, whatever its depth
        return [2 * coarsest, *[coarsest] * (self.ndim - 1)]

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}-{self.ndim}d-{'-'.join(str(v) for v in self.args.values() if type(v) is str)}"


SMALL_SWIN = {"embed_dim": 12, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "img_size": 64}
STAGES = "stages.3 stages.2 stages.1 stages.0"
LAYERS = "layer4 layer3 layer2 layer1 act1"
TIMM = [
    Case("timm", "test_convnext", STAGES, finest=4),
    Case("timm", "test_resnet", LAYERS, finest=2, channels=3),
    Case("timm", "test_resnet", "layer2 layer1", {"out_indices": [1, 2]}, finest=4),
    Case("timm", "test_mambaout", STAGES, finest=4),  # channels last
    Case(
        "timm", "swin_tiny_patch4_window7_224", "layers.3 layers.2 layers.1 layers.0", SMALL_SWIN, finest=4, channels=3
    ),
]
MONAI = [
    Case(
        "monai",
        "SwinUNETR",
        "encoder10 decoder5 decoder4 decoder3 decoder2 decoder1",
        {"feature_size": 12, "depths": [2, 1, 1, 1], "window_size": 4, "use_checkpoint": True},
    ),
    Case(
        "monai",
        "UNETR",
        "decoder5< decoder5 decoder4 decoder3 decoder2",
        {"img_size": 32, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2, "feature_size": 4},
    ),
    Case("monai", "BasicUNet", "down_4 upcat_4 upcat_3 upcat_2 upcat_1", {"features": [4, 4, 8, 8, 16, 4]}),
    Case(
        "monai",
        "UNet",
        "model.1.submodule.1.submodule model.1.submodule.2 model",
        {"channels": [4, 8, 16], "strides": [2, 2], "norm": ["group", {"num_groups": 2}]},
    ),
    Case(
        "monai",
        "DynUNet",
        "bottleneck upsamples.0 upsamples.1 upsamples.2 upsamples.3",
        {"filters": [4, 8, 8, 16, 16], "res_block": True},
    ),
    Case("monai", "SegResNet", "down_layers.3 up_layers.0 up_layers.1 conv_final.1"),
    Case(
        "monai",
        "AttentionUnet",
        "model.1.submodule.1.submodule model.1.submodule.1 model.1",
        {"channels": [4, 8, 16], "strides": [2, 2]},
    ),
    Case(
        "monai",
        "MedNeXt",
        "bottleneck dec_stages.0 dec_stages.1 dec_stages.2 dec_stages.3",
        {"init_filters": 4, "kernel_size": 3, "blocks_down": [1, 1, 1, 1], "blocks_up": [1, 1, 1, 1]},
    ),
]
BLOCKS = " ".join(f"decoder.blocks.{i}" for i in range(5))
SMP = [
    Case(
        "smp",
        "Unet",
        "decoder.center decoder.blocks.0 decoder.blocks.1 decoder.blocks.2",
        {"encoder_name": "efficientnet-b0", "encoder_depth": 3, "decoder_channels": [16, 8, 4]},
    ),
    Case("smp", "Unet", f"decoder.center {BLOCKS}", {"encoder_name": "tu-test_convnext"}),
    Case(
        "smp",
        "UnetPlusPlus",
        "decoder.blocks.x_0_0< " + " ".join(f"decoder.blocks.x_0_{i}" for i in range(5)),
        {"encoder_name": "tu-test_resnet", "decoder_attention_type": "scse"},
    ),
    Case("smp", "MAnet", f"decoder.center {BLOCKS}", {"encoder_name": "tu-test_resnet"}),
    Case("smp", "Linknet", f"decoder.blocks.0< {BLOCKS}", {"encoder_name": "tu-test_resnet"}),
    Case(
        "smp",
        "FPN",
        "decoder.p5 decoder.p4 decoder.p3 decoder.p2",
        {"encoder_name": "tu-test_resnet"},
        finest=4,
        channels=3,
    ),
]
VOLUMES = [
    Case(c.kind, c.name, c.taps, c.args, c.finest, ndim=3, channels=3)
    for c in MONAI
    if c.name in ("SwinUNETR", "UNETR", "DynUNet", "UNet")
]
CASES = [*TIMM, *MONAI, *VOLUMES, *SMP]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a backbone reached for the network")

    monkeypatch.setattr(socket, "socket", refuse)


@functools.cache
def made(case):
    """A backbone of the case; the tests leave it as it is."""
    library(PACKAGE[case.kind])
    torch.manual_seed(0)
    description = {"kind": case.kind, "name": case.name, "args": case.args, "ndim": case.ndim}
    description["in_channels"] = case.channels
    backbone = build(description)
    for module in backbone.modules():  # biases, norms and their statistics that differ from their start
        for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if value.is_floating_point() and value.ndim == 1:
                value.data += 0.1 * torch.rand_like(value)
    return backbone


def the_librarys(case):
    """The network as the library's documentation makes it, and what its weights are called there."""
    if case.kind == "timm":
        timm = library("timm")
        args = {key: value for key, value in case.args.items() if key != "out_indices"}
        whole = timm.create_model(case.name, in_chans=case.channels, num_classes=0, **args)
        return (
            whole,
            lambda name: name.replace("stages_", "stages.").replace("layers_", "layers.").replace("stem_", "stem."),
        )
    if case.kind == "smp":
        return getattr(library("segmentation_models_pytorch"), case.name)(
            **case.args, encoder_weights=None, in_channels=case.channels
        ), str
    library("monai")
    import monai.networks.nets as nets

    given = dict(case.args)
    if case.name == "DynUNet":
        given |= {"kernel_size": [3] * 5, "strides": [1, 2, 2, 2, 2], "upsample_kernel_size": [2] * 4}
    if case.name == "UNet":
        given |= {"num_res_units": 2}
    out = 4 if case.name == "UNet" else 3  # the UNet's output is a map, of as many channels as its first stage
    return getattr(nets, case.name)(spatial_dims=case.ndim, in_channels=case.channels, out_channels=out, **given), str


@pytest.mark.parametrize("case", CASES, ids=str)
def test_maps_are_those_that_the_library_computes(case):
    backbone = made(case).eval()
    assert isinstance(backbone, Adapted)
    whole, renamed = the_librarys(case)
    found = whole.load_state_dict(
        {renamed(name): value for name, value in backbone.core.state_dict().items()}, strict=False
    )
    assert not found.unexpected_keys  # every weight that travels has its name in the library's own network
    seen: dict[str, torch.Tensor] = {}
    for tap in case.tapped:
        module = whole.get_submodule(tap.removesuffix("<"))
        if tap.endswith("<"):
            module.register_forward_pre_hook(lambda _, given, tap=tap: seen.update({tap: given[0].clone()}))
        else:
            module.register_forward_hook(lambda _, __, out, tap=tap: seen.update({tap: out.clone()}))
    x = randn(2, case.channels, *case.size, dtype=torch.float32)
    with torch.no_grad():
        whole.eval()(x)
        maps = backbone(x)
    last = case.name in ("test_mambaout", "swin_tiny_patch4_window7_224")
    expected = [seen[tap].permute(0, 3, 1, 2) if last else seen[tap] for tap in case.tapped]
    assert backbone.strides == case.strides
    for ours, theirs, channels, stride in zip(maps, expected, backbone.feature_channels, backbone.strides, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.shape == (2, channels, *(s // stride for s in case.size))


@pytest.mark.parametrize("case", [c for c in CASES if c.ndim == 2] + [c for c in VOLUMES if c.name == "UNETR"], ids=str)
def test_every_weight_learns(case):
    """Also: a pyramid on top, whatever the finest stride."""
    backbone = copy.deepcopy(made(case)).train()
    maps = backbone(randn(4, case.channels, *case.size, dtype=torch.float32))
    assert [f.shape[1] for f in maps] == list(backbone.feature_channels)
    pyramid = VectorPyramid(case.ndim, backbone.feature_channels, (1,) * len(maps), 4, 3)
    psi = pyramid(maps)
    assert psi.shape == (2, case.ndim, *(s // case.finest for s in case.size))
    psi.square().mean().backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in backbone.parameters())
    assert backbone.mixes_samples == any("running_mean" in name for name in backbone.state_dict())


ONE_OF_EACH = [TIMM[0], MONAI[4], SMP[0]]


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_a_file_and_back(case, tmp_path):
    """Through JSON and safetensors: the same network, the library's own names, the same maps."""
    backbone = made(case).eval()
    (tmp_path / "backbone.safetensors").write_bytes(backbone_bytes(backbone, config={}, preprocessing={}))
    lines: list[str] = []
    again = load_backbone(tmp_path, tell=lines.append)
    assert len(lines) == 1
    assert f"{len(backbone.core.state_dict())} matched, 0 missing, 0 unexpected, 0 reshaped" in lines[0]
    assert again.description == backbone.description
    assert list(again.core.state_dict()) == list(backbone.core.state_dict())
    x = randn(1, 1, *case.size, dtype=torch.float32)
    with torch.no_grad():
        for ours, theirs, copied in zip(backbone(x), again(x), copy.deepcopy(again)(x), strict=True):
            assert torch.equal(ours, theirs)
            assert torch.equal(ours, copied)


def test_what_the_docs_say_of_loading(tmp_path):
    """docs/backbones.md, "In the library itself"."""
    for case, heads in zip(ONE_OF_EACH, ((), ("output_block.",), ("segmentation_head.", "encoder._")), strict=True):
        backbone = made(case)
        (tmp_path / "backbone.safetensors").write_bytes(backbone_bytes(backbone, config={}, preprocessing={}))
        weights = load_file(tmp_path / "backbone.safetensors")
        if case.kind == "timm":
            network = library("timm").create_model(case.name, features_only=True, in_chans=1)
            network.load_state_dict(weights)
            continue
        network, _ = the_librarys(case)
        missing, unexpected = network.load_state_dict(weights, strict=False)
        assert not unexpected
        assert missing
        assert all(name.startswith(heads) for name in missing)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_traced_and_exported(case):
    backbone, x = made(case).eval(), randn(1, 1, *case.size, dtype=torch.float32)
    with torch.no_grad():
        expected = backbone(x)
        for program in (torch.jit.trace(backbone, x, check_trace=False), torch.export.export(backbone, (x,)).module()):
            for ours, theirs in zip(program(x), expected, strict=True):
                assert torch.equal(ours, theirs)


def test_an_anisotropic_image_size():
    library("monai")
    args = {"img_size": [32, 16, 48], "hidden_size": 24, "mlp_dim": 24, "num_heads": 2, "feature_size": 4}
    backbone = build({"kind": "monai", "name": "UNETR", "args": args, "ndim": 3, "in_channels": 1})
    assert backbone.image_size == (32, 16, 48)
    assert backbone(torch.zeros(1, 1, 32, 16, 48))[0].shape[2:] == (2, 1, 3)
    with refused("image", "(32, 16, 48)", "(32, 32, 32)"):
        backbone(torch.zeros(1, 1, 32, 32, 32))


def test_networks_made_for_one_size():
    library("timm")
    args = ["embed_dim=12", "depths=(1,1,1,1)", "num_heads=(1,1,1,1)"]
    usual = choose("timm:swin_tiny_patch4_window7_224", args, ndim=2, in_channels=1)
    assert usual.image_size == (224, 224)
    with refused("image", "(224, 224)", "swin_tiny", "an argument", "(192, 192)"):
        usual(torch.zeros(1, 1, 192, 192))
    with refused("crop", "(224, 224)", "(192, 192)"):
        usual.check_size("crop", (192, 192))
    free = choose("timm:swin_tiny_patch4_window7_224", [*args, "strict_img_size=False"], ndim=2, in_channels=1)
    assert free.image_size is None
    assert [f.shape[-1] for f in free(torch.zeros(1, 1, 96, 160))] == [5, 10, 20, 40]
    library("segmentation_models_pytorch")
    args = ["encoder_name=tu-swin_tiny_patch4_window7_224", "img_size=64"]
    assert choose("smp:FPN", args, ndim=2, in_channels=1).image_size == (64, 64)


def test_the_docs_own_network(tmp_path):
    page = (Path(__file__).parents[1] / "docs/backbones.md").read_text()
    (tmp_path / "net.py").write_text(page.split("```python\n# net.py\n")[1].split("```")[0])
    for ndim in (2, 3):
        backbone = choose(f"{tmp_path}/net.py:factory", ["width=8"], ndim=ndim, in_channels=2)
        assert (backbone.strides, backbone.feature_channels) == ((2, 1), (16, 8))
        assert all(f.isfinite().all() for f in backbone(torch.zeros(1, 2, *[4] * ndim)))


class Keeps(nn.Module):
    """Keeps what it computed for the next image, as some networks do."""

    def __init__(self):
        super().__init__()
        self.conv, self.kept = nn.Conv2d(1, 4, 2, stride=2), None
        self.conv.eval()

    def forward(self, x):
        if self.kept is None:
            self.kept = self.conv.weight.sum()
        fine = self.conv(x) + self.kept
        return [fine[..., ::2, ::2], fine]


def test_measuring_leaves_the_network_as_it_was():
    description = {"kind": "own", "name": "x:y", "args": {}, "ndim": 2, "in_channels": 1}
    backbone = Adapted(Keeps(), lambda model, x: model(x), description)
    assert backbone.strides == (4, 2)
    assert backbone.model.kept is None
    assert [m.training for m in backbone.model.modules()] == [True, False]
    assert type(backbone(torch.zeros(1, 1, 8, 8))[0]) is torch.Tensor


@pytest.mark.parametrize(
    ("name", "args", "ndim", "words"),
    [
        ("timm:test_convnext", [], 3, ("timm", "2 axes", "3")),
        ("timm:convnext_tinny", [], 2, ("convnext_tinny", "near: convnext_tiny")),
        ("timm:resnet18.a1_in1k", [], 2, ("a1_in1k", "near")),
        ("timm:hf-hub:timm/resnet18.a1_in1k", [], 2, ("hf-hub",)),
        ("timm:local-dir:/etc", [], 2, ("local-dir",)),
        ("timm:test_resnet", ["pretrained=True"], 2, ("pretrained", "weights")),
        ("timm:test_resnet", ["checkpoint_path=a.pth"], 2, ("checkpoint_path",)),
        ("timm:test_resnet", ["pretrained_cfg={'file': 'a.pth'}"], 2, ("pretrained_cfg",)),
        ("timm:test_resnet", ["pretrained_cfg_overlay={}", "cache_dir=a"], 2, ("pretrained_cfg_overlay, cache_dir",)),
        ("timm:test_resnet", ["features_only=False"], 2, ("features_only",)),
        ("timm:test_resnet", ["colour=3"], 2, ("timm:test_resnet", "colour")),
        ("timm:test_vit", [], 2, ("timm:test_vit", "halves", "strides (16, 16, 16)")),
        ("timm:coat_tiny", [], 2, ("coat_tiny", "features_only not implemented")),
        ("timm:test_resnet", ["out_indices=[4]"], 2, ("at least 2", "(32,)")),
        ("monai:SwinUnet", [], 2, ("SwinUNETR", "SwinUnet")),
        ("monai:UNETR", [], 2, ("UNETR", "img_size")),
        ("monai:SwinUNETR", ["pretrained=True"], 2, ("MONAI", "pretrained")),
        ("monai:SwinUNETR", ["out_channels=3"], 2, ("out_channels",)),
        ("monai:SwinUNETR", ["feature_size=13"], 2, ("SwinUNETR", "divisible by 12")),
        ("monai:DynUNet", ["deep_supervision=True"], 2, ("deep_supervision",)),
        (
            "monai:DynUNet",
            ["strides=[1,2,[2,1],2,2]", "upsample_kernel_size=[2,[2,1],2,2]"],
            2,
            ("DynUNet", "one number"),
        ),
        ("monai:UNet", ["channels=3"], 2, ("UNet", "channels")),
        ("smp:Unet", [], 3, ("smp", "2 axes", "3")),
        ("smp:DeepLabV3", [], 2, ("FPN, Linknet, MAnet, Unet, UnetPlusPlus", "DeepLabV3")),
        ("smp:Unet", ["encoder_weights=imagenet"], 2, ("no weights", "encoder_weights")),
        ("smp:Unet", ["checkpoint_path=a.pth"], 2, ("checkpoint_path",)),
        ("smp:Unet", ["classes=3"], 2, ("classes",)),
        ("smp:Unet", ["encoder_name=resnet19"], 2, ("resnet19", "near: resnet18")),
        ("smp:Unet", ["encoder_name=tu-hf-hub:timm/resnet18"], 2, ("hf-hub",)),
        ("smp:Unet", ["encoder_name=tu-test_vit"], 2, ("smp:Unet",)),
        ("smp:Unet", ["encoder_depth=4"], 2, ("smp:Unet", "decoder_channels")),
    ],
)
def test_refusals(name, args, ndim, words):
    library(PACKAGE[name.partition(":")[0]])
    with refused(*words):
        choose(name, args, ndim=ndim, in_channels=1)


def test_arguments_must_be_plain():
    library("monai")
    args = {"downsample": nn.Identity}
    with refused("plain", "Identity"):
        build({"kind": "monai", "name": "SwinUNETR", "args": args, "ndim": 2, "in_channels": 1})


@pytest.mark.parametrize("kind", list(PACKAGE))
def test_without_the_library(kind, monkeypatch):
    for module in list(sys.modules):
        if module.partition(".")[0] == PACKAGE[kind]:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, PACKAGE[kind], None)
    with refused("pip install coverfast[backbones]"):
        choose(f"{kind}:X", ndim=2, in_channels=1)


def test_loading_says_what_does_not_fit():
    backbone = made(TIMM[0])
    state = dict(backbone.core.state_dict())
    state["head.weight"] = state.pop("stem_0.bias")
    with refused("1 missing (stem_0.bias)", "1 unexpected (head.weight)"):
        load_state(copy.deepcopy(backbone).core, state, "x")
