"""The paper's U-Net: sizes, counts, geometry, refusals (SPEC 7)."""

import pytest
import torch
import torch.nn.functional as F
from strategies import assert_near, randn, refused
from torch import nn

from coverfast import UNet, VectorPyramid
from coverfast.backbones import PAPER_CHANNELS

SMALL = (8, 16, 24, 16, 8)


def parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(("ndim", "alone", "projected"), [(2, 7_851_936, 7_881_712), (3, 23_538_144, 23_567_920)])
def test_parameter_counts(ndim, alone, projected):
    with torch.device("meta"):
        unet = UNet(ndim)
        pyramid = VectorPyramid(ndim, unet.feature_channels)
    assert parameters(unet) == alone
    assert parameters(unet, pyramid) == projected


def test_the_defaults_are_the_papers():
    with torch.device("meta"):
        unet = UNet(3)
    assert unet.channels == PAPER_CHANNELS == (32, 64, 128, 256, 512, 256, 128, 64, 32)
    assert unet.feature_channels == (512, 256, 128, 64, 32)
    assert unet.strides == (16, 8, 4, 2, 1)
    assert not list(unet.buffers())


@pytest.mark.parametrize(
    ("size", "channels", "in_channels"),
    [
        ((32, 48), (8, 8, 16, 16, 24, 16, 16, 8, 8), 1),
        ((12, 4), SMALL, 3),
        ((8, 4, 12), SMALL, 2),
        ((2, 6), (8, 16, 24), 1),
    ],
    ids=str,
)
def test_feature_maps(size, channels, in_channels):
    unet = UNet(len(size), in_channels, channels)
    features = unet(randn(2, in_channels, *size, dtype=torch.float32))
    assert len(features) == (len(channels) + 1) // 2
    for f, c, stride in zip(features, unet.feature_channels, unet.strides, strict=True):
        assert f.shape == (2, c, *(s // stride for s in size))
        assert f.isfinite().all()


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_network_by_hand(ndim):
    unet, x = UNet(ndim, 1, (8, 16, 24)).double(), randn(2, 1, *[4, 6, 2][:ndim])
    pool, mode = (F.max_pool2d, "bilinear") if ndim == 2 else (F.max_pool3d, "trilinear")
    conv = F.conv2d if ndim == 2 else F.conv3d
    weights = dict(unet.named_parameters())

    def double(x, stage):
        for i in (0, 3):
            x = conv(x, weights[f"{stage}.{i}.weight"], weights[f"{stage}.{i}.bias"], padding=1)
            groups = x.shape[1] // 8
            x = F.group_norm(x, groups, weights[f"{stage}.{i + 1}.weight"], weights[f"{stage}.{i + 1}.bias"])
            x = F.leaky_relu(x, 0.2)
        return x

    top = double(x, "stem")
    bottom = double(pool(top, 2), "down.0")
    up = F.interpolate(bottom, scale_factor=2, mode=mode, align_corners=False)
    # The order of concatenation is not part of the definition: exactly one of the two must fit.
    both = [double(torch.cat(pair, 1), "up.0") for pair in ((top, up), (up, top))]
    coarse, fine = unet(x)
    assert_near(coarse, bottom)
    assert sum(torch.allclose(fine, candidate) for candidate in both) == 1


def test_kaiming_normal_weights():
    torch.manual_seed(0)
    for conv in (m for m in UNet(2).modules() if isinstance(m, nn.Conv2d)):
        fan_in = conv.weight[0].numel()
        expected = (2 / (1 + 0.2**2) / fan_in) ** 0.5
        assert float(conv.weight.detach().std()) == pytest.approx(expected, rel=0.2 if fan_in < 50 else 0.05)
        assert not conv.bias.any()


def test_samples_do_not_mix():
    unet, x = UNet(2, 1, SMALL).double(), randn(3, 1, 8, 12)
    whole = unet(x)
    for i in range(3):
        for f, g in zip(unet(x[i : i + 1]), whole, strict=True):
            assert_near(f[0], g[i])


@pytest.mark.parametrize("ndim", [2, 3])
def test_gradients_reach_every_parameter(ndim):
    unet = UNet(ndim, 1, SMALL)
    sum(f.square().mean() for f in unet(randn(2, 1, *[8, 12, 4][:ndim], dtype=torch.float32))).backward()
    for name, parameter in unet.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_refusals():
    unet = UNet(2, 1, (8, 8, 16, 16, 24, 16, 16, 8, 8))
    for size in ((40, 32), (32, 8), (33, 32)):
        with refused("16", str(size)):
            unet(torch.zeros(1, 1, *size))
    with refused("image", "(B, 1, *S)", "(1, 2, 16, 16)"):
        unet(torch.zeros(1, 2, 16, 16))
    with refused("image", "2 spatial axes", "(1, 1, 16, 16, 16)"):
        unet(torch.zeros(1, 1, 16, 16, 16))
    with refused("image", "uint8"):
        unet(torch.zeros(1, 1, 16, 16, dtype=torch.uint8))
    for ndim in (1, 4, "2"):
        with refused("ndim", str(ndim)):
            UNet(ndim)
    for channels in ((8, 16), (8, 12, 8), (8,), (), (8, 0, 8), (8, -8, 8)):
        with refused("channels", str(channels)):
            UNet(2, 1, channels)
    with refused("in_channels", "0"):
        UNet(2, 0)
