"""A registration network, with its own cost volume and with `coverfast.mov` in its place.

    python examples/registration_cost_volume.py           # 2D, under a minute on two CPU cores
    python examples/registration_cost_volume.py --ndim 3
    python examples/registration_cost_volume.py --device cuda --size 256 --window 13

One encoder sees the fixed and the moving image and gives features at half the resolution. Their dot products in a
window are a cost volume; its softmax over the window gives an expected displacement, as in ModeT (MICCAI 2023) and
Vector Field Attention (2024). Twice as fine, that is the field that warps the moving image onto the fixed one. The
network learns without a truth, from how unlike the two then are and how rough the field is. The pairs are phantoms,
displaced by a known smooth field, so that the truth is there to measure by.

Two copies are trained from one seed on the same pairs: one with the cost volume as it is usually written, the keys
shifted (`match_shifted`), one with `coverfast.mov` (`match_coverfast`). The lines that differ stand between "before" or
"after" and "end"; all else is shared. Printed side by side: the loss, which falls along the same curve to rounding; how
well held-out pairs are registered, before training and after it; seconds a step; and the memory that one forward and
backward of the matching needs beside its inputs.
"""

from itertools import product
from math import inf

import torch
import torch.nn.functional as F
from side_by_side import arguments, matching_memory, phantoms, print_table, train
from torch import nn

from coverfast import end_point_error, mov, upsample_dvf, warp
from coverfast.downstream.metrics import dice_per_class

BATCH, CHANNELS, SEED = 2, 16, 0
SMOOTHNESS, LEARNING_RATE = 0.05, 1e-3


def match_shifted(q, k, window):
    """Where in k is what q shows here: a cost volume, one shift of the keys at a time, and its expected offset."""
    # before
    size, radius = q.shape[2:], window // 2
    pad = [radius] * 2 * len(size)
    keys, outside = F.pad(k, pad), F.pad(torch.zeros_like(k[0, 0]), pad, value=-inf)
    shifts = list(product(range(window), repeat=len(size)))
    costs = []
    for shift in shifts:
        here = (..., *[slice(start, start + s) for start, s in zip(shift, size, strict=True)])
        costs.append((q * keys[here]).sum(1) * q.shape[1] ** -0.5 + outside[here])
    weights = torch.stack(costs, 1).softmax(1)
    offsets = torch.tensor(shifts, device=q.device, dtype=q.dtype) - radius
    psi = torch.einsum("bo...,on->bn...", weights, offsets)
    # end
    return psi


def match_coverfast(q, k, window):
    """The same numbers from the operator."""
    # after
    psi = mov(q, k, window=window)
    # end
    return psi


MATCH = {"shifted": match_shifted, "coverfast": match_coverfast}


def displaced(moving, window, generator):
    """The fixed image and the field that registers `moving` with it, smooth and up to eight tenths of the reach."""
    n, size = moving.ndim - 2, moving.shape[2:]
    knots = torch.rand(len(moving), n, *[3] * n, generator=generator) * 2 - 1
    reach = 2 * (window // 2)  # in pixels of the image, of which a feature covers two
    psi = 0.8 * reach * F.interpolate(knots, size, mode="bilinear" if n == 2 else "trilinear")
    return warp(moving, psi) + 0.01 * torch.randn(moving.shape, generator=generator), psi


class Registration(nn.Module):
    """Encoder, matching, field."""

    def __init__(self, match, ndim, window):
        super().__init__()
        torch.manual_seed(SEED)
        conv = nn.Conv2d if ndim == 2 else nn.Conv3d
        layers = [conv(1, CHANNELS, 3, padding=1, stride=2)]
        for gap in (1, 2, 1):
            layers += [nn.GroupNorm(4, CHANNELS), nn.SiLU(), conv(CHANNELS, CHANNELS, 3, padding=gap, dilation=gap)]
        self.encoder = nn.Sequential(*layers, nn.GroupNorm(CHANNELS, CHANNELS))
        self.match, self.window = match, window

    def forward(self, fixed, moving):
        """The field that warps `moving` onto `fixed`, in pixels."""
        return upsample_dvf(self.match(self.encoder(fixed), self.encoder(moving), self.window), fixed.shape[2:])

    def loss(self, fixed, moving):
        """Mean square of the difference that is left, and of the slopes of the field."""
        psi = self(fixed, moving)
        slopes = sum(psi.diff(dim=axis).square().mean() for axis in range(2, psi.ndim))
        return F.mse_loss(warp(moving, psi), fixed) + SMOOTHNESS * slopes


def errors(psi, truth, labels):
    """Mean distance to the true field, over the body, in pixels; and Dice, mean over the tissues and the pairs."""
    fixed, found = (warp(labels, field, mode="nearest") for field in (truth, psi))
    pairs = zip(found[:, 0].cpu().numpy(), fixed[:, 0].cpu().numpy(), strict=True)
    dice = [dice_per_class(a, b, int(labels.max()) + 1).mean() for a, b in pairs]
    return end_point_error(psi, truth, fixed > 0).item(), sum(dice) / len(dice)


def main():
    """Train with both, and print them side by side."""
    args = arguments(__doc__.splitlines()[0], sizes=(128, 48), windows=(9, 5), steps=50)
    images, labels = phantoms(args, 12, SEED)
    images, labels = (images - images.mean()) / images.std(), labels[8:].to(args.device)
    generator = torch.Generator().manual_seed(SEED)

    def pair(moving):
        fixed, psi = displaced(moving, args.window, generator)
        return [x.to(args.device) for x in (fixed, moving, psi)]

    *test, truth = pair(images[8:])
    methods = [Registration(match, args.ndim, args.window).to(args.device) for match in MATCH.values()]

    def measure():
        with torch.no_grad():
            return [errors(method(*test), truth, labels) for method in methods]

    before, steps = measure(), range(args.steps)
    batches = (pair(images[torch.randint(8, (BATCH,), generator=generator)])[:2] for _ in steps)
    losses, seconds = train(methods, batches, LEARNING_RATE)
    after, still = measure(), [errors(torch.zeros_like(truth), truth, labels)] * len(MATCH)
    half = [(args.size + 1) // 2] * args.ndim
    memory = matching_memory("registration_cost_volume", (BATCH, CHANNELS, *half), args)

    print(f"{args.ndim}D, {BATCH} x {CHANNELS} channels at half of size {args.size}, window {args.window}")
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    rows = []
    for number, title in enumerate(("pixels off", "Dice")):
        for when, found in (("not registered", still), ("untrained", before), ("trained", after)):
            rows.append((f"{title}, {when}", [figures[number] for figures in found], ".3f"))
    rows += [("seconds a step, median", seconds, ".3f"), ("matching, extra MB", memory, ".0f")]
    print_table(MATCH, losses, rows)


if __name__ == "__main__":
    main()
