"""Profiles for hypothesis, tests that need a GPU, and memory that shows when nobody has written it."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from coverfast.kernels import INTERPRETED

# No deadline, few examples, the same ones on every run in CI.
settings.register_profile(
    "coverfast",
    deadline=None,
    max_examples=25,
    derandomize=os.environ.get("CI", "").lower() in ("1", "true"),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# Interpreted kernels take a second an example: fewer, and as they were found.
settings.register_profile(
    "interpreter",
    settings.get_profile("coverfast"),
    max_examples=12,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
settings.load_profile("interpreter" if INTERPRETED else "coverfast")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA device")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written reads NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
