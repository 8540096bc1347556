"""Every recipe has a bound on its time: a server that does not answer is a
failure, not a wait. And each command that its page shows is typed by a test."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from types import FrameType

import pytest
from recipe import Recipe, never_typed

#: Seconds, for a busy machine; a recipe that needs more says so by
#: @pytest.mark.limit(SECONDS).
LIMIT = 600
#: The tests of this run that were chosen away, and how the others ended.
left_out: set[str] = set()
outcomes: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "limit(seconds): after so long a recipe has failed"
    )


def pytest_deselected(items: list[pytest.Item]) -> None:
    left_out.update(item.path.name for item in items)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.CallInfo[None], None]:
    report = (yield).get_result()
    if report.when == "call" or not report.passed:
        outcomes.setdefault(item.nodeid, report.outcome)


@pytest.fixture(scope="module", autouse=True)
def whole_page(request: pytest.FixtureRequest) -> Iterator[None]:
    """When all tests of a recipe have run, and none has failed, its page was
    typed from the first line to the last."""
    Recipe.typed.clear()
    yield
    session = request.session
    ended = {
        outcomes.get(item.nodeid, "never ran")
        for item in session.items
        if item.path == request.path
    }
    if (
        ended <= {"passed", "skipped"}
        and request.path.name not in left_out
        and not any("::" in word for word in session.config.args)
    ):
        assert {
            name: lines for name in Recipe.typed if (lines := never_typed(name))
        } == {}


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
