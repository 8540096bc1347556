"""Every recipe has a bound on its time: a server that does not answer is a
failure, not a wait."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

#: Seconds; a recipe that needs more says so by @pytest.mark.limit(SECONDS).
LIMIT = 120


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "limit(seconds): after so long a recipe has failed"
    )


@pytest.fixture(autouse=True)
def limited(request: pytest.FixtureRequest) -> Iterator[None]:
    marker = request.node.get_closest_marker("limit")
    seconds = marker.args[0] if marker else LIMIT

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the recipe did not end within {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
