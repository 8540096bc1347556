"""What every test may use: a private machine with a real systemd user manager
and a loopback qrexec."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any

import pytest
import trio
from hypothesis import settings
from scenario import Scene, Stack, measured

from qrexec_activate.loopback.machine import Machine

#: A check tries the same examples each time, and says nothing of how busy the
#: machine is. `--hypothesis-profile=others` looks for what these do not find.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("others", deadline=None)
#: For `make mutants`, which runs each test very often.
settings.register_profile("few", max_examples=10)
settings.load_profile("same")


@pytest.fixture(scope="session")
def shared_machine() -> Iterator[Machine]:
    """One machine for all scenarios that clean up after themselves, which a
    Scene does."""
    stack = Stack.given()
    own = {"QREXEC_ACTIVATE_CLIENT": str(stack.client)} if stack else {}
    with Machine(environment={**measured(), **own}) as machine:
        if stack:
            machine.client = stack.client
        yield machine


@pytest.fixture
async def scene(
    shared_machine: Machine, nursery: trio.Nursery
) -> AsyncIterator[Scene]:
    scene = Scene(shared_machine, nursery)
    try:
        yield scene
    finally:
        # pytest shows it where the test has failed.
        print(scene.log())
        scene.clean_up()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, Any, None]:
    """Say by name what a stack cannot do."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and Stack.lacking:
        path, line, _ = item.location
        report.longrepr = (path, line or 0, f"Skipped: {Stack.lacking}")


@pytest.fixture(params=["hand-over", "splice"])
def relay(request: pytest.FixtureRequest, scene: Scene) -> str:
    """Run a scenario once with each way of carrying bytes."""
    if request.param == "hand-over" and scene.stack:
        scene.stack.needs_hand_over()
    scene.options(RELAY=request.param)
    return str(request.param)
