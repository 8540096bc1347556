"""What every test may use: a private machine with a real systemd user manager
and a loopback qrexec."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import trio
from scenario import Scene, measured

from qrexec_activate.loopback.machine import Machine


@pytest.fixture(scope="session")
def shared_machine() -> Iterator[Machine]:
    """One machine for all scenarios that clean up after themselves, which a
    Scene does."""
    with Machine(environment=measured()) as machine:
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


@pytest.fixture(params=["hand-over", "splice"])
def relay(request: pytest.FixtureRequest, scene: Scene) -> str:
    """Run a scenario once with each way of carrying bytes."""
    scene.options(RELAY=request.param)
    return str(request.param)
