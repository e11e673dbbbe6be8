"""A dense self-supervised script as people write it, and the same script with `coverfast.mov` in it.

    python examples/dense_ssl_drop_in.py                  # 2D, under a minute on two CPU cores
    python examples/dense_ssl_drop_in.py --ndim 3
    python examples/dense_ssl_drop_in.py --device cuda --size 256 --window 13

A small convolutional network sees two views of an image, one displaced by a known smooth field, and must find that
field again by matching its features in a window around every pixel. It is trained twice from one seed: first with the
matching as it is usually written, keys unfolded (`match_unfolded`), then with `coverfast.mov` (`match_coverfast`). The
lines that differ stand between "before" or "after" and "end"; all else is shared.

Printed side by side: the loss, which falls along the same curve to rounding; seconds a step; and the memory that one
forward and backward of the matching needs beside its inputs.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from math import inf, nan

import torch
import torch.nn.functional as F
from torch import nn

from coverfast import mov
from coverfast.bench.measure import high_water_mark
from coverfast.phantom import phantom

BATCH, CHANNELS, SEED = 2, 16, 0


def match_unfolded(q, k, window):
    """Where in k is what q shows here: unfold the keys, multiply, mask, softmax, expected offset in pixels."""
    n, scale, pad = q.ndim - 2, q.shape[1] ** -0.5, [window // 2] * (2 * q.ndim - 4)
    offsets = torch.cartesian_prod(*[torch.arange(window, device=q.device) - window // 2] * n).to(q)
    # before
    keys, outside = F.pad(k, pad), F.pad(torch.zeros_like(k[:1, :1]), pad, value=-inf)
    for axis in range(2, q.ndim):
        keys, outside = keys.unfold(axis, window, 1), outside.unfold(axis, window, 1)
    scores = (q[(..., *[None] * n)] * keys).sum(1) * scale + outside[:, 0]
    psi = (scores.flatten(-n).softmax(-1) @ offsets).movedim(-1, 1)
    # end
    return psi


def match_coverfast(q, k, window):
    """The same numbers from the operator."""
    # after
    psi = mov(q, k, window=window)
    # end
    return psi


MATCH = {"unfolded": match_unfolded, "coverfast": match_coverfast}


def two_views(images, window, generator):
    """View b shows at p what the image shows at p + psi(p); view a is the image with other contrast and noise."""
    b, n = len(images), images.ndim - 2
    knots = torch.rand(b, n, *[4] * n, generator=generator) * 2 - 1  # so psi never leaves the window
    psi = window // 2 * F.interpolate(knots, images.shape[2:], mode="bilinear" if n == 2 else "trilinear")
    grid = F.affine_grid(torch.eye(n, n + 1).expand(b, -1, -1), list(images.shape), align_corners=False)
    grid = grid + psi.movedim(1, -1).flip(-1) * 2 / images.shape[-1]
    view_b = F.grid_sample(images, grid, align_corners=False)
    contrast = 0.8 + 0.4 * torch.rand(b, *[1] * (n + 1), generator=generator)
    view_a = images * contrast + 0.01 * torch.randn(images.shape, generator=generator)
    return view_a, view_b, psi, grid.abs().amax(-1) <= 1


def network(conv):
    """Plain convolutions at full resolution, some of them dilated."""
    layers = [conv(1, CHANNELS, 3, padding=1)]
    for gap in (2, 4, 4, 1):
        layers += [nn.GroupNorm(4, CHANNELS), nn.SiLU(), conv(CHANNELS, CHANNELS, 3, padding=gap, dilation=gap)]
    return nn.Sequential(*layers, nn.GroupNorm(CHANNELS, CHANNELS))


def train(name, images, args):
    """Loss of every step, and the median of their seconds."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    net = network(nn.Conv2d if args.ndim == 2 else nn.Conv3d).to(args.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    losses, seconds = [], []
    for step in range(1, args.steps + 1):
        chosen = images[torch.randint(len(images), (BATCH,), generator=generator)]
        view_a, view_b, psi, seen = (x.to(args.device) for x in two_views(chosen, args.window, generator))
        start = time.perf_counter()
        found = MATCH[name](net(view_b), net(view_a), args.window)
        # L1, rounded at its corner: there the last bit of a pixel would decide the sign of its gradient.
        loss = F.smooth_l1_loss(found, psi, reduction="none", beta=0.1).sum(1)[seen].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - start)
        print(f"\r{name}: step {step} of {args.steps}, loss {losses[-1]:.3f} ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return losses, statistics.median(seconds)


def memory(name, args):
    """Extra MB of one forward and backward of the matching; on a CPU in a process of its own."""
    cpu = args.device == "cpu"
    if cpu and not args.memory_of:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory leaves the process at once
        return float(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    if cpu and sys.platform != "linux":
        return nan
    for size in (args.window, args.size):  # small first, to load what a first call loads
        q, k = (torch.randn(BATCH, CHANNELS, *[size] * args.ndim, device=args.device).requires_grad_() for _ in "qk")
        before = high_water_mark() if cpu else torch.cuda.memory_allocated() / 1e6
        if not cpu:
            torch.cuda.reset_peak_memory_stats()
        MATCH[name](q, k, args.window).sum().backward()
    return (high_water_mark() if cpu else torch.cuda.max_memory_allocated() / 1e6) - before


def row(title, values, form):
    """One line of the table."""
    print(f"{title:<26}" + "".join(f"{value:>12{form}}" for value in values))


def main():
    """Train with both, and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--ndim", type=int, choices=(2, 3), default=2)
    parser.add_argument("--size", type=int, help="of the images, pixels an axis; default 96, in 3D 24")
    parser.add_argument("--window", type=int, help="pixels an axis, odd; default 9, in 3D 5")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--memory-of", choices=MATCH, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.size, args.window = args.size or (96, 24)[args.ndim - 2], args.window or (9, 5)[args.ndim - 2]
    if args.memory_of:
        print(memory(args.memory_of, args))
        return
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False  # else no two runs agree
    images = [torch.from_numpy(phantom(args.ndim, args.size, seed=SEED, index=i).image) for i in range(8)]
    losses, seconds = zip(*(train(name, torch.stack(images)[:, None], args) for name in MATCH), strict=True)
    print(f"{args.ndim}D, {BATCH} x {CHANNELS} channels, size {args.size}, window {args.window}")
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    row("", MATCH, "")
    for step in sorted({1, *range(10, args.steps, 10), args.steps}):
        row(f"loss at step {step}", [curve[step - 1] for curve in losses], ".5f")
    row("mean of the first five", [statistics.mean(curve[:5]) for curve in losses], ".5f")
    row("mean of the last five", [statistics.mean(curve[-5:]) for curve in losses], ".5f")
    row("seconds a step, median", seconds, ".3f")
    row("matching, extra MB", [memory(name, args) for name in MATCH], ".0f")
    print(f"largest difference of the curves: {max(abs(a - b) for a, b in zip(*losses, strict=True)):.1e}")


if __name__ == "__main__":
    main()
