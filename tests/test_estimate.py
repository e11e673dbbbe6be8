"""What a step will take: operations as in SPEC 7, and the rate of a device."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from coverfast.methods.cover import Cover
from coverfast.training.assembly import build_method
from coverfast.training.estimate import duration, matrix_rate, step_flops
from coverfast.training.settings import preset_settings


def projections(method: Cover) -> int:
    """Operations a pixel of the finest level, of one image, of the pyramid's 1x1 convolutions."""
    pyramid, total = method.pyramid, 0.0
    for level, (c, j) in enumerate(zip(pyramid.channels, pyramid.groups, strict=True)):
        total += 2 * c * j * pyramid.head_dim / 2 ** (pyramid.ndim * (len(pyramid.channels) - 1 - level))
    return total


@pytest.mark.parametrize(("preset", "gflop"), [("paper-2d", 62.6), ("paper-3d", 1152.4)])
def test_operations_are_those_of_the_specification(preset, gflop):
    s, n = preset_settings(preset), int(preset[-2])
    method = build_method(s, n, 1)
    step_flops(method, 1)  # what a first call imports
    before, weights = torch.random.get_rng_state(), [p.clone() for p in method.parameters()]
    begun = time.perf_counter()
    found = step_flops(method, s.batch)
    assert time.perf_counter() - begun < 2
    images = 2 * s.batch  # both views
    forward = found / 3 / images - projections(method) * s.crop[0] ** n
    assert forward / 1e9 == pytest.approx(gflop, abs=0.05)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights, method.parameters(), strict=True))
    assert all(p.grad is None for p in method.parameters())


def test_operations_of_other_channels_and_batches():
    s = replace(preset_settings("small-2d"), crop=(32, 48))
    one, two = build_method(s, 2, 1), build_method(s, 2, 3)
    assert step_flops(one, 3) == pytest.approx(3 * step_flops(one, 1))
    more = 2 * 9 * 2 * 16 * 32 * 48  # of the first convolution, of one image
    assert step_flops(two, 1) - step_flops(one, 1) == pytest.approx(3 * 2 * more)


def test_rate_is_measured():
    before = torch.random.get_rng_state()
    begun = time.perf_counter()
    rate = matrix_rate(torch.device("cpu"), torch.float32)
    assert time.perf_counter() - begun < 3
    assert 1e8 < rate < 1e14
    assert torch.equal(before, torch.random.get_rng_state())
    a = torch.randn(512, 512)
    torch.mm(a, a)
    begun = time.perf_counter()
    for _ in range(20):
        a @ a
    here = 20 * 2 * 512**3 / (time.perf_counter() - begun)
    assert 0.2 < rate / here < 10


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0351, "35 ms"),
        (0.0996, "0.1 s"),
        (2.54, "2.5 s"),
        (9.96, "10 s"),
        (59.7, "1 min"),
        (200, "3 min 20 s"),
        (3599.7, "1 h"),
        (7261, "2 h 1 min"),
        (86399, "1 day"),
        (5 * 86400 + 4 * 3600 + 1700, "5 days 4 h"),
    ],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text
