"""Profiles for hypothesis, tests that need a GPU, and memory that shows when nobody has written it."""

import os
from collections.abc import Iterator

# Another process interprets the kernels meanwhile (below): threads of the same small operators would wait for one
# another on the cores that are left. Read when torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from interpreted import Interpreted

from coverfast.kernels import INTERPRETED
from coverfast.ops.dispatch import KERNELS

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


_INTERPRETED = pytest.StashKey[Interpreted]()


def _waits(item: pytest.Item) -> bool:
    return "interpreted" in getattr(item, "fixturenames", ()) and bool(KERNELS) and not INTERPRETED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_waits)


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(_waits(item) for item in session.items) and not session.config.option.collectonly:
        session.config.stash[_INTERPRETED] = Interpreted()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _INTERPRETED in config.stash:
        config.stash[_INTERPRETED].stop()


@pytest.fixture
def interpreted(pytestconfig: pytest.Config) -> Interpreted:
    """The kernel tests, running in Triton's interpreter since the first test."""
    return pytestconfig.stash[_INTERPRETED]


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
