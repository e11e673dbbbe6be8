"""Made-up checkpoints in the layout of the authors' training script."""

from __future__ import annotations

import itertools

import torch
from strategies import randn

CHANNELS, GROUPS, HEAD = (8, 16, 24, 16, 8), (4, 3, 1), 8


def checkpoint(ndim=2, channels=CHANNELS, groups=GROUPS, head=HEAD, in_channels=1, window=5):
    """A state dict in the authors' layout."""
    levels, state, seeds = (len(channels) + 1) // 2, {}, itertools.count(1)

    def tensor(*shape):
        return randn(*shape, seed=next(seeds), dtype=torch.float32)

    def double(prefix, first, out):
        for place, into in ((0, first), (3, out)):
            state[f"{prefix}.double_conv.{place}.weight"] = tensor(out, into, *[3] * ndim) / (into * 3**ndim) ** 0.5
            state[f"{prefix}.double_conv.{place}.bias"] = 0.1 * tensor(out)
            state[f"{prefix}.double_conv.{place + 1}.weight"] = 1 + 0.3 * tensor(out)
            state[f"{prefix}.double_conv.{place + 1}.bias"] = 0.3 * tensor(out)

    encoder, features = channels[:levels], channels[levels - 1 :]
    double("backbone.inc", in_channels, encoder[0])
    for i in range(1, levels):
        double(f"backbone.down{i}.maxpool_conv.1", encoder[i - 1], encoder[i])
    for i in range(1, levels):
        double(f"backbone.up{i}.conv", features[i - 1] + encoder[-1 - i], features[i])
    for level, (into, count) in enumerate(zip(features, groups, strict=True)):
        state[f"proj.{level}.proj.weight"] = tensor(count * head, into, *[1] * ndim) / into**0.5
        state[f"proj.{level}.proj.bias"] = 0.3 * tensor(count * head)
        state[f"proj.{level}.norm.weight"] = 1 + 0.3 * tensor(count * head)
        state[f"proj.{level}.norm.bias"] = 0.3 * tensor(count * head)
    offsets = torch.cartesian_prod(*[torch.arange(window) - window // 2] * ndim)
    state["mov.grid"] = offsets.T[None].float()
    return state
