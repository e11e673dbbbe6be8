"""The pretrained U-Net in plain torch, 2D and 3D: copy it, coverfast is not needed.

    python examples/plain_unet.py backbone.safetensors

A `backbone.safetensors` of `coverfast pretrain` holds the tensors under the names of this module. What the network
learned from, and how those images were made, is in the metadata of the file.
"""

import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


def double_conv(conv, channels_in, channels_out):
    """Twice: convolution, group norm of 8 channels a group, leaky ReLU."""
    layers = []
    for channels in (channels_in, channels_out):
        layers += [conv(channels, channels_out, 3, padding=1), nn.GroupNorm(channels_out // 8, channels_out)]
        layers += [nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


class PlainUNet(nn.Module):
    """Images `(B, C, *S)` in [0, 1], `S` multiples of the coarsest stride, to feature maps, coarse to fine."""

    def __init__(self, conv, stem, down, up):
        super().__init__()
        self.stem = double_conv(conv, *stem)
        self.down = nn.ModuleList(double_conv(conv, *channels) for channels in down)
        self.up = nn.ModuleList(double_conv(conv, *channels) for channels in up)

    def forward(self, x):
        pool, mode = {4: (F.max_pool2d, "bilinear"), 5: (F.max_pool3d, "trilinear")}[x.ndim]
        skips = [self.stem(x)]
        for stage in self.down:
            skips.append(stage(pool(skips[-1], 2)))
        features = [skips.pop()]
        for stage in self.up:
            up = F.interpolate(features[-1], scale_factor=2, mode=mode, align_corners=False)
            features.append(stage(torch.cat([skips.pop(), up], 1)))
        return features


def load(path):
    """The network of a file; its shape is that of the weights."""
    tensors = {name: value for name, value in load_file(path).items() if not name.startswith("pyramid.")}
    if "stem.0.weight" not in tensors:
        sys.exit(f"{path} holds another network than coverfast's U-Net")
    weights = [(name, value.shape) for name, value in sorted(tensors.items()) if name.endswith(".0.weight")]
    conv = {4: nn.Conv2d, 5: nn.Conv3d}[len(weights[0][1])]
    part = {part: [(s[1], s[0]) for name, s in weights if name.startswith(part)] for part in ("stem", "down", "up")}
    network = PlainUNet(conv, part["stem"][0], part["down"], part["up"])
    network.load_state_dict(tensors)
    return network.eval()


if __name__ == "__main__":
    net = load(sys.argv[1])
    channels, axes = net.stem[0].in_channels, net.stem[0].weight.ndim - 2
    with torch.no_grad():
        for features in net(torch.rand(1, channels, *[2 ** len(net.down) * 4] * axes)):
            print(tuple(features.shape))
