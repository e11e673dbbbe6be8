"""Where the kernels run, and what they were launched with."""

import pytest

from coverfast.kernels import INTERPRETED
from coverfast.kernels.launch import Launch


@pytest.fixture(scope="session")
def device() -> str:
    """The CPU where Triton's interpreter is on, otherwise the GPU."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch, in order."""
    seen: list[Launch] = []
    run = Launch.run

    def spy(launch: Launch) -> None:
        seen.append(launch)
        run(launch)

    monkeypatch.setattr(Launch, "run", spy)
    return seen
