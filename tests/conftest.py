"""What every test may use: a private machine with a real systemd user manager
and a loopback qrexec."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Any

import profiles  # noqa: F401
import pytest
import trio
from scenario import Scene, Stack, measured

from qrexec_activate.loopback.machine import Machine


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
    request: pytest.FixtureRequest,
    shared_machine: Machine,
    nursery: trio.Nursery,
) -> AsyncIterator[Scene]:
    scene = Scene(shared_machine, nursery)
    try:
        if "relay" in request.fixturenames:
            relay = request.getfixturevalue("relay")
            if relay == "hand-over" and scene.stack:
                scene.stack.needs_hand_over()
            scene.options(RELAY=relay)
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
def relay(request: pytest.FixtureRequest) -> str:
    """Run a scenario once with each way of carrying bytes.

    The scene looks at it: what pytest is only told to use, and no test takes as
    an argument, pytest-trio does not set up if it depends on a scene.
    """
    return str(request.param)


# ------------------------------------------------ many tests, side by side

HERE = Path(__file__).parent
#: These are slow as a whole, and begin first: they take the longest.
LONGEST = ("installed", "recipes")
#: How many tests of this process, or of others, were chosen away.
left_out = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--in-words",
        metavar="LIBRARIES",
        help="say in the end what was tested with these, what was not, and how"
        " to have it tested",
    )


def folder(item: pytest.Item) -> str:
    return item.path.relative_to(HERE).parts[0]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    for item in items:
        if folder(item) in LONGEST:
            item.add_marker(pytest.mark.slow)
    if not hasattr(config, "workerinput"):
        return
    # One process after the other takes the next file. The files with the most
    # tests come first, so that none is left to one process in the end.
    sizes = Counter(item.path for item in items)
    items.sort(
        key=lambda item: (
            LONGEST.index(folder(item)) if folder(item) in LONGEST else 2,
            -sizes[item.path],
            item.path,
        )
    )


def pytest_deselected(items: list[pytest.Item]) -> None:
    global left_out
    left_out += len(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        session.config.workeroutput["left_out"] = left_out


class SideBySide:
    """What only a process that divides the tests among others hears."""

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(
        self, config: pytest.Config, log: Any
    ) -> Any:
        from xdist.scheduler import LoadScopeScheduling

        class ByFile(LoadScopeScheduling):
            """Tests of a file have fixtures in common; recipes and packages
            boot containers."""

            def _split_scope(self, nodeid: str) -> str:
                file = nodeid.partition("::")[0]
                room = "/".join(file.split("/")[:2])
                if not room.endswith(LONGEST):
                    return file
                # Containers that are booted get in each other's way.
                return "containers"

        return ByFile(config, log)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        global left_out
        # Each of them has chosen for itself, and the same.
        left_out = getattr(node, "workeroutput", {}).get("left_out", left_out)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SideBySide())


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """In words, before the closing line."""
    libraries = config.getoption("--in-words")
    if not libraries:
        return
    ended = terminalreporter.stats
    say = terminalreporter.write_line
    say("")
    say(
        f"{len(ended.get('passed', ()))} tests passed with {libraries},"
        f" {len(ended.get('failed', ())) + len(ended.get('error', ()))} did not."
    )
    if left_out:
        say(
            f"{left_out} that are slow or that only show more of the same,"
            " recipes and packages were left out: make check-all runs them,"
            " too, and with all libraries what uses any."
        )
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in ended.get("skipped", ())
    )
    for reason, count in sorted(reasons.items()):
        say(f"{count} skipped here: {reason}")
    for step in os.environ.get("CHECK_FAILED", "").splitlines():
        say(f"Before these, there failed: {step}")
