"""Philox-4x32-10: known answers of Random123, moments, and independence of everything a draw is keyed by."""

from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coverfast.philox import normal, permutation, philox_4x32, random_words, uniform

ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SAMPLES = torch.arange(4)


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_known_answers(counter, key, answer):
    low, high = words(key)
    out = philox_4x32(tuple(torch.tensor([c]) for c in words(counter)), low | high << 32)
    assert [int(word) for word in out] == words(answer)


def test_words_are_laid_out_by_counter():
    out = random_words(7, 2, 11, torch.tensor([5, 2**31 + 1]), 10)
    assert out.shape == (2, 10)
    for row, sample in enumerate((5, 2**31 + 1)):
        for block in range(3):
            counter = tuple(torch.tensor(c) for c in (block, sample, 11, 2))
            expected = [int(word) for word in philox_4x32(counter, 7)]
            assert out[row, 4 * block : 4 * block + 4].tolist() == expected[: 10 - 4 * block]


def test_uniform_moments():
    u = uniform(1, 0, 1, torch.arange(8), 50_000)
    assert u.dtype == torch.float32
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert float(u.min()) < 1e-4
    assert float(u.max()) > 1 - 1e-4
    assert float(u.mean()) == pytest.approx(0.5, abs=5 / sqrt(12 * u.numel()))
    assert float(u.double().var()) == pytest.approx(1 / 12, rel=0.01)
    share = torch.histc(u, 64, 0, 1) / u.numel() * 64
    assert float((share - 1).abs().max()) < 5 * sqrt(64 / u.numel())


def test_normal_moments():
    z = normal(1, 0, 1, torch.arange(8), 50_001).double()
    assert z.shape == (8, 50_001)
    assert z.isfinite().all()
    assert float(z.mean()) == pytest.approx(0, abs=5 / sqrt(z.numel()))
    assert float(z.var()) == pytest.approx(1, rel=0.02)
    assert float((z**3).mean()) == pytest.approx(0, abs=0.03)
    assert float((z**4).mean()) == pytest.approx(3, rel=0.03)
    assert float((z.abs() < 1).double().mean()) == pytest.approx(0.6827, abs=0.004)


@pytest.mark.parametrize("draw", [uniform, normal])
def test_every_key_changes_everything(draw):
    count, one = 20_000, torch.tensor([3])
    base = draw(5, 1, 9, one, count)[0].double()
    assert torch.equal(draw(5, 1, 9, one, count)[0].double(), base)
    others = {
        "seed": draw(6, 1, 9, one, count),
        "high seed": draw(5 + 2**32, 1, 9, one, count),
        "stream": draw(5, 2, 9, one, count),
        "iteration": draw(5, 1, 10, one, count),
        "sample": draw(5, 1, 9, one + 1, count),
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([base, other[0].double()]))[0, 1]
        assert abs(float(correlation)) < 5 / sqrt(count), name
    for lag in (1, 2, 4):
        assert abs(float(torch.corrcoef(torch.stack([base[lag:], base[:-lag]]))[0, 1])) < 5 / sqrt(count)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.integers(0, 41), st.integers(1, 9))
def test_a_value_depends_on_its_keys_alone(seed, iteration, count, batch):
    samples = torch.arange(batch) * 7 + 3
    for draw in (uniform, normal):
        whole = draw(seed, 1, iteration, samples, count)
        assert whole.shape == (batch, count)
        for i in range(batch):
            assert torch.equal(draw(seed, 1, iteration, samples[i : i + 1], count), whole[i : i + 1])
        assert torch.equal(draw(seed, 1, iteration, samples, count + 6)[:, :count], whole)


@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.integers(0, 200))
def test_a_permutation_is_one(seed, epoch, count):
    order = permutation(seed, epoch, count)
    assert sorted(order.tolist()) == list(range(count))
    assert torch.equal(permutation(seed, epoch, count), order)


def test_permutations_differ_and_are_fair():
    count, epochs = 10, 4000
    orders = torch.stack([permutation(1, epoch, count) for epoch in range(epochs)])
    assert len({tuple(order) for order in orders.tolist()}) > 0.99 * epochs
    assert not torch.equal(permutation(1, 0, 50), permutation(2, 0, 50))
    share = torch.stack([(orders == i).double().mean(0) for i in range(count)])
    assert float((share - 1 / count).abs().max()) < 5 * sqrt(0.1 * 0.9 / epochs)
