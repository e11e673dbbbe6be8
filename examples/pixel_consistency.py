"""Pixel-consistency pretraining in the manner of PixPro, with its own local matching and with `coverfast.mov`.

    python examples/pixel_consistency.py                  # 2D, under a minute on two CPU cores
    python examples/pixel_consistency.py --ndim 3
    python examples/pixel_consistency.py --device cuda --size 256 --window 13

As in PixPro (Xie et al., "Propagate Yourself", CVPR 2021) a pixel of one view, its feature mixed with those of pixels
that look alike, must agree with what a momentum encoder says of the same place in another view; there are no negatives.
There the place is known from how the views were cropped. Here that is half of the truth, as between two scans of one
patient that a scanner's coordinates align: tissue has moved by a few pixels besides. So each pixel first looks for
itself in a window around the known place, by likeness, and agrees with what it finds there.

Two copies are trained from one seed on the same views: one looks with unfolded keys as they are usually written
(`match_unfolded`), one with `coverfast.mov` (`match_coverfast`). The lines that differ stand between "before" or
"after" and "end"; all else is shared. Printed side by side: the loss, which falls along the same curve to rounding;
how well the pixels of held-out images find themselves, before training and after it; seconds a step; and the memory
that one forward and backward of the matching needs beside its inputs.
"""

import copy
from math import inf

import torch
import torch.nn.functional as F
from side_by_side import arguments, matching_memory, phantoms, print_table, train
from torch import nn

from coverfast import affine_dvf, end_point_error, inside_mask, mov, warp

BATCH, CHANNELS, SEED = 2, 16, 0
TEMPERATURE, MOMENTUM, LEARNING_RATE = 0.1, 0.9, 1e-3


def match_unfolded(q, k, window):
    """Where in k is what q shows here: likeness to all keys of a window, softmax, expected offset in pixels."""
    # before
    n, radius = q.ndim - 2, window // 2
    keys, inside = (F.pad(x, [radius] * 2 * n) for x in (k, torch.ones_like(k[:1, :1])))
    for axis in range(2, q.ndim):
        keys, inside = keys.unfold(axis, window, 1), inside.unfold(axis, window, 1)
    likeness = torch.einsum("bc...,bc...o->b...o", q, keys.flatten(-n)) / TEMPERATURE
    weights = likeness.masked_fill(inside.flatten(-n)[:, 0] == 0, -inf).softmax(-1)
    offsets = torch.cartesian_prod(*[torch.arange(-radius, radius + 1.0, device=q.device)] * n)
    found = torch.einsum("b...o,on->bn...", weights, offsets)
    # end
    return found


def match_coverfast(q, k, window):
    """The same numbers from the operator."""
    # after
    found = mov(q, k, window=window, scale=1 / TEMPERATURE)
    # end
    return found


MATCH = {"unfolded": match_unfolded, "coverfast": match_coverfast}


def two_views(images, window, generator):
    """Two views of images, the known part of what lies between them, the unknown part, and the pixels both show.

    View a, warped by `known` and then by `moved`, shows what view b does.
    """
    b, n, size = len(images), images.ndim - 2, images.shape[2:]

    def uniform(*shape):
        return torch.rand(b, *shape, generator=generator) * 2 - 1

    turn, shift = torch.eye(n) + 0.1 * uniform(n, n), 0.15 * size[0] * uniform(n, 1)
    known = affine_dvf(torch.cat([turn, shift], 2), size)
    moved = window // 2 * F.interpolate(uniform(n, *[2] * n), size, mode="bilinear" if n == 2 else "trilinear")
    whole = moved + warp(known, moved, padding="border")
    views = []
    for view in (images, warp(images, whole, padding="border")):
        gamma, brighter = 1 + 0.3 * uniform(*[1] * (n + 1)), 0.1 * uniform(*[1] * (n + 1))
        views.append(view**gamma + brighter + 0.01 * torch.randn(view.shape, generator=generator))
    return *views, known, moved, inside_mask(whole) & inside_mask(moved)


def network(conv):
    """Plain convolutions at full resolution, some of them dilated."""
    layers = [conv(1, CHANNELS, 3, padding=1)]
    for gap in (2, 4, 4, 1):
        layers += [nn.GroupNorm(4, CHANNELS), nn.SiLU(), conv(CHANNELS, CHANNELS, 3, padding=gap, dilation=gap)]
    return nn.Sequential(*layers, nn.GroupNorm(CHANNELS, CHANNELS))


class PixelConsistency(nn.Module):
    """An encoder that learns, one that follows it, and the propagation between them."""

    def __init__(self, match, ndim, window):
        super().__init__()
        torch.manual_seed(SEED)
        conv = nn.Conv2d if ndim == 2 else nn.Conv3d
        self.match, self.window = match, window
        self.online, self.transform = network(conv), conv(CHANNELS, CHANNELS, 1)
        self.momentum = copy.deepcopy(self.online).requires_grad_(False)

    def propagate(self, x):
        """PixPro's Eq. 3 over every few pixels: features summed by the square of their positive likeness.

        Added to the pixel's own feature, as a residual; alone it would blur so young a network.
        """
        few = (..., *[slice(self.window // 2, None, self.window)] * (x.ndim - 2))
        unit = F.normalize(x, dim=1)
        likeness = torch.einsum("bcp,bcm->bpm", unit.flatten(2), unit[few].flatten(2)).relu().square()
        return x + torch.einsum("bpm,bcm->bcp", likeness, self.transform(x[few]).flatten(2)).view_as(x)

    def find(self, view_a, view_b, known):
        """Features of b, momentum features of a at the known places, and the offset at which b finds itself in a."""
        features = self.online(view_b)
        with torch.no_grad():
            there = warp(F.normalize(self.momentum(view_a), dim=1), known, padding="border")
        return features, there, self.match(F.normalize(features, dim=1), there, self.window)

    def loss(self, view_a, view_b, known, _moved, both):
        """1 - cosine of a pixel and what it finds, mean over the pixels that both views show."""
        for theirs, ours in zip(self.momentum.parameters(), self.online.parameters(), strict=True):
            theirs.data.lerp_(ours.data, 1 - MOMENTUM)
        features, there, found = self.find(view_a, view_b, known)
        # A match on a pixel's centre, to rounding, gets the slope of one cell or of the next: only there can the two
        # variants part by more than rounding.
        agreement = F.cosine_similarity(self.propagate(features), warp(there, found, padding="border"))
        return 1 - agreement[both[:, 0]].mean()


def errors(method, views, labels):
    """On held-out views: how far from the truth pixels find themselves, and the share that lands in its own tissue.

    Of the pixels that both views show and that are not background. Without a method, of the known places alone.
    """
    view_a, view_b, known, moved, both = views
    with torch.no_grad():
        found = method.find(view_a, view_b, known)[2] if method else torch.zeros_like(moved)
        at_known = warp(labels, known, mode="nearest")
        truth, there = (warp(at_known, offset, mode="nearest") for offset in (moved, found))
        seen = both & (truth > 0)
        return end_point_error(found, moved, seen).item(), (there == truth)[seen].double().mean().item()


def main():
    """Train with both, and print them side by side."""
    args = arguments(__doc__.splitlines()[0], sizes=(96, 24), windows=(9, 5), steps=50)
    images, labels = phantoms(args, 12, SEED)
    learned, held_out, labels = images[:8], images[8:], labels[8:].to(args.device)
    generator = torch.Generator().manual_seed(SEED)

    def draw(chosen):
        return [x.to(args.device) for x in two_views(chosen, args.window, generator)]

    test = draw(held_out)
    methods = [PixelConsistency(match, args.ndim, args.window).to(args.device) for match in MATCH.values()]
    before = [errors(method, test, labels) for method in methods]
    batches = (draw(learned[torch.randint(8, (BATCH,), generator=generator)]) for _ in range(args.steps))
    losses, seconds = train(methods, batches, LEARNING_RATE)
    after = [errors(method, test, labels) for method in methods]
    memory = matching_memory("pixel_consistency", (BATCH, CHANNELS, *[args.size] * args.ndim), args, keys_learn=False)

    print(f"{args.ndim}D, {BATCH} x {CHANNELS} channels, size {args.size}, window {args.window}")
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    known = [errors(None, test, labels)] * len(MATCH)
    rows = []
    for number, title in enumerate(("pixels off", "share in its own tissue")):
        for when, found in (("known place", known), ("untrained", before), ("trained", after)):
            rows.append((f"{title}, {when}", [figures[number] for figures in found], ".3f"))
    rows += [("seconds a step, median", seconds, ".3f"), ("matching, extra MB", memory, ".0f")]
    print_table(MATCH, losses, rows)


if __name__ == "__main__":
    main()
