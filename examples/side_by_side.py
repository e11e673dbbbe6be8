"""What the drop-in examples measure of a method's two variants, and how they print it."""

import argparse
import importlib
import random
import statistics
import sys
import time
from math import nan

import torch

from coverfast.bench.measure import device_growth, high_water_mark, process_growth
from coverfast.phantom import phantom


def arguments(description, *, sizes, windows, steps):
    """The command line; `sizes` and `windows` are the defaults in 2D and in 3D."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--ndim", type=int, choices=(2, 3), default=2)
    parser.add_argument("--size", type=int, help=f"of the images, pixels an axis; default {sizes[0]}, in 3D {sizes[1]}")
    parser.add_argument("--window", type=int, help=f"pixels, odd; default {windows[0]}, in 3D {windows[1]}")
    parser.add_argument("--steps", type=int, default=steps)
    args = parser.parse_args()
    args.size, args.window = args.size or sizes[args.ndim - 2], args.window or windows[args.ndim - 2]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False  # else no two runs agree
    return args


def phantoms(args, count, seed):
    """Images `(count, 1, *S)` and their label maps."""
    subjects = [phantom(args.ndim, args.size, seed=seed, index=index) for index in range(count)]
    pairs = zip(*((subject.image, subject.labels) for subject in subjects), strict=True)
    images, labels = (torch.stack([torch.from_numpy(array) for array in arrays])[:, None] for arrays in pairs)
    return images, labels


def train(methods, batches, learning_rate):
    """Train all methods on the same batches: for each its loss of every step, and the median of its seconds a step.

    They step in turn, and not always in the same order, so that a busy moment of the machine meets both.
    """
    # The usual eps of 1e-8 would blow up the rounding of gradients that are zero to steps as long as any.
    optimizers = [torch.optim.Adam(method.parameters(), learning_rate, eps=1e-4) for method in methods]
    losses, seconds = ([[] for _ in methods] for _ in range(2))
    order, shuffle = list(range(len(methods))), random.Random(0).shuffle
    for step, batch in enumerate(batches, start=1):
        shuffle(order)
        for i in order:
            start = time.perf_counter()
            loss = methods[i].loss(*batch)
            optimizers[i].zero_grad()
            loss.backward()
            optimizers[i].step()
            losses[i].append(loss.item())  # waits for the device
            seconds[i].append(time.perf_counter() - start)
        print(f"\rstep {step}, loss {loss:.3f} ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return losses, [statistics.median(taken) for taken in seconds]


def matching_memory(script, shape, args, *, keys_learn=True):
    """Extra MB of one forward and backward of every matching of a script on `(B, C, *S)`; a process each on a CPU."""
    job = script, shape, args.window, args.device, keys_learn
    if args.device != "cpu":
        return [device_growth(_call(name, *job)) for name in _matchings(script)]
    if sys.platform != "linux":
        return [nan for _ in _matchings(script)]
    return [process_growth(_growth, name, *job, repeats=1) for name in _matchings(script)]


def _matchings(script):
    return importlib.import_module(script).MATCH


def _call(name, script, shape, window, device, keys_learn):
    q, k = (torch.randn(shape, device=device, requires_grad=learns) for learns in (True, keys_learn))
    return lambda: _matchings(script)[name](q, k, window).sum().backward()


def _growth(name, script, shape, window, device, keys_learn):
    small = [*shape[:2], *[window] * (len(shape) - 2)]
    _call(name, script, small, window, device, keys_learn)()  # to load what a first call loads
    call = _call(name, script, shape, window, device, keys_learn)
    before = high_water_mark(reset=True)
    call()
    return high_water_mark() - before


def print_table(names, losses, more):
    """A column for each name: its loss curve, and below it the rows of `more`, (title, values, format)."""
    steps = len(losses[0])
    shown = sorted({1, *range(10, steps, 10), steps})
    rows = [(f"loss at step {step}", [curve[step - 1] for curve in losses], ".5f") for step in shown]
    rows += [("mean of the first five", [statistics.mean(curve[:5]) for curve in losses], ".5f")]
    rows += [("mean of the last five", [statistics.mean(curve[-5:]) for curve in losses], ".5f")]
    for title, values, form in [("", names, ""), *rows, *more]:
        print(f"{title:<36}" + "".join(f"{value:>12{form}}" for value in values))
    print(f"largest difference of the curves: {max(abs(a - b) for a, b in zip(*losses, strict=True)):.1e}")
